import json

import numpy as np
import pytest
from PIL import Image

from diptych.data.scenes.source import ScenesSource
from diptych.data.store import VectorStore
from diptych.run_folder import write_config
from diptych.tokenizers.recipes import vqgan_tiny

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


# What goes wrong


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
    mistaken(classify("dog\ncat\ndog\n"), "names.txt: 'dog' stands there twice")
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
    write_config(tmp_path / "uml", recipe="uml-probe", run=vqgan_tiny())
    mistaken(call("classify", tmp_path / "uml", photo, "--classes", tmp_path / "names.txt"), "leave --classes")
    for command in (["caption", dual_run, photo], ["imagine", dual_run, "a", "--out", tmp_path / "out"]):
        mistaken(call(*command), dual_run, "neither captions nor draws")
    mistaken(call("cycle", dual_run, "--text", "a", "--out", tmp_path / "out"), dual_run, "neither captions nor draws")
    assert not (tmp_path / "out").exists()


def test_export(call, mistaken, dual_run, run, tmp_path):
    out = tmp_path / "open_clip"
    assert call("export", dual_run, "--out", out) == (
        0,
        f'open_clip.create_model_and_transforms("local-dir:{out}")\n',
        "",
    )
    assert {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"} <= {f.name for f in out.iterdir()}
    mistaken(call("export", run, "--out", tmp_path / "no"), "holds no dual encoder")
    assert not (tmp_path / "no").exists()
