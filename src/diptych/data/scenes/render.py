"""Scenes to pixels, many at a time, at any size.

Shapes: n pictures, S pixels a side. Lengths are shares of the picture's side, y points down.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from diptych.data.scenes.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene

CHUNK_PIXELS = 2**16
"""Pixels drawn at once: small enough for the processor's cache, large enough to forget Python's overhead."""


def render(
    scenes: Sequence[Scene], *, size: int, jitter: Float[np.ndarray, "n things 3"] | None = None
) -> UInt8[np.ndarray, "n S S 3"]:
    """Pictures of scenes of one level. Without ``jitter`` every thing has exactly its place and size."""
    pictures = np.empty((len(scenes), size, size, 3), np.uint8)
    step = max(1, CHUNK_PIXELS // size**2)
    for start in range(0, len(scenes), step):
        rows = slice(start, start + step)
        pictures[rows] = _draw(scenes[rows], None if jitter is None else jitter[rows], size)
    return pictures


def _draw(scenes: Sequence[Scene], jitter: np.ndarray | None, size: int) -> np.ndarray:
    colours = np.array([BACKGROUNDS[scene.background] for scene in scenes], np.float32)
    canvas = np.broadcast_to(colours[:, :, None, None], (len(scenes), 3, size, size)).copy()
    for slot in range(scenes[0].level):
        things = [scene.things[slot] for scene in scenes]
        disks = np.array([(*s.centres[slot], SIZES[s.things[slot].size]) for s in scenes], np.float32)
        if jitter is not None:
            disks[:, :2] += jitter[:, slot, :2]
            disks[:, 2] *= 1 + jitter[:, slot, 2]
        shapes = np.array([SHAPES.index(thing.shape) for thing in things])
        paint = np.array([COLOURS[thing.colour] for thing in things], np.float32)
        for number, shape in enumerate(SHAPES):
            rows = np.flatnonzero(shapes == number)
            cover = coverage(shape, disks[rows], size=size)[:, None]
            canvas[rows] += cover * (paint[rows, :, None, None] - canvas[rows])
    return np.rint(canvas).astype(np.uint8).transpose(0, 2, 3, 1)


def coverage(
    shape: str, disks: Float[np.ndarray, "n 3"], *, size: int, edge: float = 1.0
) -> Float[np.ndarray, "n S S"]:
    """The share of each pixel that the shape covers, for disks (x, y, radius) it is inscribed in.

    Read off the distance to the outline, which costs one sample per pixel and smooths edges as super-sampling does.
    ``edge`` is the width in pixels over which an outline fades; more than 1 gives a blurred shape.
    """
    x, y, radius = (disks[:, i, None, None] for i in range(3))
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    distance = _distance(shape, (centres[None, None, :] - x) / radius, (centres[None, :, None] - y) / radius)
    return np.clip(0.5 - distance * (radius * (size / edge)), 0, 1)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of the shape of radius 1 around the origin, negative inside."""
    if shape == "circle":
        return np.sqrt(x**2 + y**2) - 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.maximum(np.minimum(x, y) - 0.35, np.maximum(x, y) - 1)
    if shape == "triangle":  # equilateral, pointing up, moved down so that it fills its box
        y = y - 0.25
        return np.maximum(y, np.abs(x) * np.float32(0.75**0.5) - y / 2) - 0.6
    raise ValueError(f"no shape {shape!r}; shapes are {', '.join(SHAPES)}")
