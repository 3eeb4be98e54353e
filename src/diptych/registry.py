"""What can be trained. A recipe is a function that returns a complete run; variants call one another."""

from collections.abc import Callable
from typing import Protocol

from diptych.dual import recipes as ito_recipes
from diptych.itit import recipes as itit_recipes
from diptych.tokenizers import recipes as stage_recipes
from diptych.uml import recipes as uml_recipes
from diptych.uml import recipes as uml_ssl_recipes


class Run(Protocol):
    """A complete description of a training run: all its fields, and the way to carry it out."""

    def fit(self, out, *, recipe: str): ...


RECIPES: dict[str, Callable[[], Run]] = {
    "itit-tiny": itit_recipes.itit_tiny,
    "itit-small": itit_recipes.itit_small,
    "itit-base": itit_recipes.itit_base,
    "itit-large": itit_recipes.itit_large,
    "itit-huge": itit_recipes.itit_huge,
    "ito-tiny": ito_recipes.ito_tiny,
    "ito-small": ito_recipes.ito_small,
    "ito-base": ito_recipes.ito_base,
    "ito-large": ito_recipes.ito_large,
    "clip-tiny": ito_recipes.clip_tiny,
    "clip-small": ito_recipes.clip_small,
    "clip-base": ito_recipes.clip_base,
    "clip-large": ito_recipes.clip_large,
    "clip-aug-tiny": ito_recipes.clip_aug_tiny,
    "clip-aug-small": ito_recipes.clip_aug_small,
    "clip-aug-base": ito_recipes.clip_aug_base,
    "siglip-tiny": ito_recipes.siglip_tiny,
    "siglip-small": ito_recipes.siglip_small,
    "siglip-base": ito_recipes.siglip_base,
    "slip-tiny": ito_recipes.slip_tiny,
    "slip-small": ito_recipes.slip_small,
    "slip-base": ito_recipes.slip_base,
    "uml-probe": uml_recipes.uml_probe,
    "uml-finetune": uml_recipes.uml_finetune,
    "uml-ssl": uml_ssl_recipes.uml_ssl,
    "vqgan-tiny": stage_recipes.vqgan_tiny,
    "vqgan-small": stage_recipes.vqgan_small,
    "vqgan-paper": stage_recipes.vqgan_paper,
    "text-encoder-tiny": stage_recipes.text_encoder_tiny,
    "text-encoder-small": stage_recipes.text_encoder_small,
}
"""Recipes by the name that `diptych fit` takes. The docstring of each gives command, hardware, time and result."""
