"""All that a run must remember between two steps: weights, moving average, optimiser."""

from typing import Any

import torch
from torch import Tensor, nn

from diptych.train.checkpoint import Checkpoint, load_into
from diptych.train.ema import Ema


class TrainState:
    """Gives a checkpoint its tensors and takes them back.

    Saved are the trained parameters, the buffers, and frozen parameters that were written to since the start (an
    objective may keep a teacher); a frozen text encoder of gigabytes is not. Moments are stored by parameter name.
    """

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
        self.objective, self.optimizer, self.ema = objective, optimizer, ema
        names = {parameter: name for name, parameter in objective.named_parameters()}
        self._names = [names[p] for group in optimizer.param_groups for p in group["params"]]
        self._frozen = {name: p._version for name, p in objective.named_parameters() if not p.requires_grad}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File name -> tensor name -> tensor."""
        moved = {n for n, p in self.objective.named_parameters() if n in self._frozen and p._version != self._frozen[n]}
        content = {"model": self._model(moved), "optimizer": self._moments()}
        return content | ({"ema": self.ema.weights} if self.ema else {})

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``."""
        saved = checkpoint.tensors("model")
        load_into(self._model(saved.keys() & self._frozen.keys()), saved, where=checkpoint.path)
        if self.ema:
            load_into(self.ema.weights, checkpoint.tensors("ema"), where=checkpoint.path)
        state: dict[int, dict[str, Tensor]] = {}
        numbers = {name: number for number, name in enumerate(self._names)}
        for key, value in checkpoint.tensors("optimizer").items():
            moment, name = key.split("/", 1)
            state.setdefault(numbers[name], {})[moment] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _model(self, frozen: Any) -> dict[str, Tensor]:
        kept = self.objective.state_dict().keys()  # leaves out non-persistent buffers
        parameters = {
            n: p.detach() for n, p in self.objective.named_parameters() if n not in self._frozen or n in frozen
        }
        return parameters | {n: b for n, b in self.objective.named_buffers() if n in kept}

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {f"{key}/{self._names[i]}": value for i, entry in state.items() for key, value in entry.items()}
