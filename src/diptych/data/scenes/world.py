"""What can be in an image, which combinations are kept for testing, and which scene has which index.

An image of level 1, 2 or 3 shows so many things, each in a quarter of its own. A scene is its attributes and nothing
else. Two images of one scene differ visibly by their jitter: where in its quarter a thing is, how large it is, how it
is turned and how bright it is.

Level 3 has 32,000 scenes, so that 36,000 training images show each of its 25,600 training scenes once or twice.

Shapes: n images, T things of an image, 5 numbers that vary.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt64

from diptych.rng import GOLDEN, derive_seed, mix64

Level = Literal[1, 2, 3]
Split = Literal["train", "test"]

SHAPES = ("square", "triangle", "cross", "ring")
COLOURS = {
    "red": (235, 50, 45),
    "green": (60, 205, 80),
    "blue": (70, 140, 255),
    "yellow": (250, 225, 60),
    "white": (245, 245, 245),
}
GROUND = (24, 24, 30)
"""Every thing is lighter than the background, not just another hue: lossy codecs blur hue the most."""
RADIUS = 0.185
"""Of the disk that a thing is inscribed in, as a share of the image's side, before it varies."""
PLACES = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
"""Centre of the quarter, (x to the right, y downwards), as shares of the image's side; in the order of reading."""
JITTER = (0.035, 0.035, 0.1, 0.2, 0.12)
"""Largest change of a thing: of x and y (shares of the side), of the radius (share of itself), of its angle (radians)
and of its brightness (share of itself)."""


@dataclass(frozen=True, slots=True)
class Thing:
    """What stands in one quarter of an image."""

    shape: str
    colour: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What an image shows, apart from its jitter."""

    things: tuple[Thing, ...]
    """In the order of reading, so that one image is one scene."""
    places: tuple[str, ...]
    """The quarter that each thing is in."""

    @property
    def level(self) -> Level:
        levels: dict[int, Level] = {1: 1, 2: 2, 3: 3}
        return levels[len(self.things)]

    def attributes(self) -> dict[str, str]:
        """Values by name: shape, colour, place; from level 2 on shape 1, colour 1, place 1, shape 2, ..."""
        found: dict[str, str] = {}
        for number, (thing, place) in enumerate(zip(self.things, self.places, strict=True), 1):
            suffix = "" if self.level == 1 else f" {number}"
            found |= {f"shape{suffix}": thing.shape, f"colour{suffix}": thing.colour, f"place{suffix}": place}
        return found

    def held_out(self) -> bool:
        """Whether the scene is kept for testing: a fifth of the combinations of *all* attributes.

        A sum of all of them modulo five takes the same share from every value, and whatever the kept scenes combine in
        all but one attribute is met in training. (A rule on three attributes alone teaches a network that reads the
        world well to rule the kept ones out.) The second thing counts double and the third three times, as A beside B
        is not B beside A.
        """
        total = list(combinations(PLACES, self.level)).index(self.places)
        for weight, thing in enumerate(self.things, 1):
            total += weight * (SHAPES.index(thing.shape) + list(COLOURS).index(thing.colour))
        return total % 5 == 0


@cache
def all_scenes(level: Level, split: Split | None = None) -> tuple[Scene, ...]:
    """Every scene of a level, or of one side of its split."""
    if level not in get_args(Level) or split not in (None, *get_args(Split)):
        raise ValueError(f"no scenes of level {level!r} and split {split!r}; levels are 1, 2, 3 and splits train, test")
    things = [Thing(*values) for values in product(SHAPES, COLOURS)]
    every = (Scene(*parts) for parts in product(product(things, repeat=level), combinations(PLACES, level)))
    return tuple(s for s in every if split is None or s.held_out() == (split == "test"))


def scenes(indices: Int[np.ndarray, "n"], *, split: Split, level: Level, seed: int) -> list[Scene]:
    """The scenes with these indices, each a pure function of (index, split, level, seed)."""
    choices = all_scenes(level, split)
    places = _random(indices, derive_seed(seed, "scene", level, split)) % np.uint64(len(choices))
    return [choices[place] for place in places.tolist()]


def scene(index: int, *, split: Split = "train", level: Level = 1, seed: int = 0) -> Scene:
    return scenes(np.array([index]), split=split, level=level, seed=seed)[0]


def jitter(indices: Int[np.ndarray, "n"], *, split: Split, level: Level, seed: int) -> Float[np.ndarray, "n T 5"]:
    """Changes of x, y, radius, angle and brightness for every thing of these images, even within ``JITTER``."""
    lanes = [
        _random(indices, derive_seed(seed, "jitter", level, split, thing, axis))
        for thing, axis in product(range(level), range(len(JITTER)))
    ]
    uniform = (np.stack(lanes, -1) >> np.uint64(40)).astype(np.float32) / 2**24
    return (uniform * 2 - 1).reshape(len(indices), level, len(JITTER)) * np.array(JITTER, np.float32)


def _random(indices: Int[np.ndarray, "n"], seed: int) -> UInt64[np.ndarray, "n"]:
    """64 well-mixed bits per index, so that a batch needs no generator per image."""
    return mix64(indices.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(seed))
