"""What all objectives on pairs have in common, what each computes, and that two processes compute the same as one."""

import math
import subprocess
from dataclasses import replace
from pathlib import Path

import as_torchrun
import pytest
import torch
from dual_objectives import CONFIGS, ROWS, batch, objective, result

from diptych.data.batch import CaptionedImageExamples
from diptych.dual.model import TowerOutput
from diptych.dual.objective import (
    Views,
    gather_rows,
    info_nce,
    multi_view_info_nce,
    multi_view_nt_xent,
    nt_xent,
    sigmoid_loss,
    similarities,
    unbind_captions,
)

SCRIPT = Path(__file__).with_name("dual_objectives.py")
NAMES = list(CONFIGS)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=2e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    return {name: result(module := objective(name), batch(module)) for name in NAMES}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    subprocess.run(as_torchrun.command(2, SCRIPT, out), check=True, timeout=240, capture_output=True)
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(name, chunk, alone, two_processes):
    """Values and gradients, the scale's too, with and without chunks."""
    for process in two_processes:
        assert_same(process[name, chunk], alone[name])


def test_one_process_gets_its_own_rows_back():
    rows = torch.randn(2, 3, 4)
    assert gather_rows(rows) is rows


@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing(name, alone):
    """Of three rows and a last one of two."""
    module = objective(name, chunk=3)
    assert_same(result(module, batch(module)), alone[name])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name, alone):
    """All of them, except what no loss reads: rows of words and positions that do not occur."""
    never = ("token_embedding", "position_embedding")
    for key, value in alone[name].items():
        if key.startswith("gradient/") and not any(part in key for part in never):
            assert value.abs().max() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name, alone):
    module = objective(name)
    given = batch(module)
    captions = module.config.captions

    def longer(side, value):
        return torch.nn.functional.pad(side.unflatten(1, (captions, -1)), (0, 4), value=value).flatten(1)

    pairs = CaptionedImageExamples(
        pixels_B3HW=given["pairs"].pixels_B3HW,
        ids_BL=longer(given["pairs"].ids_BL, 5),
        valid_BL=longer(given["pairs"].valid_BL, False),
    )
    assert_same(result(module, replace(given, streams={"pairs": pairs})), alone[name])


@pytest.mark.parametrize("name", ["clip", "siglip", "slip", "ito"])
def test_it_fits_one_batch(name):
    module = objective(name)
    given = batch(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        losses.append(module(given, 0).total)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def embedded(name):
    """The objective, and the towers' outputs for its views and captions, all in one batch."""
    module = objective(name)
    given = batch(module)
    c, rows = module.config, slice(0, ROWS)
    views = Views(given, c.augment, views=c.views, size=16, name="view")(rows)
    captions = unbind_captions(given["pairs"], rows, captions=c.captions)
    ids, valid = (torch.cat(side) for side in zip(*captions, strict=True))
    images = split(module.model.encode_images(torch.cat(views), keep_tokens=True))
    texts = split(module.model.encode_texts(ids, valid, keep_tokens=True))
    return module, given, images, texts, valid.split(ROWS)


def split(output):
    """The output for all views in one batch, view by view."""
    parts = zip(*(side.split(ROWS) for side in (output.pooled_BD, output.state_BW, output.tokens_BSD)), strict=True)
    return [TowerOutput(pooled_BD=pooled, state_BW=state, tokens_BSD=tokens) for pooled, state, tokens in parts]


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=-1)


@pytest.mark.parametrize("name", ["clip", "clip-views", "ito-0"])
def test_alignment_is_the_mean_over_pairs_of_view_and_caption(name):
    module, given, images, texts, _ = embedded(name)
    each = [info_nce(unit(i.pooled_BD), unit(t.pooled_BD), module.model.scale) for i in images for t in texts]
    torch.testing.assert_close(module(given, 0).total, sum(each) / len(each))


def test_siglip_is_the_sigmoid_loss():
    module, given, (image,), (text,), _ = embedded("siglip")
    assert module.model.scale.item() == pytest.approx(10)
    wanted = sigmoid_loss(unit(image.pooled_BD), unit(text.pooled_BD), module.model.scale, torch.tensor(-10.0))
    torch.testing.assert_close(module(given, 0).total, wanted)


def test_ito_adds_lambda_times_nt_xent_of_the_fused_views():
    module, given, images, (text,), (valid,) = embedded("ito")
    losses = module(given, 0)
    positions = module.model.clip.text_model.embeddings.position_embedding.weight[: valid.shape[1]]
    fused = [module.fusion(image.tokens_BSD, text.tokens_BSD, valid, positions) for image in images]
    fusion = nt_xent(*fused, module.model.scale)
    torch.testing.assert_close(losses.terms["fusion"], fusion)
    torch.testing.assert_close(losses.total, losses.terms["align"] + 2 * fusion)


def test_each_view_is_fused_with_a_caption_in_turn():
    module, given, images, texts, valid = embedded("ito-captions")
    positions = module.model.text_positions(valid[0].shape[1])
    fused = [
        module.fusion(image.tokens_BSD, texts[t].tokens_BSD, valid[t], positions)
        for image, t in zip(images, (0, 1, 0), strict=True)
    ]
    pairs = ((0, 1), (0, 2), (1, 2))
    wanted = sum(nt_xent(fused[a], fused[b], module.model.scale) for a, b in pairs) / 3
    torch.testing.assert_close(module(given, 0).terms["fusion"], wanted)


def test_slips_clip_part_sees_the_weak_view_alone():
    module, given, (image,), (text,), _ = embedded("slip")
    losses = module(given, 0)
    wanted = info_nce(unit(image.pooled_BD), unit(text.pooled_BD), module.model.scale)
    torch.testing.assert_close(losses.terms["align"], wanted)
    torch.testing.assert_close(losses.total, wanted + losses.terms["simclr"])


def test_without_its_weight_there_is_no_fusion():
    assert objective("ito-0").fusion is None
    names = {name for name, _ in objective("ito").named_parameters() if name.startswith("fusion.")}
    assert len(names) > 10


def test_the_scale_is_held_at_100_before_it_is_used():
    module = objective("clip")
    module.model.clip.logit_scale.data.fill_(9.0)
    assert module(batch(module), 0).measures["align/scale"].item() == pytest.approx(100, rel=1e-4)


FEW, WIDTH = 5, 8
SCALE = torch.tensor(7.0)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, WIDTH, generator=generator), dim=-1)


def log_softmax_at(logits: list[float], index: int) -> float:
    return logits[index] - math.log(sum(math.exp(value) for value in logits))


def test_info_nce_equals_loops():
    image, text = vectors(FEW), vectors(FEW, seed=1)
    total = 0.0
    for i in range(FEW):
        total -= log_softmax_at([7 * float(image[i] @ text[j]) for j in range(FEW)], i)
        total -= log_softmax_at([7 * float(text[i] @ image[j]) for j in range(FEW)], i)
    assert info_nce(image, text, SCALE).item() == pytest.approx(total / (2 * FEW), rel=1e-5)


def test_info_nce_of_orthonormal_pairs():
    """Own cosine 1, all others 0: -log e^s / (e^s + B - 1)."""
    unit = torch.eye(WIDTH)[:FEW]
    assert info_nce(unit, unit, SCALE).item() == pytest.approx(math.log(math.exp(7) + FEW - 1) - 7, abs=1e-5)
    same = torch.ones(FEW, WIDTH) / math.sqrt(WIDTH)
    assert info_nce(same, same, SCALE).item() == pytest.approx(math.log(FEW), rel=1e-5)


def test_multi_view_is_the_mean_over_all_pairs_of_view_and_caption():
    images, texts = vectors(3, FEW), vectors(2, FEW, seed=1)
    wanted = sum(info_nce(images[v], texts[m], SCALE) for v in range(3) for m in range(2)) / 6
    torch.testing.assert_close(multi_view_info_nce(images, texts, SCALE), wanted)


def test_nt_xent_equals_loops():
    first, second = vectors(FEW), vectors(FEW, seed=1)
    total = 0.0
    for a, b in ((first, second), (second, first)):
        for i in range(FEW):
            others = [7 * float(a[i] @ a[j]) for j in range(FEW) if j != i]
            across = [7 * float(a[i] @ b[j]) for j in range(FEW)]
            total -= log_softmax_at([*across, *others], i)
    assert nt_xent(first, second, SCALE).item() == pytest.approx(total / (2 * FEW), rel=1e-5)


def test_nt_xent_of_orthonormal_pairs():
    """Own 1; B - 1 zeros in the other view and B - 1 in the same one."""
    unit = torch.eye(WIDTH)[:FEW]
    wanted = math.log(math.exp(7) + 2 * (FEW - 1)) - 7
    assert nt_xent(unit, unit, SCALE).item() == pytest.approx(wanted, abs=1e-5)


def test_more_views_are_compared_two_by_two():
    views = vectors(3, FEW)
    wanted = (
        nt_xent(views[0], views[1], 5.0) + nt_xent(views[0], views[2], 5.0) + nt_xent(views[1], views[2], 5.0)
    ) / 3
    torch.testing.assert_close(multi_view_nt_xent(views, 5.0), wanted)


def test_sigmoid_loss_equals_loops():
    image, text = vectors(FEW), vectors(FEW, seed=1)
    total = 0.0
    for i in range(FEW):
        for j in range(FEW):
            logit = (1 if i == j else -1) * (7 * float(image[i] @ text[j]) - 3)
            total += math.log(1 + math.exp(-logit))
    assert sigmoid_loss(image, text, SCALE, torch.tensor(-3.0)).item() == pytest.approx(total / FEW, rel=1e-5)


@pytest.mark.parametrize("loss", [info_nce, nt_xent, lambda a, b, s: sigmoid_loss(a, b, s, torch.tensor(-1.0))])
def test_gradients_reach_both_sides_and_the_scale(loss):
    a, b, scale = vectors(FEW).requires_grad_(), vectors(FEW, seed=1).requires_grad_(), SCALE.clone().requires_grad_()
    gradients = torch.autograd.grad(loss(a, b, scale), [a, b, scale])
    assert all(gradient.abs().amax() > 1e-4 for gradient in gradients)
    assert all((gradient.abs().amax(-1) > 0).all() for gradient in gradients[:2])


def test_similarities_are_fp32_under_autocast():
    a, b = vectors(FEW), vectors(FEW, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = similarities(a, b, SCALE)
    torch.testing.assert_close(found, 7 * a @ b.T, rtol=0, atol=1e-6)
