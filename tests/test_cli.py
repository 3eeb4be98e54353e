import io
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from diptych import cli
from diptych.data.store import Store
from diptych.recipes import RECIPES
from diptych.recipes.folders import write_config
from diptych.recipes.itit_recipes import itit_tiny
from diptych.recipes.stage_recipes import vqgan_tiny
from diptych.train.interrupt import Interrupted

TEST = "scenes:?split=test&count=8"


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """As in a process that `main` has started: it switches the progress bars off before the libraries are imported."""
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", False)
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line in this process; gives status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diptych", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def run(tokenizer, text_encoder, model, tmp_path):
    folder = tmp_path / "run"
    for part, whole in (("tokenizer", tokenizer), ("text_encoder", text_encoder), ("model", model)):
        whole.save_pretrained(folder / part)
    recipe = itit_tiny()
    recipe.data.pairs = "scenes:"
    generation = {"draw": {"steps": 2, "guidance": 0.0}, "write": {"beams": 2}}
    write_config(folder, recipe="itit-tiny", run=recipe, generation=generation)
    return folder


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def mistaken(found: tuple[int, str, str], *parts: object) -> None:
    """Status 2, nothing on stdout and one line on stderr, with these parts."""
    status, out, err = found
    assert (status, out) == (2, "")
    assert err.startswith("diptych: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for part in parts:
        assert str(part) in err


# Help and what tyro catches


def test_help_comes_without_the_heavy_libraries():
    script = (
        "import sys; sys.argv = ['diptych', *sys.argv[1:]]\n"
        "from diptych.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'transformers', 'diffusers', 'datasets'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["fit", "--help"], ["imagine", "--help"]):
        found = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=30)
        assert found.returncode == 0
        assert found.stdout.endswith("[]\n")
        assert "usage: diptych" in found.stdout


def test_no_arguments_give_the_commands(call):
    status, out, _ = call()
    assert status == 0
    for command in ("demo", "recipes", "fit", "encode", "caption", "imagine", "cycle", "evaluate"):
        assert command in out
    assert "\n\n\n" not in out


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_help_with_its_docstring(call, recipe):
    status, out, _ = call("fit", recipe, "--help")
    assert status == 0
    assert "train.steps INT" in out
    assert (RECIPES[recipe].__doc__ or "").splitlines()[0] in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonsense"], "nonsense"),
        (["caption", "run", "image.png", "--jsn"], "--json"),
        (["imagine", "run", "text"], "--out"),
        (["imagine", "run", "text", "--out", "x", "--steps", "many"], "many"),
        (["fit", "itit-tiny", "--out", "x"], "--data.pairs"),
        (["fit", "itit-tiny", "--data.pairs", "scenes:"], "--out"),
        (["fit", "itit-tiny", "--out", "x", "--data.pairs", "scenes:", "--train.stepz", "3"], "--train.steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_misspelt_commands_and_flags(call, arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert told in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_and_empty_lists(call):
    mistaken(call("fit", "itit-gigantic", "--out", "x"), "itit-gigantic", *RECIPES)
    mistaken(call("caption", "run"), "no image given")
    mistaken(call("imagine", "run", "--out", "x"), "no text given")


def test_the_recipe_gets_its_fields(call, monkeypatch, tmp_path):
    got = []
    monkeypatch.setattr("diptych.recipes.itit.ItitRun.fit", lambda run, out, *, recipe: got.append((run, out, recipe)))
    fields = ["--data.max-pairs", "5", "--train.steps", "7", "--tokenizer-stage.train.steps", "9", "--optim.lr", "0.5"]
    status, _, err = call("fit", "itit-tiny", "--out", tmp_path / "x", "--data.pairs", "scenes:", *fields)
    assert (status, err) == (0, "")
    ((run, out, recipe),) = got
    assert (out, recipe) == (tmp_path / "x", "itit-tiny")
    assert (run.data.pairs, run.data.max_pairs, run.optim.lr) == ("scenes:", 5, 0.5)
    assert (run.train.steps, run.tokenizer_stage.train.steps, run.train.seed) == (7, 9, 0)


def test_recipes_are_listed(call):
    status, out, _ = call("recipes")
    assert status == 0
    for name in RECIPES:
        assert f"\n{name}  " in f"\n{out}"


def test_interruptions_have_the_shells_status(call, monkeypatch):
    def stop(error):
        def recipes():
            raise error

        monkeypatch.setitem(cli.COMMANDS, "recipes", recipes)

    stop(Interrupted(15, step=7))
    status, _, err = call("recipes")
    assert status == 143
    assert "after step 7" in err
    assert err.count("\n") == 1
    stop(KeyboardInterrupt())
    assert call("recipes") == (130, "", "")


# Commands on a run


def test_caption(call, run, photo):
    status, out, err = call("caption", run, photo, photo)
    assert (status, err) == (0, "")
    first, second, rest = out.split("\n")
    assert (first, rest) == (second, "")
    status, out, _ = call("caption", run, photo, "--json")
    record = json.loads(out)
    assert (record["file"], record["caption"]) == (str(photo), first)
    assert record["score"] < 0
    status, out, _ = call("caption", run, photo, "--json", "--beams", "1")
    assert json.loads(out)["score"] is None


@pytest.mark.slow
def test_a_caption_in_a_process_of_its_own(run, photo, tmp_path):
    """Nothing but captions on stdout, and nothing on stderr."""
    command = [sys.executable, "-m", "diptych", "caption", str(run), str(photo), "--json"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)["file"] == str(photo)


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_imagine(call, run, tmp_path):
    status, out, err = call("imagine", run, "a red circle", "a blue square", "--out", tmp_path / "drawn", "--seed", 3)
    assert (status, err) == (0, "")
    assert str(tmp_path / "drawn/sheet.png") in out
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["000.png", "001.png", "sheet.png"]
    assert read(tmp_path / "drawn/000.png").shape == (32, 32, 3)
    assert (read(tmp_path / "drawn/000.png") != read(tmp_path / "drawn/001.png")).any()
    call("imagine", run, "a red circle", "a blue square", "--out", tmp_path / "again", "--seed", 3)
    np.testing.assert_array_equal(read(tmp_path / "drawn/001.png"), read(tmp_path / "again/001.png"))
    settings = ["--steps", 1, "--guidance", 0.5, "--temperature", 0]
    call("imagine", run, "a red circle", "--out", tmp_path / "other", "--seed", 3, *settings)
    assert (read(tmp_path / "drawn/000.png") != read(tmp_path / "other/000.png")).any()
    mistaken(call("imagine", run, "a", "--out", tmp_path / "none", "--steps", 0), "0 drawing steps")
    assert not (tmp_path / "none").exists()


def test_ten_thousand_characters_are_cut_by_the_tokenizer(call, run, tmp_path):
    status, _, err = call("imagine", run, "a small red circle " * 527, "--out", tmp_path / "drawn")
    assert (status, err) == (0, "")
    assert (tmp_path / "drawn/sheet.png").stat().st_size > 0


def test_cycle(call, run, photo, tmp_path):
    status, out, err = call("cycle", run, "--text", "a red circle", "--rounds", 2, "--out", tmp_path / "text")
    assert (status, err) == (0, "")
    assert out.startswith("0: a red circle\n1: ")
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == ["001.png", "003.png", "strip.png"]
    call("cycle", run, "--image", photo, "--rounds", 1, "--out", tmp_path / "image")
    assert sorted(path.name for path in (tmp_path / "image").iterdir()) == ["000.png", "002.png", "strip.png"]
    mistaken(call("cycle", run, "--out", tmp_path / "none"), "give one of them")
    mistaken(call("cycle", run, "--text", "a", "--image", photo, "--out", tmp_path / "none"), "give one of them")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("features", [False, True])
def test_encode(call, run, tmp_path, features):
    flags = ["--features"] if features else []
    status, out, _ = call("encode", "scenes:?count=12", "--run", run, "--out", tmp_path / "store", *flags)
    assert (status, out) == (0, f"12 items in {tmp_path}/store\n")
    store = Store.open(tmp_path / "store")
    assert (len(store), store.has_images, store.has_captions) == (12, True, True)
    assert (store.array("features") is None) != features


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


@pytest.mark.filterwarnings("ignore:Covariance")
def test_evaluate(call, run, tmp_path):
    status, out, err = call("evaluate", run, "--data", TEST, "--beams", 1)
    assert (status, err) == (0, "")
    assert "caption_accuracy" in out
    folder = run / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == ["captions.jsonl", "metrics.json", "sheet.png"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["images"] == 8
    assert {"cider", "caption_accuracy", "image_accuracy"} <= metrics.keys()
    assert len((folder / "captions.jsonl").read_text().splitlines()) == 8
    call("evaluate", run, "--data", TEST, "--limit", 3, "--out", tmp_path / "three")
    assert json.loads((tmp_path / "three/metrics.json").read_text())["images"] == 3


@pytest.mark.filterwarnings("ignore:Covariance")
def test_evaluate_a_tokenizer(call, tokenizer, photo, tmp_path):
    run = tmp_path / "vqgan"
    tokenizer.save_pretrained(run / "tokenizer")
    write_config(run, recipe="vqgan-tiny", run=vqgan_tiny())
    status, out, err = call("evaluate", run, "--data", TEST, "--limit", 4)
    assert (status, err) == (0, "")
    assert "PSNR" in out
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["metrics.json", "sheet.png"]
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    assert metrics["images"] == 4
    assert {"psnr", "used", "perplexity", "rfd"} <= metrics.keys()
    write_config(run, recipe="text-encoder-tiny", run=vqgan_tiny())
    mistaken(call("evaluate", run, "--data", TEST), run, "text encoder")
    write_config(run, recipe="newer-than-this", run=vqgan_tiny())
    mistaken(call("evaluate", run, "--data", TEST), run, "newer-than-this")


# What goes wrong


def png_of_zeros(width: int, height: int) -> bytes:
    """One bit a pixel: four hundred million pixels in fifty kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("cut.jpg", jpeg()[:-500], "cut.jpg"),
        ("stub.jpg", jpeg()[:30], "stub.jpg"),
        ("empty.png", b"", "empty (0 bytes)"),
        ("huge.png", png_of_zeros(20_000, 20_000), "20000 x 20000 pixels"),
        ("text.png", b"not an image\n", "not an image"),
        ("two\nlines.png", b"", "two\\nlines.png"),
        ("missing.png", None, "does not exist"),
        ("folder.png", ..., "is not a file"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("g") else "",
)
def test_an_unusable_image(call, run, photo, tmp_path, name, content, told):
    file = tmp_path / name
    if content is ...:
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    mistaken(call("caption", run, photo, file), told)
    if name != "two\nlines.png":
        mistaken(call("cycle", run, "--image", file, "--out", tmp_path / "out"), file, told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["caption", "imagine", "cycle", "encode", "evaluate"])
def test_a_run_that_is_not_there_or_damaged(call, run, photo, tmp_path, command):
    out = tmp_path / "out"

    def arguments(run):
        return {
            "caption": ["caption", run, photo],
            "imagine": ["imagine", run, "a red circle", "--out", out],
            "cycle": ["cycle", run, "--text", "a red circle", "--out", out],
            "encode": ["encode", TEST, "--run", run, "--out", out],
            "evaluate": ["evaluate", run, "--data", TEST, "--out", out],
        }[command]

    mistaken(call(*arguments(tmp_path / "nowhere")), tmp_path / "nowhere")
    for part in ("model", "text_encoder", "tokenizer"):
        if (command, part) != ("encode", "model"):
            (weights,) = (run / part).glob("*.safetensors")
            weights.write_bytes(weights.read_bytes()[:-1000])
            mistaken(call(*arguments(run)), run / part)
    assert not out.exists()


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
        texts_in_utf16, texts_in_latin1, an_empty_folder, images_without_captions, a_table_without_the_column,
        a_table_without_captions, texts_as_images, too_many_pairs, an_empty_file, cycles_that_never_begin,
        an_unknown_option_of_scenes,
    ],
    ids=lambda mistake: mistake.__name__,
)  # fmt: skip
def test_data_that_cannot_be_learned_from(call, tmp_path, mistake):
    arguments, told = mistake(tmp_path)
    mistaken(call("fit", "itit-tiny", "--out", tmp_path / "out", *arguments), told)
    left = {path.name for path in (tmp_path / "out").glob("*")}
    assert left <= {"config.json"}


def test_sources_that_cannot_be_encoded_or_scored(call, run, tmp_path):
    (tmp_path / "texts.txt").write_text("bread\n")
    mistaken(call("evaluate", run, "--data", tmp_path / "texts.txt", "--out", tmp_path / "out"), "images and captions")
    mistaken(call("evaluate", run, "--data", TEST, "--limit", 0, "--out", tmp_path / "out"), "at least one")
    mistaken(call("encode", tmp_path / "none", "--run", run, "--out", tmp_path / "out"), "does not exist")
    before = (tmp_path / "texts.txt").read_text()
    for taken in (tmp_path, tmp_path / "texts.txt"):
        mistaken(call("encode", TEST, "--run", run, "--out", taken), taken, "no encoded data")
    assert (tmp_path / "texts.txt").read_text() == before
    assert not (tmp_path / "out").exists()
