import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.batch import ImageTokenExamples
from diptych.data.pixels import SkippedItems, read_captioned
from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source
from diptych.errors import UserError
from diptych.eval.frechet import RandomFeatures
from diptych.itit import evaluation as module
from diptych.itit.evaluation import EvaluateConfig, drift, evaluate, information_gain, pair_fits
from diptych.itit.pipeline import Caption, Diptych

pytestmark = pytest.mark.filterwarnings("ignore:Covariance")
SCENES = ScenesSource(count=8, split="test")
GREEDY = EvaluateConfig(beams=1)


@pytest.fixture
def oracle(diptych, monkeypatch) -> Diptych:
    """Knows every scene: its captions and images are right."""
    captions = [Caption(text=SCENES.captions(i)[0], score=None) for i in range(8)]
    monkeypatch.setattr(Diptych, "caption_encoded", lambda self, images, **_: captions)
    monkeypatch.setattr(Diptych, "imagine_pixels", lambda self, texts, **_: SCENES.images(range(8), 32))
    return diptych


@pytest.fixture
def folder(tmp_path):
    """Six images; the second has no caption, the fourth two."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        if i != 1:
            (tmp_path / f"{i}.txt").write_text(f"image {i}\n" + "another text\n" * (i == 3))
    return tmp_path


def test_the_right_answers_get_the_best_scores(oracle):
    found = evaluate(oracle, SCENES, GREEDY)
    metrics = found.metrics
    for side in ("caption", "image"):
        for name in ("accuracy", "readable", "shape", "colour", "place"):
            assert metrics[f"{side}_{name}"] == 1.0
    assert metrics["images"] == 8
    (distance,) = [value for name, value in metrics.items() if name.startswith("frechet/")]
    assert distance == pytest.approx(0, abs=1e-2)
    assert metrics["cider"] > 50


def test_a_fresh_network_gets_bad_ones(diptych):
    found = evaluate(diptych, SCENES, GREEDY)
    assert found.metrics["caption_accuracy"] == 0
    assert found.metrics["image_accuracy"] == 0
    assert found.captions == diptych.caption(list(SCENES.images(range(8), 32)), beams=1)
    np.testing.assert_array_equal(
        found.generated_BSS3, diptych.imagine_pixels([texts[0] for texts in found.references])
    )
    np.testing.assert_array_equal(found.real_BSS3, SCENES.images(range(8), 32))
    assert found.keys == [SCENES.key(i) for i in range(8)]
    again = evaluate(diptych, SCENES, GREEDY)
    assert again.metrics == found.metrics
    other = evaluate(diptych, SCENES, EvaluateConfig(beams=1, seed=1))
    assert (other.generated_BSS3 != found.generated_BSS3).any()


def test_either_side_may_be_left_out(diptych):
    found = evaluate(diptych, SCENES, EvaluateConfig(beams=1, images=False))
    assert found.generated_BSS3 is None
    assert "image_accuracy" not in found.metrics
    found = evaluate(diptych, SCENES, EvaluateConfig(captions=False), extractor=RandomFeatures(seed=1))
    assert found.captions == []
    assert "cider" not in found.metrics
    assert "caption_accuracy" not in found.metrics


def test_other_sources_have_no_accuracies(diptych, folder):
    found = evaluate(diptych, open_source(str(folder)), GREEDY)
    assert found.keys == ["0.png", "2.png", "3.png", "4.png", "5.png"]
    assert found.references[2] == ["image 3", "another text"]
    assert "cider" in found.metrics
    assert not any("accuracy" in name for name in found.metrics)


def test_one_image_has_no_frechet_distance(diptych, folder):
    found = evaluate(diptych, open_source(str(folder)), EvaluateConfig(beams=1, limit=1))
    assert found.metrics["images"] == 1
    assert not any(name.startswith("frechet") for name in found.metrics)
    assert any("two images or more" in note for note in found.notes)


def test_the_first_readable_captioned_items_are_read(folder):
    (folder / "2.png").write_bytes(b"")
    for i in range(200):
        Image.new("RGB", (2, 2)).save(folder / f"more-{i}.png")
    source = open_source(str(folder))
    items, pixels = read_captioned(source, limit=3, size=32, skipped=SkippedItems(max_skipped_share=0.3))
    assert [source.key(item) for item in items] == ["0.png", "3.png", "4.png"]
    np.testing.assert_array_equal(pixels, [source.image(item, 32) for item in items])


def test_too_many_unreadable_images_stop(folder):
    (folder / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 6 items are unreadable.*2\.png"):
        read_captioned(open_source(str(folder)), limit=None, size=32, skipped=SkippedItems())


@pytest.mark.parametrize(("count", "limit", "read"), [(5, None, 5), (5, 3, 3), (5, 9, 5), (1200, None, 1200)])
def test_limits_of_scenes(count, limit, read):
    items, pixels = read_captioned(ScenesSource(count=count), limit=limit, size=16, skipped=SkippedItems())
    assert items == list(range(read))
    assert pixels.shape == (read, 16, 16, 3)


def test_endless_scenes_are_cut_at_a_thousand():
    assert len(read_captioned(ScenesSource(), limit=None, size=16, skipped=SkippedItems())[0]) == 1000


def test_sources_and_limits_that_cannot_be_scored(diptych, folder, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("bread\n")
    with pytest.raises(UserError, match="pairs need images and captions"):
        evaluate(diptych, open_source(str(tmp_path / "texts/a.txt")), GREEDY)
    with pytest.raises(UserError, match="a limit of 0 images"):
        evaluate(diptych, SCENES, EvaluateConfig(limit=0))


class Fake(Diptych):
    """Answers with given captions and images."""

    def __init__(self, captions, images):
        self.told, self.drawn = captions, images

    def encode(self, pixels_BSS3):
        return ImageTokenExamples(tokens_BN=torch.zeros(len(pixels_BSS3), 4, dtype=torch.long))

    def caption_encoded(self, images, *, beams=None):
        return [Caption(text=text, score=None) for text in self.told]

    def imagine_pixels(self, texts, *, seed=0, config=None):
        return self.drawn


def test_drift_is_what_round_trips_do_better_than_their_halves():
    source = ScenesSource(count=8, level=3)
    images, scenes = source.images(range(8)), source.scenes(range(8))
    captions = [source.captions(item)[0] for item in range(8)]
    honest = drift(Fake(captions, images), captions, images, scenes)
    assert all(value == 0 for value in honest.values())
    # A code of its own: every image and every caption is that of another scene, and yet each trip comes home.
    private = drift(Fake(captions, images), captions[1:] + captions[:1], np.roll(images, 1, 0), scenes)
    assert private["text_drift"] == private["image_drift"] == 1
    assert 0 < private["text_drift_shape"] <= 1


# Information gain


@pytest.fixture
def exact(tokenizer, text_encoder, model) -> Diptych:
    return Diptych(tokenizer, text_encoder, model, precision="fp32")


@pytest.fixture
def pairs(tokenizer, text_encoder, scene_texts):
    ids, _ = text_encoder.tokenize(scene_texts[:6], length=20)
    tokens = torch.randint(tokenizer.codebook_size, (6, tokenizer.tokens), generator=torch.Generator().manual_seed(0))
    return tokens, ids


def test_evaluate_reports_it_and_says_its_unit(diptych):
    found = evaluate(diptych, SCENES, GREEDY)
    assert {"caption_information_gain", "image_information_gain"} <= found.metrics.keys()
    assert any("nats per token" in note for note in found.notes)
    alone = evaluate(diptych, SCENES, EvaluateConfig(beams=1, images=False))
    assert "caption_information_gain" not in alone.metrics
    assert not any("nats per token" in note for note in alone.notes)


def test_equal_captions_tell_nothing(exact, pairs):
    tokens, ids = pairs
    found = information_gain(exact, ImageTokenExamples(tokens_BN=tokens), ids[:1].expand(6, -1))
    assert (found.caption, found.image) == (0.0, 0.0)


def test_rows_come_in_pieces_and_padding_is_not_counted(exact, pairs, monkeypatch):
    tokens, ids = pairs
    whole = information_gain(exact, ImageTokenExamples(tokens_BN=tokens), ids)
    monkeypatch.setattr(module, "_ROWS", 4)
    pieces = information_gain(exact, ImageTokenExamples(tokens_BN=tokens), torch.nn.functional.pad(ids, (0, 2)))
    assert (pieces.caption, pieces.image) == pytest.approx((whole.caption, whole.image), abs=1e-5)


def test_what_was_learned_is_found(exact, pairs):
    """A few steps on the pairs themselves; the image's side is learned from a text's features alone."""
    tokens, ids = pairs
    rule = torch.optim.Adam(exact.model.parameters(), lr=3e-3)
    for _ in range(150):
        caption = module._caption_loss(exact, exact.model.caption_prefix(tokens, None), ids)
        rule.zero_grad()
        (caption + exact.image_nats(tokens, ids).mean()).backward()
        rule.step()
    found = information_gain(exact, ImageTokenExamples(tokens_BN=tokens), ids)
    assert found.caption > 0.3
    assert found.image > 0.3


def test_a_caption_that_does_not_fit_gains_nothing_from_its_image(exact, monkeypatch):
    source = ScenesSource(count=6)
    pixels = [source.image(i, exact.tokenizer.image_size) for i in range(6)]
    tokens = exact.encode(np.stack(pixels)).tokens_BN
    ids = exact.text_encoder.tokenize([source.captions(i)[0] for i in range(6)], length=20)[0]
    rule = torch.optim.Adam(exact.model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = module._caption_loss(exact, exact.model.caption_prefix(tokens, None), ids)
        rule.zero_grad()
        loss.backward()
        rule.step()
    fits = pair_fits(exact, source, skipped=SkippedItems())
    assert [(each.item, each.caption) for each in fits] == [(i, 0) for i in range(6)]
    assert min(each.fit for each in fits) > 0
    captions = [source.captions(i) for i in range(6)]
    captions[1], captions[4] = captions[4], captions[1]
    monkeypatch.setattr(ScenesSource, "captions", lambda self, i: captions[i])
    worst = sorted(pair_fits(exact, source, skipped=SkippedItems()), key=lambda each: each.fit)
    assert {each.item for each in worst[:2]} == {1, 4}
    monkeypatch.setattr(module, "_ROWS", 4)
    again = sorted(pair_fits(exact, source, skipped=SkippedItems()), key=lambda each: each.fit)
    assert [each.fit for each in again] == pytest.approx([each.fit for each in worst], abs=1e-5)
