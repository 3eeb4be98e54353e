"""The page itself: its tabs, what they ask, and which functions answer. Needs gradio.

Requests to networks wait in one queue for each kind of network (`concurrency_id`), and the page shows their place in
it. Text from users and from networks is shown as HTML by `answers.py`, which escapes it, or as the value of a text box.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI

from diptych.app import answers
from diptych.app.answers import Given, Imagining, MarkedImage, Tab, read_images
from diptych.app.decisions import Offer, Offers, label_confidence
from diptych.app.serve import MAX_FILE_MB, WAITING
from diptych.errors import UserError
from diptych.itit.pipeline import ImagineRequest

_BATCH = 16
"""Largest number of requests that a network answers together."""
_BEAMS = 16
"""Largest number of beams."""
_LONGEST = 1000
"""Largest number of letters of a text."""
_AUDITED = 6
"""Pairs of the Audit tab on one sheet."""
_SECONDS = 5.0
"""Time between two looks at runs that train."""
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
_MONO = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def build(given: Given) -> gr.Blocks:
    """The page with the tabs of what is given."""
    with gr.Blocks(title="Diptych", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML('<h1 class="name">Diptych</h1>', padding=False)
        with gr.Tabs():
            for tab in given.tabs:
                with gr.Tab(tab, render_children=True) as opened:
                    _TABS[tab](given, opened, page)
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return page


def mount(app: FastAPI, page: gr.Blocks) -> FastAPI:
    """``app`` with the page at its root: it serves no other folder and asks no other machine for anything."""
    theme = gr.themes.Default(
        primary_hue="blue",
        font=[gr.themes.Font(name) for name in _FONTS],
        font_mono=[gr.themes.Font(name) for name in _MONO],
    )
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        max_file_size=f"{MAX_FILE_MB}mb",
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme,
        css=_css(),
        head=f"<script>{_read('diptych.app', 'page.js')}</script>",
    )


def _css() -> str:
    """The style of reports, for what the page shows of them alone, and that of the page."""
    return f".shown {{\n{_read('diptych.report', 'style.css')}}}\n" + _read("diptych.app", "page.css")


def _read(package: str, name: str) -> str:
    return (files(package) / name).read_text(encoding="utf-8")


@contextmanager
def _mistakes_told() -> Iterator[None]:
    """Mistakes of the user appear as a message on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None


def _or_note(answer: Callable[[], str]) -> str:
    """An answer in HTML, or in its place what the user can mend."""
    try:
        return answer()
    except UserError as error:
        return answers.note(str(error))


def _hint(html: str) -> gr.HTML:
    """A line that says how something is read or used."""
    return gr.HTML(f'<p class="keys">{html}</p>')


def _choice(names: Sequence[str], label: str = "Run") -> gr.Dropdown:
    """Which run answers; hidden where there is one."""
    return gr.Dropdown(list(names), value=names[0], label=label, visible=len(names) > 1, min_width=260)


def _upload(label: str, *, several: bool = False) -> gr.File:
    """A place to drop images. `gr.Image` would decode them before their size is looked at."""
    return gr.File(
        label=label, file_count="multiple" if several else "single", file_types=["image"], height=170, type="filepath"
    )


def _text(label: str, *, lines: int = 1) -> gr.Textbox:
    return gr.Textbox(label=label, lines=lines, max_lines=lines, max_length=_LONGEST)


def _one(file: str | None) -> list[str] | None:
    return [file] if file else None


def _batched(
    found: Mapping[str, Any], compute: Callable[[Any, list[np.ndarray], Any], list[str]]
) -> Callable[..., Any]:
    """A function for a batch of requests, with a list for each input and for each output.

    ``compute`` answers all images that come with the same network of ``found`` and the same setting.
    """

    def answer(names: list[str], images: list[list[str] | None], settings: list[Any]) -> list[list[str]]:
        keys = list(zip(names, settings, strict=True))
        return [
            answers.together(
                list(zip(keys, images, strict=True)),
                lambda key: found[key[0]].image_size,
                lambda key, pixels: compute(found[key[0]], pixels, key[1]),
            )
        ]

    return answer


def _caption(given: Given, *_: object) -> None:
    found = given.networks("itit")
    usual = min(next(iter(found.values())).text_generation.beams, _BEAMS)
    answer = _batched(found, lambda network, pixels, beams: answers.captions(network, pixels, beams=int(beams)))
    with gr.Row():
        with gr.Column(scale=2):
            run = _choice(list(found))
            images = _upload("Images", several=True)
            beams = gr.Slider(
                1, _BEAMS, value=usual, step=1, label="Beams", info="More beams: more candidates, more time."
            )
            button = gr.Button("Caption", variant="primary")
            _hint("The likeliest caption comes first. Scores are log-probabilities, made fair for length: at most 0.")
        with gr.Column(scale=3):
            shown = gr.HTML(elem_classes="shown", elem_id="captions")
    gr.on(
        [button.click, images.upload],
        answer,
        [run, images, beams],
        shown,
        batch=True,
        max_batch_size=_BATCH,
        concurrency_id="itit",
        api_name="caption",
    )


def _imagine(given: Given, *_: object) -> None:
    found = given.networks("itit")
    images = {name: Imagining(network, most=_BATCH) for name, network in found.items()}
    usual = next(iter(found.values())).image_generation

    def imagine(
        name: str, text: str, seed: int, guidance: float, steps: int, current: MarkedImage | None
    ) -> Iterator[tuple[Any, Any]]:
        """With an image, only its marked part is generated anew."""
        known = None if current is None else (current.step.tokens, current.marked)
        request = ImagineRequest(text=text, seed=int(seed or 0), known=known)
        config = replace(found[name].image_generation, guidance=guidance, steps=int(steps))
        with _mistakes_told(), closing(images[name].steps(request, config)) as made:
            for step in made:
                # Gradio notices between two answers that a user has left, so those who wait get an empty one.
                current = None if step is None else MarkedImage(step=step)
                yield (gr.skip(), gr.skip()) if current is None else (current.shown(), current)

    def imagine_all(name: str, text: str, seed: int, guidance: float, steps: int) -> Iterator[tuple[Any, Any]]:
        yield from imagine(name, text, seed, guidance, steps, None)

    def imagine_anew(
        name: str, text: str, seed: int, guidance: float, steps: int, current: MarkedImage | None
    ) -> Iterator[tuple[Any, Any]]:
        with _mistakes_told():
            if current is None or not current.corners:
                raise UserError("nothing is marked: click on two corners of the part to generate anew")
        yield from imagine(name, text, seed, guidance, steps, current)

    def touch(current: MarkedImage | None, event: gr.SelectData) -> tuple[Any, MarkedImage | None]:
        if current is None:
            return None, None
        current = current.touched(int(event.index[0]), int(event.index[1]))
        return current.shown(), current

    def begin(name: str, file: str | None) -> tuple[Any, MarkedImage]:
        with _mistakes_told():
            [image] = read_images(_one(file), found[name].image_size)
        current = MarkedImage.of(found[name], image)
        return current.shown(), current

    with gr.Row():
        with gr.Column(scale=2):
            run = _choice(list(found))
            text = _text("Text", lines=3)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
            guidance = gr.Slider(0, 10, value=usual.guidance, step=0.1, label="Guidance")
            steps = gr.Slider(1, 64, value=usual.steps, step=1, label="Steps")
            button = gr.Button("Imagine", variant="primary")
            anew = gr.Button("Generate the marked part anew")
            start = gr.UploadButton("Start from an image of yours", file_types=["image"], type="filepath")
        with gr.Column(scale=3):
            image = gr.Image(
                label="Image", show_label=False, format="png", interactive=False, buttons=["download"]
            )  # its label would lie on the image
            _hint("Click on two corners of the image to mark a part of it.")
    current = gr.State(None)
    inputs, outputs = [run, text, seed, guidance, steps], [image, current]
    asked = {"concurrency_id": "imagine", "concurrency_limit": _BATCH, "show_progress_on": button}
    gr.on([button.click, text.submit], imagine_all, inputs, outputs, api_name="imagine", **asked)
    anew.click(imagine_anew, [*inputs, current], outputs, api_name=False, **asked)
    start.upload(begin, [run, start], outputs, api_name=False, concurrency_id="itit")
    image.select(touch, current, outputs, api_name=False, concurrency_limit=None, show_progress="hidden")


def _cycle(given: Given, *_: object) -> None:
    found = given.networks("itit")

    def answer(name: str, text: str, file: str | None, rounds: int, seed: int) -> str:
        return _or_note(lambda: answers.cycle(found[name], text, _one(file), rounds=int(rounds), seed=int(seed or 0)))

    with gr.Row():
        with gr.Column():
            run = _choice(list(found))
            text = _text("Text to start from", lines=2)
            with gr.Row():
                rounds = gr.Slider(1, 8, value=3, step=1, label="Rounds")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
        image = _upload("Or image to start from")
    button = gr.Button("Cycle", variant="primary")
    shown = gr.HTML(elem_classes="shown", elem_id="cycle")
    gr.on(
        [button.click, text.submit],
        answer,
        [run, text, image, rounds, seed],
        shown,
        concurrency_id="itit",
        api_name="cycle",
    )


def _search(given: Given, *_: object) -> None:
    def answer(name: str, text: str, file: str | None, top: int) -> str:
        return _or_note(lambda: answers.hits(given.indexes[name], text, _one(file), top=int(top)))

    with gr.Row():
        with gr.Column():
            index = _choice(list(given.indexes), "Index")
            text = _text("Text to search for")
            top = gr.Slider(1, 60, value=12, step=1, label="Hits")
        image = _upload("Or image to search for")
    button = gr.Button("Search", variant="primary")
    shown = gr.HTML(elem_classes="shown", elem_id="hits")
    _hint("The number of a hit is its cosine with what is searched for: 1 is as near as can be.")
    gr.on(
        [button.click, text.submit],
        answer,
        [index, text, image, top],
        shown,
        concurrency_id="dual",
        api_name="search",
    )


def _classify(given: Given, *_: object) -> None:
    found = given.networks("classifier", "dual")
    dual = given.networks("dual")
    answer = _batched(found, lambda network, pixels, listed: answers.classes(network, pixels, names=listed))
    with gr.Row():
        with gr.Column(scale=2):
            run = _choice(list(found))
            images = _upload("Images", several=True)
            listed = gr.Textbox(
                label="Classes, one a line", lines=4, max_length=20_000, visible=next(iter(found)) in dual
            )
            button = gr.Button("Classify", variant="primary")
        with gr.Column(scale=3):
            shown = gr.HTML(elem_classes="shown", elem_id="classes")
    run.change(lambda name: gr.Textbox(visible=name in dual), run, listed, api_name=False)
    gr.on(
        [button.click, images.upload],
        answer,
        [run, images, listed],
        shown,
        batch=True,
        max_batch_size=_BATCH,
        concurrency_id="classify",
        api_name="classify",
    )


@dataclass
class _Desk:
    """The image that one user of the Label tab has now, and the earlier ones."""

    offer: Offer | None = None
    earlier: list[Offer] = field(default_factory=list)


def _label(given: Given, opened: gr.Tab, page: gr.Blocks) -> None:
    labels = given.labels
    assert labels is not None
    name, diptych = next(iter(given.networks("itit").items()))
    offers = Offers(labels, diptych, confidence=label_confidence(Path(name), diptych))

    def show(desk: _Desk, caption: str | None = None) -> tuple[str, str, str, _Desk]:
        counts = labels.counts()
        told = ", ".join(f"{counts[name]:,} {name}" for name in ("accepted", "edited", "rejected", "left"))
        if desk.offer is None:
            return answers.note("No image is left that has neither a caption nor a decision."), "", told, desk
        text = desk.offer.candidates[0].text if caption is None else caption
        return answers.offered(desk.offer, labels.source), text, told, desk

    def following(desk: _Desk, request: gr.Request) -> tuple[str, str, str, _Desk]:
        earlier = [*desk.earlier, desk.offer][-100:] if desk.offer else desk.earlier
        return show(_Desk(offers.take(str(request.session_hash)), earlier))

    def decide(desk: _Desk, caption: str | None, request: gr.Request) -> tuple[str, str, str, _Desk]:
        if desk.offer is None:
            return show(desk)
        with _mistakes_told():
            labels.decide(desk.offer.item, caption, proposed=desk.offer.candidates[0].text)
        return following(desk, request)

    def refuse(desk: _Desk, request: gr.Request) -> tuple[str, str, str, _Desk]:
        return decide(desk, None, request)

    def begin(desk: _Desk, request: gr.Request) -> tuple[str, str, str, _Desk]:
        if desk.offer is None:
            return show(_Desk(offers.take(str(request.session_hash)), desk.earlier))
        return show(desk)

    def skip(desk: _Desk, request: gr.Request) -> tuple[str, str, str, _Desk]:
        if desk.offer is not None:
            offers.put_back(desk.offer)
        return following(desk, request)

    def leave(request: gr.Request) -> None:
        offers.release(str(request.session_hash))

    def undo(desk: _Desk) -> tuple[str, str, str, _Desk]:
        if not desk.earlier:
            return show(desk)
        *earlier, offer = desk.earlier
        return show(_Desk(offer, earlier), labels.caption_of(offer.item) or None)

    image = gr.HTML(elem_classes="shown", elem_id="label-image")
    caption = gr.Textbox(label="Caption", max_length=_LONGEST, elem_id="label-caption")
    with gr.Row():
        accept = gr.Button("Accept", variant="primary", elem_id="label-accept")
        reject = gr.Button("Reject", elem_id="label-reject")
        skipped = gr.Button("Skip", elem_id="label-skip")
        undone = gr.Button("Undo", elem_id="label-undo")
    counted = gr.HTML(elem_id="label-counts")
    _hint(
        "<kbd>a</kbd> accept, <kbd>e</kbd> edit, then <kbd>Enter</kbd> accepts and <kbd>Esc</kbd> "
        "leaves the text, <kbd>1</kbd>–<kbd>4</kbd> take a candidate, <kbd>r</kbd> reject: the image gets no caption, "
        f"<kbd>s</kbd> skip, <kbd>u</kbd> undo. Saved at once to <code>{escape(str(labels.file))}</code>"
        f"{' and beside the images' if labels.sidecars else ''}."
    )
    desk = gr.State(_Desk())
    outputs = [image, caption, counted, desk]
    usual: dict[str, Any] = {"api_name": False, "show_progress": "minimal", "concurrency_id": "itit"}
    opened.select(begin, desk, outputs, **usual)
    gr.on([accept.click, caption.submit], decide, [desk, caption], outputs, **usual)
    reject.click(refuse, desk, outputs, **usual)
    skipped.click(skip, desk, outputs, **usual)
    undone.click(undo, desk, outputs, **usual)
    page.unload(leave)


def _audit(given: Given, opened: gr.Tab, _: object) -> None:
    ranking = given.ranking
    assert ranking is not None
    found = given.networks("dual", "itit")

    def show(first: int) -> list[Any]:
        """A sheet that begins with finding ``first``, and what stands beside it."""
        findings = ranking.shown
        count = len(findings)
        first = max(0, min(first, (count - 1) // _AUDITED * _AUDITED))
        some = findings[first : first + _AUDITED]
        cards, boxes = [], []
        for place in range(_AUDITED):
            there = place < len(some)
            html = answers.finding(some[place], ranking.source) if there else ""
            cards.append(gr.HTML(html, visible=there))
            boxes.append(gr.Checkbox(value=some[place].kept if there else False, visible=there))
        kept = sum(each.kept for each in findings)
        told = f"{first + 1:,} to {first + len(some):,} of {count:,} captions; {kept:,} are kept" if count else ""
        return [*cards, *boxes, told, first]

    def rank(name: str, worst: float, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008 (gradio's way)
        with _mistakes_told():
            ranking.rank(
                found[name], worst=worst / 100, advance=lambda what, done, total: progress((done, total), desc=what)
            )
        return show(0)

    def decide(place: int) -> Callable[[int, bool], str]:
        def decided(first: int, keep: bool) -> str:
            with _mistakes_told():
                ranking.decide(ranking.shown[first + place], keep)
            return show(first)[-2]

        return decided

    with gr.Row():
        run = _choice(list(found))
        worst = gr.Slider(0, 50, value=10, step=1, label="Percent of the captions to drop, those that fit worst")
    button = gr.Button("Rank", variant="primary")
    told = gr.HTML(elem_id="audit-told")
    cards, boxes = [], []
    for place in range(_AUDITED):
        with gr.Row(elem_classes="audited"):
            with gr.Column(scale=6):
                cards.append(gr.HTML(elem_classes="shown", visible=False))
            with gr.Column(scale=1, min_width=90):
                boxes.append(gr.Checkbox(label="Keep", visible=False, elem_id=f"keep-{place}"))
    with gr.Row():
        before, after = gr.Button("Before"), gr.Button("After")
    _hint(f"Saved at once; <code>?keep={escape(str(ranking.keep_file))}</code> is what is kept.")
    first = gr.State(0)
    outputs = [*cards, *boxes, told, first]
    usual: dict[str, Any] = {"api_name": False, "show_progress": "hidden", "concurrency_limit": None}
    button.click(rank, [run, worst], outputs, api_name=False, concurrency_id="audit", show_progress_on=told)
    opened.select(show, first, outputs, **usual)
    before.click(lambda at: show(at - _AUDITED), first, outputs, **usual)
    after.click(lambda at: show(at + _AUDITED), first, outputs, **usual)
    for place, box in enumerate(boxes):
        box.input(decide(place), [first, box], told, **usual)


def _train(given: Given, opened: gr.Tab, _: object) -> None:
    folders = {run.name: run.folder for run in given.runs}

    @lru_cache(maxsize=32)
    def rendered(name: str, state: tuple[tuple[int, int], ...]) -> str:
        """Anew only where a file has changed: curves take a second, and many users look at one run."""
        return answers.training(folders[name])

    def look(name: str) -> str:
        run = folders[name]
        logs = [run / "metrics.jsonl", *sorted(run.glob("stages/*/metrics.jsonl")), run / "samples"]
        with _mistakes_told():
            return rendered(name, tuple((s.st_size, s.st_mtime_ns) for s in (f.stat() for f in logs if f.exists())))

    run = _choice(list(folders))
    shown = gr.HTML(elem_classes="shown", elem_id="training")
    timer = gr.Timer(_SECONDS, active=False)
    usual: dict[str, Any] = {"api_name": False, "concurrency_id": "train"}
    gr.on([opened.select, run.change], look, run, shown, **usual)
    timer.tick(look, run, shown, show_progress="hidden", **usual)
    opened.select(lambda: gr.Timer(active=True), None, timer, api_name=False)


_TABS: dict[Tab, Callable[[Given, gr.Tab, gr.Blocks], None]] = {
    "Caption": _caption,
    "Imagine": _imagine,
    "Cycle": _cycle,
    "Label": _label,
    "Search": _search,
    "Classify": _classify,
    "Audit": _audit,
    "Train": _train,
}
