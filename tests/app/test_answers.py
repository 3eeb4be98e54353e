"""What the page answers: all text is escaped, and a mistake of one user costs no other."""

import pytest

from diptych.app import answers
from diptych.app.answers import captions, note
from diptych.itit.pipeline import Caption, Diptych


@pytest.fixture
def diptych(itit_run) -> Diptych:
    return Diptych.from_pretrained(itit_run, device="cpu")


def test_requests_are_captioned_together_and_answered_apart(diptych, photos, bomb, monkeypatch):
    files = [str(photos / f"{number}.png") for number in range(4)]
    calls = []
    candidates = Diptych.candidates
    monkeypatch.setattr(
        Diptych,
        "candidates",
        lambda self, images, beams: calls.append(len(images)) or candidates(self, images, beams=beams),
    )
    requests = [(files[:1], 2), ([str(bomb)], 2), (files[1:], 2), (None, 2), (files[:2], 3)]
    found = captions(diptych, requests)
    assert calls == [4, 2]
    assert [answer.count("<article") for answer in found] == [1, 0, 3, 0, 2]
    assert "over the limit of" in found[1]
    assert "drop one" in found[3]
    assert found[2].startswith(captions(diptych, [(files[1:2], 2)])[0])


def test_scripts_in_captions_are_text(diptych, photos, monkeypatch):
    bad = Caption(text="<script>alert(1)</script>", score=-1.0)
    monkeypatch.setattr(Diptych, "candidates", lambda self, images, beams: [[bad] for _ in images])
    [answer] = answers.captions(diptych, [([str(photos / "0.png")], 2)])
    assert "<script>" not in answer
    assert answer.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 1


def test_notes_are_escaped():
    assert note("<b>") == '<p class="note">&lt;b&gt;</p>'
