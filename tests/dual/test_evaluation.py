import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.pixels import SkippedItems
from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source
from diptych.dual.evaluation import (
    EmbeddedPairs,
    embed_pairs,
    embed_source,
    evaluate_dual_run,
    pair_fits,
    score_classes,
)
from diptych.dual.metrics import modality_gap
from diptych.errors import UserError

SOURCE, SRC = ScenesSource(count=60), "scenes:?count=60"


def evaluate(run, data=SRC, **options):
    given = {"train": None, "umap": False, "limit": None, "out": run / "evaluation", "device": "cpu"} | options
    evaluate_dual_run(run, str(data), **given)
    return json.loads((run / "evaluation/metrics.json").read_text())


def test_what_a_captioned_and_labelled_source_is_scored_by(dual_run, capsys):
    found = evaluate(dual_run, train="scenes:?count=80&seed=1")
    assert (found["images"], found["retrieval/texts"], found["source"]) == (60, 60, SRC)
    assert found["classes"] == len({SOURCE.label(i) for i in range(60)})
    expected = {"retrieval/image_to_text/r1", "modality/distance", "zero_shot/top1", "zero_shot_one_prompt/top1"}
    assert ("zero_shot/top5" in found) == (found["classes"] > 5)  # of five classes it is always 1
    assert expected | {"linear_probe/accuracy"} <= found.keys()
    out = capsys.readouterr().out
    assert "linear_probe/accuracy" in out
    assert out.endswith(f"written to {dual_run}/evaluation\n")
    assert "linear_probe/accuracy" not in evaluate(dual_run)
    assert evaluate(dual_run, limit=7)["images"] == 7


def test_the_probe_learns_the_shapes_from_an_untrained_tower(dual_encoder):
    """And is fitted to the training items: with their labels permuted it is no better than chance."""
    images, train = embed_source(dual_encoder, SOURCE), embed_source(dual_encoder, ScenesSource(count=300, seed=1))
    assert images.labels is not None
    chance = max(images.labels.count(label) for label in images.labels) / 60
    assert score_classes(dual_encoder, images, train=train)[0]["linear_probe/accuracy"] > chance + 0.1


def test_one_folder_is_no_class(dual_encoder):
    one = next(i for i in range(60) if SOURCE.label(i) == "ring")
    images = embed_source(dual_encoder, SOURCE)
    assert replace(images, items_I=images.items_I[one : one + 1]).labels is None
    assert len(images.labels or []) == 60


def test_a_source_is_embedded_as_its_pixels_are(dual_encoder):
    images = embed_source(dual_encoder, SOURCE, limit=5)
    pixels = torch.from_numpy(SOURCE.images(np.arange(5), 16)).permute(0, 3, 1, 2).contiguous()
    torch.testing.assert_close(images.embedding_ID, dual_encoder.embed_images(pixels))
    assert images.state_IW.shape == (5, 32)
    assert images.items_I.tolist() == list(range(5))


def test_pairs_leave_out_images_without_captions(dual_encoder, tmp_path):
    for number in range(3):
        Image.fromarray(SOURCE.image(number, 16)).save(tmp_path / f"{number}.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": ["one", "two"]}\n{"file_name": "1.png", "text": []}\n'
        '{"file_name": "2.png", "text": ["three"]}\n'
    )
    images = embed_source(dual_encoder, open_source(str(tmp_path)))
    pairs = embed_pairs(dual_encoder, images)
    torch.testing.assert_close(pairs.images_ID, images.embedding_ID[[0, 2]])
    assert pairs.image_of_T.tolist() == [0, 0, 1]
    torch.testing.assert_close(pairs.first_ID, dual_encoder.embed_texts(["one", "three"]))


def test_the_gap_is_of_first_captions(dual_run):
    found = evaluate(dual_run)
    assert found["modality/distance"] > 0
    images = torch.eye(4)
    pairs = EmbeddedPairs(
        images_ID=images,
        texts_TD=images.repeat_interleave(2, 0),
        image_of_T=torch.arange(8) // 2,
        wording_T=torch.tensor([0, 1, 1, 2, 3, 3, 4, 5]),
    )
    assert pairs.shared == 2  # a text that is twice at its own image is not shared
    assert modality_gap(pairs.images_ID, pairs.first_ID).distance == 0


def test_a_map(dual_run, monkeypatch):
    class Flat:
        def __init__(self, **settings: object) -> None: ...

        def fit_transform(self, points: np.ndarray) -> np.ndarray:
            assert points.shape == (120, 20)
            return points[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Flat))
    evaluate(dual_run, umap=True)
    with Image.open(dual_run / "evaluation/umap.png") as image:
        assert image.size[0] > 300


def test_what_cannot_be_scored(dual_run, dual_encoder, monkeypatch, tmp_path):
    Image.fromarray(SOURCE.image(0, 16)).save(tmp_path / "0.png")
    for wrong, told in (
        ({"data": str(tmp_path)}, "has no labels and no captions to score by"),
        ({"data": str(tmp_path), "train": SRC}, "has no labels to score by"),
        ({"train": str(tmp_path)}, "has no labels to fit a probe to"),
        ({"limit": 0}, "limit of 0"),
        ({"data": str(tmp_path), "umap": True}, r"pip install 'diptych\[umap\]'"),
    ):
        monkeypatch.setitem(sys.modules, "umap", None)
        with pytest.raises(UserError, match=told):
            evaluate(dual_run, **wrong)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace())
    with pytest.raises(UserError, match="leave --umap away"):
        evaluate(dual_run, str(tmp_path), umap=True)
    assert not (dual_run / "evaluation").exists()


def labelled(folder, names):
    """A tar as WebDataset's, or folders of classes: the same images, labelled by ``names``."""
    for number in range(12):
        (folder / names[number % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(SOURCE.image(number, 16)).save(folder / names[number % 3] / f"{number:02d}.png")
    return str(folder)


def test_codes_are_no_names(dual_run, dual_encoder, tmp_path, capsys):
    """Whatever the labels look like: once the classes are named, the accuracy is that of named labels."""
    named = evaluate(dual_run, labelled(tmp_path / "named", ["blue", "green", "red"]))
    keys = [key for key in named if key.startswith("zero_shot")]
    assert keys
    classes = tmp_path / "classes.txt"
    for labels, text in (
        (["0", "1", "2"], "blue\ngreen\nred\n"),
        (["n01440001", "n01440002", "n01440003"], "blue\ngreen\nred\n"),
        (["n01440001", "n01440002", "n01440003"], "n01440003 red\nn01440001 blue\nn01440002 green\n"),
        (["0", "1", "2"], "2,red\n0,blue\n1,green\n"),
        (["0", "1", "2"], "0: blue\n1: green\n2: red\n"),
        (["Blue", "green", "red"], "red\ngreen\nblue\n"),
        (["0", "1", "3"], "blue\ngreen\ngreen\nred\n"),
    ):
        data = labelled(tmp_path / str(len(list(tmp_path.iterdir()))), labels)
        if labels[0] != "Blue":
            with pytest.raises(UserError, match=r"the labels are codes .*give --classes FILE"):
                evaluate(dual_run, data)
            found, notes = score_classes(dual_encoder, embed_source(dual_encoder, open_source(data)))
            assert not found
            assert "codes" in notes[0]
        classes.write_text(text)
        found = evaluate(dual_run, data, classes=classes)
        assert {key: found[key] for key in keys} == {key: named[key] for key in keys}
        assert found["classes"] == 3
    assert "names green more than once" in capsys.readouterr().out
    classes.write_text("blue\ngreen\n")
    with pytest.raises(UserError, match="none of its lines is for the label 'red'"):
        evaluate(dual_run, tmp_path / "named", classes=classes)


def test_retrieval_stands_beside_chance_and_the_words_of_the_nearest_images(dual_run, capsys):
    """A random encoder knows nothing; the captions of images that look alike share words with the right one."""
    config = json.loads((dual_run / "config.json").read_text())
    config["run"]["data"]["pairs"] = "scenes:?count=200&seed=2"
    (dual_run / "config.json").write_text(json.dumps(config))
    found = evaluate(dual_run)
    chance, nearest = found["baselines"].values()
    assert list(found["baselines"]) == [
        "chance",
        "captions of the 30 nearest by colour and gradient histograms",
    ]
    alike = [SOURCE.captions(i)[0] for i in range(60)]
    assert chance["retrieval/image_to_text/r1"] == pytest.approx(np.mean([alike.count(text) / 60 for text in alike]))
    assert nearest["retrieval/mean_r1"] > 2 * chance["retrieval/mean_r1"]
    assert "The run loses to a baseline: retrieval/mean_r1" in found["verdict"]
    assert found["verdict"] in capsys.readouterr().out

    config["run"]["data"]["pairs"] = "gone/"
    (dual_run / "config.json").write_text(json.dumps(config))
    shutil.rmtree(dual_run / "evaluation")
    found = evaluate(dual_run)
    assert list(found["baselines"]) == ["chance"]
    assert found["notes"][-1].startswith("No baselines from the pairs: gone")


def test_the_fit_of_a_pair_is_its_cosine_against_those_of_all_others(dual_encoder):
    source = ScenesSource(count=12, captions_each=2)
    fits = pair_fits(dual_encoder, source, skipped=SkippedItems())
    assert [(each.item, each.caption) for each in fits] == [(item, n) for item in range(12) for n in range(2)]
    pairs = embed_pairs(dual_encoder, embed_source(dual_encoder, source))
    cosine_IT = (pairs.images_ID @ pairs.texts_TD.T).double()
    for text, each in enumerate(fits):
        own = cosine_IT[each.item, text]
        row, column = cosine_IT[each.item], cosine_IT[:, text]
        expected = (own - row.mean()) / row.std(unbiased=False) + (own - column.mean()) / column.std(unbiased=False)
        assert each.fit == pytest.approx(float(expected), abs=0.02)


def test_images_alone_have_no_fit(dual_encoder, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has no captions that could fit"):
        pair_fits(dual_encoder, open_source(str(tmp_path)), skipped=SkippedItems())
