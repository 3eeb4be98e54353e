import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_objective import Toy, assert_same, config, losses_of, optim, read_metrics, toy_batches, weights_of

from diptych.errors import Interrupted, SignalWatch, UserError
from diptych.train import checkpoint
from diptych.train.loop import Hook, train

SCRIPT = Path(__file__).with_name("run_toy.py")


def at_step(step: int, act) -> Toy:
    """A toy that calls ``act`` while it computes step ``step`` (from 0)."""
    toy = Toy(dropout=0.2, late_from=3)
    toy.on_step = lambda now: act() if now == step else None
    return toy


def interrupt_at(step: int, number: int = signal.SIGINT) -> Toy:
    return at_step(step, lambda: os.kill(os.getpid(), number))


def test_every_step_has_one_line_with_its_numbers(tmp_path):
    result = train(Toy(late_from=3), toy_batches, out=tmp_path, train=config(), optim=optim())
    lines = read_metrics(tmp_path)
    assert (result.step, result.finished) == (12, True)
    assert [line["step"] for line in lines] == list(range(1, 13))
    usual = ["step", "loss", "loss/main", "measure/mean", "lr", "grad_norm", "seconds"]
    assert list(lines[0]) == usual
    assert list(lines[3]) == [*usual[:3], "loss/late", *usual[3:]]
    assert lines[0]["lr"] == pytest.approx(0.005)
    assert lines[1]["lr"] == pytest.approx(0.01)
    assert lines[5]["loss"] == pytest.approx(lines[5]["loss/main"] + lines[5]["loss/late"])
    assert lines[-1]["seconds"] >= lines[0]["seconds"] > 0


def test_the_first_step_is_the_plain_one(tmp_path):
    """Loss, norm and weights after one step equal those of a loop written out here."""
    toy, twin = Toy(), Toy()
    train(toy, toy_batches, out=tmp_path, train=config(steps=1), optim=optim(max_grad_norm=0.1))
    loss = twin(toy_batches(0, 0, 1), 0).total
    loss.backward()
    trained = [p for p in twin.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, 0.1)
    groups = [{"params": [p for p in trained if p.ndim >= 2]}, {"params": [p for p in trained if p.ndim < 2]}]
    groups[1]["weight_decay"] = 0.0
    torch.optim.AdamW(groups, lr=0.005, betas=(0.9, 0.96), weight_decay=0.045).step()
    line = read_metrics(tmp_path)[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    torch.testing.assert_close(weights_of(toy), weights_of(twin), rtol=1e-5, atol=1e-7)


def test_accumulation_changes_neither_losses_nor_weights(tmp_path):
    whole, parts = Toy(late_from=3), Toy(late_from=3)
    train(whole, toy_batches, out=tmp_path / "1", train=config(), optim=optim())
    train(parts, toy_batches, out=tmp_path / "4", train=config(grad_accum_steps=4), optim=optim())
    torch.testing.assert_close(losses_of(tmp_path / "4"), losses_of(tmp_path / "1"), rtol=1e-5, atol=0)
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, name):
    """With dropout, a moving average, micro-batches and either optimizer; stopped between two checkpoints."""
    settings, rule = config(ema=0.9, grad_accum_steps=2), optim(name=name)
    toy = Toy(dropout=0.2, late_from=3)
    whole = train(toy, toy_batches, out=tmp_path / "whole", train=settings, optim=rule)
    with pytest.raises(Interrupted):
        train(interrupt_at(5), toy_batches, out=tmp_path / "cut", train=settings, optim=rule)
    fresh = Toy(seed=1, dropout=0.2, late_from=3)
    assert fresh.frozen.weight is not None
    fresh.frozen.load_state_dict(toy.frozen.state_dict())  # what is frozen is not in the checkpoint
    resumed = train(fresh, toy_batches, out=tmp_path / "cut", train=settings, optim=rule)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert_same(weights_of(fresh), weights_of(toy))
    assert_same(resumed.ema.weights, whole.ema.weights)


def test_a_killed_process_is_continued_bit_for_bit(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "killed"), "1000", "--pause=0.02"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/checkpoints/step-00000008").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    train(Toy(late_from=3), toy_batches, out=tmp_path / "killed", train=config(steps=60), optim=optim())
    train(Toy(late_from=3), toy_batches, out=tmp_path / "whole", train=config(steps=60), optim=optim())
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, number, code):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="after step 6; a checkpoint is saved") as caught:
        train(interrupt_at(5, number), toy_batches, out=tmp_path, train=config(), optim=optim())
    assert caught.value.exit_code == code
    assert checkpoint.newest(tmp_path / "checkpoints")[0].step == 6
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_quits_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(SignalWatch, "_SAME_PRESS", 0.0)

    def press_twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(at_step(5, press_twice), toy_batches, out=tmp_path, train=config(), optim=optim())
    assert checkpoint.newest(tmp_path / "checkpoints")[0].step == 4


def test_max_seconds_stops_with_a_checkpoint_and_continues(tmp_path):
    toy = at_step(2, lambda: time.sleep(0.3))
    result = train(toy, toy_batches, out=tmp_path, train=config(max_seconds=0.3), optim=optim())
    assert not result.finished
    assert result.step == checkpoint.newest(tmp_path / "checkpoints")[0].step <= 3
    result = train(Toy(), toy_batches, out=tmp_path, train=config(), optim=optim())
    assert result.finished
    assert result.seconds > 0.3
    assert [step for step, _ in losses_of(tmp_path)] == list(range(1, 13))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped(tmp_path, bad, capsys):
    """The weights, moments and counters after the bad step are those before it; training goes on."""
    toy, seen = Toy(), []
    toy.explode_at = {3: bad, 5: bad}
    toy.on_step = lambda step: seen.append(weights_of(toy))
    train(toy, toy_batches, out=tmp_path, train=config(), optim=optim())
    assert_same(seen[4], seen[3])
    assert not torch.equal(seen[3]["head.weight"], seen[2]["head.weight"])
    assert not torch.equal(seen[5]["head.weight"], seen[4]["head.weight"])
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if line.get("skipped")] == [4, 6]
    assert lines[3]["loss"] is None
    assert "step 4: the loss is" in capsys.readouterr().err


def test_too_many_bad_updates_stop_the_run(tmp_path):
    toy = Toy()
    toy.explode_at = dict.fromkeys(range(6, 12), float("nan"))
    with pytest.raises(UserError, match=r"step 8: the loss is nan .* 2 updates in a row were skipped"):
        train(toy, toy_batches, out=tmp_path, train=config(max_bad_steps=2), optim=optim())
    found, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert found.step == 4
    assert all(tensor.isfinite().all() for tensor in found.tensors("model").values())


def test_a_full_disk_is_one_line_and_spares_the_older_checkpoint(tmp_path, monkeypatch):
    real = checkpoint.save_file

    def refuse(tensors, path):
        real(tensors, path)
        if "00000008" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(UserError, match=r"step-00000008: .*No space left on device.*older ones are intact"):
        train(Toy(), toy_batches, out=tmp_path, train=config(), optim=optim())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    assert train(Toy(), toy_batches, out=tmp_path, train=config(), optim=optim()).finished
    assert [step for step, _ in losses_of(tmp_path)] == list(range(1, 13))


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(tmp_path, capsys):
    train(Toy(), toy_batches, out=tmp_path, train=config(), optim=optim())
    before = losses_of(tmp_path)
    weights = tmp_path / "checkpoints/step-00000012/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    train(Toy(), toy_batches, out=tmp_path, train=config(), optim=optim())
    told = capsys.readouterr().err
    assert "step-00000012 is damaged (model.safetensors does not match its digest)" in told
    assert "continuing after step 8" in told
    assert (tmp_path / "checkpoints/damaged-step-00000012").exists()
    assert losses_of(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "rule", "identity", "told"),
    [
        ({"seed": 1}, {}, {}, r"train\.seed \(0 then, 1 now\)"),
        ({"ema": 0.5}, {}, {}, r"train\.ema"),
        ({}, {"lr": 0.02}, {}, r"optim\.lr \(0.01 then, 0.02 now\)"),
        ({}, {"betas": (0.9, 0.99)}, {}, r"optim\.betas"),
        ({}, {}, {"data.pairs": "other"}, r"data\.pairs \('some' then, 'other' now\)"),
    ],
)
def test_other_settings_are_refused_on_resume(tmp_path, changes, rule, identity, told):
    some = {"data.pairs": "some"}
    train(Toy(), toy_batches, out=tmp_path, train=config(steps=4), optim=optim(), identity=some)
    other = some | identity
    with pytest.raises(UserError, match=told):
        train(Toy(), toy_batches, out=tmp_path, train=config(**changes), optim=optim(**rule), identity=other)


def test_bookkeeping_may_change_on_resume(tmp_path):
    train(Toy(), toy_batches, out=tmp_path, train=config(steps=4), optim=optim())
    changed = config(checkpoint_every=3, eval_every=7, keep_checkpoints=1, workers=2, max_seconds=60.0, log_every=3)
    assert train(Toy(), toy_batches, out=tmp_path, train=changed, optim=optim()).step == 12
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]


def test_a_finished_run_gives_its_weights_again(tmp_path):
    toy, again = Toy(), Toy(seed=1)
    again.frozen.load_state_dict(toy.frozen.state_dict())
    train(toy, toy_batches, out=tmp_path, train=config(), optim=optim())
    before = (tmp_path / "metrics.jsonl").read_text()
    assert train(again, toy_batches, out=tmp_path, train=config(), optim=optim()).finished
    assert_same(weights_of(again), weights_of(toy))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_hooks_see_averaged_weights_in_evaluation_mode(tmp_path):
    toy, seen = Toy(dropout=0.2), []
    toy.frozen.eval()

    def look(step, objective):
        seen.append((step, weights_of(objective)["head.weight"]))
        assert objective is toy
        assert not any(part.training for part in objective.modules())
        assert not torch.is_grad_enabled()
        return {"score": float(step)}

    hooks = [Hook(every=5, run=look)]
    result = train(toy, toy_batches, out=tmp_path, train=config(ema=0.9), optim=optim(), hooks=hooks)
    lines = [line for line in read_metrics(tmp_path) if "loss" not in line]
    assert [(line["step"], line["score"]) for line in lines] == [(5, 5.0), (10, 10.0), (12, 12.0)]
    assert toy.middle.training
    torch.testing.assert_close(seen[-1][1], result.ema.weights["head.weight"], rtol=0, atol=0)
    assert not torch.equal(toy.head.weight, seen[-1][1])
    with result.eval_mode(toy):
        torch.testing.assert_close(toy.head.weight, seen[-1][1], rtol=0, atol=0)


def test_hooks_do_not_disturb_training(tmp_path):
    hook = Hook(every=3, run=lambda step, objective: {"random": torch.rand(()).item()})
    train(Toy(dropout=0.2), toy_batches, out=tmp_path / "without", train=config(), optim=optim())
    train(Toy(dropout=0.2), toy_batches, out=tmp_path / "with", train=config(), optim=optim(), hooks=[hook])
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")


def test_an_evaluation_that_an_interrupt_skipped_is_made_up_once(tmp_path):
    hooks = [Hook(every=6, run=lambda step, objective: {"score": 1.0})]
    with pytest.raises(Interrupted):
        train(interrupt_at(5), toy_batches, out=tmp_path, train=config(), optim=optim(), hooks=hooks)
    assert not any("score" in line for line in read_metrics(tmp_path))
    for _ in range(2):
        train(Toy(dropout=0.2, late_from=3), toy_batches, out=tmp_path, train=config(), optim=optim(), hooks=hooks)
        assert [line["step"] for line in read_metrics(tmp_path) if "score" in line] == [6, 12]


def test_a_hook_ends_the_run_when_no_step_can_change_it(tmp_path):
    """With a checkpoint there, so that the same command does nothing more, and goes on once more is wanted."""
    enough = 6

    def fit():
        hooks = [Hook(every=3, run=lambda step, objective: {"score": 1.0}, stop_early=lambda step: step >= enough)]
        return train(Toy(), toy_batches, out=tmp_path, train=config(), optim=optim(), hooks=hooks)

    for _ in range(2):
        result = fit()
        assert (result.step, result.finished) == (6, True)
        assert [line["step"] for line in read_metrics(tmp_path) if "score" in line] == [3, 6]
        assert checkpoint.newest(tmp_path / "checkpoints")[0].step == 6
    enough = 20
    assert (fit().step, fit().finished) == (12, True)


def test_progress_is_plain_lines_away_from_a_terminal(tmp_path, capsys):
    train(Toy(), toy_batches, out=tmp_path, train=config(quiet=False), optim=optim(), title="toy")
    told = capsys.readouterr()
    first, last = told.err.splitlines()
    assert first.startswith("toy: step 1/12  ")
    assert re.fullmatch(r"toy: step 12/12  \S+ steps/s  \S+ rows/s  loss \S+  0:00:00 left", last)
    assert told.out == ""


def test_a_batch_size_that_cannot_be_cut_is_refused(tmp_path):
    told = r"train\.batch_size is 8; it must be a multiple of .* train\.grad_accum_steps \(3\)"
    with pytest.raises(UserError, match=told):
        train(Toy(), toy_batches, out=tmp_path, train=config(grad_accum_steps=3), optim=optim())


def test_mixed_precision_computes_in_bf16_and_keeps_fp32_weights(tmp_path):
    toy, seen = Toy(), set()
    toy.head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    train(toy, toy_batches, out=tmp_path, train=config(precision="bf16"), optim=optim())
    assert seen == {torch.bfloat16}
    assert toy.head.weight.dtype == torch.float32
    train(Toy(), toy_batches, out=tmp_path / "fp32", train=config(), optim=optim())
    losses, exact = losses_of(tmp_path), losses_of(tmp_path / "fp32")
    torch.testing.assert_close(losses, exact, rtol=0.03, atol=0)
    assert losses != exact


def test_regions_are_compiled_where_the_objective_names_them(tmp_path):
    toy, calls = Toy(), []
    toy.compile_regions = lambda: calls.append("regions")
    train(toy, toy_batches, out=tmp_path, train=config(steps=1, compile=True), optim=optim())
    assert calls == ["regions"]


def test_it_learns(tmp_path):
    batch = toy_batches(0, 0, 1)
    rule = optim(lr=0.05, max_grad_norm=None, weight_decay=0.0)
    train(Toy(width=32), lambda step, rank, world: batch, out=tmp_path, train=config(steps=150), optim=rule)
    losses = [loss for _, loss in losses_of(tmp_path)]
    assert losses[-1] < 0.1 * losses[0]


def test_the_report_is_written_while_training_and_whatever_ends_it(tmp_path):
    told: list[str] = []
    hook = Hook(every=3, run=lambda step, objective: {"score": 1.0})
    train(Toy(), toy_batches, out=tmp_path / "a", train=config(), optim=optim(), hooks=[hook], report=told.append)
    assert told[0] == "step 3 of 12"
    assert told[-1] == "step 12 of 12"
    told.clear()
    with pytest.raises(Interrupted):
        train(
            interrupt_at(5, signal.SIGINT),
            toy_batches,
            out=tmp_path / "b",
            train=config(),
            optim=optim(),
            report=told.append,
        )
    assert told[-1] == "step 6 of 12"
    toy = Toy()
    toy.explode_at = dict.fromkeys(range(12), float("inf"))
    with pytest.raises(UserError):
        train(toy, toy_batches, out=tmp_path / "c", train=config(), optim=optim(), report=told.append)
    assert told[-1].startswith("step 3 of")


def test_a_validation_is_told_in_the_terminal(tmp_path, capsys):
    hook = Hook(every=6, run=lambda step, objective: {"valid/cider": 12.34, "valid/bleu_4": 0.1, "score": 3})
    train(Toy(), toy_batches, out=tmp_path, train=config(quiet=False), optim=optim(), hooks=[hook], title="toy")
    assert "toy: step 6: validation cider 12.34 (0 s)\n" in capsys.readouterr().err
