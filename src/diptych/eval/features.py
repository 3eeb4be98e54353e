"""Feature extractors for the Frechet distance. Only a hub name reaches the network.

Shape suffixes: B batch, C channels, H W height and width, D width of the features, N tokens.
"""

import warnings
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from diptych.encoders.image import HubImageEncoder, resize
from diptych.errors import UserError
from diptych.eval.frechet import FeatureStatistics


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images to features. `name` goes into reports: distances of different extractors are not comparable."""

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


class RandomFeatures(nn.Module):
    """304 features of a random, never trained convolutional network. The default: needs no download.

    They see colour, layout, contrast, texture and sharpness at four scales, not objects: the distance tells blur,
    noise, colour shifts and lost variety, and cannot tell whether a dog looks like a dog. It is not FID and not
    comparable with it. The same seed gives the same weights on every machine.

    At 64, 32, 16 and 8 pixels: 3 x 3 convolution, ReLU, 3 x 3 convolution; the features are the logarithm of either
    layer's mean absolute response. To these come the colours of a 4 x 4 thumbnail.
    """

    SIZE, SCALES, CHANNELS = 64, 4, 32
    FLOOR = 0.02
    """Added before the logarithm: responses below some 2 of 255 grey levels count as silence."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.name = f"random-conv-{seed}"
        generator = torch.Generator().manual_seed(seed)
        # `skip_init`: the usual constructor would draw from the global generator.
        self.edges = skip_init(nn.Conv2d, 3, self.CHANNELS, 3, bias=False)
        self.textures = skip_init(nn.Conv2d, self.CHANNELS, self.CHANNELS, 3, groups=4, bias=False)
        for conv in (self.edges, self.textures):
            nn.init.orthogonal_(conv.weight, generator=generator)
            # Blind to flat areas: their brightness would drown fine detail. The thumbnail carries the colours.
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

    A folder never touches the network. The images are resized to the model's square input, not cropped again.
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
    code when it is loaded: trust its source.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.name = Path(path).name
        if not Path(path).is_file():
            raise UserError(f"{path} is not a file: give the path of a TorchScript file.")
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


def open_extractor(name: str | None) -> FeatureExtractor:
    if name is None:
        return RandomFeatures()
    if Path(name).is_file():
        return TorchScriptExtractor(name)
    return HubExtractor(name)
