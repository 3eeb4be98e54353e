"""How long a run takes: the estimate of what is left, and the budget of minutes that its stages share.

A run has stages (image tokenizer, text encoder, network), and a stage takes steps. `StageCost` gives the cost of a step
of each relative to the others, measured once for each recipe. How fast the machine is, is measured on it: at the first
steps of a stage for the estimate, and by trial steps ahead of the stage for a budget. `Budget` divides the minutes that
are left among the stages that are left, and sets steps, warm-up and intervals of the next one; `Pace` corrects the
number of steps while the stage trains. Every decision is a line in the run folder, so that a resumed run follows those
of the interrupted one.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast, runtime_checkable

from diptych.data.streams import BatchFn, BatchSampler
from diptych.errors import UserError
from diptych.io import write_bytes
from diptych.report.terminal import WholeBar
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import Devices, is_main_process
from diptych.train.objective import Objective
from diptych.train.step import TrainStep

FIRST_ESTIMATE = 10
"""Number of steps after which the time that is left is estimated."""
FEW_STEPS = 400
"""Number of steps below which a budget calls for a smaller network."""
_LEAST_STEPS = 200
"""Number of steps that a stage should have: if there is no time for them, its batches are made smaller."""
_TOO_FEW = 60
"""Number of steps with which hardly anything is learned."""
_LEAST_ROWS = 8
"""Number of rows below which no batch is made."""
_REVIEWS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Shares of a stage after which the number of its steps is corrected."""
_LEAST_OF_PLAN = 0.25
"""Smallest share of the planned steps that is made, however slow the machine becomes."""
_RESERVE = 0.08
"""Share of the minutes that is kept for what follows the last step: scores, samples, the report."""
MOST_GROWTH = 4.0
"""Largest factor by which a budget raises the number of steps of a stage."""
_LEAST_SHARE = 0.06
"""Share of the minutes that each stage has at least."""
_TRIAL_SECONDS = 5.0
"""Largest number of seconds that trial steps take where no budget limits them."""
_TRIAL_SHARE = 0.06
"""Largest share of a stage's time that its trial steps take, two steps apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What the steps of a stage cost, in a unit that all stages of a run share."""

    name: str
    steps: int
    """Number of steps."""
    step_cost: float = 1.0
    """Cost of a step."""
    slow_from: int = 0
    """First step of those that cost ``slow_cost``, such as those with cycles."""
    slow_cost: float | None = None
    """Cost of the later steps; None where all cost the same."""

    def between(self, begin: int, end: int) -> float:
        """Cost of the steps from ``begin`` up to, and without, ``end``."""
        slow_cost = self.step_cost if self.slow_cost is None else self.slow_cost
        fast = max(0, min(end, self.slow_from) - begin)
        return fast * self.step_cost + max(0, end - begin - fast) * slow_cost

    @property
    def all(self) -> float:
        """Cost of all steps."""
        return self.between(0, self.steps)


# One stage while it trains


@dataclass(kw_only=True, slots=True)
class Pace:
    """The estimate of the time that is left, and under a budget the correction of the number of steps.

    The loop calls :meth:`begin` once and :meth:`after_step` after each step.
    """

    cost: StageCost
    """Cost of the stage."""
    later: float = 0.0
    """Cost of the stages that follow, in the same unit."""
    seconds: float | None = None
    """Time for the stage under a budget, all invocations together; None where there is no budget."""
    most: int | None = None
    """Largest number of steps that a budget gives the stage; None where there is no budget."""
    last_evaluation: float = 0.0
    """Seconds that the evaluation after the last step takes."""
    folder: Path | None = None
    """Folder for the decisions of a budget, ``pace.json``."""
    left_of_budget: Callable[[], float] | None = None
    """Seconds that are left of the whole budget."""
    show: Callable[..., object] | None = None
    """:meth:`RunPlan.show`, where one bar of the whole run takes the place of a bar of the stage."""
    _decided: dict[int, int] = field(default_factory=dict)
    _began: tuple[int, float] = (0, 0.0)
    _before: float = 0.0

    def begin(self, step: int, seconds: float, train: TrainConfig) -> None:
        """The stage goes on after ``step`` steps, which took ``seconds``. Sets ``train.steps`` as decided so far."""
        self._began, self._before = (step, time.monotonic()), seconds
        if self.show is not None:
            self.show(self.cost.name)
        if self.folder is not None and (self.folder / "pace.json").is_file():
            found = json.loads((self.folder / "pace.json").read_text())
            self._decided = {int(at): int(steps) for at, steps in found.items()}
            for at in sorted(self._decided):
                if at <= step:
                    train.steps = self._decided[at]

    def after_step(self, step: int, train: TrainConfig) -> bool:
        """Correct ``train.steps`` where it is time to; return whether it changed."""
        if self.show is not None and step >= self._began[0] + FIRST_ESTIMATE:
            self.show(self.cost.name, left=self.stage_left(step, train.steps), unit=self._unit(step))
        if self.seconds is None or step >= train.steps:
            return False
        if step not in self._decided:
            if step != FIRST_ESTIMATE and step not in {round(share * self.cost.steps) for share in _REVIEWS}:
                return False
            self._decided[step] = self._affordable(step, train.steps)
            if self.folder is not None and is_main_process():
                write_bytes(self.folder / "pace.json", (json.dumps(self._decided) + "\n").encode())
        changed, train.steps = self._decided[step] != train.steps, self._decided[step]
        return changed

    def stage_left(self, step: int, steps: int) -> float | None:
        """Seconds that the rest of the stage takes at the speed of this invocation; None before the first step."""
        unit = self._unit(step)
        return None if unit is None else unit * self.cost.between(step, steps)

    def all_left(self, step: int, steps: int) -> float | None:
        """Seconds that the rest of the whole run takes; None before the first step."""
        stage, unit = self.stage_left(step, steps), self._unit(step)
        if stage is None or unit is None:
            return None
        return stage + unit * self.later if self.left_of_budget is None else max(0.0, self.left_of_budget())

    def _unit(self, step: int) -> float | None:
        """Seconds for a cost of 1, evaluations and checkpoints included."""
        first, began = self._began
        return (time.monotonic() - began) / self.cost.between(first, step) if step > first else None

    def _affordable(self, step: int, steps: int) -> int:
        """Number of steps in all that fit into the seconds of the stage."""
        unit = self._unit(step)
        assert unit is not None
        assert self.seconds is not None
        left = self.seconds - self.last_evaluation - self._before - (time.monotonic() - self._began[1])
        fits = step
        if self.cost.slow_from > step:
            fast = min(self.cost.slow_from - step, max(0, int(left / (unit * self.cost.step_cost))))
            fits, left = step + fast, left - fast * unit * self.cost.step_cost
        if fits >= self.cost.slow_from:
            fits += max(0, int(left / (unit * self.cost.between(fits, fits + 1))))
        # A correction is no new plan: a machine that is busy for a minute must not end the stage.
        least = max(steps // 2, round(_LEAST_OF_PLAN * self.cost.steps))
        return max(step + 1, min(max(fits, least), 2 * steps, self.most or 2 * steps))


# The budget of a run


@runtime_checkable
class Stage(Protocol):
    """A dataclass with the settings of a training, and what else depends on its number of steps."""

    train: TrainConfig
    optim: OptimConfig
    slow_field: ClassVar[str | None]
    """Field of ``objective`` that holds the first of the slow steps, as a number of steps; None where there is none."""

    @property
    def slow_from(self) -> int:
        """First step of those that take longer than the first ones."""


S = TypeVar("S", bound=Stage)


class Budget:
    """The minutes for a whole run."""

    def __init__(self, minutes: float, *, began: float | None = None) -> None:
        """``began``: when the run began, by ``time.monotonic()``; now, if not given. Raises UserError for no time."""
        if minutes <= 0:
            raise UserError(f"--minutes {minutes:g}: must be more than 0")
        self.minutes = minutes
        self._began = time.monotonic() if began is None else began
        self._before = 0.0
        self._folder: Path | None = None
        self._decisions: dict[str, Any] = {}

    @classmethod
    def for_stage(cls, seconds: float) -> "Budget":
        """A budget with ``seconds`` for a single stage, beside the reserve."""
        return cls(round(seconds / 60 / (1 - _RESERVE), 3))

    @classmethod
    def of_run(cls, out: Path, budget: "Budget | None") -> "Budget | None":
        """The budget of the run folder ``out``: ``budget``, or the one that an interrupted run was begun with.

        Raises UserError where the two differ, and for a run that was begun without one.
        """
        file = out / "budget.json"
        if not file.is_file():
            if budget is not None and (out / "checkpoints").is_dir():
                raise UserError(f"{out}: begun without --minutes: leave it away, or train into another folder")
            return budget and budget._open(out)
        found = json.loads(file.read_text())
        if budget is not None and budget.minutes != found["minutes"]:
            raise UserError(f"{out}: begun with --minutes {found['minutes']:g}: give the same, or another folder")
        budget = budget or cls(found["minutes"])
        budget._before, budget._decisions = found["seconds"], found["decisions"]
        return budget._open(out)

    def _open(self, out: Path) -> Self:
        self._folder = out
        return self

    def left(self) -> float:
        """Seconds that are left, below 0 when they are used up."""
        return 60 * self.minutes - self._before - (time.monotonic() - self._began)

    def save(self) -> None:
        """Write ``budget.json``: minutes, seconds used, and all decisions."""
        if self._folder is None or not is_main_process():
            return
        content = {"minutes": self.minutes, "seconds": 60 * self.minutes - self.left(), "decisions": self._decisions}
        write_bytes(self._folder / "budget.json", (json.dumps(content, indent=1) + "\n").encode())

    def decided(self, name: str) -> Any | None:
        """What was decided under ``name``; None if nothing was."""
        return self._decisions.get(name)

    def decision(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` decided when it was first asked, as a JSON value."""
        if name not in self._decisions:
            self._decisions[name] = make()
            self.save()
        return self._decisions[name]

    def seconds_for(self, cost: StageCost, *, later: float) -> float:
        """Seconds for a stage: its part of what is left for it and for stages of the cost ``later``, and never none."""
        left = max(1.0, self.left() - _RESERVE * 60 * self.minutes)
        return min(left, max(left * cost.all / (cost.all + later), _LEAST_SHARE * 60 * self.minutes))

    def fit_stage(
        self,
        stage: S,
        cost: StageCost,
        *,
        later: float,
        make: Callable[[S], tuple[Objective, BatchFn]],
        most: float,
        evaluation_seconds: float,
    ) -> tuple[S, float]:
        """``stage`` with as many steps as its part of the time holds, and that time in seconds.

        ``make`` gives the objective and the batches of a stage; trial steps on them are timed, and their weights are
        thrown away. Where the time is too short for 200 steps, batches are made smaller. The warm-up, the intervals,
        the moving average and the steps at which losses begin keep their shares. There are at most ``most`` times as
        many steps as before, and as many evaluations of ``evaluation_seconds`` each as a tenth of the time holds.
        """

        def decide() -> dict[str, Any]:
            seconds = self.seconds_for(cost, later=later)
            began = time.monotonic()
            rows, step = _affordable_rows(stage, make, seconds=seconds)
            seconds -= time.monotonic() - began
            evaluations = max(1, int(0.1 * seconds / evaluation_seconds)) if evaluation_seconds else None
            training = max(0.5 * seconds, seconds - evaluation_seconds * (evaluations or 0))
            steps, start = _affordable_steps(stage, step, seconds=training, most=int(most * stage.train.steps))
            return {
                "seconds": seconds,
                "steps": steps,
                "batch_size": rows,
                "start": start,
                "evaluations": evaluations,
            }

        if Devices(device=stage.train.device, precision=stage.train.precision).world > 1:
            raise UserError("--minutes is for one process: give --train.steps to several")
        found = self.decision(cost.name, decide)
        changed = shortened(stage, steps=found["steps"], batch_size=found["batch_size"], start=found["start"])
        if found["evaluations"]:
            every = max(changed.train.eval_every, -(-changed.train.steps // found["evaluations"]))
            changed = replace(changed, train=replace(changed.train, eval_every=every))  # type: ignore[type-var]
        if found["steps"] < min(_TOO_FEW, stage.train.steps):
            needed = self.minutes * _LEAST_STEPS / found["steps"]
            few = f"only {found['steps']:,} steps of {found['batch_size']} rows fit into --minutes {self.minutes:g}"
            print(
                f"{few}, too few to learn much: give about {needed:.0f}, or take a smaller recipe",
                file=sys.stderr,
                flush=True,
            )
        return changed, found["seconds"]


class RunPlan:
    """The stages of a run in their order, and its budget if it has one."""

    def __init__(
        self,
        costs: Sequence[StageCost],
        *,
        budget: Budget | None = None,
        report: Callable[[str], object] | None = None,
        unit: float = math.nan,
    ) -> None:
        """``report`` writes the report of the run, see :func:`diptych.train.loop.train`. ``unit`` is a first estimate
        of the seconds for a cost of 1."""
        self.costs, self.budget, self.report, self.unit = list(costs), budget, report, unit
        self.bar: WholeBar | None = None
        """A bar that takes the place of those of the stages, if one is given here."""

    @property
    def seconds(self) -> float:
        """Seconds that all stages take."""
        return self.unit * sum(cost.all for cost in self.costs)

    def show(self, name: str, *, left: float | None = None, unit: float | None = None) -> None:
        """Show in the bar, if there is one, that the stage ``name`` runs and takes ``left`` more seconds.

        ``left`` follows from the cost, if it is not given. ``unit`` is the seconds for a cost of 1 that were measured.
        """
        if self.bar is None:
            return
        self.unit = self.unit if unit is None else unit
        (cost,) = (cost for cost in self.costs if cost.name == name)
        self.bar.show(name, left=self.unit * cost.all if left is None else left, later=self.unit * self.later(name))

    def later(self, name: str) -> float:
        """Cost of the stages after the stage ``name``."""
        place = [cost.name for cost in self.costs].index(name)
        return sum(cost.all for cost in self.costs[place + 1 :])

    def seconds_for(self, name: str) -> float:
        """Time that the budget has for a stage."""
        assert self.budget is not None
        (cost,) = (cost for cost in self.costs if cost.name == name)
        return self.budget.seconds_for(cost, later=self.later(name))

    def too_short(
        self, name: str, stage: S, make: Callable[[S], tuple[Objective, BatchFn]], *, rows: int, instead: str
    ) -> bool:
        """Whether the budget has no time for :data:`FEW_STEPS` steps on ``rows`` rows; then ``instead`` is printed.

        ``make`` is that of :meth:`Budget.fit_stage`. Without a budget there is always time.
        """
        budget = self.budget
        if budget is None:
            return False
        rows = min(rows, stage.train.batch_size)

        def decide() -> bool:
            train = replace(stage.train, batch_size=rows, grad_accum_steps=1)
            step = training_seconds(replace(stage, train=train), make) / train.steps  # type: ignore[type-var]
            return self.seconds_for(name) < FEW_STEPS * step

        if short := budget.decision(f"{name}: too short", decide):
            few = f"fewer than {FEW_STEPS} steps on {rows} rows fit into --minutes {budget.minutes:g}"
            print(f"{few}: {instead}", file=sys.stderr, flush=True)
        return short

    def fit_stage(
        self,
        name: str,
        stage: S,
        folder: Path,
        make: Callable[[S], tuple[Objective, BatchFn]],
        *,
        most: float = MOST_GROWTH,
        evaluation_seconds: float = 0.0,
    ) -> tuple[S, Pace]:
        """The stage as it is to be trained in ``folder``, and its pace. See :meth:`Budget.fit_stage`."""
        (cost,) = (cost for cost in self.costs if cost.name == name)
        seconds, most_steps = None, None
        if stage.train.epochs is not None:
            stage.train.check()
            if self.budget is not None:
                raise UserError("--minutes and train.epochs both say how long to train: leave one of them away")
            stage = in_epochs(stage, make)
        if self.budget is not None:
            most_steps = int(most * stage.train.steps)
            stage, seconds = self.budget.fit_stage(
                stage, cost, later=self.later(name), make=make, most=most, evaluation_seconds=evaluation_seconds
            )
        cost = replace(cost, steps=stage.train.steps, slow_from=stage.slow_from)
        left = self.budget.left if self.budget is not None else None
        return stage, Pace(
            cost=cost,
            later=self.later(name),
            seconds=seconds,
            most=most_steps,
            last_evaluation=evaluation_seconds,
            folder=folder,
            left_of_budget=left,
            show=None if self.bar is None else self.show,
        )


def in_epochs(stage: S, make: Callable[[S], tuple[Objective, BatchFn]]) -> S:
    """``stage`` with the number of steps that ``train.epochs`` passes over the data of ``make`` take, rounded up.

    If these are fewer than before, what counts in steps keeps its share, as in :func:`shortened`.
    """
    _, batches = make(stage)
    assert isinstance(batches, BatchSampler)
    assert stage.train.epochs is not None
    steps = math.ceil(stage.train.epochs * batches.epoch_steps)
    if steps < stage.train.steps:
        return shortened(stage, steps=steps)
    return replace(stage, train=replace(stage.train, steps=steps))  # type: ignore[type-var]


def shortened(stage: S, *, steps: int, batch_size: int | None = None, start: int | None = None) -> S:
    """``stage`` with another number of steps and rows. What counts in steps is scaled with them.

    ``start`` is the first step of the slow ones, where it is not to keep its share.
    """
    old, new = stage.train, batch_size or stage.train.batch_size

    def scaled(count: int) -> int:
        return min(max(1, round(count * steps / old.steps)), steps)

    train = replace(
        old,
        steps=steps,
        batch_size=new,
        grad_accum_steps=old.grad_accum_steps if new == old.batch_size else 1,
        checkpoint_every=scaled(old.checkpoint_every),
        eval_every=scaled(old.eval_every),
        ema=None if old.ema is None else max(0.0, 1 - (1 - old.ema) * old.steps / steps),
    )
    warmup = scaled(stage.optim.warmup_steps) if stage.optim.warmup_steps else 0
    optim = replace(stage.optim, warmup_steps=warmup, lr=stage.optim.lr)
    changes: dict[str, Any] = {"train": train, "optim": optim}
    if stage.slow_field is not None:
        objective: Any = cast(Any, stage).objective
        if was := getattr(objective, stage.slow_field):
            first = scaled(was) if start is None else start
            changes["objective"] = replace(objective, **{stage.slow_field: min(first, steps - 1)})
    return replace(stage, **changes)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class _StepSeconds:
    """What a step takes, before the slow ones begin and with them."""

    fast: float
    slow: float

    def mean(self, stage: Stage) -> float:
        share = min(1.0, stage.slow_from / stage.train.steps)
        return share * self.fast + (1 - share) * self.slow


def _affordable_steps(stage: Stage, step: _StepSeconds, *, seconds: float, most: int) -> tuple[int, int]:
    """Number of steps that fit into ``seconds``, at most ``most``, and the first of the slow ones.

    The slow steps begin after as many steps as in the recipe, since cycles teach nothing before pairs have; but after
    nine tenths of the time at the latest.
    """
    steps = min(int(seconds / step.mean(stage)), most)
    start = round(stage.slow_from * steps / stage.train.steps)
    if start < stage.slow_from and stage.slow_field is not None:
        start = max(start, min(stage.slow_from, int(0.9 * seconds / step.fast)))
        steps = start + int((seconds - start * step.fast) / step.slow)
    return max(2, min(steps, most)), start


def _affordable_rows(
    stage: S, make: Callable[[S], tuple[Objective, BatchFn]], *, seconds: float
) -> tuple[int, _StepSeconds]:
    """Rows of a batch with which enough steps fit into ``seconds``, and the seconds that such a step takes."""
    devices = Devices(device=stage.train.device, precision=stage.train.precision)
    whole, wanted = stage.train.batch_size, min(_LEAST_STEPS, stage.train.steps)
    rows = min(whole, _LEAST_ROWS)
    step = _step_seconds(stage, make, rows=rows, devices=devices, most=_TRIAL_SHARE * seconds)
    factor = 1  # a larger batch is no slower for each row, so that times the factor is an upper bound
    while rows < whole and seconds / (2 * factor * step.mean(stage)) >= wanted:
        rows, factor = min(2 * rows, whole), 2 * factor
        if rows == whole or seconds / (2 * factor * step.mean(stage)) < wanted:
            step = _step_seconds(stage, make, rows=rows, devices=devices, most=_TRIAL_SHARE * seconds)
            factor = 1
    return rows, step


def training_seconds(stage: S, make: Callable[[S], tuple[Objective, BatchFn]]) -> float:
    """Seconds that all steps of ``stage`` take, by a few trial steps on what ``make`` gives, whose weights change."""
    devices = Devices(device=stage.train.device, precision=stage.train.precision)
    step = _step_seconds(stage, make, rows=stage.train.batch_size, devices=devices, most=_TRIAL_SECONDS)
    return stage.train.steps * step.mean(stage)


def _step_seconds(
    stage: S, make: Callable[[S], tuple[Objective, BatchFn]], *, rows: int, devices: Devices, most: float
) -> _StepSeconds:
    """Seconds of a step with ``rows`` rows; about ``most`` seconds are spent on it."""
    trial = replace(stage, train=replace(stage.train, batch_size=rows, grad_accum_steps=1))  # type: ignore[type-var]
    objective, batches = make(trial)
    update = TrainStep(objective, train=trial.train, optim=trial.optim, devices=devices)
    slow_from, steps = trial.slow_from, trial.train.steps

    def timed(first: int) -> float:
        taken: list[float] = []
        for step in range(first, min(first + 6, steps)):
            began = time.monotonic()
            batch = batches(step, devices.rank, devices.world).to(devices.device)
            update(step, batch).values.tolist()  # waits for the device
            taken.append(time.monotonic() - began)
            if len(taken) >= 2 and sum(taken) > most / 2:
                break
        return min(taken[1:] or taken)  # the first one also allocates memory

    slow = timed(min(slow_from + 1, steps - 1))
    return _StepSeconds(fast=timed(0) if 0 < slow_from < steps else slow, slow=slow)
