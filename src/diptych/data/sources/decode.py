"""Decoding an image file, its bytes or a Pillow image to a square of RGB pixels.

Images are not trusted: the size in the header is checked before a pixel is decoded, only formats whose decoders are
part of Pillow itself are tried (EPS would start Ghostscript), and every fault becomes `UnreadableImage`. So does an
image whose numbers do not say what is black and what is white: it would become a wrong image without a word.
"""

import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import (  # the imports register what `Image.OPEN` finds
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageCms,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from diptych.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".avif", ".heic", ".heif"}
)
"""Suffixes of the files that are taken for images. HEIC is among them so that it is reported, not overlooked."""

NOT_THE_FILE = {
    b"version https://git-lfs": "is a pointer of git-lfs, not the file itself; fetch it with git lfs pull",
    b"<!doctype html": "is a page of HTML, as servers send for a missing file; download it again",
    b"<html": "is a page of HTML, as servers send for a missing file; download it again",
}
"""How a file begins, in small letters, that stands in the place of another."""
_DRAWINGS = (b"<svg", b"<?xml")
_NUMBERED = re.compile(r"#\d+$")
_ORIENTATION = 0x0112
_BITS, _PHOTOMETRIC, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 258, 262, 338, 339
"""TIFF tags: bits of a value, whether 0 is white (0) or black (1), what the samples after the colours are, and whether
values are signed (2)."""
_LEVELS = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies the grey values of PNGs of 2 and 4 bits with, but not the value that is transparent."""
_FAINT = 16
"""Floats over 1 whose largest is below this may be of either scale, to 1 or to 255."""
_OVERSHOOT = 0.02
"""How far filters that sharpen or resize carry floats from 0 to 1 beyond both ends."""
_FOURTEEN_BITS = 16384
"""Values of 16 bits that stay below this are those of a sensor or a scanner with 10 to 14 bits."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_GREY = ("1", "L", "LA", "La")
"""Modes of grey images, which those of integers and floats become."""
_COLOURS = Image.fromarray(np.indices((16, 16, 16)).reshape(3, 64, 64).transpose(1, 2, 0).astype(np.uint8) * 17)
"""Colours all over RGB."""
_HARDLY = 3
"""Largest change, in levels of 255, by which a profile still counts as sRGB's own."""
_MEND = "which value is white is not known: convert it to 8 bits"


def without_number(path: str) -> str:
    """The path of an image without the number of a caption behind it, as in `a.jpg#0` of Flickr8k and Flickr30k."""
    return _NUMBERED.sub("", path)


def is_image_path(value: Any) -> bool:
    """Whether a value is the path of an image by its suffix. Addresses on the web are not."""
    if not isinstance(value, str) or value.strip().lower().startswith(("http://", "https://")):
        return False
    return os.path.splitext(without_number(value.strip()))[1].lower() in SUFFIXES


class UnreadableImage(UserError):  # noqa: N818 (named after what it is about)
    """An image that cannot be used; the message names it and the reason in one line."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ImageLimits:
    """Limits on what the header of an image says, checked before it is decoded."""

    max_pixels: int = 100_000_000
    """Largest width x height in pixels. Decoding takes about 4 bytes a pixel in every thread that decodes."""


def decode(
    data: bytes | Path | Image.Image, size: int, *, name: str | None = None, limits: ImageLimits | None = None
) -> UInt8[np.ndarray, "size size 3"]:
    """The centre square of an image, resized to ``size`` x ``size`` RGB pixels.

    The image is turned as its EXIF orientation says; of an animation the first frame is used; transparency lies over
    white, and is refused where it is everywhere; colours of an embedded profile become sRGB; the square is resized with
    an antialiased bicubic filter. Values of 16 bits are scaled to 8, floats from 0 to 1 or from 0 to 255 too; other
    ranges are refused, and so are 16 bits of which only the lower 12 are used: nearly black, unless somebody knows
    which value is white.

    ``name`` is what messages call the image, by default its path. Raises UnreadableImage, whose message names the image
    and the reason.
    """
    shown = repr(str(name or _path(data) or "image"))[1:-1]
    limits = limits or ImageLimits()
    try:
        if isinstance(data, Image.Image):
            _check_size(data, limits)
            return _decode(data, size)
        with _stream(data) as stream:
            image = _open(stream)
            _check_size(image, limits)
            # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the cost; twice the size or more is kept for the filter.
            image.draft(None, (2 * size, 2 * size))
            return _decode(image, size)
    except UnreadableImage as error:
        raise UnreadableImage(f"{shown}: {error}") from None
    # Pillow's decoders raise nearly every type of exception on bytes that were cut or made up.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{shown}: cannot be decoded ({reason}); replace or remove it") from None


def header(data: bytes) -> tuple[tuple[int, int], int]:
    """Width and height in pixels that the header of an image says, as it is stored, and the number of its frames.

    For images that were decoded. The second picture that some cameras put behind a JPEG is no frame.
    """
    image = _open(io.BytesIO(data))
    return image.size, 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)


def _path(data: bytes | Path | Image.Image) -> str | Path | None:
    return data if isinstance(data, Path) else getattr(data, "filename", None)


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


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise UnreadableImage(
            f"is {width} x {height} pixels, over the limit of {limits.max_pixels:,} pixels; shrink it or remove it"
        )


def _decode(image: Image.Image, size: int) -> np.ndarray:
    """``image`` may be the caller's: it is loaded, and otherwise stays as it is."""
    transparent = _transparent_value(image)
    exact = _exact_transparency(image) if isinstance(transparent, tuple) else None
    raw = _raw_mode(image)
    image.load()
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = int(np.ravel(tags.get(_BITS, 16))[0])
    if tags.get(_SAMPLE_FORMAT, (1,))[0] == 2 and bits < 32:
        raise UnreadableImage(f"holds signed numbers of {bits} bits; {_MEND}")
    if ";16" in raw and image.mode != "I;16":
        _refuse_twelve_bits(256.0 * np.asarray(image.convert("RGB")).max())
    if exact is not None:
        image = image.convert("RGB")
        image.putalpha(exact)
        transparent = None
    elif image.mode == "RGBA" and _is_alpha_unused(image, tags):
        image = image.convert("RGB")
    # Asked only now: Pillow turns TIFFs while it loads them, and then they have no orientation any more.
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_grey(image, transparent, bits=bits, inverted=tags.get(_PHOTOMETRIC) == 0)
    elif transparent != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = transparent
    _refuse_invisible(image)
    profile, grey = image.info.get("icc_profile"), image.mode in _GREY
    image = _to_rgb(_centre_square(image), profile)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(_to_srgb(image, profile, grey=grey), dtype=np.uint8)


def _open(stream: io.BytesIO | io.BufferedReader) -> Image.Image:
    """`Image.open` without its own size check, which would warn or raise before the size can be named."""
    start = stream.read(64)
    prefix = start[:16]
    for name in FORMATS:
        # A build of Pillow may lack a decoder; `accept` answers with a sentence (a str) then.
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or accept is None or accept(prefix) is not True:
            continue
        stream.seek(0)
        return factory(stream, "")
    if prefix[4:8] == b"ftyp":
        raise UnreadableImage("is HEIC or another format that cannot be read; convert it to JPEG or PNG")
    for begin, what in NOT_THE_FILE.items():
        if start.lstrip().lower().startswith(begin):
            raise UnreadableImage(what)
    if start.lstrip().lower().startswith(_DRAWINGS):
        raise UnreadableImage("is a drawing (SVG) or other XML; convert it to PNG")
    raise UnreadableImage(f"is not an image of a known format ({', '.join(FORMATS)})")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 when there is none or the EXIF block is broken: the pixels are still good."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _transparent_value(image: Image.Image) -> Any:
    """The value or colour that is transparent, in the numbers that the loaded image has; None where there is none.

    Pillow scales the pixels of a PNG that has not 8 bits, but not this value. To be asked before the image is loaded.
    """
    value = image.info.get("transparency")
    raw = image.tile[0].args if isinstance(image, PngImagePlugin.PngImageFile) and image.tile else None
    if isinstance(value, int) and raw in _LEVELS:
        return value * _LEVELS[str(raw)]
    if isinstance(value, tuple) and raw == "RGB;16B":
        return tuple(channel >> 8 for channel in value)
    return value


def _raw_mode(image: Image.Image) -> str:
    """How Pillow calls the layout of the pixels in the file, such as `RGB;16B`; empty once the image is loaded."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or "")


def _exact_transparency(image: Image.Image) -> Image.Image | None:
    """The opacity of a PNG of three times 16 bits with a transparent colour; None for any other image.

    Pillow loads the upper bytes alone, which other colours share. So the file is read once more for the lower bytes.
    """
    if not isinstance(image, PngImagePlugin.PngImageFile) or _raw_mode(image) != "RGB;16B" or image.fp is None:
        return None
    stream, place = image.fp, image.fp.tell()
    colour = image.info["transparency"]
    bytes_of = []
    for layout in ("RGB;16B", "RGB;16L"):  # the second takes the other byte of each value
        stream.seek(0)
        half = PngImagePlugin.PngImageFile(stream)
        half.tile = [tile._replace(args=layout) for tile in half.tile]
        half.load()
        bytes_of.append(np.asarray(half).astype(np.uint16))
    stream.seek(place)
    clear = (bytes_of[0] * 256 + bytes_of[1] == np.array(colour, np.uint16)).all(-1)
    return Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))


def _is_alpha_unused(image: Image.Image, tags: Mapping[int, Any]) -> bool:
    """Whether the fourth channel of an image is not its opacity, whatever Pillow takes it for.

    TIFFs say so where it is; without a word it may be anything, such as infrared. BMPs often fill it with zeros.
    """
    if image.format == "TIFF":
        return _EXTRA_SAMPLES not in tags
    return image.format == "BMP" and image.getchannel("A").getextrema() == (0, 0)


def _refuse_invisible(image: Image.Image) -> None:
    """Raise UnreadableImage where no pixel is opaque: nothing would be left but the white behind it."""
    if not image.has_transparency_data:
        return
    bands = image.getbands()
    opacity = image.getchannel(len(bands) - 1) if bands[-1] in "Aa" else image.convert("RGBA").getchannel("A")
    if opacity.getextrema() == (0, 0):
        raise UnreadableImage(
            "is transparent everywhere, so that nothing of it is seen; remove it, or its transparency"
        )


def _refuse_twelve_bits(most: float) -> None:
    """Raise UnreadableImage where the largest value of an image of 16 bits is one of 14 bits, and not 0."""
    if 0 < most < _FOURTEEN_BITS:
        raise UnreadableImage(f"holds values up to {most:.0f} of 65535, as data of 10 to 14 bits has; {_MEND}")


def _centre_square(image: Image.Image) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    if width == height:
        return image
    left, top = (width - side) // 2, (height - side) // 2
    # A resize to its own size copies the box as `crop` does, without `crop`'s own warning over 89 megapixels.
    return image.resize((side, side), Image.Resampling.NEAREST, box=(left, top, left + side, top + side))


def _to_grey(image: Image.Image, transparent: int | None, *, bits: int, inverted: bool) -> Image.Image:
    """Greyscale of more than 8 bits or of floats as 8 bits; Pillow's own conversion would cut every value over 255."""
    values = np.asarray(image)
    white = 2.0**bits - 1 if image.mode.startswith("I;16") else _white(image, values)
    if white == 65535:
        _refuse_twelve_bits(float(values.max()))
    grey = np.round(values.astype(np.float32) * (255.0 / white)).clip(0, 255).astype(np.uint8)
    made = Image.fromarray(255 - grey if inverted else grey)
    if transparent is not None:
        made.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if profile := image.info.get("icc_profile"):
        made.info["icc_profile"] = profile
    return made


def _white(image: Image.Image, values: np.ndarray) -> float:
    """The value that is white in an image of integers or floats of 32 bits.

    Raises UnreadableImage where the values do not tell.
    """
    least, most = float(values.min()), float(values.max())
    if image.mode == "F" and least >= -_OVERSHOOT and most <= 1 + _OVERSHOOT:
        return 1.0
    if not least >= 0 or not np.isfinite(most):  # NaN is not >= 0
        raise UnreadableImage(f"holds values from {least:g} to {most:g}; {_MEND}")
    if image.mode == "I":  # 8 bits where Pillow converted it, 16 bits where it read it
        if most > 65535:
            raise UnreadableImage(f"holds values up to {most:.0f}, more than 16 bits; {_MEND}")
        return 255.0 if most <= 255 and image.format != "PPM" else 65535.0
    if most > 255 or (most < _FAINT and (values != np.floor(values)).any()):
        raise UnreadableImage(f"holds floats up to {most:g}, neither up to 1 nor up to 255; {_MEND}")
    return 255.0


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of any mode as RGB, whose colours are still those of its profile; transparency lies over white."""
    if image.mode == "CMYK" and (transform := _transform(profile, "CMYK")) is not None:
        return transform(image)
    if image.mode == "La":  # the one mode that Pillow does not take to RGBA by itself
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None, *, grey: bool) -> Image.Image:
    """An RGB image in the colours of its profile as one in sRGB. A grey image may also have a profile of grey values.

    A profile of another kind than the image (as Pillow leaves it after a conversion) is ignored.
    """
    if grey and (transform := _transform(profile, "GRAY")) is not None:
        return transform(image.getchannel(0))
    if (transform := _transform(profile, "RGB")) is not None:
        return transform(image)
    return image


@lru_cache(maxsize=64)
def _transform(
    profile: bytes | None, space: Literal["RGB", "GRAY", "CMYK"]
) -> Callable[[Image.Image], Image.Image] | None:
    """From the colours of a profile to sRGB; None without a profile, for one that changes hardly a colour, whatever its
    name, and for one of another space.

    A damaged profile counts as none: the pixels are still good, and every viewer shows them so.
    """
    if not profile:
        return None
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if found.profile.xcolor_space.strip() != space:
            return None
        mode = "L" if space == "GRAY" else space
        transform = ImageCms.buildTransform(found, ImageCms.createProfile("sRGB"), mode, "RGB").apply
        if space != "CMYK":
            plain = _COLOURS.convert(mode)
            change = np.asarray(transform(plain), int) - np.asarray(plain.convert("RGB"), int)
            if np.abs(change).max() <= _HARDLY:
                return None
        return transform
    except (OSError, ImageCms.PyCMSError):
        return None
