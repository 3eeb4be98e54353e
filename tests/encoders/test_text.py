import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
)

from diptych.dual.model import DualEncoder, DualEncoderConfig
from diptych.encoders import encoder_width, open_text_encoder
from diptych.errors import UserError
from diptych.tokenizers.text_tokenizer import EOS

TEXTS = ["a small red circle", "a blue square in the top left on a white background"]


@pytest.fixture
def save_text_model(tmp_path, text_encoder):
    """A model with the T5 tokenizer of the scenes, without its padding token if it is a decoder's."""

    def save(model, *, pad=True):
        model.save_pretrained(tmp_path / "model")
        tokenizer = text_encoder.tokenizer
        tokenizer.save_pretrained(tmp_path / "model")
        if not pad:
            tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
            tokenizer.pad_token = None
            tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def small(text_encoder, **more):
    return {
        "vocab_size": text_encoder.vocab_rows,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        **more,
    }


def gpt2(text_encoder):
    return GPT2Model(GPT2Config(vocab_size=text_encoder.vocab_rows, n_embd=16, n_layer=2, n_head=2, n_positions=64))


MODELS = {
    "bert": lambda t: BertModel(BertConfig(**small(t))),
    "gpt2": gpt2,
    "llama": lambda t: LlamaModel(LlamaConfig(**small(t), num_key_value_heads=2)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_changes_nothing_and_pooling_is_what_it_says(name, pooling, text_encoder, save_text_model):
    model = MODELS[name](text_encoder).eval()
    folder = save_text_model(model, pad=name == "bert")
    encoder = open_text_encoder(folder, pooling=pooling)
    both = encoder(TEXTS)
    torch.testing.assert_close(both[:1], encoder(TEXTS[:1]), rtol=1e-4, atol=1e-5)
    ids = encoder.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state[0]
    expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    torch.testing.assert_close(both[0], expected, rtol=1e-4, atol=1e-5)
    assert encoder.width == encoder_width(folder, "text") == 16


def test_a_sentence_encoder_pools_as_it_was_trained(text_encoder, save_text_model):
    folder = save_text_model(BertModel(BertConfig(**small(text_encoder))))
    assert open_text_encoder(folder).pooling == "mean"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert open_text_encoder(folder).pooling == "cls"
    assert open_text_encoder(folder, pooling="last").pooling == "last"
    (folder / "1_Pooling" / "config.json").write_text("no json")
    with pytest.raises(UserError, match="1_Pooling"):
        open_text_encoder(folder)


def test_a_text_encoder_run_gives_the_mean_of_its_features(text_encoder, tmp_path):
    text_encoder.save_pretrained(tmp_path / "run" / "text_encoder")
    ids, valid = text_encoder.tokenize(TEXTS, length=64)
    features = text_encoder.features(ids, valid)
    encoder = open_text_encoder(tmp_path / "run")
    expected = features.sum(1) / valid.sum(1, keepdim=True)
    torch.testing.assert_close(encoder(TEXTS), expected, rtol=1e-4, atol=1e-5)
    tokens, found = encoder.tokens(TEXTS)
    assert torch.equal(found, valid[:, : found.shape[1]])
    torch.testing.assert_close(tokens, features[:, : found.shape[1]], rtol=1e-4, atol=1e-5)
    assert encoder_width(tmp_path / "run", "text") == 16


def test_a_dual_run_gives_the_embedding_of_its_text_tower(tmp_path):
    from diptych.dual.model import train_clip_tokenizer

    config = DualEncoderConfig(
        image_size=16, patch=8, image_width=64, image_depth=1, max_text_len=16, text_width=64, text_depth=1, width=12
    )
    dual = DualEncoder.from_config(config, train_clip_tokenizer(TEXTS * 4, vocab_size=514, length=16), seed=0)
    dual.save_pretrained(tmp_path / "run" / "model")
    found = torch.nn.functional.normalize(open_text_encoder(tmp_path / "run")(TEXTS), dim=1)
    torch.testing.assert_close(found, dual.embed_texts(TEXTS), rtol=1e-4, atol=1e-5)
    assert encoder_width(tmp_path / "run", "text") == 12


def test_the_projection_of_a_clip_is_loaded_whatever_its_tower_says(text_encoder, save_text_model):
    tower = small(text_encoder, max_position_embeddings=20, eos_token_id=EOS)
    clip = CLIPModel(CLIPConfig(text_config=tower, projection_dim=6)).eval()
    folder = save_text_model(clip)
    encoder = open_text_encoder(folder)
    ids = encoder.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    expected = clip.get_text_features(input_ids=ids).pooler_output.detach()
    torch.testing.assert_close(encoder(TEXTS[:1]), expected, rtol=1e-4, atol=1e-5)
    assert encoder.length == 20


def test_it_never_learns_and_never_drops_out(text_encoder, save_text_model):
    encoder = open_text_encoder(save_text_model(BertModel(BertConfig(**small(text_encoder), hidden_dropout_prob=0.5))))
    encoder.train()
    assert torch.equal(encoder(TEXTS), encoder(TEXTS))
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert encoder([]).shape == (0, 16)


def test_a_folder_without_a_tokenizer_is_told(text_encoder, tmp_path):
    BertModel(BertConfig(**small(text_encoder))).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        open_text_encoder(tmp_path)
