"""Reading an image file, whatever its mode, as upright 8-bit RGB."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from abe.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels


class BrokenImageError(InputError):
    """An image file that cannot be read.

    Attributes:
        path: the file.
        reason: why.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_image(path: str | PathLike[str], box: Box | None = None) -> Image.Image:
    """Decode an image, turn it as its EXIF orientation says, and cut out a box.

    Transparency is laid over white, 16-bit grey becomes 8-bit by rounding pixel / 257, and grey
    without a fixed range (32-bit integers, floats) is stretched from its minimum and maximum to 0
    and 255. Of several frames the first is read.

    Args:
        path: a JPEG, PNG, WebP, BMP, GIF or TIFF file.
        box: x1, y1, x2, y2 in pixels of the upright image, clipped to it; None for all of it.

    Returns:
        The image in mode RGB.

    Raises:
        BrokenImageError: there is no such file, it is no image, truncated, or larger than
            `PIL.Image.MAX_IMAGE_PIXELS`; or nothing is left of the box.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise BrokenImageError(
                    path,
                    f"{image.width} x {image.height} pixels are more than the "
                    f"{Image.MAX_IMAGE_PIXELS} that are safe to decode",
                )
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
    except BrokenImageError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise BrokenImageError(path, _reason(error)) from None
    return rgb if box is None else _cut(rgb, box, path)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        return _grey(_stretch(np.asarray(image, np.float64)))
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image, np.uint16) / 257)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _stretch(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        raise ValueError("some pixels are not finite")
    return (values - low) * (255 / (high - low or 1))


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


def _cut(image: Image.Image, box: Box, path: Path) -> Image.Image:
    x1, y1, x2, y2 = (round(edge) for edge in box)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, image.width), min(y2, image.height)
    if left >= right or top >= bottom:
        size = f"{image.width} x {image.height}"
        raise BrokenImageError(path, f"the box {x1},{y1},{x2},{y2} holds no pixel of its {size}")
    return image.crop((left, top, right, bottom))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"neither {', '.join(FORMATS[:-1])} nor {FORMATS[-1]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
