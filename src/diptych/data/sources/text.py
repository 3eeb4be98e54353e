"""Captions: in the cells of tables and in text files, in strict UTF-8 with one text a line; the cleaning of all."""

import ast
import gzip
import html
import io
import json
import re
import sys
import tokenize
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from diptych.data.sources.decode import NOT_THE_FILE, is_image_path
from diptych.errors import UserError

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]+")
_COLOUR = re.compile("\x1b\\[[0-9;]*m")
"""A colour of the terminal."""
_ESCAPE = re.compile(r"(?<!\\)\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")
"""A character as JSON and Python write it in ASCII. Tables that hold pieces of JSON hold it as six characters."""
_WRITTEN_OUT = re.compile(r"""(?<![:\\])\\(?:[nrt]|(["'/]))""")
"""A line end, a tab or a quote that is written out. Behind a colon it is the path of a drive."""
_BACKSLASH = re.compile(r"""\\(?![nrtuU"'/])|(?<=:)\\""")
"""A backslash that is meant, as in a formula or a path; then all others are meant too."""
_TAG = re.compile(
    r"</?(?:(?P<block>p|br|hr|div|section|article|blockquote|pre|[uo]l|li|h[1-6]|table|tbody|tr|td|th|img)"
    r"|[abius]|em|strong|small|big|su[bp]|span|font|code|cite|mark|center)"
    r"""(?:\s+[\w:-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s>]+))*\s*/?>|<!--.*?-->""",
    re.IGNORECASE | re.DOTALL,
)
"""Tags of HTML. Others in angle brackets, such as <person> and <unk>, are words of data sets."""
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))
"""Characters without width that part or join nothing: marks where a line may break, and byte order marks."""
_ENTITY_MARK = re.compile(r"\[/EN#\S+ ([^\]]*)\]")
"""`[/EN#12/people A man]`, as Flickr30k Entities marks words."""
_ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
NULLS = frozenset(
    {"nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "NA", "N/A", "n/a", "undefined", "\\N", "-", "--", "?", "."}
    | {"#N/A", "#NAME?", "#REF!", "#VALUE!"}
)
"""What libraries, spreadsheets and people write into an empty cell."""
_OTHER_SCRIPT, _NOT_WINDOWS_1252 = re.compile(rb"[\x80-\xff]{3}"), re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
"""Bytes of a text in another script than the Latin one, and those that stand for no character of Windows-1252."""
_NO_TEXTS = {
    **NOT_THE_FILE,
    b"<table": "is a table of HTML, whatever its name; save it as csv in UTF-8",
    b"<?xml": "is XML, whatever its name; save it as csv in UTF-8, or as texts with one a line",
    b"{\\rtf": "is RTF, whatever its name; save it as plain text in UTF-8",
    b"pk\x03\x04": "is a zip, a spreadsheet or a document of Word, whatever its name; unpack it, or save it as csv or "
    "plain text in UTF-8",
    b"par1": "is parquet, whatever its name; let it end in .parquet",
    b"\x1f\x8b": "is packed with gzip; let its name end in .gz",
}
"""How files begin that are no text, in small letters."""
SEPARATORS = ("|", ";", " / ", " # ", " -> ", " => ", "\u2192", "<sep>", "[SEP]")
"""What people put between several texts in one."""
_HEADERS = frozenset({"caption", "captions", "text", "texts", "sentence", "description", "prompt"})
_NUMBER_FIRST = re.compile(r"^(\d+(?=[-/:]\d)|\w*\d)((?:[-/:]\d+)+|[.):]?)\s+\S")
_NUMBER_LAST = re.compile(r"(?:\s|[,;]\s*)(\d*\.\d+|(?<=[,;])\d+)()$")
_MANY, _SAMPLE = 7, 10_000
"""Number of texts which may all be the same, and of the lines of a file that are compared with one another."""
_MANGLED = re.compile("\ufffd|\u00c3[\u0080-\u00bf]|\u00c2[\u00a0-\u00bf]|\u00e2\u20ac.")
"""UTF-8 that was read as Windows-1252, and characters that were lost."""
_BEGIN = re.compile(r"startseq\b|.*(?:[^\w\s'\"-]|-(?=\s))")
_END = re.compile(r"[^\w\s'\".!?\u2026\u3002\uff01\uff1f\u0964\u061f-].*$|\bendseq$")
"""Where every text begins or ends alike, up to and from a character of no word, as in `<start>` or `caption:`."""
_UNSPACED = re.compile("[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Characters of scripts that put no blanks between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese."""
_MARKUP = re.compile(
    r"\]\(https?:|\[/?(?:b|i|u|url|img|quote)\]|\*\*\S[^*]*\*\*|\[\[[^\]]+\]\]|\{\{[^}]+\}\}|```|^\{\s*\"\w+\":|<lora:[^>]*>|\(\S+:\d\.\d+\)"
)
"""Marks of Markdown, BBCode, wikis and prompts."""
_MESSAGE = re.compile(
    r"(?:i'm|i am|we are|we're)? ?(?:sorry|unable to)\b|i (?:cannot|can't|can not) |as an ai\b|traceback\b"
    r"|(?:api |http |internal )?(?:server )?error\b|request timed out|rate limit"
    r"|no (?:caption|description|text|title)s?\b",
    re.IGNORECASE,
)
"""How messages of programs that write captions begin."""
_NAME = re.compile(r"\S*(?:[/_]|\d{3})\S*", re.ASCII)
_LETTER = re.compile(r"[^\W\d_]")
_QUOTED = re.compile(r"""(["'`]).*\1,?""")
_XML = re.compile(r"<(?P<tag>[^\s<>]+)[^<>]*>.*</(?P=tag)>")
_ADDRESS_TEXT = re.compile(r"[\w.-]+(?:(?:\+|%[0-9A-Fa-f]{2})+[\w.-]+){2,}(?:\+|%[0-9A-Fa-f]{2})*")
"""A text with plus signs or `%20` for its blanks."""
WRITTEN = re.compile(r"""\s*(\[|\{\s*["']|\(\s*["']|array\(|b["'])""")
"""How lists and records begin that are written as text."""
_LIST_NAMES = frozenset({"nan", "None", "null", "array", "dtype", "object"})
_GRAMMAR = frozenset({"a", "an", "the", "of", "is", "are", "in", "on", "at", "and", "with", ".", ",", "<eos>", "</s>"})
"""Words by which a list is seen to be a text that was split into words, and no list of captions of one word."""
_SPEAKERS, _MODELS = ("from", "role"), frozenset({"gpt", "assistant", "model", "bot"})
"""The fields of a part of a conversation that name who speaks, and what they hold where a model does."""
INNER = ("raw", "caption", "text", "sentence", "captions", "texts", "sentences")
"""Where a list of captions holds records instead of strings, the fields that may carry the text."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROW = re.compile(r"""["']?(?P<image>[^,;|\t"']+?)["']?(?P<delimiter>\s*[,;|\t]|\s+|$)""")


def clean(text: str) -> str:
    """The text with every run of control characters and white space as one space, and none at its ends.

    Half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD. Characters that are written out, as
    `\\u00e9`, `\\n` or `&quot;` (or `&amp;quot;`), are read as the character. HTML's tags are left out.

    This is done to every caption that a source gives; :func:`diptych.encoders.text.clean_for_clip` is what dual
    encoders do on top.
    """
    for _ in range(2):
        if "&" in text and ";" in text:
            text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    if "[/EN#" in text:
        text = _ENTITY_MARK.sub(r"\1", text)
    if "<" in text and ">" in text:
        text = _TAG.sub(lambda tag: " " if tag["block"] else "", text)
    if "\\" in text and not _BACKSLASH.search(text):
        text = _WRITTEN_OUT.sub(lambda escape: escape[1] or " ", text)
    if "\\u" in text or "\\U" in text:
        text = _ESCAPE.sub(_unescaped, text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if text.isprintable() and "  " not in text:  # nearly every caption, and ten times quicker
        return text.strip()
    text = _CONTROL.sub(" ", _COLOUR.sub("", text).translate(_INVISIBLE))
    return " ".join(_SURROGATE.sub("\ufffd", text).split())


def count_words(text: str) -> int:
    """Number of words; in scripts without blanks between words each character counts."""
    return len((text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)).split())


def says_missing(value: Any) -> bool:
    """Whether a cell holds what somebody wrote for an empty one."""
    return isinstance(value, str) and value.strip() in NULLS


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, an empty text, or a list of nothing else."""
    if isinstance(value, list | tuple):
        return all(map(is_missing, value))
    return value is None or (isinstance(value, float) and value != value) or value == ""


def _unescaped(escape: re.Match[str]) -> str:
    code = int(escape[1] or escape[2], 16)
    return chr(code) if code <= sys.maxunicode else escape[0]


def captions_of(value: Any) -> list[str]:
    """The captions in a cell: a text, a list of texts or of lists of words, or records such as {"raw": ...}.

    A list of single words is one text that was split if `a`, `of`, a full stop or the like is among them, else it is
    several captions.
    Lists and records may also be written as text, as JSON, Python, NumPy or PostgreSQL print them. Of a conversation
    about an image, as LLaVA's, the answer is the caption; one with several answers has none.
    """
    if isinstance(value, bytes):
        return captions_of(value.decode("utf-8", "replace"))
    if isinstance(value, str):
        if (written := written_captions(value)) is not None:
            return written
        text = clean(value)
        return [text] if text and not says_missing(text) else []
    if isinstance(value, Mapping):
        return next((captions_of(value[name]) for name in INNER if name in value), [])
    if isinstance(value, Sequence):
        if is_conversation(value):
            answers = [part for part in value if any(part.get(key) in _MODELS for key in _SPEAKERS)]
            texts = [part.get("value", part.get("content")) for part in answers]
            texts += [part["assistant"] for part in value if "assistant" in part]
            return captions_of(texts[0]) if len(texts) == 1 else []
        if len(value) > 1 and all(map(_is_words, value)):
            return [text for words in value for text in captions_of(" ".join(words))]
        if _is_words(value) and not _GRAMMAR.isdisjoint(word.lower() for word in value):
            return captions_of(" ".join(value))
        return [text for item in value for text in captions_of(item)]
    return [] if is_missing(value) or isinstance(value, bool) else [str(value)]


def written_captions(text: str) -> list[str] | None:
    """The captions of a list or record that ``text`` writes out; None where it is a text like any other."""
    written = written_out(text)
    return None if written is None else captions_of(written)


def is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and not part.keys().isdisjoint((*_SPEAKERS, "assistant")) for part in value)
    )


def _is_words(value: Any) -> bool:
    """Whether ``value`` is a text that was split into words."""
    return (
        isinstance(value, list) and len(value) > 1 and all(isinstance(word, str) and " " not in word for word in value)
    )


def written_out(text: str) -> list[Any] | dict[str, Any] | str | None:
    """The list or record that ``text`` writes out; None where it is a text like any other."""
    if not WRITTEN.match(text):
        return None
    text = text.strip()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _written_list(text)
    if isinstance(found, dict):
        return found if any(name in found for name in INNER) else None
    return (
        found
        if isinstance(found, list) and all(isinstance(item, str | list | dict) or is_missing(item) for item in found)
        else None
    )


def _written_list(text: str) -> list[Any] | str | None:
    """Texts in quotes between brackets. NumPy puts no commas between them, and Python would join them."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        names = {token.string for token in tokens if token.type == tokenize.NAME}
        marks = {token.string for token in tokens if token.type == tokenize.OP}
        values = [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
        if not values or not names <= _LIST_NAMES or not marks <= set("[](){},=:") | {"..."}:
            return None
        if ":" in marks:
            found = ast.literal_eval(text)
            records = found if isinstance(found, list) else [found]
            return records if all(isinstance(item, dict | str) for item in records) else None
    except (tokenize.TokenError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    return texts[0] if not marks else texts


def read_bytes(path: Path) -> bytes:
    """The whole file, unpacked when its name ends in .gz. Raises UserError where it cannot be read."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: is not a complete gzip file ({error}); copy or make it again") from None
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return data


def what_begins(data: bytes) -> str | None:
    """What a file that begins so is, and what to do with it; None where it may be a text."""
    if data[257:262] == b"ustar":
        return "is a tar, whatever its name; let it end in .tar"
    start = data[:64].lstrip().lower()
    return next((what for begin, what in _NO_TEXTS.items() if start.startswith(begin)), None)


def why_unreadable(path: Path, kind: str, error: Exception) -> str:
    """A line on a file that is not what its suffix says: what it is instead, else what its reader says."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        if (what := what_begins(start)) and not start.startswith(b"PAR1"):
            return f"{path}: {what}"
    except OSError:
        pass
    return f"{path}: is not readable as {kind} ({' '.join(str(error).split())[:300]})"


def read_text(path: Path) -> str:
    """The file as text with `\\n` line ends. Raises UserError that names the line and byte that is not UTF-8."""
    return decode_text(read_bytes(path), name=str(path))


def decode_text(data: bytes, *, name: str) -> str:
    """Bytes as text with `\\n` line ends. ``name`` is what messages call them. Raises as `read_text`."""
    if what := what_begins(data):
        raise UserError(f"{name}: {what}")
    if data[:4096].count(0) > len(data[:4096]) // 4:
        raise UserError(f"{name}: looks like UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _not_utf8(data, name=name, offset=error.start)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_utf8(data: bytes, *, name: str, offset: int) -> NoReturn:
    offset += 3 * data.startswith(b"\xef\xbb\xbf")  # the codec counts from behind the byte order mark
    line = data.count(b"\n", 0, offset) + 1
    raise UserError(
        f"{name}: line {line}, byte {offset} (0x{data[offset]:02x}) is not UTF-8; "
        f"convert it from the encoding that it was saved in, {_how_to_convert(data, line)} -t UTF-8 FILE > NEW"
    )


def _how_to_convert(data: bytes, line: int) -> str:
    """The beginning of a command that converts ``data``, of which this line is not UTF-8."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "e.g. iconv -f UTF-16"
    text = data.split(b"\n", line)[line - 1]
    # Windows-1252 is Latin-1 with quotes and dashes where Latin-1 has control characters, which no caption holds. Its
    # languages seldom have three letters with accents in a row, others have them in every word.
    if _OTHER_SCRIPT.search(text) or _NOT_WINDOWS_1252.search(text):
        return "such as SHIFT_JIS, GB18030 or WINDOWS-1251: iconv -f ENCODING"
    return "e.g. iconv -f WINDOWS-1252"


def _refuse_table(path: Path, lines: Sequence[str]) -> None:
    """Raise UserError where most lines are rows of a table whose first cell is the path of an image, or where all are
    JSON or cells between tabs."""
    sample = [line for line in lines[:50] if line.strip()]
    addresses = [line for line in sample if line.strip().lower().startswith(("http://", "https://"))]
    if 2 * len(addresses) > len(sample):
        raise UserError(
            f"{path}: is a list of web addresses ({addresses[0][:60]!r}), not of texts; download them first"
        )
    if sample and all(map(is_json, sample)):
        raise UserError(f"{path}: holds JSON ({sample[0][:60]!r}), a document in each line; let its name end in .jsonl")
    ends = [next((line.strip() for line in order if line.strip()), "") for order in (lines, reversed(lines))]
    if ends[0][:1] + ends[1][-1:] in ("[]", "{}") and is_json("\n".join(lines)):  # joined only if it looks like it
        raise UserError(f"{path}: holds JSON, a document of {len(lines):,} lines; let its name end in .json")
    if 2 * sum(_XML.fullmatch(clean(line)) is not None for line in sample) > len(sample):
        raise UserError(
            f"{path}: holds XML ({sample[len(sample) // 2].strip()[:60]!r}); write its texts alone, one a line"
        )
    rows = [row for line in sample if (row := begins_with_image(line))]
    if 2 * len(rows) > len(sample):
        delimiter = rows[0]["delimiter"].strip(" ")
        suffix = ".tsv" if delimiter == "\t" else ".csv"
        what = f"{path}: is a table of images ({rows[0].string[:60]!r}), not a list of texts; "
        if not delimiter:
            raise UserError(f"{what}save it as .csv, with commas between its columns and a first line that names them")
        has_names = not begins_with_image(sample[0]) and delimiter in sample[0]
        raise UserError(
            f"{what}rename it to {suffix}"
            + ("" if has_names else f", with the first line {f'image{delimiter}caption'!r}")
        )
    if len(sample) > 1 and len({line.strip().count("\t") for line in sample}) == 1 and "\t" in sample[0].strip():
        raise UserError(
            f"{path}: is a table with tabs ({sample[0].strip()[:60]!r}), not a list of texts; rename it to .tsv, with "
            "a first line that names the columns"
        )


def begins_with_image(line: str) -> re.Match[str] | None:
    """The path of an image at the beginning of a line, and the delimiter behind it."""
    row = _ROW.match(line)
    return row if row and is_image_path(row["image"]) else None


def notes_on_texts(texts: Sequence[str]) -> list[str]:
    """What is strange about several texts of one source: letters of a wrong encoding, and what all have in common."""
    notes = []
    if mangled := [found[0] for text in texts if (found := _MANGLED.search(text))]:
        notes.append(
            f"{len(mangled):,} of {len(texts):,} texts that were looked at hold {mangled[0]!r}, as of a wrong encoding"
        )
    if marked := [found[0] for text in texts if (found := _MARKUP.search(text))]:
        notes.append(f"markup is kept in {len(marked):,} of {len(texts):,} texts that were looked at, as {marked[0]!r}")
    if said := [text for text in texts if _MESSAGE.match(text)]:
        notes.append(f"{len(said):,} of {len(texts):,} texts that were looked at may be messages, as {said[0][:60]!r}")
    if 5 * len(cut := [text for text in texts if text.endswith(("...", "\u2026"))]) > len(texts):
        notes.append(f"{len(cut):,} of {len(texts):,} texts that were looked at end in dots, as {cut[0][-30:]!r}")
    if all(map(_NAME.fullmatch, texts[:1] and texts)) and len(texts) > 1:
        notes.append(f"each text is one word, as of a list of names: {texts[0][:60]!r}")
    if coded := [text for text in texts if _ADDRESS_TEXT.fullmatch(text)]:
        notes.append(
            f"{len(coded):,} of {len(texts):,} texts that were looked at are written as in addresses: {coded[0][:60]!r}"
        )
    if bare := [text for text in texts if not _LETTER.search(text)]:
        notes.append(
            f"texts without a letter: {len(bare):,} of {len(texts):,} that were looked at, as {bare[0][:60]!r}"
        )
    if len(set(texts)) < 2:
        return (
            [*notes, f"all {len(texts):,} texts that were looked at are {texts[0][:60]!r}"] if texts[_MANY:] else notes
        )
    first, last = _common_start(texts), _common_start([text[::-1] for text in texts])[::-1]
    for where, mark in (("begins", _BEGIN.match(first)), ("ends", _END.search(last))):
        if mark:
            notes.append(f"{mark[0]!r}, which {where} every text, is a part of it")
    if all(map(_QUOTED.fullmatch, texts)):
        notes.append("the quotes around every text are parts of it")
    for where, number in (("in front of", _NUMBER_FIRST), ("behind", _NUMBER_LAST)):
        numbers = [found for text in texts if (found := number.search(text))]
        counts = {found[1] for found in numbers}  # `2 dogs`, `2 cats` are no numbering
        if len(numbers) == len(texts) and ("0" in counts or len(counts) == len(texts) or all(n[2] for n in numbers)):
            notes.append(f"the numbers {where} the texts, such as {numbers[0][1]}, are parts of them")
    return notes


def notes_on_lines(texts: Sequence[Sequence[str]]) -> list[str]:
    """A note on lines of several texts that begin alike, as fields do: each is a caption of its own."""
    fields = []
    for number in range(max(map(len, texts), default=0)):
        lines = [text[number] for text in texts if 1 < len(text) > number]
        if len(lines) > 1 and (mark := _BEGIN.match(_common_start(lines))):
            fields.append(repr(mark[0][:30]))
    return [f"lines that begin alike in every text are captions too: {', '.join(fields[:3])}"] if fields else []


def _seems_wrapped(lines: Sequence[str]) -> bool:
    """Whether many lines go on in the next one, as in paragraphs of a fixed width."""
    pairs = [(a.strip(), b.strip()) for a, b in zip(["", *lines], lines, strict=False) if b.strip()]
    starts = [b for a, b in pairs if not a]
    inside = [(a[-1].isalnum() and b[0].islower()) or a[-1] == "," for a, b in pairs if a]
    return (
        len(starts) > 1 and 5 * sum(b[0].isupper() for b in starts) >= 4 * len(starts) and 3 * sum(inside) > len(inside)
    )


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((i for i, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(first))]


def _text_notes(path: Path, lines: Sequence[str]) -> list[str]:
    """What of the first lines may be meant for something else than a text."""
    sample = [
        text for line in lines[:: max(1, len(lines) // _SAMPLE)] if (text := line.strip()) and not says_missing(text)
    ]
    notes = notes_on_texts(sample)
    if len(sample) > 1 and not _HEADERS.isdisjoint(
        cell.strip("\"' ") for cell in re.split(r"[,;|]", sample[0].lower())
    ):
        notes.append(f"the first line of {path} is the text {sample[0]!r}; remove it if it names a column")
    for mark in SEPARATORS:
        if len(sample) > 1 and 10 * sum(mark in text for text in sample) >= 9 * len(sample):
            notes.append(f"{mark!r} parts no texts: a line of {path} is one text")
            break
    if _seems_wrapped(lines[:_SAMPLE]):
        notes.append(f"lines of {path} seem to go on in the next ones, but each is a text of its own")
    remarks = [line for line in lines if line.lstrip().startswith("#")]
    if 0 < 2 * len(remarks) < len(lines):
        notes.append(
            f"lines of {path} that begin with # are texts: {len(remarks):,} such as {remarks[0].strip()[:60]!r}; "
            "remove them if they are remarks"
        )
    return notes


def is_json(line: str) -> bool:
    """Whether a line is an object or a list of JSON."""
    if line.strip()[:1] not in ("{", "["):
        return False
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


class TextSource:
    """Texts without images, one a line; empty lines are left out.

    They lie end to end in one buffer: ten million lines of Python strings would take a gigabyte more.
    """

    has_images = False
    has_captions = True

    def __init__(self, paths: list[Path], *, name: str):
        self.name = name
        pieces, ends, keys = [], array("q", [0]), array("q")
        self._files = [path.name for path in paths]
        self.notes: list[str] = []
        nulls = 0
        for number, path in enumerate(paths):
            lines = read_text(path).split("\n")
            _refuse_table(path, lines)
            self.notes += _text_notes(path, lines)
            for line, text in enumerate(lines, start=1):
                text = clean(text)
                if says_missing(text):
                    nulls += 1
                elif text:
                    piece = text.encode()
                    pieces.append(piece)
                    ends.append(ends[-1] + len(piece))
                    keys.append(number << 40 | line)
        if not keys:
            raise UserError(f"{name}: holds no text; a text file has one text per line")
        if nulls:
            self.notes.append(f"{nulls:,} texts such as nan or null taken for missing")
        self._buffer = b"".join(pieces)
        self._ends, self._keys = np.array(ends), np.array(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        number, line = divmod(int(self._keys[i]), 1 << 40)
        return f"{self._files[number]}:{line}"

    def captions(self, i: int) -> list[str]:
        i = range(len(self))[i]
        return [self._buffer[self._ends[i] : self._ends[i + 1]].decode()]

    def image(self, i: int, size: int) -> np.ndarray:
        raise UserError(f"{self.name}: holds texts, not images")

    def label(self, i: int) -> str | None:
        return None
