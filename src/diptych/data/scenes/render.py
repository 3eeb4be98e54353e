"""Scenes to pixels, many at a time, at any size.

Shapes: n images, T things of an image, S pixels a side. Lengths are shares of the image's side, y points down.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from diptych.data.scenes.world import COLOURS, GROUND, PLACES, RADIUS, SHAPES, Scene

CHUNK_PIXELS = 2**16
"""Pixels drawn at once: small enough for the processor's cache, large enough to forget Python's overhead."""


def render(
    scenes: Sequence[Scene], *, size: int, jitter: Float[np.ndarray, "n T 5"] | None = None
) -> UInt8[np.ndarray, "n S S 3"]:
    """Images of scenes of one level. Without ``jitter`` everything has exactly its place, size and colour."""
    images = np.empty((len(scenes), size, size, 3), np.uint8)
    step = max(1, CHUNK_PIXELS // size**2)
    for start in range(0, len(scenes), step):
        rows = slice(start, start + step)
        images[rows] = _draw(scenes[rows], None if jitter is None else jitter[rows], size)
    return images


def _draw(scenes: Sequence[Scene], jitter: np.ndarray | None, size: int) -> np.ndarray:
    ground = np.array(GROUND, np.float32)[:, None, None]
    canvas = np.broadcast_to(ground, (len(scenes), 3, size, size)).copy()
    for slot in range(scenes[0].level):
        disks = np.array([(*PLACES[scene.places[slot]], RADIUS, 0.0) for scene in scenes], np.float32)
        paint = np.array([COLOURS[scene.things[slot].colour] for scene in scenes], np.float32)
        if jitter is not None:
            change_n5 = jitter[:, slot]
            disks[:, :2] += change_n5[:, :2]
            disks[:, 2] *= 1 + change_n5[:, 2]
            disks[:, 3] += change_n5[:, 3]
            paint *= 1 + change_n5[:, 4:]
        shapes = np.array([SHAPES.index(scene.things[slot].shape) for scene in scenes])
        for number, shape in enumerate(SHAPES):
            rows = np.flatnonzero(shapes == number)
            cover = coverage(shape, disks[rows], size=size)[:, None]
            canvas[rows] += cover * (paint[rows, :, None, None] - canvas[rows])
    return np.rint(canvas.clip(0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)


def coverage(
    shape: str, disks: Float[np.ndarray, "n 4"], *, size: int, edge: float = 1.0
) -> Float[np.ndarray, "n S S"]:
    """The share of each pixel that the shape covers, for disks (x, y, radius, angle) it is inscribed in.

    Read off the distance to the outline, which costs one sample per pixel and smooths edges as super-sampling does.
    ``edge`` is the width in pixels over which an outline fades; more than 1 gives a blurred shape.
    """
    x, y, radius, angle = (disks[:, i, None, None] for i in range(4))
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = (centres[None, None, :] - x) / radius, (centres[None, :, None] - y) / radius
    cosine, sine = np.cos(angle), np.sin(angle)
    distance = _distance(shape, cosine * x + sine * y, cosine * y - sine * x)
    return np.clip(0.5 - distance * (radius * (size / edge)), 0, 1)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of the shape of radius 1 around the origin, negative inside."""
    if shape == "ring":
        return np.abs(np.sqrt(x**2 + y**2) - 0.75) - 0.25
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.maximum(np.minimum(x, y) - 0.33, np.maximum(x, y) - 1)
    if shape == "triangle":  # equilateral, pointing up, moved down so that it fills its box
        y = y - 0.2
        return np.maximum(y, np.abs(x) * np.float32(0.75**0.5) - y / 2) - 0.52
    raise ValueError(f"no shape {shape!r}; shapes are {', '.join(SHAPES)}")
