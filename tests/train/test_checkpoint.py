import errno
import resource
import subprocess
import threading

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from toy_objective import Toy, assert_same, optim, toy_batches, weights_of

from diptych.errors import UserError
from diptych.train import checkpoint
from diptych.train.checkpoint import BestWeights, Ema, Score, TrainState, patience_is_over, select_best
from diptych.train.distributed import Devices
from diptych.train.optim import make_optimizer, trained_groups

TENSORS = {"model": {"a": torch.arange(6.0).view(2, 3).T}, "optimizer": {"m/a": torch.ones(2)}}


def save(folder, step, *, keep=2, tensors=TENSORS):
    return checkpoint.save(folder, step=step, tensors=tensors, state={"loss": 0.5}, keep=keep)


def steps_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_found(tmp_path):
    save(tmp_path / "c", 3)
    found, warnings = checkpoint.newest(tmp_path / "c")
    assert (found.step, found.state["loss"], warnings) == (3, 0.5, [])
    torch.testing.assert_close(found.tensors("model"), TENSORS["model"], rtol=0, atol=0)
    assert found.tensors("ema") == {}


def test_no_folder_is_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path / "none") == (None, [])


def test_the_newest_are_kept_in_order_of_steps(tmp_path):
    for step in (5, 9, 10, 100_000_000):
        save(tmp_path, step)
    assert steps_in(tmp_path) == ["step-00000010", "step-100000000"]
    assert checkpoint.newest(tmp_path)[0].step == 100_000_000


def test_the_sums_are_those_of_sha256sum(tmp_path):
    path = save(tmp_path, 1)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=path, check=True)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_any_damage_is_noticed(tmp_path, file, harm):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    content = bytearray(path.read_bytes())
    if harm == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    found, warnings = checkpoint.newest(tmp_path)
    assert found.step == 1
    assert len(warnings) == 1
    assert "step-00000002 is damaged" in warnings[0]


def test_nothing_but_damage_is_refused(tmp_path):
    (save(tmp_path, 1) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.newest(tmp_path)


def test_damaged_ones_are_set_aside(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    checkpoint.forget_after(tmp_path, 1)
    assert steps_in(tmp_path) == ["damaged-step-00000002", "step-00000001"]


def test_a_step_saved_again_replaces_the_old(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 1, tensors={"model": {"b": torch.zeros(1)}})
    assert checkpoint.newest(tmp_path)[0].tensors("model").keys() == {"b"}
    assert steps_in(tmp_path) == ["step-00000001"]


def test_a_refusing_disk_leaves_the_older_one(tmp_path):
    """The system refuses files over 4 KB, as a full disk would."""
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step-00000002: the checkpoint could not be written \(.*\); older"):
            save(tmp_path, 2, tensors={"model": {"a": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_in(tmp_path) == ["step-00000001"]
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_drafts_of_killed_writers_are_cleared(tmp_path):
    (tmp_path / ".draft-00000007").mkdir()
    save(tmp_path, 8)
    assert steps_in(tmp_path) == ["step-00000008"]


@pytest.mark.parametrize("saved", [{}, {"a": torch.ones(3)}, {"a": torch.ones(2), "b": torch.ones(1)}])
def test_weights_of_another_model_are_refused(tmp_path, saved):
    with pytest.raises(UserError, match="holds another model"):
        checkpoint.load_into({"a": torch.zeros(2)}, saved, where=tmp_path)


def make(seed=0, width=8, name="adamw"):
    toy = Toy(seed=seed, width=width)
    toy.register_buffer("count", torch.zeros(()))
    toy.register_buffer("scratch", torch.zeros(2), persistent=False)
    placed = Devices(device="cpu", precision="fp32").place(toy)
    optimizer = make_optimizer(trained_groups(toy, weight_decay=0.0), optim(name=name))
    return toy, TrainState(placed, optimizer, Ema(placed.parameters, decay=0.9))


def step(toy, state, at):
    toy(toy_batches(at, 0, 1), at).total.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(at)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_restored_state_goes_on_alike(tmp_path, name):
    (toy, state), (other, restored) = make(name=name), make(seed=1, name=name)
    other.frozen.load_state_dict(toy.frozen.state_dict())
    for at in range(3):
        step(toy, state, at)
    toy.count += 3
    checkpoint.save(tmp_path, step=3, tensors=state.tensors(), state={}, keep=1)
    restored.load(checkpoint.newest(tmp_path)[0])
    step(toy, state, 3)
    step(other, restored, 3)
    assert_same(weights_of(other), weights_of(toy))
    assert_same(restored.ema.weights, state.ema.weights)
    assert other.count == 3


def test_frozen_weights_are_saved_only_if_they_moved(tmp_path):
    """So a text encoder stays out of the checkpoints and a teacher, which the objective updates, is in them."""
    toy, state = make()
    assert "frozen.weight" not in state.tensors()["model"]
    assert "scratch" not in state.tensors()["model"]
    with torch.no_grad():
        toy.frozen.weight.mul_(2)
    assert state.tensors()["model"].keys() >= {"frozen.weight", "count"}
    checkpoint.save(tmp_path, step=1, tensors=state.tensors(), state={}, keep=1)
    other, restored = make(seed=1)
    restored.load(checkpoint.newest(tmp_path)[0])
    assert torch.equal(other.frozen.weight, toy.frozen.weight)
    assert "frozen.weight" in restored.tensors()["model"]
    assert "frozen.bias" not in restored.tensors()["model"]


def test_tied_weights_are_saved_once(tmp_path):
    toy, _ = make()
    toy.late.weight = toy.head.weight
    placed = Devices(device="cpu", precision="fp32").place(toy)
    state = TrainState(placed, make_optimizer(trained_groups(toy, weight_decay=0.0), optim()), None)
    step_names = state.tensors()["model"].keys()
    assert "head.weight" in step_names
    assert "late.weight" not in step_names
    checkpoint.save(tmp_path, step=1, tensors=state.tensors(), state={}, keep=1)
    state.load(checkpoint.newest(tmp_path)[0])


def test_another_width_is_refused(tmp_path):
    _, state = make()
    checkpoint.save(tmp_path, step=1, tensors=state.tensors(), state={}, keep=1)
    with pytest.raises(UserError, match="holds another model"):
        make(width=4)[1].load(checkpoint.newest(tmp_path)[0])


def test_the_average_is_the_recurrence():
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema = Ema(dict(module.named_parameters()), decay=0.15)
    shadow = 1.0
    for step in range(4):
        with torch.no_grad():
            module.weight.fill_(2.0 + step)
        ema.update(step)
        decay = [0.1, 0.15, 0.15, 0.15][step]
        shadow += (1 - decay) * (2.0 + step - shadow)
    assert ema.weights["weight"].item() == pytest.approx(shadow)


def test_weights_come_back_even_after_an_error():
    module = nn.Linear(2, 2)
    ema = Ema(dict(module.named_parameters()), decay=0.5)
    own = module.weight.detach().clone()
    ema.weights["weight"].zero_()

    def fail():
        with ema.swapped_in():
            assert not module.weight.any()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(module.weight, own)
    assert not ema.weights["weight"].any()


def scores(*pairs):
    return [Score(step=step, value=a, tie_break=-loss) for step, (a, loss) in enumerate(pairs, 1)]


def test_the_best_accuracy_is_selected_and_the_loss_decides_between_equals():
    assert select_best(scores((0.5, 1.0), (0.7, 2.0), (0.6, 0.1)), patience=10).step == 2
    assert select_best(scores((0.5, 1.0), (0.5, 0.8), (0.5, 0.9)), patience=10).step == 2
    assert select_best([], patience=10) is None


@pytest.mark.parametrize(("patience", "step"), [(1, 1), (2, 1), (3, 4)])
def test_patience_ends_the_search(patience, step):
    rising_late = scores((0.5, 1.0), (0.4, 1.0), (0.4, 1.0), (0.9, 1.0))
    assert select_best(rising_late, patience=patience).step == step
    assert patience_is_over(rising_late, patience=patience) == (patience < 3)
    assert not patience_is_over(rising_late[:1], patience=patience)


def test_the_weights_of_the_best_step_are_kept(tmp_path):
    network, best = nn.Linear(1, 1), BestWeights(tmp_path, patience=10)
    for step, accuracy in ((1, 0.2), (2, 0.8), (3, 0.5)):
        nn.init.constant_(network.weight, step)
        best.offer(Score(step=step, value=accuracy), network)
    best.load_into(network)
    assert network.weight.item() == 2
    assert BestWeights(tmp_path, patience=10).score == best.score


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    network, best = nn.Linear(1, 1), BestWeights(tmp_path, patience=10)
    for step, accuracy in ((1, 0.2), (2, 0.8), (3, 0.9)):
        best.offer(Score(step=step, value=accuracy), network)
    again = BestWeights(tmp_path, patience=10)
    nn.init.constant_(network.weight, 7)
    again.offer(Score(step=2, value=0.8), network)
    assert [score.step for score in again.scores] == [1, 2]
    again.load_into(other := nn.Linear(1, 1))
    assert torch.equal(other.weight, network.weight)


@pytest.fixture
def alone():
    """This process as the only one of a group."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield Devices(device="cpu", precision="fp32")
    torch.distributed.destroy_process_group()


def test_shards_are_written_while_the_training_goes_on(tmp_path, alone, monkeypatch):
    may_write, write = threading.Event(), HuggingFaceStorageWriter.write_data

    def write_late(*asked):
        assert may_write.wait(60)
        return write(*asked)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_late)
    writer = checkpoint.ShardWriter(alone)
    writer.save(tmp_path, step=1, tensors={"model/w": torch.ones(3)}, state={"loss": 0.5}, keep=2)
    assert checkpoint.newest(tmp_path) == (None, [])
    may_write.set()
    writer.save(tmp_path, step=2, tensors={"model/w": torch.zeros(3)}, state={}, keep=2)
    assert_same(checkpoint.newest(tmp_path)[0].tensors("model"), {"w": torch.ones(3)})  # the one before is complete
    writer.save(tmp_path, step=3, tensors={"model/w": torch.zeros(3)}, state={}, keep=2)
    writer.finish()
    assert steps_in(tmp_path) == ["step-00000002", "step-00000003"]
    assert_same(checkpoint.newest(tmp_path)[0].tensors("model"), {"w": torch.zeros(3)})


@pytest.mark.parametrize("at", ["write_data", "_sync"])
def test_what_a_thread_could_not_write_is_told_at_the_next_checkpoint(tmp_path, alone, monkeypatch, at):
    writer = checkpoint.ShardWriter(alone)
    writer.save(tmp_path, step=1, tensors={"model/w": torch.ones(3)}, state={}, keep=1)
    writer.finish()

    def refuse(*asked, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter if at == "write_data" else checkpoint, at, refuse)
        writer.save(tmp_path, step=2, tensors={"model/w": torch.zeros(3)}, state={}, keep=1)
        with pytest.raises(UserError, match=r"step-00000002: .* \(No space left on device\); older ones are intact"):
            writer.save(tmp_path, step=3, tensors={"model/w": torch.zeros(3)}, state={}, keep=1)
    assert steps_in(tmp_path) == ["step-00000001"]
    assert_same(checkpoint.newest(tmp_path)[0].tensors("model"), {"w": torch.ones(3)})
    writer.save(tmp_path, step=3, tensors={"model/w": torch.zeros(3)}, state={}, keep=1)
    writer.finish()
    assert checkpoint.newest(tmp_path)[0].step == 3
