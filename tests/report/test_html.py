"""The report is one well-formed file that fetches nothing and runs nothing."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from diptych.report.figures import Panel, curves
from diptych.report.html import (
    Captioned,
    Comparison,
    Example,
    Facts,
    Figures,
    Section,
    Strip,
    Table,
    Text,
    write_report,
)
from diptych.report.sheet import contact_sheet, png

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
        Table(head=["model", EVIL], rows=[[EVIL, 1.0], ["b", None]], caption=EVIL, best={EVIL: "low"}),
        Facts(items={EVIL: EVIL, "n": 12345}, size="large"),
        Comparison([Example(EVIL, [captioned, Captioned(image=LARGE), Captioned(caption=EVIL)])]),
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
    table = Table(
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
        Table(head=["a", "b"], rows=[["x"]]).render()
