"""Reading an image file, whatever its mode, as upright 8-bit RGB."""

from __future__ import annotations

import errno
import math
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from abe.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_BYTES = 2**29  # of a file; 8-bit RGBA of Pillow's most pixels takes less
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
T = TypeVar("T")

# Of files or images that exceed these, a process has one in memory at a time.
_LARGE_BYTES = 2**26
_LARGE_PIXELS = 2**24
_ONE_LARGE = threading.RLock()
_STRIP = 2**20  # pixels
# Other errors (no memory, no more open files, a failing disk) say nothing of the file.
_OF_THE_FILE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EINVAL,  # an offset of a damaged file
    errno.EOVERFLOW,
}


class BrokenImageError(InputError):
    """An image file that cannot be read.

    Attributes:
        path: the file.
        reason: why.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = printable(reason)

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


class ReadingError(OSError):
    """A file cannot be read for a reason that says nothing of it and may pass."""

    def __str__(self) -> str:
        return f"{printable(self.filename)}: {self.strerror}"


def printable(text: object) -> str:
    r"""What a terminal would obey or cannot show, escaped: a line break is "\n"."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


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
        BrokenImageError: there is no such file, it may not be read, it is no image, truncated, or
            larger than `MAX_BYTES` or `PIL.Image.MAX_IMAGE_PIXELS`; its grey has no known range;
            nothing is left of the box.
        ReadingError: it cannot be read now, because of the disk, say.
        MemoryError: there is too little memory for it.
    """
    return use_image(path, box, lambda image: image)


def use_image(path: str | PathLike[str], box: Box | None, use: Callable[[Image.Image], T]) -> T:
    """Decode an image as `read_image` does, and make something smaller of it.

    While that lasts, no other thread decodes an image if both are large.
    """
    with ExitStack() as held:
        return use(_read(path, box, held))


def _read(path: str | PathLike[str], box: Box | None, held: ExitStack) -> Image.Image:
    """The image; `held` gets the lock of large ones if it is one."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise ValueError("a pipe, which would be waited for, a socket or a device")
        if found.st_size > MAX_BYTES:
            raise ValueError(
                f"{found.st_size / 2**20:,.0f} MiB are more than the {MAX_BYTES / 2**20:.0f} that "
                "an image may take"
            )
        if found.st_size > _LARGE_BYTES:
            held.enter_context(_ONE_LARGE)
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels are more than the "
                    f"{Image.MAX_IMAGE_PIXELS} that are safe to decode"
                )
            if pixels > _LARGE_PIXELS:
                held.enter_context(_ONE_LARGE)
            image.load()
            _turn(image)
            rgb = _to_rgb(image)
        return rgb if box is None else _cut(rgb, box)
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        reason = _reason(path, error)
    raise BrokenImageError(Path(path), reason)


def _turn(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF
        return


def _to_rgb(image: Image.Image) -> Image.Image:
    deep = image.mode == "F" or image.mode.startswith("I")
    if not deep and not image.has_transparency_data:
        return image.convert("RGB")
    white = _white(image) if deep else None
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(_over_white(strip) if white is None else _to_8_bits(strip, white), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Parts of the image, each with its top: arrays of a whole one would take a gigabyte."""
    rows = -(-_STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _white(image: Image.Image) -> int:
    """The value of white in grey of more than 8 bits."""
    if image.mode.startswith("I;16"):
        return 65535
    arrays = (np.asarray(strip) for _, strip in _strips(image))
    lows, highs = zip(*((values.min(), values.max()) for values in arrays), strict=True)
    low, high = np.min(lows), np.max(highs)
    for white in (1, 255, 65535):
        if low >= 0 and high <= white:
            return white
    raise ValueError(
        f"grey from {low:g} to {high:g} has no known range: save it with 8 or 16 bits a pixel"
    )


def _to_8_bits(image: Image.Image, white: int) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    grey = (values * (255 / white)).round().astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _cut(image: Image.Image, box: Box) -> Image.Image:
    x1, y1, x2, y2 = (round(edge) for edge in box)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, image.width), min(y2, image.height)
    if left >= right or top >= bottom:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"the box {x1},{y1},{x2},{y2} holds none of its {size} pixels")
    return image.crop((left, top, right, bottom))


def _reason(path: str | PathLike[str], error: Exception) -> str:
    """Why a file cannot be read.

    Raises:
        MemoryError: it is not because of the file.
        ReadingError: the same.
    """
    if isinstance(error, MemoryError):
        raise MemoryError(f"{printable(path)}: too little memory to decode it") from None
    if isinstance(error, UnidentifiedImageError):
        return f"damaged, or neither {', '.join(FORMATS[:-1])} nor {FORMATS[-1]}"
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno not in _OF_THE_FILE:
            raise ReadingError(error.errno, error.strerror, os.fspath(path)) from None
        return error.strerror or type(error).__name__
    return str(error) or type(error).__name__
