import os
import sys
import time
from functools import partial
from unittest.mock import patch

import pytest
from PIL import Image

from diptych.data import audit as audit_module
from diptych.data.engine import Engine
from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source
from diptych.dual.recipes import clip_tiny
from diptych.run_folder import write_config


def replace_pairs(recipe, pairs):
    recipe.data.pairs = pairs
    return recipe


def test_check_says_what_a_source_holds(call, mistaken, tmp_path):
    (tmp_path / "t.txt").write_text("one text\nanother\n")
    status, out, _ = call("check", tmp_path / "t.txt")
    assert status == 0
    assert out.splitlines()[:3] == [f"{tmp_path}/t.txt", "  items      2", "  captions   2 of 2 items, 1 each"]
    mistaken(call("check", tmp_path / "no.csv"), "no.csv: does not exist")
    mistaken(call("check", tmp_path / "t.txt", "--images", "-1"), "--images -1")


def test_audit(call, run, dual_run, set_of_images, tmp_path, mistaken):
    """Without a run, by a dual encoder, and by ITIT; the list of what to keep is a source."""
    status, out, err = call("audit", set_of_images, "--out", tmp_path / "plain")
    assert (status, err) == (0, "")
    assert "2 captions of 40 items looked at" in out
    assert "image there twice" in out
    kept = open_source(f"{set_of_images}?keep={tmp_path / 'plain' / 'keep.jsonl'}")
    assert [kept.key(i) for i in range(len(kept))] == ["00.png"]
    for name, made in (("dual", dual_run), ("itit", run)):
        status, out, err = call("audit", "scenes:?count=20&seed=5", "--run", made, "--out", tmp_path / name)
        assert (status, err) == (0, "")
        assert f"{2:>7,}  caption does not fit" in out
        assert (tmp_path / name / "worst.png").is_file()
    write_config(dual_run, recipe="clip-tiny", run=replace_pairs(clip_tiny(), "scenes:?count=20"))
    assert (
        "has learned from scenes:?count=20"
        in call("audit", "scenes:?count=20", "--run", dual_run, "--out", tmp_path / "own")[2]
    )
    encoders = ("--image-encoder", dual_run, "--text-encoder", dual_run)
    status, out, _ = call("audit", "scenes:?count=20&seed=5", *encoders, "--out", tmp_path / "encoders")
    assert (status, f"{2:>7,}  caption does not fit" in out) == (0, True)
    few = call("audit", "scenes:?count=1", *encoders, "--out", tmp_path / "few")
    mistaken(few, "1 captioned images, too few to compare")
    alone = call("audit", "scenes:?count=20", "--image-encoder", dual_run, "--out", tmp_path / "x")
    mistaken(alone, "--image-encoder and --text-encoder together")
    mistaken(call("audit", set_of_images, "--out", tmp_path / "x", "--worst", 2), "--worst 2.0: a share")
    mistaken(call("audit", tmp_path / "none", "--out", tmp_path / "x"), "none: does not exist")


def test_suggest(call, run, dual_run, set_of_images, tmp_path, mistaken):
    """By ITIT, by a dual encoder, and by features alone; the table is a source."""
    for given in ((run,), (dual_run,), ()):
        out = tmp_path / f"next-{given[0].name if given else 'plain'}.csv"
        status, told, err = call(
            "suggest", *given, set_of_images, "--count", 5, "--out", out, "--max-skipped-share", 0.1
        )
        assert (status, err) == (0, "")
        assert told.startswith(f"5 of 38 images without a caption in {out}, to be seen on {out.with_suffix('.png')}\n")
        kept = open_source(f"{set_of_images}?keep={out}")
        assert len({kept.key(i) for i in range(5)} - {"03.png", "07.png"}) == 5
    status, told, err = call("suggest", set_of_images, "--captioned", "scenes:?count=3", "--count", 2, "--pool", 20)
    assert (status, err, len(told.splitlines())) == (0, "", 2)
    (set_of_images / "07.txt").unlink()
    (set_of_images / "03.txt").unlink()
    status, told, err = call("suggest", set_of_images, "--count", 2)
    assert (status, err) == (0, "no image has a caption: --captioned SRC names those that have\n")
    mistaken(call("suggest", "scenes:?count=5"), "scenes:?count=5: every image has a caption already")
    mistaken(call("suggest", set_of_images, "--pool", 5), "--pool 5: must be at least --count, 100")
    mistaken(call("suggest", "a", "b", "c"), "give a run and a source")
    mistaken(call("suggest", set_of_images, "--out", tmp_path / "x.txt"), "x.txt: give a name that ends in .csv")


@pytest.fixture
def ray_that_dies(monkeypatch, tmp_path, ray_by_value):
    """On Ray, one worker of each command dies when it is given its second block or a later one."""
    ray_by_value(sys.modules[__name__])
    plain = Engine.map

    def mapped(engine, work, tools, blocks):
        if engine.name == "ray":
            calls = tmp_path / f"calls-{time.time_ns()}"
            calls.mkdir()
            work = partial(die_once, work, calls)
        yield from plain(engine, work, tools, blocks)
        if engine.name == "ray":
            assert (calls / "died").exists()

    monkeypatch.setattr(Engine, "map", mapped)


def die_once(work, calls, tools, block):
    if any(calls.iterdir()):
        try:
            (calls / "died").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os._exit(1)
    (calls / str(time.time_ns())).touch()
    return work(tools, block)


@pytest.mark.ray
def test_ray_writes_the_same_bytes_though_a_worker_dies(call, run, dual_run, ray_that_dies, monkeypatch, tmp_path):
    """One image is there twice and one cannot be read. Paths are relative to where the command is given."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (
        ("diptych.data.store._CHUNK", 12),
        ("diptych.dual.search._ROWS", 12),
        ("diptych.dual.evaluation._ROWS", 12),
        ("diptych.itit.evaluation._ROWS", 12),
        ("diptych.eval.baselines._ROWS", 12),
        ("diptych.data.audit._BLOCK", 12),
        ("diptych.cli.images.ROWS", 12),
    ):
        monkeypatch.setattr(name, rows)
    scenes, photos = ScenesSource(count=200), tmp_path / "photos"
    photos.mkdir()
    for item in range(200):
        Image.fromarray(scenes.image(min(item, 198), 40)).save(photos / f"{item:03}.png")
        (photos / f"{item:03}.txt").write_text(scenes.captions(item)[0])
    (photos / "150.png").write_bytes(b"no image")
    frozen = ("--image-encoder", dual_run, "--text-encoder", dual_run)
    for command in (
        ("encode", "photos", "--run", run, "--features", "--out", "store"),
        ("caption", run, "photos", "--all", "--beams", 1, "--out", "captions.csv"),
        ("embed", dual_run, "photos", "--out", "images"),
        ("embed", dual_run, "photos", "--texts", "--out", "texts.parquet"),
        ("audit", "photos", "--run", dual_run, "--out", "by-dual"),
        ("audit", "photos", "--run", run, "--out", "by-itit"),
        ("audit", "photos", *frozen, "--out", "by-encoders"),
    ):
        out = tmp_path / command[-1]
        local = call(*command)
        os.rename(out, out.with_name(f"local-{out.name}"))
        assert call(*command, "--engine", "ray")[:2] == local[:2]
        assert contents(out) == contents(out.with_name(f"local-{out.name}")), command


def contents(place) -> dict[str, bytes]:
    """The bytes of a file, or of those in a folder."""
    files = place.iterdir() if place.is_dir() else [place]
    return {file.name.removeprefix("local-"): file.read_bytes() for file in files}


def test_an_audit_that_was_stopped_goes_on(call, dual_run, monkeypatch, tmp_path):
    audit = ("audit", "scenes:?count=30", "--run", dual_run, "--out")
    assert call(*audit, tmp_path / "whole")[0] == 0
    looked = []

    def stops(source, items):
        looked.append(len(items))
        if len(looked) == 2:
            raise KeyboardInterrupt
        return look(source, items)

    look = audit_module._look
    monkeypatch.setattr(audit_module, "_BLOCK", 12)
    monkeypatch.setattr(audit_module, "_look", stops)
    assert call(*audit, tmp_path / "cut")[0] == 130
    assert [file.name for file in (tmp_path / "cut").iterdir()] == [".unfinished"]
    with patch("diptych.dual.evaluation._pair_vectors") as pairs:
        assert call(*audit, tmp_path / "cut")[0] == 0
    assert (looked, pairs.call_count) == ([12, 12, 12, 6], 0)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_ray_is_asked_for_where_it_makes_sense(call, run, dual_run, photo, mistaken, monkeypatch, tmp_path):
    out = ("--out", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (
        ("encode", "scenes:?count=3", "--run", run, *out),
        ("caption", run, photo, "--out", tmp_path / "out.csv"),
        ("embed", dual_run, "scenes:?count=3", *out),
        ("audit", "scenes:?count=3", "--run", run, *out),
    ):
        mistaken(call(*command, "--engine", "ray"), "--engine ray needs ray", "pip install 'diptych[ray]'")
        mistaken(call(*command, "--ray-address", "here:1"), "--ray-address here:1: goes with --engine ray")
    mistaken(call("caption", run, photo, "--engine", "ray"), "--engine ray: goes with --out alone")
    assert not (tmp_path / "out").exists()
