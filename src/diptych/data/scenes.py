"""The built-in world of scenes: what can be in an image, its English, its pixels, and all of it as a source.

An image of level 1, 2 or 3 shows so many things, each in a quarter of its own. A scene is its attributes and nothing
else. Two images of one scene differ visibly by their jitter: where in its quarter a thing is, how large it is, how it
is turned and how bright it is.

Level 3 has 32,000 scenes, so that 36,000 training images show each of its 25,600 training scenes once or twice.

Shapes: n images, T things of an image, 5 numbers that vary, S pixels a side. Lengths are shares of the image's side, y
points down.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any, ClassVar, Literal, Self, get_args
from urllib.parse import parse_qsl

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt64

from diptych.errors import UserError
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


FORMS = (
    ("{place} a {colour} {shape}", ", "),
    ("{place} {colour} {shape}", ", "),
    ("{place} a {colour} {shape}", " and "),
    ("{place} {colour} {shape}", " and "),
)
"""How a thing is told, and what stands between two of them."""


def phrasings(level: Level) -> int:
    """Number of captions of one scene: every form in two orders of telling, but two for a scene of one thing, in which
    nothing stands between things."""
    return 2 if level == 1 else 2 * len(FORMS)


def caption(scene: Scene, phrasing: int = 0) -> str:
    """The scene in English, lower case. ``phrasing`` counts from 0 to ``phrasings(scene.level) - 1``."""
    if not 0 <= phrasing < phrasings(scene.level):
        raise ValueError(f"no phrasing {phrasing}; level {scene.level} has 0 to {phrasings(scene.level) - 1}")
    backwards, form = divmod(phrasing, len(FORMS))
    pattern, between = FORMS[form]
    placed = list(zip(scene.things, scene.places, strict=True))
    told = placed[::-1] if backwards else placed
    return between.join(pattern.format(colour=t.colour, shape=t.shape, place=place) for t, place in told)


def parse(text: str) -> Scene | None:
    """The scene a caption describes, or None when the caption is not in the language. Case and white space are free.

    Things may be told in any order. Two things in one quarter are no scene, so a caption that says so is not read.
    """
    words = " ".join(text.lower().replace(",", " , ").replace(".", " ").split())
    for pattern, between in PATTERNS:
        found = [pattern.fullmatch(part) for part in words.split(between)]
        if all(found):
            return _scene([part.groupdict() for part in found if part is not None])
    return None


def _scene(said: list[dict[str, str]]) -> Scene | None:
    placed = {part["place"]: Thing(part["shape"], part["colour"]) for part in said}
    if len(placed) < len(said) or len(said) >= len(PLACES):
        return None
    places = tuple(place for place in PLACES if place in placed)
    return Scene(tuple(placed[place] for place in places), places)


def _pattern(form: str) -> re.Pattern[str]:
    values = {"colour": COLOURS, "shape": SHAPES, "place": PLACES}
    return re.compile(form.format(**{slot: f"(?P<{slot}>{'|'.join(each)})" for slot, each in values.items()}))


PATTERNS = tuple((_pattern(form), f" {between.strip()} ") for form, between in FORMS)


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


ENDLESS = 2**31
ALLOWED: dict[str, tuple[int | str, ...] | range] = {
    "level": (1, 2, 3),
    "split": ("train", "test"),
    "count": range(1, ENDLESS + 1),
    "seed": range(ENDLESS),
    "size": range(16, 1025),
    "captions": range(1, phrasings(3) + 1),
}
"""Options of a spec and the values they may have."""


def _check(option: str, value: int | str) -> None:
    allowed = ALLOWED[option]
    if value not in allowed:
        choice = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else " or ".join(map(str, allowed))
        raise UserError(f"scenes: {option}={value} is not possible; choose {choice}")


@dataclass(frozen=True, kw_only=True)
class ScenesSource:
    """Images and captions that are pure functions of their index; nothing is stored, nothing is downloaded."""

    has_images: ClassVar[bool] = True
    has_captions: ClassVar[bool] = True

    level: Level = 1
    """How many things an image shows, each in a quarter of its own."""
    split: Split = "train"
    """train, or test: combinations of attributes that never occur in train."""
    count: int = ENDLESS
    """How many images there are."""
    seed: int = 0
    """Another seed is another world of the same kind."""
    size: int = 32
    """Pixels a side of an image when the caller does not say."""
    captions_each: int = 1
    """How many captions, in different words, every image has."""

    def __post_init__(self) -> None:
        for option in ALLOWED:
            _check(option, self.captions_each if option == "captions" else getattr(self, option))

    @classmethod
    def from_spec(cls, spec: str) -> Self:
        """Reads ``scenes:`` or ``scenes:?option=value&option=value``. Raises UserError for what it does not know."""
        head, _, query = spec.partition("?")
        if head != "scenes:":
            raise UserError(f"{spec}: not a source of scenes; write scenes: or scenes:?level=1&split=train&count=20000")
        values: dict[str, Any] = {}
        for option, text in parse_qsl(query, keep_blank_values=True):
            if option not in ALLOWED:
                raise UserError(f"{spec}: no option {option!r}; options are {', '.join(ALLOWED)}")
            if option in values:
                raise UserError(f"{spec}: {option} is given twice; give it once")
            if option != "split" and not text.isdecimal():
                raise UserError(f"{spec}: {option}={text} is not a whole number; write for example {option}=1")
            values[option] = text if option == "split" else int(text)
            _check(option, values[option])
        return cls(**{"captions_each" if option == "captions" else option: value for option, value in values.items()})

    @property
    def name(self) -> str:
        return f"scenes:?level={self.level}&split={self.split}&seed={self.seed}"

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"scenes/{self.level}/{self.split}/{self.seed}/{self._checked([index])[0]}"

    def scene(self, index: int) -> Scene:
        return self.scenes([index])[0]

    def scenes(self, indices: Sequence[int] | np.ndarray) -> list[Scene]:
        return scenes(self._checked(indices), split=self.split, level=self.level, seed=self.seed)

    def captions(self, index: int) -> list[str]:
        """``captions_each`` different phrasings, or as many as the level has; which ones depends on the index."""
        scene = self.scene(index)
        total = phrasings(self.level)
        first = derive_seed(self.seed, "phrasing", self.level, self.split, index) % total
        # A step coprime to 4 and to 8 visits every phrasing once and mixes both orders of telling early.
        return [caption(scene, (first + 5 * k) % total) for k in range(min(self.captions_each, total))]

    def label(self, index: int) -> str | None:
        """The shape at level 1; several things have no one label."""
        return self.scene(index).things[0].shape if self.level == 1 else None

    def image(self, index: int, size: int | None = None) -> UInt8[np.ndarray, "S S 3"]:
        return self.images([index], size)[0]

    def images(self, indices: Sequence[int] | np.ndarray, size: int | None = None) -> UInt8[np.ndarray, "n S S 3"]:
        """Many images at once: about a hundred times faster than one by one."""
        checked = self._checked(indices)
        change = jitter(checked, split=self.split, level=self.level, seed=self.seed)
        return render(self.scenes(checked), size=size or self.size, jitter=change)

    def _checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        checked = np.asarray(indices, np.int64)
        if checked.size and not (checked.min() >= 0 and checked.max() < self.count):
            raise IndexError(f"{self.name} has images 0 to {self.count - 1}, not {checked.min()} to {checked.max()}")
        return checked
