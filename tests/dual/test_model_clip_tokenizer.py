import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from diptych.dual.model import train_clip_tokenizer
from diptych.errors import UserError

TEXTS = ["A dog runs over the green grass.", "Two children's toys", "the dog and the children run"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_clip_tokenizer(TEXTS, vocab_size=700, length=16)


def test_frequent_words_become_tokens_and_marks_enclose_a_text(tokenizer):
    ids = tokenizer("The DOG")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", "the</w>", "dog</w>", "<|endoftext|>"]


def test_the_end_mark_is_the_highest_id_and_pads(tokenizer):
    """Old CLIP code finds the end of a text by the largest id."""
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.bos_token_id == len(tokenizer) - 2


def test_any_text_can_be_spelled(tokenizer):
    text = "señor 漢字 🙂"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")


def test_it_survives_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(again, CLIPTokenizer)
    texts = [*TEXTS, "an unseen wörd"]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert again.model_max_length == 16


def test_the_vocabulary_is_a_limit():
    full = train_clip_tokenizer(TEXTS, vocab_size=10_000, length=16)
    cut = train_clip_tokenizer(TEXTS, vocab_size=520, length=16)
    assert len(cut) == 520 < len(full)


def test_no_texts_and_no_room_are_refused():
    with pytest.raises(UserError, match="never repeat"):
        train_clip_tokenizer([], vocab_size=600, length=16)
    with pytest.raises(UserError, match=r"vocabulary is 500.*at least 514"):
        train_clip_tokenizer(TEXTS, vocab_size=500, length=16)
