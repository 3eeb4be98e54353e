"""Checkpoints: what a run must remember between two steps, and the folders that keep it; its best weights.

    checkpoints/step-00001000/model.safetensors, ema.safetensors, optimizer.safetensors, state.json, SHA256SUMS

Under fsdp each process writes what it has, by torch.distributed.checkpoint and while the training goes on, to files
that together hold the same tensors under names such as `model/head.weight`. Any number of processes continues from
either kind, sharded or not.

:class:`TrainState` gives the tensors of a run (weights, their moving average, the optimizer's moments) and takes them
back. The functions below it write and read the folders. A folder appears complete or not at all, and is read only if
its digests hold. SHA256SUMS has the format of the program of that name (`sha256sum -c SHA256SUMS`). Nothing is pickled.

:class:`BestWeights` keeps the weights of the best validation score, and says when no better ones are to be expected.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.errors import UserError
from diptych.nn.inference import local_part
from diptych.run_folder import write_json
from diptych.train.distributed import Devices, Layout, Replica

SUMS = "SHA256SUMS"
_SHARDS = "shard-"  # how torch.distributed.checkpoint begins the names of its files


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """How far a run has come."""

    step: int = 0
    """Finished steps."""
    seconds: float = 0.0
    """Time trained, all invocations together."""
    bad_steps: int = 0
    """Updates in a row, up to this step, that were skipped because they were not finite."""


class Ema:
    """The moving average of the trained weights: s <- s + (1 - d) (w - s) after update t.

    Here s are the averaged weights, w the trained ones, and d = min(decay, (1 + t) / (10 + t)). The rising start of d
    keeps the random initial weights out of the average of short runs.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float) -> None:
        """Start from the weights that ``parameters`` have now; frozen ones are left out."""
        self.decay = decay
        self._live = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
        self.weights = {name: weight.clone() for name, weight in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after the update of step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), list(self._live.values()), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """A context in which the objective has the averaged weights; afterwards it has its own again."""
        live, shadow = list(self._live.values()), list(self.weights.values())
        own = [weight.clone() for weight in live]
        with torch.no_grad():
            torch._foreach_copy_(live, shadow)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, own)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that is complete and undamaged."""

    path: Path
    step: int
    state: dict[str, Any]
    """The content of state.json."""

    def tensors(self, name: str, layout: Callable[[str], Layout | None] = lambda key: None) -> dict[str, Tensor]:
        """The tensors saved under ``name``; empty if there were none. They are whole, or what this process has of those
        for which there is a ``layout``; then all processes have to call this."""
        path = self.path / f"{name}.safetensors"
        if any(self.path.glob(f"{_SHARDS}*")):
            return self._from_shards(name, layout)
        whole = load_file(path) if path.exists() else {}
        found = {key: layout(key) for key in whole}
        return {key: value if (lies := found[key]) is None else lies.rows(value) for key, value in whole.items()}

    def _from_shards(self, name: str, layout: Callable[[str], Layout | None]) -> dict[str, Tensor]:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load  # for sharded checkpoints alone

        reader = HuggingFaceStorageReader(str(self.path))
        saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
        targets: dict[str, Any] = {}
        for key, about in saved.items():
            kind, own = key.split("/", 1)
            if kind == name:
                lies, shape, dtype = layout(own), about.size, about.properties.dtype
                targets[key] = torch.empty(shape, dtype=dtype) if lies is None else lies.empty(shape, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process has no need of it
            load(targets, storage_reader=reader, no_dist=not (dist.is_available() and dist.is_initialized()))
        return {key.split("/", 1)[1]: local_part(value) for key, value in targets.items()}


class TrainState:
    """The tensors of a run: weights, moving average, moments of the optimizer.

    A checkpoint has the trained parameters, the buffers, and the frozen parameters that were written to since the start
    (an objective may average its network), but not a frozen text encoder of gigabytes. Moments are stored by parameter
    name.
    """

    def __init__(self, placed: Replica, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
        self.placed, self.optimizer, self.ema = placed, optimizer, ema
        names = {parameter: name for name, parameter in placed.parameters.items()}
        self._names = [names[p] for group in optimizer.param_groups for p in group["params"]]
        self._frozen = {name: p._version for name, p in placed.parameters.items() if not p.requires_grad}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint saves: file name -> tensor name -> tensor, or what this process has of it."""
        moved = {name for name, version in self._frozen.items() if self.placed.parameters[name]._version != version}
        content = {"model": self._model(moved), "optimizer": self._moments()}
        return content | ({"ema": self.ema.weights} if self.ema else {})

    def spread(self) -> dict[str, Any]:
        """A copy of :meth:`tensors` on the CPU, as torch.distributed.checkpoint saves it: ``file/name`` -> tensor."""
        found: dict[str, Any] = {}
        for kind, tensors in self.tensors().items():
            layout = self._moment_layout if kind == "optimizer" else self.placed.layout
            for name, value in tensors.items():
                lies, copied = layout(name), value.to("cpu", copy=True)
                found[f"{kind}/{name}"] = copied if lies is None else lies.spread(copied)
        return found

    def load(self, checkpoint: Checkpoint) -> None:
        """Set weights, moving average and moments to those of ``checkpoint``.

        Raises:
            UserError: the checkpoint is of another model.
        """
        saved = checkpoint.tensors("model", self.placed.layout)
        load_into(self._model(saved.keys() & self._frozen.keys()), saved, where=checkpoint.path)
        if self.ema:
            load_into(self.ema.weights, checkpoint.tensors("ema", self.placed.layout), where=checkpoint.path)
        state: dict[int, dict[str, Tensor]] = {}
        numbers = {name: number for number, name in enumerate(self._names)}
        for key, value in checkpoint.tensors("optimizer", self._moment_layout).items():
            moment, name = key.split("/", 1)
            state.setdefault(numbers[name], {})[moment] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    @contextmanager
    def as_evaluated(self, *, keep: bool = True) -> Iterator[None]:
        """Inside, the caller's objective has the weights that an evaluation sees, on processes that ``keep`` them: the
        averaged ones, if any. All processes have to enter."""
        averaged = self.ema.weights if self.ema else {}
        self.placed.fill(averaged, keep=keep)
        with self.ema.swapped_in() if self.ema and keep and not self.placed.parts else nullcontext():
            yield
        self.placed.empty()

    def finish(self) -> Ema | None:
        """Give the caller's objective the last weights, on all processes; return the average of whole weights."""
        if not self.placed.parts or self.ema is None:
            self.placed.fill({}, keep=True)
            return self.ema
        whole = dict(self.placed.fill(self.ema.weights, keep=True).named_parameters())
        averaged = {name: whole[name].detach().clone() for name in self.ema.weights}
        self.placed.fill({}, keep=True)
        ema = Ema(whole, decay=self.ema.decay)
        ema.weights = averaged
        return ema

    def _moment_layout(self, key: str) -> Layout | None:
        moment, name = key.split("/", 1)
        return self.placed.layout(name, moment)

    def _model(self, frozen: Collection[str]) -> dict[str, Tensor]:
        """Trained parameters, the ``frozen`` ones of these names, and buffers."""
        objective = self.placed.objective
        kept = objective.state_dict().keys()  # leaves out non-persistent buffers
        parameters = {n: p.detach() for n, p in self.placed.parameters.items() if n not in self._frozen or n in frozen}
        return parameters | {n: b for n, b in objective.named_buffers() if n in kept}

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {f"{key}/{self._names[i]}": value for i, entry in state.items() for key, value in entry.items()}


def save(
    folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and remove all but the newest ``keep``.

    ``tensors`` maps the name of each file to its tensors; ``state`` holds JSON values.

    Raises:
        UserError: the disk refused; older checkpoints are as they were.
    """
    with _refusals_told(folder, step):
        draft = _begin(folder, step)
        for name, content in tensors.items():
            save_file({key: value.contiguous() for key, value in content.items()}, draft / f"{name}.safetensors")
        return _complete(folder, step, state=state, keep=keep)


class ShardWriter:
    """Writes sharded checkpoints while the training goes on. Each process has one, and all call it at the same steps.

    The thread that writes has connections of its own, because the messages of two threads on the same ones would be
    taken for one another.
    """

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._group: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, folder: Path, *, step: int, tensors: dict[str, Any], state: Mapping[str, Any], keep: int) -> None:
        """Begin to write the checkpoint of ``step`` as :func:`save` does, once the one before is complete.

        ``tensors`` are what this process has of them, in copies that do not change; see :meth:`TrainState.spread`.

        Raises:
            UserError: the disk refused this checkpoint, or has refused the one before.
        """
        self.finish()
        if self._devices.is_main:
            with _refusals_told(folder, step):
                _begin(folder, step)
        self._devices.wait()
        self._group = self._group or self._devices.connect_anew()
        self._writing = self._thread.submit(self._write, folder, step, tensors, state=state, keep=keep)

    def finish(self) -> None:
        """Block until what :meth:`save` has begun is complete.

        Raises:
            UserError: the disk refused.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, folder: Path, step: int, tensors: dict[str, Any], *, state: Mapping[str, Any], keep: int) -> None:
        """Write the part of this process. The main one then waits for all others, and makes the checkpoint appear."""
        from torch.distributed.checkpoint import HuggingFaceStorageWriter
        from torch.distributed.checkpoint import save as save_parts
        from torch.distributed.checkpoint.api import CheckpointException

        storage = HuggingFaceStorageWriter(str(_draft_of(folder, step)), save_distributed=True)
        with _refusals_told(folder, step):
            try:
                save_parts(tensors, storage_writer=storage, process_group=self._group)
            except CheckpointException as error:  # on all processes, whichever was refused
                first = next(iter(error.failures.values()))[0]
                raise OSError(getattr(first, "strerror", None) or str(first)) from error
            if self._devices.is_main:
                _complete(folder, step, state=state, keep=keep)


def _draft_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies until it is complete."""
    return folder / f".draft-{step:08d}"


def _begin(folder: Path, step: int) -> Path:
    """Make the folder that the files of the checkpoint of ``step`` are written to."""
    _clear(folder)
    draft = _draft_of(folder, step)
    draft.mkdir(parents=True)
    return draft


def _complete(folder: Path, step: int, *, state: Mapping[str, Any], keep: int) -> Path:
    """Make the checkpoint of ``step`` appear, whose tensors are written, and remove all but the newest ``keep``."""
    path, draft = folder / f"step-{step:08d}", _draft_of(folder, step)
    (draft / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    files = sorted(draft.iterdir())
    (draft / SUMS).write_text("".join(f"{_digest(file)}  {file.name}\n" for file in files))
    for entry in (*files, draft / SUMS, draft):
        _sync(entry)
    if path.exists():  # a run may reach the step of a checkpoint that it did not continue from
        os.replace(path, folder / f".draft-old-{step:08d}")
    os.replace(draft, path)
    _sync(folder)
    _clear(folder)
    for _, old in _listed(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


@contextmanager
def _refusals_told(folder: Path, step: int) -> Iterator[None]:
    """Inside, what the disk refuses ends the checkpoint of ``step`` with a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_draft_of(folder, step), ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        path = folder / f"step-{step:08d}"
        raise UserError(f"{path}: the checkpoint could not be written ({reason}); older ones are intact.") from error


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint in ``folder``, and a line about each newer one, which is damaged.

    The checkpoint is None if there is none at all.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    messages = []
    listed = _listed(folder)
    for step, path in reversed(listed):
        if reason := _damage(path):
            messages.append(f"{path} is damaged ({reason}); trying the checkpoint before it.")
            continue
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(path, step, state), messages
    if listed:
        raise UserError(f"{folder}: every checkpoint is damaged; delete this folder to start from step 0.")
    return None, messages


def forget_after(folder: Path, step: int) -> None:
    """Rename the checkpoints after ``step``, which were damaged, so that they never count among the newest."""
    for later, path in _listed(folder):
        if later > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def load_into(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, where: Path) -> None:
    """Copy ``saved`` over ``targets``, name by name.

    Raises:
        UserError: the names or shapes differ, that is, the checkpoint is of another model.
    """
    odd = sorted(targets.keys() ^ saved.keys())
    odd += [name for name in targets.keys() & saved.keys() if targets[name].shape != saved[name].shape]
    if odd:
        raise UserError(f"{where} holds another model: {odd[0]} is missing on one side or of another shape.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(saved[name])


def _listed(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else ()
    return sorted((int(path.name[5:]), path) for path in found if path.name[5:].isdigit())


def _damage(path: Path) -> str | None:
    """What is wrong with the checkpoint ``path``; None if nothing is."""
    try:
        lines = (path / SUMS).read_text().splitlines()
        for digest, name in (line.split("  ", 1) for line in lines):
            if _digest(path / name) != digest:
                return f"{name} does not match its digest"
        return None if any(line.endswith("  state.json") for line in lines) else f"{SUMS} is incomplete"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or f"{SUMS} is unreadable"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    """Remove what interrupted writes left."""
    for draft in folder.glob(".draft-*") if folder.is_dir() else ():
        shutil.rmtree(draft, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The result of a validation after so many steps; higher is better."""

    step: int
    value: float
    tie_break: float = 0.0
    """Decides between equal values, as few validation items give many."""

    def beats(self, other: "Score | None") -> bool:
        """Whether it is better than ``other``."""
        return other is None or (self.value, self.tie_break) > (other.value, other.tie_break)


def select_best(scores: list[Score], *, patience: int) -> Score | None:
    """The best of ``scores``, in the order of their steps, up to where ``patience`` in a row were no better."""
    best, waited = None, 0
    for score in scores:
        if waited == patience:
            break
        best, waited = (score, 0) if score.beats(best) else (best, waited + 1)
    return best


def patience_is_over(scores: list[Score], *, patience: int) -> bool:
    """Whether the last ``patience`` scores were no better, so that no further one can be selected."""
    best = select_best(scores, patience=patience)
    return best is not None and len(scores) - 1 - scores.index(best) >= patience


class BestWeights:
    """Keeps the weights of the selected step, and all scores, in a folder. A resumed run goes on with them."""

    def __init__(self, folder: Path, *, patience: int) -> None:
        self.folder, self.patience = folder, patience
        found = folder / "scores.json"
        self.scores = [Score(**each) for each in json.loads(found.read_text())] if found.is_file() else []

    @property
    def score(self) -> Score | None:
        """The selected score, None before the first."""
        return select_best(self.scores, patience=self.patience)

    def is_over(self, step: int) -> bool:
        """Whether no step after ``step`` can be selected any more."""
        return patience_is_over([each for each in self.scores if each.step <= step], patience=self.patience)

    def offer(self, score: Score, objective: nn.Module) -> None:
        """Record a score, and keep the weights if it is selected. Scores are offered in the order of their steps.

        Known scores of this step and of later ones are from before a resume, and are dropped.
        """
        self.scores = [*(each for each in self.scores if each.step < score.step), score]
        if self.score == score:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / ".weights.safetensors"
            save_file({name: value.contiguous() for name, value in _changing(objective).items()}, draft)
            draft.replace(self.folder / "weights.safetensors")
        write_json(self.folder / "scores.json", [asdict(each) for each in self.scores])

    def load_into(self, objective: nn.Module) -> None:
        """Give ``objective`` the selected weights."""
        kept = load_file(self.folder / "weights.safetensors")
        assert kept.keys() == _changing(objective).keys()
        objective.load_state_dict(kept, strict=False)


def _changing(objective: nn.Module) -> dict[str, Tensor]:
    """Trained weights and buffers, without the frozen weights of a pretrained part."""
    frozen = {name for name, weight in objective.named_parameters() if not weight.requires_grad}
    return {name: value for name, value in objective.state_dict().items() if name not in frozen}
