"""What checks annotations while the tests run; pyproject.toml hands it to jaxtyping's import hook.

tests/conftest.py imports this file before diptych, for what it mends in the hook.
"""

from collections.abc import Callable
from functools import partial
from importlib.machinery import SourceFileLoader
from typing import Any
from unittest.mock import patch

import tyro
from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeDecorHintPep673Exception
from jaxtyping import _import_hook

_check = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # an int will do for a float, as for mypy
        # What a recipe leaves to the command line to ask for, sources so far.
        hint_overrides=FrozenDict({str: str | type(tyro.MISSING)}),
    )
)


def _get_code(loader: Any, fullname: str) -> Any:
    """The code of a module that the hook has changed; its bytecode is kept under a name of its own.

    The hook itself renames the bytecode of all that is imported while such a module runs: 2,700 files of torch and
    others would be compiled a second time.
    """
    renamed = partial(_import_hook._optimized_cache_from_source, loader._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", renamed):
        return SourceFileLoader.get_code(loader, fullname)


_import_hook._JaxtypingLoader.get_code = _get_code
_import_hook._JaxtypingLoader.exec_module = SourceFileLoader.exec_module


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, except that a method may return ``Self``: beartype sees the method without its class, and gives up.

    jaxtyping hands over parameters and result apart, so the parameters of such a method are still checked.
    """
    try:
        return _check(function)
    except BeartypeDecorHintPep673Exception:
        return function
