"""The same small set, with names and captions made up by hypothesis, written in every format and read back alike."""

import csv
import io
import json
import tarfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.data.sources import open_source
from diptych.data.sources.text import clean


@dataclass(frozen=True)
class Item:
    name: str
    captions: tuple[str, ...]
    label: str | None


NAMES = st.text(st.sampled_from("aB1 .,;|#'\"&%+-_()[]é猫\u0301"), min_size=1, max_size=8).map(
    lambda stem: unicodedata.normalize("NFC", "n" + stem + "z") + ".png"
)
WORDS = st.sampled_from(
    ["dog", "a", '5"', "it's", "“cat”", "x,y", "u;v", "p|q", "é", "猫", "\t", "\n", "\u2028", "\x85"]
)
CAPTIONS = st.lists(WORDS, min_size=1, max_size=5).map(lambda words: "one " + " ".join(words))
SETS = st.lists(
    st.builds(
        Item,
        name=NAMES,
        captions=st.lists(CAPTIONS, max_size=3).map(tuple),
        label=st.sampled_from([None, "cat", "dog, big"]),
    ),
    min_size=1,
    max_size=5,
    unique_by=(lambda item: item.name.casefold(), lambda item: item.name.partition(".")[0].casefold()),
).filter(lambda items: any(item.captions for item in items))


def png(i):
    file = io.BytesIO()
    Image.new("L", (4, 4), 40 * i).save(file, "PNG")
    return file.getvalue()


def images(items, place):
    for i, item in enumerate(items):
        (place / item.name).write_bytes(png(i))


def files_of(items, kind):
    """Names and contents of images and side-cars."""
    files = {}
    for i, item in enumerate(items):
        stem = item.name.removesuffix(".png")
        files[item.name] = png(i)
        if kind == "text" and item.captions:
            files[f"{stem}.txt"] = "\n".join(map(clean, item.captions)).encode()
        if kind == "json":
            files[f"{stem}.json"] = json.dumps({"captions": item.captions, "label": item.label}).encode()
        elif item.label is not None:
            files[f"{stem}.cls"] = item.label.encode()
    return files


def folder(items, place, kind):
    for name, data in files_of(items, kind).items():
        (place / name).write_bytes(data)
    return place


def tar(items, place, kind):
    with tarfile.open(place / "t.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files_of(items, kind).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return place / "t.tar"


def caption_rows(items):
    """A row for each caption, and one for an image that has none."""
    return [(item.name, text, item.label or "") for item in items for text in item.captions or ("",)]


def delimited(items, place, kind):
    suffix, delimiter, quoting, end, coding = {
        "csv": (".csv", ",", csv.QUOTE_MINIMAL, "\n", "utf-8"),
        "excel": (".csv", ";", csv.QUOTE_MINIMAL, "\r\n", "utf-8-sig"),
        "bars": (".csv", "|", csv.QUOTE_ALL, "\n", "utf-8"),
        "tsv": (".tsv", "\t", csv.QUOTE_MINIMAL, "\n", "utf-8"),
        "lists": (".csv", ",", csv.QUOTE_MINIMAL, "\n", "utf-8"),
        "python": (".csv", ",", csv.QUOTE_ALL, "\n", "utf-8"),
    }[kind]
    images(items, place)
    if kind in ("lists", "python"):
        written = json.dumps if kind == "lists" else repr
        rows = [(item.name, written(list(item.captions)), item.label or "") for item in items]
    else:
        rows = caption_rows(items)
    with open(place / f"t{suffix}", "w", newline="", encoding=coding) as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
        writer.writerows([("image", "caption", "label"), *rows])
    return place / f"t{suffix}"


def document(items, place, kind):
    images(items, place)
    rows = [{"file_name": item.name, "captions": list(item.captions), "label": item.label} for item in items]
    if kind == "jsonl":
        (place / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return place / "t.jsonl"
    if kind == "coco":
        found = {
            "images": [{"id": i, "file_name": item.name} for i, item in enumerate(items)],
            "annotations": [
                {"id": 9 * i + j, "image_id": i, "caption": text}
                for i, item in enumerate(items)
                for j, text in enumerate(item.captions)
            ],
        }
    elif kind == "keyed":
        found = {row["file_name"]: row for row in rows}
    else:
        found = rows
    (place / "t.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return place / "t.json"


def parquet(items, place, kind):
    images(items, place)
    cells = [{"bytes": png(i), "path": item.name} if kind == "bytes" else item.name for i, item in enumerate(items)]
    captions = pa.array([list(item.captions) or None for item in items], pa.list_(pa.string()))
    table = {"image": cells, "captions": captions, "label": pa.array([item.label for item in items], pa.string())}
    pq.write_table(pa.table(table), place / "t.parquet")
    return place / "t.parquet"


WRITERS = {
    "folder with texts": (folder, "text"),
    "folder with json": (folder, "json"),
    "tar with texts": (tar, "text"),
    "tar with json": (tar, "json"),
    **{kind: (delimited, kind) for kind in ("csv", "excel", "bars", "tsv", "lists", "python")},
    **{kind: (document, kind) for kind in ("json", "jsonl", "coco", "keyed")},
    "parquet with paths": (parquet, "paths"),
    "parquet with bytes": (parquet, "bytes"),
}


def check(items, kind):
    expected = {40 * i: ([clean(text) for text in item.captions], item.label) for i, item in enumerate(items)}
    with TemporaryDirectory() as place:
        write, form = WRITERS[kind]
        source = open_source(str(write(items, Path(place), form)))
        found = {}
        for i in range(len(source)):
            grey = int(source.image(i, 4)[0, 0, 0])
            assert grey not in found
            found[grey] = (source.captions(i), expected[grey][1] if kind == "coco" else source.label(i))
    assert found == expected


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=SETS)
@example(items=[Item("a.png", ('one "quote\nfive, two"',), None)])
@example(items=[Item("a.png", ("one\tdog\nfive\tsix",), "cat")])
def test_every_format_says_the_same(kind, items):
    check(items, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=500, deadline=None)
@given(items=SETS)
def test_every_format_says_the_same_at_length(kind, items):
    check(items, kind)
