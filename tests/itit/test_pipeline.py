import io
import json

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

import diptych
from diptych.data.scenes import ScenesSource
from diptych.data.store import DataTokenizers
from diptych.errors import UserError
from diptych.itit.data import data_tokenizers
from diptych.itit.generation import ImageGenerationConfig, TextGenerationConfig
from diptych.itit.model import ITIT
from diptych.itit.pipeline import Diptych

IMAGES = ImageGenerationConfig(steps=3, guidance=1.0, temperature=4.0)
TEXTS = TextGenerationConfig(beams=2)


@pytest.fixture
def made(tokenizer, text_encoder, model) -> Diptych:
    return Diptych(tokenizer, text_encoder, model, image_generation=IMAGES, text_generation=TEXTS, precision="fp32")


@pytest.fixture
def run(made, tmp_path):
    folder = tmp_path / "run"
    for part, whole in (("tokenizer", made.tokenizer), ("text_encoder", made.text_encoder), ("model", made.model)):
        whole.save_pretrained(folder / part)
    generation = {"image": {"steps": 3, "guidance": 1.0, "temperature": 4.0}, "text": {"beams": 2}}
    (folder / "config.json").write_text(json.dumps({"run": {"generation": generation}}))
    return folder


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return ScenesSource(count=5).images(range(5), 32)


@pytest.fixture(scope="module")
def wide() -> np.ndarray:
    """Taller than wide and larger than the tokenizer's images."""
    return np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)


def test_captions_have_texts_and_scores(made, pixels):
    found = made.captions(list(pixels))
    assert [caption.text for caption in found] == made.caption(list(pixels))
    assert all(isinstance(caption.text, str) and caption.score < 0 for caption in found)
    assert [caption.score for caption in made.captions(list(pixels[:1]), beams=1)] == [None]
    assert made.captions([]) == []


def test_candidates_are_ranked_by_the_image_that_they_make_probable(made, pixels):
    encoded = made.encode(pixels)
    by_score = made.candidates_encoded(encoded, count=4)
    assert [each[0].text for each in by_score] == [c.text for c in made.caption_encoded(encoded, beams=4)]
    by_image = made.candidates_encoded(encoded, count=2, best_of=4)
    for row, several in enumerate(by_image):
        assert {each.text for each in several} <= {each.text for each in by_score[row]}
        texts = [each.text for each in by_score[row]]
        ids, _ = made.text_encoder.tokenize(texts, length=made.model.config.max_text_len)
        nats = made.image_nats(encoded.tokens_BN[row].expand(len(texts), -1), ids)
        best = sorted(zip(nats.tolist(), texts, strict=True))[:2]
        assert [each.image_score for each in several] == pytest.approx([-value for value, _ in best], abs=1e-3)


def test_a_single_image_is_no_list_of_characters(made, run, wide, tmp_path):
    Image.fromarray(wide).save(tmp_path / "photo.png")
    expected = made.caption([tmp_path / "photo.png"])
    for one in (tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(wide), wide):
        assert made.caption(one) == expected
    assert len(made.caption(np.stack([wide, wide]))) == 2


def test_captions_need_no_text_encoder(run, pixels):
    (run / "text_encoder/model.safetensors").unlink()
    assert len(Diptych.from_pretrained(run, device="cpu").caption(list(pixels[:1]))) == 1


def test_a_run_of_another_kind_is_told_apart(run):
    """The message must not send the user to train on: nothing is unfinished."""
    (run / "config.json").write_text(json.dumps({"kind": "dual", "recipe": "ito-tiny"}))
    with pytest.raises(UserError, match="kind 'dual' neither captions nor generates images") as caught:
        Diptych.from_pretrained(run)
    assert "finish" not in str(caught.value)
    with pytest.raises(UserError, match="kind 'dual' holds no classifier"):
        diptych.Classifier.from_pretrained(run)
    (run / "config.json").write_text(json.dumps({"kind": "itit", "recipe": "itit-tiny"}))
    with pytest.raises(UserError, match="kind 'itit' holds no dual encoder"):
        diptych.DualEncoder.from_pretrained(run)


def test_the_libraries_show_no_progress(run, made, monkeypatch, capfd):
    """As in a process of a user, which no command has told to be calm."""
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    Diptych.from_pretrained(run, device="cpu").imagine_pixels("a red circle")
    made.text_encoder.save_pretrained(run / "again")
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.01), ("int8", 0.03)])
def test_fewer_bits_are_near_fp32(made, run, pixels, precision, tolerance):
    near = Diptych.from_pretrained(run, device="cpu", precision=precision)
    exact = [caption.score for caption in made.captions(list(pixels))]
    scores = [caption.score for caption in near.captions(list(pixels))]
    assert scores != exact
    assert scores == pytest.approx(exact, rel=tolerance)
    assert near.imagine_pixels(["a red circle"]).shape == (1, 32, 32, 3)


def test_8_bits_leave_the_given_network_as_it_was(made):
    before = made.model.state_dict().keys()
    Diptych(made.tokenizer, made.text_encoder, made.model, precision="int8")
    assert made.model.state_dict().keys() == before


def test_many_images_are_captioned_in_pieces(made, pixels, monkeypatch):
    whole = made.captions(list(pixels))
    monkeypatch.setattr("diptych.itit.pipeline._ROWS", 2)
    pieces = made.captions(list(pixels))
    assert [caption.text for caption in pieces] == [caption.text for caption in whole]
    assert [c.score for c in pieces] == pytest.approx([c.score for c in whole], abs=1e-4)


def test_a_path_a_pil_image_and_an_array_give_the_same_caption(made, wide, tmp_path):
    image = Image.fromarray(wide)
    image.save(tmp_path / "wide.png")
    views = [tmp_path / "wide.png", str(tmp_path / "wide.png"), image, wide]
    for view in views:
        np.testing.assert_array_equal(made.read(view), made.read(wide))
    assert made.read(wide).shape == (32, 32, 3)
    captions = made.captions(views)
    assert len({(caption.text, caption.score) for caption in captions}) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_pil_images_of_any_mode_are_read_as_files_are(made, wide, tmp_path, mode):
    if mode in ("I;16", "I", "F"):
        kind, white = {"I;16": (np.uint16, 65535), "I": (np.int32, 255), "F": (np.float32, 255)}[mode]
        image = Image.fromarray((wide[..., 0] * (white / 255)).astype(kind))
    else:
        image = Image.fromarray(wide).convert(mode)
    image.save(tmp_path / "image.tiff")
    if mode == "YCbCr" and PIL.__version__ < "13":
        pytest.skip("Pillow 12 cannot read the YCbCr TIFFs that it writes")
    np.testing.assert_array_equal(made.read(image), made.read(tmp_path / "image.tiff"))


def test_a_pil_image_is_turned_as_its_file_is(made, wide, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(wide, -1).copy()
    for view in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert np.abs(made.read(view).astype(int) - made.read(upright)).max() <= 1


@pytest.mark.parametrize("wrong", [np.zeros((8, 8)), np.zeros((8, 8, 4), np.uint8), np.zeros((3, 8, 8), np.uint8)])
def test_other_arrays_are_refused(made, wrong):
    with pytest.raises(UserError, match=r"give uint8 \[height, width, 3\]"):
        made.caption([wrong])


def test_images_follow_from_text_and_seed(made, scene_texts):
    first = made.imagine_pixels(scene_texts[:3], seed=1)
    assert (first.shape, first.dtype) == ((3, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(first, made.imagine_pixels(scene_texts[:3], seed=1))
    assert (first != made.imagine_pixels(scene_texts[:3], seed=2)).any(axis=(1, 2, 3)).all()
    assert (first[0] != made.imagine_pixels([scene_texts[0]] * 2, seed=1)[1]).any()


def test_the_image_of_a_text_does_not_depend_on_its_place(made, scene_texts, monkeypatch):
    monkeypatch.setattr("diptych.itit.pipeline._ROWS", 2)
    one, two, three = (made.imagine_tokens([text], seed=1)[0] for text in scene_texts[:3])
    assert len({tuple(row.tolist()) for row in (one, two, three)}) == 3
    found = made.imagine_tokens([scene_texts[i] for i in (2, 0, 1, 0)], seed=1)
    assert torch.equal(found[:3], torch.stack([three, one, two]))
    assert not torch.equal(found[3], one)  # a repeated text gets another image


def test_prompts_are_read_as_the_tokenizer_was_trained(made, scene_texts, capsys):
    plain = made.imagine_tokens(scene_texts[:1])
    for spelt in (scene_texts[0].upper(), scene_texts[0].capitalize(), scene_texts[0].title()):
        assert torch.equal(made.imagine_tokens([spelt]), plain)
    assert capsys.readouterr().err == ""
    made.imagine_tokens(["a red Ωmega", "a 红 circle"])
    assert capsys.readouterr().err == (
        "the tokenizer does not know all letters of 'Ωmega', '红': they are lost on the image\n"
    )


def test_images_can_be_generated_with_other_settings(made, scene_texts):
    sure = ImageGenerationConfig(steps=1, guidance=0.0, token_temperature=0.0)
    found = made.imagine_tokens(scene_texts[:2], config=sure)
    assert found.shape == (2, made.tokenizer.tokens)
    assert torch.equal(found, made.imagine_tokens(scene_texts[:2], seed=9, config=sure))


def test_many_texts_are_imagined_in_pieces(made, scene_texts, monkeypatch):
    monkeypatch.setattr("diptych.itit.pipeline._ROWS", 2)
    found = made.imagine_tokens(scene_texts[:1] * 5)
    assert len(found) == 5
    assert len({tuple(row) for row in found.tolist()}) == 5  # no piece repeats the random numbers of another


@pytest.mark.parametrize("text", ["", "红色的圆", "a red circle " * 800, "<pad></s><extra_id_0>", "\0"])
def test_any_text_can_be_imagined(made, text):
    assert made.imagine_pixels([text]).shape == (1, 32, 32, 3)


def test_no_text_and_a_text_without_its_list_are_refused(made):
    with pytest.raises(UserError, match="no texts: give one at least"):
        made.imagine_pixels([])
    assert (made.imagine_pixels("a red circle", seed=3) == made.imagine_pixels(["a red circle"], seed=3)).all()


def test_a_cycle_alternates(made, scene_texts, pixels):
    steps = made.cycle(text=scene_texts[0], rounds=2, seed=3)
    assert [step.image is None for step in steps] == [True, False, True, False, True]
    assert steps[0].shown == scene_texts[0]
    np.testing.assert_array_equal(steps[1].shown, made.imagine_pixels([scene_texts[0]], seed=3)[0])
    assert steps[2].shown == made.caption([steps[1].image])[0]
    again = made.cycle(text=scene_texts[0], rounds=2, seed=3)
    np.testing.assert_array_equal(steps[3].image, again[3].image)
    steps = made.cycle(image=pixels[0], rounds=1)
    assert [step.image is None for step in steps] == [False, True, False]


@pytest.mark.parametrize("given", [{}, {"text": "a", "image": "b.png"}, {"text": "a", "rounds": 0}])
def test_a_cycle_needs_one_start_and_a_round(made, given):
    with pytest.raises(UserError, match=r"give one of them|at least one is needed"):
        made.cycle(**given)


def tokenizers_of(pipeline: Diptych) -> DataTokenizers:
    length = pipeline.model.config.max_text_len
    return data_tokenizers(pipeline.tokenizer, pipeline.text_encoder, length=length)


def test_a_run_folder_is_the_same_diptych(made, run, pixels, scene_texts):
    loaded = diptych.Diptych.from_pretrained(run, device="cpu", precision="fp32")
    assert (loaded.image_generation, loaded.text_generation) == (IMAGES, TEXTS)
    assert loaded.captions(list(pixels)) == made.captions(list(pixels))
    np.testing.assert_array_equal(loaded.imagine_pixels(scene_texts[:2]), made.imagine_pixels(scene_texts[:2]))
    assert tokenizers_of(loaded).fingerprint == tokenizers_of(made).fingerprint
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config["run"]))  # as older runs have it
    older = Diptych.from_pretrained(run, device="cpu")
    assert (older.image_generation, older.text_generation) == (IMAGES, TEXTS)
    for then, now in ((True, "half"), (False, "none"), ("all", "all")):
        (run / "config.json").write_text(json.dumps({"generation": {"image": {"drop": then}, "text": {}}}))
        assert Diptych.from_pretrained(run, device="cpu").image_generation.drop == now
    moved = run.rename(run.with_name("elsewhere"))
    (moved / "config.json").unlink()
    assert Diptych.from_pretrained(str(moved)).image_generation == ImageGenerationConfig()


def test_weights_that_are_rounded_once_give_the_same(tokenizer, text_encoder, model, pixels, scene_texts, monkeypatch):
    """In bf16; and a change of the weights is seen."""

    def made():
        options = {"image_generation": IMAGES, "text_generation": TEXTS, "precision": "bf16"}
        found = Diptych(tokenizer, text_encoder, model, **options)
        return found.captions(list(pixels)), found.imagine_pixels(scene_texts[:2])

    captions, images = made()
    monkeypatch.setattr(ITIT, "rounded", lambda self: self)
    plain_captions, plain_images = made()
    assert captions == plain_captions
    np.testing.assert_array_equal(images, plain_images)
    monkeypatch.undo()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.rounded()
        assert rounded is model.rounded()
        assert not any(isinstance(part, torch.nn.Linear) for part in rounded.modules())
        with torch.no_grad():
            model.encoder.layers[0].mlp[0].weight += 1.0
        assert model.rounded() is not rounded
    assert model.rounded() is model


def test_data_tokenizers_and_their_fingerprint(made, pixels, scene_texts, tokenizer):
    tokenizers = tokenizers_of(made)
    pixels_B3HW = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(tokenizers.tokenize_images(pixels_B3HW), tokenizer.encode(pixels_B3HW))
    assert tokenizers.tokenize_texts(scene_texts[:2]).shape == (2, made.model.config.max_text_len)
    assert (tokenizers.image_size, tokenizers.text_features) == (32, None)
    before = tokenizers.fingerprint
    with torch.no_grad():
        tokenizer.codebook[0, 0] += 1
    try:
        assert tokenizers_of(made).fingerprint != before
    finally:
        with torch.no_grad():
            tokenizer.codebook[0, 0] -= 1


def one_line(caught, *parts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_folders_that_are_no_run(run, tmp_path):
    with pytest.raises(UserError) as caught:
        Diptych.from_pretrained(tmp_path / "none")
    one_line(caught, str(tmp_path / "none"), "no run folder")
    for part in ("model", "text_encoder", "tokenizer"):
        (run / part).rename(run / f"away-{part}")
        with pytest.raises(UserError) as caught:
            Diptych.from_pretrained(run)
        one_line(caught, str(run), f"has no {part}/")
        (run / f"away-{part}").rename(run / part)


def safetensors_of(part):
    (file,) = part.glob("*.safetensors")
    return file


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "model"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "noise", "no config", "config"])
def test_damaged_parts_are_named_in_one_line(run, part, damage):
    file = safetensors_of(run / part)
    match damage:
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "cut":
            file.write_bytes(file.read_bytes()[:-100])
        case "noise":
            file.write_bytes(b"\xff" * 2000)
        case "no config":
            (run / part / "config.json").unlink()
        case "config":
            (run / part / "config.json").write_text("{")
    with pytest.raises(UserError) as caught:
        Diptych.from_pretrained(run).imagine_pixels("a red circle")  # the text encoder is read when it is needed
    one_line(caught, str(run / part))


def test_weights_of_another_network_are_refused(run):
    """What the file lacks must not be left at its random start."""
    config = run / "model/config.json"
    content = config.read_text()
    assert '"depth": 2' in content
    config.write_text(content.replace('"depth": 2', '"depth": 3', 1))
    with pytest.raises(UserError) as caught:
        Diptych.from_pretrained(run)
    one_line(caught, str(run / "model"))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"generation": {"image": {"staps": 3}}}', '{"generation": 3}', '{"run": 3}']
)
def test_a_damaged_config_is_named(run, content):
    (run / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        Diptych.from_pretrained(run)
    one_line(caught, str(run / "config.json"))


def test_an_unreadable_image_is_named(made, tmp_path, wide):
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:500])
    with pytest.raises(UserError) as caught:
        made.caption([tmp_path / "cut.jpg"])
    one_line(caught, str(tmp_path / "cut.jpg"))


def test_images_come_as_pillow_images(made, scene_texts):
    with torch.inference_mode():
        images = made.imagine(scene_texts[:2], seed=1)
    assert np.array_equal(
        np.stack([np.asarray(image) for image in images]), made.imagine_pixels(scene_texts[:2], seed=1)
    )
    assert len(made.imagine(scene_texts[0])) == 1


def test_the_steps_of_an_image_end_in_the_image(made):
    text = "a red ring"
    steps = list(made.imagine_steps(text, seed=3))
    assert np.array_equal(steps[-1].image, np.asarray(made.imagine(text, seed=3)[0]))
    hidden = [int(step.hidden.sum()) for step in steps]
    assert hidden[0] == made.token_side**2
    assert hidden[-1] == 0
    assert hidden == sorted(hidden, reverse=True)
    assert len(steps) == 1 + IMAGES.steps


def test_part_of_an_image_is_drawn_anew_and_the_rest_is_kept(made, pixels):
    before = made.encode(pixels[:1]).tokens_BN.view(made.token_side, -1)
    anew = torch.zeros_like(before, dtype=torch.bool)
    anew[:2, 1:] = True
    steps = list(made.imagine_steps("a red ring", known=(before, anew)))
    assert torch.equal(steps[0].hidden, anew)
    assert not steps[-1].hidden.any()
    assert torch.equal(steps[-1].tokens[~anew], before[~anew])
    assert not torch.equal(steps[-1].tokens[anew], before[anew])
    with pytest.raises(UserError, match="no text"):
        next(made.imagine_steps(" "))


def test_candidates_begin_with_the_caption(made, pixels):
    for found, best in zip(made.candidates(list(pixels), beams=3), made.captions(list(pixels), beams=3), strict=True):
        assert found[0].text == best.text
        assert found[0].score == pytest.approx(best.score, abs=1e-5)
        assert 1 <= len(found) <= 3
        scores = [each.score for each in found]
        assert scores == sorted(scores, reverse=True)
        assert len({each.text for each in found}) == len(found)
