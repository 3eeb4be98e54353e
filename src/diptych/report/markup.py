"""HTML in small pieces: escaped text, pictures as data URIs."""

import base64
import html
import io
import re

import numpy as np
from jaxtyping import UInt8
from PIL import Image

TINY = 128
"""Up to this many pixels a picture is stored without loss and shown with sharp pixels."""
MAX_SIDE = 512
"""Larger pictures are shrunk: a report is mailed around."""
LIGHT = "color: #1d2129; --rule: #dfe3e8"
DARK = "color: #e4e7ec; --rule: #323843"


def inline(text: str) -> str:
    """Escaped text, in which `backticks` set code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def paragraphs(text: str) -> str:
    """Empty lines part paragraphs."""
    return "".join(f"<p>{inline(part)}</p>" for part in re.split(r"\n\s*\n", text.strip()))


def picture_tag(picture: UInt8[np.ndarray, "H W 3"], *, alt: str) -> str:
    """An `<img>` with the picture in it, as wide as its place."""
    image = Image.fromarray(picture)
    size = "tiny" if max(image.size) <= TINY else "large"
    buffer = io.BytesIO()
    if size == "tiny":
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    source = data_uri("image/png" if size == "tiny" else "image/jpeg", buffer.getvalue())
    shape = f'width="{image.width}" height="{image.height}"'
    return f'<div class="picture {size}"><img src="{source}" {shape} alt="{html.escape(alt)}"></div>'


def image_tag(data: bytes, *, alt: str) -> str:
    """An `<img>` with a finished SVG or PNG in it. An image can run no script, whatever the SVG holds."""
    kind, data = ("image/svg+xml", dark_ready(data)) if data.lstrip()[:1] == b"<" else ("image/png", data)
    return f'<img src="{data_uri(kind, data)}" alt="{html.escape(alt)}">'


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def dark_ready(svg: bytes) -> bytes:
    """Give an SVG whose ink is `currentColor` and whose rules are `var(--rule)` both, for light and for dark pages."""
    style = f"<style>svg {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }}</style>"
    head, tag, rest = svg.partition(b"<svg")
    opening, end, body = rest.partition(b">")
    return head + tag + opening + end + style.encode() + body
