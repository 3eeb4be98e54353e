import itertools
import random

import pytest
from transformers import AutoTokenizer

from diptych.errors import UserError
from diptych.tokenizers.text_tokenizer import TextTokenizer, train_tokenizer, with_t5_ids

SCENES = [
    f"a {size} {colour} {shape} {side} a {other} star."
    for size, colour, shape, side, other in itertools.product(
        ("small", "large"), ("red", "green", "blue"), ("circle", "square"), ("above", "left of"), ("red", "yellow")
    )
]


def made_up_language(words: int, lines: int) -> list[str]:
    """Zipf-like text over syllable words, enough of them that not all fit in a vocabulary."""
    chance = random.Random(0)
    lexicon = [
        "".join(chance.choices(["ka", "lo", "mi", "ter", "un", "x", "è"], k=chance.randint(1, 5))) for _ in range(words)
    ]
    weights = [1 / (rank + 1) for rank in range(words)]
    return [" ".join(chance.choices(lexicon, weights, k=8)).capitalize() + "." for _ in range(lines)]


def test_few_words_become_one_token_each() -> None:
    tokenizer = train_tokenizer(SCENES, vocab_size=256, sentinels=8)
    assert tokenizer.tokenize("a small red circle left of a yellow star.") == [
        *("▁a", "▁small", "▁red", "▁circle", "▁left", "▁of", "▁a", "▁yellow", "▁star", ".")
    ]
    assert len(tokenizer) < 80


def test_the_ids_follow_t5() -> None:
    tokenizer = train_tokenizer(SCENES, vocab_size=256, sentinels=8)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    last = len(tokenizer) - 1
    assert [tokenizer.convert_tokens_to_ids(f"<extra_id_{n}>") for n in range(8)] == [last - n for n in range(8)]
    assert tokenizer("a star").input_ids[-1] == 1


@pytest.mark.parametrize("vocab_size", [100, 300])
def test_a_large_lexicon_is_cut_into_pieces_and_survives_a_round_trip(vocab_size: int) -> None:
    texts = made_up_language(words=2000, lines=1500)
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size, sentinels=16)
    assert len(tokenizer) == vocab_size
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert [tokenizer.decode(row) for row in rows] == texts
    assert sum(map(len, rows)) < 0.75 * sum(len(text) for text in texts)


def test_frequent_words_are_not_split() -> None:
    """`tokenizers.UnigramTrainer` fails this: it counts distinct words, not occurrences."""
    rare = made_up_language(words=500, lines=200)
    tokenizer = train_tokenizer([*rare, *["Two young men wait"] * 300], vocab_size=300, sentinels=8)
    assert tokenizer.tokenize("Two young men wait") == ["▁Two", "▁young", "▁men", "▁wait"]


def test_the_same_texts_give_the_same_tokenizer_in_any_order() -> None:
    texts = made_up_language(words=500, lines=400)
    files = [train_tokenizer(order, vocab_size=200).backend_tokenizer.to_str() for order in (texts, texts, texts[::-1])]
    assert files[0] == files[1] == files[2]


def test_case_is_kept_unless_asked() -> None:
    for lowercase, expected in ((False, "Red star"), (True, "red star")):
        tokenizer = train_tokenizer(["Red star", "red Star"], vocab_size=64, sentinels=4, lowercase=lowercase)
        assert tokenizer.decode(tokenizer("Red star", add_special_tokens=False).input_ids) == expected


def test_unseen_words_are_spelt_and_unseen_letters_unknown() -> None:
    tokenizer = train_tokenizer(SCENES, vocab_size=256, sentinels=8)
    row = tokenizer("a starcircle", add_special_tokens=False).input_ids
    assert tokenizer.decode(row) == "a starcircle"
    assert tokenizer.unk_token_id not in row
    assert tokenizer.unk_token_id in tokenizer("ж").input_ids


def test_a_vocabulary_smaller_than_the_alphabet_keeps_the_most_frequent_letters() -> None:
    tokenizer = train_tokenizer(SCENES, vocab_size=12, sentinels=4)
    assert len(tokenizer) == 12
    assert tokenizer.tokenize("a") == ["▁", "a"]


def test_white_space_and_compatibility_forms_are_normalised() -> None:
    tokenizer = train_tokenizer(SCENES, vocab_size=256, sentinels=8)
    assert tokenizer.tokenize("  a\tｒｅｄ \n star ") == ["▁a", "▁red", "▁star"]


def test_plain_transformers_reads_it_back(tmp_path) -> None:
    tokenizer = train_tokenizer(SCENES, vocab_size=256, sentinels=8)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again(SCENES).input_ids == tokenizer(SCENES).input_ids


def test_nothing_to_learn_from_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match="empty"):
        train_tokenizer(["", "  "], vocab_size=64)
    with pytest.raises(UserError, match="vocab_size=64 leaves no room"):
        train_tokenizer(SCENES, vocab_size=64)


def test_a_limited_vocabulary_cuts_its_texts_as_before() -> None:
    texts = made_up_language(words=300, lines=300)
    backend = train_tokenizer(texts, vocab_size=250, sentinels=8).backend_tokenizer
    backend.add_tokens(["<chip>", "<never>"])
    some = [*texts[:20], f"{texts[0]} <chip>"]
    limited = with_t5_ids(backend, some)
    for text in some:
        assert limited.encode(text).tokens == backend.encode(text, add_special_tokens=False).tokens
    tokens = ["<pad>", "</s>", "<unk>", "<never>", "<extra_id_0>"]
    assert [limited.token_to_id(token) for token in tokens] == [0, 1, 2, None, None]
    assert limited.get_vocab_size() < backend.get_vocab_size() - 10
    tokenizer = TextTokenizer(limited, vocab_rows=limited.get_vocab_size())
    assert tokenizer.detokenize(tokenizer.tokenize(some[:20], length=120)[0]) == some[:20]
    assert with_t5_ids(backend).get_vocab_size() == backend.get_vocab_size() - 8, "all but the sentinels"
