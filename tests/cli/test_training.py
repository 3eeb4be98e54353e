import time
from dataclasses import fields, is_dataclass

import pytest

from diptych.cli import training
from diptych.cli.training import RENAMED_FLAGS, _renamed, settings_as_flags
from diptych.data.store import Store
from diptych.registry import RECIPES
from diptych.run_folder import read_config

TEST = "scenes:?split=test&count=8"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_help_with_its_docstring(call, recipe):
    for flag, steps in (("--help", "train.steps\n"), ("--help-all", "train.steps INT")):
        status, out, _ = call("fit", recipe, flag)
        assert status == 0
        assert steps in out
        assert (RECIPES[recipe].__doc__ or "").splitlines()[0] in out


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_lists_what_matters_first(call, recipe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = call("fit", recipe, "--help")[1]
    lines = out.splitlines()
    assert len(lines) < 70
    flags = [line.strip() for line in lines if line.startswith("--")]
    assert flags[:2] == ["--out RUN", "--minutes MINUTES"]
    assert 4 < len(flags) <= 12
    assert "(required)" in out
    assert max(map(len, lines)) <= 120
    assert set(flags[2:]) <= set(flags_of(RECIPES[recipe]()))
    assert f"more options: diptych fit {recipe} --help-all" in out


def test_an_unknown_recipe_and_empty_lists(call, mistaken):
    mistaken(call("fit", "itit-gigantic", "--out", "x"), "itit-gigantic", *RECIPES)
    mistaken(call("caption", "run"), "no image given")
    mistaken(call("imagine", "run", "--out", "x"), "no text given")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--train.epochs", 3, "--minutes", 2], "--train.epochs and --minutes both say"),
        (["--train.epochs", 3, "--train.steps", 5], "--train.epochs and --train.steps both say"),
        (
            ["--tokenizer-stage.train.epochs", 3, "--tokenizer-stage.train.steps", 5],
            "--tokenizer-stage.train.epochs and --tokenizer-stage.train.steps both say",
        ),
    ],
)
def test_one_length_for_each_stage(call, mistaken, tmp_path, given, told):
    mistaken(call("fit", "itit-tiny", "--out", tmp_path / "x", "--data.pairs", "scenes:", *given), told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "now"),
    [
        (["--objective.cycles-from", "3"], "--objective.cycles-from is now --objective.cycle-start-step"),
        (["--objective.cycles_from=3"], "--objective.cycles_from is now --objective.cycle-start-step"),
        (["--objective.draw.steps", "3"], "--objective.draw.steps is now --objective.image-generation.steps"),
        (
            ["--tokenizer-stage.model.codes=9"],
            "--tokenizer-stage.model.codes is now --tokenizer-stage.model.codebook-size",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_flag_by_its_old_name(call, mistaken, tmp_path, given, now):
    mistaken(call("fit", "itit-tiny", "--out", tmp_path / "x", "--data.pairs", "scenes:", *given), f"diptych: {now}\n")
    assert list(tmp_path.iterdir()) == []


def test_renamed_flags_are_flags_of_recipes_and_their_old_names_are_not():
    flags = {flag for recipe in RECIPES.values() for flag in flags_of(recipe())}
    assert [flag for flag in flags if _renamed(flag)] == []
    assert [new for new in RENAMED_FLAGS.values() if not any(f".{new}." in f".{flag[2:]}." for flag in flags)] == []


def flags_of(run, prefix: str = "--") -> list[str]:
    """A flag for every field of a run at any depth."""
    flags = []
    for field in fields(run):
        flag = prefix + field.name.replace("_", "-")
        value = getattr(run, field.name)
        flags += [flag, *(flags_of(value, f"{flag}.") if is_dataclass(value) else [])]
    return flags


def test_the_recipe_gets_its_fields(call, monkeypatch, tmp_path):
    got = []
    monkeypatch.setattr("diptych.itit.training.ItitRun.fit", lambda run, out, **given: got.append((run, out, given)))
    fields = ["--data.max-pairs", "5", "--train.steps", "7", "--tokenizer-stage.train.steps", "9", "--optim.lr", "0.5"]
    status, _, err = call("fit", "itit-tiny", "--out", tmp_path / "x", "--data.pairs", "scenes:", *fields)
    assert (status, err) == (0, "")
    ((run, out, given),) = got
    assert (out, given) == (tmp_path / "x", {"recipe": "itit-tiny", "budget": None})
    assert (run.data.pairs, run.data.max_pairs, run.optim.lr) == ("scenes:", 5, 0.5)
    assert (run.train.steps, run.tokenizer_stage.train.steps, run.train.seed) == (7, 9, 0)


def test_minutes_are_a_budget_which_the_imports_count_in(call, monkeypatch, tmp_path):
    """By the clock: on a busy machine they take much longer than their processor time."""
    got, clock, late, parse = [], time.monotonic, [0.0], training._parse_fit

    def parse_late(*arguments, **options):
        late[0] = 100.0
        return parse(*arguments, **options)

    monkeypatch.setattr(time, "monotonic", lambda: clock() + late[0])
    monkeypatch.setattr(training, "_parse_fit", parse_late)
    monkeypatch.setattr("diptych.itit.training.ItitRun.fit", lambda run, out, **given: got.append(given["budget"]))
    call("fit", "itit-tiny", "--out", tmp_path / "x", "--data.pairs", "scenes:", "--minutes", 20)
    assert got[0].minutes == 20
    assert 20 * 60 - 700 < got[0].left() < 20 * 60 - 100


def test_recipes_are_listed(call):
    status, out, _ = call("recipes")
    assert status == 0
    for name in RECIPES:
        assert f"\n{name}  " in f"\n{out}"


@pytest.mark.parametrize("features", [False, True])
def test_encode(call, run, tmp_path, features):
    flags = ["--features"] if features else []
    status, out, _ = call("encode", "scenes:?count=12", "--run", run, "--out", tmp_path / "store", *flags)
    assert (status, out) == (0, f"12 items in {tmp_path}/store\n")
    store = Store.open(tmp_path / "store")
    assert (len(store), store.has_images, store.has_captions) == (12, True, True)
    assert ("features" not in store.arrays) != features


def test_encode_one_side(call, run, photo, tmp_path):
    (tmp_path / "texts.txt").write_text("a red circle\n\na blue square\n")
    call("encode", tmp_path / "texts.txt", "--run", run, "--out", tmp_path / "texts")
    store = Store.open(tmp_path / "texts")
    assert (len(store), store.has_images, store.has_captions) == (2, False, True)
    (tmp_path / "photos").mkdir()
    photo.rename(tmp_path / "photos/one.png")
    call("encode", tmp_path / "photos", "--run", run, "--out", tmp_path / "images")
    store = Store.open(tmp_path / "images")
    assert (len(store), store.has_images, store.has_captions) == (1, True, False)


def texts_in_utf16(folder):
    (folder / "texts.txt").write_bytes("ein Käse\n".encode("utf-16"))
    return ["--data.pairs", "scenes:?count=40", "--data.texts", folder / "texts.txt"], "UTF-16"


def texts_in_latin1(folder):
    (folder / "texts.txt").write_bytes("bread\nein K\xe4se\n".encode("latin-1"))
    return ["--data.pairs", "scenes:?count=40", "--data.texts", folder / "texts.txt"], "line 2, byte 11"


def an_empty_folder(folder):
    (folder / "photos").mkdir()
    return ["--data.pairs", folder / "photos"], "holds no images"


def images_without_captions(folder):
    (folder / "photos").mkdir()
    (folder / "photos/one.png").write_bytes(b"")
    return ["--data.pairs", folder / "photos"], "has no captions"


def a_table_without_the_column(folder):
    (folder / "table.csv").write_text("file_name,caption\na.png,a red circle\n")
    return ["--data.pairs", folder / "table.csv", "--data.columns.caption", "title"], "title"


def a_table_without_captions(folder):
    (folder / "table.csv").write_text("file_name,width\na.png,32\n")
    return ["--data.pairs", folder / "table.csv"], "table.csv"


def texts_as_images(folder):
    (folder / "texts.txt").write_text("bread\n")
    return ["--data.pairs", "scenes:?count=40", "--data.images", folder / "texts.txt"], "has no images"


def too_many_pairs(folder):
    return ["--data.pairs", "scenes:?count=40", "--data.max-pairs", 41], "--data.max-pairs 41"


def an_empty_file(folder):
    (folder / "texts.txt").write_bytes(b"")
    return ["--data.pairs", "scenes:?count=40", "--data.texts", folder / "texts.txt"], "holds no text"


def cycles_that_never_begin(folder):
    return ["--data.pairs", "scenes:?count=40", "--train.steps", 2], "is not before --train.steps 2"


def an_unknown_option_of_scenes(folder):
    return ["--data.pairs", "scenes:?colour=red"], "no option 'colour'"


@pytest.mark.parametrize(
    "mistake",
    [
        texts_in_utf16,
        texts_in_latin1,
        an_empty_folder,
        images_without_captions,
        a_table_without_the_column,
        a_table_without_captions,
        texts_as_images,
        too_many_pairs,
        an_empty_file,
        cycles_that_never_begin,
        an_unknown_option_of_scenes,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_data_that_cannot_be_learned_from(call, tmp_path, mistake, mistaken):
    arguments, told = mistake(tmp_path)
    mistaken(call("fit", "itit-tiny", "--out", tmp_path / "out", *arguments), told)
    left = {path.name for path in (tmp_path / "out").glob("*")}
    assert left <= {"config.json"}


def test_sources_that_cannot_be_encoded_or_scored(call, run, tmp_path, mistaken):
    (tmp_path / "texts.txt").write_text("bread\n")
    mistaken(call("evaluate", run, "--data", tmp_path / "texts.txt", "--out", tmp_path / "out"), "images and captions")
    mistaken(call("evaluate", run, "--data", TEST, "--limit", 0, "--out", tmp_path / "out"), "--limit 0")
    mistaken(call("encode", tmp_path / "none", "--run", run, "--out", tmp_path / "out"), "does not exist")
    before = (tmp_path / "texts.txt").read_text()
    for taken in (tmp_path, tmp_path / "texts.txt"):
        mistaken(call("encode", TEST, "--run", run, "--out", taken), taken, "no encoded data")
    assert (tmp_path / "texts.txt").read_text() == before
    assert not (tmp_path / "out").exists()


def test_settings_in_a_file(call, mistaken, tmp_path):
    """What a run was asked for is in its config.yaml; given as --config it is asked for again, but for flags."""
    flags = ["--data.pairs", "scenes:?count=40", "--train.steps", 2, "--train.batch-size", 4, "--train.quiet"]
    assert call("fit", "clip-tiny", "--out", tmp_path / "a", *flags)[0] == 0
    text = (tmp_path / "a" / "config.yaml").read_text()
    assert text.startswith("recipe: clip-tiny\ndata:\n  pairs: scenes:?count=40\n")
    before = read_config(tmp_path / "a")["run"]
    assert call("fit", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b")[0] == 0
    assert read_config(tmp_path / "b")["run"] == before
    again = ("fit", "clip-tiny", f"--config={tmp_path / 'a' / 'config.yaml'}", "--out", tmp_path / "c")
    assert call(*again, "--train.steps", 1, "--train.no-quiet")[0] == 0
    other = read_config(tmp_path / "c")["run"]
    assert (other["train"]["steps"], other["train"]["quiet"]) == (1, False)
    mistaken(call("fit", "ito-tiny", *again[2:]), "made for the recipe clip-tiny, and ito-tiny is given")


@pytest.mark.parametrize(
    ("text", "message"),
    [("train: [", "is no YAML"), ("- 1", "holds no settings"), ("train: {steps: 1}", "no recipe given")],
)
def test_files_that_hold_no_settings(call, mistaken, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    mistaken(call("fit", "--config", tmp_path / "run.yaml", "--out", tmp_path / "x"), message)
    mistaken(call("fit", "--config", tmp_path / "none.yaml", "--out", tmp_path / "x"), "none.yaml: cannot be read")
    mistaken(call("fit", "--out", tmp_path / "x", "--config"), "--config: no file given")


def test_settings_become_flags_in_the_form_that_each_takes():
    settings = {"recipe": "r", "train": {"steps": 3, "compile": False, "ema": None}, "a_b": [1, 2], "quick": True}
    assert settings_as_flags(settings, but_not=["--out", "x"]) == [
        "--train.steps", "3", "--train.no-compile", "--train.ema", "None", "--a-b", "1", "2", "--quick",
    ]  # fmt: skip
    assert settings_as_flags(settings, but_not=["--train.compile", "--train.steps=4", "--a_b", "--quick"]) == [
        "--train.ema", "None",
    ]  # fmt: skip
