"""Which images are suggested, and how they are written."""

import csv
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from diptych.data.sources import open_source
from diptych.data.suggest import AssessedImages, check_format, facility_location, suggest, write_suggestions
from diptych.errors import UserError


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def covered(features_NF, near_N, weight_N, rows):
    cosines = np.maximum(features_NF @ features_NF[list(rows)].T, 0) if rows else np.zeros((len(features_NF), 1))
    return np.maximum(cosines.max(1), np.maximum(near_N, 0)) @ weight_N


@pytest.mark.parametrize("seed", range(5))
def test_each_choice_is_the_best_one(seed):
    generator = np.random.default_rng(seed)
    x = unit(generator.normal(size=(60, 4)))
    near, weight, pool = generator.uniform(-0.5, 0.8, 60), generator.uniform(0, 1, 60), generator.permutation(60)[:40]
    chosen = facility_location(x, near, pool, weight_N=weight, count=8)
    for step in range(8):
        values = {row: covered(x, near, weight, [*chosen[:step], row]) for row in pool if row not in chosen[:step]}
        assert values[chosen[step]] == pytest.approx(max(values.values()), rel=1e-6)
    best = max(covered(x, near, weight, list(pair)) for pair in itertools.combinations(pool, 2))
    assert covered(x, near, weight, chosen[:2]) - covered(x, near, weight, []) >= 0.63 * (
        best - covered(x, near, weight, [])
    )
    assert sorted(facility_location(x, near, pool, weight_N=weight, count=99)) == sorted(pool)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (20, 20), (4 * i, 0, 0)).save(folder / f"{i:02d}.png")
    return folder


def test_uncertain_images_that_stand_for_others_and_are_not_covered(photos):
    source = open_source(str(photos))
    angle = np.repeat([0.0, 2.0, 4.0], 20) + np.linspace(0, 0.2, 60)  # three clusters
    features = np.stack([np.cos(angle), np.sin(angle)], 1)
    images = AssessedImages(items_N=np.arange(60), features_NF=features)
    clusters = [each.item // 20 for each in suggest(source, images, np.empty((0, 2)), count=3)]
    assert sorted(clusters) == [0, 1, 2]
    found = suggest(source, images, features[[5, 30]], count=1)
    assert (found[0].item // 20, found[0].uncertainty, found[0].draft) == (2, None, "")
    assert found[0].distance > 0.5

    uncertain = AssessedImages(
        items_N=np.arange(60), features_NF=features, uncertainty_N=np.arange(60.0) % 20, drafts=["red"] * 60
    )
    found = suggest(source, uncertain, features[[5, 30]], count=1)
    assert found[0].item in (56, 57, 58, 59)  # of the twelve that are looked at, those in the cluster without captions
    assert (found[0].key, found[0].draft) == (f"{found[0].item}.png", "red")
    assert found[0].uncertainty >= 0.8


@pytest.mark.parametrize("name", ["next.csv", "next.jsonl"])
def test_the_table_takes_captions_and_is_a_source(photos, tmp_path, name):
    source, out = open_source(str(photos)), tmp_path / name
    generator = np.random.default_rng(0)
    images = AssessedImages(
        items_N=np.arange(60), features_NF=generator.normal(size=(60, 3)), drafts=['a "red", one'] * 60
    )
    found = suggest(source, images, generator.normal(size=(2, 3)), count=4)
    sheet = write_suggestions(source, found, out)
    with Image.open(sheet) as opened:
        assert opened.width > 300
    kept = open_source(f"{photos}?keep={out}")
    assert [kept.key(i) for i in range(4)] == [each.key for each in found]
    assert [kept.captions(i) for i in range(4)] == [[]] * 4  # drafts are no captions
    if name.endswith(".csv"):
        with open(out, newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows[0]["draft"] == 'a "red", one'
        rows[1]["captions"] = "what I see, really"
        with open(out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        rows[1]["captions"] = ["what I see, really"]
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = open_source(f"{photos}?keep={out}")
    assert [kept.captions(i) for i in range(2)] == [[], ["what I see, really"]]
    with pytest.raises(UserError, match="exists already"):
        check_format(out)
    with pytest.raises(UserError, match=r"give a name that ends in \.csv or \.jsonl"):
        check_format(tmp_path / "x.txt")
