"""The built-in world: pictures of simple shapes and the English that describes them, drawn on the spot."""

from diptych.data.scenes.grammar import caption, parse, phrasings
from diptych.data.scenes.render import render
from diptych.data.scenes.source import ScenesSource
from diptych.data.scenes.world import Scene, Thing, all_scenes, scene

__all__ = ["Scene", "ScenesSource", "Thing", "all_scenes", "caption", "parse", "phrasings", "render", "scene"]
