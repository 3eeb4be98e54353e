"""The commands on finished runs: what they print and write, and how mistakes end."""

import io
import json
import subprocess
import sys
import zlib
from unittest.mock import patch

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from diptych.cli.images import find_images
from diptych.data.scenes import ScenesSource
from diptych.data.sources.decode import decode
from diptych.data.sources.rows import TABLE_SUFFIXES
from diptych.data.store import VectorStore
from diptych.dual.search import Index, nearest
from diptych.run_folder import write_config
from diptych.uml.recipes import uml_probe

# Generate images


TEST = "scenes:?split=test&count=8"


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_imagine(call, run, tmp_path, mistaken):
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
    mistaken(call("imagine", run, "a", "--out", tmp_path / "none", "--steps", 0), "--steps 0: must be 1 or more")
    assert not (tmp_path / "none").exists()


def test_ten_thousand_characters_are_cut_by_the_tokenizer(call, run, tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.itit.pipeline._warned_of", set())  # it is said once in a process
    status, _, err = call("imagine", run, "a small red circle " * 527, "--out", tmp_path / "drawn")
    assert status == 0
    assert err == "1 of 1 text that was looked at fills all 24 tokens that the model reads: what is longer is cut off\n"
    assert (tmp_path / "drawn/sheet.png").stat().st_size > 0


def test_cycle(call, run, photo, tmp_path, mistaken):
    status, out, err = call("cycle", run, "--text", "a red circle", "--rounds", 2, "--out", tmp_path / "text")
    assert (status, err) == (0, "")
    assert out.startswith("0: a red circle\n1: ")
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == ["001.png", "003.png", "strip.png"]
    call("cycle", run, "--image", photo, "--rounds", 1, "--out", tmp_path / "image")
    assert sorted(path.name for path in (tmp_path / "image").iterdir()) == ["000.png", "002.png", "strip.png"]
    mistaken(call("cycle", run, "--out", tmp_path / "none"), "give one of them")
    mistaken(call("cycle", run, "--text", "a", "--image", photo, "--out", tmp_path / "none"), "give one of them")
    assert not (tmp_path / "none").exists()


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
        ("folder.png", ..., "folder.png"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("g") else "",
)
def test_an_unusable_image(call, run, photo, tmp_path, name, content, told, mistaken):
    file = tmp_path / name
    if content is ...:
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    mistaken(call("caption", run, file), told)
    status, out, err = call("caption", run, file, photo, file)
    assert (status, out.count("\n")) == (1, 1)
    assert out.startswith(f"{photo}: ")
    assert [told in line for line in err.splitlines()] == [True, True]
    if name != "two\nlines.png":
        mistaken(call("cycle", run, "--image", file, "--out", tmp_path / "out"), file, told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["caption", "imagine", "cycle", "encode", "evaluate"])
def test_a_run_that_is_not_there_or_damaged(call, run, photo, tmp_path, command, mistaken):
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
            whole = weights.read_bytes()
            weights.write_bytes(whole[:-1000])
            if (command, part) != ("caption", "text_encoder"):  # which a caption does not need
                mistaken(call(*arguments(run)), run / part)
            weights.write_bytes(whole)
    assert not out.exists()


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_a_table_of_any_format_is_a_source_and_no_image(tmp_path, suffix):
    table = tmp_path / f"t{suffix}"
    table.write_bytes(b"")
    found = find_images([str(table)])
    assert not found.images
    assert str(table) in found.mistakes[0]


def test_arguments_are_looked_at_before_the_libraries_are_imported(run, dual_run, photo, tmp_path):
    """They take four seconds and more."""
    script = (
        "import json, sys\n"
        "from diptych.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['diptych', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit as stopped: print(stopped.code, end=' ')\n"
        "    print(sorted({'torch', 'transformers', 'diffusers', 'datasets'} & {*sys.modules}))"
    )
    out = ["--out", tmp_path / "out"]
    mistakes = (
        ["caption", run, tmp_path / "missing.jpg"],
        ["caption", dual_run, photo],
        ["imagine", run, "photo.jpg", *out],
        ["cycle", run, "--image", tmp_path / "missing.jpg", *out],
        ["search", dual_run, photo, "--index", tmp_path],
        ["search", dual_run, "a dog", "--index", tmp_path / "nowhere"],
        ["classify", dual_run, photo, "--classes", tmp_path / "nowhere.txt"],
        ["embed", dual_run, tmp_path / "nowhere", *out],
        ["evaluate", run, "--data", tmp_path / "nowhere"],
        ["export", run, *out],
    )
    command = [sys.executable, "-c", script, json.dumps(mistakes, default=str)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "2 []\n" * len(mistakes)), found.stderr
    told = found.stderr.splitlines()
    assert len(told) == len(mistakes)
    assert all(line.startswith("diptych: ") for line in told)


# Embed, search, classify, export


SOURCE = ScenesSource(count=12)
SRC = "scenes:?count=12"


@pytest.fixture
def store(call, dual_run, tmp_path):
    assert call("embed", dual_run, SRC, "--out", tmp_path / "store") == (0, f"12 images in {tmp_path}/store\n", "")
    return tmp_path / "store"


@pytest.fixture
def texts(call, dual_run, tmp_path):
    status, out, _ = call("embed", dual_run, SRC, "--texts", "--out", tmp_path / "texts")
    assert (status, out) == (0, f"12 texts in {tmp_path}/texts\n")
    return tmp_path / "texts"


@pytest.fixture
def scene(tmp_path):
    """Item 3 as a file."""
    Image.fromarray(SOURCE.image(3, 16)).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def test_an_image_finds_itself(call, dual_run, store, scene, tmp_path):
    status, out, err = call("search", dual_run, "--index", store, "--image", scene, "--top", 4)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[0] == f"1.000  {SOURCE.key(3)}"
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)


def test_a_text_finds_itself(call, dual_run, texts):
    text = SOURCE.captions(5)[0]
    status, out, err = call("search", dual_run, text, "--index", texts, "--top", 99)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"1.000  {text}"
    assert len(out.splitlines()) == 12


def test_a_sheet_of_the_hits(call, dual_run, store, tmp_path):
    status, out, _ = call("search", dual_run, "a red circle", "--index", store, "--out", tmp_path / "sheet.png")
    assert status == 0
    assert len(out.splitlines()) == 10
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    item = next(i for i in range(12) if out.splitlines()[0].endswith(f"  {SOURCE.key(i)}"))
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:200, :40], (120, 1, 3))  # where the first hit is
    assert (windows[:, 30, 0, :, 0] == SOURCE.image(item, 160)[20:140, 10]).all((1, 2)).any()


def test_the_sheet_shows_what_was_searched_for(dual_run, store, scene):
    index = Index(dual_run, store, device="cpu")
    hits = index.search(scene, top=3)
    (tiles, captions), by_text = tiles_of(index, hits, scene), tiles_of(index, hits, "a red circle")
    assert (len(tiles), len(by_text[0])) == (4, 3)
    np.testing.assert_array_equal(tiles[0], decode(scene, 160))
    assert captions[0] == "searched for: scene.png"


def tiles_of(index, hits, query):
    with patch("diptych.dual.search.contact_sheet", return_value=Image.new("RGB", (1, 1))) as drawn:
        index.sheet(hits, query=query)
    return drawn.call_args.args[0], drawn.call_args.kwargs["captions"]


def test_a_path_is_no_text_to_search_for(call, mistaken, dual_run, store, scene, tmp_path, monkeypatch):
    mistaken(call("search", dual_run, scene, "--index", store), scene, "give an image as --image FILE")
    mistaken(call("search", dual_run, "missing.JPG", "--index", store), "missing.JPG: no such file", "--image FILE")
    monkeypatch.chdir(tmp_path)
    mistaken(call("search", dual_run, "scene.png", "--index", store), "--image FILE")
    assert call("search", dual_run, "what is in scene.png", "--index", store)[0] == 0


def test_approximate_search(call, dual_run, store, scene):
    pytest.importorskip("faiss")
    exact, approximate = (
        call("search", dual_run, "--index", store, "--image", scene, "--method", method)
        for method in ("exact", "approximate")
    )
    assert exact[0] == approximate[0] == 0
    assert exact[1].splitlines()[0] == approximate[1].splitlines()[0]


def test_unreadable_images_are_counted_and_listed(call, dual_run, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(100):
        Image.fromarray(SOURCE.image(number % 12, 16)).save(tmp_path / f"photos/{number:03d}.png")
    (tmp_path / "photos/050.png").write_bytes(b"not an image")
    status, out, _ = call("embed", dual_run, tmp_path / "photos", "--out", tmp_path / "store")
    assert (status, out) == (0, f"99 images in {tmp_path}/store; 1 skipped, see {tmp_path}/store/skipped.jsonl\n")
    assert json.loads((tmp_path / "store/skipped.jsonl").read_text())["key"].endswith("050.png")
    assert len(VectorStore.open(tmp_path / "store")) == 99


def test_classify(call, dual_run, scene, photo, tmp_path):
    (tmp_path / "names.txt").write_text("red circle\n\nblue square\ngreen star\n")
    command = ["classify", dual_run, scene, photo, "--classes", tmp_path / "names.txt"]
    status, out, err = call(*command)
    assert (status, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith(f"{scene}: ")
    assert second.startswith(f"{photo}: ")
    assert first.count("%") == 3
    status, out, _ = call(*command, "--json", "--top", 2)
    record = json.loads(out.splitlines()[0])
    assert record["file"] == str(scene)
    assert [guess["name"] in first for guess in record["guesses"]] == [True, True]
    (tmp_path / "templates.txt").write_text("the {} of all\n")
    assert call(*command, "--templates", tmp_path / "templates.txt")[1] != call(*command)[1]


def test_an_index_of_codes_is_what_search_uses(call, mistaken, dual_run, store, monkeypatch):
    pytest.importorskip("faiss")
    embed = ("embed", dual_run, SRC, "--out", store, "--index", "ivfpq")
    mistaken_call = call(*embed)
    assert mistaken_call[0] == 2
    assert "12 embeddings, too few to learn an ivfpq index from (10,000)" in mistaken_call[2]
    with patch("diptych.dual.search.build_ivfpq", return_value=store / "ivfpq") as build:
        status, out, _ = call(*embed)
    assert (status, out) == (0, f"12 images in {store}\nindex in {store}/ivfpq\n")
    assert build.call_args.args[0].folder == store
    (store / "ivfpq").mkdir()
    with patch("diptych.dual.search.nearest_approximate", wraps=nearest) as searched:
        searched.side_effect = lambda query, store, *, k: nearest(query, store.vectors, k=k)
        assert call("search", dual_run, "a red circle", "--index", store)[0] == 0
        assert searched.call_count == 1
        assert call("search", dual_run, "a red circle", "--index", store, "--method", "exact")[0] == 0
        assert searched.call_count == 1
    mistaken(call(*embed[:-3], "x.parquet", *embed[-2:]), "--index ivfpq: lies in a folder", "x.parquet")
    monkeypatch.setitem(sys.modules, "faiss", None)
    mistaken(call(*embed), "pip install 'diptych[ann]'")


def test_embeddings_as_a_table(call, dual_run, store, photo, tmp_path):
    status, out, _ = call("embed", dual_run, SRC, "--out", tmp_path / "t.parquet")
    assert (status, out) == (0, f"12 images in {tmp_path}/t.parquet\n")
    table, whole = pyarrow.parquet.read_table(tmp_path / "t.parquet"), VectorStore.open(store)
    assert table.column_names == ["key", "items", "vector"]
    assert table["key"].to_pylist() == whole.keys
    assert table["items"].to_pylist() == list(range(12))
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float16), whole.vectors)
    assert json.loads(table.schema.metadata[b"diptych"]) == whole.manifest
    (tmp_path / "photos").mkdir()
    for n in range(101):
        (tmp_path / f"photos/{n:03}.png").write_bytes(photo.read_bytes() if n else b"no image")
    status, out, _ = call("embed", dual_run, tmp_path / "photos", "--out", tmp_path / "t.parquet")
    listed = tmp_path / "t.skipped.jsonl"
    assert (status, out) == (0, f"100 images in {tmp_path}/t.parquet; 1 skipped, see {listed}\n")
    assert json.loads(listed.read_text())["key"] == "000.png"
    assert not list(tmp_path.glob(".t.*"))


def test_searches_that_make_no_sense(call, mistaken, dual_run, store, texts, photo, tmp_path):
    def search(*more):
        return call("search", dual_run, *more, "--index", store)

    mistaken(search(), "search for a text or for an image")
    mistaken(search("a dog", "--image", photo), "search for a text or for an image")
    mistaken(search(" \t"), "an empty text")
    mistaken(search("a dog", "--top", 0), "the best 0")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:100])
    mistaken(search("--image", tmp_path / "cut.png"), tmp_path / "cut.png")
    mistaken(call("search", dual_run, "a", "--index", texts, "--out", tmp_path / "x.png"), texts, "--out")
    mistaken(call("search", tmp_path / "nowhere", "a", "--index", store), "nowhere: no run folder")
    assert not (tmp_path / "x.png").exists()


def test_a_store_that_is_not_there_damaged_or_of_another_model(call, mistaken, dual_run, store, dual_encoder, tmp_path):
    mistaken(call("search", dual_run, "a", "--index", tmp_path / "nowhere"), "nowhere: no such folder")
    with open(store / "vectors.npy", "r+b") as file:
        file.truncate(300)
    mistaken(call("search", dual_run, "a", "--index", store), store, "not a complete store")
    call("embed", dual_run, SRC, "--out", store)
    (dual_run / "model").rename(dual_run / "old")
    mistaken(call("search", dual_run, "a", "--index", store), dual_run, "no finished run")
    bias = dual_encoder.clip.visual_projection.weight
    bias.data += 0.01
    dual_encoder.save_pretrained(dual_run / "model")
    bias.data -= 0.01
    mistaken(call("search", dual_run, "a", "--index", store), store, "made by another model", "diptych embed")


def test_a_source_that_has_changed_gives_no_sheet(call, mistaken, dual_run, photo, tmp_path):
    (tmp_path / "photos").mkdir()
    photo.rename(tmp_path / "photos/one.png")
    call("embed", dual_run, tmp_path / "photos", "--out", tmp_path / "store")
    search = ["search", dual_run, "a", "--index", tmp_path / "store", "--out", tmp_path / "sheet.png"]
    (tmp_path / "photos/one.png").rename(tmp_path / "photos/two.png")
    mistaken(call(*search), "not what it was", "embed it again")
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    mistaken(call(*search), tmp_path / "photos", "does not exist")
    assert not (tmp_path / "sheet.png").exists()
    assert call(*search[:-2])[1].endswith("one.png\n")


def test_what_cannot_be_embedded(call, mistaken, dual_run, tmp_path):
    (tmp_path / "texts.txt").write_text("a red circle\n")
    out = ["--out", tmp_path / "out"]
    mistaken(call("embed", dual_run, tmp_path / "texts.txt", *out), "has no images")
    mistaken(call("embed", dual_run, tmp_path / "nowhere", *out), "nowhere")
    mistaken(call("embed", tmp_path / "nowhere", SRC, *out), "no run folder")
    mistaken(call("embed", dual_run, SRC, "--out", tmp_path), tmp_path, "holds no vectors")
    assert not (tmp_path / "out").exists()


def test_classes_that_cannot_be_told(call, mistaken, dual_run, photo, tmp_path):
    def classify(classes: str, *more):
        (tmp_path / "names.txt").write_text(classes)
        return call("classify", dual_run, photo, "--classes", tmp_path / "names.txt", *more)

    mistaken(classify("\n \n"), "names.txt: is empty")
    twice, once = classify("crane\ncat\ncrane\n", "--json"), classify("crane\ncat\n", "--json")  # as in ImageNet's list
    assert twice == once
    mistaken(classify("dog\n", "--top", 0), "the best 0 classes")
    (tmp_path / "templates.txt").write_text("a photo\n")
    mistaken(classify("dog\n", "--templates", tmp_path / "templates.txt"), "'a photo' has no {}")
    mistaken(call("classify", dual_run, photo), "--classes")
    mistaken(call("classify", dual_run), "no image given")
    mistaken(call("classify", dual_run, photo, "--classes", tmp_path / "nowhere.txt"), "nowhere.txt: does not exist")


def test_a_run_of_another_kind(call, mistaken, run, dual_run, photo, tmp_path):
    (tmp_path / "names.txt").write_text("dog\n")
    mistaken(call("embed", run, SRC, "--out", tmp_path / "out"), run, "itit")
    mistaken(call("classify", run, photo, "--classes", tmp_path / "names.txt"), run, "itit")
    write_config(tmp_path / "uml", recipe="uml-probe", run=uml_probe())
    for part in ("encoder", "head"):
        (tmp_path / "uml" / part).mkdir()
    mistaken(call("classify", tmp_path / "uml", photo, "--classes", tmp_path / "names.txt"), "leave --classes")
    for command in (["caption", dual_run, photo], ["imagine", dual_run, "a", "--out", tmp_path / "out"]):
        mistaken(call(*command), dual_run, "neither captions nor generates images")
    mistaken(
        call("cycle", dual_run, "--text", "a", "--out", tmp_path / "out"),
        dual_run,
        "neither captions nor generates images",
    )
    assert not (tmp_path / "out").exists()


def test_export(call, mistaken, dual_run, run, tmp_path, monkeypatch):
    out = tmp_path / "open_clip"
    assert call("export", dual_run, "--out", out) == (
        0,
        f'open_clip.create_model_and_transforms("local-dir:{out}")\n',
        "",
    )
    assert {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"} <= {f.name for f in out.iterdir()}
    mistaken(call("export", run, "--out", tmp_path / "no"), "holds no dual encoder")
    monkeypatch.setitem(sys.modules, "onnx", None)
    mistaken(call("export", dual_run, "--out", tmp_path / "no", "--format", "onnx"), "pip install 'diptych[onnx]'")
    assert not (tmp_path / "no").exists()


def test_push(call, mistaken, dual_run, run, tmp_path, monkeypatch):
    status, out, err = call("push", dual_run, "--dry-run", "--license", "mit")
    assert (status, err) == (0, "")
    assert "\nlicense: mit\n" in out
    assert 'DualEncoder.from_pretrained("USER/NAME")' in out
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    mistaken(call("push", dual_run), "no repository given")
    mistaken(call("push", dual_run, "user/x"), "not logged in")
    mistaken(call("push", tmp_path / "none", "user/x"), "no run folder")
    (run / "model").rename(run / "gone")
    mistaken(call("push", run, "user/x"), "no finished run")


def test_app_tells_mistakes_before_it_loads_anything(call, run, tmp_path, mistaken, monkeypatch):
    mistaken(call("app"), "no run given", "diptych demo")
    mistaken(call("app", tmp_path), "no run folder")
    mistaken(call("app", run, "--data", "scenes:"), "--out go together")
    mistaken(call("app", run, "--sidecars"), "--data")
    mistaken(call("app", run, "--port", "0", "--token", "short"), "can be guessed")
    mistaken(call("app", run, "--host", "203.0.113.7", "--port", "0"), "203.0.113.7", "cannot be listened on")
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "gradio", None)
    mistaken(call("app", run, "--port", "0"), "pip install 'diptych[app]'")
