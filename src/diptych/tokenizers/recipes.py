"""Recipes of image tokenizers and text encoders, and the stages of ITIT that they train."""

import tyro

from diptych.tokenizers.image_tokenizer import ImageTokenizerConfig
from diptych.tokenizers.span_corruption import TextEncoderConfig
from diptych.tokenizers.training import TextEncoderRun, TextEncoderStage, TokenizerRun, TokenizerStage
from diptych.tokenizers.vqgan import CodebookConfig, VQGANConfig
from diptych.train.config import OptimConfig, TrainConfig


def vqgan_tiny() -> TokenizerRun:
    """Image tokenizer for images of 32 pixels: 4 x 4 tokens out of 128.

    Command: diptych fit vqgan-tiny --images scenes: --out runs/vqgan
    Cost: 70 s on two CPU cores; nine in ten unseen scenes are recognized after encoding and decoding.
    """
    return TokenizerRun(images=tyro.MISSING, stage=tokenizer_tiny())


def vqgan_small() -> TokenizerRun:
    """Image tokenizer for natural images of 64 pixels: 8 x 8 tokens out of 128.

    Command: diptych fit vqgan-small --images images/ --out runs/vqgan
    Cost: ten minutes on one core of a Xeon with AMX; 20.7 dB on images of Flickr8k.
    """
    return TokenizerRun(images=tyro.MISSING, stage=tokenizer_small())


def vqgan_medium() -> TokenizerRun:
    """Image tokenizer for images of 128 pixels, of 20M parameters: 16 x 16 tokens out of 1024.

    Command: diptych fit vqgan-medium --images 'images-{000..099}.tar' --out runs/vqgan
    Cost: 180 GFLOP an image and step, counted. 100,000 steps of 64 images are 5 hours if the GPU reaches 65 TFLOPS,
          40 % of an RTX 4090's 165 in bf16. Not measured.
    """
    return TokenizerRun(images=tyro.MISSING, stage=tokenizer_medium())


def vqgan_medium_256() -> TokenizerRun:
    """Image tokenizer for images of 256 pixels, of 21M parameters: 16 x 16 tokens out of 1024.

    Command: diptych fit vqgan-medium-256 --images 'images-{000..099}.tar' --out runs/vqgan
    Cost: 330 GFLOP an image and step before the discriminator starts, counted; 5 hours at 65 TFLOPS. Not measured.
    """
    return TokenizerRun(images=tyro.MISSING, stage=tokenizer_medium_256())


def vqgan_paper() -> TokenizerRun:
    """The paper's image tokenizer: 256 pixels to 16 x 16 tokens out of 8192.

    Command: torchrun --nproc-per-node 8 -m diptych fit vqgan-paper --images 'images-{000..099}.tar' --out runs/vqgan
    Cost: days on eight GPUs. Not measured by us.
    """
    return TokenizerRun(images=tyro.MISSING, stage=tokenizer_paper())


def text_encoder_tiny() -> TextEncoderRun:
    """Text encoder for a language of a hundred words.

    Command: diptych fit text-encoder-tiny --texts 'scenes:?count=20000' --out runs/text
    Cost: twenty seconds on two CPU cores.
    """
    return TextEncoderRun(texts=tyro.MISSING, stage=encoder_tiny())


def text_encoder_small() -> TextEncoderRun:
    """Text encoder for captions of natural images.

    On 30,000 captions of photos its features collapse: they vary in 2 of 256 directions (docs/log.md). For photos take
    a pretrained one (docs/tokenizers.md).

    Command: diptych fit text-encoder-small --texts captions.txt --out runs/text
    Cost: ten minutes on one core of a Xeon with AMX.
    """
    return TextEncoderRun(texts=tyro.MISSING, stage=encoder_small())


def tokenizer_tiny() -> TokenizerStage:
    """4 x 4 tokens out of 128, for scenes of 32 pixels."""
    return TokenizerStage(
        # Few codes, each seen often: ITIT learns slower with 256, and with 64 shapes are lost (docs/log.md).
        model=ImageTokenizerConfig(
            image_size=32, codebook_size=128, code_dim=8, widths=(32, 32), blocks=1, groups=8, patch=4
        ),
        objective=VQGANConfig(
            adversarial_weight=0.0, squared_weight=100.0, codebook=CodebookConfig(start=0.175, reset_until=0.7)
        ),
        flip=False,
        train=TrainConfig(steps=2000, batch_size=24, checkpoint_every=200, tensorboard=False, workers=1),
        optim=OptimConfig(lr=3e-3, betas=(0.9, 0.96), weight_decay=0.0, warmup_steps=20),
    )


def tokenizer_patches() -> TokenizerStage:
    """4 x 4 tokens out of 256 for scenes of 32 pixels, without a network: each token is a square of 8 pixels.

    A code then says what its own square shows, and ITIT learns several times faster than from codes that a network has
    shared out among neighbours (docs/log.md).
    """
    return TokenizerStage(
        model=ImageTokenizerConfig(image_size=32, codebook_size=256, patch=8, widths=()),
        objective=VQGANConfig(adversarial_weight=0.0, perceptual_weight=0.0, codebook=CodebookConfig(reset_until=0.7)),
        flip=False,
        train=TrainConfig(steps=600, batch_size=512, checkpoint_every=75, tensorboard=False, workers=1),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.96), weight_decay=0.0, warmup_steps=20),
    )


def tokenizer_patches_small() -> TokenizerStage:
    """8 x 8 tokens out of 256 for natural images of 64 pixels, without a network: each token is a square of 8 pixels.

    The codes are a k-means of squares, found in seconds. On Flickr8k, images that were encoded and decoded have 19.6 dB
    and a Frechet distance of 12 from the originals; with `vqgan-small` it is 20.7 dB and 36 (docs/log.md).
    """
    stage = tokenizer_patches()
    stage.model.image_size = 64
    stage.flip = True
    stage.train.steps, stage.train.checkpoint_every = 16, 2
    stage.optim.warmup_steps = 0
    return stage


def tokenizer_small() -> TokenizerStage:
    """8 x 8 tokens out of 128, for natural images of 64 pixels."""
    return TokenizerStage(
        model=ImageTokenizerConfig(
            image_size=64, codebook_size=128, code_dim=8, widths=(64, 128), blocks=1, groups=8, patch=4
        ),
        # No discriminator: at 64 pixels and 64 tokens it put a grid over every image (docs/log.md).
        objective=VQGANConfig(
            adversarial_weight=0.0, squared_weight=10.0, codebook=CodebookConfig(start=0.1333, reset_until=0.8)
        ),
        train=TrainConfig(steps=3000, batch_size=32, checkpoint_every=200, eval_every=3000),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0, warmup_steps=100),
    )


def tokenizer_medium() -> TokenizerStage:
    """16 x 16 tokens out of 1024, for images of 128 pixels."""
    return TokenizerStage(
        model=ImageTokenizerConfig(image_size=128, codebook_size=1024, code_dim=16, widths=(64, 128, 256, 256)),
        objective=VQGANConfig(adversarial_balance="adaptive", adversarial_start=0.2),
        train=TrainConfig(steps=100_000, batch_size=64, checkpoint_every=2000, eval_every=10_000, ema=0.999, workers=8),
        optim=OptimConfig(lr=2e-4, betas=(0.5, 0.9), weight_decay=0.0, warmup_steps=1000),
    )


def tokenizer_medium_256() -> TokenizerStage:
    """16 x 16 tokens out of 1024, for images of 256 pixels."""
    stage = tokenizer_medium()
    stage.model = ImageTokenizerConfig(image_size=256, codebook_size=1024, code_dim=16, widths=(64, 64, 128, 256, 256))
    stage.train.batch_size, stage.train.grad_accum_steps = 32, 2
    return stage


def tokenizer_paper() -> TokenizerStage:
    """16 x 16 tokens out of 8192, for images of 256 pixels, as in the paper."""
    return TokenizerStage(
        model=ImageTokenizerConfig(),
        objective=VQGANConfig(adversarial_balance="adaptive", adversarial_start=0.1),
        train=TrainConfig(steps=500_000, batch_size=256, checkpoint_every=5000, ema=0.9999, workers=16),
        optim=OptimConfig(lr=1e-4, betas=(0.5, 0.9), weight_decay=0.0, warmup_steps=5000),
    )


def encoder_tiny() -> TextEncoderStage:
    """Texts of up to 24 tokens in the language of the built-in scenes."""
    return TextEncoderStage(
        model=TextEncoderConfig.tiny(),
        max_text_len=24,
        train=TrainConfig(steps=300, batch_size=64, checkpoint_every=30, tensorboard=False),
        optim=OptimConfig(lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=30),
    )


def encoder_small() -> TextEncoderStage:
    """Texts of up to 32 tokens, such as captions of natural images."""
    return TextEncoderStage(
        model=TextEncoderConfig.small(),
        max_text_len=32,
        train=TrainConfig(steps=1500, batch_size=64, checkpoint_every=150, eval_every=1500),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=100),
    )


def encoder_untrained() -> TextEncoderStage:
    """One layer of random weights over at most 4,096 word pieces, as in the random sentence encoders of Wieting and
    Kiela (2019).

    A T5 of this size that is trained on 30,000 captions of photos tells less of their words (docs/log.md).
    """
    stage = encoder_small()
    stage.model.layers, stage.train.steps = 1, 0
    return stage
