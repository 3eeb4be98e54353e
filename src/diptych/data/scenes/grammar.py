"""Scenes to English and back. Whatever ``caption`` can say, ``parse`` reads."""

import re

from diptych.data.scenes.world import COLOURS, PLACES, SHAPES, Level, Scene, Thing

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
