"""A small objective and its data: enough to exercise everything the loop does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diptych.data.batch import Batch, ImageTokenExamples
from diptych.rng import StepRNG, derive_seed
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.objective import Losses, Objective

ROWS = 8  # per step, over all processes
CODES = 16
TOKENS = 6


class Toy(Objective):
    """Predicts tokens from noisy embeddings, with dropout. A term that starts late leaves weights unused at first."""

    streams = {"images": 1}  # noqa: RUF012 - as the interface has it

    def __init__(self, *, seed: int = 0, dropout: float = 0.0, late_from: int = 0, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(CODES, width)
            self.middle = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(dropout))
            self.head = nn.Linear(width, CODES)
            self.late = nn.Linear(width, CODES)
            self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.late_from = late_from
        self.may_skip_parameters = late_from > 0
        self.explode_at: dict[int, float] = {}
        self.on_step: Callable[[int], None] | None = None

    def forward(self, batch: Batch, step: int) -> Losses:
        if self.on_step:
            self.on_step(step)
        tokens_BN = batch["images"].tokens_BN
        noise_BND = batch.rng.uniform("noise", len(tokens_BN), tokens_BN.shape[1], self.head.in_features)
        hidden_BND = self.middle(self.frozen(self.embedding(tokens_BN) + noise_BND.to(tokens_BN.device)))
        terms = {"main": _cross_entropy(self.head(hidden_BND), tokens_BN)}
        if step >= self.late_from:
            terms["late"] = _cross_entropy(self.late(hidden_BND), tokens_BN)
        total = torch.stack(list(terms.values())).sum() * self.explode_at.get(step, 1.0)
        return Losses(total, terms, {"mean": hidden_BND.mean()})


def toy_batches(step: int, rank: int, world: int, *, seed: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(derive_seed(seed, "tokens", step))
    tokens_BN = torch.randint(0, CODES, (ROWS, TOKENS), generator=generator)
    rows = ROWS // world
    examples = ImageTokenExamples(tokens_BN=tokens_BN[rank * rows : (rank + 1) * rows])
    return Batch(rng=StepRNG(seed, step, rank, world), streams={"images": examples})


def _cross_entropy(logits_BNK: torch.Tensor, tokens_BN: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits_BNK.flatten(0, 1), tokens_BN.flatten())


def config(**changes: Any) -> TrainConfig:
    """Settings of a short quiet run."""
    usual: dict[str, Any] = {"steps": 12, "batch_size": ROWS, "checkpoint_every": 4, "device": "cpu", "workers": 0}
    return TrainConfig(**usual | {"tensorboard": False, "quiet": True, "precision": "fp32"} | changes)


def optim(**changes: Any) -> OptimConfig:
    # A constant rate, so that runs of different lengths agree on the steps they share.
    usual: dict[str, Any] = {"lr": 0.01, "warmup_steps": 2, "schedule": "constant"}
    return OptimConfig(**usual | changes)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of the training lines, in order."""
    return [(line["step"], line["loss"]) for line in read_metrics(out) if "loss" in line]


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal names and bits."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
