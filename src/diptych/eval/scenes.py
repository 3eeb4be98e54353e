"""How much of a scene a caption or a generated image gets right, read without anything learned.

The recognizer explains each quarter of an image by what could have drawn it: nothing but background, or every shape
at every place, size and angle that the world allows, also blurred, each with the pair of colours that fits best. What
the best explanations leave over decides whether the image shows a scene at all.

Shapes: B images, Q quarters, H x W pixels, T templates, P pixels of a quarter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8

from diptych.data.scenes import COLOURS, GROUND, PLACES, RADIUS, SHAPES, Level, Scene, Thing, coverage, parse

SIDE = 32
"""Images are brought to this side before they are read: the smallest at which every scene is clear."""
MOVES = (-0.04, -0.02, 0.0, 0.02, 0.04)
SCALES = (0.9, 1.0, 1.1)
ANGLES = (-0.18, -0.06, 0.06, 0.18)
EDGES = (1.0, 3.0)
"""What the templates allow for: moves in x and y (shares of the side), radii (shares of the usual one), angles
(radians), edge widths in pixels."""
OFF_GROUND = 60.0
"""Largest distance in RGB of a background from the true one."""
OFF_COLOUR = 90.0
"""Largest distance in RGB from the named colour, once its brightness is fitted."""
DIM, BRIGHT = 0.6, 1.4
"""How much darker or brighter than its name a colour may be."""
FAINT = 50.0
"""Smallest distance in RGB between a thing and its background; a quarter of less contrast is taken for empty."""
LEFT_OVER = 80.0
"""Largest distance in RGB between image and explanation, averaged over a cell of ``CELL`` x ``CELL`` pixels. Noise
and soft edges average out over a cell; a missing corner, a second thing or a bent outline do not."""
CELL = 4
LUMA = np.array((0.299, 0.587, 0.114), np.float32)
LUMA_WEIGHT = 10.0
"""How much more a template's fit in brightness counts than its fit in colour. Codecs and small image tokenizers smear
hue, so shapes are told apart by brightness."""
ROWS = 256
"""Images read at once, which bounds the memory for their products with every template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneScore:
    """Shares between 0 and 1."""

    exact: float
    """Right in every attribute."""
    readable: float
    """In the language, or recognized as a scene at all."""
    attributes: dict[str, float]
    """Right in this attribute; what is not readable is wrong in all."""


def caption_accuracy(captions: Sequence[str], scenes: Sequence[Scene]) -> SceneScore:
    """Captions against the scenes they should describe, row by row."""
    return _score([parse(caption) for caption in captions], scenes)


def image_accuracy(pixels: UInt8[np.ndarray, "B H W 3"], scenes: Sequence[Scene]) -> SceneScore:
    """Images against the scenes they should show, row by row; all scenes of one level."""
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
    """The scene of this level that each image shows, or None where it shows none. Any size of image."""
    found: list[Scene | None] = []
    for start in range(0, len(pixels), ROWS):
        found += _recognize(_shrink(pixels[start : start + ROWS]), level)
    return found


def _shrink(pixels: np.ndarray) -> np.ndarray:
    pixels_B3HW = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
    return torch.nn.functional.adaptive_avg_pool2d(pixels_B3HW, SIDE).numpy()


def _recognize(pixels_B3SS: np.ndarray, level: Level) -> list[Scene | None]:
    half = SIDE // 2
    tops = {0.25: slice(0, half), 0.75: slice(half, SIDE)}
    quarters = [pixels_B3SS[:, :, tops[y], tops[x]] for x, y in PLACES.values()]
    told = [_explain(quarter) for quarter in quarters]
    return [_scene([part.read(row) for part in told], level) for row in range(len(pixels_B3SS))]


def _scene(parts: "list[Thing | Literal['nothing'] | None]", level: Level) -> Scene | None:
    seen = {place: part for place, part in zip(PLACES, parts, strict=True) if isinstance(part, Thing)}
    if None in parts or len(seen) != level:
        return None
    return Scene(tuple(seen.values()), tuple(seen))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Templates:
    """All ways to draw one thing into a quarter."""

    shapes: list[str]
    """Shape of each template."""
    cover_TP: np.ndarray
    unit_TP: np.ndarray
    """Mean 0 and length 1."""
    length_T: np.ndarray
    """Length that the template had once its mean was taken off."""


@cache
def _templates() -> _Templates:
    shapes, covers = [], []
    for shape, edge in product(SHAPES, EDGES):
        angles = (0.0,) if shape == "ring" else ANGLES
        disks = [
            (0.5 + 2 * dx, 0.5 + 2 * dy, 2 * RADIUS * scale, angle)
            for dx, dy, scale, angle in product(MOVES, MOVES, SCALES, angles)
        ]
        shapes += [shape] * len(disks)
        covers.append(coverage(shape, np.array(disks, np.float32), size=SIDE // 2, edge=edge))
    cover_TP = np.concatenate(covers).reshape(len(shapes), -1)
    rest_TP = cover_TP - cover_TP.mean(1, keepdims=True)
    length_T = np.linalg.norm(rest_TP, axis=1)
    return _Templates(shapes=shapes, cover_TP=cover_TP, unit_TP=rest_TP / length_T[:, None], length_T=length_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Explanation:
    """The best template and colours for a quarter of every image."""

    shapes_B: list[str]
    worst_B: np.ndarray
    """What the explanation leaves over in the worst cell, as a distance in RGB."""
    uneven_B: np.ndarray
    """The same for the explanation that nothing is there."""
    paint_B3: np.ndarray
    ground_B3: np.ndarray
    mean_B3: np.ndarray

    def read(self, row: int) -> "Thing | Literal['nothing'] | None":
        """The thing, or nothing; None where neither explanation holds."""
        if self.uneven_B[row] < FAINT / 2:
            return "nothing" if _off_ground(self.mean_B3[row]) <= OFF_GROUND else None
        colour, contrast = _name(self.paint_B3[row]), np.linalg.norm(self.paint_B3[row] - self.ground_B3[row])
        wrong = colour is None or contrast < FAINT or _off_ground(self.ground_B3[row]) > OFF_GROUND
        return None if wrong or self.worst_B[row] > LEFT_OVER else Thing(self.shapes_B[row], str(colour))


def _off_ground(colour_3: np.ndarray) -> float:
    return float(np.linalg.norm(colour_3 - GROUND))


def _name(colour_3: np.ndarray) -> str | None:
    """The nearest name of a colour when each may be darker or brighter; None where none is near."""
    distances = {}
    for name, value in COLOURS.items():
        named_3 = np.array(value, np.float32)
        shade = np.clip(colour_3 @ named_3 / (named_3 @ named_3), DIM, BRIGHT)
        distances[name] = float(np.linalg.norm(colour_3 - shade * named_3))
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= OFF_COLOUR else None


def _explain(quarter_B3HW: np.ndarray) -> _Explanation:
    """Least squares of ``ground + cover * contrast`` in each channel, over all templates at once.

    With a template u of mean 0 and length 1 the squared error falls by the sum over channels of (u . pixels)^2.
    """
    templates = _templates()
    rows, _, height, width = quarter_B3HW.shape
    part_B3P = quarter_B3HW.reshape(rows, 3, -1)
    mean_B3 = part_B3P.mean(2)
    rest_B3P = part_B3P - mean_B3[..., None]
    along_B3T = (rest_B3P.reshape(rows * 3, -1) @ templates.unit_TP.T).reshape(rows, 3, -1)
    gain_BT = (along_B3T**2).sum(1) + LUMA_WEIGHT * (LUMA @ along_B3T) ** 2
    best_B = gain_BT.argmax(1)
    cover_BP = templates.cover_TP[best_B]
    contrast_B3 = along_B3T[np.arange(rows), :, best_B] / templates.length_T[best_B][:, None]
    error_B3P = rest_B3P - contrast_B3[..., None] * (cover_BP - cover_BP.mean(1, keepdims=True))[:, None]

    def worst_cell(left_B3P: np.ndarray) -> np.ndarray:
        cells = left_B3P.reshape(rows, 3, height // CELL, CELL, width // CELL, CELL).mean((3, 5))
        return np.sqrt((cells**2).sum(1)).max((1, 2))

    ground_B3 = mean_B3 - contrast_B3 * cover_BP.mean(1)[:, None]
    return _Explanation(
        shapes_B=[templates.shapes[best] for best in best_B],
        worst_B=worst_cell(error_B3P),
        uneven_B=worst_cell(rest_B3P),
        paint_B3=ground_B3 + contrast_B3,
        ground_B3=ground_B3,
        mean_B3=mean_B3,
    )
