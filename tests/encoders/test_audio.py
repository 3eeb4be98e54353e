import numpy as np
import pytest
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from diptych.encoders import encoder_width, open_audio_encoder

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def waves():
    generator = np.random.default_rng(0)
    return [generator.normal(size=length).astype(np.float32) * 0.1 for length in (1600, 800)]


def wav2vec2(folder):
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 4), "conv_stride": (5, 4)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    # Layer norm, as in the larger models: with group norm padding reaches the features through its statistics.
    norm = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    Wav2Vec2Model(Wav2Vec2Config(**SIZES, **convolutions, **positions, **norm)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)


def ast(folder):
    ASTModel(ASTConfig(**SIZES, max_length=64, num_mel_bins=32, patch_size=8)).save_pretrained(folder)
    ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(folder)


def whisper(folder):
    halves = {f"{half}_{part}": 2 for half in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    feed_forward = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0, "bos_token_id": 0}
    config = WhisperConfig(d_model=16, max_source_positions=50, vocab_size=20, **halves, **feed_forward)
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)


@pytest.mark.parametrize("save", [wav2vec2, ast, whisper])
def test_any_family_gives_one_vector_for_a_clip(save, waves, tmp_path):
    save(tmp_path)
    encoder = open_audio_encoder(tmp_path).requires_grad_(False)
    both = encoder(waves)
    assert both.shape == (2, encoder.width)
    assert encoder.width == encoder_width(tmp_path, "audio") == 16
    assert encoder.rate == 16000
    assert not torch.equal(both[0], both[1])
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    torch.testing.assert_close(open_audio_encoder(tmp_path / "run")(waves).detach(), both)


def test_padding_of_a_shorter_clip_changes_nothing(waves, tmp_path):
    wav2vec2(tmp_path)
    encoder = open_audio_encoder(tmp_path).requires_grad_(False)
    features, valid = encoder.tokens(waves)
    assert valid.sum(1)[0] > valid.sum(1)[1] > 0
    assert not features[~valid].any()
    torch.testing.assert_close(encoder(waves)[1:], encoder(waves[1:]), rtol=1e-3, atol=1e-4)
