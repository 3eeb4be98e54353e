"""Text files: encodings, empty lines, hostile characters."""

import gzip
import re

import pytest

from diptych.data.sources import open_source
from diptych.data.sources.text import TextSource, clean, notes_on_texts, read_text
from diptych.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a \t cat\u00a0sat \n", "a cat sat"),
        ("nul\0and\x07bell\x85", "nul and bell"),
        ("half \ud83d of a pair", "half \ufffd of a pair"),
        ("ein Mädchen, 猫, 🐈", "ein Mädchen, 猫, 🐈"),
        ("\u2028 \0", ""),
        (r"caf\u00e9 \ud83d\udc08 \U0001F408", "café 🐈 🐈"),
        ("a &quot;cat&quot; &amp;amp; R&D; &#39;dog&#39; &nbsp;", "a \"cat\" & R&D; 'dog'"),
        (r"half \ud83d of a pair", "half \ufffd of a pair"),
        (r"a dog\nruns\tto \"me\"", 'a dog runs to "me"'),
        (r"C:\new\table, \alpha and \nabla", r"C:\new\table, \alpha and \nabla"),
        ("<p>a <b>big</b> dog<br/>and &lt;i&gt;one&lt;/i&gt; cat</p>", "a big dog and one cat"),
        ("<person> and 1 < 2 > 0 <unk>", "<person> and 1 < 2 > 0 <unk>"),
        ("a\u200bb\ufeff \u2060", "ab"),
        (r"C:\users \\u00e9 \Uffffffff", r"C:\users \\u00e9 \Uffffffff"),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected
    clean(text).encode()


def test_one_text_per_line_empty_ones_left_out(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \r\ntwo  words\r\nthr\xc3\xa9e")
    source = TextSource([path], name="t")
    assert [source.captions(i) for i in range(len(source))] == [["one"], ["two words"], ["thr\u00e9e"]]
    assert [source.key(i) for i in range(3)] == ["t.txt:1", "t.txt:4", "t.txt:5"]
    assert source.captions(-1) == ["thr\u00e9e"]
    with pytest.raises(IndexError):
        source.captions(3)


def test_gz_and_several_files(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"b\n\nc\n", mtime=0))
    source = TextSource([tmp_path / "a.txt", tmp_path / "b.txt.gz"], name="both")
    assert [source.captions(i)[0] for i in range(len(source))] == ["a", "b", "c"]
    assert source.key(2) == "b.txt.gz:3"


def test_long_captions_are_kept(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("word " * 2000)
    assert len(TextSource([path], name="t").captions(0)[0]) == 9999


def test_wrong_encoding_names_line_and_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.txt: line 2, byte 8 \(0xe9\) is not UTF-8; .*iconv -f WINDOWS-1252"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbffine\ncaf\xe9\n")
    with pytest.raises(UserError, match="line 2, byte 11 "):
        read_text(path)


@pytest.mark.parametrize(
    ("text", "encoding", "advice"),
    [
        ("A café.", "cp1252", "e.g. iconv -f WINDOWS-1252 -t"),
        ("“Déjà vu”", "cp1252", "e.g. iconv -f WINDOWS-1252 -t"),
        ("赤い車が走る", "shift_jis", "such as SHIFT_JIS, GB18030 or WINDOWS-1251: iconv -f ENCODING -t"),
        ("一只白猫在跑", "gb18030", "such as SHIFT_JIS, GB18030 or WINDOWS-1251: iconv -f ENCODING -t"),
        ("собака", "cp1251", "such as SHIFT_JIS, GB18030 or WINDOWS-1251: iconv -f ENCODING -t"),
    ],
)
def test_the_command_that_converts_a_file_can_read_it(tmp_path, text, encoding, advice):
    """iconv refuses or mangles a file in another script that it is told is in Windows-1252."""
    (tmp_path / "t.txt").write_bytes(b"a dog runs\n" + text.encode(encoding) + b"\n")
    with pytest.raises(UserError, match=re.escape(advice)):
        read_text(tmp_path / "t.txt")


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_recognised(tmp_path, coding):
    path = tmp_path / "t.txt"
    path.write_bytes("a little cat\n".encode(coding))
    with pytest.raises(UserError, match="UTF-16"):
        read_text(path)


@pytest.mark.parametrize(
    "damage", [b"no gzip", gzip.compress(b"text " * 99, mtime=0)[:-12], gzip.compress(b"x" * 9, mtime=0)[:-4] + b"abcd"]
)
def test_damaged_gz(tmp_path, damage):
    path = tmp_path / "t.txt.gz"
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"t\.txt\.gz: is not a complete gzip file"):
        read_text(path)


def test_a_file_without_texts(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n \n")
    with pytest.raises(UserError, match="holds no text"):
        TextSource([path], name="t.txt")
    with pytest.raises(UserError, match="does not exist"):
        read_text(tmp_path / "none.txt")


def test_has_no_images(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a")
    source = TextSource([path], name="t.txt")
    assert source.label(0) is None
    with pytest.raises(UserError, match="not images"):
        source.image(0, 8)


@pytest.mark.parametrize(
    "line", ["a.jpg,A dog runs.", "1000_a.jpg#0\tA child .", "x/b.PNG| 0| two birds", "'c.jpeg';a cat"]
)
def test_tables_of_images_are_no_texts(tmp_path, line):
    (tmp_path / "captions.txt").write_text(f"image,caption\n{line}\n{line}\n")
    with pytest.raises(UserError, match=r"captions\.txt: is a table of images .* rename it to \.[ct]sv"):
        open_source(str(tmp_path / "captions.txt"))
    (tmp_path / "texts.txt").write_text("see a.jpg, it shows a dog\nanother text\n")
    assert len(open_source(str(tmp_path / "texts.txt"))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a dog"}\n{"text": "a cat"}\n', "holds JSON .* let its name end in .jsonl"),
        ('["a dog", "a cat"]', "holds JSON"),
        ("dog\ta dog runs\ncat\ta cat sits\n", "is a table with tabs .* rename it to .tsv"),
        ("image,caption\na.jpg,a dog\nb.jpg,a cat\n", "rename it to .csv$"),
        ("a.jpg,a dog\nb.jpg,a cat\n", "rename it to .csv, with the first line 'image,caption'$"),
        ("a.jpg 0\nb.jpg 1\n", "save it as .csv, with commas between its columns"),
        ('[\n "a dog",\n "a cat"\n]\n', "holds JSON, a document of 5 lines; let its name end in .json"),
        (
            "<a>\n<text>a dog</text>\n<text>a cat</text>\n<text>b</text>\n</a>\n",
            r"holds XML \('<text>a cat</text>'\); write",
        ),
    ],
)
def test_other_tables_are_no_texts(tmp_path, content, message):
    (tmp_path / "t.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        TextSource([tmp_path / "t.txt"], name="t")


def test_what_may_be_no_text_is_named(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("caption\nnan\na dog\n-\n")
    source = TextSource([path], name="t")
    assert [source.captions(i) for i in range(len(source))] == [["caption"], ["a dog"]]
    assert source.notes == [
        f"the first line of {path} is the text 'caption'; remove it if it names a column",
        "2 texts such as nan or null taken for missing",
    ]
    path.write_text("1. a dog\n2. a cat\n")
    assert TextSource([path], name="t").notes == ["the numbers in front of the texts, such as 1, are parts of them"]
    path.write_text("a dog,0.5\na cat,1\na bird,.7\n")
    assert TextSource([path], name="t").notes == ["the numbers behind the texts, such as 0.5, are parts of them"]


@pytest.mark.parametrize(
    ("texts", "notes"),
    [
        (
            ["the caf\u00c3\u00a9", "a dog"],
            ["1 of 2 texts that were looked at hold '\u00c3\u00a9', as of a wrong encoding"],
        ),
        (
            ["isn\u00e2\u20ac\u2122t", "a \ufffd"],
            ["2 of 2 texts that were looked at hold '\u00e2\u20ac\u2122', as of a wrong encoding"],
        ),
        (["<start> a dog", "<start> a cat"], ["'<start>', which begins every text, is a part of it"]),
        (["startseq a dog", "startseq two"], ["'startseq', which begins every text, is a part of it"]),
        (["a dog <end>", "a cat <end>"], ["'<end>', which ends every text, is a part of it"]),
        (["sks dog, red", "sks dog, blue"], ["'sks dog,', which begins every text, is a part of it"]),
        (['"a dog"', '"a ""big"" cat"'], ["the quotes around every text are parts of it"]),
        (
            ["'a dog',", "'a cat',"],
            ["',', which ends every text, is a part of it", "the quotes around every text are parts of it"],
        ),
        (["0 dogs run", "1 dog runs", "0 cats"], ["the numbers in front of the texts, such as 0, are parts of them"]),
        (["val_001 dogs", "val_002 cats"], ["the numbers in front of the texts, such as val_001, are parts of them"]),
        (["an image"] * 8, ["all 8 texts that were looked at are 'an image'"]),
        (["an image"] * 7, []),
        (["1girl, solo", "1girl, red"], ["'1girl,', which begins every text, is a part of it"]),
        (["2 dogs run.", "2 cats run."], []),
        (
            ["A dog in the pa...", "A cat", "A cow"],
            ["1 of 3 texts that were looked at end in dots, as 'A dog in the pa...'"],
        ),
        (
            ["I'm sorry, I can't", "a cat"],
            ["1 of 2 texts that were looked at may be messages, as \"I'm sorry, I can't\""],
        ),
        (["Error code: 429", "a cat"], ["1 of 2 texts that were looked at may be messages, as 'Error code: 429'"]),
        (['{"title": "a"}', "a cat"], ["markup is kept in 1 of 2 texts that were looked at, as '{\"title\":'"]),
        (
            ["2024-01-01 a dog", "2024-01-01 a cat"],
            ["the numbers in front of the texts, such as 2024, are parts of them"],
        ),
        (["a dog 1", "a dog 2"], []),
        (
            ["A+dog+in%20the+park%21", "a cat"],
            ["1 of 2 texts that were looked at are written as in addresses: 'A+dog+in%20the+park%21'"],
        ),
        (["black+white", "50% off", "C++ on a mug", "\u4e00\u53ea\u72d7\u3002", "\u4e24\u53ea\u3002"], []),
        (["a **big** dog", "a cat"], ["markup is kept in 1 of 2 texts that were looked at, as '**big**'"]),
        (["a dog <lora:x:0.8>", "a cat"], ["markup is kept in 1 of 2 texts that were looked at, as '<lora:x:0.8>'"]),
        (["pie/1", "ribs/2"], ["each text is one word, as of a list of names: 'pie/1'"]),
        (["pie", "ribs"], []),
        (["T-shirt in red", "T-shirt in blue"], []),
        (["a dog, red", "a dog, red"], []),
        (["a dog", "a cat", "it's \u00c3 la carte, na\u00efve"], []),
    ],
)
def test_mangled_letters_and_marks_are_named(texts, notes):
    assert notes_on_texts(texts) == notes


def test_lines_without_letters_are_named(tmp_path):
    (tmp_path / "t.txt").write_text("1\n00:00:01,000 --> 00:00:02,000\na dog\n\n2\n犬\n")
    (note,) = TextSource([tmp_path / "t.txt"], name="t").notes
    assert note == "texts without a letter: 3 of 5 that were looked at, as '1'"


def test_marks_between_texts_are_named(tmp_path):
    (tmp_path / "t.txt").write_text("a dog ||| ein Hund\na cat ||| eine Katze\n")
    assert TextSource([tmp_path / "t.txt"], name="t").notes == [
        f"'|' parts no texts: a line of {tmp_path}/t.txt is one text"
    ]


def test_colours_of_the_terminal_are_left_out():
    assert clean("\x1b[31ma dog\x1b[0m") == "a dog"


def test_lines_of_paragraphs_are_named(tmp_path):
    (tmp_path / "t.txt").write_text("It was the best of times, the\nage of wisdom.\n\nThere was a king\nwith a jaw.\n")
    (note,) = TextSource([tmp_path / "t.txt"], name="t").notes
    assert note == f"lines of {tmp_path}/t.txt seem to go on in the next ones, but each is a text of its own"
    (tmp_path / "t.txt").write_text("A dog runs.\nA cat sits\n\nTwo birds fly\nA cow.\n")
    assert TextSource([tmp_path / "t.txt"], name="t").notes == []


def test_remarks_in_a_file_are_named(tmp_path):
    (tmp_path / "t.txt").write_text("# of 2024\na dog\na cat\n#2 of all\na bird\n")
    (note,) = TextSource([tmp_path / "t.txt"], name="t").notes
    assert note.startswith(f"lines of {tmp_path}/t.txt that begin with # are texts: 2 such as '# of 2024'; remove")


def test_the_marks_of_flickr30k_entities_are_left_out():
    marked = "[/EN#1/people Two men] near [/EN#2/bodyparts/other their heads] ."
    assert clean(marked) == "Two men near their heads ."
