"""Training a T5-format tokenizer on the user's own texts.

Ids, as in T5: 0 `<pad>`, 1 `</s>`, 2 `<unk>`, then the pieces, then the sentinels `<extra_id_99>` ... `<extra_id_0>`
(the highest id is sentinel 0). The model is a Unigram model over `▁`-marked words, so the result is a plain
`tokenizer.json` that `transformers.AutoTokenizer` loads.

The pieces are chosen here and not by `tokenizers.UnigramTrainer`, which counts a candidate once for every distinct word
instead of every word of the text. It spells a corpus of sixty words out in letters, cuts `Two` into `Tw o`, and orders
its vocabulary differently from run to run.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from diptych.errors import UserError

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = CONTROLS = ("<pad>", "</s>", "<unk>")
SPACE = "▁"
_OVERSHOOT = 1.5
"""Number of candidates for every piece that is kept."""
_ROUNDS = 2
"""Number of times that the corpus is segmented and the pieces recounted after each choice of pieces."""
_UNUSED = 1
"""Count given to a piece that the best segmentation never uses, mostly a letter, so that it stays possible."""


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, sentinels: int = 100, lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """A T5-format tokenizer with at most ``vocab_size`` ids, sentinels included; the same texts give the same one.

    Text survives a round trip up to NFKC normalization, runs of white space, letters that ``texts`` never showed
    (`<unk>`) and, with ``lowercase``, case. Frequent words become single tokens; in a corpus of few distinct words
    all of them do. Raises UserError when there is no text or no room for it.
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])])
    splitter = _splitter()
    chunks = Counter(chunk for text in texts for chunk in text.split())
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(chunk)):
            words[word] += count
    room = vocab_size - len(CONTROLS) - sentinels
    if not words:
        raise UserError("the texts for the tokenizer are empty: give at least one line with a word in it")
    if room < 2:
        raise UserError(f"vocab_size={vocab_size} leaves no room beside {sentinels} sentinels: use a larger one")
    return _wrap(_choose(words, room=room), normalizer=normalizer, sentinels=sentinels)


def spell(texts: Sequence[str], *, ids_of: Callable[[list[str]], list[list[int]]], unk_id: int) -> list[list[int]]:
    """The ids of each text by ``ids_of``; a word with unknown letters is read in lower case where that is better known.

    A tokenizer that saw lower case alone knows no capital: `A Red ring` would lose two words that it knows well.
    """
    rows = ids_of(list(texts))
    for number, row in enumerate(rows):
        if unk_id in row:
            words = texts[number].split()
            each = ids_of(words)
            lower = [word.lower() if unk_id in ids else word for word, ids in zip(words, each, strict=True)]
            again = ids_of([" ".join(lower)])[0]
            rows[number] = min(row, again, key=lambda ids: ids.count(unk_id))
    return rows


def _splitter() -> pre_tokenizers.PreTokenizer:
    """Words with a leading `▁`; punctuation on its own, so that `circle.` does not become another word."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )


def _choose(words: Counter[str], *, room: int) -> list[tuple[str, float]]:
    """At most ``room`` pieces with their log-probabilities, most frequent first."""
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    alphabet = set(_ordered(letters)[:room])
    candidates = alphabet | _candidates(words, alphabet, int(room * _OVERSHOOT))
    counts = _recount(words, dict.fromkeys(sorted(candidates), 1))
    longer = [piece for piece in _ordered(counts) if piece not in alphabet and counts[piece] > _UNUSED]
    kept = alphabet.union(longer[: room - len(alphabet)])
    counts = _recount(words, {piece: counts[piece] for piece in sorted(kept)})
    return _scores({piece: counts[piece] for piece in _ordered(counts)})


def _ordered(counts: Mapping[str, int]) -> list[str]:
    """By falling count, ties by the piece itself, so that the order of the texts does not matter."""
    return sorted(counts, key=lambda piece: (-counts[piece], piece))


def _scores(counts: Mapping[str, int]) -> list[tuple[str, float]]:
    """Log-probabilities, as Unigram models take them."""
    total = sum(counts.values())
    return [(piece, math.log(count / total)) for piece, count in counts.items()]


def _candidates(words: Counter[str], alphabet: set[str], size: int) -> set[str]:
    """Byte-pair merges of the words: they grow towards whole frequent words, unlike repeated substrings."""
    merger = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(alphabet), limit_alphabet=len(alphabet), show_progress=False
    )
    ordered = sorted(words)
    repeats = _shrunk([words[word] for word in ordered])
    merger.train_from_iterator((word for word, n in zip(ordered, repeats, strict=True) for _ in range(n)), trainer)
    return {piece for piece in merger.get_vocab() if set(piece) <= alphabet}


def _shrunk(counts: Sequence[int], *, most: int = 5_000_000) -> list[int]:
    """Counts divided by one number such that a corpus of any size costs the trainer at most about ``most`` words."""
    divisor = max(1.0, sum(counts) / most)
    return [math.ceil(count / divisor) for count in counts]


def _recount(words: Counter[str], counts: dict[str, int]) -> dict[str, int]:
    """How often each piece is used when every word is cut in its most probable way (hard EM)."""
    ordered = sorted(words)
    for _ in range(_ROUNDS):
        model = Tokenizer(models.Unigram([(UNK_TOKEN, 0.0), *_scores(counts)], unk_id=0))
        used: Counter[str] = Counter()
        for word, cut in zip(ordered, model.encode_batch(ordered), strict=True):
            for piece in cut.tokens:
                used[piece] += words[word]
        counts = {piece: used[piece] or _UNUSED for piece in counts}
    return counts


def _wrap(
    pieces: list[tuple[str, float]], *, normalizer: normalizers.Normalizer, sentinels: int
) -> PreTrainedTokenizerFast:
    marks = [f"<extra_id_{number}>" for number in range(sentinels)]
    controls = [(token, 0.0) for token in CONTROLS]
    model = models.Unigram([*controls, *pieces, *((mark, 0.0) for mark in reversed(marks))], unk_id=2)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*CONTROLS, *marks)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS_TOKEN}", special_tokens=[(EOS_TOKEN, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        extra_special_tokens=marks,
    )
