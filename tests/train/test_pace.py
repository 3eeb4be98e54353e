"""The time of a run: what is left of it, and a budget of minutes that decides the steps."""

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from diptych.data.batch import Batch
from diptych.data.streams import BatchSampler, Stream
from diptych.errors import UserError
from diptych.rng import StepRNG
from diptych.train import pace as module
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.loop import train
from diptych.train.objective import Losses, Objective
from diptych.train.pace import Budget, Pace, RunPlan, StageCost, shortened


class Clock:
    """Time that passes only where a test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@dataclass(kw_only=True, slots=True)
class Starts:
    cycle_start_step: int = 10


@dataclass(kw_only=True, slots=True)
class ToyStage:
    slow_field: ClassVar[str | None] = "cycle_start_step"
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, batch_size=32, workers=0, quiet=True))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(warmup_steps=10))
    objective: Starts = field(default_factory=Starts)

    @property
    def slow_from(self) -> int:
        return self.objective.cycle_start_step


class Toy(Objective):
    """A step takes 0.01 s for each row, and five times as long with cycles."""

    def __init__(self, clock: Clock, rows: int, slow_from: int) -> None:
        super().__init__()
        self.streams = {}
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.clock, self.rows, self.slow_from, self.seen = clock, rows, slow_from, []

    def forward(self, batch: Batch, step: int) -> Losses:
        self.clock.now += 0.01 * self.rows * (5 if step >= self.slow_from else 1)
        self.seen.append(step)
        return Losses(self.weight.square().sum(), {})


def batches(step: int, rank: int, world: int) -> Batch:
    return Batch(rng=StepRNG(0, step, rank, world), streams={})


def made(clock):
    return lambda stage: (Toy(clock, stage.train.batch_size, stage.slow_from), batches)


COST = StageCost(name="toy", steps=100, step_cost=1.0, slow_from=10, slow_cost=5.0)


def test_the_cost_of_fast_and_slow_steps():
    assert COST.all == 10 + 90 * 5
    assert COST.between(8, 12) == 2 + 2 * 5
    assert COST.between(20, 21) == 5
    assert StageCost(name="flat", steps=7).all == 7


def test_the_rest_is_estimated_with_slow_steps_and_later_stages(clock):
    pace = Pace(cost=COST, later=92.0)
    config = TrainConfig(steps=100)
    pace.begin(0, 0.0, config)
    assert pace.all_left(0, 100) is None
    clock.now += 5.0  # ten steps of half a second, so one of cost 1
    assert not pace.after_step(10, config)
    assert pace.stage_left(10, 100) == pytest.approx(90 * 2.5)
    assert pace.all_left(10, 100) == pytest.approx(90 * 2.5 + 46)


def test_what_counts_in_steps_keeps_its_share():
    stage = ToyStage()
    stage.train = replace(stage.train, checkpoint_every=50, eval_every=20, ema=0.9, batch_size=32, grad_accum_steps=4)
    found = shortened(stage, steps=50, batch_size=8)
    assert (found.train.steps, found.train.checkpoint_every, found.train.eval_every) == (50, 25, 10)
    assert (found.train.batch_size, found.train.grad_accum_steps) == (8, 1)
    assert found.train.ema == pytest.approx(0.8)
    assert (found.optim.warmup_steps, found.objective.cycle_start_step) == (5, 5)
    assert shortened(stage, steps=2).objective.cycle_start_step == 1
    assert stage.train.steps == 100


def test_epochs_become_steps(clock, tmp_path):
    def make(stage):
        stream = Stream(size=100, take=lambda index, epoch: None)
        sizes = {"pairs": 2, "texts": 1}
        sampler = BatchSampler(dict.fromkeys(sizes, stream), multiples=sizes, batch_size=stage.train.batch_size, seed=0)
        return Toy(clock, stage.train.batch_size, stage.slow_from), sampler

    def fitted(epochs: float) -> ToyStage:
        stage = ToyStage()
        stage.train = replace(stage.train, epochs=epochs, batch_size=5, eval_every=50)
        return RunPlan([COST]).fit_stage("toy", stage, tmp_path, make)[0]

    few, many = fitted(5), fitted(12.05)  # ten steps an epoch, as each row takes two pairs
    assert (few.train.steps, few.train.eval_every, few.optim.warmup_steps, few.slow_from) == (50, 25, 5, 5)
    assert (many.train.steps, many.train.eval_every, many.optim.warmup_steps, many.slow_from) == (121, 50, 10, 10)
    with pytest.raises(UserError, match=r"train.epochs is -1; it must be None or more than 0"):
        fitted(-1)
    both = ToyStage()
    both.train = replace(both.train, epochs=1)
    budget = Budget.of_run(tmp_path, Budget(1.0, began=clock.now))
    with pytest.raises(UserError, match=r"--minutes and train\.epochs both say"):
        RunPlan([COST], budget=budget).fit_stage("toy", both, tmp_path, make)


def test_a_stage_gets_its_part_of_the_time(clock, tmp_path):
    budget = Budget.of_run(tmp_path, Budget(1.0, began=clock.now))
    clock.now += 5
    plan = RunPlan([COST, StageCost(name="later", steps=46, step_cost=10)], budget=budget)
    stage, pace = plan.fit_stage("toy", ToyStage(), tmp_path, made(clock))
    # 60 s, of which 5 are gone and 8 % kept, in two equal parts; the trial steps are part of it
    assert pace.seconds == pytest.approx((55 - 4.8) / 2, rel=0.3)
    rows, slow_from = stage.train.batch_size, stage.slow_from
    taken = 0.01 * rows * (slow_from + 5 * (stage.train.steps - slow_from))
    assert taken == pytest.approx(pace.seconds, rel=0.1)
    assert stage.train.batch_size == 8  # few steps of 32 rows would fit
    assert stage.slow_from == 10  # pairs come first, as many as in the recipe


def test_enough_time_gives_whole_batches_and_no_endless_training(clock, tmp_path):
    plan = RunPlan([COST], budget=Budget.of_run(tmp_path, Budget(60.0, began=clock.now)))
    stage, _ = plan.fit_stage("toy", ToyStage(), tmp_path, made(clock))
    assert (stage.train.batch_size, stage.train.steps, stage.slow_from) == (32, 400, 40)
    stage, pace = RunPlan([COST], budget=Budget(60.0, began=clock.now)).fit_stage(
        "toy", ToyStage(), tmp_path, made(clock), most=1.0
    )
    assert stage.train.steps == 100
    short = replace(stage.train, device="cpu", tensorboard=False)
    result = train(Toy(clock, 1, 10), batches, out=tmp_path / "run", train=short, optim=stage.optim, pace=pace)
    assert result.step == 100  # the time would do for more


def test_evaluations_take_a_tenth_of_the_time(clock, tmp_path):
    plan = RunPlan([COST], budget=Budget(2.0, began=clock.now))
    base = ToyStage()
    base.train = replace(base.train, eval_every=2)
    stage, _ = plan.fit_stage("toy", base, tmp_path, made(clock), evaluation_seconds=4.0)
    assert -(-stage.train.steps // stage.train.eval_every) == 2


def test_a_resumed_run_follows_the_decisions_of_the_interrupted_one(clock, tmp_path):
    first = Budget.of_run(tmp_path, Budget(1.0, began=clock.now))
    stage, _ = RunPlan([COST], budget=first).fit_stage("toy", ToyStage(), tmp_path, made(clock))
    clock.now += 500  # another day
    again = Budget.of_run(tmp_path, None)
    assert again is not None
    assert again.left() == pytest.approx(first.left() + 500, abs=0.1)

    def untouched(stage):
        raise AssertionError("no trial steps")

    assert RunPlan([COST], budget=again).fit_stage("toy", ToyStage(), tmp_path, untouched)[0] == stage
    with pytest.raises(UserError, match="begun with --minutes 1: give the same"):
        Budget.of_run(tmp_path, Budget(2.0))
    (tmp_path / "other/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="begun without --minutes"):
        Budget.of_run(tmp_path / "other", Budget(2.0))
    with pytest.raises(UserError, match="must be more than 0"):
        Budget(0)


def fit(clock, out, *, seconds, config, rows=10, slow_from=20):
    objective = Toy(clock, rows, slow_from)
    cost = StageCost(name="toy", steps=config.steps, slow_from=slow_from, slow_cost=5.0)
    pace = Pace(cost=cost, seconds=seconds, folder=out)
    result = train(objective, batches, out=out, train=config, optim=OptimConfig(), pace=pace)
    return objective, result


def config(**changes):
    settings = {"steps": 60, "workers": 0, "quiet": True, "tensorboard": False, "device": "cpu", "precision": "fp32"}
    return TrainConfig(**settings | changes)


@pytest.mark.parametrize("wrong", [0.6, 1.0, 1.7])
def test_the_steps_are_corrected_so_that_the_stage_ends_in_time(clock, tmp_path, wrong):
    """The plan took the machine for slower or faster than it is."""
    seconds = (20 * 0.1 + 40 * 0.5) * wrong
    began = clock.now
    objective, result = fit(clock, tmp_path, seconds=seconds, config=config())
    assert clock.now - began == pytest.approx(seconds, rel=0.06)
    assert objective.seen == list(range(result.step))
    assert result.finished


def test_corrections_are_repeated_by_a_resumed_run(clock, tmp_path):
    _, result = fit(clock, tmp_path / "whole", seconds=14.0, config=config(checkpoint_every=12))
    decided = json.loads((tmp_path / "whole/pace.json").read_text())
    assert len(decided) > 2
    # A run that was killed after the checkpoint of step 12, whose later decisions are known.
    fit(clock, tmp_path / "part", seconds=14.0, config=config(checkpoint_every=12, max_seconds=0.0001))
    (tmp_path / "part/pace.json").write_text(json.dumps(decided))
    clock.now += 9999
    _, resumed = fit(clock, tmp_path / "part", seconds=14.0, config=config(checkpoint_every=12))
    assert resumed.step == result.step
    rates = []
    for name in ("whole", "part"):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        rates.append([(line["step"], line["lr"]) for line in lines if "lr" in line])
    assert rates[0] == rates[1]


def test_the_estimate_is_printed_after_ten_steps(clock, tmp_path, capsys):
    objective = Toy(clock, 10, 100)
    pace = Pace(cost=StageCost(name="toy", steps=60), later=540.0)
    train(objective, batches, out=tmp_path, train=config(quiet=False), optim=OptimConfig(), pace=pace, title="toy")
    assert "toy: 60 steps, 5 s left; all: 59 s left\n" in capsys.readouterr().err


def test_one_bar_of_the_run_in_the_place_of_those_of_its_stages(clock, tmp_path, capsys):
    """The seconds of a step are guessed as ten times too many, and measured after ten steps."""
    shown = []
    plan = RunPlan(
        [
            StageCost(name="toy", steps=60),
            StageCost(name="late", steps=1, step_cost=30.0),
            StageCost(name="end", steps=4),
        ],
        unit=1.0,
    )
    plan.bar = SimpleNamespace(show=lambda part, *, left, later: shown.append((part, left, later)))
    assert plan.seconds == 94
    stage, pace = plan.fit_stage("toy", ToyStage(train=config(quiet=False)), tmp_path, lambda stage: None)
    train(Toy(clock, 10, 100), batches, out=tmp_path, train=stage.train, optim=OptimConfig(), pace=pace, title="toy")
    plan.show("late")
    plan.show("end", left=2.5)
    parts, left, later = zip(*shown, strict=True)
    assert parts == ("toy",) * 52 + ("late", "end")
    assert left == pytest.approx((60.0, *(0.1 * (60 - step) for step in range(10, 61)), 3.0, 2.5))
    assert later == pytest.approx((34.0, *[3.4] * 51, 0.4, 0.0))
    assert capsys.readouterr().err == ""
