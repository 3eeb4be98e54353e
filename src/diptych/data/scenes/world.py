"""What can be in a picture, which combinations are kept for testing, and which scene has which index.

Level 1 shows one thing at one of five places, level 2 shows two things side by side or one above the other. A scene is
its attributes and nothing else; the small variations between two pictures of one scene are its jitter.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt64

from diptych.rng import derive_seed

Level = Literal[1, 2]
Split = Literal["train", "test"]

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (215, 30, 40),
    "green": (15, 120, 45),
    "blue": (35, 75, 215),
    "pink": (250, 110, 195),
    "cyan": (45, 205, 235),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (18, 18, 20), "grey": (122, 122, 126)}
"""Every thing is lighter or darker than its background, not just another hue: lossy codecs blur hue the most."""
SIZES = {"small": 0.165, "large": 0.24}
"""Radius as a share of the picture's side."""
PLACES = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "centre": (0.5, 0.5),
}
"""Centre of the thing, (x to the right, y downwards), as shares of the picture's side."""
RELATIONS = {"left of": ((0.25, 0.5), (0.75, 0.5)), "above": ((0.5, 0.25), (0.5, 0.75))}
"""Where the two things of level 2 are. Right of and below are the same pictures, told from the other thing."""
JITTER = (0.0005, 0.0005, 0.002)
"""Largest change of x, of y (shares of the side) and of the radius (share of itself)."""


@dataclass(frozen=True, slots=True)
class Thing:
    shape: str
    colour: str
    size: str


@dataclass(frozen=True, slots=True)
class Scene:
    things: tuple[Thing, ...]
    """One thing, or two: the left or upper one first, so that one picture is one scene."""
    layout: str
    """A place for one thing, a relation of the first thing to the second for two."""
    background: str

    @property
    def level(self) -> Level:
        return 1 if len(self.things) == 1 else 2

    @property
    def centres(self) -> tuple[tuple[float, float], ...]:
        return (PLACES[self.layout],) if self.level == 1 else RELATIONS[self.layout]

    def attributes(self) -> dict[str, str]:
        """Values by name: shape, colour, size, place, background; at level 2 shape 1, shape 2, ..., relation."""
        found: dict[str, str] = {}
        for number, thing in enumerate(self.things, 1):
            suffix = "" if self.level == 1 else f" {number}"
            found |= {f"{name}{suffix}": getattr(thing, name) for name in ("shape", "colour", "size")}
        return found | {"place" if self.level == 1 else "relation": self.layout, "background": self.background}

    def held_out(self) -> bool:
        """Whether the scene is kept for testing: a fifth of the combinations of *all* attributes.

        A sum of all of them modulo five takes the same share from every value, and whatever the kept scenes combine in
        all but one attribute is met in training. (A rule on three attributes alone teaches a network that reads the
        world well to rule the kept ones out.) The second thing counts double: A beside B is not B beside A.
        """
        layouts = list(PLACES if self.level == 1 else RELATIONS)
        total = layouts.index(self.layout) + list(BACKGROUNDS).index(self.background)
        for weight, thing in enumerate(self.things, 1):
            parts = SHAPES.index(thing.shape) + list(COLOURS).index(thing.colour) + 2 * list(SIZES).index(thing.size)
            total += weight * parts
        return total % 5 == 0


@cache
def all_scenes(level: Level, split: Split | None = None) -> tuple[Scene, ...]:
    """Every scene of a level, or of one side of its split. The two things of level 2 are never the same."""
    if level not in get_args(Level) or split not in (None, *get_args(Split)):
        raise ValueError(f"no scenes of level {level!r} and split {split!r}; levels are 1, 2 and splits train, test")
    things = [Thing(*values) for values in product(SHAPES, COLOURS, SIZES)]
    groups = (
        [(one,) for one in things] if level == 1 else [pair for pair in product(things, things) if len({*pair}) == 2]
    )
    layouts = PLACES if level == 1 else RELATIONS
    every = (Scene(*parts) for parts in product(groups, layouts, BACKGROUNDS))
    return tuple(s for s in every if split is None or s.held_out() == (split == "test"))


def scenes(indices: Int[np.ndarray, "n"], *, split: Split, level: Level, seed: int) -> list[Scene]:
    """The scenes with these indices, each a pure function of (index, split, level, seed)."""
    choices = all_scenes(level, split)
    places = _random(indices, derive_seed(seed, "scene", level, split)) % np.uint64(len(choices))
    return [choices[place] for place in places.tolist()]


def scene(index: int, *, split: Split = "train", level: Level = 1, seed: int = 0) -> Scene:
    return scenes(np.array([index]), split=split, level=level, seed=seed)[0]


def jitter(indices: Int[np.ndarray, "n"], *, split: Split, level: Level, seed: int) -> Float[np.ndarray, "n things 3"]:
    """Changes of x, y and radius for every thing of these pictures, even within the bounds of ``JITTER``."""
    lanes = [
        _random(indices, derive_seed(seed, "jitter", level, split, thing, axis))
        for thing, axis in product(range(level), range(3))
    ]
    uniform = (np.stack(lanes, -1) >> np.uint64(40)).astype(np.float32) / 2**24
    return (uniform * 2 - 1).reshape(len(indices), level, 3) * np.array(JITTER, np.float32)


def _random(indices: Int[np.ndarray, "n"], seed: int) -> UInt64[np.ndarray, "n"]:
    """64 well-mixed bits per index (the finaliser of splitmix64), so that a batch needs no generator per picture."""
    x = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
