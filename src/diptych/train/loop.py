"""The one training loop. It knows an objective only as a module whose forward(batch, step) returns Losses."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diptych.errors import UserError
from diptych.nn.inference import eval_mode
from diptych.train import checkpoint
from diptych.train.checkpoint import Ema, TrainState
from diptych.train.config import OptimConfig, TrainConfig, check_same, describe
from diptych.train.distributed import Devices
from diptych.train.interrupt import Interrupted, SignalWatch
from diptych.train.logging import Measured, MetricsLogger, TrainProgress
from diptych.train.objective import Objective
from diptych.train.prefetch import BatchFn, count_rows, prefetch
from diptych.train.step import TrainStep

ENOUGH, TIME_IS_UP = -1, 1  # reasons to stop, as are the numbers of the signals that are watched (2, 15); 0 is none


def never(step: int) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """Something to do every so many steps and after the last: an evaluation, sample pictures."""

    every: int
    run: Callable[[int, nn.Module], Mapping[str, Measured]]
    """(finished steps, objective) to numbers for metrics.jsonl and pictures for TensorBoard. The objective is
    unwrapped, in evaluation mode and, if the run keeps a moving average, computes with it. Called on the first process
    only, without gradients."""
    over: Callable[[int], bool] = never
    """(finished steps) to whether further steps cannot change what the run leaves: it then ends there, finished. Asked
    on the first process only, after ``run``; a resume asks again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended. The objective holds the last weights."""

    step: int
    """Finished steps."""
    finished: bool
    """False when ``max_seconds`` ended the run before its last step, and before a hook said that it is over."""
    seconds: float
    """Time trained, all invocations together."""
    ema: Ema | None = None

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
) -> TrainResult:
    """Train ``objective`` on ``batches`` in the run folder ``out``, from its newest checkpoint if there is one.

    ``batches(step, rank, world)`` is pure, and the global generators (dropout) are seeded anew at each step: so a
    resumed run is, on a CPU, bit for bit the uninterrupted one. ``identity`` is whatever else decides the losses (the
    recipe's other fields, as JSON values); resuming with another one is refused.

    Raises:
        UserError: settings that cannot be, that differ from the run's, or that do not train (losses that are not
            finite); a full disk.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
    """
    train.check()
    optim.check()
    devices = Devices(device=train.device, precision=train.precision)
    if train.batch_size % (devices.world * train.grad_accum_steps):
        raise UserError(
            f"train.batch_size is {train.batch_size}; it must be a multiple of the number of processes "
            f"({devices.world}) times train.grad_accum_steps ({train.grad_accum_steps})."
        )
    if train.grad_accum_steps > 1 and objective.couples_rows:
        raise UserError(
            f"train.grad_accum_steps is {train.grad_accum_steps}, but this objective compares all rows of a batch; "
            "set objective.chunk instead, which saves memory and leaves the gradient as it is."
        )
    with ExitStack() as stack:
        run = _Run(objective, out=out, train=train, optim=optim, hooks=hooks, devices=devices, identity=identity or {})
        return run.go(batches, title, stack)


class _Run:
    def __init__(
        self,
        objective: Objective,
        *,
        out: Path,
        train: TrainConfig,
        optim: OptimConfig,
        hooks: Sequence[Hook],
        devices: Devices,
        identity: Mapping[str, Any],
    ) -> None:
        self.objective, self.train, self.hooks, self.devices, self.out = objective, train, hooks, devices, out
        self.folder = out / "checkpoints"
        self.settings = json.loads(json.dumps(describe(train, optim, identity)))
        self.update = TrainStep(objective, train=train, optim=optim, devices=devices)
        self.state = TrainState(objective, self.update.optimizer, self.update.ema)
        self.at, self.over = TrainProgress(), False

    def go(self, batches: BatchFn, title: str, stack: ExitStack) -> TrainResult:
        """Restore, train, and tell how it ended. What must be closed is left to ``stack``."""
        lines = self._restore()
        self.journal = stack.enter_context(
            MetricsLogger(self.out, title=title, at=self.at, train=self.train, first=self.devices.first)
        )
        for line in lines:
            self.journal.say(line)
        signals = stack.enter_context(SignalWatch())
        reason = self._train(batches, signals)
        if reason > TIME_IS_UP:
            raise Interrupted(reason, step=self.at.step)
        return self._result()

    def _result(self) -> TrainResult:
        finished = self.over or self.at.step >= self.train.steps
        return TrainResult(step=self.at.step, finished=finished, seconds=self.at.seconds, ema=self.update.ema)

    def _restore(self) -> list[str]:
        """Continue from the newest sound checkpoint, if any; return what the person should be told."""
        found, lines = checkpoint.newest(self.folder)
        if found is None:
            return lines
        check_same(self.settings, found.state["settings"], where=self.out)
        self.state.load(found)
        self.at = TrainProgress(**found.state["standing"])
        self.devices.wait()
        if self.devices.first:
            checkpoint.forget_after(self.folder, self.at.step)
        return [*lines, f"continuing after step {self.at.step}"]

    def _train(self, batches: BatchFn, signals: SignalWatch) -> int:
        """Step until the end or a reason to stop before it; return the reason, 0 at the end."""
        self.began, before = time.monotonic(), self.at.seconds
        if self.devices.agree(int(self.at.step > 0 and not self.journal.evaluated)):
            self._run_hooks()
        elif self.at.step > 0:
            self._ask_hooks(self.hooks)
        if self.over:
            return ENOUGH
        devices, workers = self.devices, self.train.workers
        steps = range(self.at.step, self.train.steps)
        supply = prefetch(
            batches, steps, rank=devices.rank, world=devices.world, device=devices.device, workers=workers
        )
        with closing(supply):
            for batch in supply:
                outcome = self.update(self.at.step, batch)
                self.at.step += 1
                self.at.seconds = before + time.monotonic() - self.began
                self.journal.note(outcome, rows=count_rows(batch) * devices.world)
                if reason := self._settle(signals):
                    return reason
        return 0

    def _settle(self, signals: SignalWatch) -> int:
        """What follows a step: reading its numbers, checkpoint, evaluation. Returns a reason to stop, or 0.

        The checkpoint comes first, so that nothing is lost should the evaluation be killed; a resume makes up for it.
        """
        last = self.at.step == self.train.steps
        # On a CPU the numbers are there; from a GPU they are fetched now and then.
        reading = last or not self.devices.waits or self._due(self.train.log_every)
        reason = self._reason_to_stop(signals) if reading or self.devices.world == 1 else 0
        saving = last or reason != 0 or self._due(self.train.checkpoint_every)
        if reading or saving:
            self.journal.read()
        if saving:
            self._save()
        if reason <= TIME_IS_UP:
            self._run_hooks()
        if self.over and not saving:
            self._save()
        return reason or (ENOUGH if self.over else 0)

    def _due(self, every: int) -> bool:
        return self.at.step % every == 0

    def _reason_to_stop(self, signals: SignalWatch) -> int:
        """A signal's number, TIME_IS_UP or 0; the same on all processes."""
        limit = self.train.max_seconds
        late = limit is not None and time.monotonic() - self.began >= limit
        return self.devices.agree(signals.pending or (TIME_IS_UP if late else 0))

    def _save(self) -> None:
        if self.devices.first:
            self.journal.flush(to_disk=True)
            state = {"standing": asdict(self.at), "settings": self.settings}
            keep = self.train.keep_checkpoints
            checkpoint.save(self.folder, step=self.at.step, tensors=self.state.tensors(), state=state, keep=keep)
        self.devices.wait()

    def _run_hooks(self) -> None:
        """Run the hooks that are due after this step, on the first process; the others wait."""
        last = self.at.step == self.train.steps
        due = [hook for hook in self.hooks if last or self._due(hook.every)]
        if not due:
            return
        self.journal.read()
        if self.devices.first:
            began = time.monotonic()
            numbers: dict[str, Measured] = {}
            with self._result().eval_mode(self.objective):
                for hook in due:
                    numbers |= hook.run(self.at.step, self.objective)
            self.journal.evaluation(numbers, seconds=time.monotonic() - began)
        self._ask_hooks(due)

    def _ask_hooks(self, hooks: Sequence[Hook]) -> None:
        """All processes wait for what the first one says."""
        self.over = bool(self.devices.agree(int(self.devices.first and any(hook.over(self.at.step) for hook in hooks))))
