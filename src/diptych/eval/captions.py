"""Scores of captions against references (CIDEr-D, BLEU, ROUGE-L), and how varied the captions are; no Java.

The scores are those of `pycocoevalcap` 1.2, whose scorers are pure Python. They are defined on the output of Stanford's
PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`), a Java program, after a fixed list of punctuation is removed.
:func:`tokenize` gives the same tokens. Its rules were written from the conventions of the Penn Treebank and from the
observed output of that program; `benchmarks/caption_parity.py` measures the agreement.

A caption is tokenized in three steps: characters are made plain, contractions are split by a blank, then one scan from
left to right takes the first rule of a table that matches. Known differences: telephone numbers, addresses without http
and rare emoticons. The Java program also reads all captions as one text, so whether it keeps the full stop of a final
single letter ("vitamin c.") depends on the *next* caption; here the stop is dropped.
"""

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from diptych.errors import UserError

FEW_IMAGES = 100
"""Number of images below which a warning says that their CIDEr is not that of a whole set."""


@dataclass(kw_only=True, slots=True)
class Diversity:
    """How varied the candidates are, counted over PTB tokens. Low shares mean a captioner that repeats itself."""

    distinct_captions: float
    """Number of different captions as a share of all captions."""
    distinct_1: float
    """Number of different words as a share of all words. It falls as the number of candidates grows."""
    distinct_2: float
    """Number of different pairs of neighbouring words as a share of all such pairs."""
    mean_length: float
    """Mean number of words of a caption."""
    vocabulary: int
    """Number of different words."""
    most_common: str
    """The commonest caption, as tokens."""
    most_common_share: float
    """Share of the commonest caption among all captions."""


@dataclass(kw_only=True, slots=True)
class CaptionScores:
    """Corpus scores, the same per image, and diversity.

    CIDEr weighs words by how rare they are *among the evaluated references*. So CIDEr of a subset is not comparable
    with CIDEr of the whole set, and one image gives 0 whatever its caption. `warnings` says so when it matters.
    """

    cider: float
    """CIDEr-D times 100, as papers print it (`pycocoevalcap` returns it without the 100); the mean over images."""
    bleu: tuple[float, float, float, float]
    """BLEU-1 to BLEU-4 of the corpus, 0 to 1. They are not the means over images."""
    rouge_l: float
    """ROUGE-L (beta 1.2), 0 to 1; the mean over images."""
    images: int
    """Number of images scored."""
    keys: list[Hashable]
    """Keys of the images, in the order of the three lists below."""
    cider_per_image: list[float]
    """CIDEr-D times 100 of each image; it depends on the references of the other images."""
    bleu_per_image: list[tuple[float, float, float, float]]
    """BLEU-1 to BLEU-4 of each image."""
    rouge_l_per_image: list[float]
    """ROUGE-L of each image."""
    diversity: Diversity
    """How varied the candidates are, without regard to the references."""
    warnings: list[str]
    """Sentences that a reader of the scores must know; often none."""

    def table(self) -> dict[str, float]:
        """The corpus numbers under the names that go into `metrics.json`."""
        scores = {"cider": self.cider, "rouge_l": self.rouge_l}
        scores |= {f"bleu_{n}": value for n, value in enumerate(self.bleu, start=1)}
        names = ("distinct_captions", "distinct_1", "distinct_2", "mean_length", "vocabulary", "most_common_share")
        return scores | {name: float(getattr(self.diversity, name)) for name in names}


Texts = Mapping[Any, str | Sequence[str]] | Sequence[str | Sequence[str]]
"""One text or several for each image, by the images' keys or in the images' order."""


def score_captions(candidates: Texts, references: Texts) -> CaptionScores:
    """Scores one plain-text candidate per image against one or more plain-text references.

    Both are dicts with the same keys, or lists in the same order. See `CaptionScores` for what CIDEr depends on.

    Raises `UserError`: nothing to score, keys or lengths that differ, no reference or several candidates for an image.
    """
    candidates, references = _keyed(candidates, "candidates"), _keyed(references, "references")
    return score_tokens(
        {key: tokenize(_only(texts, key)) for key, texts in candidates.items()},
        {key: [tokenize(text) for text in texts] for key, texts in references.items()},
    )


def score_tokens(candidates: Texts, references: Texts) -> CaptionScores:
    """`score_captions` for texts that are PTB tokens joined by blanks already."""
    references = _keyed(references, "references")
    texts = {key: _only(value, key) for key, value in _keyed(candidates, "candidates").items()}
    _check(texts, references)
    # Imported here, as only those who score captions need them. The scorer classes, as `Bleu` prints to stdout.
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    from pycocoevalcap.rouge.rouge import Rouge

    cider, bleu, rouge = CiderScorer(n=4, sigma=6.0), BleuScorer(n=4), Rouge()
    rouge_per_image = []
    for key, text in texts.items():
        cider += (text, references[key])
        bleu += (text, references[key])
        rouge_per_image.append(float(rouge.calc_score([text], references[key])))
    cider_corpus, cider_per_image = cider.compute_score()
    bleu_corpus, bleu_per_image = bleu.compute_score(option="closest", verbose=0)
    return CaptionScores(
        cider=100 * float(cider_corpus),
        bleu=tuple(bleu_corpus),
        rouge_l=sum(rouge_per_image) / len(texts),
        images=len(texts),
        keys=list(texts),
        cider_per_image=[100 * float(score) for score in cider_per_image],
        bleu_per_image=list(zip(*bleu_per_image, strict=True)),
        rouge_l_per_image=rouge_per_image,
        diversity=measure_diversity(list(texts.values())),
        warnings=_warnings(texts),
    )


def measure_diversity(captions: Sequence[str]) -> Diversity:
    """Diversity of captions given as tokens joined by blanks. Raises `UserError` for an empty list."""
    if not captions:
        raise UserError("No captions to measure: give at least one.")
    words = [caption.split() for caption in captions]
    singles = [word for sentence in words for word in sentence]
    pairs = [pair for sentence in words for pair in pairwise(sentence)]
    [(most_common, count)] = Counter(captions).most_common(1)
    return Diversity(
        distinct_captions=len(set(captions)) / len(captions),
        distinct_1=len(set(singles)) / max(len(singles), 1),
        distinct_2=len(set(pairs)) / max(len(pairs), 1),
        mean_length=len(singles) / len(captions),
        vocabulary=len(set(singles)),
        most_common=most_common,
        most_common_share=count / len(captions),
    )


def _keyed(texts: Mapping | Sequence, role: str) -> dict[Hashable, list[str]]:
    """Texts by key, always as lists; a list's keys are its positions."""
    if isinstance(texts, str) or not isinstance(texts, Mapping | Sequence):
        raise UserError(f"The {role} are a {type(texts).__name__}: give a dict or a list with one entry per image.")
    items = texts.items() if isinstance(texts, Mapping) else enumerate(texts)
    keyed = {key: [value] if isinstance(value, str) else list(value) for key, value in items}
    for key, values in keyed.items():
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"The {role} of image {key!r} are not all text: {values!r:.80}. Give strings.")
    return keyed


def _only(texts: list[str], key: Hashable) -> str:
    if len(texts) != 1:
        raise UserError(f"Image {key!r} has {len(texts)} candidate captions: give exactly one.")
    return texts[0]


def _check(texts: Mapping[Hashable, str], references: Mapping[Hashable, list[str]]) -> None:
    if not texts:
        raise UserError("No candidate captions to score: give at least one image with its references.")
    for missing, role, other in (
        (texts.keys() - references.keys(), "references", "a candidate"),
        (references.keys() - texts.keys(), "candidate", "references"),
    ):
        if missing:
            example = min(missing, key=str)
            raise UserError(
                f"{len(missing)} images have {other} but no {role}, e.g. {example!r}: give the same images."
            )
    empty = [key for key, sentences in references.items() if not any(sentence.strip() for sentence in sentences)]
    if empty:
        raise UserError(
            f"{len(empty)} images have no reference with a word in it, e.g. {empty[0]!r}: drop or fill them."
        )


def _warnings(texts: Mapping[Hashable, str]) -> list[str]:
    found = []
    if len(texts) == 1:
        found.append("CIDEr of one image is always 0: it weighs words by how rare they are among the images.")
    elif len(texts) < FEW_IMAGES:
        found.append(f"CIDEr over {len(texts)} images is not comparable with CIDEr over a whole set.")
    if empty := sum(not text for text in texts.values()):
        found.append(f"{empty} of {len(texts)} candidate captions are empty; they score 0.")
    return found


# Penn Treebank tokens

# What `pycocoevalcap` removes. Its list has the names of the brackets in upper case, so the lower-case ones stay among
# the tokens, here too.
_DROPPED = re.compile(r"""\.+ | -+ | ['`"?!,:;] | '' | ``""", re.VERBOSE)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_PLAIN = str.maketrans(
    {
        "’": "'",
        "‘": "`",
        **dict.fromkeys("“”«»‹›", '"'),
        **dict.fromkeys("‐–—", "--"),
        "…": "...",
        "\u00ad": "",  # soft hyphen
        "€": "$",
        "£": "#",  # the Treebank's own convention
        "¢": " cents ",
        # two blanks: "3½" is two tokens, "3 1/2" is one
        "½": "  1/2 ",
        "¼": "  1/4 ",
        "¾": "  3/4 ",
        "⅓": "  1/3 ",
        "⅔": "  2/3 ",
    }
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}

# Blanks inserted before the scan. Each pattern is empty: it finds the place of the cut.
_CUTS = re.compile(
    r"""(?ix)
      (?<=[^\W\d_]) (?=n't(?![^\W\d_]))                             # do|n't
    | (?<=\bcan) (?=not\b(?![-'])) | (?<=\bgon) (?=na\b(?![-'])) | (?<=\bgot) (?=ta\b(?![-']))
    | (?<=\bwan) (?=na\b(?![-'])) | (?<=\blem) (?=me\b(?![-'])) | (?<=\bgim) (?=me\b(?![-']))
    | (?<='t) (?=is\b|was\b)                                        # 't|is
    """
)

# Their full stop belongs to them. `_CAPITALIZED`: only when written with a capital; `_COUNTED`: only before a number.
_ABBREVIATIONS = r"""
    mr|mrs|ms|messrs|mme|mlle|dr|drs|prof|rev|hon|st|ste|jr|sr|esq|ph\.d|ph|pres|gov|sen|rep|gen|col|lt|sgt|cpl|capt
    |cmdr|brig|adm|maj|pvt|pfc|supt|det|insp|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs
    |fri|ave|blvd|rd|ct|sq|ft|mt|ext|inc|co|cos|corp|ltd|plc|bros|bldg|dept|assn|assoc|asst|univ|natl|intl|est|elec|ind
    |etc|vs|cf|al|adj|adv|tel|mo|ala|ariz|calif|colo|conn|dak|fla|ga|kan|ky|md|mich|minn|mont|neb|nev|okla|penn|tenn|va
    |vt|wis|wyo"""
_CAPITALIZED = "Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_COUNTED = "no|nos|art|fig|figs|pp|ca|prop|op"
# Words that show that a sentence begins, so that the stop before them is not an initial's.
_OPENERS = "A|An|The|He|She|It|They|We|I|You|There|This|That|These|Those|His|Her|Their|In|On|At|And|But"

# A letter; a letter or digit.
L, W = r"[^\W\d_]", r"[^\W_]"
_ABBREVIATION = rf"(?:(?i:{_ABBREVIATIONS})|{_CAPITALIZED}|{_CAPITALIZED.upper()})\.(?!{L})"
_ACRONYM = rf"{L}(?:\.{L})+(?!{L})\.?(?!{L})"
_APOSTROPHE = rf"""(?i:[dl]'{L}{{2,}} | o'{L}{{2,}} | {L}+[aeiouy]'[aeiou]{L}* | e'er | c'mon | s'mores | ev'ry | li'l
    | nat'l | nor'easter) | [A-HJ-XZ]'{L}{{2,}}"""
_CLIPPED = rf"\b(?:(?:ol|dunkin|somethin)'(?!{L}) | [dlj]'(?!{L}) | y'(?=all))"
# Atomic groups: without them "a.b-a.b-a.b-..." would take exponential time.
_ATOM = rf"(?>{_APOSTROPHE} | {_ACRONYM} | {L}{W}*(?:[.!?]{L}{W}*)+ | {W}+(?:_{W}+)*)"
_CHAIN = rf"(?:{_ABBREVIATION}(?=-{W}) | {_ATOM})(?>(?:-{_ATOM})*)"

_RULES = {
    "plain": rf"{L}+(?=\ |$)",  # by far the commonest case, first for speed; no later rule would take it otherwise
    "markup": rf"</?{L}[^<>]*> | <!--.*?-->",
    "address": rf"(?i:https?)://[^\s\"<>()]*[^\s\"<>().,!?;:'-] | [\w.+-]+@{L}[\w-]*(?:\.[\w-]+)+",
    "emoticon": r">?[:;=]['-]?(?:[()] | [DdPp](?!\w))",
    "clitic": rf"(?i:'(?:s|m|d|re|ve|ll)(?!{L}) | n't(?!{L}) | 't(?=\ (?:is|was)\b))",
    "elision": rf"(?i:'(?:em|till?|cause|[2-9]0s)(?!{W}) | (?<!\w)'\d\d(?!\S) | 'n' | 'n(?!{W}) | {_CLIPPED})",
    "fraction": r"\d{1,4}[ -]\d{1,4}/\d{1,4}(?![\d/])",
    "initials": r"[A-Z]+(?:&[A-Z]+)+ | (?:US|HK|NZ|C|A)\$",
    "slashed": rf"{_CHAIN}(?:/{_CHAIN})+",
    "abbreviation": rf"{_ABBREVIATION}(?!-{W})",
    "counted": rf"(?i:{_COUNTED})\.(?=\s*\d)",
    "initial": rf"{L}\.(?=\.\. | \s+(?!(?:{_OPENERS})\b))",
    "measure": rf"\d+(?:[.,]\d+)+(?:-{_ATOM})+",
    "number": r"[+-]?\d*(?:[.,:]\d+)+ | [+-]\d+",
    "word": _CHAIN,
    "tag": rf"[#@]{L}\w*",
    "run": r"[?!]+ | \.+ | -+ | _+ | \*+ | '' | ``",
    "character": r"\S",
}
_TOKEN = re.compile("|".join(f"(?:{rule})" for rule in _RULES.values()), re.VERBOSE)
_UNKNOWN = re.compile("[\U00010000-\U0010ffff\ufe0f\u200b-\u200f]")  # the Java lexer drops what is beyond 16 bits


def tokenize(caption: str) -> str:
    """The tokens of one caption, lower case, joined by single blanks, without punctuation.

    A mixed number ("3 1/2") is one token with a no-break space inside, as in the original. Source: the behaviour of
    Stanford PTBTokenizer 3.4.1 and the punctuation list of `pycocoevalcap`.
    """
    for name, character in _ENTITIES.items():
        caption = caption.replace(name, character)
    text = _CUTS.sub(" ", _UNKNOWN.sub("", caption.translate(_PLAIN)))
    tokens = []
    for token in _TOKEN.findall(text):
        if _DROPPED.fullmatch(token):
            continue
        for bracket, name in _BRACKETS.items():
            token = token.replace(bracket, name)
        tokens.append(token.lower().replace(" ", "\u00a0"))
    return " ".join(tokens)
