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
