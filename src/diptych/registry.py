"""The recipes by name. A recipe is a function that returns a complete run; variants call one another."""

from collections.abc import Callable

from diptych.dual import recipes as dual
from diptych.itit import recipes as itit
from diptych.run_folder import Run
from diptych.tokenizers import recipes as tokenizers
from diptych.uml import recipes as uml

RECIPES: dict[str, Callable[[], Run]] = {
    "itit-tiny": itit.itit_tiny,
    "itit-small": itit.itit_small,
    "itit-frozen": itit.itit_frozen,
    "itit-medium": itit.itit_medium,
    "itit-medium-256": itit.itit_medium_256,
    "itit-base": itit.itit_base,
    "itit-large": itit.itit_large,
    "itit-huge": itit.itit_huge,
    "itit-finetune-caption": itit.itit_finetune_caption,
    "ito-tiny": dual.ito_tiny,
    "ito-small": dual.ito_small,
    "ito-medium": dual.ito_medium,
    "ito-base": dual.ito_base,
    "ito-large": dual.ito_large,
    "ito-frozen": dual.ito_frozen,
    "clip-tiny": dual.clip_tiny,
    "clip-small": dual.clip_small,
    "clip-medium": dual.clip_medium,
    "clip-base": dual.clip_base,
    "clip-large": dual.clip_large,
    "clip-frozen": dual.clip_frozen,
    "clip-aug-tiny": dual.clip_aug_tiny,
    "clip-aug-small": dual.clip_aug_small,
    "clip-aug-medium": dual.clip_aug_medium,
    "clip-aug-base": dual.clip_aug_base,
    "siglip-tiny": dual.siglip_tiny,
    "siglip-small": dual.siglip_small,
    "siglip-medium": dual.siglip_medium,
    "siglip-base": dual.siglip_base,
    "siglip-frozen": dual.siglip_frozen,
    "slip-tiny": dual.slip_tiny,
    "slip-small": dual.slip_small,
    "slip-medium": dual.slip_medium,
    "slip-base": dual.slip_base,
    "slip-frozen": dual.slip_frozen,
    "uml-probe": uml.uml_probe,
    "uml-finetune": uml.uml_finetune,
    "uml-ssl": uml.uml_ssl,
    "vqgan-tiny": tokenizers.vqgan_tiny,
    "vqgan-small": tokenizers.vqgan_small,
    "vqgan-medium": tokenizers.vqgan_medium,
    "vqgan-medium-256": tokenizers.vqgan_medium_256,
    "vqgan-paper": tokenizers.vqgan_paper,
    "text-encoder-tiny": tokenizers.text_encoder_tiny,
    "text-encoder-small": tokenizers.text_encoder_small,
}
"""Recipes by the name that `diptych fit` takes. The docstring of each gives command, hardware, time and result."""
