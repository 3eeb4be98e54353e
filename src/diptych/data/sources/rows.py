"""The rows of table files: csv, tsv, json, jsonl and parquet, in the forms that the common tools write."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from diptych.data.sources.columns import CAPTION_NAMES, IMAGE_NAMES, LABEL_NAMES, is_address, is_split, usual
from diptych.data.sources.decode import is_image_path
from diptych.data.sources.text import is_json, read_text, why_unreadable
from diptych.errors import UserError

TABLE_SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".tsv", ".parquet")
"""Suffixes of the files that :func:`read_rows` reads."""
_DELIMITERS = ",\t;|"
csv.field_size_limit(2**31 - 1)  # an image in base64 is longer than 131,072 characters
_NO_CAPTION = ("is_rejected", "is_precanned")


def read_rows(path: Path, *, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a table file; all but parquet may end in .gz.

    A file of none of the :data:`TABLE_SUFFIXES`, such as a list of items to keep, is read as JSON lines.

    What is left out is named in a line that is added to ``notes``. Raises UserError for a file that is damaged or has
    no rows.
    """
    notes = [] if notes is None else notes
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    if suffix == ".parquet":
        rows = _read_parquet(path)
    elif suffix in (".csv", ".tsv"):
        rows = _read_delimited(read_text(path), path, "," if suffix == ".csv" else "\t")
    elif suffix == ".json":
        rows = _unnested(_read_json(read_text(path), path, notes))
    else:
        rows = _unnested(_read_json_lines(read_text(path), path, notes))
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(why_unreadable(path, "parquet", error)) from None


def _read_delimited(text: str, path: Path, delimiter: str) -> list[dict[str, Any]]:
    text = text.lstrip("\n")
    if is_json(text.partition("\n")[0]) or text.startswith("[\n"):
        raise UserError(f"{path}: holds JSON; let its name end in .json, or in .jsonl if each line is a document")
    first, _, rest = text.partition("\n")
    if first.startswith("sep=") and len(first.strip()) == 5:  # how spreadsheets are told the delimiter
        delimiter, text = first[4], rest
        first = rest.partition("\n")[0]
    if delimiter not in first:  # in many countries spreadsheets write ; into csv files
        delimiter = next((other for other in _DELIMITERS if other in first), delimiter)
    if delimiter == "\t":
        text = _named_by_content(first) + text
    if delimiter == "\t" and (rows := _read_plain_lines(text, path)) is not None:
        return rows
    try:
        return _read_cells(text, path, delimiter, csv.QUOTE_MINIMAL)
    except UserError as error:
        if delimiter == "\t":
            return _read_cells(text, path, delimiter, csv.QUOTE_NONE)
        if '\\"' not in text:
            raise
        try:  # MySQL and Spark write a quote inside a quoted cell with a backslash
            return _read_cells(text.replace('\\"', '""'), path, delimiter, csv.QUOTE_MINIMAL)
        except UserError:
            raise error from None


def _named_by_content(first: str) -> str:
    """The header that a list of captions and web addresses such as CC3M's lacks; empty where the first line is one."""
    cells = first.split("\t")
    if not any(map(is_address, cells)):
        return ""
    names = ["url" if is_address(cell) else "file_name" if is_image_path(cell) else "caption" for cell in cells]
    return "\t".join(names) + "\n" if len(set(names)) == len(names) else ""


def _read_plain_lines(text: str, path: Path) -> list[dict[str, Any]] | None:
    """The rows of a table with tabs in which every line is a row; None where some line is not.

    Many such files hold quotes as plain characters, and two of them in two rows would make one cell of both. Quotes
    around a whole cell are taken off. Lines are no rows, too, where some have the path of an image and some have none:
    then quoted cells hold tabs and line ends.
    """
    lines = [line.split("\t") for line in text.split("\n") if line.strip()]
    if not lines or any(len(cells) != len(lines[0]) for cells in lines):
        return None
    for column in zip(*lines[1:], strict=True):
        paths = sum(is_image_path(_unquote(cell)) for cell in column)
        if len(column) > paths >= 0.5 * len(column):
            return None
    header = _header([_unquote(cell) for cell in lines[0]], path)
    return [dict(zip(header, map(_unquote, cells), strict=True)) for cells in lines[1:]]


def _trim(cell: str) -> str:
    """The cell without white space at its ends, and without characters that have no width, as the web puts there."""
    return cell.strip().strip("\u200b\u2060\ufeff").strip()


def _unquote(cell: str) -> str:
    cell = _trim(cell)
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
        return cell[1:-1].replace('""', '"')
    return cell


def _read_cells(text: str, path: Path, delimiter: str, quoting: Literal[0, 3]) -> list[dict[str, Any]]:
    # Strict: an unclosed quote would otherwise swallow the rest of the file.
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=True
    )
    rows: list[dict[str, Any]] = []
    start = 2
    try:
        header = _header(next(reader, []), path)
        for cells in reader:
            if any(map(str.strip, cells)) and not any(any(row.values()) for row in rows):
                _refuse_title(header, cells, path)
            if cells and len(cells) != len(header):
                mend = "put quotes around cells that hold the delimiter"
                if len(cells) < len(header):
                    mend = f"write the {delimiter!r} that is missing there, or leave the row out"
                elif not rows and len(cells) == len(header) + 1 and {len(row) for row in reader if row} == {len(cells)}:
                    mend = "so has every row; name each column in the first line, also that of the row names of R"
                raise UserError(
                    f"{path}: the row at line {start} has {len(cells)} cells and the header {len(header)}; {mend}"
                )
            if cells:
                _refuse_swallowed(cells, delimiter, f"{path}: the row at line {start}")
                rows.append(dict(zip(header, map(_trim, cells), strict=True)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: the row at line {start}: {error}; look for a quote that is not closed") from None
    return rows


def _header(cells: Sequence[str], path: Path) -> list[str]:
    """The names of the columns. Those without one, as of the index that pandas writes, are called by their number."""
    names = [name.strip() or f"column {number}" for number, name in enumerate(cells, start=1)]
    if len(set(names)) < len(names) or not any(map(str.strip, cells)) or not all(map(_is_name, names)):
        shown = ", ".join(cells)[:100]
        raise UserError(f"{path}: the first line must name every column, each once; it is {shown!r}")
    return names


def _refuse_title(header: Sequence[str], cells: Sequence[str], path: Path) -> None:
    """Raise UserError where the second line that is not empty names the columns: a title stands above it.

    It does so, too, where the first line names the first of several columns alone.
    """
    names = IMAGE_NAMES | CAPTION_NAMES | LABEL_NAMES
    told = any(usual(name, names) for name in header)
    alone = all(name == f"column {number}" for number, name in enumerate(header[1:], start=2)) and any(cells[1:])
    if alone and not all(map(_is_name, cells)):
        raise UserError(f"{path}: the first line must name every column; it is {', '.join(header)[:100]!r}")
    if not told and (alone or sum(usual(cell, names) for cell in cells) > 1):
        shown = ", ".join(filter(None, cells))[:60]
        raise UserError(f"{path}: the second line names the columns ({shown}); remove what is above")


def _is_name(cell: str) -> bool:
    """False for a cell that must be data: the first line of a table without a header."""
    return len(cell) <= 100 and not is_image_path(cell) and "://" not in cell


def _refuse_swallowed(cells: Sequence[str], delimiter: str, place: str) -> None:
    """Raise UserError where a quoted cell runs over lines that are rows of their own, with the path of an image."""
    for cell in cells:
        for line in cell.split("\n") if "\n" in cell else ():
            if delimiter in line and any(is_image_path(part.strip(' "')) for part in line.split(delimiter)):
                raise UserError(
                    f"{place}: a quote that opens there closes in another row ({line[:60]!r}); close it in its row, "
                    'or write "" for a quote inside a quoted cell'
                )


def _read_json_lines(text: str, path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if text.lstrip().startswith("["):
        return _read_json(text, path, notes)
    _refuse_table(text, path)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = _parse(line, f"{path}: line {number}")
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is not a JSON object {{...}}")
            rows.append(row)
    return rows


def _refuse_table(text: str, path: Path) -> None:
    """Raise UserError where a file is a table with delimiters, whatever its name."""
    first, second, *_ = [*text.split("\n", 2), "", ""]
    for delimiter in _DELIMITERS:
        if first[:1].isalpha() and 0 < first.count(delimiter) <= second.count(delimiter):
            kind = ".tsv" if delimiter == "\t" else ".csv"
            raise UserError(f"{path}: is a table with {delimiter!r} between its columns; let its name end in {kind}")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once. Of two, JSON readers would drop the first without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _read_json(text: str, path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of a JSON document.

    It may be a list of objects or of texts, an object that holds one such list, COCO's captions, Karpathy's splits, the
    tasks of Label Studio, an object with a file name for each key (as kohya's scripts write), columns as pandas writes
    them, or JSON lines.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return _read_json_lines(text, path, notes)
        _refuse_table(text, path)
        raise UserError(f"{path}: is not JSON ({error})") from None
    if isinstance(document, dict):
        lists = {name: value for name, value in document.items() if _is_rows(value)}
        said = any(usual(name, CAPTION_NAMES) for name in lists.get("images", [{}])[0])
        if "images" in lists and not document.get("annotations") and said:
            document = lists["images"]
        elif "images" in lists and ("annotations" in document or "licenses" in document):
            return _join_coco(lists["images"], document.get("annotations") or [], path, notes)
        elif lists and all(map(is_split, document)):
            document = [{"split": name, **row} for name, rows in lists.items() for row in rows]
        elif len(lists) == len(document) > 1 and all(
            any(map(is_image_path, rows[0].values())) for rows in lists.values()
        ):
            document = [{"label": name, **row} for name, rows in lists.items() for row in rows]
        elif len(lists) == 1 and not any(map(is_image_path, document)):
            document = next(iter(lists.values()))
        else:
            document = _keyed(document) or document
    if _is_rows(document) and all(isinstance(item.get("data"), dict) and _JUDGED & item.keys() for item in document):
        return [_of_task(item) for item in document]
    if isinstance(document, list) and document and all(isinstance(item, str) for item in document):
        return [{"text": text} for text in document]
    if not _is_rows(document):
        raise UserError(f'{path}: must be a list of objects, e.g. [{{"file_name": ..., "caption": ...}}, ...]')
    return document


_JUDGED = {"annotations", "predictions"}
LOCAL_FILES = "/data/local-files/?d="
"""How a task of Label Studio begins the path of a file on its own disk."""


def _of_task(task: dict[str, Any]) -> dict[str, Any]:
    """A task of Label Studio as a row: its data, and the texts of people, or of a model where nobody has looked yet."""
    row = {
        name: value.removeprefix(LOCAL_FILES) if isinstance(value, str) else value
        for name, value in task["data"].items()
    }
    by_people = [each for each in task.get("annotations") or [] if not each.get("was_cancelled")]
    texts: list[Any] = []
    for judged in by_people or task.get("predictions") or []:
        for part in judged.get("result") or []:
            text = part.get("value", {}).get("text", []) if part.get("type") == "textarea" else []
            texts += [text] if isinstance(text, str) else text
    return {**row, "captions": texts} if texts or "captions" not in row else row


def _unnested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose images are named in records inside them, with a row for each of these records."""

    def has_image(record: Any) -> bool:
        return isinstance(record, dict) and any(map(is_image_path, record.values()))

    def inner(row: dict[str, Any]) -> str | None:
        return next((name for name, cell in row.items() if any(map(has_image, _listed(cell)))), None)

    some_rows = rows[:: max(1, len(rows) // 64)]
    if any(map(has_image, some_rows)) or not any(map(inner, some_rows)):
        return rows
    made: list[dict[str, Any]] = []
    for row in rows:
        name = inner(row)
        rest = {other: cell for other, cell in row.items() if other != name}
        made += [{**rest, **record} for record in _listed(row[name]) if isinstance(record, dict)] if name else [row]
    return made


def _listed(cell: Any) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _keyed(document: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Rows of {column: {index: value}}, of {column: [values]} and of {file name: {field: value}}, {file name: caption
    or captions}, which may stand below splits."""
    values = list(document.values())
    if values and all(isinstance(value, dict) for value in values):
        if all(map(is_split, document)):
            parts = [_keyed(part) for part in values]
            rows = [{"split": split, **row} for split, part in zip(document, parts, strict=True) for row in part or []]
            return rows if all(parts) else None
        if all(value.keys() == values[0].keys() for value in values) and all(key.isdecimal() for key in values[0]):
            return [{name: column[index] for name, column in document.items()} for index in values[0]]
        return [{"file_name": name, **value} for name, value in document.items()]
    if values and all(map(is_image_path, document)) and all(isinstance(value, str | list | None) for value in values):
        return [{"file_name": name, "captions": value} for name, value in document.items()]
    if not any(usual(name, IMAGE_NAMES | CAPTION_NAMES | LABEL_NAMES) for name in document) and _are_captions(values):
        return [{"image_id": name, "captions": value} for name, value in document.items()]
    alike = len(values) > 1 and all(isinstance(value, list) for value in values) and len(set(map(len, values))) == 1
    if alike and not all(map(is_split, document)):
        return [dict(zip(document, cells, strict=True)) for cells in zip(*values, strict=True)]
    return None


def _are_captions(values: Sequence[Any]) -> bool:
    """Whether values of JSON are sentences or lists of sentences: captions by the names of images."""
    texts = [each for value in values for each in _listed(value)]
    return len(values) > 1 and all(isinstance(text, str) and len(text.split()) > 2 for text in texts)


def _join_coco(images: list[dict], annotations: list[dict], path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows from COCO's two lists, which keep the captions apart from the images they belong to.

    Captions that VizWiz marks as rejected, or as one of its ready sentences on bad images, say nothing of the image.
    """
    marked = [any(annotation.get(mark) for mark in _NO_CAPTION) for annotation in annotations]
    if any(marked):
        notes.append(f"captions not used: {sum(marked):,} that are marked as {' or '.join(_NO_CAPTION)}")
        annotations = [each for each, left_out in zip(annotations, marked, strict=True) if not left_out]
    try:
        captions: dict[str, list[str]] = {str(image["id"]): [] for image in images}
        if len(captions) < len(images):
            twice = next(name for name, count in Counter(str(image["id"]) for image in images).items() if count > 1)
            raise UserError(f"{path}: two of its images have the id {twice}; give each its own")
        for annotation in annotations:
            image = str(annotation["image_id"])
            if image not in captions:
                raise UserError(
                    f"{path}: the caption {str(annotation.get('caption'))[:60]!r} is of image {image}, which is not "
                    "among its images; add the image or remove the caption"
                )
            captions[image].append(annotation["caption"])
        return [
            {
                "file_name": image["file_name"],
                "captions": captions[str(image["id"])],
                **{name: image[name] for name in ("split", "label") if name in image},
            }
            for image in images
        ]
    except KeyError as error:
        raise UserError(f"{path}: looks like COCO captions, but {error} is missing in some record") from None
