"""What the page answers, as HTML: all text in it is escaped, and images are data URIs."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape

import numpy as np

from diptych.app.runs import read_images
from diptych.errors import UserError
from diptych.itit.pipeline import Caption, Diptych
from diptych.report.html import image_tag, inline


def note(text: str) -> str:
    """A line to the user."""
    return f'<p class="note">{inline(text)}</p>'


def captions(diptych: Diptych, requests: Sequence[tuple[Sequence[str] | None, int]]) -> list[str]:
    """An answer to each request, files and a number of beams. All images with as many beams are captioned together.

    A request whose images cannot be read is told so, and costs no other request.
    """
    answers = [""] * len(requests)
    images: dict[int, list[np.ndarray]] = defaultdict(list)
    places: dict[int, list[int]] = defaultdict(list)
    for number, (files, beams) in enumerate(requests):
        try:
            read = read_images(files, diptych.tokenizer.image_size)
        except UserError as error:
            answers[number] = note(str(error))
            continue
        images[beams] += read
        places[beams] += [number] * len(read)
    for beams, pixels in images.items():
        for number, image, found in zip(places[beams], pixels, diptych.candidates(pixels, beams=beams), strict=True):
            answers[number] += _captioned(image_tag(image, alt=found[0].text if found else ""), found)
    return answers


def _captioned(image: str, found: Sequence[Caption]) -> str:
    """A card: an image beside the captions found for it, the best one large."""
    if not found:
        return f'<article class="found">{image}<div><p class="best">No caption was found.</p></div></article>'
    best, *others = (f'<span>{escape(each.text)}</span><span class="score">{each.score:.2f}</span>' for each in found)
    rows = "".join(f"<li>{other}</li>" for other in others)
    return f'<article class="found">{image}<div><p class="best">{best}</p><ol>{rows}</ol></div></article>'
