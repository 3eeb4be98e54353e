"""Recipes of self-supervised UML."""

import tyro

from diptych.models.shared_transformer import SharedTransformerConfig
from diptych.recipes.uml_ssl import UmlSslRun
from diptych.train.config import OptimConfig, TrainConfig


def uml_ssl() -> UmlSslRun:
    """A better encoder of one modality's features, with the help of unpaired features of others.

    Command: diptych fit uml-ssl --target photos.store --others captions.store,sounds.store --out runs/uml
    Cost: 1.0 s of one CPU core a step and modality, for 32 sequences of 124 positions; two hours with one other.
    """
    return UmlSslRun(
        target=tyro.MISSING,
        model=SharedTransformerConfig(width=256, depth=4, heads=4),
        train=TrainConfig(steps=3000, batch_size=32, tensorboard=False),
        optim=OptimConfig(lr=5e-4, betas=(0.9, 0.98), weight_decay=0.01, clip=1.0),
    )
