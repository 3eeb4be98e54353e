"""Frechet distance between two sets of images: FID with the features of Inception, "rFD" for reconstructions.

    d^2 = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

where mu and C are mean and covariance of the features of either set (Dowson and Landau 1982; Heusel et al. 2017).
It is called FID only where the features are those of FID's Inception network, which is recognized by the checksum of
its weights. Distances are comparable only for the same feature extractor, the same number of images and the same
treatment of the images: JPEG against PNG alone moved a published FID from 11.18 to 13.74. Of the feature extractors
below, only one that is given by a hub name uses the internet.

Shapes: B batch, C channels, H and W height and width, D width of the features.
"""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from diptych.encoders.image import HubImageEncoder, resize
from diptych.errors import UserError, first_line

FID_WEIGHTS = {
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "inception-2015-12-05.pt of StyleGAN",
    "6726825d": "pt_inception-2015-12-05-6726825d.pth of pytorch-fid",
}
"""Beginnings of the SHA-256 of files with the weights of FID's Inception network, and what each file is."""


def is_fid_weights(path: str | Path) -> bool:
    """Whether a file has the checksum of one of :data:`FID_WEIGHTS`."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return any(digest.startswith(known) for known in FID_WEIGHTS)


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches; two of them can be merged. 64-bit throughout.

    Chan, Golub and LeVeque's update: it keeps the mean and the sum of squared deviations, so no digits are lost as
    in E[x^2] - E[x]^2. Memory: one D x D matrix of doubles, whatever the number of images.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean_D = torch.zeros(width, dtype=torch.float64)
        self.scatter_DD = torch.zeros(width, width, dtype=torch.float64)

    @property
    def width(self) -> int:
        """Width D of the features."""
        return self.mean_D.shape[0]

    def add(self, features_BD: Float[Tensor, "B D"]) -> Self:
        """Adds a batch of features from any device. Raises `UserError` when they are not finite or of another width."""
        features_BD = features_BD.detach().to("cpu", torch.float64)
        if not features_BD.isfinite().all():
            raise UserError("The features contain NaN or infinity: check the images and the feature extractor.")
        batch = FeatureStatistics(features_BD.shape[1])
        if batch.width != self.width:
            raise UserError(f"Features of width {batch.width} added to width {self.width}: use one extractor.")
        if len(features_BD):
            batch.count = len(features_BD)
            batch.mean_D = features_BD.mean(0)
            centred_BD = features_BD - batch.mean_D
            batch.scatter_DD = centred_BD.T @ centred_BD
        return self.merge(batch)

    def merge(self, other: "FeatureStatistics") -> Self:
        """Adds the samples of `other`, e.g. of another device or rank. Raises `UserError` for another width."""
        if other.width != self.width:
            raise UserError(f"Statistics of width {other.width} merged into width {self.width}: use one extractor.")
        if other.count:
            total = self.count + other.count
            shift_D = other.mean_D - self.mean_D
            self.mean_D = self.mean_D + shift_D * (other.count / total)
            self.scatter_DD = (
                self.scatter_DD + other.scatter_DD + torch.outer(shift_D, shift_D) * (self.count * other.count / total)
            )
            self.count = total
        return self

    @property
    def covariance_DD(self) -> Float[Tensor, "D D"]:
        """The unbiased covariance (divided by count - 1). Raises `UserError` below two samples."""
        if self.count < 2:
            raise UserError(f"A covariance needs at least 2 images, got {self.count}: give more images.")
        return self.scatter_DD / (self.count - 1)


@dataclass(kw_only=True, slots=True)
class FrechetDistance:
    """The distance and its parts. `float()` gives the value."""

    value: float
    """Squared Frechet distance, in the squared unit of the features (as FID is printed)."""
    mean_term: float
    """The part from the means: how far the typical image is off."""
    covariance_term: float
    """The part from the covariances: wrong or missing variety."""
    counts: tuple[int, int]
    """Number of images in the first and in the second set."""
    warning: str | None
    """A sentence when a set has no more images than features: the estimate is then far too high and only rough."""

    def __float__(self) -> float:
        return self.value


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> FrechetDistance:
    """Squared Frechet distance of two Gaussians with the given statistics.

    The trace of the root is the sum of the singular values of C_a^1/2 C_b^1/2. Unlike the root of the product C_a C_b,
    it needs symmetric roots only, is real for singular covariances too, and loses no digits to squaring.

    Raises `UserError` for different widths or fewer than two images in a set.
    """
    if a.width != b.width:
        raise UserError(f"Statistics of widths {a.width} and {b.width} cannot be compared: use one extractor for both.")
    covariance_a, covariance_b = a.covariance_DD, b.covariance_DD
    cross = torch.linalg.svdvals(_root(covariance_a) @ _root(covariance_b)).sum()
    mean_term = (a.mean_D - b.mean_D).square().sum().item()
    covariance_term = (covariance_a.trace() + covariance_b.trace() - 2 * cross).clamp(min=0).item()
    fewest = min(a.count, b.count)
    few = f"only {fewest} images for {a.width} features: the distance is biased upwards"
    return FrechetDistance(
        value=mean_term + covariance_term,
        mean_term=mean_term,
        covariance_term=covariance_term,
        counts=(a.count, b.count),
        warning=few if fewest <= a.width else None,
    )


def _root(matrix_DD: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Root of a symmetric positive semi-definite matrix; eigenvalues below zero are rounding errors."""
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    return (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images to features. `name` goes into reports, as distances of different extractors are not comparable."""

    name: str

    def __call__(self, pixels_BCHW: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]: ...


def feature_statistics(
    extractor: FeatureExtractor, pixels_BCHW: UInt8[Tensor, "B 3 H W"], *, batch_size: int = 64
) -> FeatureStatistics:
    """Statistics of the features of all images, `batch_size` at a time. Raises `UserError` when there is no image."""
    if not len(pixels_BCHW):
        raise UserError("No images to measure: give at least two.")
    batches = (extractor(batch_BCHW) for batch_BCHW in pixels_BCHW.split(batch_size))
    first_BD = next(batches)
    statistics = FeatureStatistics(first_BD.shape[1]).add(first_BD)
    for features_BD in batches:
        statistics.add(features_BD)
    return statistics


def metric_name(extractor: FeatureExtractor) -> str:
    """`fid` with FID's own network and weights; `frechet/NAME` with any other features."""
    return "fid" if getattr(extractor, "is_fid", False) else f"frechet/{extractor.name}"


class RandomFeatures(nn.Module):
    """304 features of a random, never trained convolutional network. The default: needs no download.

    They depend on colour, layout, contrast, texture and sharpness at four scales, not on objects. So the distance shows
    blur, noise, colour shifts and lost variety, but not whether a dog looks like a dog. It is not comparable with FID.
    The same seed gives the same weights on every machine.

    At 64, 32, 16 and 8 pixels: 3 x 3 convolution, ReLU, 3 x 3 convolution; the features are the logarithm of either
    layer's mean absolute response. To these come the colours of a 4 x 4 thumbnail.
    """

    SIZE, SCALES, CHANNELS = 64, 4, 32
    FLOOR = 0.02
    """Added before the logarithm: responses below some 2 of 255 grey levels count as none."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.name = f"random-conv-{seed}"
        generator = torch.Generator().manual_seed(seed)
        # `skip_init`: the usual constructor would draw from the global generator.
        self.edges = skip_init(nn.Conv2d, 3, self.CHANNELS, 3, bias=False)
        self.textures = skip_init(nn.Conv2d, self.CHANNELS, self.CHANNELS, 3, groups=4, bias=False)
        for conv in (self.edges, self.textures):
            nn.init.orthogonal_(conv.weight, generator=generator)
            # A sum of zero ignores flat areas, whose brightness would outweigh detail. The thumbnail keeps the colours.
            conv.weight.data -= conv.weight.data.mean((2, 3), keepdim=True)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels_BCHW: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        image_BCHW = resize(pixels_BCHW.to(self.edges.weight), self.SIZE) / 127.5 - 1
        features = [F.adaptive_avg_pool2d(image_BCHW, 4).flatten(1)]
        for _ in range(self.SCALES):
            edges_BCHW = self.edges(image_BCHW)
            textures_BCHW = self.textures(edges_BCHW.relu())
            features += [(maps.abs().mean((2, 3)) + self.FLOOR).log() for maps in (edges_BCHW, textures_BCHW)]
            image_BCHW = F.avg_pool2d(image_BCHW, 2)
        return torch.cat(features, 1)


class HubExtractor(nn.Module):
    """Pooled features of any vision model of `transformers`, from a folder or by hub name.

    A folder is read without the internet. The images are resized to the model's square input, not cropped again.
    """

    def __init__(self, path_or_name: str | Path) -> None:
        super().__init__()
        self.name = str(path_or_name)
        self.encoder = HubImageEncoder.from_pretrained(self.name).requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels_BCHW: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.encoder(pixels_BCHW)


class TorchScriptExtractor(nn.Module):
    """Features of a TorchScript file, e.g. the Inception network of FID; the file is the user's, never fetched.

    The module gets bytes [B, 3, H, W] and returns [B, D]. When its `forward` knows `return_features`, as the Inception
    file of StyleGAN does, it is set. Only FID with that network is comparable with published FIDs. Such a file can run
    code when it is loaded: trust its source. Raises `UserError` for a file that is none, or gives no features.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.name = Path(path).name
        if not Path(path).is_file():
            raise UserError(f"{path} is not a file: give the path of a TorchScript file.")
        self.is_fid = is_fid_weights(path)
        try:
            with warnings.catch_warnings():
                # The format is on its way out, but it is the one in which FID's network is passed around.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.model = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise UserError(f"{path} is not a TorchScript file: save it with torch.jit.save.") from error
        knows = any(argument.name == "return_features" for argument in self.model.forward.schema.arguments)
        self.options = {"return_features": True} if knows else {}

    @torch.no_grad()
    def forward(self, pixels_BCHW: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        features = self.model(pixels_BCHW, **self.options)
        if not isinstance(features, Tensor) or features.flatten(1).ndim != 2 or len(features) != len(pixels_BCHW):
            raise UserError(f"{self.name} does not give one row of features per image: it is no feature extractor.")
        return features.flatten(1).float()


class PytorchFidExtractor(nn.Module):
    """The Inception network of `pytorch-fid`, from the extra `fid`, with its weights from a file that the user has.

    Images are resized as there: to 299 pixels, bilinear, without antialiasing. Raises `UserError` where the package is
    missing or the file does not hold the weights of this network.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.name, self.is_fid = Path(path).name, is_fid_weights(path)
        try:
            from pytorch_fid import inception
        except (ImportError, RuntimeError) as error:  # torchvision raises the latter beside another build of torch
            raise UserError(f"{path}: weights of pytorch-fid need it ({error}): pip install 'diptych[fid]'") from error
        fetch = inception.load_state_dict_from_url
        inception.load_state_dict_from_url = lambda *_, **__: torch.load(path, map_location="cpu", weights_only=True)
        try:  # the package has no other way to say where the weights are
            self.model = inception.InceptionV3([inception.InceptionV3.DEFAULT_BLOCK_INDEX]).eval()
        except Exception as error:
            raise UserError(f"{path}: not the weights of pytorch-fid's Inception ({first_line(error)})") from error
        finally:
            inception.load_state_dict_from_url = fetch

    @torch.no_grad()
    def forward(self, pixels_BCHW: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        [features] = self.model(pixels_BCHW.float() / 255)
        return features.flatten(1)


def open_extractor(name: str | None) -> FeatureExtractor:
    """The random network for None, a TorchScript file, weights of `pytorch-fid` (`.pth`), or else a model of
    `transformers` by folder or hub name."""
    if name is None:
        return RandomFeatures()
    if Path(name).is_file() and name.endswith(".pth"):
        return PytorchFidExtractor(name)
    if Path(name).is_file():
        return TorchScriptExtractor(name)
    return HubExtractor(name)
