"""What can be trained. A recipe is a function that returns a complete run; variants call one another."""

from collections.abc import Callable
from typing import Protocol

from diptych.recipes import itit_recipes as itit
from diptych.recipes import ito_recipes as ito
from diptych.recipes import stage_recipes as stages
from diptych.recipes import uml_recipes as uml
from diptych.recipes import uml_ssl_recipes


class Run(Protocol):
    """A complete description of a training run: all its fields, and the way to carry it out."""

    def fit(self, out, *, recipe: str): ...


RECIPES: dict[str, Callable[[], Run]] = {
    "itit-tiny": itit.itit_tiny,
    "itit-small": itit.itit_small,
    "itit-base": itit.itit_base,
    "itit-large": itit.itit_large,
    "itit-huge": itit.itit_huge,
    "ito-tiny": ito.ito_tiny,
    "ito-small": ito.ito_small,
    "ito-base": ito.ito_base,
    "ito-large": ito.ito_large,
    "clip-tiny": ito.clip_tiny,
    "clip-small": ito.clip_small,
    "clip-base": ito.clip_base,
    "clip-large": ito.clip_large,
    "clip-aug-tiny": ito.clip_aug_tiny,
    "clip-aug-small": ito.clip_aug_small,
    "clip-aug-base": ito.clip_aug_base,
    "siglip-tiny": ito.siglip_tiny,
    "siglip-small": ito.siglip_small,
    "siglip-base": ito.siglip_base,
    "slip-tiny": ito.slip_tiny,
    "slip-small": ito.slip_small,
    "slip-base": ito.slip_base,
    "uml-probe": uml.uml_probe,
    "uml-finetune": uml.uml_finetune,
    "uml-ssl": uml_ssl_recipes.uml_ssl,
    "vqgan-tiny": stages.vqgan_tiny,
    "vqgan-small": stages.vqgan_small,
    "vqgan-paper": stages.vqgan_paper,
    "text-encoder-tiny": stages.text_encoder_tiny,
    "text-encoder-small": stages.text_encoder_small,
}
"""Recipes by the name that `diptych fit` takes. The docstring of each gives command, hardware, time and result."""
