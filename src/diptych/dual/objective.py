"""The losses of dual encoders, the objectives CLIP, SigLIP and SLIP, and what ITO (`dual/ito.py`) shares with them.

    info_nce, nt_xent, sigmoid_loss          losses, as pure functions of embeddings
    PairsConfig, PairsObjective              what the settings and the objectives have in common
    Views, unbind_captions, in_chunks        from a batch to embeddings
    gather_rows                              embeddings of all processes
    ClipObjective, SlipObjective             the objectives

The losses compare all rows of a batch with one another. They take the rows of all processes (:func:`gather_rows`), so
they do not depend on the number of processes. Similarities and losses are fp32, whatever the precision of the towers,
and all embeddings are L2-normalized. A tower is given one view at a time, so that its activations take no more memory
than CLIP's.

Shapes: B rows, b rows of a chunk, V image views of a row, M captions of a row, L text tokens, H and W pixels, S side of
a view, D width, W processes. In SLIP, W is the width of the image tower.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diptych.data.augment import ViewConfig, draw_view, make_view, weak_view
from diptych.data.batch import Batch, CaptionedImageExamples, CaptionedStateExamples
from diptych.dual.model import DualEncoder
from diptych.dual.towers import Heads
from diptych.errors import UserError
from diptych.nn.transformer import init_weights
from diptych.train.objective import Losses, Objective

Learner = DualEncoder | Heads
"""What learns: a dual encoder, or the heads alone of one whose towers are frozen."""


@dataclass(kw_only=True, slots=True)
class PairsConfig:
    """An objective's settings. Each objective has a subclass, which builds it."""

    MEMORY_ONLY: ClassVar[tuple[str, ...]] = ("chunk",)
    """Names of the fields that change no loss and no gradient. A run may be resumed with other values of them."""

    views: int = 1
    """Number of views of each image in a step."""
    captions: int = 1
    """Number of captions of each image in a step."""
    augment: ViewConfig = field(default_factory=weak_view)
    """The random changes that make a view of an image."""
    chunk: int | None = None
    """Number of rows that a process encodes at a time. Not given: all rows. Each chunk is encoded once more in the
    backward pass, which gives the gradient of the whole batch in the memory of a chunk, for a third more time
    (GradCache)."""

    def build(self, model: Learner) -> "PairsObjective[Any]":
        """The objective with these settings, on ``model``. New weights come from torch's global generator.

        Raises UserError for an invalid value.
        """
        raise NotImplementedError

    @property
    def keeps_tokens(self) -> bool:
        """Whether a loss reads all tokens of the towers."""
        return False

    def view_configs(self) -> list[ViewConfig]:
        """How each view of an image in a step is made."""
        return [self.augment] * self.views

    def identity(self) -> dict[str, Any]:
        """The fields that the losses depend on, to be compared when a run is resumed."""
        return {name: value for name, value in asdict(self).items() if name not in self.MEMORY_ONLY}

    def check(self) -> None:
        """Raise UserError for an invalid value."""
        for name, value in (("views", self.views), ("captions", self.captions), ("chunk", self.chunk)):
            if value is not None and value < 1:
                raise UserError(f"objective.{name} is {value}; it must be at least 1")


Config = TypeVar("Config", bound=PairsConfig)


class PairsObjective(Objective, Generic[Config]):
    """A dual encoder that learns from a stream of pairs, by losses that compare all rows of a batch."""

    couples_rows = True

    def __init__(self, model: Learner, config: Config) -> None:
        super().__init__()
        config.check()
        self.streams = {"pairs": 1}
        self.model, self.config = model, config


class Views:
    """The views of a step's images.

    The random numbers are drawn at once for all rows; pixels are made for the rows that are asked for. Where the batch
    holds states of frozen towers, the views are those that were drawn when the states were computed.
    """

    def __init__(self, batch: Batch, config: ViewConfig, *, views: int, size: int, name: str, first: int = 0) -> None:
        """``size`` is the side of a view in pixels; ``name`` tells these random numbers from others of the step;
        ``first`` is the place of the first of these views among :meth:`PairsConfig.view_configs`."""
        pairs: CaptionedImageExamples | CaptionedStateExamples = batch["pairs"]
        self._states = None
        if isinstance(pairs, CaptionedStateExamples):
            self._states = pairs.images_BVSF[:, first : first + views]
            return
        self._pixels_B3HW, self._config, self._size = pairs.pixels_B3HW, config, size
        self._drawn = [draw_view(batch.rng, f"{name}{view}", len(pairs)) for view in range(views)]

    def __call__(self, rows: slice) -> list[Tensor]:
        """Pixels [b 3 S S] of each view, or its states [b S F]."""
        if self._states is not None:
            return list(self._states[rows].unbind(1))
        pixels = self._pixels_B3HW[rows]
        return [make_view(pixels, drawn[rows], self._config, size=self._size) for drawn in self._drawn]


def unbind_captions(
    pairs: CaptionedImageExamples | CaptionedStateExamples, rows: slice, *, captions: int
) -> list[tuple[Tensor, Tensor]]:
    """Ids, or states, and validity [b L] of the first caption of each row, then of the second one, and so on."""
    if isinstance(pairs, CaptionedStateExamples):
        return list(zip(pairs.texts_BMLF[rows].unbind(1), pairs.valid_BML[rows].unbind(1), strict=True))
    ids, valid = (side[rows].unflatten(1, (captions, -1)).unbind(1) for side in (pairs.ids_BL, pairs.valid_BL))
    return list(zip(ids, valid, strict=True))


def unit(vectors: list[Tensor]) -> Tensor:
    """The vectors [b D] of each view (or caption), L2-normalized in fp32 also under autocast: [V b D]."""
    stacked_VbD = torch.stack(vectors)
    with torch.autocast(stacked_VbD.device.type, enabled=False):
        return F.normalize(stacked_VbD.float(), dim=-1)


def in_chunks(encode: Callable[[slice], tuple[Tensor, ...]], *, rows: int, chunk: int | None) -> tuple[Tensor, ...]:
    """The results [... B D] of ``encode`` for all rows, computed ``chunk`` rows at a time.

    Only the results of a chunk stay in memory. The backward pass encodes each chunk again, now with its activations
    (Gao et al., 2021, GradCache). ``chunk`` None encodes all rows at once.
    """
    if chunk is None or chunk >= rows:
        return encode(slice(0, rows))
    parts = [checkpoint(encode, slice(start, start + chunk), use_reentrant=False) for start in range(0, rows, chunk)]
    return tuple(torch.cat(part, dim=-2) for part in zip(*parts, strict=True))


def gather_rows(local: Float[Tensor, "... B D"]) -> Float[Tensor, "... WB D"]:
    """Concatenate the rows of all processes, in the order of their ranks, on each of them.

    The gradient is exact if every process computes the same loss from the result and the gradients of the weights are
    averaged over processes, as DistributedDataParallel does. Every process then holds dL/d(all rows) and sends on the
    part of its own rows, times W, which the average takes away again; nothing has to be exchanged. Parameters of the
    loss itself, such as a temperature, are counted once.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world)]
    dist.all_gather(parts, local.detach().contiguous())
    # The value of the rows, with W times their gradient.
    parts[dist.get_rank()] = world * local + ((1 - world) * local).detach()
    return torch.cat(parts, dim=-2)


# CLIP, SigLIP and SLIP


@dataclass(kw_only=True, slots=True)
class ClipConfig(PairsConfig):
    """Settings of CLIP and SigLIP, which differ in their loss alone."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Contrastive loss: softmax is CLIP's, sigmoid is SigLIP's."""

    def build(self, model: Learner) -> "ClipObjective":
        return ClipObjective(model, self)


class ClipObjective(PairsObjective[ClipConfig]):
    """L = mean of the loss over all pairs of an image view and a caption."""

    def __init__(self, model: Learner, config: ClipConfig) -> None:
        super().__init__(model, config)
        if config.loss == "sigmoid":
            # SigLIP starts at scale 10 and bias -10, as nearly all combinations of an image and a text do not match.
            nn.init.constant_(model.logit_scale, torch.tensor(10.0).log().item())
            self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, batch: Batch, step: int) -> Losses:
        c = self.config
        pairs: CaptionedImageExamples | CaptionedStateExamples = batch["pairs"]
        self.model.clamp_scale()
        views = Views(batch, c.augment, views=c.views, size=self.model.image_size, name="view")

        def encode(rows: slice) -> tuple[Tensor, Tensor]:
            images = [self.model.encode_images(view).pooled_BD for view in views(rows)]
            captions = unbind_captions(pairs, rows, captions=c.captions)
            texts = [self.model.encode_texts(*caption).pooled_BD for caption in captions]
            return unit(images), unit(texts)

        images_VBD, texts_MBD = map(gather_rows, in_chunks(encode, rows=len(pairs), chunk=c.chunk))
        scale = self.model.scale
        if c.loss == "sigmoid":
            each = [sigmoid_loss(image, text, scale, self.bias) for image in images_VBD for text in texts_MBD]
            loss = torch.stack(each).mean()
        else:
            loss = multi_view_info_nce(images_VBD, texts_MBD, scale)
        return Losses(loss, {"align": loss}, {"align/scale": scale})


@dataclass(kw_only=True, slots=True)
class SlipConfig(PairsConfig):
    """``views`` and ``augment`` are for CLIP's part of the loss."""

    strong: ViewConfig = field(default_factory=ViewConfig)
    """The random changes that make SimCLR's two views. The defaults are ITO's, so that both methods see images of the
    same kind."""
    simclr_weight: float = 1.0
    """Weight of SimCLR's loss."""
    temperature: float = 0.1
    """SimCLR's temperature, by which cosines are divided."""
    hidden: int = 4096
    """Width of the projector's hidden layers."""
    projected: int = 256
    """Width of the projector's output, which SimCLR compares."""

    def view_configs(self) -> list[ViewConfig]:
        return [self.augment] * self.views + [self.strong] * 2

    def build(self, model: Learner) -> "SlipObjective":
        return SlipObjective(model, self)


class SlipObjective(PairsObjective[SlipConfig]):
    """L = L_CLIP + L_SimCLR, where L_SimCLR reads the image tower before its projection.

    Where the tower is frozen, its output does not learn, and L_SimCLR reads the projection of it.

    Departure: the projector has LayerNorm where SLIP has BatchNorm, whose statistics depend on how the rows are split
    over processes and chunks.
    """

    def __init__(self, model: Learner, config: SlipConfig) -> None:
        """The weights of the projector come from torch's global generator."""
        super().__init__(model, config)
        widths = (model.image_tower_width if model.learned_images else model.width, config.hidden, config.hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(config.hidden, config.projected))
        self.projector.apply(init_weights)

    def forward(self, batch: Batch, step: int) -> Losses:
        c, size = self.config, self.model.image_size
        pairs: CaptionedImageExamples | CaptionedStateExamples = batch["pairs"]
        self.model.clamp_scale()
        weak = Views(batch, c.augment, views=c.views, size=size, name="view")
        strong = Views(batch, c.strong, views=2, size=size, name="strong", first=c.views)

        def encode(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            images = [self.model.encode_images(view).pooled_BD for view in weak(rows)]
            captions = unbind_captions(pairs, rows, captions=c.captions)
            texts = [self.model.encode_texts(*caption).pooled_BD for caption in captions]
            outputs = [self.model.encode_images(view) for view in strong(rows)]
            learned = self.model.learned_images
            projected = [self.projector(each.state_BW if learned else each.pooled_BD) for each in outputs]
            return unit(images), unit(texts), unit(projected)

        images_VBD, texts_MBD, strong_2BD = map(gather_rows, in_chunks(encode, rows=len(pairs), chunk=c.chunk))
        scale = self.model.scale
        align = multi_view_info_nce(images_VBD, texts_MBD, scale)
        simclr = multi_view_nt_xent(strong_2BD, 1 / c.temperature)
        total = align + c.simclr_weight * simclr
        return Losses(total, {"align": align, "simclr": simclr}, {"align/scale": scale})


# Losses


def similarities(
    a_BD: Float[Tensor, "B D"], b_BD: Float[Tensor, "B D"], scale: Float[Tensor, ""] | float
) -> Float[Tensor, "B B"]:
    """s a b': the scaled cosines of all rows of a with all rows of b, in fp32 also under autocast."""
    with torch.autocast(a_BD.device.type, enabled=False):
        return scale * (a_BD.float() @ b_BD.float().T)


def info_nce(
    image_BD: Float[Tensor, "B D"], text_BD: Float[Tensor, "B D"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """CLIP's loss: [ CE(s I T', i) + CE(s T I', i) ] / 2, where text i belongs to image i."""
    logits_BB = similarities(image_BD, text_BD, scale)
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.T, own_B)) / 2


def multi_view_info_nce(
    images_VBD: Float[Tensor, "V B D"], texts_MBD: Float[Tensor, "M B D"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """ITO's L_align: the mean of :func:`info_nce` over all pairs of an image view and a caption."""
    return torch.stack([info_nce(image, text, scale) for image in images_VBD for text in texts_MBD]).mean()


def nt_xent(first_BD: Float[Tensor, "B D"], second_BD: Float[Tensor, "B D"], scale: Tensor | float) -> Tensor:
    """NT-Xent (SimCLR): [ l(S_1, S_2) + l(S_2, S_1) ] / 2 with

    l(a, b) = CE([ s a b' | s a a' - inf I ], i): a row finds its other view among all other vectors of both views.
    """
    return (_one_way(first_BD, second_BD, scale) + _one_way(second_BD, first_BD, scale)) / 2


def _one_way(a_BD: Tensor, b_BD: Tensor, scale: Tensor | float) -> Tensor:
    itself_BB = torch.eye(len(a_BD), dtype=torch.bool, device=a_BD.device)
    within_BB = similarities(a_BD, a_BD, scale).masked_fill(itself_BB, -torch.inf)
    logits_BX = torch.cat([similarities(a_BD, b_BD, scale), within_BB], dim=1)
    return F.cross_entropy(logits_BX, torch.arange(len(a_BD), device=a_BD.device))


def multi_view_nt_xent(views_VBD: Float[Tensor, "V B D"], scale: Tensor | float) -> Float[Tensor, ""]:
    """The mean of :func:`nt_xent` over all pairs of views; with two views, as in the papers, that pair's."""
    count = len(views_VBD)
    pairs = [(v, w) for v in range(count) for w in range(v + 1, count)]
    return torch.stack([nt_xent(views_VBD[v], views_VBD[w], scale) for v, w in pairs]).mean()


def sigmoid_loss(
    image_BD: Float[Tensor, "B D"], text_BD: Float[Tensor, "B D"], scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """SigLIP's loss: -1/B sum_ij log sigmoid( z_ij (s I_i T_j' + b) ), z_ij = 1 where i = j and -1 elsewhere."""
    logits_BB = similarities(image_BD, text_BD, scale) + bias
    sign_BB = 2 * torch.eye(len(logits_BB), device=logits_BB.device) - 1
    return -F.logsigmoid(sign_BB * logits_BB).sum() / len(logits_BB)
