"""Self-supervised UML on stored features: the target modality learns with the help of others, nothing is paired."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from diptych.data.streams import BatchSampler
from diptych.data.vectors import VectorStore, check_free, write_vectors
from diptych.errors import UserError
from diptych.io import load_network
from diptych.nn.inference import Device, eval_mode, pick_device
from diptych.run_folder import save_model, write_config
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process
from diptych.train.loop import train
from diptych.uml.features import feature_statistics, read_rows, sequence_stream
from diptych.uml.ssl_objective import UmlSsl, UmlSslConfig
from diptych.uml.trunk import SharedTransformer, SharedTransformerConfig

TARGET = "target"
_ROWS = 64
"""Examples embedded at once."""


@dataclass(kw_only=True, slots=True)
class UmlSslRun:
    """`diptych fit uml-ssl`: a better encoder of one modality from features of several, without a pair."""

    target: str
    """Store of the features that a better representation is wanted of."""
    others: str = ""
    """Stores of the other modalities, separated by commas. None is the control of a target that learns alone."""
    model: SharedTransformerConfig = field(default_factory=SharedTransformerConfig)
    """The network. Its features follow from the stores."""
    objective: UmlSslConfig = field(default_factory=UmlSslConfig)
    """Its losses."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""

    def fit(self, out: Path, *, recipe: str) -> None:
        """Leaves ``out/model``, which embeds features of the target without anything of the others."""
        stores = self.open()
        streams = {name: sequence_stream(store) for name, store in stores.items()}
        write_config(out, recipe=recipe, run=self)
        objective = UmlSsl(self.build(stores), self.objective, target=TARGET)
        batches = BatchSampler(
            streams, multiples=objective.streams, batch_size=self.train.batch_size, seed=self.train.seed
        )
        identity = {
            "model": asdict(objective.model.config),
            "objective": asdict(self.objective),
            "data": {name: [len(store), store.manifest] for name, store in stores.items()},
        }
        result = train(objective, batches, out=out, train=self.train, optim=self.optim, title="UML", identity=identity)
        with result.eval_mode(objective):
            if is_main_process():
                save_model(objective.model, out / "model")

    def open(self) -> dict[str, VectorStore]:
        """The stores by modality: ``target``, ``other_1``, ``other_2`` and so on."""
        others = [place for place in self.others.split(",") if place]
        places = {TARGET: self.target} | {f"other_{number}": place for number, place in enumerate(others, start=1)}
        if others and self.objective.aux_start_step >= self.train.steps:
            raise UserError(
                f"--objective.aux-start-step {self.objective.aux_start_step} is not before --train.steps {self.train.steps}, "
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
            model.set_statistics(*feature_statistics(store), modality=name)
        return model


def embed_features(run: Path, store: VectorStore, *, device: Device = "auto") -> np.ndarray:
    """Embeddings [N D] of target features by the network of a `uml-ssl` run."""
    return np.concatenate([found for _, found in _embeddings(run, store, device)])


def embed_store(run: Path, folder: Path, *, out: Path, device: Device = "auto") -> VectorStore:
    """The store ``folder`` with embeddings in place of its features, in half precision. Labels and the like stay."""
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
    """Some items at a time: which they are [B], and their embeddings [B D]."""
    model = load_network(SharedTransformer, run / "model").to(pick_device(device))
    wanted, found = model.config.features[TARGET], store.vectors.shape[-1]
    if wanted != found:
        raise UserError(f"{store.folder}: features of width {found}, but the target of {run} has width {wanted}")
    place = next(model.parameters()).device
    for index in np.array_split(np.arange(len(store)), max(1, -(-len(store) // _ROWS))):
        rows = read_rows(store, index).to(place)
        assert rows.features_BSF is not None
        with eval_mode(model):
            yield index, model.embed(rows.features_BSF, rows.valid_BS, modality=TARGET).cpu().numpy()
