import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.sources import open_source
from diptych.data.splits import Subset
from diptych.encoders import ImageEncoder
from diptych.errors import UserError
from diptych.eval.baselines import (
    Baseline,
    CaptionPool,
    ClassBaselines,
    Comparison,
    NearCaptions,
    caption_baselines,
    chance_of_recall,
    histograms,
    image_histograms,
    most_frequent,
    nearest,
    neighbour_word_embeddings,
)
from diptych.report.html import write_run_report
from diptych.run_folder import write_config
from diptych.tokenizers.recipes import vqgan_tiny


def compared(select, scores, *baselines):
    return Comparison(
        source="dev.tar",
        select=select,
        scores=scores,
        baselines=list(baselines),
        advice="more pairs",
        advice_unpaired="no texts",
    )


# The verdict


def test_a_run_that_loses_says_so_and_what_to_try():
    weak, strong = (Baseline(name=name, scores={"cider": value}) for name, value in (("weak", 2.0), ("strong", 22.5)))
    found = compared("cider", {"cider": 19.1}, weak, strong).verdict()
    assert found == "The run loses to a baseline: cider 19.1, strong 22.5. Try more pairs."
    found = compared("cider", {"cider": 23.0}, weak, strong).verdict()
    assert found == "No baseline does better: cider 23, the best of them (strong) 22.5."


def test_lower_is_better_where_it_is():
    one = Baseline(name="chance", scores={"loss": 2.0})
    assert "loses to a baseline" in compared("loss", {"loss": 2.5}, one).verdict()
    assert "No baseline does better" in compared("loss", {"loss": 1.5}, one).verdict()


def test_what_unpaired_data_did_is_told():
    def beside(**scores):
        alone = Baseline(name="pairs alone", scores={"cider": 20.0, "rouge_l": 0.3}, kind="without unpaired data")
        return compared("cider", scores, alone).verdict()

    hurt = beside(cider=18.0, rouge_l=0.2)
    assert hurt == ("Unpaired data hurt, against pairs alone: cider 20 to 18, rouge_l 30.0 % to 20.0 %. Try no texts.")
    mixed = beside(cider=22.0, rouge_l=0.2)
    assert mixed == "Unpaired data helped cider 20 to 22, but hurt, against pairs alone: rouge_l 30.0 % to 20.0 %."
    assert beside(cider=22.0, rouge_l=0.30001) == "Unpaired data helped, against pairs alone: cider 20 to 22."
    assert beside(cider=20.0, rouge_l=0.3) == ""


def test_nothing_is_said_before_there_are_scores():
    one = Baseline(name="chance", scores={"accuracy": 0.5})
    found = compared("accuracy", {}, one)
    assert found.verdict() == ""
    assert found.table() == (["accuracy"], [["chance", 0.5]])


def test_the_first_line_of_the_report_is_the_verdict(tmp_path):
    write_config(tmp_path / "run", recipe="vqgan-tiny", run=vqgan_tiny())
    compared("cider", {"cider": 1.0, "mean_length": 3.0}, Baseline(name="strong", scores={"cider": 22.5})).write(
        tmp_path / "run"
    )
    write_run_report(tmp_path / "run", state="step 2 of 9")
    page = (tmp_path / "run" / "report.html").read_text()
    (lead,) = [line for line in page.splitlines() if 'class="lead"' in line]
    assert "run: The run loses to a baseline: cider 1, strong 22.5. Try more pairs. step 2 of 9" in lead
    assert page.index(">Beside its baselines</h2>") < page.index(">Settings</h2>")
    assert ">this run</th>" in page
    assert "mean_length" not in page  # neither direction of it is better


# Captions


def test_the_most_frequent_caption():
    assert most_frequent([["a dog", "a cat"], ["a cat"], ["a dog"]]) == "a dog"
    assert most_frequent([["a dog", "a cat"], ["a cat"]]) == "a cat"


def test_the_consensus_caption_is_the_one_most_like_the_others():
    """Weights by hand: "red" is in 3 of 4 images, ln(5/3) = 0.51, "ring" in 2, 0.92; the others in 1, 1.61."""
    pool = CaptionPool([["red ring"], ["red ring here"], ["red"], ["bread butter"]])
    assert pool.consensus(range(4)) == "red ring"
    assert pool.consensus([3]) == "bread butter"
    assert pool.consensus([2, 3, 1, 1]) == "red ring here"
    red, ring = math.log(5 / 3), math.log(5 / 2)
    vector = pool._vectors[0][0]
    assert vector[("red",)] == pytest.approx(red / math.hypot(red, ring))
    assert vector[("red", "ring")] == 1.0


def test_likeness_is_the_mean_cosine_of_ngrams():
    pool = CaptionPool([["red ring"], ["a blue cross", "a cross"], ["red ring"]])
    same, other, unknown = pool.similarity(["red ring", "a cross", "bread"], [0, 2])
    assert same == pytest.approx(0.5)  # there are no n-grams of three or four tokens
    assert other == unknown == 0
    half = pool.similarity(["red ring"], [0, 1])[0]
    assert half == pytest.approx(0.25)
    # Of two images the one with two captions counts as much as the one with one.
    [cross] = pool.similarity(["a cross"], [1])
    assert pool.similarity(["a cross"], [0, 1]) == [pytest.approx(cross / 2)]


def test_near_captions_are_those_of_the_nearest_images(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.eval.baselines.NEAREST", 1)
    features = np.eye(3, 4, dtype=np.float32)
    near = NearCaptions([["red ring"], ["blue cross"], ["green square"]], features)
    near.save_pretrained(tmp_path / "near")
    again = NearCaptions.from_pretrained(tmp_path / "near")
    for each in (near, again):
        texts = [["blue cross", "red ring"], ["green square", "blue cross"]]
        similarity = each.similarity(features[[1, 1]], texts)
        assert similarity == [[pytest.approx(0.5), 0], [0, pytest.approx(0.5)]]


def test_unpaired_texts_are_near_captions_too(tmp_path, monkeypatch):
    """Their similarity is added; of texts as many are near as of images, or a thirtieth of them."""
    monkeypatch.setattr("diptych.eval.baselines.NEAREST", 2)
    features = np.eye(3, 4, dtype=np.float32)
    texts = ["blue cross", "blue cross", "green square", "green square", "yellow ring", "yellow ring"]
    expected = features[[1, 1, 2, 2, 0, 0]]
    captions = [["red ring"], ["red ring"], ["red ring"]]
    near = NearCaptions(captions, features, texts=texts, expected_UF=expected)
    near.save_pretrained(tmp_path / "near")
    again = NearCaptions.from_pretrained(tmp_path / "near")
    for each in (near, again):
        [similarity] = each.similarity(features[[1]], [["blue cross", "green square", "red ring"]])
        [alone] = NearCaptions(captions, features).similarity(
            features[[1]], [["blue cross", "green square", "red ring"]]
        )
        # Three texts are near, the two that fit and one of another kind.
        assert similarity[0] - alone[0] == pytest.approx(2 / 3 * 0.5)
        assert similarity[2] == pytest.approx(alone[2])


@pytest.fixture
def photos(tmp_path):
    """Three red and three green images with their captions."""
    for i in range(6):
        red = i % 2 == 0
        noise = np.random.default_rng(i).integers(0, 20, (20, 30, 3), np.uint8)
        colour = np.array([200, 0, 0] if red else [0, 200, 0], np.uint8)
        Image.fromarray(noise + colour).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(("a red wall\n" if red else "the green grass\n") * (1 + (i == 0)))
    return tmp_path


def test_nearest_images_lend_their_captions(photos, monkeypatch):
    monkeypatch.setattr("diptych.eval.baselines.NEAREST", 2)
    source, seen = open_source(str(photos)), []

    def score(captions):
        seen.append(list(captions))
        return {"cider": float(len(seen))}

    test = Subset(source, np.array([1, 4]))
    found = caption_baselines(Subset(source, np.array([0, 2, 3, 5])), test, score=score)
    assert [each.name for each in found] == [
        "most frequent caption",
        "consensus of all captions",
        "consensus of the 2 nearest by colour and gradient histograms",
    ]
    assert [each.scores["cider"] for each in found] == [1.0, 2.0, 3.0]
    assert seen[0] == ["a red wall"] * 2
    assert seen[2] == ["the green grass", "a red wall"]


def test_a_pretrained_encoder_finds_nearest_images_too(photos, monkeypatch):
    """This one sees nothing but how red and how green an image is."""
    monkeypatch.setattr("diptych.eval.baselines.NEAREST", 1)

    class Redness(ImageEncoder):
        image_size = 8

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(2))

        def forward(self, pixels_B3HW):
            return pixels_B3HW.float().mean((2, 3))[:, :2] @ self.weight

    source, seen = open_source(str(photos)), []

    def score(captions):
        seen.append(list(captions))
        return {}

    pairs, test = Subset(source, np.array([0, 3])), Subset(source, np.array([1, 2, 4, 5]))
    found = caption_baselines(pairs, test, score=score, encoder=Redness(), encoder_name="redness")
    assert found[-1].name == "consensus of the 1 nearest by redness"
    assert seen[-1] == ["the green grass", "a red wall", "a red wall", "the green grass"]


def test_pairs_without_an_image_that_can_be_read(photos):
    source = open_source(str(photos))
    (photos / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="no image with a caption"):
        caption_baselines(Subset(source, np.array([0])), Subset(source, np.array([1])), score=lambda captions: {})


# Retrieval


def test_images_have_the_words_of_their_nearest(photos, monkeypatch):
    monkeypatch.setattr("diptych.eval.baselines.NEAREST", 2)
    source = open_source(str(photos))
    pairs, test = Subset(source, np.array([0, 2, 3, 5])), Subset(source, np.array([1, 4]))
    texts = ["green grass", "a red wall", "unknown words"]
    ((name, (images_BV, texts_NV)),) = neighbour_word_embeddings(pairs, test, texts).items()
    assert name == "captions of the 2 nearest by colour and gradient histograms"
    assert (images_BV @ texts_NV.T).argmax(1).tolist() == [0, 1]
    np.testing.assert_allclose(images_BV.norm(dim=1), 1, rtol=1e-6)
    assert texts_NV[2].abs().sum() == 0
    assert float(images_BV[1] @ texts_NV[1]) == pytest.approx(1)


def test_chance_of_recall_by_hand():
    """Of 4 targets: 1 right one is among 2 random ones with 1/2, 2 right ones with 1 - 1/6, all 4 with 1."""
    right_Q = torch.tensor([1, 2, 4])
    assert chance_of_recall(right_Q, targets=4, k=2) == pytest.approx((1 / 2 + 5 / 6 + 1) / 3)
    assert chance_of_recall(right_Q, targets=4, k=10) == 1
    assert chance_of_recall(right_Q, targets=4, k=1) == pytest.approx(7 / 12)


# Features


def test_histograms_count_colours_and_edges_in_cells():
    """Left half black, right half white: an edge of horizontal gradient in the middle columns."""
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    pixels[:, :, 32:] = 255
    (found,) = histograms(pixels)
    colours, edges = found[:256].reshape(2, 2, 64) ** 2, found[256:].reshape(4, 4, 8) ** 2
    np.testing.assert_allclose(colours[:, 0, 0], 0.25)  # black
    np.testing.assert_allclose(colours[:, 1, 63], 0.25)  # white
    np.testing.assert_allclose(edges[:, 1:3, 0], 1 / 8, rtol=1e-5)
    assert edges.sum() == pytest.approx(1)


def test_an_image_without_edges_has_finite_features():
    assert np.isfinite(histograms(np.full((2, 64, 64, 3), 7, np.uint8))).all()


def test_unreadable_images_are_left_out(photos):
    (photos / "2.png").write_bytes(b"")
    items, found = image_histograms(Subset(open_source(str(photos)), np.array([1, 2, 3])))
    assert items.tolist() == [1, 3]
    assert len(found) == 2


def test_nearest_by_angle_from_the_centre():
    known = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    found = nearest(np.array([[5.0, 1.0], [-1.0, -9.0]]), known, count=2)
    assert found.tolist() == [[0, 1], [3, 2]]


# Classes


def score(logits_NC, labels_N):
    return {"accuracy": float((logits_NC.argmax(1) == labels_N).float().mean())}


def test_chance_frequent_class_and_regression(tmp_path):
    x_N = torch.tensor([-2.0, -1.0, 1.0, 2.0, 3.0])[:, None]
    y_N = (x_N[:, 0] > 0).long()
    fitted = ClassBaselines.fit({"the same features": ((x_N, y_N), (x_N, y_N))}, classes=2)
    fitted.save(tmp_path / "baselines.safetensors")
    for each in (fitted, ClassBaselines.load(tmp_path / "baselines.safetensors", device="cpu")):
        found = each.scored({"the same features": (x_N[:4], y_N[:4])}, score)
        assert {each.name: each.scores["accuracy"] for each in found} == {
            "chance": 0.5,
            "most frequent class": 0.5,
            "logistic regression on the same features": 1.0,
        }
        assert found[0].scores["loss"] == pytest.approx(math.log(2))


def test_classes_of_equal_size_have_no_most_frequent_one():
    x_N, y_N = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    found = ClassBaselines.fit({"x": ((x_N, y_N), (x_N, y_N))}, classes=2).scored({"x": (x_N, y_N)}, score)
    assert [each.name for each in found] == ["chance", "logistic regression on x"]


def test_a_damaged_file_of_class_baselines(tmp_path):
    (tmp_path / "baselines.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"baselines\.safetensors: the fitted baselines cannot be read"):
        ClassBaselines.load(tmp_path / "baselines.safetensors", device="cpu")


def test_a_comparison_is_json(tmp_path):
    compared("cider", {"cider": 1.0}, Baseline(name="strong", scores={"cider": 22.5})).write(tmp_path)
    found = json.loads((tmp_path / "baselines.json").read_text())
    assert found["rows"] == [["this run", 1.0], ["strong", 22.5]]
