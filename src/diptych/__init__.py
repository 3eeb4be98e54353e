"""Diptych: caption, draw, classify and search from few captioned images, many bare images and loose texts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.itit.pipeline import Diptych as Diptych

__all__ = ["Diptych"]


def __getattr__(name: str):
    # Imported when asked for: `diptych --help` must not wait for torch.
    if name == "Diptych":
        from diptych.itit.pipeline import Diptych

        return Diptych
    raise AttributeError(f"module 'diptych' has no attribute {name!r}")
