"""Decoding an image file, or its bytes, to a square of RGB pixels.

Images are not trusted: the size in the header is checked before a pixel is decoded, only formats whose decoders are
part of Pillow itself are tried (EPS would start Ghostscript), and every fault becomes `UnreadableImage`.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import (  # the imports register what `Image.OPEN` finds
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from diptych.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".avif", ".heic", ".heif"}
)
"""Suffixes of the files that are taken for images. HEIC is among them so that it is reported, not overlooked."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(UserError):  # noqa: N818 (named after what it is about)
    """An image that cannot be used; the message names it and the reason in one line."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ImageLimits:
    """Limits on what the header of an image says, checked before it is decoded."""

    max_pixels: int = 100_000_000
    """Largest width x height in pixels. Decoding takes about 4 bytes a pixel in every thread that decodes."""


def decode(
    data: bytes | Path, size: int, *, name: str | None = None, limits: ImageLimits | None = None
) -> UInt8[np.ndarray, "size size 3"]:
    """The centre square of an image, resized to ``size`` x ``size`` RGB pixels.

    The image is turned as its EXIF orientation says; of an animation the first frame is used; transparency lies over
    white; the square is resized with an antialiased bicubic filter. ``name`` is what messages call the image, by
    default its path. Raises UnreadableImage, whose message names the image and the reason.
    """
    shown = repr(str(name or (data if isinstance(data, Path) else "image")))[1:-1]
    limits = limits or ImageLimits()
    try:
        with _stream(data) as stream:
            return _decode(stream, size, limits)
    except UnreadableImage as error:
        raise UnreadableImage(f"{shown}: {error}") from None
    # Pillow's decoders raise nearly every type of exception on bytes that were cut or made up.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{shown}: cannot be decoded ({reason}); replace or remove it") from None


@contextmanager
def _stream(data: bytes | Path) -> Iterator[io.BytesIO | io.BufferedReader]:
    if isinstance(data, bytes):
        if not data:
            raise UnreadableImage("is empty (0 bytes); replace or remove it")
        yield io.BytesIO(data)
        return
    try:
        status = os.stat(data)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("is not a file")
        if not status.st_size:
            raise UnreadableImage("is empty (0 bytes); replace or remove it")
        with open(data, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UnreadableImage("does not exist") from None
    except PermissionError:
        raise UnreadableImage("may not be read; check its permissions") from None


def _decode(stream: io.BytesIO | io.BufferedReader, size: int, limits: ImageLimits) -> np.ndarray:
    image = _open(stream)
    width, height = image.size
    if width * height > limits.max_pixels:
        raise UnreadableImage(
            f"is {width} x {height} pixels, over the limit of {limits.max_pixels:,} pixels; shrink it or remove it"
        )
    # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the cost; at least twice the size is kept for the filter.
    image.draft(None, (2 * size, 2 * size))
    turn = _TURNS.get(_orientation(image))
    image = _to_rgb(_centre_square(image))
    if turn is not None:
        image = image.transpose(turn)
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.uint8)


def _open(stream: io.BytesIO | io.BufferedReader) -> Image.Image:
    """`Image.open` without its own size check, which would warn or raise before the size can be named."""
    prefix = stream.read(16)
    for name in FORMATS:
        # A build of Pillow may lack a decoder; `accept` answers with a sentence (a str) then.
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or accept is None or accept(prefix) is not True:
            continue
        stream.seek(0)
        return factory(stream, "")
    if prefix[4:8] == b"ftyp":
        raise UnreadableImage("is HEIC or another format that cannot be read; convert it to JPEG or PNG")
    raise UnreadableImage(f"is not an image of a known format ({', '.join(FORMATS)})")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 when there is none or the EXIF block is broken: the pixels are still good."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _centre_square(image: Image.Image) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    if width == height:
        return image
    left, top = (width - side) // 2, (height - side) // 2
    # A resize to its own size copies the box as `crop` does, without `crop`'s own warning over 89 megapixels.
    return image.resize((side, side), Image.Resampling.NEAREST, box=(left, top, left + side, top + side))


def _to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; transparency lies over white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits or of floats as 8 bits; Pillow's own conversion would cut every value over 255."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    deepest = 65535.0 if image.mode.startswith("I") else 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    return Image.fromarray(np.round(values.clip(0, deepest) * (255.0 / deepest)).astype(np.uint8))
