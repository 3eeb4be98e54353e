"""What checks annotations while the tests run; pyproject.toml hands it to jaxtyping's import hook."""

from collections.abc import Callable
from typing import Any

import tyro
from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_check = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # an int will do for a float, as for mypy
        # What a recipe leaves to the command line to ask for, sources so far.
        hint_overrides=FrozenDict({str: str | type(tyro.MISSING)}),
    )
)


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, except that a method may return ``Self``: beartype sees the method without its class, and gives up.

    jaxtyping hands over parameters and result apart, so the parameters of such a method are still checked.
    """
    try:
        return _check(function)
    except BeartypeDecorHintPep673Exception:
        return function
