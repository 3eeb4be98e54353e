"""Training a tokenizer in CLIP's format, a byte-level BPE over lower-cased words, on the user's own texts.

The result is a `transformers.CLIPTokenizer`. Ids, as in CLIP: 256 bytes, 256 bytes that end a word, the merges, then
`<|startoftext|>` and `<|endoftext|>`, which also pads. Any text can be spelled: no letter is unknown.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from diptych.errors import UserError

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
_SMALLEST = 2 * len(_LETTERS) + 2


def train_clip_tokenizer(texts: Iterable[str], *, vocabulary: int, length: int) -> CLIPTokenizer:
    """A tokenizer of at most ``vocabulary`` ids that cuts texts to ``length`` ids; merges that occur once are left out.

    Raises UserError when there is no text or no room for all bytes.
    """
    if vocabulary < _SMALLEST:
        raise UserError(f"model.vocabulary is {vocabulary}; all bytes need at least {_SMALLEST}")
    whole = CLIPTokenizer().backend_tokenizer  # CLIP's own rules of lower case and of what is a word
    learner = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    learner.normalizer, learner.pre_tokenizer = whole.normalizer, whole.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, min_frequency=2, initial_alphabet=_LETTERS, end_of_word_suffix=_WORD_END,
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    if not merges:
        raise UserError("the texts for the tokenizer are empty or never repeat themselves: give more of them")
    merges = merges[: vocabulary - _SMALLEST]  # the trainer counts only the word ends that occur
    pieces = [*_LETTERS, *(letter + _WORD_END for letter in _LETTERS), *("".join(pair) for pair in merges)]
    ids = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, _START, _END]))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=length)  # type: ignore[arg-type]
