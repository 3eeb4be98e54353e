"""The built-in world as a source of captioned images: ``scenes:?level=1&split=train&count=20000&seed=0``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from urllib.parse import parse_qsl

import numpy as np
from jaxtyping import UInt8

from diptych.data.scenes import world
from diptych.data.scenes.grammar import caption, phrasings
from diptych.data.scenes.render import render
from diptych.data.scenes.world import Level, Scene, Split
from diptych.errors import UserError
from diptych.rng import derive_seed

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
        return world.scenes(self._checked(indices), split=self.split, level=self.level, seed=self.seed)

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
        jitter = world.jitter(checked, split=self.split, level=self.level, seed=self.seed)
        return render(self.scenes(checked), size=size or self.size, jitter=jitter)

    def _checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        checked = np.asarray(indices, np.int64)
        if checked.size and not (checked.min() >= 0 and checked.max() < self.count):
            raise IndexError(f"{self.name} has images 0 to {self.count - 1}, not {checked.min()} to {checked.max()}")
        return checked
