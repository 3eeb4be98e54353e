"""Which tabs runs give, the limits on what users send, and what the page answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.app import answers
from diptych.app.answers import AT_ONCE, SIDE, Imagining, MarkedImage, open_given, read_images
from diptych.app.decisions import Offer
from diptych.data.audit import Finding
from diptych.data.sources import open_source
from diptych.dual.search import Index, embed_run
from diptych.errors import UserError
from diptych.itit.pipeline import Caption, Diptych, ImagineRequest

ITIT = ["Caption", "Imagine", "Cycle"]


def test_tabs_are_those_of_the_runs(itit_run, dual_run, photos, tmp_path):
    index = tmp_path / "index"
    embed_run(dual_run, str(photos), side="images", out=index, workers=1, device="cpu")

    def tabs(*runs, **more):
        return open_given(runs, device="cpu", **more).tabs

    assert tabs(itit_run, itit_run) == ITIT
    assert tabs(dual_run) == ["Classify"]
    assert tabs(dual_run, indexes=[index]) == ["Search", "Classify"]
    data = {"data": str(photos), "out": tmp_path / "out"}
    assert tabs(itit_run, **data) == [*ITIT, "Label"]
    (photos / "0.txt").write_text("a dog")
    assert tabs(itit_run, **data) == [*ITIT, "Label", "Audit"]
    for number in range(1, 4):
        (photos / f"{number}.txt").write_text("a dog")
    assert tabs(itit_run, dual_run, **data) == [*ITIT, "Classify", "Audit"]
    (itit_run / "metrics.jsonl").touch()
    assert tabs(itit_run) == [*ITIT, "Train"]
    (itit_run / "model").rename(itit_run / "hidden")
    assert tabs(itit_run) == ["Train"]


def test_what_cannot_be_opened_is_told(itit_run, dual_run, photos, tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        open_given([tmp_path], device="cpu")
    embed_run(dual_run, str(photos), side="images", out=tmp_path / "index", workers=1, device="cpu")
    with pytest.raises(UserError, match="with the run that made it"):
        open_given([itit_run], indexes=[tmp_path / "index"], device="cpu")


def test_images_are_what_a_network_sees(photos):
    [image] = read_images([str(photos / "0.png")], 32)
    assert image.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [(None, "drop one"), ([], "drop one"), (["x.png"] * (AT_ONCE + 1), f"at most {AT_ONCE}"), (["/no.png"], "no.png")],
)
def test_what_cannot_be_taken_is_told_in_a_line(files, message):
    with pytest.raises(UserError, match=message) as caught:
        read_images(files, 32)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded(bomb):
    with pytest.raises(UserError, match=r"^bomb\.png: is 20000 x 20000 pixels, over the limit of 50,000,000"):
        read_images([str(bomb)], 32)


BAD = "<script>alert(1)</script>"


@pytest.fixture
def diptych(itit_run) -> Diptych:
    return Diptych.from_pretrained(itit_run, device="cpu")


def test_requests_with_the_same_key_are_answered_together(photos, bomb):
    files = [str(photos / f"{number}.png") for number in range(4)]
    calls = []

    def answer(key, images):
        calls.append((key, len(images)))
        if key == "wrong":
            raise UserError("no such thing")
        return [f"<{image.mean():.3f}>" for image in images]

    requests = [("a", files[:1]), ("a", [str(bomb)]), ("a", files[1:]), ("a", None), ("b", files[:2]), ("wrong", files)]
    found = answers.together(requests, lambda key: 16, answer)
    assert calls == [("a", 4), ("b", 2), ("wrong", 4)]
    assert [answer.count("<") for answer in (found[0], found[2], found[4])] == [1, 3, 2]
    assert found[4].startswith(found[0])
    assert "over the limit of" in found[1]
    assert "drop one" in found[3]
    assert found[5] == '<p class="note">no such thing</p>'


def test_captions_come_with_the_candidates(diptych):
    images = list(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    cards = answers.captions(diptych, images, beams=3)
    for card, found in zip(cards, diptych.candidates(images, beams=3), strict=True):
        assert card.count('class="score"') == len(found)
        assert f"{found[0].score:.2f}" in card


def test_scripts_are_text_wherever_they_come_from(diptych, photos, monkeypatch):
    bad = Caption(text=BAD, score=-1.0)
    monkeypatch.setattr(Diptych, "candidates", lambda self, images, beams: [[bad, bad] for _ in images])
    (photos / "0.txt").write_text(BAD)
    source = open_source(str(photos))
    shown = [
        *answers.captions(diptych, [source.image(0, 32)], beams=2),
        answers.note(BAD),
        answers.cycle(diptych, BAD, None, rounds=1, seed=0),
        answers.finding(Finding(item=0, key=BAD, caption=source.captions(0)[0], reasons=[BAD]), source),
    ]
    for html in shown:
        assert "<script" not in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_a_cycle_starts_from_one_thing(diptych, photos):
    image = [str(photos / "0.png")]
    assert answers.cycle(diptych, "", image, rounds=2, seed=0).count("<li>") == 5
    assert answers.cycle(diptych, "a ring", None, rounds=2, seed=0).count("<li>") == 5
    for text, files in (("", None), (" ", None), ("a ring", image)):
        with pytest.raises(UserError, match="one of them"):
            answers.cycle(diptych, text, files, rounds=1, seed=0)


def test_a_search_shows_images_or_texts(dual_run, dual_encoder, photos, tmp_path):
    (photos / "0.txt").write_text("a dog")
    embed_run(dual_run, str(photos), side="images", out=tmp_path / "images", workers=1, device="cpu")
    embed_run(dual_run, str(photos), side="texts", out=tmp_path / "texts", workers=1, device="cpu")
    images, texts = (Index(dual_run, tmp_path / side, device="cpu") for side in ("images", "texts"))
    found = answers.hits(images, "", [str(photos / "2.png")], top=3)
    assert found.count("<img") == 3
    assert found.index("2.png") < found.index("png", found.index("2.png") + 5)
    assert "a dog" in answers.hits(texts, "dog", None, top=3)
    for text, files in (("", None), ("dog", [str(photos / "2.png")])):
        with pytest.raises(UserError):
            answers.hits(images, text, files, top=3)


def test_a_dual_encoder_needs_names_of_classes(dual_encoder):
    images = [np.zeros((16, 16, 3), np.uint8)]
    [card] = answers.classes(dual_encoder, images, names=f"red ring\n\n{BAD}\nred ring")
    assert card.count("%</span>") == 2
    assert "<script" not in card
    with pytest.raises(UserError, match="two or more"):
        answers.classes(dual_encoder, images, names="red ring\nred ring")


def test_a_running_run_is_shown_from_its_folder(itit_run):
    assert "logged nothing yet" in answers.training(itit_run)
    lines = [{"step": step, "loss": 1 / step, "loss/t2i": 1.0, "seconds": 1.0} for step in range(1, 5)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (itit_run / "metrics.jsonl").write_text(text + '{"step": 5, "lo')  # a line that is being written
    assert answers.training(itit_run).count("<img") == 2


# Imagine


def test_what_is_hidden_is_pale_and_the_end_is_the_image(diptych):
    steps = [MarkedImage(step=step) for step in diptych.imagine_steps("a red ring")]
    assert all(image.shown().shape == (SIDE, SIDE, 3) for image in steps)
    assert np.array_equal(steps[-1].shown()[:: SIDE // 32, :: SIDE // 32], steps[-1].step.image)
    assert np.abs(steps[0].shown().astype(int) - (226, 230, 236)).max() <= 0.2 * 236 + 1


def last(steps):
    return [step for step in steps if step is not None][-1]


def together(imagining, requests, config):
    """All steps of requests that wait behind another image."""
    blocking = imagining.steps(ImagineRequest(text="a blue cross"), replace(config, steps=60))
    assert next(blocking) is not None
    open_ = {number: imagining.steps(request, config) for number, request in enumerate(requests)}
    seen = {number: [next(steps)] for number, steps in open_.items()}
    assert all(steps == [None] for steps in seen.values())
    assert last(blocking).hidden.sum() == 0
    while open_:
        for number, steps in list(open_.items()):
            try:
                seen[number].append(next(steps))
            except StopIteration:
                del open_[number]
    return [[step for step in steps if step is not None] for steps in seen.values()]


@pytest.fixture
def calls(monkeypatch):
    """How many images were generated together, each time."""
    calls = []
    monkeypatch.setattr(answers, "_PAUSE", 0.0)
    generate = Diptych.imagine_together

    def counted(self, requests, **more):
        calls.append(len(requests))
        return generate(self, requests, **more)

    monkeypatch.setattr(Diptych, "imagine_together", counted)
    return calls


def test_images_that_wait_are_generated_together_and_come_out_as_alone(diptych, calls):
    config = diptych.image_generation
    requests = [ImagineRequest(text=text, seed=seed) for text, seed in (("a ring", 1), ("a dog", 2), ("a dog", 3))]
    seen = together(Imagining(diptych, most=16), requests, config)
    assert calls == [1, 3]
    for request, steps in zip(requests, seen, strict=True):
        alone = list(diptych.imagine_steps(request.text, seed=request.seed))
        assert len(steps) == len(alone)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(steps, alone, strict=True))
        assert np.array_equal(steps[-1].image, alone[-1].image)
    assert not torch.equal(seen[1][-1].tokens, seen[2][-1].tokens)


def test_marked_parts_of_one_size_are_generated_together(diptych, calls):
    [*_, image] = diptych.imagine_steps("a ring", seed=5)
    calls.clear()
    hidden = [torch.zeros_like(image.tokens, dtype=torch.bool) for _ in range(3)]
    hidden[0][0, :2], hidden[1][1, 1:3], hidden[2][:2] = True, True, True
    requests = [ImagineRequest(text="a dog", known=(image.tokens, cells)) for cells in hidden]
    seen = together(Imagining(diptych, most=16), requests, diptych.image_generation)
    assert calls == [1, 2, 1]
    for request, steps in zip(requests, seen, strict=True):
        [*_, alone] = diptych.imagine_steps("a dog", known=request.known)
        assert torch.equal(steps[-1].tokens, alone.tokens)
        assert torch.equal(alone.tokens[~request.known[1]], image.tokens[~request.known[1]])


def test_users_who_left_are_forgotten(diptych, calls):
    imagining, config = Imagining(diptych, most=2), diptych.image_generation
    first, *others = [imagining.steps(ImagineRequest(text="a dog", seed=seed), config) for seed in range(5)]
    next(first)
    for each in others:
        assert next(each) is None
    others[0].close()
    first.close()  # nobody looks at what is generated
    assert next(others[1]) is not None
    assert calls == [1, 2]
    assert torch.equal(last(others[2]).tokens, last(diptych.imagine_steps("a dog", seed=3)).tokens)
    others[1].close()
    others[3].close()
    assert next(imagining.steps(ImagineRequest(text="a cat"), config)) is not None


def test_many_users_see_fewer_rounds_and_all_see_the_image(diptych, calls):
    requests = [ImagineRequest(text="a dog", seed=seed) for seed in range(8)]
    seen = together(Imagining(diptych, most=8), requests, replace(diptych.image_generation, steps=6))
    assert all(steps[-1].hidden.sum() == 0 for steps in seen)
    assert all(2 <= len(steps) < 6 for steps in seen)


def test_what_goes_wrong_is_told_to_all_and_the_next_are_answered(diptych, calls):
    imagining, config = Imagining(diptych, most=16), diptych.image_generation
    blocking = imagining.steps(ImagineRequest(text="a cat"), config)
    wrong = [imagining.steps(ImagineRequest(text="a dog"), replace(config, steps=0)) for _ in range(2)]
    assert [next(steps) is None for steps in (blocking, *wrong)] == [False, True, True]
    blocking.close()
    for steps in wrong:
        with pytest.raises(UserError, match="at least one is needed"):
            next(steps)
    with pytest.raises(UserError, match="no text"):
        next(imagining.steps(ImagineRequest(text=" "), config))
    assert last(imagining.steps(ImagineRequest(text="a dog"), config)).hidden.sum() == 0


def test_two_clicks_mark_a_part_and_a_third_begins_anew(diptych):
    image = MarkedImage.of(diptych, np.zeros((32, 32, 3), np.uint8))
    side = diptych.token_side
    cell = SIDE // side
    assert not image.marked.any()
    first = image.touched(3 * cell + 1, cell + 1)
    assert first.marked.nonzero().tolist() == [[1, 3]]
    both = first.touched(2 * cell, 0)
    assert both.marked.nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    changed = (both.shown() != image.shown()).any(-1)
    assert changed[: 2 * cell, 2 * cell : 4 * cell].all()
    assert changed.sum() == 4 * cell**2
    assert both.touched(SIDE, SIDE).marked.nonzero().tolist() == [[side - 1, side - 1]]
    assert torch.equal(image.step.tokens, diptych.encode(np.zeros((1, 32, 32, 3), np.uint8)).tokens_BN.view(side, side))


def test_an_offer_tells_the_confidence_of_its_first_caption(photos):
    source = open_source(str(photos))
    made = Offer(item=0, name="0.png", candidates=[Caption(text="a dog", score=-1.0)], confidence=0.831)
    assert "confidence of the first caption 83%" in answers.offered(made, source)
    assert "confidence" not in answers.offered(replace(made, confidence=None), source)
    assert "data:image/" in answers.offered(made, source)
    (photos / "0.png").write_bytes(b"")
    assert "0.png: is empty" in answers.offered(made, source)
