"""Captions of a whole data set on disk: written as they are made, and whole under their name when all are there.

A killed command leaves `.NAME.partial` beside the file, from which its repetition goes on.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diptych.data.sources.rows import LOCAL_FILES
from diptych.errors import UserError
from diptych.io import write_bytes

FORMATS = (".csv", ".jsonl", ".parquet", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeCaption:
    """A caption that a run made of an image."""

    file: str
    """The image: its path, or its key in the source."""
    caption: str
    score: float | None
    """Length-normalized log-probability; None with one beam."""
    candidates: list[str] = field(default_factory=list)
    """This caption and others, the best first, where several were asked for."""
    confidence: float | None = None
    """Its expected quality, from 0 to 1, where the scores of the run are calibrated."""


class CaptionFile:
    """A table of captions that is in the making: csv, jsonl, parquet, COCO's json, or tasks of Label Studio."""

    def __init__(self, out: Path, *, made_by: dict[str, Any]) -> None:
        """``made_by``: what decides the captions; a file that was begun otherwise is not continued.

        Raises UserError for an unknown format, for a file that exists, and for one that was begun otherwise.
        """
        check_format(out)
        self.out, self.where, self._partial = out, str(out), out.with_name(f".{out.name}.partial")
        out.parent.mkdir(parents=True, exist_ok=True)
        self.made: dict[str, MadeCaption] = {}
        head = json.dumps({"made_by": made_by}) + "\n"
        # A line that a kill cut short is made again.
        lines = self._partial.read_text().splitlines(keepends=True) if self._partial.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole and whole[0] != head:
            raise UserError(
                f"{self._partial}: begun by another run or with other settings; remove it, or give another --out"
            )
        for line in whole[1:]:
            made = MadeCaption(**json.loads(line))
            self.made[made.file] = made
        write_bytes(self._partial, "".join(whole or [head]).encode())

    def add(self, made: Sequence[MadeCaption]) -> None:
        """Keep captions, so that a kill at any later moment does not lose them."""
        with open(self._partial, "a") as file:
            for each in made:
                self.made[each.file] = each
                file.write(json.dumps(asdict(each)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, order: Sequence[str], *, confidence: Callable[[float], float] | None = None) -> None:
        """Write the file, its rows in the given order of images, and remove what it was made from.

        ``confidence`` is that of a score.
        """
        rows = [self.made[name] for name in dict.fromkeys(order) if name in self.made]
        if confidence is not None:
            rows = [replace(row, confidence=None if row.score is None else confidence(row.score)) for row in rows]
        write_bytes(self.out, _form(self.out)(rows, self.out))
        self._partial.unlink()


def check_format(out: Path) -> None:
    """Raise UserError for a file whose name does not say its format, and for one that exists."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{out}: give a name that ends in {', '.join(FORMATS)}, or sidecars")
    if out.exists():
        raise UserError(f"{out}: exists already; remove it, or give another --out")


def _form(out: Path) -> Callable[[Sequence[MadeCaption], Path], bytes]:
    return _tasks if out.name.lower().endswith(".tasks.json") else _FORMS[out.suffix.lower()]


class Sidecars:
    """Captions as texts beside their images, in place of a :class:`CaptionFile`."""

    where = "texts beside them"

    def __init__(self, images: Sequence[str]) -> None:
        """Raises UserError for an image that is no file."""
        self.made: dict[str, MadeCaption] = {}  # those of an earlier command are captions of the source by now
        inside = next((name for name in images if not Path(name).is_file()), None)
        if inside is not None:
            raise UserError(f"--out sidecars: {inside} is no file, so no text can lie beside it; give a file")

    def add(self, made: Sequence[MadeCaption]) -> None:
        """Write each as `name.txt`. A text that is there is left as it is."""
        for each in made:
            text = Path(each.file).with_suffix(".txt")
            if not text.exists():
                write_bytes(text, (each.caption + "\n").encode())

    def finish(self, order: Sequence[str], *, confidence: Callable[[float], float] | None = None) -> None:
        """Nothing: every text was whole when it was written."""


def path_in_table(file: str, out: Path) -> str:
    """How the table names an image file: relative to the table, as sources read it."""
    return os.path.relpath(file, out.parent) if os.path.isfile(file) else file


def _csv(rows: Sequence[MadeCaption], out: Path) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(_record(rows[0], out)) if rows else _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in (_record(row, out) for row in rows):
        lists = {"candidates": json.dumps(record["candidates"], ensure_ascii=False)} if "candidates" in record else {}
        writer.writerow(record | lists)
    return text.getvalue().encode()


_COLUMNS = ["file_name", "caption", "score"]


def _record(row: MadeCaption, out: Path) -> dict[str, Any]:
    """A row of a table. All rows of a file have a confidence, or none has; so it is with candidates."""
    record = dict(zip(_COLUMNS, (path_in_table(row.file, out), row.caption, row.score), strict=True))
    record |= {"confidence": row.confidence} if row.confidence is not None else {}
    return record | ({"candidates": row.candidates} if row.candidates else {})


def _jsonl(rows: Sequence[MadeCaption], out: Path) -> bytes:
    return "".join(json.dumps(_record(row, out), ensure_ascii=False) + "\n" for row in rows).encode()


def _parquet(rows: Sequence[MadeCaption], out: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.string()
    number = pyarrow.float32()
    types = {"file_name": text, "caption": text, "score": number, "confidence": number}
    types["candidates"] = pyarrow.list_(text)
    records = [_record(row, out) for row in rows]
    names = list(records[0]) if records else _COLUMNS
    table = {name: pyarrow.array([record[name] for record in records], types[name]) for name in names}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    return file.getvalue()


def _coco(rows: Sequence[MadeCaption], out: Path) -> bytes:
    images, annotations = [], []
    for number, row in enumerate(rows, start=1):
        record = _record(row, out)
        images.append({"id": number, "file_name": record.pop("file_name")})
        annotations.append({"id": number, "image_id": number, **record})
    return json.dumps({"images": images, "annotations": annotations}, ensure_ascii=False).encode()


def _tasks(rows: Sequence[MadeCaption], out: Path) -> bytes:
    """Tasks of Label Studio with predictions, for a labelling interface with `<Image name="image">` and
    `<TextArea name="caption" toName="image">`."""
    tasks = []
    for row in rows:
        part = {"from_name": "caption", "to_name": "image", "type": "textarea", "value": {"text": [row.caption]}}
        prediction: dict[str, Any] = {"model_version": "diptych", "result": [part]}
        if row.confidence is not None:  # by which Label Studio can order the tasks
            prediction["score"] = row.confidence
        predictions = [prediction]
        tasks.append({"data": {"image": LOCAL_FILES + path_in_table(row.file, out)}, "predictions": predictions})
    return json.dumps(tasks, ensure_ascii=False).encode()


_FORMS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet, ".json": _coco}
