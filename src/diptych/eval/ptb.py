"""Penn Treebank tokens of a caption, as the caption metrics of the field expect them, without Java.

CIDEr, BLEU and ROUGE-L are defined on the output of Stanford's PTBTokenizer (CoreNLP 3.4.1, `-preserveLines
-lowerCase`) after a fixed list of punctuation is removed. These rules were written from the Treebank conventions and
from the observed output of that program; `benchmarks/caption_parity.py` measures the agreement.

Three steps: characters are made plain, contractions are split by a blank, then one left-to-right scan takes the first
rule of a table that matches. Known differences: the Java program reads all captions as one text, so whether it keeps
the full stop of a final single letter ("vitamin c.") depends on the *next* caption (we drop it); telephone numbers,
addresses without http and rare emoticons.
"""

import re

# What `pycocoevalcap` removes. Its list has the names of the brackets in upper case, so the lower-case ones stay among
# the tokens: we do the same.
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

# Blanks inserted before the scan. Each pattern is empty: it names the place of the cut.
_CUTS = re.compile(
    r"""(?ix)
      (?<=[^\W\d_]) (?=n't(?![^\W\d_]))                             # do|n't
    | (?<=\bcan) (?=not\b(?![-'])) | (?<=\bgon) (?=na\b(?![-'])) | (?<=\bgot) (?=ta\b(?![-']))
    | (?<=\bwan) (?=na\b(?![-'])) | (?<=\blem) (?=me\b(?![-'])) | (?<=\bgim) (?=me\b(?![-']))
    | (?<='t) (?=is\b|was\b)                                        # 't|is
    """
)

# Their full stop belongs to them. `_CAPITALISED`: only when written with a capital; `_COUNTED`: only before a number.
_ABBREVIATIONS = r"""
    mr|mrs|ms|messrs|mme|mlle|dr|drs|prof|rev|hon|st|ste|jr|sr|esq|ph\.d|ph|pres|gov|sen|rep|gen|col|lt|sgt|cpl|capt
    |cmdr|brig|adm|maj|pvt|pfc|supt|det|insp|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs
    |fri|ave|blvd|rd|ct|sq|ft|mt|ext|inc|co|cos|corp|ltd|plc|bros|bldg|dept|assn|assoc|asst|univ|natl|intl|est|elec|ind
    |etc|vs|cf|al|adj|adv|tel|mo|ala|ariz|calif|colo|conn|dak|fla|ga|kan|ky|md|mich|minn|mont|neb|nev|okla|penn|tenn|va
    |vt|wis|wyo"""
_CAPITALISED = "Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_COUNTED = "no|nos|art|fig|figs|pp|ca|prop|op"
# Words that show that a sentence begins, so that the stop before them is not an initial's.
_OPENERS = "A|An|The|He|She|It|They|We|I|You|There|This|That|These|Those|His|Her|Their|In|On|At|And|But"

# A letter; a letter or digit.
L, W = r"[^\W\d_]", r"[^\W_]"
_ABBREVIATION = rf"(?:(?i:{_ABBREVIATIONS})|{_CAPITALISED}|{_CAPITALISED.upper()})\.(?!{L})"
_ACRONYM = rf"{L}(?:\.{L})+(?!{L})\.?(?!{L})"
_APOSTROPHE = rf"""(?i:[dl]'{L}{{2,}} | o'{L}{{2,}} | {L}+[aeiouy]'[aeiou]{L}* | e'er | c'mon | s'mores | ev'ry | li'l
    | nat'l | nor'easter) | [A-HJ-XZ]'{L}{{2,}}"""
_CLIPPED = rf"\b(?:(?:ol|dunkin|somethin)'(?!{L}) | [dlj]'(?!{L}) | y'(?=all))"
# Atomic groups: without them "a.b-a.b-a.b-..." would take exponential time.
_ATOM = rf"(?>{_APOSTROPHE} | {_ACRONYM} | {L}{W}*(?:[.!?]{L}{W}*)+ | {W}+(?:_{W}+)*)"
_CHAIN = rf"(?:{_ABBREVIATION}(?=-{W}) | {_ATOM})(?:-{_ATOM})*+"

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
