"""Random views of images, made for a whole batch at once on the device that trains.

Shapes: B rows, H and W pixels of the images, S pixels of a side of the views, K random numbers of a view.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diptych.rng import StepRNG

_NUMBERS = 13


@dataclass(kw_only=True, slots=True)
class ViewConfig:
    """How views differ from their image. The defaults are ITO's augmentation."""

    scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the image's area that a crop keeps."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of a crop's width to its height."""
    flip: float = 0.5
    """Probability that a view is mirrored."""
    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed."""
    brightness: float = 0.4
    """Largest change b of the brightness, which is multiplied by a factor in [1 - b, 1 + b]."""
    contrast: float = 0.4
    """Largest change c of the distance from the image's mean grey, multiplied by a factor in [1 - c, 1 + c]."""
    saturation: float = 0.4
    """Largest change s of the distance of colours from grey, multiplied by a factor in [1 - s, 1 + s]."""
    hue: float = 0.1
    """Largest turn of the hue, as a share of the colour circle."""
    grey: float = 0.2
    """Probability that a view has no colour."""
    blur: float = 0.5
    """Probability that a view is blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels of a view of side 224; it shrinks with the view."""


def weak_view() -> ViewConfig:
    """The augmentation that CLIP is trained with in open_clip: a crop of nearly the whole image and nothing else."""
    return ViewConfig(scale=(0.9, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0)


def whole_view() -> ViewConfig:
    """The whole image, resized, as it is seen outside of training."""
    return ViewConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0)


def draw_view(rng: StepRNG, name: str, rows: int) -> Float[Tensor, "B K"]:
    """Random numbers in [0, 1) for one view of each row, on the CPU: choosing rows by them must not wait for a GPU."""
    return rng.uniform(name, rows, _NUMBERS)


@torch.no_grad()
def make_view(
    pixels_B3HW: UInt8[Tensor, "B 3 H W"], drawn_BK: Float[Tensor, "B K"], config: ViewConfig, *, size: int
) -> Float[Tensor, "B 3 S S"]:
    """A view of each image, values in [0, 1]: crop, flip, jitter, grey and blur, each row by its own random numbers.

    Departure from torchvision's transforms, after which the paper's are named: the changes of colour come in one fixed
    order, and a crop that would leave the image is narrowed instead of drawn again.
    """
    assert drawn_BK.device.type == "cpu"
    view_B3SS = _crop(pixels_B3HW, drawn_BK, config, size=size).float()
    with torch.autocast(pixels_B3HW.device.type, enabled=False):
        view_B3SS = _on(view_B3SS, drawn_BK[:, 5] < config.jitter, drawn_BK[:, 6:10], _jitter, config)
        view_B3SS = _on(view_B3SS, drawn_BK[:, 10] < config.grey, drawn_BK, _grey, config)
        return _on(view_B3SS, drawn_BK[:, 11] < config.blur, drawn_BK[:, 12], _blur, config)


def _on(view_B3SS: Tensor, chosen_B: Tensor, drawn: Tensor, change, config: ViewConfig) -> Tensor:
    """The views, of which the chosen rows are changed in place."""
    rows = chosen_B.nonzero()[:, 0]
    if len(rows):
        there = rows.to(view_B3SS.device)
        changed = change(view_B3SS[there], drawn[rows].to(view_B3SS.device), config)
        view_B3SS[there] = changed
    return view_B3SS


def _between(drawn: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * drawn


def _crop(pixels_B3HW: Tensor, drawn_BK: Tensor, config: ViewConfig, *, size: int) -> Tensor:
    """A window of each image, resized with an antialiased filter to ``size``: two small matrix products an image.

    A bilinear grid sample would take three times as long on a CPU and does not filter. Under autocast to bf16 values
    are off by up to two grey levels of 255; the tower rounds what it sees as much.
    """
    area_B = _between(drawn_BK[:, 0], *config.scale)
    stretch_B = torch.exp(_between(drawn_BK[:, 1], *map(math.log, config.ratio))).sqrt()
    width_B, height_B = ((area_B.sqrt() * s).clamp(max=1.0) for s in (stretch_B, 1 / stretch_B))
    columns_BSW = _window(width_B, drawn_BK[:, 2], pixels_B3HW.shape[3], size)
    mirrored_B11 = (drawn_BK[:, 4] < config.flip)[:, None, None]
    columns_BSW = torch.where(mirrored_B11, columns_BSW.flip(1), columns_BSW)
    rows_BSH = _window(height_B, drawn_BK[:, 3], pixels_B3HW.shape[2], size)
    device = pixels_B3HW.device
    rows_B1SH, columns_BWS = (rows_BSH[:, None] / 255).to(device), columns_BSW.transpose(1, 2).to(device)
    lines_BXS = pixels_B3HW.flatten(1, 2).float() @ columns_BWS  # X: lines of all three colours
    return rows_B1SH @ lines_BXS.unflatten(1, (3, -1))


def _window(share_B: Tensor, place_B: Tensor, pixels: int, size: int) -> Float[Tensor, "B S W"]:
    """The weight of every pixel of an axis in every pixel of the view: a triangle as wide as a step of the view.

    The window has ``share_B`` of the axis; ``place_B`` is its place, 0 at the start and 1 at the end.
    """
    step_B1 = (share_B * pixels / size)[:, None]
    start_B1 = (place_B * (1 - share_B) * pixels)[:, None]
    centre_BS = start_B1 + step_B1 * (torch.arange(size) + 0.5) - 0.5
    away_BSW = (centre_BS[:, :, None] - torch.arange(pixels)).abs()
    weight_BSW = (1 - away_BSW / step_B1[:, :, None].clamp(min=1.0)).clamp(min=0.0)
    return weight_BSW / weight_BSW.sum(-1, keepdim=True)


def _jitter(view: Tensor, drawn_B4: Tensor, config: ViewConfig) -> Tensor:
    from kornia.enhance import (
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_saturation_with_gray_subtraction,
    )

    strengths = (config.brightness, config.contrast, config.saturation)
    brightness, contrast, saturation = (_between(drawn_B4[:, i], 1 - s, 1 + s) for i, s in enumerate(strengths))
    view = adjust_brightness_accumulative(view, brightness)
    view = adjust_contrast_with_mean_subtraction(view, contrast)
    view = adjust_saturation_with_gray_subtraction(view, saturation)
    return _turn_hue(view, _between(drawn_B4[:, 3], -config.hue, config.hue)) if config.hue else view


def _turn_hue(view_B3SS: Tensor, turn_B: Tensor) -> Tensor:
    """Turn the hue by a share of the circle as in HSV, without computing HSV or atan: a fifth of kornia's time."""
    r, g, b = view_B3SS.unbind(1)
    value, least = view_B3SS.amax(1), view_B3SS.amin(1)
    chroma = value - least
    sixth = chroma.clamp(min=1e-8)
    hue = torch.where(value == r, (g - b) / sixth, torch.where(value == g, 2 + (b - r) / sixth, 4 + (r - g) / sixth))
    hue = hue + 6 * turn_B[:, None, None]
    offset = torch.tensor([5.0, 3.0, 1.0], device=view_B3SS.device)[:, None, None]
    k = (hue[:, None] + offset).remainder_(6)
    share = torch.minimum(k, 4 - k).clamp_(0, 1)
    return share.mul_(-chroma[:, None]).add_(value[:, None])  # in place: fresh memory costs more than arithmetic


def _grey(view: Tensor, drawn: Tensor, config: ViewConfig) -> Tensor:
    from kornia.color import rgb_to_grayscale

    return rgb_to_grayscale(view).expand_as(view)


def _blur(view_B3SS: Tensor, drawn_B: Tensor, config: ViewConfig) -> Tensor:
    from kornia.filters import gaussian_blur2d

    shrink = view_B3SS.shape[-1] / 224
    sigma_B2 = (_between(drawn_B, *config.blur_sigma) * shrink)[:, None].clamp(min=0.05).expand(-1, 2)
    reach = max(1, math.ceil(2.5 * config.blur_sigma[1] * shrink))
    return gaussian_blur2d(view_B3SS, (2 * reach + 1, 2 * reach + 1), sigma_B2)
