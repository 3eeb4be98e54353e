"""Text tokenizers with T5's first ids: texts to ids and back, training one, and giving these ids to any other one.

Ids, as in T5: 0 `<pad>`, 1 `</s>`, 2 `<unk>`, then the pieces. In a T5 the sentinels `<extra_id_99>` ... `<extra_id_0>`
follow (the highest id is sentinel 0). The model trained here is a Unigram model over `▁`-marked words, so the result is
a plain `tokenizer.json` that `transformers.AutoTokenizer` loads.

The pieces are chosen here and not by `tokenizers.UnigramTrainer`, which counts a candidate once for every distinct word
instead of every word of the text. It spells a corpus of sixty words out in letters, cuts `Two` into `Tw o`, and orders
its vocabulary differently from run to run.

Shapes: B texts, L text tokens.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from diptych.errors import UserError, first_line

if TYPE_CHECKING:  # seconds of imports, which reading and writing ids does without
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = CONTROLS = ("<pad>", "</s>", "<unk>")
PAD, EOS = 0, 1
"""T5's ids of padding and of the end of a text. As T5 has no id to begin a text with, PAD begins one."""
SPACE = "▁"
_MARKS = f"{SPACE}Ġ"
"""What stands for a space in pieces."""
_OVERSHOOT = 1.5
"""Number of candidates for every piece that is kept."""
_ROUNDS = 2
"""Number of times that the corpus is segmented and the pieces recounted after each choice of pieces."""
_UNUSED = 1
"""Count given to a piece that the best segmentation never uses, mostly a letter, so that it stays possible."""
_SENTINEL = re.compile(r"<extra_id_\d+>")
PIECES = "pieces.json"
"""File beside the `tokenizer.json` of a text encoder that is no T5: the tokenizer that :func:`with_t5_ids` made."""
_AT_ONCE = 1000
"""Number of texts tokenized at once."""
_WRITTEN_TOGETHER = (
    (r" (?=[.,;:!?%)\]])", ""),
    (r"(?<=[(\[]) ", ""),
    (r"(?<=\w) ?['’] ?(?=(s|t|re|ve|ll|d|m)\b)", "'"),
    (r"(?<=\w) - (?=\w)", "-"),
)
"""What is written without the spaces around it, by pieces that do not tell whether a space stood there."""


class TextTokenizer:
    """Texts to ids and back. It needs a `tokenizer.json` alone: neither the encoder's weights nor transformers.

    Raises UserError for a tokenizer without T5's first ids (:func:`with_t5_ids` gives them to any other), or with more
    ids than ``vocab_rows``, the rows of the embedding.
    """

    def __init__(self, backend: Tokenizer, *, vocab_rows: int):
        backend = Tokenizer.from_str(backend.to_str())  # the caller's keeps its padding and truncation
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.vocab_rows = vocab_rows
        self.vocab_real: int = backend.get_vocab_size()
        """Number of ids that have a token. T5's embedding has a few rows more."""
        self._check()
        self._unk_id: int | None = backend.token_to_id(UNK_TOKEN)
        sentinels = {i for token, i in backend.get_vocab().items() if _SENTINEL.fullmatch(token)}
        self._controls = frozenset(sentinels | {PAD, EOS})
        unwanted = sentinels | {PAD, self._unk_id} | set(range(self.vocab_real, vocab_rows))
        self.banned_ids: tuple[int, ...] = tuple(sorted(i for i in unwanted if i is not None))
        """Ids that a caption must never contain, in rising order: pad, unk, sentinels and rows without a token."""

    @classmethod
    def from_pretrained(cls, folder: Path) -> "TextTokenizer":
        """The tokenizer of a saved text encoder. Raises UserError where a file is missing or damaged."""
        try:
            if (folder / PIECES).is_file():
                backend = Tokenizer.from_file(str(folder / PIECES))
                return cls(backend, vocab_rows=backend.get_vocab_size())
            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
            rows = json.loads((folder / "config.json").read_text())["vocab_size"]
            return cls(backend, vocab_rows=rows)
        except Exception as error:  # tokenizers raises Exception itself
            reason = first_line(error)
            raise UserError(f"text encoder {folder}, tokenizer: {reason}; copy the run again") from error

    def _check(self) -> None:
        found = tuple(self._backend.token_to_id(token) for token in (PAD_TOKEN, EOS_TOKEN))
        if found != (PAD, EOS):
            raise UserError(f"not a T5 tokenizer: its pad and end ids are {found}, T5's are (0, 1)")
        if self.vocab_real > self.vocab_rows:
            raise UserError(f"the tokenizer has {self.vocab_real} ids but the model {self.vocab_rows}: use its own one")
        special = [token for token in self._backend.get_added_tokens_decoder().values() if token.special]
        if self.vocab_real - len(special) < 2:
            raise UserError("the tokenizer has no words: tokenizer.json or spiece.model is missing")

    def tokenize(self, texts: Sequence[str], *, length: int) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """Ids and their validity on the CPU. Every row ends in `</s>`, also one that is cut off, and is padded with 0.

        `<pad>`, `</s>` and sentinels written out in a text are dropped: a text must not control the model. Words are
        spelt as the tokenizer knows them (:func:`spell`). Raises UserError for a ``length`` below 1, and for a single
        text in place of a list.
        """
        if isinstance(texts, str):
            raise UserError(f"one text, {texts!r:.60}: give a list of texts")
        if length < 1:
            raise UserError(f"length={length} leaves no room for the end of a text: use 1 or more")
        rows = self._ids(texts)
        kept = ([i for i in row if i not in self._controls][: length - 1] for row in rows)
        padded = [[*row, EOS, *[PAD] * (length - 1 - len(row))] for row in kept]
        ids_BL = torch.tensor(padded, dtype=torch.int64).view(len(texts), length)
        return ids_BL, ids_BL != PAD

    def unknown_words(self, texts: Sequence[str]) -> list[str]:
        """The different words of ``texts`` with letters that the tokenizer does not know, in their order."""
        words = list(dict.fromkeys(word for text in texts for word in text.split()))
        return [word for word, ids in zip(words, self._ids(words), strict=True) if self._unk_id in ids]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        def ids_of(some: list[str]) -> list[list[int]]:
            return [row.ids for row in self._backend.encode_batch(some, add_special_tokens=False)]

        return spell(texts, ids_of=ids_of, unk_id=self._unk_id)

    def detokenize(self, ids_BL: Int[Tensor, "B L"]) -> list[str]:
        """The text before each row's first `</s>`, without pad, unk and sentinels."""
        skipped = set(self.banned_ids)
        texts = []
        for row in ids_BL.tolist():
            end = row.index(EOS) if EOS in row else len(row)
            texts.append(self._backend.decode([i for i in row[:end] if i not in skipped], skip_special_tokens=False))
        return texts


# Tokenizers of other models


def with_t5_ids(backend: Tokenizer, texts: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer with T5's first ids, without its own special tokens, and with the pieces that ``texts`` need alone.

    These are the pieces that it cuts the texts into, and what a new word in the letters of the texts is spelt with. The
    texts are cut as before: WordPiece takes the longest piece that it knows, Unigram the most probable ones, and of the
    merges of BPE those stay that lead to a piece. None keeps all pieces. Decoded texts have no space before a comma and
    none around a hyphen. Raises UserError for a kind of tokenizer that is none of these.
    """
    made = json.loads(backend.to_str())
    model = made["model"]
    if model["type"] not in ("WordPiece", "WordLevel", "BPE", "Unigram"):
        raise UserError(
            f"its tokenizer is of the kind {model['type']}: only WordPiece, WordLevel, BPE and Unigram work"
        )
    special = {token["content"] for token in made["added_tokens"] if token["special"]} | set(CONTROLS)
    if model["type"] == "Unigram":
        ids = {piece: number for number, (piece, _) in enumerate(model["vocab"])}
        special |= {piece for piece, number in ids.items() if number == model["unk_id"]}
    else:
        ids = dict(model["vocab"])
        special.add(model["unk_token"])
    known = {*ids, *(token["content"] for token in made["added_tokens"])} - special
    kept = known if texts is None else _with_letters(_used(backend, texts) & known, ids, model) - special
    added = [token for token in made["added_tokens"] if token["content"] in kept]
    pieces = sorted(kept & set(ids), key=ids.__getitem__)
    place = {piece: number for number, piece in enumerate((*CONTROLS, *pieces))}
    if model["type"] == "Unigram":
        scored = [[control, 0.0] for control in CONTROLS] + [model["vocab"][ids[piece]] for piece in pieces]
        model |= {"vocab": scored, "unk_id": place[UNK_TOKEN]}
    else:
        model |= {"vocab": place, "unk_token": UNK_TOKEN}
    if model["type"] == "BPE":
        model["merges"] = [[a, b] for whole, a, b in _merges(model) if {whole, a, b} <= place.keys()]
    controls = [_added_token(control, place[control]) for control in CONTROLS]
    beyond = [token for token in added if token["content"] not in place]
    place |= {token["content"]: len(place) + number for number, token in enumerate(beyond)}
    added = [{**token, "id": place[token["content"]]} for token in added]
    made |= {"truncation": None, "padding": None, "post_processor": None, "decoder": _decoder(made)}
    made["added_tokens"] = sorted([*controls, *added], key=lambda token: token["id"])
    return Tokenizer.from_str(json.dumps(made))


def _used(backend: Tokenizer, texts: Iterable[str]) -> set[str]:
    """The pieces that the texts are cut into."""
    plain = Tokenizer.from_str(backend.to_str())  # the caller's keeps its padding and truncation
    plain.no_padding()
    plain.no_truncation()
    left = iter(texts)
    used: set[str] = set()
    while some := list(islice(left, _AT_ONCE)):
        used.update(token for row in plain.encode_batch(some, add_special_tokens=False) for token in row.tokens)
    return used


def _with_letters(used: set[str], ids: Mapping[str, int], model: dict[str, Any]) -> set[str]:
    """``used``, the single letters among all pieces that occur in it, and what BPE makes these of."""
    prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))

    def letters(piece: str) -> str:
        return piece.removeprefix(prefix).removesuffix(suffix).lstrip(_MARKS)

    alphabet = {letter for piece in used for letter in letters(piece)}
    needed = used | {piece for piece in ids if letters(piece) in alphabet or piece in (*_MARKS,)}
    parts: defaultdict[str, list[str]] = defaultdict(list)
    if model["type"] == "BPE":
        for whole, a, b in _merges(model):
            parts[whole] += [a, b]
    left = list(needed)
    while left:
        new = set(parts[left.pop()]) - needed
        needed |= new
        left += new
    return needed


def _merges(model: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each merge of a BPE model as the piece that it makes and the two that it takes."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    prefix = model.get("continuing_subword_prefix") or ""
    return [(a + b.removeprefix(prefix), a, b) for a, b in pairs]


def _added_token(content: str, number: int) -> dict[str, Any]:
    how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **how, "special": True}


def _decoder(made: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's own decoder, and after it what makes clean text of its output."""
    steps = [made["decoder"]] if made["decoder"] else []
    suffix = made["model"].get("end_of_word_suffix")
    if suffix:  # the decoder of bytes, which CLIP's tokenizer has, leaves it where it stands
        steps = [{"type": "Replace", "pattern": {"String": suffix}, "content": "Ġ"}]
        steps.append(json.loads(decoders.ByteLevel().__getstate__()))
    rules = [(r"^ +| +$", "")]  # the decoder called Strip panics at an empty text
    if suffix or made["model"]["type"] in ("WordPiece", "WordLevel"):
        rules += _WRITTEN_TOGETHER
    replaced = [{"type": "Replace", "pattern": {"Regex": found}, "content": to} for found, to in rules]
    return {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}, *replaced]}


# Training


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, sentinels: int = 100, lowercase: bool = False
) -> "PreTrainedTokenizerFast":
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


def spell(
    texts: Sequence[str], *, ids_of: Callable[[list[str]], list[list[int]]], unk_id: int | None
) -> list[list[int]]:
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
) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

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
