"""Captions of a whole data set on disk: written as they are made, and whole under their name when all are there.

A killed command leaves `.NAME.partial` beside the file, and the same command continues from it.
"""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from PIL import Image

from diptych.data.sources.rows import LOCAL_FILES
from diptych.errors import UserError
from diptych.io import write_bytes

FORMATS = (".csv", ".jsonl", ".parquet", ".json", ".tar")
_WITH_IMAGES = (".images.parquet", ".tar")
"""Endings of the names of files that hold the images themselves."""
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
"""Suffixes of the image formats that are not named like their suffix."""
_IN_A_GROUP = 100
"""Number of images in a row group of parquet: what a reader holds at once."""
ImageFiles = Mapping[str, Callable[[], Path | bytes]]
"""The image files by the names of the images: their paths, or their bytes where they lie inside another file."""


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
    """A table of captions that is being written: csv, jsonl, parquet, COCO's json, or tasks of Label Studio.

    Also, with the images in it, parquet (`.images.parquet`) or a tar in the layout of img2dataset.
    """

    def __init__(self, out: Path, *, made_by: dict[str, Any], files: ImageFiles | None = None) -> None:
        """``made_by``: what decides the captions; a file that was begun otherwise is not continued.

        ``files`` are needed for images that are no files by their names.

        Raises UserError for an unknown format, for a file that exists, and for one that was begun otherwise.
        """
        check_format(out)
        self.out, self.where, self._partial = out, str(out), out.with_name(f".{out.name}.partial")
        self._files = files or {}
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

        ``confidence`` maps a score to its confidence.
        """
        rows = [self.made[name] for name in dict.fromkeys(order) if name in self.made]
        if confidence is not None:
            rows = [replace(row, confidence=None if row.score is None else confidence(row.score)) for row in rows]
        fresh = self.out.with_name(f".{self.out.name}.fresh")  # one a kill left is written anew
        with open(fresh, "wb") as file:
            _form(self.out)(rows, self.out, file, self._image_file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.out)
        self._partial.unlink()

    def _image_file(self, name: str) -> Path | bytes | None:
        if name in self._files:
            return self._files[name]()
        return Path(name) if Path(name).is_file() else None


def check_format(out: Path) -> None:
    """Raise UserError for a file whose name does not say its format, and for one that exists."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{out}: give a name that ends in {', '.join(FORMATS)}, or sidecars")
    if out.exists():
        raise UserError(f"{out}: exists already; remove it, or give another --out")


_FindImage = Callable[[str], Path | bytes | None]
"""The file of an image, by its name; None for one that is computed."""
_Form = Callable[[Sequence[MadeCaption], Path, IO[bytes], _FindImage], None]
"""Writes rows into an open file, which will lie at the path."""


def _form(out: Path) -> _Form:
    return next(form for suffix, form in _FORMS.items() if out.name.lower().endswith(suffix))


def name_of_shard(out: Path, number: int, count: int) -> Path:
    """`captions-00000-of-00004.csv`, one of several files that a glob makes one source."""
    end = next((suffix for suffix in _FORMS if out.name.lower().endswith(suffix)), "")
    stem, suffix = (out.name[: -len(end)], out.name[-len(end) :]) if end else (out.name, "")
    return out.with_name(f"{stem}-{number:05d}-of-{count:05d}{suffix}")


def holds_images(out: Path) -> bool:
    """Whether a file of this name holds the images themselves."""
    return out.name.lower().endswith(_WITH_IMAGES)


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
        """Does nothing, because every text was written whole."""


def path_in_table(file: str, out: Path) -> str:
    """How the table names an image file: relative to the table, as sources read it."""
    return os.path.relpath(file, out.parent) if os.path.isfile(file) else file


def _csv(rows: Sequence[MadeCaption], out: Path, file: IO[bytes], _: object) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(_record(rows[0], out)) if rows else _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in (_record(row, out) for row in rows):
        lists = {"candidates": json.dumps(record["candidates"], ensure_ascii=False)} if "candidates" in record else {}
        writer.writerow(record | lists)
    file.write(text.getvalue().encode())


_COLUMNS = ["file_name", "caption", "score"]


def _record(row: MadeCaption, out: Path) -> dict[str, Any]:
    """A row of a table. Either all rows of a file have a confidence, or none has. The same holds for candidates."""
    record = dict(zip(_COLUMNS, (path_in_table(row.file, out), row.caption, row.score), strict=True))
    record |= {"confidence": row.confidence} if row.confidence is not None else {}
    return record | ({"candidates": row.candidates} if row.candidates else {})


def _jsonl(rows: Sequence[MadeCaption], out: Path, file: IO[bytes], _: object) -> None:
    file.write("".join(json.dumps(_record(row, out), ensure_ascii=False) + "\n" for row in rows).encode())


def _parquet(rows: Sequence[MadeCaption], out: Path, file: IO[bytes], _: object) -> None:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.string()
    number = pyarrow.float32()
    types = {"file_name": text, "caption": text, "score": number, "confidence": number}
    types["candidates"] = pyarrow.list_(text)
    records = [_record(row, out) for row in rows]
    names = list(records[0]) if records else _COLUMNS
    table = {name: pyarrow.array([record[name] for record in records], types[name]) for name in names}
    pyarrow.parquet.write_table(pyarrow.table(table), file)


def _content(found: Path | bytes | None) -> bytes:
    """The bytes of an image file. Raises UserError for one that has gone."""
    assert found is not None
    try:
        return found if isinstance(found, bytes) else found.read_bytes()
    except OSError as error:
        raise UserError(f"{found!s}: can no longer be read ({error.strerror}); put it back and repeat") from None


def _image_parquet(rows: Sequence[MadeCaption], out: Path, file: IO[bytes], find: _FindImage) -> None:
    """Columns `image` and `text`, of the types that `datasets` writes, so that it decodes the images."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    number = datasets.Value("float32")
    types = {"image": datasets.Image(), "text": datasets.Value("string"), "score": number}
    if rows and rows[0].confidence is not None:
        types["confidence"] = number
    if rows and rows[0].candidates:
        types["candidates"] = datasets.List(datasets.Value("string"))
    schema = datasets.Features(types).arrow_schema
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), _IN_A_GROUP):
            records = []
            for row in rows[start : start + _IN_A_GROUP]:
                record = _record(row, out)
                part = {"bytes": _content(find(row.file)), "path": record.pop("file_name")}
                records.append({"image": part, "text": record.pop("caption"), **record})
            writer.write_table(pyarrow.Table.from_pylist(records, schema=schema))


def _tar(rows: Sequence[MadeCaption], out: Path, file: IO[bytes], find: _FindImage) -> None:
    """A WebDataset in img2dataset's layout: nine digits and the suffix of the image, .txt, and .json with the rest."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, row in enumerate(rows):
            data = _content(find(row.file))
            with Image.open(io.BytesIO(data)) as opened:
                kind, (width, height) = opened.format or "", opened.size
            key = f"{number:09d}"
            about = {"key": key, **_record(row, out), "width": width, "height": height, "status": "success"}
            suffix = _SUFFIXES.get(kind, kind.lower())
            for end, content in (
                (suffix, data),
                ("txt", row.caption.encode()),
                ("json", json.dumps(about, ensure_ascii=False).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _coco(rows: Sequence[MadeCaption], out: Path, file: IO[bytes], find: _FindImage) -> None:
    """Captions as COCO has them, with the sides of the images.

    FiftyOne reads boxes of COCO alone, and what stands beside them, so each caption has a box around the whole image.
    Its `score` is the confidence, as readers of COCO take it for a probability.
    """
    images, annotations = [], []
    for number, row in enumerate(rows, start=1):
        record = _record(row, out)
        about = {"id": number, "file_name": record.pop("file_name")}
        record["log_probability"] = record.pop("score")
        if "confidence" in record:
            record["score"] = record.pop("confidence")
        if (found := find(row.file)) is not None:
            with Image.open(io.BytesIO(found) if isinstance(found, bytes) else found) as opened:
                width, height = opened.size
            about |= {"width": width, "height": height}
            record |= {"category_id": 1, "bbox": [0, 0, width, height], "area": width * height, "iscrowd": 0}
        images.append(about)
        annotations.append({"id": number, "image_id": number, **record})
    info = {"description": "captions by diptych"}
    whole = {"info": info, "licenses": [], "images": images, "annotations": annotations}
    whole["categories"] = [{"id": 1, "name": "image"}]
    file.write(json.dumps(whole, ensure_ascii=False).encode())


def _tasks(rows: Sequence[MadeCaption], out: Path, file: IO[bytes], _: object) -> None:
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
    file.write(json.dumps(tasks, ensure_ascii=False).encode())


_FORMS: dict[str, _Form] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".images.parquet": _image_parquet,
    ".parquet": _parquet,
    ".tasks.json": _tasks,
    ".json": _coco,
    ".tar": _tar,
}
