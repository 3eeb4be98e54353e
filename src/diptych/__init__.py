"""Diptych: caption, generate, classify and search images from few captioned images and much unpaired data.

The pipelines of the three learners open a finished run folder: :class:`Diptych` captions and generates images,
:class:`DualEncoder` embeds images and texts, :class:`Classifier` classifies images.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.dual.model import DualEncoder as DualEncoder
    from diptych.itit.pipeline import Diptych as Diptych
    from diptych.uml.classifier import Classifier as Classifier

_MODULES = {"Classifier": "uml.classifier", "Diptych": "itit.pipeline", "DualEncoder": "dual.model"}

__all__ = ["Classifier", "Diptych", "DualEncoder"]


def __getattr__(name: str) -> Any:
    """Imports a pipeline when it is asked for: `diptych --help` must not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'diptych' has no attribute {name!r}")
    return getattr(import_module(f"diptych.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
