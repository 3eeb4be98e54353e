"""How much of a scene of the built-in world a caption or a generated image gets right, without a learned model.

Captions are parsed. Images are compared with templates: every shape at every size and place, a little moved, resized
and blurred, each with the pair of colours that fits best. The error that the best template leaves decides whether the
image shows a scene at all.

Shapes: B images of H x W or S x S pixels, T templates, P pixels of the part of the image that is compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from jaxtyping import UInt8

from diptych.data.scenes.grammar import parse
from diptych.data.scenes.render import coverage
from diptych.data.scenes.world import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Level, Scene, Thing

SIDE = 32
"""Side in pixels to which images are resized first: the smallest at which every scene is clear."""
MOVES = (-0.024, -0.012, 0.0, 0.012, 0.024)
SCALES = (0.95, 1.05)
EDGES = (1.0, 2.5, 4.0)
"""Variations of the templates: moves in x and y (shares of the side), factors of the radius, edge widths in pixels."""
OFF_COLOUR = 70.0
"""Largest distance in RGB from the named colour. The closest two names are 114 apart."""
FAINT = 60.0
"""Smallest distance in RGB between a thing and its background; true ones are at least 100 apart."""
LEFT_OVER = 60.0
"""Largest distance in RGB between image and explanation, averaged over a cell of ``CELL`` x ``CELL`` pixels. Noise
and soft edges average out over a cell; a missing corner, a second thing or a bent outline does not."""
CELL = 4
LUMA = np.array((0.299, 0.587, 0.114), np.float32)
LUMA_WEIGHT = 100.0
"""How much more a template's fit in brightness counts than its fit in colour. Codecs and small image tokenizers smear
hue, so shapes are told apart by brightness; without the weight JPEG turns one small shape in seven into another."""
ROWS = 256
"""Number of images compared at once, which bounds the memory for their products with every template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneScore:
    """Shares of the captions or images, between 0 and 1."""

    exact: float
    """Share that is right in every attribute."""
    readable: float
    """Share that the grammar can parse or that shows a scene at all."""
    attributes: dict[str, float]
    """Share that is right in each attribute; what is not readable is wrong in all."""


def caption_accuracy(captions: Sequence[str], scenes: Sequence[Scene]) -> SceneScore:
    """Compares captions with the scenes they should describe, row by row."""
    return _score([parse(caption) for caption in captions], scenes)


def image_accuracy(pixels: UInt8[np.ndarray, "B H W 3"], scenes: Sequence[Scene]) -> SceneScore:
    """Compares images with the scenes they should show, row by row; all scenes must be of one level."""
    levels = {scene.level for scene in scenes}
    if len(levels) != 1:
        raise ValueError(f"scenes of levels {sorted(levels)}; score one level at a time, at least one scene")
    return _score(recognize(pixels, level=levels.pop()), scenes)


def _score(found: Sequence[Scene | None], scenes: Sequence[Scene]) -> SceneScore:
    if len(found) != len(scenes) or not scenes:
        raise ValueError(f"{len(found)} readings for {len(scenes)} scenes; give one of each per row, at least one row")
    names = scenes[0].attributes()
    read = [scene.attributes() if scene else {} for scene in found]
    true = [scene.attributes() for scene in scenes]
    return SceneScore(
        exact=float(np.mean([one == other for one, other in zip(found, scenes, strict=True)])),
        readable=float(np.mean([scene is not None for scene in found])),
        attributes={n: float(np.mean([r.get(n) == t.get(n) for r, t in zip(read, true, strict=True)])) for n in names},
    )


def recognize(pixels: UInt8[np.ndarray, "B H W 3"], *, level: Level = 1) -> list[Scene | None]:
    """The scene of this level that each image shows, or None where it shows none. Images may have any size."""
    found: list[Scene | None] = []
    for start in range(0, len(pixels), ROWS):
        found += _recognize(_shrink(pixels[start : start + ROWS]), level)
    return found


def _shrink(pixels: np.ndarray) -> np.ndarray:
    pixels_B3HW = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
    return torch.nn.functional.adaptive_avg_pool2d(pixels_B3HW, SIDE).numpy()


def _recognize(pixels_B3SS: np.ndarray, level: Level) -> list[Scene | None]:
    layouts = list(PLACES if level == 1 else RELATIONS)
    explained = [[_explain(pixels_B3SS, _templates(layout, slot)) for slot in range(level)] for layout in layouts]
    best_B = np.argmin([np.sum([part.left_B for part in parts], axis=0) for parts in explained], axis=0)
    return [_scene(layouts[best], [part.read(row) for part in explained[best]]) for row, best in enumerate(best_B)]


def _scene(layout: str, parts: list[tuple[Thing, str] | None]) -> Scene | None:
    seen = [part for part in parts if part is not None]
    grounds = {ground for _, ground in seen}
    if len(seen) < len(parts) or len(grounds) > 1:
        return None
    return Scene(tuple(thing for thing, _ in seen), layout, grounds.pop())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Templates:
    """All ways in which one thing of a layout can look in the part of the image that belongs to it."""

    view: tuple[slice, slice]
    """Rows and columns of that part of the image."""
    window: tuple[slice, slice]
    """Rows and columns of the view outside which every template is empty."""
    kinds: list[tuple[str, str]]
    """Shape and size of each template."""
    cover_THW: np.ndarray
    """Share of each pixel that the thing covers, over the whole view."""
    unit_TP: np.ndarray
    """Over the window, divided by the length that the template has once its mean over the view is taken off."""


@cache
def _templates(layout: str, slot: int) -> _Templates:
    half, whole = (slice(0, SIDE // 2), slice(SIDE // 2, SIDE))[slot], slice(None)
    view = {"left of": (whole, half), "above": (half, whole)}.get(layout, (whole, whole))
    x, y = RELATIONS[layout][slot] if layout in RELATIONS else PLACES[layout]
    kinds, covers = [], []
    for shape, size, edge in product(SHAPES, SIZES, EDGES):
        disks = [(x + dx, y + dy, SIZES[size] * scale) for dx, dy, scale in product(MOVES, MOVES, SCALES)]
        kinds += [(shape, size)] * len(disks)
        covers.append(coverage(shape, np.array(disks, np.float32), size=SIDE, edge=edge)[:, *view])
    cover_THW = np.concatenate(covers)
    spans = [np.flatnonzero(cover_THW.any(axis=axes)) for axes in ((0, 2), (0, 1))]
    window = (slice(spans[0][0], spans[0][-1] + 1), slice(spans[1][0], spans[1][-1] + 1))
    unit_TP = cover_THW[:, *window].reshape(len(kinds), -1) / _lengths(cover_THW)[:, None]
    return _Templates(view=view, window=window, kinds=kinds, cover_THW=cover_THW, unit_TP=unit_TP)


def _lengths(cover_THW: np.ndarray) -> np.ndarray:
    return np.linalg.norm(cover_THW - cover_THW.mean((1, 2), keepdims=True), axis=(1, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Explanation:
    """The best template and colours for a part of every image."""

    kinds: list[tuple[str, str]]
    left_B: np.ndarray
    """Squared error that the explanation leaves over the whole part."""
    worst_B: np.ndarray
    """The same as a distance in RGB for the worst cell."""
    paint_B3: np.ndarray
    """Colour of the thing in RGB."""
    ground_B3: np.ndarray
    """Colour of the background in RGB."""

    def read(self, row: int) -> tuple[Thing, str] | None:
        """Thing and background, or None where the explanation does not hold."""
        colour, ground = _name(self.paint_B3[row], COLOURS), _name(self.ground_B3[row], BACKGROUNDS)
        faint = np.linalg.norm(self.paint_B3[row] - self.ground_B3[row]) < FAINT
        if colour is None or ground is None or faint or self.worst_B[row] > LEFT_OVER:
            return None
        shape, size = self.kinds[row]
        return Thing(shape, colour, size), ground


def _name(colour_3: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour_3 - value)) for name, value in names.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= OFF_COLOUR else None


def _explain(pixels_B3SS: np.ndarray, templates: _Templates) -> _Explanation:
    """Least squares of ``ground + cover * contrast`` in each channel, over all templates at once.

    With a template u of mean 0 and length 1 the squared error falls by the sum over channels of (u . pixels)^2.
    """
    part_B3HW = pixels_B3SS[:, :, *templates.view]
    mean_B3 = part_B3HW.mean((2, 3))
    rest_B3HW = part_B3HW - mean_B3[..., None, None]
    seen_RP = rest_B3HW[:, :, *templates.window].reshape(mean_B3.size, -1)  # one product of two matrices, R = 3 B
    along_B3T = (seen_RP @ templates.unit_TP.T).reshape(*mean_B3.shape, -1)
    gain_BT = (along_B3T**2).sum(1) + LUMA_WEIGHT * (LUMA @ along_B3T) ** 2
    best_B = gain_BT.argmax(1)
    cover_BHW = templates.cover_THW[best_B]
    contrast_B3 = along_B3T[np.arange(len(best_B)), :, best_B] / _lengths(cover_BHW)[:, None]
    cover_B1HW = (cover_BHW - cover_BHW.mean((1, 2), keepdims=True))[:, None]
    error_B3HW = rest_B3HW - contrast_B3[..., None, None] * cover_B1HW
    high, wide = (length // CELL for length in part_B3HW.shape[2:])
    cells_B3 = error_B3HW.reshape(len(best_B), 3, high, CELL, wide, CELL).mean((3, 5))
    ground_B3 = mean_B3 - contrast_B3 * cover_BHW.mean((1, 2))[:, None]
    return _Explanation(
        kinds=[templates.kinds[best] for best in best_B],
        left_B=(error_B3HW**2).sum((1, 2, 3)),
        worst_B=np.sqrt((cells_B3**2).sum(1)).max((1, 2)),
        paint_B3=ground_B3 + contrast_B3,
        ground_B3=ground_B3,
    )
