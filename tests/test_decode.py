"""Files of every mode and format, upright and damaged, against pixels computed by hand."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import struct
import threading
import time
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from abe.data import decode
from abe.data.decode import BrokenImageError, ReadingError, printable, read_image, use_image

LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "TIFF": {},
}


def noise(height=12, width=20, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def smooth(height=24, width=40):
    """What a lossy format keeps: every pixel says where it is."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 8, columns * 5, np.full_like(rows, 90)], axis=-1)
    return pixels.astype(np.uint8)


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


def over_white(pixels, alpha):
    alpha = alpha.astype(float)[..., None] / 255
    return pixels * alpha + 255 * (1 - alpha)


def save(path, image, **options):
    image.save(path, **options)
    return path


def read(path, box=None):
    image = read_image(path, box)
    assert image.mode == "RGB"
    return np.asarray(image)


def stored_mode(path):
    with Image.open(path) as image:
        return image.mode


def assert_broken(path, reason=".", box=None):
    with pytest.raises(BrokenImageError, match=reason) as error:
        read_image(path, box)
    assert error.value.path == path
    assert str(error.value) == f"{path}: {error.value.reason}"
    return error.value


# --- modes and formats -------------------------------------------------------------------------


@pytest.mark.parametrize("format", LOSSLESS)
def test_rgb_as_it_is(tmp_path, format):
    path = save(tmp_path / "image", Image.fromarray(noise()), format=format, **LOSSLESS[format])
    np.testing.assert_array_equal(read(path), noise())
    np.testing.assert_array_equal(read(str(path)), noise())


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats(tmp_path, format):
    path = save(tmp_path / "image", Image.fromarray(smooth()), format=format, quality=95)
    np.testing.assert_allclose(read(path).astype(int), smooth(), atol=8)


def test_the_content_and_not_the_name_tells_the_format(tmp_path):
    path = save(tmp_path / "image.jpg", Image.fromarray(noise()), format="PNG")
    np.testing.assert_array_equal(read(path), noise())


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey(tmp_path, format):
    values = noise(channels=1)
    path = save(tmp_path / "image", Image.fromarray(values), format=format)
    np.testing.assert_array_equal(read(path), grey(values))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF"])
def test_black_and_white(tmp_path, format):
    values = noise(channels=1) > 100
    path = save(tmp_path / "image", Image.fromarray(values), format=format)
    assert format == "GIF" or stored_mode(path) == "1"
    np.testing.assert_array_equal(read(path), grey(255 * values))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF"])
def test_a_palette(tmp_path, format):
    colors = np.array([[255, 0, 0], [0, 200, 0], [1, 2, 3], [250, 251, 252]], np.uint8)
    indices = noise(channels=1) % 4
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colors.ravel().tolist())
    path = save(tmp_path / "image", image, format=format)
    assert stored_mode(path) == "P"
    np.testing.assert_array_equal(read(path), colors[indices])


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_color(tmp_path, format):
    colors = np.array([[255, 0, 0], [0, 200, 0], [1, 2, 3], [250, 251, 252]], np.uint8)
    indices = noise(channels=1) % 4
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colors.ravel().tolist())
    path = save(tmp_path / "image", image, format=format, transparency=2)
    expected = colors[indices]
    expected[indices == 2] = 255
    np.testing.assert_array_equal(read(path), expected)


def test_a_palette_with_half_transparent_colors(tmp_path):
    colors = np.array([[255, 0, 0], [0, 200, 0], [1, 2, 3]], np.uint8)
    alphas = np.array([255, 128, 0], np.uint8)
    indices = noise(channels=1) % 3
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colors.ravel().tolist())
    path = save(tmp_path / "image.png", image, transparency=alphas.tobytes())
    expected = over_white(colors[indices], alphas[indices])
    np.testing.assert_allclose(read(path), expected, atol=1)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_over_white(tmp_path, format):
    pixels = noise(channels=4)
    pixels[0, :2, 3] = 0, 255
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    path = save(tmp_path / "image", Image.fromarray(pixels), format=format, **options)
    assert stored_mode(path) == "RGBA"
    found = read(path)
    np.testing.assert_allclose(found, over_white(pixels[..., :3], pixels[..., 3]), atol=1)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == pixels[0, 1, :3].tolist()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_with_alpha(tmp_path, format):
    pixels = noise(channels=2)
    image = Image.merge("LA", [Image.fromarray(channel) for channel in np.moveaxis(pixels, -1, 0)])
    path = save(tmp_path / "image", image, format=format)
    assert stored_mode(path) == "LA"
    expected = over_white(grey(pixels[..., 0]), pixels[..., 1])
    np.testing.assert_allclose(read(path), expected, atol=1)


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7))])
def test_a_transparent_color_without_a_palette(tmp_path, mode, key):
    values = noise(channels=1) % 9
    image = Image.fromarray(grey(values)).convert(mode)
    path = save(tmp_path / "image.png", image, transparency=key)
    np.testing.assert_array_equal(read(path), grey(np.where(values == 7, 255, values)))


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk(tmp_path, format):
    inks = np.zeros((16, 64, 4), np.uint8)
    inks[:, 16:32] = 255, 0, 0, 0
    inks[:, 32:48] = 0, 255, 255, 0
    inks[:, 48:] = 0, 0, 0, 255
    image = Image.frombytes("CMYK", (64, 16), inks.tobytes())
    path = save(tmp_path / "image", image, format=format)
    assert stored_mode(path) == "CMYK"
    colors = np.array([[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(read(path)[:, 8::16].astype(int), [colors] * 16, atol=6)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_divided_by_257_and_not_clipped(tmp_path, format):
    values = np.array([[0, 100, 257, 1000, 32767, 32768, 65000, 65535]], np.uint16)
    path = save(tmp_path / "image", Image.fromarray(values), format=format)
    expected = [[0, 0, 1, 4, 127, 128, 253, 255]]
    np.testing.assert_array_equal(read(path), grey(expected))


def test_16_bits_of_the_other_byte_order(tmp_path):
    values = np.array([[0, 1000, 40000, 65535]], ">u2")
    image = Image.frombytes("I;16B", (4, 1), values.tobytes())
    path = save(tmp_path / "image.tif", image)
    assert stored_mode(path) == "I;16B"
    np.testing.assert_array_equal(read(path), grey([[0, 4, 156, 255]]))


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    path = save(tmp_path / "image.png", Image.fromarray(np.full((2, 2), 200, np.uint16)))
    assert read(path).max() == 1


def test_a_transparent_grey_of_16_bits(tmp_path):
    values = np.array([[0, 1000, 40000, 1001, 65535]], np.uint16)
    path = save(tmp_path / "image.png", Image.fromarray(values), transparency=1000)
    assert stored_mode(path) == "I;16"
    np.testing.assert_array_equal(read(path), grey([[0, 255, 156, 4, 255]]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.25, 0.5, 1]], np.float32), [[0, 64, 128, 255]]),
        (np.array([[0, 1.4, 100, 240]], np.float32), [[0, 1, 100, 240]]),
        (np.array([[0, 257, 32768, 60000]], np.float32), [[0, 1, 128, 233]]),
        (np.array([[0, 1, 100, 240]], np.int32), [[0, 1, 100, 240]]),
        (np.array([[0, 257, 32768, 65535]], np.int32), [[0, 1, 128, 255]]),
        (np.zeros((1, 4), np.float32), [[0, 0, 0, 0]]),
    ],
)
def test_grey_of_32_bits_has_white_at_1_255_or_65535(tmp_path, values, expected):
    path = save(tmp_path / "image.tif", Image.fromarray(values))
    assert stored_mode(path) == ("F" if values.dtype == np.float32 else "I")
    np.testing.assert_array_equal(read(path), grey(expected))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 65536]], np.int32), "grey from 0 to 65536 has no known range: save it with"),
        (np.array([[-1, 5]], np.int32), "grey from -1 to 5"),
        (np.array([[-0.5, 0.5]], np.float32), "grey from -0.5 to 0.5"),
        (np.array([[0, np.nan]], np.float32), "grey from nan to nan"),
        (np.array([[0, np.inf]], np.float32), "grey from 0 to inf"),
    ],
)
def test_grey_without_a_known_range(tmp_path, values, reason):
    assert_broken(save(tmp_path / "image.tif", Image.fromarray(values)), reason)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "I", "F"])
def test_an_image_of_several_strips(tmp_path, monkeypatch, mode):
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(noise(channels=4)).convert(mode)
    else:
        image = Image.fromarray(noise(channels=1)).convert(mode)
    options = {"transparency": 7} if mode in ("P", "I;16") else {}
    path = save(tmp_path / f"image.{'png' if options else 'tif'}", image, **options)
    whole = read(path)
    monkeypatch.setattr(decode, "_STRIP", 50)  # pixels: 3 of 12 rows
    np.testing.assert_array_equal(read(path), whole)


def png(width, height, bits, color_type, rows):
    """A PNG file of a kind that Pillow reads and does not write."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">2I5B", width, height, bits, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*item) for item in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def test_color_of_16_bits(tmp_path):
    pixels = np.array([[[0, 32768, 65535], [65000, 257, 1000]]], ">u2")
    (tmp_path / "image.png").write_bytes(png(2, 1, 16, 2, [row.tobytes() for row in pixels]))
    found = read(tmp_path / "image.png").astype(int)
    np.testing.assert_allclose(found, pixels.astype(int) / 257, atol=1)


@pytest.mark.parametrize(
    ("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_the_first_frame_of_several(tmp_path, format, options):
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    path = tmp_path / "image"
    first.save(path, format=format, save_all=True, append_images=[second], **options)
    with Image.open(path) as image:
        assert image.n_frames == 2
    np.testing.assert_array_equal(read(path), np.full((8, 8, 3), (255, 0, 0)))


def test_a_jpeg_of_several_pictures_as_phones_write_them(tmp_path):
    first, second = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    path = tmp_path / "image.jpg"
    first.save(path, format="MPO", save_all=True, append_images=[second])
    np.testing.assert_allclose(read(path), np.asarray(first), atol=3)


# --- orientation -------------------------------------------------------------------------------

UPRIGHT = {  # what has to be done to the stored pixels, by the definition of the tag
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}


def exif(orientation):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_each_orientation(tmp_path, format, orientation):
    path = tmp_path / "image"
    save(path, Image.fromarray(noise()), format=format, exif=exif(orientation), **LOSSLESS[format])
    np.testing.assert_array_equal(read(path), UPRIGHT[orientation](noise()))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_each_orientation_of_a_jpeg(tmp_path, orientation):
    path = tmp_path / "image.jpg"
    save(path, Image.fromarray(smooth()), quality=95, exif=exif(orientation))
    expected = UPRIGHT[orientation](smooth())
    np.testing.assert_allclose(read(path).astype(int), expected, atol=8)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16"])
def test_every_mode_is_turned(tmp_path, mode):
    stored = Image.fromarray(noise(channels=1)).convert(mode)
    plain = read(save(tmp_path / "plain.png", stored))
    turned = read(save(tmp_path / "turned.png", stored, exif=exif(6)))
    np.testing.assert_array_equal(turned, UPRIGHT[6](plain))


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6), st.integers(0, 200)
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what is damaged
def test_damaged_exif_costs_no_image(tmp_path_factory, changes, length):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 1
    tags[ExifTags.Base.ImageDescription] = "a bird"
    tags[ExifTags.Base.XResolution] = 72.0
    damaged = bytearray(tags.tobytes())
    for place, value in changes:
        damaged[place % len(damaged)] = value
    path = tmp_path_factory.mktemp("exif") / "image.png"
    save(path, Image.fromarray(noise()), exif=bytes(damaged[: max(1, length)]))
    assert sorted(read(path).ravel()) == sorted(noise().ravel())


# --- boxes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((2, 3, 7, 5), slice(3, 5), slice(2, 7)),
        ((0, 0, 20, 12), slice(None), slice(None)),
        ((-5, -5, 4, 100), slice(None), slice(0, 4)),
        ((18, 10, 99, 99), slice(10, None), slice(18, None)),
        ((1.6, 2.4, 4.4, 5.6), slice(2, 6), slice(2, 4)),
    ],
)
def test_a_box_is_clipped_to_the_image(tmp_path, box, rows, columns):
    path = save(tmp_path / "image.png", Image.fromarray(noise()))
    np.testing.assert_array_equal(read(path, box), noise()[rows, columns])


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_box_is_one_of_the_upright_image(tmp_path, orientation):
    path = save(tmp_path / "image.png", Image.fromarray(noise()), exif=exif(orientation))
    upright = UPRIGHT[orientation](noise())
    np.testing.assert_array_equal(read(path, (1, 2, 9, 11)), upright[2:11, 1:9])


@pytest.mark.parametrize(
    "box",
    [(20, 0, 30, 5), (-9, 0, 0, 5), (0, 12, 5, 20), (5, 5, 5, 9), (9, 5, 5, 9), (0, 0, 0.4, 5)],
)
def test_an_empty_box(tmp_path, box):
    path = save(tmp_path / "image.png", Image.fromarray(noise()))
    x1, y1, x2, y2 = (round(edge) for edge in box)
    assert_broken(path, f"box {x1},{y1},{x2},{y2} holds none of its 20 x 12 pixels", box)


# --- broken files ------------------------------------------------------------------------------


def test_files_that_are_not_there_or_no_images(tmp_path):
    assert_broken(tmp_path / "absent.png", "No such file or directory")
    assert_broken(tmp_path, "Is a directory")
    os.mkfifo(tmp_path / "pipe.png")
    assert_broken(tmp_path / "pipe.png", "a pipe, which would be waited for")
    assert_broken(Path("/dev/zero"), "a device")
    for content in (b"", b"\xff\xd8", b"GIF89a", b"<svg/>", bytes(1000)):
        (tmp_path / "image.png").write_bytes(content)
        assert_broken(tmp_path / "image.png", "damaged, or neither JPEG, .*, GIF nor TIFF")


def test_formats_that_could_run_other_programs_are_not_opened(tmp_path):
    assert_broken(save(tmp_path / "image.eps", Image.fromarray(noise())), "damaged, or neither")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what is missing
def test_truncated_files(tmp_path, format, share):
    path = save(tmp_path / "image", Image.fromarray(noise(60, 50)), format=format)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_broken(path)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_truncated_compressed_tiffs(tmp_path, compression):
    path = save(tmp_path / "image.tif", Image.fromarray(noise(60, 50)), compression=compression)
    path.write_bytes(path.read_bytes()[:-200])
    assert_broken(path)


def test_damaged_pixels(tmp_path):
    path = save(tmp_path / "image.png", Image.fromarray(noise()))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert_broken(path, "broken data stream")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what is damaged
def test_damage_anywhere_gives_an_image_or_the_one_error(tmp_path):
    generator = np.random.default_rng(1)
    path = tmp_path / "image"
    counts = {"read": 0, "broken": 0}
    for format in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        whole = save(path, Image.fromarray(noise()), format=format, exif=exif(6)).read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for place in generator.integers(min(len(data), 200), size=4):
                data[place] = generator.integers(256)
            path.write_bytes(data)
            try:
                assert read_image(path).mode == "RGB"
                counts["read"] += 1
            except BrokenImageError:
                counts["broken"] += 1
    assert min(counts.values()) > 50


def test_a_header_of_a_picture_of_50000_x_50000(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png(50_000, 50_000, 8, 2, [bytes(100)]))
    assert_broken(path, r"pixels\) exceeds limit|are more than")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_pillow_only_warns_of_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_bytes(png(10_000, 10_000, 8, 2, [bytes(100)]))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert_broken(path, "10000 x 10000 pixels are more than the 89478485 that are safe to decode")


def test_warnings_that_are_errors_are_no_other_error(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png(10_000, 10_000, 8, 2, [bytes(100)]))
    assert_broken(path, "exceeds limit of 89478485 pixels")


def test_the_limit_is_pillows(tmp_path, monkeypatch):
    path = save(tmp_path / "image.png", Image.fromarray(noise()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 240)
    read(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 119)
    assert_broken(path, r"240 pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    read(path)


def test_an_error_crosses_processes(tmp_path):
    error = assert_broken(tmp_path / "absent.png")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.reason, str(copy)) == (error.path, error.reason, str(error))


def test_an_error_keeps_nothing_of_what_was_read(tmp_path):
    path = save(tmp_path / "image.bmp", Image.fromarray(noise(60, 50)))
    path.write_bytes(path.read_bytes()[:-100])
    assert assert_broken(path, "truncated").__context__ is None


def test_names_cannot_write_to_the_terminal(tmp_path):
    for name, shown in (
        ("\x1b[2J.png", r"\x1b[2J.png"),
        ("x.png: all fine\n\nDone.png", r"x.png: all fine\n\nDone.png"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
        ("\u202egnp.png", r"\u202egnp.png"),
        ("Zaunkönig ミソサザイ.png", "Zaunkönig ミソサザイ.png"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(BrokenImageError) as error:
            read_image(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path}/{shown}: damaged, or neither")
        assert error.value.path == tmp_path / name
        assert printable(printable(name)) == shown
    assert BrokenImageError(Path("a"), "\x07").reason == r"\x07"


# --- what is not the file's fault --------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.ESTALE])
def test_a_failing_disk_breaks_no_image(tmp_path, monkeypatch, number):
    def fail(image):
        raise OSError(number, os.strerror(number))

    path = save(tmp_path / "image.png", Image.fromarray(noise()))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ReadingError) as error:
        read_image(path)
    assert (error.value.errno, error.value.filename) == (number, str(path))
    copy = pickle.loads(pickle.dumps(error.value))
    assert (type(copy), str(copy)) == (ReadingError, str(error.value))


def test_too_many_open_files_break_no_image(tmp_path):
    path = save(tmp_path / "image.png", Image.fromarray(noise()))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(ReadingError, match=os.strerror(errno.EMFILE)) as error:
            read_image(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert error.value.filename == str(path)


@pytest.mark.parametrize("name", ["ImageFile.ImageFile.load", "ImageOps.exif_transpose"])
def test_too_little_memory_breaks_no_image(tmp_path, monkeypatch, name):
    def fail(*_, **__):
        raise MemoryError

    path = save(tmp_path / "image.png", Image.fromarray(noise()))
    monkeypatch.setattr(f"PIL.{name}", fail)
    with pytest.raises(MemoryError, match=r"image\.png: too little memory"):
        read_image(path)


def test_what_may_not_be_read_is_broken(tmp_path, monkeypatch):
    """Here by a patch, because root may read everything."""

    def fail(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    path = save(tmp_path / "image.png", Image.fromarray(noise()))
    monkeypatch.setattr(Image, "open", fail)
    assert_broken(path, "Permission denied")


# --- memory ------------------------------------------------------------------------------------


def test_a_file_of_gigabytes_is_not_opened(tmp_path, monkeypatch):
    path = tmp_path / "image.webp"
    with path.open("wb") as file:
        file.write(b"RIFF\0\0\0\xc0WEBPVP8 ")
        file.truncate(3 * 2**30)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    assert_broken(path, "3,072 MiB are more than the 512 that an image may take")


@pytest.mark.parametrize("limit", ["_LARGE_PIXELS", "_LARGE_BYTES"])
def test_one_large_image_is_in_memory_at_a_time(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(decode, limit, 239)
    path = save(tmp_path / "image.png", Image.fromarray(noise()))
    inside = threading.Semaphore()

    def use(image):
        assert inside.acquire(blocking=False)
        time.sleep(0.01)
        inside.release()
        return image.size

    with ThreadPool(4) as pool:
        assert pool.map(lambda _: use_image(path, None, use), range(8)) == [(20, 12)] * 8


def test_small_images_are_decoded_side_by_side(tmp_path):
    path = save(tmp_path / "image.png", Image.fromarray(noise()))
    both = threading.Barrier(2, timeout=30)
    with ThreadPool(2) as pool:
        pool.map(lambda _: use_image(path, None, lambda image: both.wait()), range(2), chunksize=1)


@pytest.mark.parametrize("offset", [2**50, 2**62, 2**63 - 8])
def test_an_offset_of_a_damaged_file_is_the_files_fault(tmp_path, offset):
    """Of a BigTIFF; the system says that such a place cannot be."""
    path = tmp_path / "image.tif"
    path.write_bytes(struct.pack("<2sHHHQ", b"II", 43, 8, 0, offset) + bytes(64))
    with pytest.raises(BrokenImageError):
        read_image(path)
