"""A report is one well-formed file that fetches nothing and runs nothing; the report of a run."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from diptych.report.figures import Panel, curves
from diptych.report.html import (
    Captioned,
    Example,
    Facts,
    Figures,
    ReportTable,
    Section,
    SideBySide,
    Strip,
    Text,
    _curves,
    closing_line,
    outcome,
    score_line,
    write_report,
    write_run_report,
)
from diptych.report.sheet import contact_sheet, png, save_png
from diptych.run_folder import write_config
from diptych.tokenizers.recipes import vqgan_tiny

EVIL = "<script>alert('x')</script> & \"quotes\" $title"
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
LARGE = np.zeros((900, 600, 3), np.uint8)
VOID = {"meta", "img", "path", "link", "br"}


class Outline(HTMLParser):
    """Checks that tags nest; gathers them, their attributes and the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def sources(self):
        return [value for _, attributes in self.tags for key, value in attributes.items() if key in ("src", "href")]


@pytest.fixture
def page(tmp_path):
    svg = curves({EVIL: [{"step": 1, "loss": 2.0}]}, panels=[Panel(title=EVIL, keys=["loss"])])
    captioned = Captioned(image=IMAGE, caption=EVIL, label=EVIL)
    blocks = [
        Text(f"{EVIL}\n\nsecond `code`"),
        Text(EVIL, kind="code"),
        Text(EVIL, kind="note"),
        ReportTable(head=["model", EVIL], rows=[[EVIL, 1.0], ["b", None]], caption=EVIL, best={EVIL: "low"}),
        Facts(items={EVIL: EVIL, "n": 12345}, size="large"),
        SideBySide([Example(EVIL, [captioned, Captioned(image=LARGE), Captioned(caption=EVIL)])]),
        Strip([EVIL, IMAGE, EVIL]),
        Figures(images=[*svg, png(contact_sheet([IMAGE]))], caption=EVIL),
    ]
    sections = [Section(EVIL, blocks), Section("Two", []), Section("Three", [])]
    return write_report(tmp_path / "report.html", sections, title=EVIL, lead=EVIL, footer=EVIL).read_text("utf-8")


def test_is_well_formed_and_escaped(page):
    outline = Outline(page)
    names = [tag for tag, _ in outline.tags]
    assert "script" not in names
    assert not any(key.startswith("on") for _, attributes in outline.tags for key in attributes)
    assert "".join(outline.words).count("<script>") >= 15  # as words, they are all there
    assert EVIL in {attributes.get("alt") for _, attributes in outline.tags}


def test_nothing_is_fetched(page):
    assert all(source.startswith(("data:image/", "#")) for source in Outline(page).sources())
    assert not re.search(r"@import|url\(", page)


def test_links_lead_to_sections(page):
    outline = Outline(page)
    anchors = {attributes["id"] for tag, attributes in outline.tags if tag == "section"}
    assert {source.removeprefix("#") for source in outline.sources() if source.startswith("#")} == anchors
    assert len(anchors) == 3


def test_images_are_lossless_when_tiny_and_small_when_large(page):
    images = [attributes for tag, attributes in Outline(page).tags if tag == "img"]
    tiny = [image for image in images if image.get("width") == "32"]
    assert tiny
    assert all(image["src"].startswith("data:image/png") for image in tiny)
    (large,) = (image for image in images if image["src"].startswith("data:image/jpeg"))
    assert (large["width"], large["height"]) == ("341", "512")


def test_table_marks_the_best_and_aligns_numbers():
    table = ReportTable(
        head=["model", "high", "low", "words"],
        rows=[["a", 0.25, 3, "x"], ["b", 0.5, 12000, "y"], ["c", None, 3, "z"]],
        best={"high": "high", "low": "low"},
        digits={"high": 1},
    ).render()
    assert re.findall(r"<b>(.*?)</b>", table) == ["3", "0.5", "3"]
    assert "<td>x</td>" in table
    assert '<td class="number">–</td>' in table
    assert '<td class="number">12\u202f000</td>' in table


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 cells"):
        ReportTable(head=["a", "b"], rows=[["x"]]).render()


@pytest.fixture
def run(tmp_path):
    write_config(tmp_path / "run", recipe="vqgan-tiny", run=vqgan_tiny())
    return tmp_path / "run"


def write_metrics(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_report_of_whatever_is_there(run):
    """Nothing has been trained yet; then a stage; then the run itself."""
    write_run_report(run)
    assert ">Settings</h2>" in (run / "report.html").read_text()
    write_metrics(run / "stages/text_encoder", {"step": 1, "loss": 3.0, "seconds": 0.1})
    write_run_report(run, state="step 1 of 9")
    page = (run / "report.html").read_text()
    assert ">Stage: text encoder</h2>" in page
    assert "run: step 1 of 9" in page
    write_metrics(run, {"step": 1, "loss": 3.0, "loss/pixel": 1.0}, {"step": 1, "valid/psnr": 20.0})
    save_png(run / "samples/step-00000001.png", np.zeros((4, 4, 3), np.uint8))
    write_run_report(run)
    page = (run / "report.html").read_text()
    for title in ("Samples", "Curves", "Validation", "Stage: text encoder", "Settings"):
        assert f">{title}</h2>" in page
    assert "stage.train.steps = 2000" in page
    assert "The newest samples: step 1." in page
    write_run_report(run, samples=[Section("Mine", [Text("of my own")])])
    page = (run / "report.html").read_text()
    assert "The newest samples" not in page
    assert "of my own" in page


def test_the_last_line_has_score_report_and_next_command(run):
    write_metrics(run, {"step": 1, "loss": 3.0}, {"step": 1, "valid/cider": 7.0}, {"step": 2, "loss": 2.0})
    score = outcome(run, step=1, select="cider", source="dev.tar")
    assert score == "best after step 1, cider 7 on dev.tar"
    line = closing_line(run, "itit", score=score)
    assert line == f"{run}: {score}; report: {run}/report.html; next: diptych evaluate {run} --data TEST"
    assert outcome(run) == "loss 2, nothing was scored"


def test_scores_in_one_line():
    numbers = {"valid/rouge_l": 0.2, "valid/cider": 12.0, "valid/mean_r1": 0.05, "lr": 1.0}
    assert score_line(numbers) == "cider 12, mean_r1 5.0 %"
    assert score_line(numbers, best="rouge_l") == "rouge_l 20.0 %, cider 12, mean_r1 5.0 %"
    assert score_line({"lr": 1.0}) == ""


def test_measures_stand_among_the_curves_of_training():
    curves, validation = _curves("run", [{"step": 1, "loss": 3.0, "measure/psnr": 9.0}, {"step": 1, "valid/psnr": 2.0}])
    assert [curves.title, validation.title] == ["Curves", "Validation"]
    assert len(curves.blocks[0].images) == 2  # the loss and the measure
    assert len(validation.blocks[0].images) == 1
