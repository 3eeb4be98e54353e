"""Self-supervised UML: each modality predicts its next feature through a shared trunk, without pairs.

    L = sum_m w_m MSE(g_m(h(f_m x))[:, :-1], x[:, 1:])

where f_m and g_m are linear maps of modality m alone and h is the causal transformer that all share. A row of one
position has no next one, so it is reconstructed. The target modality trains alone at first.

The file holds the network, the objective, the run that trains it on stores of feature sequences, and the embedding of a
store by a finished run.

Gupta et al., "Better Together: Leveraging Unpaired Multimodal Data for Stronger Unimodal Models".

Departure: padding is left out of the loss, the attention and the mean. The released code includes it. Features are
standardized by the training data of their modality, so that one loss weight means the same for encoders of any scale.
Positions are sinusoids, because sequences may have any length.

Shapes: B rows, S positions, F width of a modality's features, D width of the trunk, N items of a store.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diptych.data.batch import Batch
from diptych.data.store import VectorStore, check_free, write_vectors
from diptych.data.streams import BatchSampler
from diptych.errors import UserError
from diptych.io import load_network
from diptych.nn.inference import Device, eval_mode, pick_device
from diptych.nn.transformer import Blocks, init_weights, prefix_causal
from diptych.report.html import closing_line, outcome, write_run_report
from diptych.run_folder import Kind, save_model, write_config
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process
from diptych.train.loop import train
from diptych.train.objective import Losses, Objective
from diptych.train.pace import Budget, RunPlan, StageCost
from diptych.uml.data import mean_and_scale, read_rows, sequence_stream

TARGET = "target"
"""Name of the target modality and of its stream."""
_ROWS = 64
"""Items embedded at once."""


@dataclass(kw_only=True, slots=True)
class SharedTransformerConfig:
    """The default is the paper's network for images with text. Its other networks have 5 blocks and 5 heads."""

    features: dict[str, int] = field(default_factory=dict)
    """Width of each modality's features, by its name; follows from the stores."""
    width: int = 256
    """Width of the trunk."""
    depth: int = 4
    """Number of transformer blocks of the trunk."""
    heads: int = 4
    """Number of attention heads of a block."""
    dropout: float = 0.1
    """Dropout rate, in attention and on both branches of a block."""


class SharedTransformer(nn.Module, PyTorchModelHubMixin, library_name="diptych", tags=["uml"]):
    """The maps f_m and g_m and the trunk h: :meth:`trunk` is h(f_m x), :meth:`predict` applies g_m to it.

    Rows are padded at their end, so causal attention keeps every valid position from looking at padding.
    """

    def __init__(self, config: SharedTransformerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.blocks = Blocks(c.depth, c.width, heads=c.heads, dropout=c.dropout)
        self.modalities = nn.ModuleDict({name: _Modality(size, c.width) for name, size in c.features.items()})
        self.apply(init_weights)

    def _own(self, modality: str) -> "_Modality":
        own = self.modalities[modality]
        assert isinstance(own, _Modality)
        return own

    @torch.no_grad()
    def set_statistics(self, mean_F: np.ndarray, scale_F: np.ndarray, *, modality: str) -> None:
        """Set the mean and standard deviation by which a modality's features are standardized."""
        own = self._own(modality)
        own.mean_F.copy_(torch.from_numpy(mean_F))
        own.scale_F.copy_(torch.from_numpy(scale_F))

    def standardized(
        self, x_BSF: Float[Tensor, "B S F"], valid_BS: Bool[Tensor, "B S"], *, modality: str
    ) -> Float[Tensor, "B S F"]:
        """Features in units of their standard deviation, as :meth:`trunk` takes them; zero at padding."""
        own = self._own(modality)
        return ((x_BSF - own.mean_F) / own.scale_F).masked_fill(~valid_BS[..., None], 0)

    def trunk(self, x_BSF: Float[Tensor, "B S F"], *, modality: str) -> Float[Tensor, "B S D"]:
        """Hidden states of standardized features; each position attends to itself and to those before it."""
        places, device = x_BSF.shape[1], x_BSF.device
        x_BSD = self._own(modality).into(x_BSF)
        x_BSD = x_BSD + _sinusoids(places, x_BSD.shape[-1], device=device)
        return self.blocks(x_BSD, attend=prefix_causal(0, places, device=device))

    def predict(self, hidden_BSD: Float[Tensor, "B S D"], *, modality: str) -> Float[Tensor, "B S F"]:
        """The predicted next feature of each position, standardized."""
        return self._own(modality).out(hidden_BSD)

    def embed(
        self, x_BSF: Float[Tensor, "B S F"], valid_BS: Bool[Tensor, "B S"], *, modality: str
    ) -> Float[Tensor, "B D"]:
        """The representation of each row of raw features: the mean of the trunk over its valid positions."""
        hidden_BSD = self.trunk(self.standardized(x_BSF, valid_BS, modality=modality), modality=modality)
        kept_BSD = hidden_BSD.masked_fill(~valid_BS[..., None], 0)
        return kept_BSD.sum(1) / valid_BS.sum(1, keepdim=True)


class _Modality(nn.Module):
    """The linear maps and statistics of one modality."""

    mean_F: Tensor
    scale_F: Tensor

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(features, width)
        self.out = nn.Linear(width, features)
        self.register_buffer("mean_F", torch.zeros(features))
        self.register_buffer("scale_F", torch.ones(features))


def _sinusoids(places: int, width: int, *, device: torch.device) -> Float[Tensor, "S D"]:
    """The positions of Vaswani et al. (2017): sines in the first half of the width, cosines in the rest."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angle = torch.arange(places, device=device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]


@dataclass(kw_only=True, slots=True)
class UmlSslConfig:
    """Settings of self-supervised UML."""

    aux_weight: float = 1.0
    """Weight of the loss of every modality but the target (lambda); 0 is the control: the target learns alone."""
    aux_start_step: int = 500
    """Step from which the other modalities' losses are added."""


class UmlSsl(Objective):
    """The network with its loss. Every modality has a stream of its own; ``target`` is the one to be represented."""

    may_skip_parameters = True  # the other modalities join at `aux_start_step`

    def __init__(self, model: SharedTransformer, config: UmlSslConfig, *, target: str) -> None:
        super().__init__()
        self.model, self.config, self.target = model, config, target
        self.streams = dict.fromkeys(model.config.features, 1)

    def forward(self, batch: Batch, step: int) -> Losses:
        terms: dict[str, Tensor] = {}
        for name, examples in batch.streams.items():
            if name == self.target or step >= self.config.aux_start_step:
                terms[name] = next_embedding_loss(self.model, examples.features_BSF, examples.valid_BS, modality=name)
        weighted = [loss * (1.0 if name == self.target else self.config.aux_weight) for name, loss in terms.items()]
        return Losses(torch.stack(weighted).sum(), {name: loss.detach() for name, loss in terms.items()})


def next_embedding_loss(
    model: SharedTransformer, x_BSF: Float[Tensor, "B S F"], valid_BS: Bool[Tensor, "B S"], *, modality: str
) -> Float[Tensor, ""]:
    """The mean squared error of each row over the positions whose next one is valid, then the mean over rows."""
    x_BSF = model.standardized(x_BSF, valid_BS, modality=modality)
    predicted_BSF = model.predict(model.trunk(x_BSF, modality=modality), modality=modality)
    single_B1 = valid_BS.sum(1, keepdim=True) == 1
    wanted_BSF = torch.where(single_B1[..., None], x_BSF, x_BSF.roll(-1, dims=1))
    scored_BS = valid_BS & (single_B1 | F.pad(valid_BS[:, 1:], (0, 1)))
    error_BS = (predicted_BSF - wanted_BSF).square().mean(-1).masked_fill(~scored_BS, 0)
    return (error_BS.sum(1) / scored_BS.sum(1)).mean()


@dataclass(kw_only=True, slots=True)
class UmlSslRun:
    """Self-supervised UML, as `diptych fit uml-ssl` trains it: an encoder of one modality's features, without pairs."""

    kind: ClassVar[Kind] = "feature encoder"
    slow_field: ClassVar[str | None] = "aux_start_step"

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
