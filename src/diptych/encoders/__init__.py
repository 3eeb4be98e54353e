"""Encoders of images, texts and audio. Each is opened by a folder, a hub name, a package, or a run folder of Diptych.

    open_image_encoder   DINOv2, ViT, CLIP, ResNet, ConvNeXt ...; an ITIT, a dual or a classifier run
    open_text_encoder    T5, BERT, GPT, Llama, CLIP ...; a dual or a text encoder run
    open_audio_encoder   wav2vec 2.0, HuBERT, AST, Whisper ...

`package:efficientnet-lite0` and `package:minilm-l6` come with the extra ``pretrained`` and need no internet.

All three kinds have the same shape: calling an encoder gives pooled features [B D], ``tokens`` gives the features of
every token or frame [B N D], ``width`` is D, and ``preprocessing`` records what else decides the features besides the
weights. ``encoder_width`` reads D from a configuration without loading any weights.
"""

from diptych.encoders.audio import AudioEncoder, open_audio_encoder
from diptych.encoders.image import ImageEncoder, ScratchConfig, open_image_encoder, scratch_encoder
from diptych.encoders.loading import encoder_width
from diptych.encoders.text import PooledTextEncoder, open_text_encoder

__all__ = [
    "AudioEncoder",
    "ImageEncoder",
    "PooledTextEncoder",
    "ScratchConfig",
    "encoder_width",
    "open_audio_encoder",
    "open_image_encoder",
    "open_text_encoder",
    "scratch_encoder",
]
