"""Recipes for supervised UML: the paper's linear probe and its full fine-tune."""

from dataclasses import replace

import tyro

from diptych.data.views import ViewConfig
from diptych.models.shared_head import SharedHeadConfig
from diptych.recipes.uml import UmlData, UmlRun
from diptych.train.config import OptimConfig, TrainConfig


def uml_probe() -> UmlRun:
    """A linear classifier of a frozen encoder's images, helped by texts about the classes.

    Command: diptych fit uml-probe --data.images photos/ --data.texts descriptions.json --encoder facebook/dinov2-small
             --text-encoder google/t5-v1_1-base --out runs/probe
    Cost: each image and text is encoded once; then seconds.
    """
    return UmlRun(
        data=UmlData(images=tyro.MISSING),
        encoder=tyro.MISSING,
        text_encoder=tyro.MISSING,
        train=TrainConfig(
            steps=12_800, batch_size=32, eval_every=100, checkpoint_every=3200, workers=0, precision="fp32",
            tensorboard=False,
        ),
        optim=OptimConfig(
            lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, clip=None, warmup_steps=50, final_lr=0.01
        ),
    )  # fmt: skip


def uml_finetune() -> UmlRun:
    """The same with the image encoder trained along. `--encoder scratch` trains a small ViT from nothing.

    Command: diptych fit uml-finetune --data.images photos/ --data.texts descriptions.json
             --encoder facebook/dinov2-small --text-encoder google/t5-v1_1-base --out runs/tuned
    Cost: that of training the encoder.
    """
    return replace(
        uml_probe(),
        train_encoder="tuned",
        view=ViewConfig(scale=(0.6, 1.0), jitter=0.0, grey=0.0, blur=0.0),
        head=SharedHeadConfig(features="unit"),
        train=TrainConfig(steps=12_800, batch_size=64, eval_every=400, checkpoint_every=1600),
        optim=OptimConfig(lr=5e-5, betas=(0.9, 0.999), weight_decay=0.0, warmup_steps=50, final_lr=0.2),
    )
