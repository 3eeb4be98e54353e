"""How a run is trained: the fields every recipe shares."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from diptych.errors import UserError
from diptych.nn.inference import Device

MAY_CHANGE = {
    # Bookkeeping: no loss depends on these, so a run may be resumed with other values. `steps` moves the end of the
    # cosine; `grad_accum_steps`, `device` and `compile` the rounding of sums: a resume on other hardware wants to set them.
    "train": {"steps", "grad_accum_steps", "device", "compile", "checkpoint_every", "keep_checkpoints", "eval_every"}
    | {"log_every", "workers", "max_seconds", "max_bad_steps", "tensorboard", "quiet"},
    "optim": set[str](),
}


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    steps: int = 10_000
    """Optimiser updates in the whole run. May be raised when a run is resumed."""
    batch_size: int = 64
    """Rows per step over all processes and micro-batches; an objective may take several rows of a stream for each."""
    grad_accum_steps: int = 1
    """Micro-batches a process cuts its rows into, to save memory. The gradient stays that of the whole batch."""
    seed: int = 0
    """Everything random follows from it."""
    device: Device = "auto"
    """Where to train; auto takes CUDA, then MPS, then the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is mixed precision: fp32 weights, bf16 matrix products. auto is bf16 where the GPU or CPU
    has instructions for it, else fp32."""
    compile: bool = False
    """Compile the objective: minutes at the start, faster steps afterwards."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which evaluations then use; e.g. 0.9999."""
    checkpoint_every: int = 1000
    """Steps between checkpoints. The last step always leaves one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    eval_every: int = 1000
    """Steps between evaluations. The last step is always evaluated."""
    log_every: int = 10
    """Steps between points in TensorBoard, and between reads of the losses from a GPU. metrics.jsonl has every step."""
    workers: int = 2
    """Threads that prepare the next batches; 0 prepares them between the steps."""
    max_seconds: float | None = None
    """Stop cleanly, with a checkpoint, once this invocation has trained that long. The same command continues."""
    max_bad_steps: int = 3
    """Stop after this many updates in a row were skipped because the loss or the gradient was not finite."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""
    quiet: bool = False
    """No progress display; warnings are still printed."""

    def check(self) -> None:
        """Raise UserError for a value that cannot be meant."""
        for name in ("steps", "batch_size", "grad_accum_steps", "checkpoint_every", "keep_checkpoints", "eval_every"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("log_every", "max_bad_steps"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _require(self.workers >= 0, "train.workers", self.workers, "0 or more")
        _require(self.ema is None or 0 <= self.ema < 1, "train.ema", self.ema, "None or in [0, 1)")
        seconds = self.max_seconds
        _require(seconds is None or seconds > 0, "train.max_seconds", seconds, "None or more than 0")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    name: Literal["adamw", "adafactor"] = "adamw"
    """adafactor keeps one moment in full and the other factored: a third less memory for the optimiser."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.96)
    """Decay of the first and the second moment. For adafactor the second is the cap of its rising decay."""
    eps: float = 1e-8
    """Added to the root of the second moment (adamw)."""
    weight_decay: float = 0.045
    """Decoupled, scaled by the learning rate; spares parameters of fewer than two dimensions."""
    max_grad_norm: float | None = 3.0
    """Largest norm of the gradient over all parameters; longer ones are scaled down to it."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from zero to its peak."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up."""
    final_lr: float = 0.0
    """Where the cosine ends, as a share of the peak."""

    def check(self) -> None:
        """Raise UserError for a value that cannot be meant."""
        _require(self.lr > 0, "optim.lr", self.lr, "more than 0")
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "in [0, 1)")
        _require(self.eps >= 0, "optim.eps", self.eps, "0 or more")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "optim.max_grad_norm",
            self.max_grad_norm,
            "None or more than 0",
        )
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        _require(0 <= self.final_lr <= 1, "optim.final_lr", self.final_lr, "a share in [0, 1]")


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}; it must be {wanted}.")


def describe(train: TrainConfig, optim: OptimConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint remembers of its run, to be compared on resume."""
    return {"train": asdict(train), "optim": asdict(optim), "identity": dict(identity)}


def check_same(now: Mapping[str, Any], then: Mapping[str, Any], *, where: object) -> None:
    """Refuse to resume with a field that would change the losses.

    ``now`` and ``then`` are what :func:`describe` returned, read back from JSON. Fields that only one side knows
    (added or removed by another release) are ignored.

    Raises:
        UserError: names every field that differs.
    """
    changes = []
    for section, free in (*MAY_CHANGE.items(), ("identity", set[str]())):
        before, after = then.get(section, {}), now.get(section, {})
        for name in sorted(before.keys() & after.keys() - free):
            if before[name] != after[name]:
                label = name if section == "identity" else f"{section}.{name}"
                changes.append(f"{label} ({before[name]!r} then, {after[name]!r} now)")
    if changes:
        mend = "Set the old values to continue, or train into another folder."
        raise UserError(f"{where} was trained with other settings: {', '.join(changes)}. {mend}")
