"""Image decoding: every mode, and files that are damaged, huge or not images at all."""

import contextlib
import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from diptych.data.sources.decode import ImageLimits, UnreadableImage, decode


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width, height, channels=3):
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def huge_png(width, height):
    """A valid header of any size with next to no pixel data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def test_crops_the_centre_before_it_resizes():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, :10, 0] = wide[:, 10:20, 1] = wide[:, 20:, 2] = 255
    for pixels in (wide, wide.transpose(1, 0, 2)):
        result = decode(encoded(Image.fromarray(np.ascontiguousarray(pixels))), 5)
        assert result.dtype == np.uint8
        assert (result == [0, 255, 0]).all()


def test_is_the_identity_at_the_images_own_size():
    image = noise(16, 16)
    np.testing.assert_array_equal(decode(encoded(image), 16), np.asarray(image))


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    result = decode(encoded(Image.fromarray(stripes)), 8)
    assert abs(result.astype(int) - 127).max() <= 16


MODES = {
    "PNG": ["L", "LA", "P", "RGB", "RGBA", "I;16"],
    "TIFF": ["L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"],
    "JPEG": ["L", "RGB", "CMYK", "YCbCr"],
    "WEBP": ["L", "P", "RGB", "RGBA"],
    "GIF": ["L", "P", "RGB"],
    "BMP": ["L", "P", "RGB"],
    "AVIF": ["RGB", "RGBA"],
}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format in MODES for mode in MODES[format]])
def test_every_mode_becomes_rgb(format, mode):
    if mode in ("I;16", "I"):
        image = Image.new(mode, (8, 8), 128 * 257)
    else:
        grey = Image.new("L", (8, 8), 128)
        image = grey.convert(mode) if mode == "F" else grey.convert("RGB").convert(mode)
    result = decode(encoded(image, format), 4)
    assert result.shape == (4, 4, 3)
    assert abs(result.astype(int) - 128).max() <= 3


def test_black_and_white():
    checks = Image.fromarray(np.eye(8, dtype=bool))
    np.testing.assert_array_equal(decode(encoded(checks), 8)[..., 1], 255 * np.eye(8))


def test_sixteen_bit_values_are_scaled_not_cut():
    ramp = np.linspace(0, 65535, 16).astype(np.uint16)[None].repeat(16, 0)
    result = decode(encoded(Image.fromarray(ramp)), 16)
    np.testing.assert_allclose(result[0, :, 0], np.linspace(0, 255, 16), atol=1)


def test_transparency_lies_over_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (decode(encoded(image), 4) == 255).all()
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert abs(decode(encoded(half), 4)[0, 0].astype(int) - [255, 127, 127]).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9])
    assert (decode(encoded(palette, transparency=0), 4) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:12, :8] = [255, 0, 0]
    upright[12:, 8:] = [0, 0, 255]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(upright), exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data, 16), decode(encoded(turned.convert("RGB")), 16))


def test_large_jpegs_decode_as_if_in_full():
    smooth = noise(8, 8).resize((1024, 768), Image.Resampling.BICUBIC)
    full = decode(encoded(smooth), 32).astype(int)
    assert abs(decode(encoded(smooth, "JPEG", quality=95), 32).astype(int) - full).mean() < 2


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data, 4) == [255, 0, 0]).all()


def test_a_huge_image_is_refused_from_its_header(tmp_path):
    path = tmp_path / "huge.png"
    path.write_bytes(huge_png(20_000, 20_000))
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(UnreadableImage, match=r"huge\.png: is 20000 x 20000 pixels, over the limit of 100,000,000"):
        decode(path, 8)
    assert time.perf_counter() - start < 0.5
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_the_limit_can_be_set():
    with pytest.raises(UnreadableImage, match="10 x 10"):
        decode(encoded(noise(10, 10)), 4, limits=ImageLimits(max_pixels=99))
    assert decode(encoded(noise(10, 10)), 4, limits=ImageLimits(max_pixels=100)).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"hello, this is text", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 99, "HEIC"),
        (encoded(noise(64, 64), "JPEG")[:900], "cannot be decoded"),
        (encoded(noise(64, 64), "PNG")[:900], "cannot be decoded"),
        (encoded(noise(64, 64), "JPEG")[:20], "cannot be decoded"),
        (huge_png(0, 5), "cannot be decoded"),
        (huge_png(50, 50), "cannot be decoded"),
    ],
)
def test_damaged_images_are_named_in_one_line(tmp_path, data, reason):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    for given, name in ((path, str(path)), (data, "image")):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            decode(given, 8)
        assert str(caught.value).startswith(name)
        assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UnreadableImage, match="does not exist"):
        decode(tmp_path / "none.png", 8)
    with pytest.raises(UnreadableImage, match="is not a file"):
        decode(tmp_path, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_broken_exif_does_not_lose_the_image():
    data = encoded(noise(16, 16), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30)
    assert decode(data, 8).shape == (8, 8, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_random_damage_never_raises_anything_else(format):
    clean = encoded(noise(32, 32), format)
    draw = np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(clean)
        for place in draw.integers(0, len(data), 4):
            data[place] = draw.integers(0, 256)
        with contextlib.suppress(UnreadableImage):
            assert decode(bytes(data), 8).shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "I;16", "1"])
@pytest.mark.parametrize("shape", [(7, 12), (13, 8), (9, 9)])
def test_the_crop_is_exact(mode, shape):
    image = noise(shape[1], shape[0]).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    side, left, top = min(shape), (shape[1] - min(shape)) // 2, (shape[0] - min(shape)) // 2
    whole = decode(encoded(image.crop((left, top, left + side, top + side))), side)
    np.testing.assert_array_equal(decode(encoded(image), side), whole)


def test_only_our_own_limit_counts(monkeypatch):
    """Pillow's limit would warn, in `open` and again in `crop`, before ours is asked; warnings are errors here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(encoded(Image.new("RGB", (13, 12))), 4).shape == (4, 4, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
