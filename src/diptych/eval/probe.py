"""What linear maps of frozen features tell: classes apart (the linear probe), and how well captions fit their images.

Shapes: N items, M test items, V validation items, D width, C classes; I images, T texts, X and Y widths, Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.data.audit import Fit, fits_of
from diptych.data.engine import LOCAL, Engine, Rows
from diptych.data.pixels import SkippedItems, captioned_items, channels_first, read_block
from diptych.data.sources import Source
from diptych.encoders import ImageEncoder, PooledTextEncoder, open_image_encoder, open_text_encoder
from diptych.errors import UserError
from diptych.nn.inference import Device, eval_mode, pick_device
from diptych.report.terminal import ProgressLine
from diptych.rng import derive_seed

L2_GRID = tuple(10.0**-power for power in range(7))
"""Strengths of the l2 penalty, strong to weak: each fit begins where the one before it ended."""
_VALIDATION = 0.2
_ITERATIONS = 500
_ROWS = 64
"""Number of images that are encoded at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear classifier of features, which it standardizes."""

    mean_D: Float[Tensor, "D"]
    std_D: Float[Tensor, "D"]
    weight_DC: Float[Tensor, "D C"]
    bias_C: Float[Tensor, "C"]

    def __call__(self, features_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Logits."""
        return (features_ND - self.mean_D) / self.std_D @ self.weight_DC + self.bias_C

    def accuracy(self, features_ND: Float[Tensor, "N D"], labels_N: Int[Tensor, "N"]) -> float:
        """Share of the items whose most probable class is their label."""
        return (self(features_ND).argmax(1) == labels_N).float().mean().item()


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The result of a linear probe."""

    accuracy: float
    """Share of the test items that are classified correctly."""
    validation_accuracy: float
    """The same of the validation items, by the classifier that was fitted without them."""
    l2: float
    """Strength of the l2 penalty with the best validation accuracy."""


def linear_probe(
    train_ND: Float[Tensor, "N D"],
    labels_N: Int[Tensor, "N"],
    test_MD: Float[Tensor, "M D"],
    labels_M: Int[Tensor, "M"],
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    grid: Sequence[float] = L2_GRID,
    seed: int = 0,
) -> Probe:
    """Multinomial logistic regression with the l2 of ``grid`` that does best on validation items.

    The validation items are ``validation``, features [V D] and labels [V], or else a fifth of the training items drawn
    by ``seed``. The classifier that is scored on the test items is fitted to training and validation items together.
    Raises UserError where there are fewer than two training items to draw from.
    """
    if validation is None:
        if len(train_ND) < 2:
            raise UserError(f"a linear probe needs two training items or more, not {len(train_ND)}")
        order_N = torch.randperm(len(train_ND), generator=torch.Generator().manual_seed(derive_seed(seed, "probe")))
        held, kept = order_N.to(labels_N.device).split(
            [n := max(1, round(_VALIDATION * len(order_N))), len(order_N) - n]
        )
        validation, (train_ND, labels_N) = (train_ND[held], labels_N[held]), (train_ND[kept], labels_N[kept])
    classes = 1 + int(torch.cat([labels_N, labels_M, validation[1]]).max())
    chosen = select_linear(train_ND, labels_N, validation=validation, classes=classes, grid=grid)
    both = torch.cat([train_ND, validation[0]]), torch.cat([labels_N, validation[1]])
    final = fit_linear(*both, classes=classes, l2=chosen.l2)
    return Probe(
        accuracy=final.accuracy(test_MD, labels_M), validation_accuracy=chosen.validation_accuracy, l2=chosen.l2
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The classifier of the l2 penalty that does best on validation items, which it was not fitted to."""

    linear: Linear
    l2: float
    validation_accuracy: float


def select_linear(
    train_ND: Float[Tensor, "N D"],
    labels_N: Int[Tensor, "N"],
    *,
    validation: tuple[Tensor, Tensor],
    classes: int,
    grid: Sequence[float] = L2_GRID,
) -> Selected:
    """Multinomial logistic regression with the l2 of ``grid`` that does best on ``validation``: [V D] and labels [V].

    Of equals it is the first of ``grid``.
    """
    found: Linear | None = None
    best: Selected | None = None
    for l2 in grid:
        found = fit_linear(train_ND, labels_N, classes=classes, l2=l2, start=found)
        accuracy = found.accuracy(*validation)
        if best is None or accuracy > best.validation_accuracy:
            best = Selected(linear=found, l2=l2, validation_accuracy=accuracy)
    assert best is not None
    return best


def fit_linear(
    features_ND: Float[Tensor, "N D"],
    labels_N: Int[Tensor, "N"],
    *,
    classes: int,
    l2: float,
    start: Linear | None = None,
) -> Linear:
    """The minimum of mean cross-entropy + l2/2 ||W||^2, by L-BFGS.

    The problem is convex, so ``start``, where the search begins, changes the time and not the result.

    Features are standardized by their own mean and deviation, so that ``l2`` means the same for any encoder.
    """
    mean_D, std_D = features_ND.mean(0), features_ND.std(0, correction=0).clamp_min(1e-6)
    normal_ND = (features_ND - mean_D) / std_D
    weight_DC = start.weight_DC.clone() if start else features_ND.new_zeros(features_ND.shape[1], classes)
    bias_C = start.bias_C.clone() if start else features_ND.new_zeros(classes)
    # The weights of the minimum lie in the span of the rows. Where these are few, they are searched for there.
    basis_DN = None
    if 4 * len(normal_ND) <= len(weight_DC):
        basis_DN = torch.linalg.qr(normal_ND.T.cpu())[0].to(normal_ND.device)  # MPS has none
        normal_ND, weight_DC = normal_ND @ basis_DN, basis_DN.T @ weight_DC
    parameters = [weight_DC.requires_grad_(), bias_C.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(normal_ND @ weight_DC + bias_C, labels_N) + l2 / 2 * weight_DC.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight_DC = weight_DC.detach() if basis_DN is None else basis_DN @ weight_DC.detach()
    return Linear(mean_D=mean_D, std_D=std_D, weight_DC=weight_DC, bias_C=bias_C.detach())


# How well captions fit their images

_RIDGE = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Strengths of the penalty that the regression chooses from, in mean eigenvalues of the features."""
_NEAREST = 10
"""Number of nearest others to which a cosine is compared, as in CSLS."""
_OTHERS = 10_000
"""Number of others among which the nearest are looked for, a random part of more."""
_BLOCK = 1024


@torch.no_grad()
def caption_fits(
    images_IX: Float[Tensor, "I X"], texts_TY: Float[Tensor, "T Y"], image_of_T: Int[Tensor, "T"]
) -> Float[Tensor, "T"]:
    """How well each text fits its image, by what all *other* images say of the relation between both.

    A ridge regression from images to texts predicts a text for each image, and one from texts to images an image for
    each text, always without that image and its texts. So no prediction has seen the pair that it judges. The cosine of
    the prediction is compared with those of the nearest others on both sides, and the two directions are added in
    standard deviations. `image_of_T` is the row of each text's image.

    Left out in closed form: W without pair i is W - G^-1 x_i (y_i - x_i W) / (1 - x_i G^-1 x_i), where G = X'X + l I
    (Allen, "The relationship between variable selection and data augmentation and a method for prediction", 1974). The
    penalty l is the one with the smallest error on what is left out. The comparison is CSLS (Conneau et al., "Word
    translation without parallel data", 2018).
    """
    images_IX, texts_TY = (_centred_units(each.double()) for each in (images_IX, texts_TY))
    mean_IY = torch.zeros(len(images_IX), texts_TY.shape[1], dtype=texts_TY.dtype, device=texts_TY.device)
    mean_IY.index_add_(0, image_of_T, texts_TY)
    mean_IY /= image_of_T.bincount(minlength=len(images_IX))[:, None]
    all_I = torch.arange(len(images_IX), device=image_of_T.device)
    told_IY = left_out_predictions(images_IX, mean_IY, queries_QX=images_IX, row_of_Q=all_I)
    shown_TX = left_out_predictions(mean_IY, images_IX, queries_QX=texts_TY, row_of_Q=image_of_T)
    directions = (
        _csls(told_IY, texts_TY, all_I, image_of_T, own_a=image_of_T, own_b=torch.arange(len(texts_TY))),
        _csls(shown_TX, images_IX, image_of_T, all_I, own_a=torch.arange(len(texts_TY)), own_b=image_of_T),
    )
    return sum(((each - each.mean()) / each.std().clamp_min(1e-12) for each in directions), torch.zeros(())).float()


def left_out_predictions(
    x_IX: Float[Tensor, "I X"],
    y_IY: Float[Tensor, "I Y"],
    *,
    queries_QX: Float[Tensor, "Q X"],
    row_of_Q: Int[Tensor, "Q"],
) -> Float[Tensor, "Q Y"]:
    """The ridge regression from x to y at each query, fitted without the row that the query belongs to."""
    values_X, basis_XX = torch.linalg.eigh(x_IX.T @ x_IX)
    a_IX, cross_XY = x_IX @ basis_XX, basis_XX.T @ (x_IX.T @ y_IY)
    best, smallest = values_X, float("inf")
    for strength in _RIDGE:
        inverse_X = 1 / (values_X.clamp_min(0) + strength * values_X.mean())
        leverage_I1 = (a_IX**2 * inverse_X).sum(1, keepdim=True)
        residual_IY = (y_IY - a_IX @ (inverse_X[:, None] * cross_XY)) / (1 - leverage_I1)
        if (error := float(residual_IY.square().sum())) < smallest:
            best, smallest, kept_IY = inverse_X, error, residual_IY
    a_QX = queries_QX @ basis_XX * best
    share_Q1 = (a_QX * a_IX[row_of_Q]).sum(1, keepdim=True)
    return a_QX @ cross_XY - share_Q1 * kept_IY[row_of_Q]


def _csls(
    a_AD: Tensor, b_BD: Tensor, image_of_A: Tensor, image_of_B: Tensor, *, own_a: Tensor, own_b: Tensor
) -> Float[Tensor, "T"]:
    """Twice the cosine of rows ``own_a`` of a with ``own_b`` of b, less the mean of each with its nearest others."""
    a_AD, b_BD = F.normalize(a_AD, dim=-1), F.normalize(b_BD, dim=-1)
    own_T = (a_AD[own_a] * b_BD[own_b]).sum(1)
    near_A, near_B = _near(a_AD, b_BD, image_of_A, image_of_B), _near(b_BD, a_AD, image_of_B, image_of_A)
    return 2 * own_T - near_A[own_a] - near_B[own_b]


def _near(a_AD: Tensor, b_BD: Tensor, image_of_A: Tensor, image_of_B: Tensor) -> Tensor:
    """The mean cosine of each row of a with the nearest rows of b that belong to other images."""
    if len(b_BD) > _OTHERS:
        draw = torch.Generator().manual_seed(derive_seed("caption fits"))
        some = torch.randperm(len(b_BD), generator=draw)[:_OTHERS].to(b_BD.device)
        b_BD, image_of_B = b_BD[some], image_of_B[some]
    found = []
    for a_RD, image_of_R in zip(a_AD.split(_BLOCK), image_of_A.split(_BLOCK), strict=True):
        cosine_RB = (a_RD @ b_BD.T).masked_fill(image_of_R[:, None] == image_of_B, -1.0)
        found.append(cosine_RB.topk(min(_NEAREST, len(b_BD)), dim=1).values.mean(1))
    return torch.cat(found)


def _centred_units(x_ND: Tensor) -> Tensor:
    return F.normalize(x_ND - x_ND.mean(0), dim=-1)


def encoder_fits(
    source: Source,
    image_encoder: str,
    text_encoder: str,
    *,
    skipped: SkippedItems,
    device: Device = "auto",
    engine: Engine = LOCAL,
) -> list[Fit]:
    """:func:`caption_fits` of the captions of ``source``, by two pretrained encoders by name.

    Captions of readable images; raises UserError for an encoder that cannot be opened and for fewer than two captioned
    images. The ``reopen`` of another engine than the local is :func:`open_encoders` and gives the source besides.
    """
    captioned = captioned_items(source)
    if len(captioned) < 2:
        raise UserError(f"{source.name}: {len(captioned)} captioned images, too few to compare captions with images")
    images, texts = open_encoders(image_encoder, text_encoder, device)
    found = engine.gather(
        "fits",
        _pair_features,
        (images, texts, source),
        captioned,
        source=source,
        network=torch.nn.ModuleList([images, texts]),
        rows=_ROWS,
        skipped=skipped,
        advance=ProgressLine("encoding pairs"),
    )
    own_T = np.repeat(np.arange(len(found["items"])), found["counts"])
    fit_T = caption_fits(torch.from_numpy(found["x"]), torch.from_numpy(found["y"]), torch.from_numpy(own_T))
    return fits_of(found["items"], found["counts"], fit_T.numpy())


def open_encoders(image_encoder: str, text_encoder: str, device: Device) -> tuple[ImageEncoder, PooledTextEncoder]:
    """Pretrained encoders of images and texts, by name, on a device."""
    images, texts = open_image_encoder(image_encoder), open_text_encoder(text_encoder)
    return images.to(pick_device(device)), texts.to(pick_device(device))


def _pair_features(tools: tuple[ImageEncoder, PooledTextEncoder, Source], items: np.ndarray) -> Rows:
    """Features of images and of all their captions."""
    images, texts, source = tools
    pixels, items, skipped = read_block(source, items, size=images.image_size)
    if not len(items):
        return Rows(skipped=skipped)
    captions = [source.captions(int(item)) for item in items]
    with eval_mode(images):
        x_IX = images(channels_first(pixels).to(next(images.parameters()).device)).float().cpu().numpy()
    told = [text for some in captions for text in some]
    order = sorted(range(len(told)), key=lambda place: len(told[place]))  # little padding
    y_TY = np.empty((len(told), texts.width), np.float32)
    y_TY[order] = texts([told[place] for place in order]).cpu().numpy()
    counts = np.array([len(some) for some in captions], np.int64)
    return Rows(arrays={"items": items, "counts": counts, "x": x_IX, "y": y_TY}, skipped=skipped)
