"""Scenes to English and back. Whatever ``caption`` can say, ``parse`` reads, and so does any mix of its synonyms."""

import re

from diptych.data.scenes.world import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Level, Scene, Thing

TEMPLATES: dict[Level, tuple[str, ...]] = {
    1: (
        "a {size} {colour} {shape} in the {place} on a {background} background",
        "there is a {size} {colour} {shape} at the {place} of a {background} picture",
        "a {background} picture with a {size} {colour} {shape} in the {place}",
        "{size} {colour} {shape}, {place}, {background} background",
        "on a {background} background, a {size} {colour} {shape} sits in the {place}",
        "the {shape} in the {place} is {size} and {colour}, the background is {background}",
    ),
    2: (
        "a {a} {relation} a {b} on a {background} background",
        "there is a {a} {relation} a {b} on {background}",
        "a {background} picture with a {a} {relation} a {b}",
        "on a {background} background, a {a} sits {relation} a {b}",
        "{a} {relation} {b}, {background} background",
        "this picture shows a {a} {relation} a {b} on {background}",
        "the {a} is {relation} the {b}, the background is {background}",
    ),
}
SYNONYMS = {
    "circle": "disc",
    "cross": "plus",
    "cyan": "turquoise",
    "small": "little",
    "large": "big",
    "top left": "upper left",
    "top right": "upper right",
    "bottom left": "lower left",
    "bottom right": "lower right",
    "centre": "middle",
    "white": "plain white",
    "black": "plain black",
    "grey": "plain grey",
}
FORWARD = {"left of": ("to the left of", "left of"), "above": ("above", "over")}
BACKWARD = {"left of": ("to the right of", "right of"), "above": ("below", "under")}
"""How the second thing stands to the first."""

STYLES: dict[Level, int] = {1: 1, 2: 2}
"""1: captions use the first word for everything. 2: or the second one, throughout, where there is one."""


def phrasings(level: Level) -> int:
    """How many captions one scene of this level has: templates, times styles, times tellers at level 2."""
    return len(TEMPLATES[level]) * STYLES[level] * level


def caption(scene: Scene, phrasing: int = 0) -> str:
    """The scene in English, lower case. ``phrasing`` counts from 0 to ``phrasings(scene.level) - 1``."""
    if not 0 <= phrasing < phrasings(scene.level):
        raise ValueError(f"no phrasing {phrasing}; level {scene.level} has 0 to {phrasings(scene.level) - 1}")
    templates = TEMPLATES[scene.level]
    choice, template = divmod(phrasing, len(templates))
    style, teller = choice % STYLES[scene.level], choice // STYLES[scene.level]

    def say(value: str) -> str:
        return SYNONYMS.get(value, value) if style else value

    told = [" ".join(say(word) for word in (thing.size, thing.colour, thing.shape)) for thing in scene.things]
    words = {name: say(value) for name, value in scene.attributes().items()}
    if scene.level == 2:
        words["a"], words["b"] = reversed(told) if teller else told
        words["relation"] = (BACKWARD if teller else FORWARD)[scene.layout][style]
    return templates[template].format(**words)


def parse(text: str) -> Scene | None:
    """The scene a caption describes, or None when the caption is not in the language. Case and punctuation are free."""
    words = _plain(text)
    for pattern in PATTERNS:
        if found := pattern.fullmatch(words):
            return _scene({slot: MEANING.get(word, word) for slot, word in found.groupdict().items()})
    return None


def _scene(said: dict[str, str]) -> Scene:
    if "relation" not in said:
        return Scene((Thing(said["shape"], said["colour"], said["size"]),), said["place"], said["background"])
    one, two = (Thing(said[f"shape_{which}"], said[f"colour_{which}"], said[f"size_{which}"]) for which in "ab")
    for relation, ways in FORWARD.items():
        if said["relation"] in ways:
            return Scene((one, two), relation, said["background"])
    relation = next(relation for relation, ways in BACKWARD.items() if said["relation"] in ways)
    return Scene((two, one), relation, said["background"])


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[.,;:]", " ", text.lower()).split())


def _either(slot: str, values: list[str]) -> str:
    return f"(?P<{slot}>{'|'.join(sorted(values, key=len, reverse=True))})"


def _pattern(template: str) -> re.Pattern[str]:
    kinds = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES, "background": BACKGROUNDS}
    said = {kind: [*values, *(SYNONYMS[v] for v in values if v in SYNONYMS)] for kind, values in kinds.items()}
    said["relation"] = [way for ways in (FORWARD, BACKWARD) for relation in RELATIONS for way in ways[relation]]
    slots = {slot: _either(slot, values) for slot, values in said.items()}
    for which in "ab":
        slots[which] = " ".join(_either(f"{kind}_{which}", said[kind]) for kind in ("size", "colour", "shape"))
    return re.compile(_plain(template).format(**slots))


MEANING = {said: value for value, said in SYNONYMS.items()}
PATTERNS = tuple(_pattern(template) for templates in TEMPLATES.values() for template in templates)
