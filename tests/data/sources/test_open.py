"""The one door: how a source is named, what is refused, and that it stays offline."""

import subprocess
import sys

import pytest
from PIL import Image

from diptych.data.scenes import ScenesSource
from diptych.data.sources import Source, find_files, open_source, require_pairs
from diptych.data.sources.decode import ImageLimits, UnreadableImage
from diptych.data.sources.open import Spec, expand_braces
from diptych.data.sources.text import TextSource
from diptych.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a{8..11}", ["a8", "a9", "a10", "a11"]),
        ("a{08..10}", ["a08", "a09", "a10"]),
        ("a{2..0}", ["a2", "a1", "a0"]),
        ("{x,y}-{0..1}", ["x-0", "x-1", "y-0", "y-1"]),
        ("a{}b{one}", ["a{}b{one}"]),
    ],
)
def test_braces_expand_as_in_the_shell(pattern, expected):
    assert expand_braces(pattern) == expected


def test_braces_are_bounded():
    with pytest.raises(UserError, match="more than a million"):
        expand_braces("{0..99999999999}")


@pytest.mark.parametrize(
    ("spec", "place", "options"),
    [
        ("a.tar?split=train&caption=a,b", "a.tar", {"split": "train", "caption": "a,b"}),
        ("a-?.tar", "a-?.tar", {}),
        ("a-?.tar?split=x", "a-?.tar", {"split": "x"}),
        ("hub:o/n:test?config", "hub:o/n:test", {"config": "config"}),
        ("hub:o/n?en&revision=v1", "hub:o/n", {"config": "en", "revision": "v1"}),
        ("hub:o/n?split=test", "hub:o/n", {"split": "test"}),
    ],
)
def test_specs(spec, place, options):
    parsed = Spec.parse(spec)
    assert (parsed.place, parsed.options) == (place, options)


def test_unknown_options_are_refused():
    with pytest.raises(UserError, match="no option 'spilt'; the options are split, image, caption, label"):
        open_source("a.tar?spilt=train")


def test_files_come_in_order_and_once(tmp_path):
    for name in ("b.txt", "a.txt", "c,d.txt", "[x].txt"):
        (tmp_path / name).write_text("text")

    def names(spec):
        return [path.name for path in find_files(spec)]

    assert names(f"{tmp_path}/*.txt") == ["[x].txt", "a.txt", "b.txt", "c,d.txt"]
    assert names(f"{tmp_path}/b.txt,{tmp_path}/?.txt") == ["b.txt", "a.txt"]
    assert names(f"{tmp_path}/c,d.txt") == ["c,d.txt"]
    assert names(f"{tmp_path}/[x].txt") == ["[x].txt"]
    assert names(f"{tmp_path}/{{b,a}}.txt") == ["b.txt", "a.txt"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "does not exist"),
        ("none.tar", "none.tar: does not exist"),
        ("none-*.tar", "matches no file"),
        ("a.txt,none.txt", "none.txt: does not exist"),
        ("s-{0..1}.tar", "s-0.tar: does not exist"),
        ("a.txt,b.csv", "files of different kinds"),
        ("a.doc", "not a kind of source; give a folder"),
        ("a.xlsx", "is not read; save the sheet as csv in UTF-8"),
        ("a.csv.zst", "is not read; unpack it, or pack it with gzip"),
        ("a.feather", "is not read; save the table as parquet"),
        ("a.png", "is one image; give its folder"),
        ("a.tar.gz", "gunzip it first"),
        ("a.txt?split=train", "a text file has no columns and no splits"),
        ("d,e", "2 folders; give the one folder"),
        ("hub:", "is written hub:owner/name"),
        ("hub:a/b/c", "is written hub:owner/name"),
    ],
)
def test_refusals_are_one_line(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.csv", "a.doc", "a.png", "a.tar.gz", "a.xlsx", "a.csv.zst", "a.feather"):
        (tmp_path / name).write_text("x")
    (tmp_path / "d").mkdir()
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


def test_a_text_file_has_no_splits(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="no split 'train'"):
        open_source(str(tmp_path / "a.txt"), split="train")


def test_the_option_in_the_spec_goes_before_the_argument(tmp_path):
    (tmp_path / "t.csv").write_text("text,split\na,train\nb,test\n")
    assert open_source(f"{tmp_path}/t.csv?split=test", split="train").captions(0) == ["b"]


def test_limits_reach_the_decoder(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert open_source(str(tmp_path)).image(0, 4).shape == (4, 4, 3)
    with pytest.raises(UnreadableImage, match="9 x 9"):
        open_source(str(tmp_path), limits=ImageLimits(max_pixels=80)).image(0, 4)


def test_every_kind_keeps_to_the_protocol(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image\na.png\n")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "t.txt").write_text("text")
    for name in ("", "t.csv", "texts/t.txt"):
        assert isinstance(open_source(str(tmp_path / name)), Source)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("scenes:?level=1", "scenes:?level=1&split=train"),
        ("scenes:", "scenes:?split=train"),
        ("scenes:?split=test", "scenes:?split=test"),
    ],
)
def test_the_built_in_world_is_told_the_split(monkeypatch, spec, expected):
    monkeypatch.setattr(ScenesSource, "from_spec", lambda spec: Told(spec))
    assert open_source(spec, split="train").name == expected


class Told(TextSource):
    def __init__(self, name):
        self.name = name


def test_the_built_in_world_keeps_to_the_protocol():
    assert all(hasattr(ScenesSource, name) for name in ("image", "captions", "key", "label", "__len__"))


def test_local_sources_load_neither_datasets_nor_torch_dataset_code(tmp_path):
    """Importing `datasets` takes seconds, which a folder or a text file need not cost."""
    (tmp_path / "t.csv").write_text("text\na cat\n")
    code = (
        "import sys; from diptych.data.sources import open_source; open_source(sys.argv[1]);"
        "assert not {'datasets', 'pandas', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.csv")], check=True)


def test_pairs_need_both_sides(tmp_path):
    (tmp_path / "a.txt").write_text("bread\n")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/a.png")
    require_pairs(ScenesSource(count=3), "scenes:")
    for name, lacks in (("a.txt", "images"), ("photos", "captions")):
        with pytest.raises(UserError, match=rf"^--it: pairs need images and captions, and it has no {lacks}$"):
            require_pairs(open_source(str(tmp_path / name)), "--it")
