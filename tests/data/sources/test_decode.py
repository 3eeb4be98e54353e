"""Image decoding: every mode, and files that are damaged, huge or not images at all."""

import contextlib
import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms, ImageOps

from diptych.data.sources.decode import ImageLimits, UnreadableImage, decode


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width, height, channels=3):
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def png(width, height, *, bits, kind, rows, transparent=()):
    """A PNG from its raw rows; ``kind`` is 0 for grey and 2 for RGB. Pillow writes 8 bits for most of them."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    value = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + value + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bmp(pixels_HW4):
    """A BMP with a channel of opacity, which Pillow does not write."""
    height, width, _ = pixels_HW4.shape
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, width, -height, 1, 32, 3, 0, 0, 0, 0, 0) + masks + b"\0" * 52
    body = pixels_HW4[..., [2, 1, 0, 3]].tobytes()
    return b"BM" + struct.pack("<IHHI", 14 + 108 + len(body), 0, 0, 14 + 108) + info + body


def huge_png(width, height):
    """A valid header of any size with next to no pixel data."""
    return png(width, height, bits=8, kind=2, rows=b"\0" * 99)


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
    if (format, mode) == ("TIFF", "YCbCr") and PIL.__version__ < "13":
        pytest.skip("Pillow 12 cannot read the YCbCr TIFFs that it writes")
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
    image.putpixel((0, 0), (9, 9, 9, 255))
    assert (decode(encoded(image), 4)[2:] == 255).all()
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert abs(decode(encoded(half), 4)[0, 0].astype(int) - [255, 127, 127]).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpixel((0, 0), 1)
    palette.putpalette([9, 9, 9, 8, 8, 8])
    assert (decode(encoded(palette, transparency=0), 4)[2:] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "P"])
def test_what_is_transparent_everywhere_is_refused(mode):
    image = noise(4, 4, 1).convert("P") if mode == "P" else Image.new(mode, (4, 4))
    if mode == "P":
        image.info["transparency"] = bytes(256)
    with pytest.raises(UnreadableImage, match="is transparent everywhere, so that nothing of it is seen"):
        decode(image if mode == "La" else encoded(image), 4)


def both_ways(data):
    """The pixels of a file, and those of the same file opened with Pillow: before and after it is loaded."""
    for loaded in (None, False, True):
        given = data if loaded is None else Image.open(io.BytesIO(data))
        if loaded:
            given.load()
        yield decode(given, 16)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_once(format, orientation):
    upright = np.zeros((25, 16, 3), np.uint8)
    upright[:12, :8] = [255, 0, 0]
    upright[12:, 8:] = [0, 0, 255]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    stored = Image.fromarray(upright)
    for _ in range(3 if orientation in (6, 8) else 1):  # the opposite of what the orientation asks for
        plain = Image.new("RGB", stored.size)
        plain.paste(stored)
        plain.getexif()[0x0112] = orientation
        stored = ImageOps.exif_transpose(plain)
    data = encoded(stored, format, exif=exif, **options)
    for pixels in both_ways(data):
        assert abs(pixels.astype(int) - decode(encoded(Image.fromarray(upright)), 16)).max() <= (format == "JPEG")


def test_a_callers_image_is_read_like_its_file_and_stays_as_it_is():
    data = encoded(noise(256, 200), "JPEG", quality=95)
    image = Image.open(io.BytesIO(data))
    decode(image, 8)
    assert image.size == (256, 200)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))
    for mode in ("1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "I", "F"):
        grey = noise(9, 9, 1)
        image = grey.convert("RGB" if mode in ("RGBa", "LAB", "HSV") else "L")
        image = image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)
        expected = np.asarray(grey.convert(mode) if mode == "1" else grey).astype(int) * (255 if mode == "1" else 1)
        assert abs(decode(image, 9)[..., 1].astype(int) - expected).max() <= 2, mode
    assert (decode(Image.merge("La", [Image.new("L", (3, 5), value) for value in (0, 1)]), 3) == 254).all()


@pytest.mark.parametrize(
    ("bits", "kind", "rows", "transparent", "shown"),
    [
        (1, 0, b"\0\x40", (0,), [[255] * 3, [255] * 3]),
        (1, 0, b"\0\x40", (1,), [[0] * 3, [255] * 3]),
        (2, 0, b"\0\x60", (1,), [[255] * 3, [170] * 3]),
        (4, 0, b"\0\x3a", (3,), [[255] * 3, [170] * 3]),
        (8, 0, b"\0\x0a\xc8", (10,), [[255] * 3, [200] * 3]),
        (16, 0, b"\0\x0a\x0b\xc8\xc8", (0x0A0B,), [[255] * 3, [200] * 3]),
        (8, 2, b"\0\x0a\x0b\x0c\xc8\xc8\xc8", (10, 11, 12), [[255] * 3, [200] * 3]),
        (16, 2, b"\0\x0a\1\x0b\2\x0c\3" + b"\xc8" * 6, (0x0A01, 0x0B02, 0x0C03), [[255] * 3, [200] * 3]),
    ],
)
def test_the_transparent_value_of_every_depth_lies_over_white(bits, kind, rows, transparent, shown):
    data = png(2, 2, bits=bits, kind=kind, rows=rows * 2, transparent=transparent)
    np.testing.assert_array_equal(decode(data, 2), [shown, shown])
    np.testing.assert_array_equal(decode(Image.open(io.BytesIO(data)), 2), [shown, shown])


def test_only_the_exact_colour_of_16_bits_is_transparent():
    """Colours that share their upper bytes with it stay."""
    near, other = b"\x0a\2\x0b\2\x0c\3", b"\x0a\1\x0b\2\x0c\4"
    data = png(
        2,
        2,
        bits=16,
        kind=2,
        rows=b"\0\x0a\1\x0b\2\x0c\3" + near + b"\0" + other + b"\xc8" * 6,
        transparent=(0x0A01, 0x0B02, 0x0C03),
    )
    shown = [[[255] * 3, [10, 11, 12]], [[10, 11, 12], [200] * 3]]
    np.testing.assert_array_equal(decode(data, 2), shown)
    np.testing.assert_array_equal(decode(Image.open(io.BytesIO(data)), 2), shown)


def test_a_fourth_channel_that_is_no_opacity_is_left_out():
    """TIFF: no word on what it is. BMP: zeros everywhere, as many programs write."""
    image = noise(6, 6, 4)
    expected = np.asarray(image)[..., :3]
    tiff = encoded(image, "TIFF")
    entry = struct.pack("<HHI", 338, 3, 1)
    assert tiff.count(entry) == 1
    # The entry becomes one of another tag, so the file does not say what the fourth sample is.
    np.testing.assert_array_equal(decode(tiff.replace(entry, struct.pack("<HHI", 337, 3, 1)), 6), expected)
    assert (decode(tiff, 6) != expected).any()
    np.testing.assert_array_equal(decode(bmp(np.dstack([expected, np.zeros((6, 6), np.uint8)])), 6), expected)
    half = bmp(np.dstack([expected, np.eye(6, dtype=np.uint8) * 255]))
    assert (decode(half, 6)[~np.eye(6, dtype=bool)] == 255).all()


@pytest.mark.parametrize("most", [1023, 4095, 16383, 255])
def test_10_to_14_bits_in_16_are_refused(most):
    """They would be too dark."""
    values = np.linspace(0, most, 16).astype(np.uint16)[None].repeat(16, 0)
    deep = Image.fromarray(values)
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in values)
    for given in (
        deep,
        encoded(deep),
        encoded(deep, "TIFF"),
        *([png(16, 16, bits=16, kind=2, rows=rows)] * (most > 255)),
    ):
        with pytest.raises(UnreadableImage, match="of 65535, as data of 10 to 14 bits has; which value is white"):
            decode(given, 4)
    assert (decode(encoded(Image.fromarray(values * 0)), 4) == 0).all()
    assert decode(encoded(Image.fromarray(values + 16384)), 4).max() > 10


def test_floats_that_overshoot_a_little_are_read():
    values = np.array([[-0.01, 1.02]], np.float32).repeat(2, 0)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(values), "TIFF"), 2)[..., 0], [[0, 255]] * 2)


def test_colours_of_a_profile_become_srgb():
    def profile(primaries):
        """sRGB's own profile with other colours behind the three numbers: each is a rounded multiple of the old."""
        data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        at = {
            bytes(data[p : p + 4]): struct.unpack(">I", data[p + 4 : p + 8])[0] for p in range(132, 132 + 12 * 17, 12)
        }
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True):
            data[at[name] + 8 : at[name] + 20] = struct.pack(">3i", *(round(x * 65536) for x in column))
        return bytes(data)  # still called sRGB

    wide = profile([(0.515, 0.241, -0.001), (0.292, 0.692, 0.042), (0.157, 0.067, 0.784)])  # Display P3
    image = Image.new("RGB", (8, 8), (100, 180, 100))
    tagged = encoded(image, icc_profile=wide)
    found = decode(tagged, 4)[0, 0].astype(int)
    assert abs(found - [65, 182, 90]).max() <= 1  # by the matrices of both spaces
    np.testing.assert_array_equal(decode(Image.open(io.BytesIO(tagged)), 4)[0, 0], found)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for harmless in (srgb, b"damaged", wide[:300]):
        assert (decode(encoded(image, icc_profile=harmless), 4) == [100, 180, 100]).all()


def test_a_grey_profile_is_for_grey_images_alone():
    """Pillow leaves it behind when a grey image becomes one with colours."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {  # grey whose numbers are amounts of light
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"para\0\0\0\0\0\0\0\0" + struct.pack(">i", 65536),
    }
    start = 132 + 12 * len(tags)
    places = b"".join(
        struct.pack(">4sII", name, start + 20 * number, len(value)) for number, (name, value) in enumerate(tags.items())
    )
    body = struct.pack(">I", len(tags)) + places + b"".join(value.ljust(20, b"\0") for value in tags.values())
    linear = struct.pack(">I", 128 + len(body)) + srgb[4:16] + b"GRAY" + srgb[20:128] + body
    grey = Image.new("L", (8, 8), 100)
    for image in (grey, grey.convert("LA")):
        assert abs(decode(encoded(image, icc_profile=linear), 4).astype(int) - 168).max() <= 1
    colour = Image.new("RGB", (8, 8), (188, 100, 50))
    for image in (colour, colour.convert("RGBA"), colour.quantize(2)):
        assert (decode(encoded(image, icc_profile=linear), 4) == [188, 100, 50]).all()


def test_white_is_what_the_numbers_say():
    ramp = np.arange(16, dtype=np.float32)[None].repeat(16, 0) / 15
    expected = np.round(ramp * 255)
    for values in (
        (ramp * 65535).astype(np.uint16),
        (ramp * 65535).astype(np.int32),
        (ramp * 255).astype(np.int32),
        ramp,
        ramp * 255,
        np.round(ramp * 255),
        np.round(ramp * 3) * 5,
    ):
        right = expected if values.max() != 15 else values
        for given in (Image.fromarray(values), encoded(Image.fromarray(values), "TIFF")):
            np.testing.assert_allclose(decode(given, 16)[..., 0], right, atol=1)
    black_is_one = encoded(Image.fromarray((ramp * 65535).astype(np.uint16)), "TIFF")
    white_is_one = black_is_one.replace(struct.pack("<HHIH", 262, 3, 1, 1), struct.pack("<HHIH", 262, 3, 1, 0))
    assert white_is_one != black_is_one
    np.testing.assert_allclose(decode(white_is_one, 16)[..., 0], 255 - expected, atol=1)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.array([[0, 70_000]], np.int32), "up to 70000, more than 16 bits"),
        (np.array([[-5, 200]], np.int32), "from -5 to 200"),
        (np.array([[-1.0, 1.0]], np.float32), "from -1 to 1"),
        (np.array([[0.0, np.nan]], np.float32), "nan"),
        (np.array([[0.0, np.inf]], np.float32), "inf"),
        (np.array([[0.0, 1.3]], np.float32), "floats up to 1.3, neither up to 1 nor up to 255"),
        (np.array([[0.0, 4000.0]], np.float32), "floats up to 4000"),
    ],
)
def test_numbers_that_do_not_say_what_is_white_are_refused(tmp_path, values, says):
    image = Image.fromarray(values.repeat(2, 0))
    image.save(tmp_path / "deep.tiff")
    for given, name in ((tmp_path / "deep.tiff", str(tmp_path / "deep.tiff")), (image, "image")):
        with pytest.raises(UnreadableImage, match=says) as caught:
            decode(given, 2)
        assert str(caught.value).startswith(name)
        assert "convert it to 8 bits" in str(caught.value)


def test_signed_tiffs_are_refused():
    data = encoded(Image.fromarray(np.full((5, 9), 300, np.uint16)), "TIFF", tiffinfo={339: 2})
    with pytest.raises(UnreadableImage, match="signed numbers of 16 bits"):
        decode(data, 4)


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
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"a drawing \(SVG\) or other XML; convert it to PNG"),
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
