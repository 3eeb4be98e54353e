"""Recipes for ITIT in all sizes. Base, large and huge are the paper's; tiny and small are for small machines."""

from dataclasses import replace

import tyro

from diptych.itit.data import DataConfig
from diptych.itit.generation import GenerationConfig, ImageGenerationConfig, TextGenerationConfig
from diptych.itit.model import SIZES, MaskingConfig
from diptych.itit.objective import ItitObjectiveConfig, LossWeights
from diptych.itit.training import ItitRun
from diptych.tokenizers.recipes import (
    encoder_small,
    encoder_tiny,
    encoder_untrained,
    tokenizer_medium,
    tokenizer_medium_256,
    tokenizer_paper,
    tokenizer_patches,
    tokenizer_patches_small,
)
from diptych.train.config import OptimConfig, TrainConfig


def itit_tiny() -> ItitRun:
    """ITIT of 1.0M parameters for images of 32 pixels: the one that `diptych demo` trains.

    Departs from the paper in what a network of this width needs to learn within a thousand steps: initial weights by
    fan-in, text features that are whitened, beside their input embeddings and in windows, embeddings that learn faster,
    more hidden tokens in T2I, whole images in I2T, half cycles, and masked modelling of the unpaired images beside them
    in the place of I2I on pairs (docs/log.md has the effect of each).

    Command: diptych fit itit-tiny --data.pairs "scenes:?level=3&captions=2&count=36080" --data.max-pairs 80
             --out runs/tiny
    Cost: three to five minutes on two CPU cores.
    Its image tokenizer is a table of 256 squares of 8 pixels. It suits drawings; for photographs take itit-small.
    """
    return ItitRun(
        data=DataConfig(pairs=tyro.MISSING),
        tokenizer_stage=tokenizer_patches(),
        text_encoder_stage=encoder_tiny(),
        model=replace(SIZES["tiny"], max_text_len=18, dropout=0.0),
        objective=ItitObjectiveConfig(
            texts="half",
            images="half",  # the full cycle's gradient teaches the captions a code of their own
            cycle_start_step=30,
            image_masking=MaskingConfig(mode=1.0),
            text_masking=MaskingConfig(low=0.0, high=0.0, mode=0.0),  # one token: as when an image is captioned
            # I2I on pairs has hardly a token left that it could predict.
            weights=LossWeights(i2i=0.0, unpaired_i2i=1.0),
            encoder_grad_scale=1.0,
            embedding_lr_scale=4.0,
            image_generation=ImageGenerationConfig(steps=4, guidance=0.0, temperature=4.0),
        ),
        train=TrainConfig(steps=600, batch_size=16, checkpoint_every=60, eval_every=200, ema=0.99, workers=1),
        optim=OptimConfig(lr=2e-3, warmup_steps=50),
        generation=GenerationConfig(
            # More steps make worse images: the last ones then hide fewer tokens than training ever did.
            image=ImageGenerationConfig(steps=4, guidance=0.0, temperature=1.0, token_temperature=0.3)
        ),
    )


def itit_small() -> ItitRun:
    """ITIT of 5M parameters for images of 64 pixels, for two CPU cores or one small GPU.

    Its image tokens are squares of 8 pixels. Without --text-encoder its text encoder is one layer of random weights,
    which knows no word's meaning. For photos give a pretrained one, as below, or take itit-frozen.

    Command: diptych fit itit-small --data.pairs 'photos.tar?split=train' --data.max-pairs 600
             --data.texts captions.txt.gz --text-encoder package:minilm-l6 --out runs/photos
    Cost: half an hour on one core of a Xeon with AMX. Scores, with a VQGAN: docs/results.md.
    """
    return ItitRun(
        data=DataConfig(pairs=tyro.MISSING, feature_cache_mb=512),
        tokenizer_stage=tokenizer_patches_small(),
        text_encoder_stage=encoder_untrained(),
        model=replace(SIZES["small"], max_text_len=28, dropout=0.0, init="fan_in", text_input="output_and_embeddings"),
        objective=ItitObjectiveConfig(
            cycle_start_step=100,
            text_masking=MaskingConfig(low=0.0, high=0.5, mode=0.25),
            encoder_grad_scale=1.0,
            image_generation=ImageGenerationConfig(steps=4, guidance=0.0, temperature=4.0),
        ),
        train=TrainConfig(steps=1000, batch_size=32, checkpoint_every=50, eval_every=200, ema=0.99),
        optim=OptimConfig(lr=1e-3, warmup_steps=100),
        generation=GenerationConfig(
            image=ImageGenerationConfig(steps=16, temperature=16.0),
            # At the paper's power of 0.6 a network this small prefers captions of one word.
            text=TextGenerationConfig(length_power=1.0),
        ),
    )


def itit_frozen() -> ItitRun:
    """ITIT for photographs with few captions, from a pretrained image encoder and text encoder, which stay frozen.

    Captions are read from the image encoder's features; images of 64 x 64 pixels are generated as tokens. Other models
    are taken by folder, hub name or package, with --image-encoder and --text-encoder.

    Command: diptych fit itit-frozen --data.pairs 'photos.tar?split=train' --data.max-pairs 600
             --data.valid 'photos.tar?split=dev' --minutes 20 --out runs/photos
    Cost: 20 minutes on two CPU cores. Scores: docs/results.md.
    """
    return replace(
        itit_small(),
        image_encoder="package:efficientnet-lite0",
        text_encoder="package:minilm-l6",
        model=replace(SIZES["small"], depth=2, max_text_len=28, dropout=0.3, init="fan_in"),
        objective=ItitObjectiveConfig(
            texts="half",
            images="half",
            cycle_start_step=100,
            image_masking=MaskingConfig(mode=1.0),
            # Captions are not read from image tokens, so I2I has no pass to share and is learned from unpaired images.
            weights=LossWeights(i2i=0.0, unpaired_i2i=1.0, t2i2t=0.3),
            embedding_lr_scale=4.0,
        ),
        train=TrainConfig(steps=2000, batch_size=32, checkpoint_every=100, eval_every=200, ema=0.99),
        optim=OptimConfig(lr=1e-3, warmup_steps=100),
        generation=GenerationConfig(
            image=ImageGenerationConfig(steps=16),
            # CIDEr-D on dev images of Flickr8k rises by a tenth, with any agreement from 8 to 64, and by another 4 %
            # with any consensus from 60 to 400, half of it by unpaired texts (docs/log.md).
            text=TextGenerationConfig(beams=16, length_power=1.0, agreement=16.0, consensus=100.0),
        ),
    )


def itit_medium() -> ItitRun:
    """ITIT of 75M parameters for images of 128 pixels, for one GPU of 24 GB.

    Command: diptych fit itit-medium --data.pairs 'pairs-{000..049}.tar' --data.images 'images-{000..199}.tar'
             --data.texts texts.txt.gz --text-encoder google/t5-v1_1-base --out runs/medium
    Cost: 28 TFLOP a step with cycles, 9 before them, and 7 GB of memory, by `diptych plan itit-medium`. 100,000 steps
          are 11 hours if the GPU reaches 65 TFLOPS, 40 % of the 165 of an RTX 4090 in bf16. Not measured.
    """
    return ItitRun(
        data=DataConfig(pairs=tyro.MISSING, workers=8),
        tokenizer_stage=tokenizer_medium(),
        text_encoder_stage=encoder_small(),
        model=SIZES["medium"],
        objective=ItitObjectiveConfig(
            cycle_start_step=10_000,
            image_generation=ImageGenerationConfig(steps=4, guidance=0.0, temperature=4.0),
        ),
        train=TrainConfig(
            steps=100_000,
            batch_size=64,
            grad_accum_steps=4,
            checkpoint_every=1000,
            eval_every=5000,
            ema=0.9995,
            workers=8,
        ),
        optim=OptimConfig(lr=3e-4, warmup_steps=2000),
    )


def itit_medium_256() -> ItitRun:
    """ITIT of 75M parameters for images of 256 pixels, for one GPU of 24 GB.

    The network is that of itit-medium, as an image has as many tokens; 79M parameters with amused's 8,192 codes.

    Command: diptych fit itit-medium-256 --data.pairs 'pairs-{000..049}.tar' --data.images 'images-{000..199}.tar'
             --data.texts texts.txt.gz --tokenizer amused/amused-256 --text-encoder google/t5-v1_1-base
             --out runs/medium
    Cost: as itit-medium, without the training of a tokenizer if one is given.
    """
    return replace(itit_medium(), tokenizer_stage=tokenizer_medium_256())


def itit_base() -> ItitRun:
    """ITIT-B of the paper (221M parameters there, 220M here): 256 pixels, batch 2048, 1.5M steps.

    Command: torchrun --nproc-per-node 8 -m diptych fit itit-base --data.pairs 'cc3m-{000..331}.tar'
             --data.images 'images-{0000..0999}.tar' --data.texts texts.txt.gz
             --tokenizer amused/amused-256 --text-encoder google/t5-v1_1-xxl --out runs/base
    Cost: a TPU pod for the paper; not measured here.
    Expected: FID 13.4, CIDEr 32.1 (zero-shot COCO) with CC3M pairs and WebLI's images and texts.
    """
    return ItitRun(
        data=DataConfig(pairs=tyro.MISSING, workers=16),
        tokenizer_stage=tokenizer_paper(),
        text_encoder_stage=encoder_small(),
        model=SIZES["base"],
        train=TrainConfig(steps=1_500_000, batch_size=512, checkpoint_every=5000, eval_every=25_000, workers=8),
        optim=OptimConfig(
            name="adafactor", lr=1e-4, betas=(0.9, 0.96), weight_decay=0.045, max_grad_norm=3.0, warmup_steps=5000
        ),
    )


def itit_large() -> ItitRun:
    """ITIT-L of the paper (487M parameters there, 485M here). Else as itit-base. Expected: FID 12.0, CIDEr 35.1."""
    return replace(itit_base(), model=SIZES["large"])


def itit_huge() -> ItitRun:
    """ITIT-H of the paper (868M parameters there, 874M here). Else as itit-base. Expected: FID 10.4, CIDEr 38.2."""
    return replace(itit_base(), model=SIZES["huge"])


def itit_finetune_caption() -> ItitRun:
    """Fine-tuning of a finished ITIT run, of any size, for captions: I2T alone, on pairs, from its weights.

    The result no longer generates good images. It captions with the paper's settings unless --generation says
    otherwise. The paper fine-tunes on COCO, and does not say how: learning rate and steps are ours.

    Command: diptych fit itit-finetune-caption --init runs/base --data.pairs 'dataset_coco.json?split=train+restval'
             --data.valid 'dataset_coco.json?split=val' --out runs/coco
    Cost: not measured here.
    Expected: CIDEr 103.5 from ITIT-B, 116.4 from ITIT-L, 125.3 from ITIT-H, in the paper.
    """
    return ItitRun(
        data=DataConfig(pairs=tyro.MISSING),
        init=tyro.MISSING,
        model=replace(SIZES["base"], dropout=0.1),
        objective=ItitObjectiveConfig(
            texts="off",
            images="off",
            weights=LossWeights(t2i=0.0, i2i=0.0),
            # Captions are read from whole images.
            text_masking=MaskingConfig(low=0.0, high=0.5, mode=0.0),
        ),
        train=TrainConfig(steps=10_000, batch_size=256, checkpoint_every=1000, eval_every=1000, ema=0.99),
        optim=OptimConfig(lr=2e-5, warmup_steps=500),
    )
