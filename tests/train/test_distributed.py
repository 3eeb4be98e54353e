import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
from diptych.train.loop import train

SCRIPT = Path(__file__).with_name("run_toy.py")


def launch(out, *options: object) -> subprocess.CompletedProcess[str]:
    """run_toy.py in two processes that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(SCRIPT), str(out), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize("late_from", [0, 3])
def test_two_processes_train_as_one(tmp_path, late_from):
    """Losses and weights of torchrun's two processes are those of one; also after a resume, and also with parameters
    that the first three steps leave without a gradient."""
    done = launch(tmp_path / "two", 6, 10, f"--late-from={late_from}")
    assert done.returncode == 0, done.stderr
    toy = Toy(late_from=late_from)
    assert toy.may_skip_parameters == (late_from > 0)
    train(toy, toy_batches, out=tmp_path / "one", train=config(steps=10), optim=optim())
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [line["step"] for line in two if "score" in line] == [6, 8, 10]  # the resume makes up for step 6
    two = [line for line in two if "loss" in line]
    assert [line["step"] for line in two] == list(range(1, 11))
    for name in ("loss", "loss/main", "grad_norm"):
        torch.testing.assert_close([line[name] for line in two], [line[name] for line in one], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-5, atol=0)
    saved = checkpoint.newest(tmp_path / "two/checkpoints")[0].tensors("model")
    own = {name: value for name, value in weights_of(toy).items() if name in saved}
    torch.testing.assert_close(saved, own, rtol=1e-3, atol=1e-5)


def test_an_objective_that_skips_parameters_unannounced_is_stopped(tmp_path):
    """Processes search for parameters without a gradient only where the objective says that there may be some."""
    done = launch(tmp_path, 6, "--late-from=3", "--may-skip-parameters=0")
    assert done.returncode != 0
    assert "not used in producing loss" in done.stderr


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
