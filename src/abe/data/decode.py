"""Reading an image file, whatever its mode, as upright 8-bit RGB."""

from __future__ import annotations

import contextlib
import math
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

    Transparency is laid over white. 16-bit grey is divided by 257. Grey of 32 bits, whole or
    floating-point, has white at 1, 255 or 65535: the first that no pixel exceeds. Of several frames
    the first is read. Damaged EXIF is passed over.

    Args:
        path: a JPEG, PNG, WebP, BMP, GIF or TIFF file.
        box: x1, y1, x2, y2 in pixels of the upright image, rounded and clipped to it; None for all
            of it.

    Returns:
        The image in mode RGB.

    Raises:
        BrokenImageError: there is no such file, it is no image, truncated, or larger than
            `PIL.Image.MAX_IMAGE_PIXELS`; its grey has no known range; nothing is left of the box.
    """
    try:
        if Path(path).is_fifo():
            raise ValueError("a pipe, which would be waited for")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels are more than the "
                    f"{Image.MAX_IMAGE_PIXELS} that are safe to decode"
                )
            image.load()
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
        return rgb if box is None else _cut(rgb, box)
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        reason = _reason(error)
    raise BrokenImageError(Path(path), reason)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()
    ranges = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
    white = next((white for white in ranges if low >= 0 and high <= white), None)
    if white is None:
        raise ValueError(
            f"grey from {low:g} to {high:g} has no known range: save it with 8 or 16 bits a pixel"
        )
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _cut(image: Image.Image, box: Box) -> Image.Image:
    x1, y1, x2, y2 = (round(edge) for edge in box)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, image.width), min(y2, image.height)
    if left >= right or top >= bottom:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"the box {x1},{y1},{x2},{y2} holds none of its {size} pixels")
    return image.crop((left, top, right, bottom))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"damaged, or neither {', '.join(FORMATS[:-1])} nor {FORMATS[-1]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
