"""The settings of a training that all recipes share, and which of them a resume may change."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from diptych.errors import UserError
from diptych.nn.inference import Device, Precision

MAY_CHANGE = {
    # Settings that a resume may change. `steps` moves the end of the cosine; `grad_accum_steps`, `device` and `compile`
    # change the rounding of sums, and a resume on other hardware wants to set them, as it does `parallel` and
    # `shard_group`. No loss depends on the others.
    "train": {
        "steps",
        "epochs",
        "grad_accum_steps",
        "device",
        "compile",
        "checkpoint_every",
        "keep_checkpoints",
        "eval_every",
    }
    | {"log_every", "workers", "max_seconds", "max_bad_steps", "tensorboard", "quiet"}
    | {"parallel", "shard_group", "checkpoint_activations"},
    "optim": set[str](),
}


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Settings of the training loop."""

    steps: int = 10_000
    """Number of optimizer updates in the whole run. It may be raised when a run is resumed. `train.epochs` counts
    passes over the data instead."""
    epochs: float | None = None
    """Number of passes over the data, in the place of `steps`: over the pairs (ITIT, dual encoders), of which an ITIT
    step takes two for each row of its batch; the labelled images or target features (UML); the images or texts. Where
    it makes fewer steps than the recipe has, warm-up, intervals and starts keep their shares. None: `steps` decides."""
    batch_size: int = 64
    """Number of rows per step, over all processes and micro-batches. An objective may take several rows of a stream
    for each of them."""
    grad_accum_steps: int = 1
    """Number of micro-batches that each process cuts its rows into, to save memory. The gradient stays that of the
    whole batch."""
    seed: int = 0
    """Seed of all random numbers: initial weights, order of the data, augmentation, noise, dropout."""
    device: Device = "auto"
    """Device to train on; auto takes CUDA, then MPS, then the CPU."""
    precision: Precision = "auto"
    """Number format of matrix products. bf16 is mixed precision: fp32 weights, bf16 products. auto is bf16 where the
    GPU or CPU has instructions for it, else fp32."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Where several processes keep the weights, gradients and moments: ddp keeps all of them in each process; fsdp
    gives each a part, which leaves more memory for larger networks and sends more over the network. One process keeps
    everything in either case."""
    shard_group: int | None = None
    """Number of processes that share one copy of the weights under fsdp, e.g. those of a node, whose links are faster
    than those between nodes; it divides the number of processes. None: all share one copy."""
    checkpoint_activations: bool = False
    """Whether the backward pass computes the activations of each block once more instead of keeping them: less memory,
    about a third more time, the same losses."""
    compile: bool = False
    """Whether to compile the objective: minutes at the start, faster steps afterwards."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the weights, which evaluations then use, e.g. 0.9999; None
    keeps no average."""
    checkpoint_every: int = 1000
    """Number of steps between checkpoints. The last step always leaves one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that stay on disk."""
    eval_every: int = 1000
    """Number of steps between evaluations. The last step is always evaluated."""
    log_every: int = 10
    """Number of steps between points in TensorBoard, and between reads of the losses from a GPU. metrics.jsonl has
    every step."""
    workers: int = 2
    """Number of threads that prepare the next batches; 0 prepares each batch between the steps."""
    max_seconds: float | None = None
    """Time in seconds after which this invocation stops, with a checkpoint; the same command continues. None sets no
    limit."""
    max_bad_steps: int = 3
    """Number of updates in a row, skipped because the loss or the gradient was not finite, that stops the run."""
    tensorboard: bool = True
    """Whether to write TensorBoard event files beside metrics.jsonl."""
    quiet: bool = False
    """Whether to show no progress; warnings are still printed."""

    def check(self) -> None:
        """Raise UserError for an invalid value."""
        for name in ("steps", "batch_size", "grad_accum_steps", "checkpoint_every", "keep_checkpoints", "eval_every"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("log_every", "max_bad_steps"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _require(self.workers >= 0, "train.workers", self.workers, "0 or more")
        _require(
            self.shard_group is None or self.shard_group >= 1,
            "train.shard_group",
            self.shard_group,
            "None or 1 or more",
        )
        _require(self.ema is None or 0 <= self.ema < 1, "train.ema", self.ema, "None or in [0, 1)")
        _require(self.epochs is None or self.epochs > 0, "train.epochs", self.epochs, "None or more than 0")
        seconds = self.max_seconds
        _require(seconds is None or seconds > 0, "train.max_seconds", seconds, "None or more than 0")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Settings of the optimizer and the learning rate."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """Optimizer. adafactor keeps one moment in full and the other factored: a third less memory than adamw."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.96)
    """Decays per step of the first and the second moment. For adafactor the second caps a decay that rises."""
    eps: float = 1e-8
    """Number that is added to the root of the second moment (adamw)."""
    weight_decay: float = 0.045
    """Share of a weight that decays per step at a learning rate of 1. Parameters of fewer than two dimensions do not
    decay."""
    max_grad_norm: float | None = 3.0
    """Largest norm of the gradient over all parameters; a longer gradient is scaled down to it. None never scales."""
    warmup_steps: int = 100
    """Number of steps over which the learning rate rises linearly from zero to its peak."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""

    def check(self) -> None:
        """Raise UserError for an invalid value."""
        _require(self.lr > 0, "optim.lr", self.lr, "more than 0")
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "in [0, 1)")
        _require(self.eps >= 0, "optim.eps", self.eps, "0 or more")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        norm = self.max_grad_norm
        _require(norm is None or norm > 0, "optim.max_grad_norm", norm, "None or more than 0")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        _require(0 <= self.final_lr <= 1, "optim.final_lr", self.final_lr, "a share in [0, 1]")


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}; it must be {wanted}.")


def describe(train: TrainConfig, optim: OptimConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, by section: what a checkpoint stores and :func:`check_same` compares on resume."""
    return {"train": asdict(train), "optim": asdict(optim), "identity": dict(identity)}


FILES = "the files of the data"
"""Name, in the identity of a run, of a digest of its data; see data/check.py."""


def check_same(now: Mapping[str, Any], then: Mapping[str, Any], *, where: object) -> None:
    """Refuse to resume with a setting that would change the losses.

    ``now`` and ``then`` are results of :func:`describe`, read back from JSON. Settings that only one side has (added or
    removed by another release) are ignored, except inside a value of ``identity``.

    Raises:
        UserError: names every setting that differs, or says that the data was edited.
    """
    changes = []
    for section, free in (*MAY_CHANGE.items(), ("identity", set[str]())):
        before, after = then.get(section, {}), now.get(section, {})
        for name in sorted(before.keys() & after.keys() - free):
            label = name if section == "identity" else f"{section}.{name}"
            changes += _changes(label, before[name], after[name])
    if len(changes) == 1 and changes[0].startswith(FILES):
        mend = "Bring the old files back to continue, or train into another folder."
        raise UserError(f"{where}: images, captions or labels of its data have changed since it was trained. {mend}")
    if changes:
        mend = "Set the old values to continue, or train into another folder."
        raise UserError(f"{where} was trained with other settings: {', '.join(changes)}. {mend}")


def _changes(name: str, before: Any, after: Any) -> list[str]:
    """A phrase for each value that differs, nested ones with a dotted name."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = sorted(before.keys() | after.keys())
        return [each for key in names for each in _changes(f"{name}.{key}", before.get(key), after.get(key))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [each for place, (old, new) in pairs for each in _changes(f"{name}[{place}]", old, new)]
    return [] if before == after else [f"{name} ({_short(before)} then, {_short(after)} now)"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... {len(text)} characters"
