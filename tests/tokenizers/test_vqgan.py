"""The losses of the image tokenizer, its discriminator and its perceptual distance."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from diptych.data.batch import Batch, ImageExamples
from diptych.data.sources import open_finite
from diptych.data.sources.columns import Columns
from diptych.data.splits import Subset
from diptych.errors import UserError
from diptych.rng import StepRNG
from diptych.tokenizers.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, nearest_codes
from diptych.tokenizers.training import TokenizerStage
from diptych.tokenizers.vqgan import (
    VQGAN,
    Codebook,
    CodebookConfig,
    PatchDiscriminator,
    PerceptualNetwork,
    VQGANConfig,
    edge_distance,
    hinge,
    k_means,
    psnr,
    sample_rows,
)
from diptych.train.checkpoint import newest
from diptych.train.config import OptimConfig, TrainConfig

# The objective


SMALL = ImageTokenizerConfig(image_size=16, codebook_size=32, code_dim=4, widths=(8, 16), blocks=1, groups=4, patch=2)
PLAIN = VQGANConfig(adversarial_weight=0.0)
GAN = VQGANConfig(adversarial_weight=0.5, adversarial_start=0, discriminator_width=8, discriminator_layers=1)


def batch(step: int = 0, rows: int = 4) -> Batch:
    pixels = torch.randint(256, (rows, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    pixels = F.interpolate(pixels, 16)  # flat blocks
    return Batch(rng=StepRNG(0, step), streams={"images": ImageExamples(pixels_B3HW=pixels)})


def objective(config: VQGANConfig) -> VQGAN:
    made = VQGAN(ImageTokenizer.from_config(SMALL), config, steps=100)
    made(batch(), 0)  # seeds the codebook
    return made


def gradients(loss: torch.Tensor, made: VQGAN) -> dict[str, torch.Tensor]:
    made.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in made.named_parameters() if weight.grad is not None}


def test_total_is_the_sum_it_says():
    made = objective(dataclasses.replace(PLAIN, squared_weight=2.0, perceptual_weight=0.5, commitment_weight=0.3))
    made.eval()
    losses = made(batch(), 1)
    real = made.tokenizer.pixels_to_input(batch()["images"].pixels_B3HW)
    latents = made.tokenizer.latents(real)
    codes = made.tokenizer.codebook[made.tokenizer.encode(batch()["images"].pixels_B3HW)]
    flat = latents.flatten(2).transpose(1, 2)
    fake = made.tokenizer.reconstruct(codes.transpose(1, 2).view_as(latents))
    reconstruction = (fake - real).abs().mean() + 2 * (fake - real).square().mean() + 0.5 * edge_distance(fake, real)
    torch.testing.assert_close(losses.total, reconstruction + 1.3 * (flat - codes).square().mean())
    torch.testing.assert_close(losses.measures["psnr"], -10 * torch.log10((fake - real).square().mean()))
    assert all(not value.requires_grad for value in [*losses.terms.values(), *losses.measures.values()])


def test_gradient_reaches_every_weight_of_the_tokenizer_straight_through_the_codes():
    made = objective(dataclasses.replace(PLAIN, commitment_weight=0.0))
    found = gradients(made(batch(), 1).total, made)
    assert set(found) == {name for name, _ in made.named_parameters()}
    assert found["tokenizer.network.encoder.conv_in.weight"].abs().sum() > 0
    assert found["tokenizer.network.quantize.embedding.weight"].abs().sum() > 0


def test_one_total_gives_generator_and_discriminator_each_its_own_gradient():
    made = objective(GAN)
    made.eval()  # the codebook holds still between the two computations
    together = gradients(made(batch(), 1).total, made)

    real = made.tokenizer.pixels_to_input(batch()["images"].pixels_B3HW)
    quantized = made.codebook(made.tokenizer.latents(real), made.tokenizer.codebook, rng=StepRNG(0, 1), step=1)
    fake = made.tokenizer.reconstruct(quantized.latents_BEhw)
    generator_loss = (
        (fake - real).abs().mean() + edge_distance(fake, real) + quantized.codebook + 0.25 * quantized.commitment
    ) - 0.5 * made.discriminator(fake).mean()
    generator = gradients(generator_loss, made)
    discriminator = gradients(hinge(made.discriminator(real), made.discriminator(fake.detach())), made)
    assert set(together) == {name for name, _ in made.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in together.values())
    for name, gradient in together.items():
        alone = discriminator if name.startswith("discriminator.") else generator
        torch.testing.assert_close(gradient, alone[name], msg=name)
    assert together["discriminator.stages.0.weight"].abs().sum() > 0


def test_the_discriminator_waits_for_its_start():
    made = objective(dataclasses.replace(GAN, adversarial_start=0.1))
    assert "discriminator" not in made(batch(), 9).terms
    losses = made(batch(), 10)
    assert losses.terms["discriminator"].item() == pytest.approx(2, abs=0.2)
    assert VQGAN(ImageTokenizer.from_config(SMALL), PLAIN, steps=100).discriminator is None


def test_adaptive_balance_matches_the_lengths_of_the_gradients():
    made = objective(dataclasses.replace(GAN, adversarial_balance="adaptive"))
    real = made.tokenizer.pixels_to_input(batch()["images"].pixels_B3HW)
    fake = (real * 0.9).requires_grad_()
    reconstruction = F.l1_loss(fake, real)
    generator, _, scale = made._adversarial(fake, real, reconstruction)
    lengths = [torch.autograd.grad(loss, fake, retain_graph=True)[0].norm() for loss in (reconstruction, generator)]
    torch.testing.assert_close(lengths[1] * scale, lengths[0], rtol=1e-3, atol=0)
    assert not scale.requires_grad
    made(batch(), 1).total.backward()
    with torch.no_grad():
        made(batch(), 1)  # an evaluation has no gradients to balance


def test_hinge_and_psnr_by_hand():
    assert hinge(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])).item() == pytest.approx(0.25 + 0.5)
    assert psnr(torch.tensor(0.01), peak=1.0).item() == pytest.approx(20)
    assert psnr(torch.tensor(0.04), peak=2.0).item() == pytest.approx(20)


def test_a_seed_decides_the_discriminator():
    tokenizer = ImageTokenizer.from_config(SMALL)
    first, second, other = (
        VQGAN(tokenizer, GAN, steps=100, seed=seed).discriminator.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["stages.0.weight"], other["stages.0.weight"])


def test_one_batch_is_learned_by_heart():
    config = dataclasses.replace(
        PLAIN, squared_weight=5.0, codebook=CodebookConfig(start=0.1, reset_every=10, reset_until=0.6)
    )
    made = VQGAN(ImageTokenizer.from_config(SMALL), config, steps=100)
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    seen = []
    for step in range(80):
        losses = made(batch(step), step)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        seen.append(losses.total.item())
    assert seen[-1] < seen[0] / 2
    assert losses.measures["perplexity"] > 8


# The discriminator


def images(*, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_field_of_view_is_what_the_docstring_says():
    for layers, sees in ((1, 16), (2, 34)):
        discriminator = PatchDiscriminator(width=4, layers=layers).double()
        for module in discriminator.modules():
            if isinstance(module, torch.nn.GroupNorm):  # sees everything, on purpose; not a patch's business
                module.forward = lambda x: x
        picture = torch.rand(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
        verdicts = discriminator(picture)
        middle = verdicts.shape[-1] // 2
        verdicts[0, 0, middle, middle].backward()
        touched = picture.grad[0].abs().sum(0).amax(1).nonzero()
        assert touched.max() - touched.min() + 1 == sees


def test_a_verdict_does_not_depend_on_the_other_images():
    discriminator = PatchDiscriminator(width=8, layers=2)
    together, alone = discriminator(images()), discriminator(images()[:1])
    assert together.shape == (2, 1, 6, 6)
    torch.testing.assert_close(together[:1], alone)


def test_no_weight_is_left_uninitialized_and_no_buffers():
    discriminator = PatchDiscriminator(width=8, layers=2)
    assert not list(discriminator.buffers())
    for name, weight in discriminator.named_parameters():
        if weight.ndim == 4:
            assert 0.01 < weight.std() < 0.03, name
        else:
            assert set(weight.unique().tolist()) <= {0.0, 1.0}, name


# The perceptual distance


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    from transformers import ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("backbone")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
        ResNetModel(config).save_pretrained(folder)
    return with_pixels(folder)


def with_pixels(folder: Path, mean: float = 0.4) -> str:
    """Write how the model of ``folder`` sees pixels."""
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    settings |= {"image_mean": [mean] * 3, "image_std": [0.2] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture
def vit(tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    return with_pixels(tmp_path / "vit")


def test_a_distance_of_no_weight_is_not_computed(monkeypatch):
    made = objective(dataclasses.replace(PLAIN, perceptual_weight=0.0))
    weighted = objective(dataclasses.replace(PLAIN, perceptual_weight=1.0))(batch(), step=0)
    monkeypatch.setattr("diptych.tokenizers.vqgan.edge_distance", None)
    plain = made(batch(), step=0)
    torch.testing.assert_close(plain.total, weighted.total - weighted.terms["perceptual"])
    assert plain.terms["perceptual"] == 0


def test_edge_distance_by_hand():
    left, right = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    left[..., 2:] = 1  # one vertical edge: a third of the horizontal differences at full size, all of them at half
    assert edge_distance(left, right, scales=2).item() == pytest.approx((1 / 3 + 1) / 2)
    assert edge_distance(left + 0.3, left, scales=2).item() == pytest.approx(0, abs=1e-6)


def test_edge_distance_minds_blur_more_than_l1_does():
    sharp = torch.zeros(1, 3, 16, 16)
    sharp[..., 8:] = 1
    blurred = torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(sharp, (2, 2, 0, 0), "replicate"), (1, 5), stride=1
    )
    darker = sharp - (blurred - sharp).abs().mean()  # as far off in L1
    assert edge_distance(blurred, sharp) > 10 * edge_distance(darker, sharp)


@pytest.mark.parametrize("kind", ["backbone", "vit"])
def test_network_tells_images_apart_and_gives_gradient_to_the_output_only(kind, request):
    network = PerceptualNetwork(request.getfixturevalue(kind), image_size=16)
    output, target = (images(seed=seed)[..., :16, :16].clone().requires_grad_() for seed in (0, 1))
    assert network(target, target).item() == 0
    distance = network(output, target)
    assert distance > 0.01
    distance.backward()
    assert output.grad.abs().sum() > 0
    assert target.grad is None
    assert all(weight.grad is None and not weight.requires_grad for weight in network.parameters())


def test_network_compares_the_last_layer_of_each_resolution_and_stays_in_evaluation_mode(backbone):
    network = PerceptualNetwork(backbone, image_size=16).train()
    assert not any(module.training for module in network.modules())
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert [layer.shape[1:] for layer in network.features(images())] == [(4, 4, 4), (8, 2, 2)]
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_model_of_one_resolution_is_compared_at_four_depths_in_its_own_size(vit):
    network = PerceptualNetwork(vit, image_size=16)
    assert (network.layers, network.input_size) == ([2, 3, 4, 6], 32)
    small = images()[..., :16, :16]
    assert [layer.shape[1:] for layer in network.features(small)] == [(17, 8)] * 4


def test_network_is_lpips_without_learned_weights_on_normalized_pixels(backbone):
    from transformers import ResNetModel

    output, target = images(seed=0), images(seed=1)
    model = ResNetModel.from_pretrained(backbone).eval()

    def layers(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return model((image - 0.4) / 0.2, output_hidden_states=True).hidden_states[1:]  # the stem has a stage's size

    with torch.no_grad():
        unit = [[layer / layer.norm(dim=1, keepdim=True) for layer in layers(image)] for image in (output, target)]
        expected = [(left - right).square().sum(1).mean() for left, right in zip(*unit, strict=True)]
        found = PerceptualNetwork(backbone, image_size=32)(output, target)
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-3, atol=1e-5)


def test_the_objective_uses_it_and_does_not_save_it(backbone):
    made = objective(dataclasses.replace(PLAIN, perceptual=backbone, perceptual_weight=0.5))
    plain = objective(PLAIN)
    assert made.state_dict().keys() == plain.state_dict().keys()
    made.eval(), plain.eval()
    losses, edges = made(batch(), 1), plain(batch(), 1)
    assert losses.terms["pixel"] == edges.terms["pixel"]
    torch.testing.assert_close(losses.total - 0.5 * losses.terms["perceptual"], edges.total - edges.terms["perceptual"])
    found, without = gradients(losses.total, made), gradients(edges.total, plain)
    assert found.keys() == without.keys()
    assert not torch.equal(
        found["tokenizer.network.decoder.conv_in.weight"], without["tokenizer.network.decoder.conv_in.weight"]
    )


def test_a_run_with_it_resumes_exactly_and_knows_its_weights(backbone, tmp_path):
    def fit(out: Path, *, steps: int) -> dict[str, torch.Tensor]:
        stage = TokenizerStage(
            model=SMALL,
            objective=dataclasses.replace(PLAIN, perceptual=str(tmp_path / "judge")),
            train=TrainConfig(steps=steps, batch_size=4, tensorboard=False, workers=0, device="cpu"),
            optim=OptimConfig(schedule="constant", warmup_steps=1),
        )
        source = open_finite("scenes:?count=12", Columns())
        stage.fit([Subset(source, np.arange(12))], out)
        checkpoint, _ = newest(out / "checkpoints")
        return checkpoint.tensors("model")

    shutil.copytree(backbone, tmp_path / "judge")
    whole = fit(tmp_path / "whole", steps=4)
    fit(tmp_path / "halves", steps=2)
    resumed = fit(tmp_path / "halves", steps=4)
    assert whole.keys() == resumed.keys()
    assert not any(name.startswith("perceptual") for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    weights = load_file(tmp_path / "judge" / "model.safetensors")
    weights["embedder.embedder.convolution.weight"] *= 2
    save_file(weights, tmp_path / "judge" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="perceptual"):
        fit(tmp_path / "halves", steps=6)


@pytest.mark.parametrize("model", ["text", "run"])
def test_what_gives_no_features_of_places_is_a_user_error_of_one_line(model, tmp_path):
    if model == "text":
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        BertModel(BertConfig(**sizes, vocab_size=20)).save_pretrained(tmp_path)
        with_pixels(tmp_path)
    with pytest.raises(UserError, match=r"no features of single places|cannot be loaded") as error:
        PerceptualNetwork(str(tmp_path), image_size=16)
    assert "\n" not in str(error.value)


def test_missing_weights_are_a_user_error(backbone, tmp_path):
    for file in Path(backbone).iterdir():
        shutil.copy(file, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("embedder.embedder.convolution.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing"):
        PerceptualNetwork(str(tmp_path), image_size=16)


def test_a_folder_without_a_backbone_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded as a vision model") as error:
        PerceptualNetwork(str(tmp_path), image_size=16)
    assert "\n" not in str(error.value)


K, E = 8, 2


def latents(seed: int = 0, rows: int = 4) -> torch.Tensor:
    """[rows, E, 4, 4]: four clear heaps."""
    generator = torch.Generator().manual_seed(seed)
    heaps = torch.tensor([[-3.0, -3], [-3, 3], [3, -3], [3, 3]])
    points = heaps[torch.randint(4, (rows * 16,), generator=generator)] + 0.1 * torch.randn(
        rows * 16, 2, generator=generator
    )
    return points.view(rows, 4, 4, 2).permute(0, 3, 1, 2)


def run(codebook: Codebook, codes: torch.Tensor, step: int, seed: int = 0, world: torch.Tensor | None = None):
    return codebook(latents(step) if world is None else world, codes, rng=StepRNG(seed, step), step=step)


def test_before_the_start_latents_pass_and_codes_rest():
    codes = torch.nn.Parameter(torch.zeros(K, E))
    quantised = run(Codebook(CodebookConfig(start=0.5), codebook_size=K, steps=10), codes, step=4)
    assert torch.equal(quantised.latents_BEhw, latents(4))
    assert quantised.codebook == quantised.commitment == 0
    assert not codes.any()


def test_the_start_seeds_the_codes_from_the_latents():
    codes = torch.nn.Parameter(torch.zeros(K, E))
    quantised = run(Codebook(CodebookConfig(start=0.5), codebook_size=K, steps=10), codes, step=5)
    assert quantised.commitment < 0.05
    assert quantised.perplexity > 3.5
    kept = torch.nn.Parameter(torch.ones(K, E))
    run(Codebook(CodebookConfig(start=-1), codebook_size=K, steps=10), kept, step=0)
    assert (kept == 1).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 60, 2000])
def test_a_training_of_any_length_quantizes(steps):
    """A fixed step would lie beyond the end of one that was shortened by hand."""
    codebook = Codebook(CodebookConfig(start=0.175, reset_until=0.7), codebook_size=K, steps=steps)
    assert codebook.start < steps
    assert codebook.start == min(round(0.175 * steps), steps - 1)


@pytest.mark.parametrize("given", [{"start": 350}, {"reset_until": 1400}, {"start": -0.5}])
def test_a_number_of_steps_is_no_share(given):
    with pytest.raises(UserError, match=r"is a share of the steps, from 0 to 1"):
        Codebook(CodebookConfig(**given), codebook_size=K, steps=2000)


def test_output_is_the_nearest_code_and_the_gradient_goes_straight_through():
    codes = torch.nn.Parameter(torch.randn(K, E, generator=torch.Generator().manual_seed(1)))
    z = latents().requires_grad_()
    quantised = run(Codebook(CodebookConfig(start=-1), codebook_size=K, steps=10), codes, step=0, world=z)
    flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
    expected = codes[nearest_codes(flat, codes.detach())].view(4, 4, 4, E).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantised.latents_BEhw, expected, atol=1e-6, rtol=0)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (quantised.latents_BEhw * weights).sum().backward()
    assert torch.equal(z.grad, weights)
    assert codes.grad is None


def test_each_of_the_two_losses_moves_one_side():
    codes = torch.nn.Parameter(torch.randn(K, E, generator=torch.Generator().manual_seed(1)))
    z = latents().requires_grad_()
    quantised = run(Codebook(CodebookConfig(start=-1), codebook_size=K, steps=10), codes, step=0, world=z)
    assert torch.autograd.grad(quantised.codebook, (z, codes), allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(quantised.commitment, (z, codes), allow_unused=True)[1] is None
    torch.testing.assert_close(quantised.codebook, quantised.commitment)


def test_dead_codes_are_reseeded_and_live_ones_are_not():
    config = CodebookConfig(start=-1, reset_every=4, usage_decay=0.3)
    codebook = Codebook(config, codebook_size=K, steps=10)
    codes = torch.nn.Parameter(torch.full((K, E), 100.0))
    with torch.no_grad():
        codes[:2] = torch.tensor([[-3.0, 0], [3, 0]])  # these two share everything
    for step in range(5):
        assert torch.equal(codes[2:], torch.full((K - 2, E), 100.0))
        run(codebook, codes, step)
    assert codes[2:].abs().max() < 4  # the six that lay far from everything have moved among the latents
    assert torch.equal(codes[:2], torch.tensor([[-3.0, 0], [3, 0]]))
    assert run(codebook, codes, 5).perplexity > 2


def test_resets_end_and_evaluation_changes_nothing():
    codes = torch.nn.Parameter(torch.full((K, E), 100.0))
    codebook = Codebook(
        CodebookConfig(start=-1, reset_every=1, reset_until=0.3, usage_decay=0.0), codebook_size=K, steps=10
    )
    usage = codebook.usage_K.clone()
    codebook.eval()
    run(codebook, codes, 2)
    assert torch.equal(codebook.usage_K, usage)
    codebook.train()
    for step in range(3, 9):
        run(codebook, codes, step)
    assert (codes == 100).all()
    assert not torch.equal(codebook.usage_K, usage)


def test_resets_depend_on_the_draws_only_and_resume_exactly():
    def trained(steps: range, codebook: Codebook, codes: torch.nn.Parameter, seed: int = 0) -> torch.Tensor:
        for step in steps:
            run(codebook, codes, step, seed)
        return codes.detach().clone()

    config = CodebookConfig(start=0, reset_every=2, usage_decay=0.5)
    whole = trained(range(9), Codebook(config, codebook_size=K, steps=10), torch.nn.Parameter(torch.zeros(K, E)))
    first = Codebook(config, codebook_size=K, steps=10)
    half = trained(range(5), first, torch.nn.Parameter(torch.zeros(K, E)))
    second = Codebook(config, codebook_size=K, steps=10)
    second.load_state_dict(first.state_dict())
    torch.rand(3)  # the global generator has no say
    assert torch.equal(trained(range(5, 9), second, torch.nn.Parameter(half)), whole)
    other = trained(
        range(9), Codebook(config, codebook_size=K, steps=10), torch.nn.Parameter(torch.zeros(K, E)), seed=1
    )
    assert not torch.equal(other, whole)


def test_k_means_finds_heaps_and_samples_do_not_repeat_needlessly():
    points = latents(rows=8).permute(0, 2, 3, 1).flatten(0, 2)
    centres = k_means(points, 16, 10, torch.Generator().manual_seed(0))
    distance = torch.cdist(points, centres).amin(1)
    assert distance.mean() < 0.1
    assert centres.isfinite().all()
    rows = torch.arange(6.0)[:, None]
    drawn = sample_rows(rows, 6, torch.Generator().manual_seed(0)).flatten()
    assert sorted(drawn.tolist()) == [0, 1, 2, 3, 4, 5]
    assert len(sample_rows(rows, 15, torch.Generator().manual_seed(0))) == 15
