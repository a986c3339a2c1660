"""Section 4's preprocessing: pad to a square, crop, flip, and what the weights want of pixels.

Images are uint8 RGB arrays (H, W, 3) until a batch of them reaches the device; only there are they
turned into what the network was trained on (`Preprocessing.normalize`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from abe.errors import InputError

_Number = Annotated[float, Field(strict=True)]
_Factor = Annotated[float, Field(strict=True, gt=0)]
_Pixels = Annotated[int, Field(strict=True)]


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of an image; it travels with its weights.

    The network's input is `(pixel - mean) * scale` with pixels 0..255, in the order of `channels`.
    The defaults are those of Caffe's ImageNet weights.

    Attributes:
        channels: order of the network's input channels.
        mean: subtracted, by channel.
        scale: multiplied with, one for all channels or one for each.
        resize: side of the padded square, pixels.
        crop: side of the part that the network sees, pixels.

    Raises:
        InputError: `crop` is below 1 or larger than `resize`.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", allow_inf_nan=False)

    channels: Literal["RGB", "BGR"] = "BGR"
    mean: tuple[_Number, _Number, _Number] = (104.0, 117.0, 123.0)
    scale: _Factor | tuple[_Factor, _Factor, _Factor] = 1.0
    resize: _Pixels = 256
    crop: _Pixels = 224

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise InputError(
                f"data.crop={self.crop} does not fit into data.resize={self.resize}: "
                "make the crop the smaller one"
            )

    def normalize(self, images: Tensor) -> Tensor:
        """Turn RGB pixels into the network's input; uint8 (B, 3, H, W) -> float32 (B, 3, H, W).

        Runs on the images' device and keeps their memory format.
        """
        if self.channels == "BGR":
            images = images.flip(1)
        mean = torch.tensor(self.mean, dtype=torch.float32, device=images.device)
        scale = torch.tensor(self.scale, dtype=torch.float32, device=images.device)
        return (images - mean.view(3, 1, 1)) * scale.view(-1, 1, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values; keys that are missing keep their defaults.

        Raises:
            InputError: an unknown key, or a value that does not fit.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            reasons: dict[str, list[str]] = {}  # several for a value of which two types fit none
            for item in error.errors():
                where = "".join(f"{key}={values[str(key)]!r}: " for key in item["loc"][:1])
                reasons.setdefault(where, []).append(item["msg"].removeprefix("Value error, "))
            problems = (where + " or ".join(messages) for where, messages in reasons.items())
            raise InputError(f"preprocessing: {'; '.join(problems)}") from None


def pad_to_square(image: Image.Image, side: int) -> np.ndarray:
    """Scale the longer side to `side`, keep the aspect, pad with black; -> (side, side, 3) uint8.

    Section 4, which leaves open the filter (here bilinear with antialiasing), the padding's colour
    and its place (the image is centred; an odd pixel is padded at the bottom or right).
    """
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    return square


def random_crop_and_flip(image: np.ndarray, crop: int, rng: np.random.Generator) -> np.ndarray:
    """Training: a random crop, flipped horizontally half the time; (H, W, 3) -> (crop, crop, 3)."""
    top, left = (int(rng.integers(length - crop + 1)) for length in image.shape[:2])
    part = image[top : top + crop, left : left + crop]
    if rng.random() < 0.5:
        # Twenty times as fast as a copy of part[:, ::-1], which NumPy makes pixel by pixel.
        return torch.from_numpy(part.copy()).flip(1).numpy()
    return part


def center_crop(image: np.ndarray, crop: int) -> np.ndarray:
    """Testing: the middle; (H, W, 3) -> (crop, crop, 3)."""
    top, left = ((length - crop) // 2 for length in image.shape[:2])
    return image[top : top + crop, left : left + crop]
