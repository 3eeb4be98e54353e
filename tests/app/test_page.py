"""The page in a real browser. Screenshots are left in the folder of the environment variable SCREENSHOTS."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.dual.search import embed_run
from diptych.encoders import ScratchConfig, scratch_encoder
from diptych.train.config import TrainConfig
from diptych.uml.recipes import uml_probe
from diptych.uml.training import UmlData

pytestmark = pytest.mark.browser
BAD = "<script>alert(1)</script> ${7*7} {{value}}"


@pytest.fixture
def serve():
    """Starts `diptych app` with some arguments; gives the process and the address that it prints."""
    started = []

    def serve(*arguments: object) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "diptych", "app", *map(str, arguments), "--port", "0", "--device", "cpu"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        for line in process.stdout:
            if line.startswith("open "):
                return process, line.split()[1]
        raise AssertionError(f"ended with status {process.wait()}")

    yield serve
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        yield chromium
        chromium.close()


class Visit:
    """A window with the page, which notes what it asks of other machines and what goes wrong."""

    def __init__(self, browser, address):
        self.address, self.elsewhere, self.wrong = address.partition("?")[0], [], []
        self.page = browser.new_page(viewport={"width": 1200, "height": 950})
        self.page.set_default_timeout(60_000)
        self.page.on("request", self._asked)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.goto(address)
        self.page.get_by_role("tab").first.wait_for()

    def _asked(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def tab(self, name):
        self.page.get_by_role("tab", name=name, exact=True).click()

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").first.click()

    def send(self, *files):
        self.page.locator(".tabitem:visible input[type=file]").first.set_input_files([str(file) for file in files])

    def shot(self, name):
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.wait_for_timeout(500)
            self.page.screenshot(path=f"{folder}/{name}.png", full_page=True)

    def shown(self, selector):
        found = self.page.locator(selector).first
        found.wait_for()
        return found.inner_text()

    def until(self, check):
        """Waits until a function of the page is true."""
        for _ in range(600):
            if check():
                return
            self.page.wait_for_timeout(100)
        raise AssertionError("nothing happened for a minute")


@pytest.mark.timeout(900)
def test_every_tab_answers(itit_run, dual_run, photos, bomb, tmp_path, serve, browser):
    embed_run(dual_run, str(photos), side="images", out=tmp_path / "index", workers=1, device="cpu")
    (photos / "0.txt").write_text(BAD)
    (photos / "1.txt").write_text("a dog")
    lines = [{"step": step, "loss": 1 / step, "seconds": 1.0} for step in range(1, 30)]
    (itit_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [itit_run, dual_run, "--index", tmp_path / "index", "--data", photos, "--out", tmp_path / "out"]
    visit = Visit(browser, serve(*runs)[1])
    page = visit.page
    tabs = [tab.inner_text() for tab in page.get_by_role("tab").all()]
    assert tabs == ["Caption", "Imagine", "Cycle", "Label", "Search", "Classify", "Audit", "Train"]

    visit.tab("Caption")
    visit.send(photos / "0.png", photos / "1.png")
    visit.until(lambda: page.locator("#captions .found").count() == 2)
    visit.shot("caption")
    page.reload()
    visit.tab("Caption")
    visit.send(bomb)
    assert "over the limit of 50,000,000 pixels" in visit.shown("#captions .note")
    visit.shot("bomb")

    visit.tab("Imagine")
    page.get_by_label("Text", exact=True).fill("a red ring")
    visit.press("Imagine")
    image = page.locator(".tabitem:visible img[src*='/file=']").first
    image.wait_for()
    visit.until(lambda: page.locator(".tabitem:visible .progress-text, .tabitem:visible .eta-bar").count() == 0)
    page.wait_for_timeout(1000)
    visit.shot("imagine")
    for x, y in ((0.1, 0.3), (0.6, 0.9)):
        box, before = image.bounding_box(), image.get_attribute("src")
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
        visit.until(lambda before=before: image.get_attribute("src") != before)
    visit.shot("marked")
    before = image.get_attribute("src")
    visit.press("Generate the marked part anew")
    visit.until(lambda: image.get_attribute("src") != before)

    visit.tab("Cycle")
    page.get_by_label("Text to start from").fill(BAD)
    visit.press("Cycle")
    assert visit.shown("#cycle .card") == BAD
    visit.shot("cycle")

    visit.tab("Search")
    page.get_by_label("Text to search for").fill("a dog")
    visit.press("Search")
    visit.until(lambda: page.locator("#hits img").count() == 4)
    visit.shot("search")

    visit.tab("Classify")
    page.get_by_label("Classes, one a line").fill(f"ring\n{BAD}")
    visit.send(photos / "0.png")
    assert BAD in visit.shown("#classes .found")
    visit.shot("classify")

    visit.tab("Audit")
    visit.press("Rank")
    page.locator("#keep-0 input").wait_for()
    assert BAD in visit.shown(".tabitem:visible")
    was = page.locator("#keep-0 input").is_checked()
    page.locator("#keep-0 input").click()
    visit.until((tmp_path / "out/audit.jsonl").is_file)
    assert json.loads((tmp_path / "out/audit.jsonl").read_text())["keep"] is not was
    visit.shot("audit")

    visit.tab("Train")
    page.locator("#training img").first.wait_for()
    curves = page.locator("#training img").first.get_attribute("src")
    with open(itit_run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 30, "loss": 5.0, "seconds": 1.0}) + "\n")
    visit.until(lambda: page.locator("#training img").first.get_attribute("src") != curves)
    visit.shot("train")
    assert visit.elsewhere == []
    assert visit.wrong == []


@pytest.mark.timeout(300)
def test_a_classifier_names_the_classes_that_it_learned(itit_run, photos, tmp_path, serve, browser):
    for number, image in enumerate(sorted(photos.iterdir()) * 3):
        folder = tmp_path / "images" / ("ring", "<b>square")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / f"{number}.png")
    run = uml_probe()
    (tmp_path / "texts").mkdir()
    for name in ("ring", "<b>square"):
        (tmp_path / "texts" / f"{name}.txt").write_text("a red ring\n")
    run.data = UmlData(images=str(tmp_path / "images"), texts=str(tmp_path / "texts"), valid_share=0.25)
    scratch = ScratchConfig(image_size=16, patch=4, width=24, depth=1, heads=2)
    scratch_encoder(scratch, seed=0).save_pretrained(tmp_path / "encoder")
    run.encoder, run.text_encoder = str(tmp_path / "encoder"), str(itit_run)
    run.train = TrainConfig(
        steps=2, batch_size=4, eval_every=2, checkpoint_every=2, workers=0, quiet=True, device="cpu", tensorboard=False
    )
    run.fit(tmp_path / "run", recipe="uml-probe")
    visit = Visit(browser, serve(tmp_path / "run")[1])
    visit.tab("Classify")
    visit.send(photos / "0.png")
    found = visit.shown("#classes .found")
    assert "ring" in found
    assert "<b>square" in found
    visit.shot("classifier")
    assert visit.elsewhere == []
    assert visit.wrong == []


@pytest.mark.timeout(900)
def test_labels_survive_reloads_and_kills(itit_run, photos, tmp_path, serve, browser):
    for number in range(4, 12):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    file = tmp_path / "out/labels.jsonl"
    arguments = [itit_run, "--data", photos, "--out", tmp_path / "out", "--sidecars"]

    def saved():
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    process, address = serve(*arguments)
    visit = Visit(browser, address)

    def decide(*keys):
        """Press keys; the decision must be on disk when the next image is shown."""
        before, count = visit.shown("#label-image .key"), len(saved())
        for key in keys:
            type_ = visit.page.keyboard.insert_text if " " in key else visit.page.keyboard.press
            type_(key)
        visit.until(lambda: visit.shown("#label-image .key") != before)
        assert len(saved()) == count + 1
        return saved()[-1]

    visit.tab("Label")
    assert decide("e", "Control+a", "a cat of two colours", "Enter")["caption"] == "a cat of two colours"
    assert decide("r")["decision"] == "rejected"
    shown = visit.shown("#label-image .key")
    visit.page.keyboard.press("s")
    visit.until(lambda: visit.shown("#label-image .key") != shown)
    visit.shot("label")
    visit.page.reload()
    visit.tab("Label")
    assert decide("e", "Control+a", "after the reload", "Enter")["decision"] == "edited"
    process.kill()
    process.wait()
    assert [row["caption"] for row in saved()] == ["a cat of two colours", "", "after the reload"]
    texts = sorted(text.read_text() for text in photos.glob("*.txt"))
    assert texts == ["a cat of two colours\n", "after the reload\n"]
    visit = Visit(browser, serve(*arguments)[1])
    visit.tab("Label")
    # Captions beside the images are captions of the source by now.
    visit.shown("#label-image .key")
    visit.until(lambda: "9 left" in visit.shown("#label-counts"))
    assert decide("e", "Control+a", "after the kill", "Enter")["caption"] == "after the kill"
    assert visit.elsewhere == []


def _status(url, *, data=None, headers=None):
    try:
        return urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers or {}), timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.timeout(600)
def test_nothing_leaves_and_nothing_large_comes_in(itit_run, photos, tmp_path, serve, browser):
    address = serve(itit_run, "--host", "127.0.0.1", "--token", "open-sesame-1")[1]
    root = address.partition("?")[0]
    assert _status(root) == 401
    assert _status(address + "-") == 401
    with_token = {"Authorization": "Bearer open-sesame-1"}
    assert _status(root, headers=with_token) == 200
    for path in (photos / "0.png", "/etc/passwd", Path(__file__), itit_run / "config.json", "../../etc/passwd"):
        assert _status(f"{root}gradio_api/file={path}", headers=with_token) in (403, 404)
    boundary = {"Content-Type": "multipart/form-data; boundary=x", **with_token}

    def form(size):
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        return head + b"0" * size + b"\r\n--x--\r\n"

    upload = f"{root}gradio_api/upload"
    assert _status(upload, data=form(1000), headers=boundary) == 200
    assert _status(upload, data=form(21 * 2**20), headers=boundary) == 413
    # Refused by its header, so the connection may be closed while the rest is on its way.
    with suppress(urllib.error.URLError, ConnectionError):
        assert _status(upload, data=form(200 * 2**20), headers=boundary) == 413
    visit = Visit(browser, address)
    assert "token" not in visit.page.url
    visit.tab("Caption")
    time.sleep(0.5)
    visit.send(photos / "0.png")
    visit.until(lambda: visit.page.locator("#captions .found").count() == 1)
    assert visit.elsewhere == []
