import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source
from diptych.errors import UserError
from diptych.eval.captions import score_captions
from diptych.eval.frechet import RandomFeatures
from diptych.itit import protocols
from diptych.itit.evaluation import EvaluateConfig, ScoredImages
from diptych.itit.generation import ImageGenerationConfig
from diptych.itit.pipeline import Caption, Diptych
from diptych.itit.protocols import coco_fid30k, coco_karpathy, cycle_scores, feature_distance, split_named_in

pytestmark = pytest.mark.filterwarnings("ignore:Covariance")


class Thumbnails:
    """Twelve features: fewer than the images, so that scipy's root is that of a regular matrix."""

    name = "thumbnails"

    def __call__(self, pixels_BCHW):
        return torch.nn.functional.adaptive_avg_pool2d(pixels_BCHW.float(), 2).flatten(1)


@pytest.fixture
def photos(tmp_path):
    """40 images of two sizes with five captions each; the third has none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 56, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02}.png")
        if i != 2:
            (folder / f"{i:02}.txt").write_text("".join(f"image {i} told {k}\n" for k in range(5)))
    return folder


def test_karpathy_takes_four_beams_and_all_references(diptych, photos):
    source = open_source(str(photos))
    found = coco_karpathy(diptych, source, EvaluateConfig(limit=8))
    assert len(found.keys) == 8
    assert "02.png" not in found.keys
    images = [photos / key for key in found.keys]
    assert found.captions == diptych.caption(images, beams=4)
    assert found.metrics["cider"] == score_captions(found.captions, found.references).cider
    assert found.did["references"] == "40, 5 to 5 of an image, all of them used"
    assert "4 beams, length power 0.6" in found.did["captions"]
    assert found.did["departures"] == ["8 images: the test split of COCO has 5,000"]
    assert "Java" in found.did["meteor"]
    assert "meteor" not in found.metrics


def test_what_differs_from_karpathys_protocol_is_told(diptych):
    found = coco_karpathy(diptych, ScenesSource(count=8), EvaluateConfig(beams=1))
    assert found.did["departures"][1:] == ["8 images have fewer than 5 references", "beams 1: the paper has 4"]


def test_fid_draws_captions_by_seed_and_equals_scipy(diptych, photos, monkeypatch):
    source, texts, drawn = open_source(str(photos)), [], []
    imagine = Diptych.imagine_pixels

    def spy(self, given, **options):
        texts.extend(given)
        drawn.append(imagine(self, given, **options))
        return drawn[-1]

    monkeypatch.setattr(Diptych, "imagine_pixels", spy)
    config = EvaluateConfig(seed=3, image_generation=ImageGenerationConfig(steps=1, guidance=1.0))
    found = coco_fid30k(diptych, source, config, extractor=Thumbnails(), count=30)
    first = list(texts)
    numbers = [int(text.split()[1]) for text in first]
    assert len(set(numbers)) == 30
    assert len({text.split()[-1] for text in first}) > 1
    real = np.stack([source.image(number, 32) for number in numbers])
    a, b = (
        Thumbnails()(torch.from_numpy(x).permute(0, 3, 1, 2)).double().numpy() for x in (real, np.concatenate(drawn))
    )
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert found.metrics == {"images": 30, "frechet/thumbnails": pytest.approx(expected, abs=1e-3)}
    assert "1 steps, guidance 1, temperature 32" in found.did["generated images"]
    assert "30 images of the 39 captioned ones" in found.did["pairs"]
    texts.clear()
    again = coco_fid30k(diptych, source, config, extractor=Thumbnails(), count=30)
    assert (again.metrics, texts) == (found.metrics, first)
    texts.clear()
    coco_fid30k(diptych, source, EvaluateConfig(seed=4), extractor=Thumbnails(), count=30)
    assert texts != first


def test_fid_says_when_there_are_fewer_and_what_it_is_not(diptych, photos):
    found = coco_fid30k(diptych, open_source(str(photos)), EvaluateConfig(), extractor=RandomFeatures())
    assert found.metrics["images"] == 39
    few, features = found.did["departures"]
    assert few == "39 images, not 30,000: the distance is larger for fewer"
    assert "not of FID's Inception" in features
    assert "fid" not in found.metrics
    assert "biased upwards" in found.notes[0]
    with pytest.raises(UserError, match="two captioned images"):
        coco_fid30k(diptych, open_source(str(photos)), EvaluateConfig(limit=1), extractor=RandomFeatures())


def test_results_do_not_depend_on_how_images_are_batched(diptych, photos, monkeypatch):
    source = open_source(str(photos))
    whole = coco_karpathy(diptych, source, EvaluateConfig(limit=8))
    monkeypatch.setattr(protocols, "_ROWS", 3)
    assert coco_karpathy(diptych, source, EvaluateConfig(limit=8)).captions == whole.captions


@pytest.mark.parametrize(
    ("spec", "split"),
    [
        ("coco/dataset_coco.json?split=test", "test"),
        ("dataset_coco.json?split=train+restval", "train+restval"),
        ("annotations/captions_val2014.json", "val"),
        ("test/photos", None),
        ("pairs.csv", None),
        ("{train,val}.tar", None),
        ("contest.csv", None),
        ("a.tar?caption=x&split=dev", "dev"),
    ],
)
def test_the_split_that_a_source_names(spec, split):
    assert split_named_in(spec) == split


def test_the_command_prints_and_writes_what_it_did(save_itit_run, photos, tmp_path, capsys):
    run = save_itit_run(tmp_path / "run", steps=2)
    spec = f"{photos}"
    for protocol, out in (("coco-karpathy", tmp_path / "k"), ("coco-fid30k", tmp_path / "f")):
        protocols.evaluate_protocol(
            run,
            spec,
            open_source(spec),
            EvaluateConfig(limit=5),
            protocol=protocol,
            features=None,
            out=out,
            device="cpu",
        )
        told, metrics = capsys.readouterr().out, json.loads((out / "metrics.json").read_text())
        assert metrics["images"] == 5
        assert metrics["protocol"]["name"] == protocol
        assert f"protocol {protocol}\n  source: {spec}\n  split: named by nothing in the source" in told
        for line in metrics["protocol"]["departures"]:
            assert f"DEPARTS: {line}" in told
    assert len((tmp_path / "k/captions.jsonl").read_text().splitlines()) == 5


# Cycles


def test_rounds_are_those_of_a_cycle(diptych, photos):
    source = open_source(str(photos))
    images = ScoredImages.read(diptych, source, EvaluateConfig(limit=4))
    first, second = cycle_scores(diptych, source, images, rounds=2, extractor=Thumbnails())
    texts = [source.captions(item)[0] for item in images.items]
    made = diptych.imagine_pixels(texts, seed=0)
    told = diptych.caption(list(made))
    again = diptych.imagine_pixels(told, seed=1)
    assert first["from_text/feature_distance"] == feature_distance(images.pixels_BSS3, made, Thumbnails())
    assert first["from_text/cider"] == score_captions(told, [[text] for text in texts]).cider
    assert second["from_text/feature_distance"] == feature_distance(images.pixels_BSS3, again, Thumbnails())
    captions = diptych.caption(list(images.pixels_BSS3))
    references = [source.captions(item) for item in images.items]
    assert first["from_image/cider"] == score_captions(captions, references).cider
    assert [first["round"], second["round"]] == [1, 2]


def test_a_perfect_network_keeps_every_attribute_in_every_round(diptych, monkeypatch):
    scenes = ScenesSource(count=8)
    images = ScoredImages.read(diptych, scenes, EvaluateConfig())
    right = [Caption(text=scenes.captions(i)[0], score=None) for i in range(8)]
    monkeypatch.setattr(Diptych, "caption_encoded", lambda self, images, **_: right)
    monkeypatch.setattr(Diptych, "imagine_pixels", lambda self, texts, **_: scenes.images(range(8), 32))
    for record in cycle_scores(diptych, scenes, images, rounds=2, extractor=Thumbnails()):
        assert set(record.values()) == {1.0, record["round"]}
        assert {"from_text/image_attributes", "from_image/caption_accuracy"} <= record.keys()


def test_the_distance_is_0_for_the_same_images_and_1_for_others():
    real = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), np.uint8)
    other = np.random.default_rng(1).integers(0, 256, (200, 8, 8, 3), np.uint8)
    assert feature_distance(real, real, Thumbnails()) == 0
    assert feature_distance(real, other, Thumbnails()) == pytest.approx(1, abs=0.1)


def test_two_runs_stand_in_one_figure(save_itit_run, tmp_path, capsys):
    runs = [save_itit_run(tmp_path / name, steps=1) for name in ("itit", "paired_only")]
    spec = "scenes:?count=4"
    protocols.evaluate_cycles(
        runs, spec, open_source(spec), EvaluateConfig(), rounds=2, features=None, out=tmp_path / "c", device="cpu"
    )
    found = json.loads((tmp_path / "c/metrics.json").read_text())["cycles"]
    assert [len(found[str(run)]) for run in runs] == [2, 2]
    assert "<svg" in (tmp_path / "c/cycles.svg").read_text()
    assert capsys.readouterr().out.count("cycles of") == 2
