"""Captions read from the features of a pretrained image encoder, in the place of image tokens.

A tokenizer's codes say what an image looks like, and a few hundred captions do not teach what they mean. Features of an
encoder that was trained on a million images say it already. As in Janus (Wu et al., 2024), the two directions then see
an image in two ways: captions are read from its features, images are still generated as tokens.

Cycles need the features of images that do not exist. :meth:`ImageFeatures.of_texts` gives them: a ridge regression from
the mean of a text's frozen features to the features of its image, fitted to the pairs, plus what it left unexplained of
some other image.

Shapes: B rows, L text tokens, F width of the frozen text features, G width of the image features, D encoder width, R
residuals, X pairs of a text and an image.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.rng import StepRNG

_RESIDUALS = 512
"""Number of residuals of the regression that are kept (R)."""
_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Penalties that are tried, as multiples of the mean of the diagonal that they are added to."""
_HELD_OUT = 6
"""One of so many pairs is held out to choose the penalty."""


class ImageFeatures(nn.Module):
    """From an image's features to what the text decoder reads, and from a text to the features of an image."""

    mean_G: Tensor
    scale_G: Tensor
    text_mean_F: Tensor
    from_text_FG: Tensor
    residuals_RG: Tensor

    def __init__(self, *, width: int, features: int, text_features: int) -> None:
        """``features`` is G, ``text_features`` F and ``width`` D."""
        super().__init__()
        self.projection = nn.Linear(features, width)
        self.register_buffer("mean_G", torch.zeros(features))
        self.register_buffer("scale_G", torch.ones(features))
        self.register_buffer("text_mean_F", torch.zeros(text_features))
        self.register_buffer("from_text_FG", torch.zeros(text_features, features))
        self.register_buffer("residuals_RG", torch.zeros(_RESIDUALS, features))

    def forward(self, features_BG: Float[Tensor, "B G"]) -> Float[Tensor, "B 1 D"]:
        """The one position that the text decoder reads."""
        return self.projection((features_BG - self.mean_G) * self.scale_G)[:, None]

    @torch.no_grad()
    def of_texts(
        self, text_BLF: Float[Tensor, "B L F"], valid_BL: Bool[Tensor, "B L"], *, noise: float, rng: StepRNG
    ) -> Float[Tensor, "B G"]:
        """Features of an image for each text: the regression's, and ``noise`` times the residual of a random pair."""
        row_B = rng.uniform("image_features", len(text_BLF), device=text_BLF.device).mul(_RESIDUALS).long()
        return self.mean_G + self._predicted(text_BLF, valid_BL) + noise * self.residuals_RG[row_B]

    @torch.no_grad()
    def agreement(
        self, features_BG: Float[Tensor, "B G"], text_BLF: Float[Tensor, "B L F"], valid_BL: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B"]:
        """Cosine between the features of each image and those that the regression gives its text, both scaled.

        The text decoder tells how usual a caption is for an image, which favours captions that fit many; the regression
        goes the other way, from the caption to the image.
        """
        seen_BG, told_BG = features_BG - self.mean_G, self._predicted(text_BLF, valid_BL)
        return F.cosine_similarity(seen_BG * self.scale_G, told_BG * self.scale_G, dim=-1)

    def _predicted(self, text_BLF: Tensor, valid_BL: Tensor) -> Float[Tensor, "B G"]:
        """The regression's features of texts, less the mean."""
        return (mean_of_text(text_BLF, valid_BL) - self.text_mean_F) @ self.from_text_FG

    @torch.no_grad()
    def fit(self, features_XG: Float[Tensor, "X G"], text_XF: Float[Tensor, "X F"]) -> None:
        """Set the scale of the features and the regression by pairs; the captions of an image lie side by side.

        The penalty is the one with the smallest error on pairs that are held out, of which there must be two or more;
        with fewer it is the largest.
        """
        mean_G, text_mean_F = features_XG.mean(0), text_XF.mean(0)
        y_XG, x_XF = features_XG - mean_G, text_XF - text_mean_F
        fitted = len(x_XF) - len(x_XF) // _HELD_OUT
        best = _PENALTIES[-1]
        if len(x_XF) - fitted > 1:
            errors = [
                (y_XG[fitted:] - x_XF[fitted:] @ _ridge(x_XF[:fitted], y_XG[:fitted], penalty)).square().sum().item()
                for penalty in _PENALTIES
            ]
            best = _PENALTIES[errors.index(min(errors))]
        from_text_FG = _ridge(x_XF, y_XG, best)
        residuals_XG = y_XG - x_XF @ from_text_FG
        some_R = torch.linspace(0, len(residuals_XG) - 1, _RESIDUALS).long()
        # A feature that never varies says nothing, and must not become infinite.
        self.scale_G.copy_(features_XG.std(0, correction=0).clamp_min(1e-6).reciprocal())
        self.mean_G.copy_(mean_G)
        self.text_mean_F.copy_(text_mean_F)
        self.from_text_FG.copy_(from_text_FG)
        self.residuals_RG.copy_(residuals_XG[some_R])


def mean_of_text(text_BLF: Float[Tensor, "B L F"], valid_BL: Bool[Tensor, "B L"]) -> Float[Tensor, "B F"]:
    """The mean of a text's frozen features, which are zero at padding."""
    return text_BLF.float().sum(1) / valid_BL.sum(1, keepdim=True).clamp_min(1)


def _ridge(x_XF: Tensor, y_XG: Tensor, penalty: float) -> Float[Tensor, "F G"]:
    """The W that minimizes |y - x W|² + c |W|², where c is ``penalty`` times the mean of the diagonal of x'x."""
    gram_FF = x_XF.T @ x_XF
    gram_FF.diagonal().add_(penalty * gram_FF.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.solve(gram_FF, x_XF.T @ y_XG)
