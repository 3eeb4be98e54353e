"""Files that are written whole or not at all; digests of weights, and loading them."""

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diptych.errors import UserError, first_line

if TYPE_CHECKING:  # torch takes a second to import, and mistakes in a command are answered without it
    import torch


Network = TypeVar("Network")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write ``data`` to ``path`` atomically: there is the old file or the new one, also after a kill at any moment."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def replace_folder(fresh: Path, target: Path) -> None:
    """Give the finished folder ``fresh`` the name ``target``. A kill at any moment leaves one of the two whole.

    An older folder of that name is removed last; until then it lies beside as ``.NAME.old``.
    """
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def without_progress_bars(name: str | os.PathLike[str] = ".") -> Iterator[None]:
    """A context without the progress bars of transformers, which loading and saving three small files does not need.

    The bars stay where ``name``, which is loaded, is no folder, because a download takes time.
    """
    from transformers.utils import logging  # for this alone, nobody must wait for it when the module is imported

    shown = logging.is_progress_bar_enabled()
    if not shown or not Path(name).is_dir():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def weights_digest(module: "torch.nn.Module") -> str:
    """16 hexadecimal digits that differ for different weights and are the same for equal ones."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_network(kind: type[Network], folder: Path) -> Network:
    """The network that ``kind.save_pretrained`` wrote. Raises UserError when a file is missing or damaged."""
    mixin: Any = kind  # huggingface_hub's PyTorchModelHubMixin, which imports torch
    try:
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints that it reads a folder
            return mixin.from_pretrained(str(folder), local_files_only=True, strict=True)
    except Exception as error:
        raise UserError(
            f"{folder}: the network cannot be read ({first_line(error)}): copy or train it again"
        ) from error
