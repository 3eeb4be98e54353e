"""Encoders of images, texts and sound, each opened by the name of a folder, of a hub model or of a run of Diptych.

    open_image_encoder   DINOv2, ViT, CLIP, ResNet, ConvNeXt ...; an ITIT, a dual or a classifier run
    open_text_encoder    T5, BERT, GPT, Llama, CLIP ...; a dual or a text encoder run
    open_audio_encoder   wav2vec 2.0, HuBERT, AST, Whisper ...

Each gives pooled features [B D] and token features [B N D]; ``encoder_width`` reads D and loads nothing else.
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
