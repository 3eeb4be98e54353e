import json
import shutil
import tarfile

import pytest
from PIL import Image

from diptych.data.scenes.source import ScenesSource
from diptych.data.sources import content, open_source
from diptych.data.sources.content import content_digest


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / f"{number}.bmp")
        (root / f"{number}.txt").write_text(f"image {number}")
    return root


def as_table(folder):
    rows = [{"file_name": f"photos/{n}.bmp", "caption": (folder / f"{n}.txt").read_text()} for n in range(3)]
    table = folder.parent / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def as_tar(folder):
    with tarfile.open(folder.parent / "photos.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return folder.parent / "photos.tar"


def as_texts(folder):
    texts = folder.parent / "texts.txt"
    texts.write_text("\n".join((folder / f"{n}.txt").read_text() for n in range(3)))
    return texts


@pytest.mark.parametrize("kind", [lambda folder: folder, as_table, as_tar, as_texts])
@pytest.mark.parametrize("whole", [2**20, 0])
def test_an_edit_is_noticed_and_a_copy_is_not(folder, tmp_path, monkeypatch, kind, whole):
    monkeypatch.setattr(content, "_WHOLE", whole)
    before = content_digest(open_source(str(kind(folder))))
    assert before == content_digest(open_source(str(kind(folder))))
    elsewhere = tmp_path / "elsewhere" / "photos"
    shutil.copytree(folder, elsewhere)
    if kind is not as_tar:  # a tar holds dates
        assert before == content_digest(open_source(str(kind(elsewhere))))
    (folder / "1.txt").write_text("image 7")
    assert before != content_digest(open_source(str(kind(folder))))
    (folder / "1.txt").write_text("image 1")
    if kind is as_texts:
        return
    Image.new("RGB", (4, 4), (0, 9, 0)).save(folder / "1.bmp")  # of the same size in bytes
    noticed = before != content_digest(open_source(str(kind(folder))))
    assert noticed == (whole > 0 or kind is as_tar)
    Image.new("RGB", (4, 5), (0, 9, 0)).save(folder / "1.bmp")
    assert before != content_digest(open_source(str(kind(folder))))


def test_sources_that_cannot_be_edited():
    assert content_digest(ScenesSource(count=5)) == ""
