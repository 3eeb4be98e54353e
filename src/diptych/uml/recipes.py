"""Recipes of UML: the supervised linear probe and full fine-tune, and the self-supervised encoder of features."""

from dataclasses import replace

import tyro

from diptych.data.augment import ViewConfig
from diptych.train.config import OptimConfig, TrainConfig
from diptych.uml.objective import SharedHeadConfig
from diptych.uml.self_supervised import SharedTransformerConfig, UmlSslRun
from diptych.uml.training import UmlData, UmlRun


def uml_probe() -> UmlRun:
    """A linear classifier on a frozen image encoder, helped by texts about the classes.

    Command: diptych fit uml-probe --data.images images/ --data.texts descriptions.json --encoder facebook/dinov2-small
             --text-encoder google/t5-v1_1-base --out runs/probe
    Cost: each image and each text is encoded once; the training after that takes seconds.
    """
    return UmlRun(
        data=UmlData(images=tyro.MISSING),
        encoder=tyro.MISSING,
        text_encoder=tyro.MISSING,
        train=TrainConfig(
            steps=12_800,
            batch_size=32,
            eval_every=100,
            checkpoint_every=1280,
            workers=0,
            precision="fp32",
            tensorboard=False,
        ),
        optim=OptimConfig(
            lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, max_grad_norm=None, warmup_steps=50, final_lr=0.01
        ),
    )


def uml_finetune() -> UmlRun:
    """A linear classifier and its image encoder, trained together; `--encoder scratch` starts with a new small ViT.

    Command: diptych fit uml-finetune --data.images images/ --data.texts descriptions.json
             --encoder facebook/dinov2-small --text-encoder google/t5-v1_1-base --out runs/tuned
    Cost: that of training the image encoder.
    """
    return replace(
        uml_probe(),
        train_encoder="tuned",
        view=ViewConfig(scale=(0.6, 1.0), jitter=0.0, grey=0.0, blur=0.0),
        head=SharedHeadConfig(features="unit"),
        train=TrainConfig(steps=12_800, batch_size=64, eval_every=400, checkpoint_every=400),
        optim=OptimConfig(lr=5e-5, betas=(0.9, 0.999), weight_decay=0.0, warmup_steps=50, final_lr=0.2),
    )


def uml_ssl() -> UmlSslRun:
    """An encoder of one modality's features that also learns from unpaired features of other modalities.

    Command: diptych fit uml-ssl --target images.store --others captions.store,audio.store --out runs/uml
    Cost: 1.0 s of one CPU core for a step and modality, with 32 sequences of 124 positions; two hours with one other.
    """
    return UmlSslRun(
        target=tyro.MISSING,
        model=SharedTransformerConfig(width=256, depth=4, heads=4),
        train=TrainConfig(steps=3000, batch_size=32, checkpoint_every=100, tensorboard=False),
        optim=OptimConfig(lr=5e-4, betas=(0.9, 0.98), weight_decay=0.01, max_grad_norm=1.0),
    )
