"""The runs that the page is made for, and what it answers with them: HTML, in which all text is escaped and images are
data URIs, and the images of its Imagine tab.

Shapes: R rows of the grid of an image's tokens.
"""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from diptych.app.decisions import Labels, Offer, Ranking
from diptych.data.audit import Finding
from diptych.data.pixels import channels_first
from diptych.data.sources import Source, open_finite
from diptych.data.sources.columns import Columns
from diptych.data.sources.decode import ImageLimits, UnreadableImage, decode
from diptych.data.sources.text import clean
from diptych.dual.model import DualEncoder, open_dual
from diptych.dual.search import Index, SearchResult, ZeroShotClassifier
from diptych.errors import UserError
from diptych.itit.generation import Canvas, ImageGenerationConfig
from diptych.itit.pipeline import Caption, Diptych, ImagineRequest, ImagineStep
from diptych.nn.inference import Device, Prediction
from diptych.report.html import Captioned, Strip, image_tag, inline, run_sections
from diptych.report.sheet import scale
from diptych.run_folder import PARTS, Kind, kind_of
from diptych.uml.classifier import Classifier

Tab = Literal["Caption", "Imagine", "Cycle", "Label", "Search", "Classify", "Audit", "Train"]
LIMITS = ImageLimits(max_pixels=50_000_000)
"""Limits on the images that users send: fewer pixels than in a source, because several images are decoded at once."""
AT_ONCE = 64
"""Largest number of images in one request."""
Key = TypeVar("Key", bound=Hashable)
_OFFERED, _AUDITED = 384, 128
"""Side in pixels of an image to label, and of an image of an audit; networks may see them far smaller."""
Files = Sequence[str] | None
"""Paths of uploads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenRun:
    """A run folder, finished or not."""

    folder: Path
    kind: Kind
    finished: bool
    network: Any = None
    """:class:`Diptych`, :class:`DualEncoder` or :class:`Classifier` of a finished run of these kinds."""

    @property
    def name(self) -> str:
        """What the page calls it."""
        return str(self.folder)


def open_runs(folders: Sequence[Path], *, device: Device) -> list[GivenRun]:
    """All runs with their networks. Raises UserError for a folder that is no run, and for a damaged one."""
    found = []
    for folder in dict.fromkeys(folders):
        kind = kind_of(folder)
        finished = all((folder / part).is_dir() for part in PARTS[kind])
        network = _open(folder, kind, device) if finished else None
        found.append(GivenRun(folder=folder, kind=kind, finished=finished, network=network))
    return found


def _open(folder: Path, kind: Kind, device: Device) -> Any:
    if kind == "itit":
        return Diptych.from_pretrained(folder, device=device)
    if kind == "dual":
        return open_dual(folder, device=device)
    if kind == "classifier":
        return Classifier.from_pretrained(folder, device=device)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """All that a page is made for."""

    runs: Sequence[GivenRun]
    indexes: Mapping[str, Index]
    """The indexes that Search looks through, by the names of their folders."""
    labels: Labels | None = None
    ranking: Ranking | None = None

    def networks(self, *kinds: Kind) -> dict[str, Any]:
        """The networks of finished runs of some kinds, by the names of the runs."""
        return {run.name: run.network for run in self.runs if run.finished and run.kind in kinds}

    @property
    def tabs(self) -> list[Tab]:
        """The tabs for which there is a run, and data where they need it."""
        itit, dual = bool(self.networks("itit")), bool(self.networks("dual"))
        wanted: dict[Tab, bool] = {
            "Caption": itit,
            "Imagine": itit,
            "Cycle": itit,
            "Label": itit and self.labels is not None,
            "Search": bool(self.indexes),
            "Classify": dual or bool(self.networks("classifier")),
            "Audit": (itit or dual) and self.ranking is not None,
            "Train": any((run.folder / "metrics.jsonl").is_file() or not run.finished for run in self.runs),
        }
        return [tab for tab, there in wanted.items() if there]


def open_given(
    folders: Sequence[Path],
    *,
    indexes: Sequence[Path] = (),
    data: str | None = None,
    out: Path | None = None,
    sidecars: bool = False,
    device: Device = "auto",
) -> Given:
    """Open the runs, the indexes of :func:`embed_run`, and the data to label and to audit.

    Decisions on the data go to the folder ``out``. Raises UserError for what cannot be opened, for an index that no run
    has made, and where nothing is left to show.
    """
    runs = open_runs(folders, device=device)
    found = {str(folder): _open_index(folder, runs) for folder in indexes}
    labels = ranking = None
    if data is not None:
        assert out is not None
        source = open_finite(data, Columns())
        labels = Labels(source, file=out / "labels.jsonl", sidecars=sidecars)
        ranking = Ranking(source, out=out) if source.has_captions else None
    given = Given(runs=runs, indexes=found, labels=labels if labels and labels.open else None, ranking=ranking)
    if not given.tabs:
        raise UserError(
            f"{', '.join(map(str, folders))}: nothing a page can show; give runs of itit, dual or uml recipes, and "
            "--index for the search of dual runs"
        )
    return given


def _open_index(folder: Path, runs: Sequence[GivenRun]) -> Index:
    refused = f"{folder}: an index is searched with the run that made it: give a dual run too"
    for run in runs:
        if run.finished and run.kind == "dual":
            try:
                return Index(run.folder, folder, encoder=run.network)
            except UserError as error:
                refused = str(error)
    raise UserError(refused)


def read_images(files: Sequence[str] | None, size: int) -> list[UInt8[np.ndarray, "S S 3"]]:
    """Images that a user sent, as a network sees them.

    Raises UserError, one line, where there are none or too many, and for one that cannot be read.
    """
    if not files:
        raise UserError("no image: drop one, or choose a file")
    if len(files) > AT_ONCE:
        raise UserError(f"{len(files)} images: at most {AT_ONCE} at once; `diptych caption` takes whole folders")
    return [decode(Path(file), size, name=os.path.basename(file), limits=LIMITS) for file in files]


def note(text: str) -> str:
    """A line to the user."""
    return f'<p class="note">{inline(text)}</p>'


def together(
    requests: Sequence[tuple[Key, Files]],
    size: Callable[[Key], int],
    answer: Callable[[Key, list[np.ndarray]], Iterable[str]],
) -> list[str]:
    """Answers to requests, of which those with the same key are answered together.

    ``size`` says in pixels which images a key takes, and ``answer`` gives an answer to each of its images. A request
    that cannot be answered gets the reason, and the others are answered.
    """
    answers = [""] * len(requests)
    images: dict[Key, list[np.ndarray]] = defaultdict(list)
    places: dict[Key, list[int]] = defaultdict(list)
    for number, (key, files) in enumerate(requests):
        try:
            read = read_images(files, size(key))
        except UserError as error:
            answers[number] = note(str(error))
            continue
        images[key] += read
        places[key] += [number] * len(read)
    for key, pixels in images.items():
        try:
            for number, found in zip(places[key], answer(key, pixels), strict=True):
                answers[number] += found
        except UserError as error:
            for number in places[key]:
                answers[number] = note(str(error))
    return answers


def captions(diptych: Diptych, images: list[np.ndarray], *, beams: int) -> list[str]:
    """A card for each image, with the candidates of the beam search and their scores."""
    found = diptych.candidates(images, beams=beams)
    return [_captioned(image, best) for image, best in zip(images, found, strict=True)]


def _captioned(image: np.ndarray, found: Sequence[Caption]) -> str:
    if not found:
        return _card(image, "No caption was found.", [])
    best, *others = (_scored(each.text, f"{each.score:.2f}") for each in found)
    return _card(image, best, others)


def classes(network: Classifier | DualEncoder, images: list[np.ndarray], *, names: str = "", top: int = 5) -> list[str]:
    """A card for each image, with its most probable classes; a dual encoder takes their names, one a line.

    Raises UserError for a dual encoder without two names.
    """
    classifier: Classifier | ZeroShotClassifier
    if isinstance(network, DualEncoder):
        listed = [text for line in names.split("\n") if (text := clean(line))]
        if len(set(listed)) < 2:
            raise UserError("a dual encoder knows no classes of its own: name two or more, one a line")
        classifier = ZeroShotClassifier(network, list(dict.fromkeys(listed)))
    else:
        classifier = network
    found = classifier.predictions(channels_first(np.stack(images)), top=top)
    return [_classified(image, guesses) for image, guesses in zip(images, found, strict=True)]


def _classified(image: np.ndarray, guesses: Sequence[Prediction]) -> str:
    best, *others = (_scored(guess.name, f"{guess.probability:.1%}", share=guess.probability) for guess in guesses)
    return _card(image, best, others)


def hits(index: Index, text: str, files: Files, *, top: int) -> str:
    """The items of an index that are nearest to a text or to an image. Raises UserError unless one of them is given."""
    query: str | np.ndarray = text
    if files:
        if text.strip():
            raise UserError("a text and an image: search for one of them")
        [query] = read_images(files[:1], index.encoder.image_size)
    found = index.search(query, top=top)
    if not index.holds_images:
        rows = (_scored(hit.key, f"{hit.score:.3f}") for hit in found)
        return '<ol class="texts">' + "".join(f"<li>{row}</li>" for row in rows) + "</ol>"
    return f'<div class="grid">{"".join(_hits(found, index.images(found)))}</div>'


def _hits(found: Sequence[SearchResult], images: Sequence[np.ndarray]) -> list[str]:
    return [
        Captioned(image=image, label=f"{hit.score:.3f}", caption=hit.key).render()
        for hit, image in zip(found, images, strict=True)
    ]


def cycle(diptych: Diptych, text: str, files: Files, *, rounds: int, seed: int) -> str:
    """The rounds of a cycle side by side. Raises UserError unless either a text or an image is given."""
    if files and text.strip():
        raise UserError("a text and an image: a cycle starts from one of them")
    if files:
        [image] = read_images(files[:1], diptych.image_size)
        steps = diptych.cycle(image=image, rounds=rounds, seed=seed)
    elif text.strip():
        steps = diptych.cycle(text=text, rounds=rounds, seed=seed)
    else:
        raise UserError("a cycle starts from a text or from an image: give one of them")
    return Strip([step.shown for step in steps]).render()


def training(run: Path) -> str:
    """How far a run is: its samples, curves and scores so far, as in its report."""
    sections = run_sections(run)
    if not sections:
        return note(f"{run}: has logged nothing yet")
    return "".join(section.render(f"training-{number}") for number, section in enumerate(sections))


def offered(offer: Offer, source: Source) -> str:
    """An image to label, with the numbered candidates for its caption; the page's keys read their texts."""
    rows = "".join(
        f"<li><span><b>{number}</b> <span data-caption>{escape(each.text)}</span></span>"
        f'<span class="score">{"" if each.score is None else f"{each.score:.2f}"}</span></li>'
        for number, each in enumerate(offer.candidates, start=1)
    )
    image = _image_of(source, offer.item, size=_OFFERED)
    sure = "" if offer.confidence is None else f"; confidence of the first caption {offer.confidence:.0%}"
    return f'<p class="key">{escape(offer.name)}{sure}</p><article class="found">{image}<ol>{rows}</ol></article>'


def finding(found: Finding, source: Source) -> str:
    """A pair of an audit: its image and caption, how it ranks, and what speaks against it."""
    image = _image_of(source, found.item, size=_AUDITED)
    rank = "" if found.rank is None else f"fits better than {found.rank:.0%} of the captions"
    reasons = "; ".join([rank, *found.reasons] if rank else found.reasons)
    caption = escape(found.caption) or "no caption"
    words = (
        f'<p class="key">{escape(found.key)}</p><p class="best">{caption}</p><p class="reasons">{escape(reasons)}</p>'
    )
    return f'<article class="found">{image}<div>{words}</div></article>'


def _image_of(source: Source, item: int, *, size: int) -> str:
    """The image of an item, or why it cannot be read."""
    try:
        return image_tag(source.image(item, size), alt="")
    except UnreadableImage as error:
        return f'<p class="card">{escape(str(error))}</p>'


def _card(image: np.ndarray, best: str, others: Sequence[str]) -> str:
    rows = "".join(f"<li>{other}</li>" for other in others)
    tag = image_tag(image, alt="")
    return f'<article class="found">{tag}<div><p class="best">{best}</p><ol>{rows}</ol></div></article>'


def _scored(text: str, score: str, *, share: float | None = None) -> str:
    """A text and its score; with ``share``, from 0 to 1, a bar behind the text."""
    bar = "" if share is None else f' class="bar" style="--share: {share:.1%}"'
    return f'<span{bar}>{escape(text)}</span><span class="score">{score}</span>'


# The Imagine tab

SIDE = 512
"""Side in pixels at which images are shown."""
_SEEN = 4
"""Number of images of one network for which every round is shown."""
_PAUSE = 0.2
"""Seconds between two looks of a user who waits for others."""
_HIDDEN, _MARKED = (226, 230, 236), (59, 130, 246)
"""Colours that lie over what is hidden, and over what is marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedImage:
    """An image with its tokens, and the cells of their grid at the corners of the marked part."""

    step: ImagineStep
    corners: tuple[tuple[int, int], ...] = ()
    """None, one or two (row, column)."""

    @classmethod
    def of(cls, diptych: Diptych, image: np.ndarray) -> "MarkedImage":
        """A square image as its tokens give it, with no part marked."""
        tokens_BN = diptych.encode(image[None]).tokens_BN
        seen = diptych.tokenizer.decode(tokens_BN)[0].permute(1, 2, 0).cpu().numpy()
        tokens = tokens_BN[0].view(diptych.token_side, -1).cpu()
        return cls(step=ImagineStep(image=seen, tokens=tokens, hidden=torch.zeros_like(tokens, dtype=torch.bool)))

    def touched(self, x: int, y: int) -> "MarkedImage":
        """After a click on the shown image: a first corner, the second one, or a new first one."""
        side, shown = len(self.step.tokens), len(self.shown())
        cell = (min(y * side // shown, side - 1), min(x * side // shown, side - 1))
        return replace(self, corners=(*self.corners, cell) if len(self.corners) == 1 else (cell,))

    @property
    def marked(self) -> Bool[Tensor, "R R"]:
        """The cells between the corners, those of the corners among them."""
        cells = torch.zeros_like(self.step.tokens, dtype=torch.bool)
        if self.corners:
            rows, columns = zip(*self.corners, strict=True)
            cells[min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = True
        return cells

    def shown(self) -> UInt8[np.ndarray, "H W 3"]:
        """The image about ``SIDE`` pixels wide: what is hidden is pale, and what is marked is tinted."""
        image = scale(self.step.image, side=SIDE)
        for cells, colour, weight in ((self.step.hidden, _HIDDEN, 0.8), (self.marked, _MARKED, 0.45)):
            if cells.any():
                over = Image.fromarray(cells.numpy().astype(np.uint8) * round(255 * weight))
                image.paste(colour, mask=over.resize(image.size, Image.Resampling.NEAREST))
        return np.asarray(image)


@dataclass(slots=True, eq=False)
class _Wanted:
    """An image that a user waits for."""

    request: ImagineRequest
    config: ImageGenerationConfig
    row: int = 0
    newest: Canvas | None = None
    """What the user has not seen yet."""
    over: bool = False
    """No other canvas follows."""
    error: Exception | None = None

    @property
    def settings(self) -> Hashable:
        """Images with equal settings come out the same together as alone."""
        known = self.request.known
        return *astuple(self.config), None if known is None else int(known[1].sum())


class Imagining:
    """The images that users wait for from one network. Those that wait with equal settings are generated together.

    Whoever wants to see more of an image advances all that are generated with it, so there is no other thread, and
    generation stops when nobody looks any more. What a user has not fetched when newer rounds are there is left out.
    """

    def __init__(self, diptych: Diptych, *, most: int) -> None:
        """At most ``most`` images are generated together."""
        self.diptych, self.most = diptych, most
        self._lock = threading.Lock()
        self._waiting: list[_Wanted] = []
        self._going: list[_Wanted] = []
        self._rounds: Iterator[Canvas] | None = None

    def steps(self, request: ImagineRequest, config: ImageGenerationConfig) -> Generator[ImagineStep | None]:
        """The image as it appears, and None from time to time while others are before it.

        Raises UserError for an empty text. Whoever closes this iterator is forgotten.
        """
        if not request.text.strip():
            raise UserError("no text: say what the image is to show")
        wanted = _Wanted(request, config)
        with self._lock:
            self._waiting.append(wanted)
        try:
            while not wanted.over:
                with self._lock:
                    step = self._look(wanted)
                if step is None:
                    time.sleep(_PAUSE)
                yield step
        finally:
            with self._lock:
                self._forget(wanted)

    def _look(self, wanted: _Wanted) -> ImagineStep | None:
        """What is new of an image; whatever is generated goes on if there is nothing."""
        if wanted.newest is None:
            # Making an image visible takes about as long as a round of it does, so many users see fewer of them.
            for _ in range(max(1, len(self._going) // _SEEN)):
                self._advance()
        if wanted.error is not None:
            raise wanted.error
        canvas, wanted.newest = wanted.newest, None
        if canvas is None:
            return None
        wanted.over = canvas.progress == 1
        return self.diptych.imagine_step(canvas, wanted.row)

    def _advance(self) -> None:
        """One round of what is generated, or the first one of what has waited longest and all with its settings."""
        if self._rounds is None and self._waiting:
            first = self._waiting[0].settings
            self._going = [each for each in self._waiting if each.settings == first][: self.most]
            self._waiting = [each for each in self._waiting if each not in self._going]
            for row, each in enumerate(self._going):
                each.row = row
            requests = [each.request for each in self._going]
            self._rounds = self.diptych.imagine_together(requests, config=self._going[0].config)
        if self._rounds is None:
            return
        try:
            canvas = next(self._rounds)
        except Exception as error:
            for each in self._going:
                each.error = error
            self._stop()
            return
        for each in self._going:
            each.newest = canvas
        if canvas.progress == 1:
            self._stop()

    def _forget(self, wanted: _Wanted) -> None:
        for some in (self._waiting, self._going):
            if wanted in some:
                some.remove(wanted)
        if not self._going:
            self._stop()

    def _stop(self) -> None:
        self._going, self._rounds = [], None
