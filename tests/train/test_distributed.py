import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import as_torchrun
import pytest
import run_toy
import torch
from every_objective import MAKE, fit
from toy_objective import Toy, config, losses_of, optim, read_metrics, toy_batches, weights_of

from diptych.errors import UserError
from diptych.train import checkpoint
from diptych.train.distributed import (
    Devices,
    is_main_process,
    join_processes,
    main_process_first,
    wait_for_everyone,
)
from diptych.train.loop import _check_rows, train

SCRIPT = Path(run_toy.__file__)
EVERY = Path(__file__).with_name("every_objective.py")


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def launch(out, *options: object, script: Path = SCRIPT, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """A script, run_toy.py by default, in processes as torchrun starts them."""
    return ended(as_torchrun.command(processes, script, out, *options))


def ended(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


PARTS = {"parallel": "fsdp", "ema": 0.9}
RUNS = {
    "late-0": {"late_from": 0},
    "late-3": {"late_from": 3},
    "adamw": {"optimizer": "adamw", "settings": PARTS},
    "adafactor": {"optimizer": "adafactor", "settings": PARTS},
}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> tuple[Path, str]:
    """RUNS with their first six steps and then, resumed, ten, by two processes; and what they printed."""
    out = tmp_path_factory.mktemp("two")
    done = launch(out, 6, 10, f"--runs={json.dumps(RUNS)}")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.parametrize("late_from", [0, 3])
def test_two_processes_train_as_one(of_two, tmp_path, late_from):
    """Losses and weights of two processes are those of one; also after a resume, and also with parameters
    that the first three steps leave without a gradient."""
    out = of_two[0] / f"late-{late_from}"
    toy = Toy(late_from=late_from)
    assert toy.may_skip_parameters == (late_from > 0)
    train(toy, toy_batches, out=tmp_path / "one", train=config(steps=10), optim=optim())
    two, one = read_metrics(out), read_metrics(tmp_path / "one")
    assert [line["step"] for line in two if "score" in line] == [6, 8, 10]  # the resume makes up for step 6
    two = [line for line in two if "loss" in line]
    assert [line["step"] for line in two] == list(range(1, 11))
    for name in ("loss", "loss/main", "grad_norm"):
        torch.testing.assert_close([line[name] for line in two], [line[name] for line in one], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses_of(out), losses_of(tmp_path / "one"), rtol=1e-5, atol=0)
    saved = checkpoint.newest(out / "checkpoints")[0].tensors("model")
    own = {name: value for name, value in weights_of(toy).items() if name in saved}
    torch.testing.assert_close(saved, own, rtol=1e-3, atol=1e-5)


def test_an_objective_that_skips_parameters_unannounced_is_stopped(tmp_path):
    """Processes search for parameters without a gradient only where the objective says that there may be some."""
    done = launch(tmp_path, 6, "--late-from=3", "--may-skip-parameters=0")
    assert done.returncode != 0
    assert "not used in producing loss" in done.stderr


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_parts_of_the_weights_train_as_the_whole(of_two, tmp_path, capfd, optimizer):
    """Losses, what an evaluation sees, and the weights in the end on each process are those of one process, which has
    them whole; also after a resume, and also with parameters that the first steps leave without a gradient."""
    out, printed = of_two
    run_toy.main([str(tmp_path), "6", "10", f"--optimizer={optimizer}", '--settings={"ema": 0.9}'])
    two, one = read_metrics(out / optimizer), read_metrics(tmp_path)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for ours, theirs in zip(two, one, strict=True):
        for name in theirs.keys() - {"seconds", "evaluation_seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    sums, wanted = (
        [[float(n) for n in pair] for pair in re.findall(rf"SUMS {name} (-?\d+\.\d{{6}}) (-?\d+\.\d{{6}})", told)]
        for name, told in ((optimizer, printed), (r"\.", capfd.readouterr().out))
    )
    assert len(wanted) == 2
    assert sorted(sums) == [pytest.approx(each, abs=1e-4) for each in sorted(wanted * 2)]


def test_a_process_that_dies_ends_the_job_with_its_reason_and_the_same_command_goes_on(tmp_path):
    """Also while a checkpoint is written, which is done while the next steps are made: the one before is the newest."""
    settings = f"--settings={json.dumps({'parallel': 'fsdp', 'checkpoint_every': 3})}"
    command = [sys.executable, *TORCHRUN, str(SCRIPT), str(tmp_path), "10", "--write-late", settings]
    done = ended([*command, "--die-at=6"])
    assert done.returncode != 0
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert [step for step, _ in losses_of(tmp_path)] == list(range(1, 7))
    again = ended(command)
    assert "continuing after step 3" in again.stdout + again.stderr
    train(Toy(late_from=3), toy_batches, out=tmp_path / "one", train=config(steps=10), optim=optim())
    torch.testing.assert_close(losses_of(tmp_path), losses_of(tmp_path / "one"), rtol=1e-5, atol=0)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())][-1] == "step-00000010"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """Every objective, trained by two processes that have a part of the weights each."""
    out = tmp_path_factory.mktemp("sharded")
    settings = {name: {"parallel": "fsdp", "checkpoint_every": 2} for name in MAKE}
    settings["itit"]["checkpoint_activations"] = settings["ito"]["checkpoint_activations"] = True
    done = launch(out, json.dumps(settings), script=EVERY)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("name", MAKE)
def test_every_objective_trains_in_parts_as_in_one_process(sharded, tmp_path, name):
    fit(name, tmp_path)
    for ours, alone in zip(read_metrics(sharded / name), read_metrics(tmp_path), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        # Where two codes are equally near, rounding decides which one a place of an image takes.
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3 if name == "vqgan" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_another_number_of_processes_continues(sharded, tmp_path, processes):
    names = ["itit", "vqgan", "siglip"]
    shutil.copytree(sharded, tmp_path / "run", ignore=lambda folder, found: {*MAKE} - {*names} & {*found})
    settings = {"parallel": "fsdp", "shard_group": min(2, processes)}
    done = launch(tmp_path / "run", json.dumps(dict.fromkeys(names, settings)), 8, script=EVERY, processes=processes)
    assert done.returncode == 0, done.stderr
    for name in names:
        fit(name, tmp_path / name, steps=8)
        rtol = 1e-4 if name == "vqgan" else 1e-5  # rounding decides between codes that are equally near, see above
        torch.testing.assert_close(losses_of(tmp_path / "run" / name), losses_of(tmp_path / name), rtol=rtol, atol=0)


def test_activations_are_computed_anew_at_the_same_losses(tmp_path):
    for name in ("itit", "clip-chunks"):
        fit(name, tmp_path / "kept")
        fit(name, tmp_path / "anew", checkpoint_activations=True)
        assert losses_of(tmp_path / "anew") == losses_of(tmp_path / "kept")
        shutil.rmtree(tmp_path / "kept")
        shutil.rmtree(tmp_path / "anew")


def test_a_closed_connection_is_told_from_other_errors():
    devices = Devices(device="cpu", precision="fp32")
    closed = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert not devices.lost_another(closed)  # a process alone has none to lose
    devices.world = 2
    assert devices.lost_another(closed)
    assert devices.lost_another(torch.distributed.DistBackendError("NCCL error: remote process exited"))
    assert not devices.lost_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_what_cannot_be_combined_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train.shard_group is 0; it must be None or 1 or more"):
        config(shard_group=0).check()
    toy, devices = Toy(), Devices(device="cpu", precision="fp32")
    devices.world = 2
    with pytest.raises(UserError, match=r"train.shard_group is 3; it must divide the number of processes, which is 2"):
        devices.place(toy, parallel="fsdp", shard_group=3)
    with pytest.raises(UserError, match=r"train.compile cannot be combined with train.parallel fsdp"):
        _check_rows(config(compile=True, parallel="fsdp"), toy, world=2)


def test_one_process_is_the_main_one_and_waits_for_nobody():
    join_processes("cpu")
    assert is_main_process()
    wait_for_everyone()
    with main_process_first():
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="device 'cuda': torch finds no such device"):
        Devices(device="cuda", precision="auto")


def test_seeding_is_that_of_torch():
    Devices(device="cpu", precision="auto").seed(1234)
    drawn = torch.rand(5)
    torch.manual_seed(1234)
    assert torch.equal(drawn, torch.rand(5))
