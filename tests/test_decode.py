"""Every mode and format against pixels known beforehand, and files that are not what they seem."""

from __future__ import annotations

import io
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image

from abe.data.decode import BrokenImageError, read_image
from abe.errors import InputError

ORIENTATION = 0x0112
rng = np.random.default_rng(0)
COLORS = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREYS = COLORS[..., 0]


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


def over_white(colors, alpha):
    share = np.asarray(alpha)[..., None] / 255
    return colors * share + 255 * (1 - share)


def palette_image():
    """Indices 0 to 3 of a palette, and the colours that they stand for."""
    palette = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 90, 200)], np.uint8)
    indices = rng.integers(0, 4, (6, 9), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    return image, indices, palette[indices]


def save(image, path, **options):
    image.save(path, **options)
    return path


# --- modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif"])
def test_grey(tmp_path, suffix):
    path = save(Image.fromarray(GREYS), tmp_path / f"image.{suffix}")
    image = read_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(image, grey(GREYS))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_color_without_loss(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(Image.fromarray(COLORS), tmp_path / f"image.{suffix}", **options)
    np.testing.assert_array_equal(read_image(path), COLORS)


def test_one_bit(tmp_path):
    path = save(Image.fromarray(GREYS > 99), tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(path), grey(255 * (GREYS > 99)))


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp"])
def test_palette(tmp_path, suffix):
    image, _, colors = palette_image()
    np.testing.assert_array_equal(read_image(save(image, tmp_path / f"image.{suffix}")), colors)


def test_palette_with_a_transparent_index(tmp_path):
    image, indices, colors = palette_image()
    path = save(image, tmp_path / "image.png", transparency=2)
    expected = np.where((indices == 2)[..., None], 255, colors)
    np.testing.assert_array_equal(read_image(path), expected)


def test_palette_with_an_alpha_for_every_index(tmp_path):
    image, indices, colors = palette_image()
    alphas = np.array([0, 80, 255, 160], np.uint8)
    path = save(image, tmp_path / "image.png", transparency=alphas.tobytes())
    expected = over_white(colors, alphas[indices])
    np.testing.assert_allclose(read_image(path), expected, atol=1)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparency_is_laid_over_white(tmp_path, suffix):
    alpha = rng.integers(0, 256, GREYS.shape, dtype=np.uint8)
    alpha[0] = 0
    image = Image.fromarray(np.dstack([COLORS, alpha]))
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    path = save(image, tmp_path / f"image.{suffix}", **options)
    np.testing.assert_allclose(read_image(path), over_white(COLORS, alpha), atol=1)


def test_grey_with_alpha(tmp_path):
    alpha = rng.integers(0, 256, GREYS.shape, dtype=np.uint8)
    path = save(Image.fromarray(np.dstack([GREYS, alpha]), "LA"), tmp_path / "image.png")
    np.testing.assert_allclose(read_image(path), over_white(grey(GREYS), alpha), atol=1)


def test_a_transparent_color(tmp_path):
    key = tuple(COLORS[2, 3].tolist())
    path = save(Image.fromarray(COLORS), tmp_path / "image.png", transparency=key)
    expected = np.where((key == COLORS).all(-1, keepdims=True), 255, COLORS)
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    inks = {
        (0, 255, 255, 0): (255, 0, 0),
        (255, 0, 0, 128): (0, 127, 127),
        (0, 0, 0, 0): 3 * (255,),
    }
    for ink, color in inks.items():
        path = save(Image.new("CMYK", (16, 16), ink), tmp_path / f"image.{suffix}")
        np.testing.assert_allclose(read_image(path), np.full((16, 16, 3), color), atol=3)


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif")])
def test_16_bit_grey_keeps_its_range(tmp_path, mode, suffix):
    values = np.array([[0, 100, 257, 25700], [32767, 45000, 65000, 65535]])
    data = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    path = save(Image.frombytes(mode, (4, 2), data), tmp_path / f"image.{suffix}")
    with Image.open(path) as image:
        assert image.mode == mode
    np.testing.assert_array_equal(read_image(path), grey([[0, 0, 1, 100], [127, 175, 253, 255]]))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.0, 0.25, 1.0], np.float32),
        ([-2.0, -1.0, 2.0], np.float32),
        ([0, 1 << 28, 1 << 30], np.int32),
        ([-20, -10, 20], np.int32),
    ],
)
def test_grey_without_a_fixed_range_is_stretched(tmp_path, values, dtype):
    path = save(Image.fromarray(np.array([values], dtype)), tmp_path / "image.tif")
    np.testing.assert_array_equal(read_image(path), grey([[0, 64, 255]]))


def test_a_constant_float_image_is_black(tmp_path):
    path = save(Image.fromarray(np.full((2, 2), 7, np.float32)), tmp_path / "image.tif")
    np.testing.assert_array_equal(read_image(path), np.zeros((2, 2, 3)))


# --- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_is_read(tmp_path, suffix):
    first, second = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    path = tmp_path / f"image.{suffix}"
    first.save(path, save_all=True, append_images=[second])
    np.testing.assert_allclose(read_image(path), np.asarray(first), atol=4)


def test_a_jpeg_of_several_pictures_as_phones_write_them(tmp_path):
    path = tmp_path / "image.jpg"
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(path, format="MPO", save_all=True, append_images=[second])
    np.testing.assert_allclose(read_image(path), np.asarray(first), atol=3)


def test_content_decides_and_not_the_suffix(tmp_path):
    path = save(Image.fromarray(COLORS), tmp_path / "image.jpg", format="PNG")
    np.testing.assert_array_equal(read_image(str(path)), COLORS)


# Where the standard's "0th row" and "0th column" are on the upright image, as array operations.
STORED = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright.swapaxes(0, 1)[::-1],  # right, top
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path, orientation, suffix):
    upright = np.kron(COLORS, np.ones((16, 16, 1), np.uint8)) if suffix == "jpg" else COLORS
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    path = save(stored, tmp_path / f"image.{suffix}", exif=exif, **lossless.get(suffix, {}))
    np.testing.assert_allclose(read_image(path), upright, atol=4 if suffix == "jpg" else 0)


def test_exif_orientation_of_16_bit_grey(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    values = 257 * STORED[6](GREYS).astype(np.uint16)
    path = save(Image.fromarray(values.copy()), tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(read_image(path), grey(GREYS))


# --- boxes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((2, 1, 5, 4), (1, 4), (2, 5)),
        ((0, 0, 9, 6), (0, 6), (0, 9)),
        ((-3, -2, 4, 3), (0, 3), (0, 4)),
        ((5, 2, 900, 1e6), (2, 6), (5, 9)),
        ((1.6, 0.4, 4.4, 2.6), (0, 3), (2, 4)),
    ],
)
def test_a_box_is_cut_out_of_the_upright_image_and_clipped(tmp_path, box, rows, columns):
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    stored = Image.fromarray(STORED[8](COLORS).copy())
    path = save(stored, tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(read_image(path, box), COLORS[slice(*rows), slice(*columns)])


@pytest.mark.parametrize("box", [(9, 0, 12, 6), (0, -5, 9, 0), (3, 3, 3, 6), (5, 2, 4, 3)])
def test_a_box_without_pixels_is_an_error(tmp_path, box):
    path = save(Image.fromarray(COLORS), tmp_path / "image.png")
    with pytest.raises(BrokenImageError, match=r"image\.png: the box .* no pixel of its 9 x 6"):
        read_image(path, box)


# --- broken files ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif"])
def test_a_truncated_file(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = save(noise, path).read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(BrokenImageError) as error:
        read_image(path)
    assert error.value.path == path
    assert str(error.value) == f"{path}: {error.value.reason}"
    assert isinstance(error.value, InputError)


def test_no_file_a_folder_nothing_and_text(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("<html>404</html>")
    (tmp_path / "folder.png").mkdir()
    reasons = {
        "absent.jpg": "No such file or directory",
        "folder.png": "Is a directory",
        "empty.jpg": "neither JPEG, PNG, WEBP, BMP, GIF nor TIFF",
        "text.png": "neither JPEG, PNG, WEBP, BMP, GIF nor TIFF",
    }
    for name, reason in reasons.items():
        with pytest.raises(BrokenImageError) as error:
            read_image(tmp_path / name)
        assert error.value.reason == reason


def test_other_formats_that_pillow_reads_are_not_touched(tmp_path):
    path = save(Image.fromarray(COLORS), tmp_path / "image.jpg", format="PPM")
    with pytest.raises(BrokenImageError, match="neither JPEG"):
        read_image(path)


@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize("limit", [30, 10])  # Pillow warns of the first, refuses the second
def test_more_pixels_than_are_safe(tmp_path, monkeypatch, action, limit):
    path = save(Image.fromarray(COLORS), tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(BrokenImageError, match=r"image\.png: .*\d+ "):
            read_image(path)


def test_pixels_that_are_not_finite(tmp_path):
    values = np.array([[0, np.nan], [1, 2]], np.float32)
    path = save(Image.fromarray(values), tmp_path / "image.tif")
    with pytest.raises(BrokenImageError, match="not finite"):
        read_image(path)


def test_damage_anywhere_gives_an_image_or_the_one_error(tmp_path):
    generator = np.random.default_rng(1)
    image = Image.fromarray(generator.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    read = broken = 0
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        file = io.BytesIO()
        image.save(file, kind, exif=exif)
        for _ in range(60):
            data = bytearray(file.getvalue())
            if generator.random() < 0.5:
                del data[generator.integers(len(data)) :]
            else:
                for place in generator.integers(min(len(data), 200), size=4):
                    data[place] = generator.integers(256)
            path = tmp_path / "image"
            path.write_bytes(data)
            try:
                assert read_image(path).mode == "RGB"
                read += 1
            except BrokenImageError:
                broken += 1
    assert read > 0
    assert broken > 100


def test_the_error_survives_the_way_from_a_worker(tmp_path):
    error = BrokenImageError(tmp_path / "image.jpg", "truncated")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is BrokenImageError
    assert (copy.path, copy.reason, str(copy)) == (error.path, error.reason, str(error))
