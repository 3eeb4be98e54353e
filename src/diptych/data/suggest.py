"""Which images to caption next: uncertain ones that stand for many others and are unlike those captioned already.

The features of images, and how uncertain a run is of each, come from `assess_images` of `itit/` and `dual/`.

Shapes: N images without a caption, M images with one, F width of the features, B images of a block.
"""

import csv
import heapq
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from diptych.data.pixels import SkippedItems, read_image
from diptych.data.sources import Source
from diptych.errors import UserError
from diptych.io import write_bytes
from diptych.report.sheet import contact_sheet, save_png

SHARE, TIMES = 0.2, 5
"""Only the most uncertain images are suggested: this share of all, or this many times the count if that is more."""
_ROWS = 512
_ON_SHEET = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessedImages:
    """The readable images of a source with their features and, by a run, how uncertain it is of each."""

    items_N: Int[np.ndarray, "N"]
    features_NF: Float[np.ndarray, "N F"]
    uncertainty_N: Float[np.ndarray, "N"] | None = None
    """On any scale, more is more uncertain; None where nothing is known of it."""
    drafts: Sequence[str] | None = None
    """The run's own captions."""

    def __len__(self) -> int:
        return len(self.items_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """An image to caption."""

    item: int
    key: str
    draft: str
    """The run's own caption; empty where it makes none."""
    uncertainty: float | None
    """Share of the images that the run is less uncertain of, 0 to 1."""
    distance: float | None
    """One minus the cosine to the nearest image that has a caption; None where there is none."""


def suggest(
    source: Source, images: AssessedImages, captioned_MF: Float[np.ndarray, "M F"], *, count: int
) -> list[Suggestion]:
    """The ``count`` of ``images``, which have no captions, to caption next, best first (:func:`choose_images`)."""
    chosen = choose_images(images.features_NF, captioned_MF, uncertainty_N=images.uncertainty_N, count=count)
    return [
        Suggestion(
            item=int(images.items_N[row]),
            key=source.key(int(images.items_N[row])),
            draft=images.drafts[row] if images.drafts else "",
            uncertainty=None if chosen.rank_N is None else float(chosen.rank_N[row]),
            distance=float(1 - chosen.near_N[row]) if len(captioned_MF) else None,
        )
        for row in chosen.rows
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenImages:
    """The images to caption next, and by what they were chosen."""

    rows: list[int]
    """Rows of the chosen images, best first."""
    near_N: Float[np.ndarray, "N"]
    """Cosine of each image to the nearest captioned one."""
    rank_N: Float[np.ndarray, "N"] | None
    """Share of the images that each is more uncertain than; None where no uncertainty is known."""


def choose_images(
    features_NF: Float[np.ndarray, "N F"],
    captioned_MF: Float[np.ndarray, "M F"],
    *,
    uncertainty_N: Float[np.ndarray, "N"] | None,
    count: int,
) -> ChosenImages:
    """Choose ``count`` images to caption next.

    Only the most uncertain fifth of the images can be chosen. Of these, each choice is the image that brings all images
    nearest to an image that is chosen or has a caption (:func:`facility_location`), where an image counts by its rank
    in uncertainty. So outliers and copies of one another are left out, which uncertainty alone would choose.
    """
    images = len(features_NF)
    pool, weight_N, rank_N = np.arange(images), np.ones(images), None
    if uncertainty_N is not None:
        order = np.argsort(-uncertainty_N, kind="stable")
        pool = order[: max(round(SHARE * images), TIMES * count)]
        rank_N = np.empty(images)
        rank_N[order] = 1 - np.arange(1, images + 1) / images
        weight_N = rank_N + 0.5 / images
    features_NF, captioned_MF = _centred(features_NF, captioned_MF)
    near_N = _nearest(features_NF, captioned_MF)
    rows = facility_location(features_NF, near_N, pool, weight_N=weight_N, count=count)
    return ChosenImages(rows=rows, near_N=near_N, rank_N=rank_N)


def facility_location(
    features_NF: Float[np.ndarray, "N F"],
    near_N: Float[np.ndarray, "N"],
    pool: Int[np.ndarray, "P"],
    *,
    weight_N: Float[np.ndarray, "N"],
    count: int,
) -> list[int]:
    """Rows of ``pool`` that, chosen one by one, most raise the weighted sum of the cosines to the nearest choice.

    The sum is over all images, with ``weight_N``. ``features_NF`` have length one; ``near_N`` is the cosine to the
    nearest image that counts as chosen already. Cosines below zero count as zero. The sum is submodular, so a gain once
    computed bounds the later ones, and few are computed anew for each choice (Minoux, "Accelerated greedy algorithms
    for maximizing submodular set functions", 1978). What the greedy choice reaches is at least 63 % of the best
    possible gain (Nemhauser et al., 1978).
    """
    near_N, weight_N = np.maximum(near_N, 0), weight_N.astype(np.float32)
    heap: list[tuple[float, int, int]] = []
    for start in range(0, len(pool), _ROWS):
        rows = pool[start : start + _ROWS]
        gain_B = np.maximum(features_NF[rows] @ features_NF.T - near_N, 0) @ weight_N
        heap += [(-float(gain), start + place, 0) for place, gain in enumerate(gain_B)]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and len(chosen) < count:
        bound, place, known = heapq.heappop(heap)
        cosine_N = features_NF @ features_NF[pool[place]]
        if known < len(chosen):  # computed before the latest choice
            gain = float(np.maximum(cosine_N - near_N, 0) @ weight_N)
            heapq.heappush(heap, (max(-gain, bound), place, len(chosen)))
            continue
        chosen.append(int(pool[place]))
        near_N = np.maximum(near_N, cosine_N)
    return chosen


def _centred(features_NF: np.ndarray, captioned_MF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the mean of all taken off, and of length one."""
    mean_F = np.concatenate([features_NF, captioned_MF]).mean(0)
    units = [each - mean_F for each in (features_NF, captioned_MF)]
    units = [each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in units]
    return units[0].astype(np.float32), units[1].astype(np.float32)


def _nearest(features_NF: np.ndarray, captioned_MF: np.ndarray) -> np.ndarray:
    """Cosine of each to the nearest of the captioned ones; zero where there are none."""
    if not len(captioned_MF):
        return np.zeros(len(features_NF), np.float32)
    blocks = [features_NF[start : start + _ROWS] for start in range(0, len(features_NF), _ROWS)]
    return np.concatenate([(block @ captioned_MF.T).max(1) for block in blocks])


FORMATS = (".csv", ".jsonl")


def check_format(out: Path) -> None:
    """Raise UserError for a file whose name does not say its format, and for one that exists, maybe with captions."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{out}: give a name that ends in {' or '.join(FORMATS)}")
    if out.exists():
        raise UserError(f"{out}: exists already, perhaps with captions in it; give another --out")


def write_suggestions(source: Source, found: Sequence[Suggestion], out: Path) -> Path:
    """Write a table that `?keep=` reads, with an empty `captions` to be filled in, and a sheet of the images beside it.

    Returns the sheet.
    """
    rows = [{"key": each.key, "captions": "", **_written(each)} for each in found]
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(out, text.getvalue().encode())
    else:
        lines = [json.dumps({**row, "captions": []}, ensure_ascii=False) + "\n" for row in rows]
        write_bytes(out, "".join(lines).encode())
    skipped = SkippedItems(max_skipped_share=1.0)
    images, captions = [], []
    for number, each in enumerate(found[:_ON_SHEET], start=1):
        if (image := read_image(source, each.item, size=160, skipped=skipped)) is not None:
            images.append(image)
            captions.append(f"{number} {each.draft or Path(each.key).name}")
    title = f"{source.name}: what to caption next"
    return save_png(out.with_suffix(".png"), contact_sheet(images, captions=captions, title=title))


def _written(each: Suggestion) -> dict[str, object]:
    numbers = {"uncertainty": each.uncertainty, "distance": each.distance}
    return {"draft": each.draft} | {name: None if x is None else round(x, 4) for name, x in numbers.items()}
