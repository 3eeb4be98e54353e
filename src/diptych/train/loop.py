"""The training loop, the only one there is. It knows an objective by :class:`diptych.train.objective.Objective` alone.

:func:`train` prepares a run, :func:`_loop` is the loop, :class:`_Run` does what happens between steps.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from torch import nn

from diptych.data.batch import count_rows
from diptych.data.streams import BatchFn, BatchSampler, prefetch
from diptych.errors import Interrupted, SignalWatch, UserError
from diptych.nn.inference import eval_mode
from diptych.train import checkpoint
from diptych.train.checkpoint import BestWeights, Ema, ShardWriter, TrainProgress, TrainState
from diptych.train.config import OptimConfig, TrainConfig, check_same, describe
from diptych.train.distributed import Devices
from diptych.train.logging import Measured, RunLogger
from diptych.train.objective import Objective
from diptych.train.pace import FIRST_ESTIMATE, Pace, StageCost
from diptych.train.step import TrainStep


class StopReason(IntEnum):
    """Why training ends. Where processes have different reasons, all act on the largest."""

    TIME_LIMIT = 1
    """``train.max_seconds`` have passed."""
    FINISHED = 2
    """All steps are done."""
    NOTHING_LEFT = 3
    """A hook said that further steps cannot change the result."""
    SIGINT = 4
    """Ctrl-C."""
    SIGTERM = 5

    @property
    def is_signal(self) -> bool:
        return self in (StopReason.SIGINT, StopReason.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """An evaluation every so many steps and after the last: scores, sample images."""

    every: int
    """Steps between two calls."""
    run: Callable[[int, nn.Module], Mapping[str, Measured]]
    """(finished steps, objective) to numbers for metrics.jsonl and images for TensorBoard. The objective is unwrapped,
    in evaluation mode and, if the run keeps a moving average, has the averaged weights. Called on the main process
    only, without gradients."""
    stop_early: Callable[[int], bool] | None = None
    """(finished steps) to whether further steps cannot change the result of the run, which then ends as finished; None
    never ends it. Called on the main process only, after ``run`` and again when the run is resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended. The objective holds the last weights."""

    step: int
    """Finished steps."""
    stop: StopReason
    """Why it ended. Signals raise :class:`Interrupted` instead."""
    seconds: float
    """Time trained, all invocations together."""
    ema: Ema | None = None
    """The moving average of the weights, if the run keeps one."""

    @property
    def finished(self) -> bool:
        """False if ``train.max_seconds`` ended the run, so that the same command would continue it."""
        return self.stop is not StopReason.TIME_LIMIT

    def with_best(self, best: BestWeights | None, objective: nn.Module) -> "TrainResult":
        """The result after ``objective`` was given the weights of ``best``, if any, in the place of its own."""
        if best is None:
            return self
        if best.score is not None:
            best.load_into(objective)
        return replace(self, ema=None)

    @contextmanager
    def eval_mode(self, objective: nn.Module) -> Iterator[None]:
        """Inside, ``objective`` is as hooks see it: evaluation mode, averaged weights if any, no gradients."""
        with self.ema.swapped_in() if self.ema else nullcontext(), eval_mode(objective):
            yield


def train(
    objective: Objective,
    batches: BatchFn,
    *,
    out: Path,
    train: TrainConfig,
    optim: OptimConfig,
    hooks: Sequence[Hook] = (),
    title: str = "training",
    identity: Mapping[str, Any] | None = None,
    pace: Pace | None = None,
    report: Callable[[str], object] | None = None,
) -> TrainResult:
    """Train ``objective`` on ``batches`` in the run folder ``out``, from its newest checkpoint if there is one.

    ``batches(step, rank, world)`` is pure, and the global generators (dropout) are seeded anew at each step: so a
    resumed run is, on a CPU, bit for bit the uninterrupted one. ``identity`` is whatever else decides the losses (the
    recipe's other fields, as JSON values); resuming with another one is refused. ``pace`` knows what follows this
    training in its run, and under a budget corrects the number of steps. ``report`` writes the report of the run, given
    a sentence on how far it is: after evaluations and checkpoints, where it costs little, and at the end, whatever
    ended the training.

    Raises:
        UserError: settings that are invalid, that differ from the run's, or that do not train (losses that are not
            finite); a full disk; another process died.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
    """
    train.check()
    optim.check()
    train = replace(train)  # a copy, whose number of steps a budget may change
    devices = Devices(device=train.device, precision=train.precision)
    _check_rows(train, objective, world=devices.world)
    update = TrainStep(objective, train=train, optim=optim, devices=devices)
    run = _Run(
        objective=objective,
        folder=out / "checkpoints",
        train=train,
        hooks=hooks,
        devices=devices,
        state=TrainState(update.placed, update.optimizer, update.ema),
        settings=json.loads(json.dumps(describe(train, optim, identity or {}))),
        pace=pace or Pace(cost=StageCost(name=title, steps=train.steps)),
        report=_Report(report if devices.is_main else None),
        shards=ShardWriter(devices),
    )
    progress, messages = run.restore()
    run.pace.begin(progress.step, progress.seconds, train)
    run = replace(run, start=progress)
    epoch_steps = batches.epoch_steps if isinstance(batches, BatchSampler) else None
    with (
        RunLogger(
            out,
            title=title,
            start=progress,
            train=train,
            pace=run.pace,
            is_main=devices.is_main,
            epoch_steps=epoch_steps,
        ) as logger,
        SignalWatch() as signals,
    ):
        for message in messages:
            logger.say(message)
        try:
            progress, stop = _loop(run, update, batches, logger=logger, signals=signals)
            run.shards.finish()
        except RuntimeError as error:
            if not devices.lost_another(error):
                raise
            raise UserError(
                "another process of this run has died: its reason is above, or in the output of its machine. "
                "The same command continues from the newest checkpoint."
            ) from error
        finally:
            run.report.write(logger, train, finished=True)
    if stop.is_signal:
        raise Interrupted(signal.Signals[stop.name], step=progress.step)
    return TrainResult(step=progress.step, stop=stop, seconds=progress.seconds, ema=run.state.finish())


def _check_rows(train: TrainConfig, objective: Objective, *, world: int) -> None:
    """Raise UserError if the batch cannot be cut into a micro-batch for each process and accumulation step, or if the
    settings cannot be combined."""
    if train.batch_size % (world * train.grad_accum_steps):
        raise UserError(
            f"train.batch_size is {train.batch_size}; it must be a multiple of the number of processes "
            f"({world}) times train.grad_accum_steps ({train.grad_accum_steps})."
        )
    if train.compile and train.parallel == "fsdp" and world > 1:
        raise UserError("train.compile cannot be combined with train.parallel fsdp: leave out one of them.")
    if train.batch_size < 2 and objective.couples_rows:
        raise UserError(
            "train.batch_size is 1, but this objective compares the rows of a batch with one another and would learn "
            "nothing: give 2 or more."
        )
    if train.grad_accum_steps > 1 and objective.couples_rows:
        raise UserError(
            f"train.grad_accum_steps is {train.grad_accum_steps}, but this objective compares all rows of a batch; "
            "set objective.chunk instead, which saves memory and leaves the gradient as it is."
        )


def _loop(
    run: "_Run", update: TrainStep, batches: BatchFn, *, logger: RunLogger, signals: SignalWatch
) -> tuple[TrainProgress, StopReason]:
    """Train from ``run.start`` on until there is a reason to stop; return how far it came, and the reason."""
    progress = run.start
    if run.run_missed_hooks(progress, logger):
        return progress, StopReason.NOTHING_LEFT
    began = time.monotonic()
    stop: StopReason | None = None if progress.step < run.train.steps else StopReason.FINISHED
    while stop is None:  # once, and again where a budget has changed the number of steps
        progress, stop = _steps(run, update, batches, progress=progress, began=began, logger=logger, signals=signals)
    return progress, stop


class _Report:
    """Writes the report of a run, and takes care that this takes little of its time."""

    _SHARE = 0.02  # largest share of the time

    def __init__(self, write: Callable[[str], object] | None) -> None:
        self._write, self._next = write, 0.0

    def write(self, logger: RunLogger, train: TrainConfig, *, finished: bool = False) -> None:
        """Write it, if it is time to or the training has ended."""
        began = time.monotonic()
        if self._write is None or (began < self._next and not finished) or logger.steps_done == 0:
            return
        logger.flush()
        self._write(f"step {logger.steps_done:,} of {train.steps:,}")
        self._next = time.monotonic() + (time.monotonic() - began) / self._SHARE


def _steps(
    run: "_Run",
    update: TrainStep,
    batches: BatchFn,
    *,
    progress: TrainProgress,
    began: float,
    logger: RunLogger,
    signals: SignalWatch,
) -> tuple[TrainProgress, StopReason | None]:
    """Steps until there is a reason to stop, which is None where the number of steps has been changed.

    ``began`` is when this invocation made its first step, by ``time.monotonic()``.
    """
    train, devices = run.train, run.devices
    steps = range(progress.step, train.steps)
    supply = prefetch(
        batches, steps, rank=devices.rank, world=devices.world, device=devices.device, workers=train.workers
    )
    with closing(supply):
        for step, batch in zip(steps, supply, strict=True):
            result = update(step, batch)
            seconds = time.monotonic() - began
            progress = TrainProgress(step=step + 1, seconds=run.start.seconds + seconds)
            logger.step(progress, result, rows=count_rows(batch) * devices.world)
            changed = run.pace.after_step(progress.step, train)

            # Reading a loss from a GPU waits for it, so losses are read, and stop reasons exchanged, only every
            # `log_every` steps.
            reading = not devices.waits or run.is_due(train.log_every, after=progress.step)
            reason = run.reason_to_stop(progress, seconds, signals) if reading or devices.world == 1 else None
            due = [hook for hook in run.hooks if run.is_due(hook.every, after=progress.step)]
            saving = reason is not None or run.is_due(train.checkpoint_every, after=progress.step)
            if reading or saving or due:
                logger.read()

            # The checkpoint comes first: a resume then makes up for an evaluation that was killed.
            if saving:
                run.save(progress, logger)
            if due and not (reason and reason.is_signal) and run.evaluate(due, progress, logger):
                reason = StopReason.NOTHING_LEFT
                if not saving:
                    run.save(progress, logger)
            if reason is not None:
                return progress, reason
            if saving or due:
                run.report.write(logger, train)
            if progress.step - run.start.step == FIRST_ESTIMATE:
                logger.estimate(progress.step)
            if changed:
                return progress, None
    return progress, StopReason.FINISHED


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What happens around the steps of a run: resuming, checkpoints, hooks, reasons to stop.

    It keeps no count of its own: the loop hands in the progress.
    """

    objective: Objective
    folder: Path
    """The folder of the checkpoints."""
    train: TrainConfig
    hooks: Sequence[Hook]
    devices: Devices
    state: TrainState
    settings: dict[str, Any]
    """What a resume is compared with, as JSON values."""
    pace: Pace
    report: _Report
    shards: ShardWriter
    start: TrainProgress = field(default_factory=TrainProgress)
    """What this invocation began with."""

    def restore(self) -> tuple[TrainProgress, list[str]]:
        """Resume from the newest undamaged checkpoint, if any; return its progress, and messages for the user."""
        found, messages = checkpoint.newest(self.folder)
        if found is None:
            return TrainProgress(), messages
        check_same(self.settings, found.state["settings"], where=self.folder.parent)
        self.state.load(found)
        progress = TrainProgress(**found.state["progress"])
        self.devices.wait()
        if self.devices.is_main:
            checkpoint.forget_after(self.folder, progress.step)
        return progress, [*messages, f"continuing after step {progress.step}"]

    def save(self, progress: TrainProgress, logger: RunLogger) -> None:
        """Write a checkpoint, after the lines of metrics.jsonl that it counts on.

        All processes wait for it, except for a sharded one, which is written while the training goes on.
        """
        if self.devices.is_main:
            logger.flush(to_disk=True)
            progress = replace(progress, bad_steps=logger.bad_steps)
        named: dict[str, Any] = {
            "step": progress.step,
            "state": {"progress": asdict(progress), "settings": self.settings},
            "keep": self.train.keep_checkpoints,
        }
        if self.state.placed.parts:
            self.shards.save(self.folder, tensors=self.state.spread(), **named)
        else:
            if self.devices.is_main:
                checkpoint.save(self.folder, tensors=self.state.tensors(), **named)
            self.devices.wait()

    def is_due(self, every: int, *, after: int) -> bool:
        """Whether something that happens every so many steps, and after the last, happens after step ``after``."""
        return after % every == 0 or after == self.train.steps

    def reason_to_stop(self, progress: TrainProgress, seconds: float, signals: SignalWatch) -> StopReason | None:
        """Why no further step is to be made, the same on all processes; None to go on."""
        reason = None
        if signals.pending:
            reason = StopReason[signal.Signals(signals.pending).name]
        elif progress.step == self.train.steps:
            reason = StopReason.FINISHED
        elif self.train.max_seconds is not None and seconds >= self.train.max_seconds:
            reason = StopReason.TIME_LIMIT
        agreed = self.devices.agree(reason or 0)
        return StopReason(agreed) if agreed else None

    def run_missed_hooks(self, progress: TrainProgress, logger: RunLogger) -> bool:
        """Run the hooks of an evaluation that was killed after its checkpoint; return whether a hook stops early."""
        if progress.step == 0:
            return False
        if self.devices.agree(int(not logger.evaluated)):
            due = [hook for hook in self.hooks if self.is_due(hook.every, after=progress.step)]
            return bool(due) and self.evaluate(due, progress, logger)
        return self._stops_early(self.hooks, progress)

    def evaluate(self, hooks: Sequence[Hook], progress: TrainProgress, logger: RunLogger) -> bool:
        """Call ``hooks`` on the main process while the others wait; return whether one of them stops early."""
        began = time.monotonic()
        with self.state.as_evaluated(keep=self.devices.is_main):
            if self.devices.is_main:
                numbers: dict[str, Measured] = {}
                with eval_mode(self.objective):
                    for hook in hooks:
                        numbers |= hook.run(progress.step, self.objective)
                logger.evaluation(progress, numbers, seconds=time.monotonic() - began)
        return self._stops_early(hooks, progress)

    def _stops_early(self, hooks: Sequence[Hook], progress: TrainProgress) -> bool:
        """Whether one of ``hooks`` stops early: the answer of the main process, on all of them."""
        asked = [hook.stop_early for hook in hooks if hook.stop_early is not None]
        stops = self.devices.is_main and any(stop_early(progress.step) for stop_early in asked)
        return bool(self.devices.agree(int(stops)))
