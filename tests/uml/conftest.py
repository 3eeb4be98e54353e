import pytest
from PIL import Image

from diptych.data.sources import open_source
from diptych.data.splits import Labelled


@pytest.fixture
def labelled_images(tmp_path) -> Labelled:
    """Two black images and two white ones, one of which cannot be read."""
    for name, grey in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (4, 4), (grey,) * 3).save(tmp_path / name / f"{number}.png")
    (tmp_path / "white" / "1.png").write_bytes(b"nothing")
    return Labelled.of(open_source(str(tmp_path)))
