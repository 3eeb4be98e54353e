"""Training self-supervised UML on stored feature sequences, and embedding stores with the network of a run.

Shapes: N items of a store, B rows, D width of the trunk.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from diptych.data.store import VectorStore, check_free, write_vectors
from diptych.data.streams import BatchSampler
from diptych.errors import UserError
from diptych.io import load_network
from diptych.nn.inference import Device, eval_mode, pick_device
from diptych.report.run_report import closing_line, outcome, write_run_report
from diptych.run_folder import Kind, save_model, write_config
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process
from diptych.train.loop import train
from diptych.train.pace import Budget, RunPlan, StageCost
from diptych.uml.features import mean_and_scale, read_rows, sequence_stream
from diptych.uml.ssl_objective import SharedTransformer, SharedTransformerConfig, UmlSsl, UmlSslConfig

TARGET = "target"
"""Name of the target modality and of its stream."""
_ROWS = 64
"""Items embedded at once."""


@dataclass(kw_only=True, slots=True)
class UmlSslRun:
    """Self-supervised UML, as `diptych fit uml-ssl` trains it: an encoder of one modality's features, without pairs."""

    kind: ClassVar[Kind] = "feature encoder"

    target: str
    """Folder of the target's store: the features of which a better representation is learned."""
    others: str = ""
    """Folders of the other modalities' stores, separated by commas; without any, the target learns alone."""
    model: SharedTransformerConfig = field(default_factory=SharedTransformerConfig)
    """Architecture of the network; the widths of the features follow from the stores."""
    objective: UmlSslConfig = field(default_factory=UmlSslConfig)
    """Weight and start of the other modalities' losses."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings of the training loop."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Settings of the optimizer."""

    def fit(self, out: Path, *, recipe: str, budget: Budget | None = None) -> None:
        """Train in the run folder ``out``, or go on there.

        It leaves ``out/model``, which embeds features of the target without the other modalities. Raises UserError for
        stores that cannot be read and for fields with which they would never be used.
        """
        stores = self.open()
        streams = {name: sequence_stream(store) for name, store in stores.items()}
        plan = RunPlan([StageCost(name=recipe, steps=self.train.steps)], budget=Budget.of_run(out, budget))

        def make(run: UmlSslRun) -> tuple[UmlSsl, BatchSampler]:
            objective = UmlSsl(run.build(stores), run.objective, target=TARGET)
            rows, seed = run.train.batch_size, run.train.seed
            return objective, BatchSampler(streams, multiples=objective.streams, batch_size=rows, seed=seed)

        def report(state: str) -> None:
            write_run_report(out, state=state)

        run, pace = plan.fit_stage(recipe, self, out, make)
        write_config(out, recipe=recipe, run=run)
        objective, batches = make(run)
        identity = {
            "model": asdict(objective.model.config),
            "objective": asdict(run.objective),
            "data": {name: {"count": len(store), **store.manifest} for name, store in stores.items()},
        }
        result = train(
            objective,
            batches,
            out=out,
            train=run.train,
            optim=run.optim,
            title="UML",
            identity=identity,
            pace=pace,
            report=report,
        )
        with result.eval_mode(objective):
            if is_main_process():
                save_model(objective.model, out / "model")
        if result.finished and is_main_process():
            write_run_report(out)
            print(closing_line(out, self.kind, score=outcome(out)), flush=True)

    @property
    def slow_from(self) -> int:
        """First step with all modalities."""
        return self.objective.aux_start_step if self.others else 0

    def open(self) -> dict[str, VectorStore]:
        """The stores by modality: ``target``, ``other_1``, ``other_2`` and so on."""
        others = [place for place in self.others.split(",") if place]
        places = {TARGET: self.target} | {f"other_{number}": place for number, place in enumerate(others, start=1)}
        start, steps = self.objective.aux_start_step, self.train.steps
        if others and start >= steps:
            raise UserError(
                f"--objective.aux-start-step {start} is not before --train.steps {steps}, "
                "so the other modalities would never be used: lower it, or leave --others out"
            )
        return {name: VectorStore.open(Path(place)) for name, place in places.items()}

    def build(self, stores: dict[str, VectorStore]) -> SharedTransformer:
        """The network for these stores; its initial weights follow from ``train.seed`` alone."""
        config = replace(self.model, features={name: store.vectors.shape[-1] for name, store in stores.items()})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            model = SharedTransformer(config)
        for name, store in stores.items():
            model.set_statistics(*mean_and_scale(store), modality=name)
        return model


def embed_features(run: Path, store: VectorStore, *, device: Device = "auto") -> np.ndarray:
    """Embeddings [N D] of the target features in ``store`` by the network of a `uml-ssl` run.

    Raises UserError for features of another width than the run's target has.
    """
    return np.concatenate([found for _, found in _embeddings(run, store, device)])


def embed_store(run: Path, folder: Path, *, out: Path, device: Device = "auto") -> VectorStore:
    """Write the store ``out``: that of ``folder`` with embeddings in place of its features, in half precision.

    Other arrays, such as the labels, are copied. Raises UserError as :func:`embed_features` does, and for an ``out``
    that holds anything but a store.
    """
    check_free(out)
    store = VectorStore.open(folder)
    further = {name: array for name, array in store.further.items() if name != "lengths"}
    batches = (
        {"vectors": found.astype(np.float16)} | {name: array[index] for name, array in further.items()}
        for index, found in _embeddings(run, store, device)
    )
    manifest = {**store.manifest, "run": str(run), "features": str(folder)}
    return write_vectors(out, batches, keys=store.keys, manifest=manifest)


def _embeddings(run: Path, store: VectorStore, device: Device) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some items at a time: their indices [B] and their embeddings [B D]."""
    model = load_network(SharedTransformer, run / "model").to(pick_device(device))
    wanted, found = model.config.features[TARGET], store.vectors.shape[-1]
    if wanted != found:
        raise UserError(f"{store.folder}: features of width {found}, but the target of {run} has width {wanted}")
    place = next(model.parameters()).device
    for index in np.array_split(np.arange(len(store)), max(1, -(-len(store) // _ROWS))):
        rows = read_rows(store, index).to(place)
        with eval_mode(model):
            yield index, model.embed(rows.features_BSF, rows.valid_BS, modality=TARGET).cpu().numpy()
