"""Weights on disk and their identity."""

import hashlib
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin

from diptych.errors import UserError

Network = TypeVar("Network", bound=PyTorchModelHubMixin)


def weights_digest(module: torch.nn.Module) -> str:
    """Tells one set of weights from another."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_network(kind: type[Network], folder: Path) -> Network:
    """The network that ``kind.save_pretrained`` wrote; UserError when a file is missing or damaged."""
    try:
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints that it reads a folder
            return kind.from_pretrained(str(folder), local_files_only=True, strict=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder}: the network cannot be read ({reason}): copy or train it again") from error
