"""Places in the code that the documents name are there, and so are the files that they link to."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"`((?:[a-z_]+/)*[a-z_]+\.py)(?::([A-Za-z_.]+))?`")
LINK = re.compile(r"\]\(((?!https?:|#|mailto:)[^)#]+)")


EXAMPLES = ("file.py", "utils.py")  # of a way to write, and of what is not wanted


def files_named(path: str) -> list[Path]:
    """The name alone is enough where it is the only one."""
    whole = [base / path for base in (ROOT / "src/diptych", ROOT) if (base / path).is_file()]
    return whole or list((ROOT / "src").rglob(path))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_places_in_the_code_are_there(document):
    missing = []
    for path, name in PLACE.findall(document.read_text()):
        if path in EXAMPLES:
            continue
        files = files_named(path)
        words = name.split(".") if name else []
        if len(files) != 1 or any(not re.search(rf"\b{word}\b", files[0].read_text()) for word in words):
            missing.append(f"{path}:{name}" if name else path)
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    links = LINK.findall(document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_what_the_tour_quotes_is_in_the_code():
    code = "\n".join(_squeezed(file.read_text()) for file in (ROOT / "src").rglob("*.py"))
    quoted = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tour.md").read_text(), re.DOTALL)
    lines = [_squeezed(line) for block in quoted for line in block.splitlines()]
    assert len(lines) > 20
    assert [line for line in lines if line not in code] == []


def _squeezed(text: str) -> str:
    return " ".join(text.split())
