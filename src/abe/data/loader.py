"""From a data set to batches of uint8 images, the same for any number of worker processes.

Shapes: B images of H = W = `preprocessing.crop` pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from abe.data.datasets import LabelledImages
from abe.data.transforms import Preprocessing, center_crop, pad_to_square, random_crop_and_flip
from abe.errors import InputError


class Batch(NamedTuple):
    """Images as they leave the loader."""

    images: Tensor
    """uint8 RGB, (B, 3, H, W) in channels-last memory."""
    labels: Tensor
    """int64, (B,)."""
    indices: Tensor
    """int64, (B,): where in the data set."""


class BatchSampler(Protocol):
    """What the samplers of `abe.data.samplers` have in common."""

    def batch(self, step: int) -> np.ndarray:
        """Indices of the images of a step."""
        ...


def training_batches(
    images: LabelledImages,
    sampler: BatchSampler,
    preprocessing: Preprocessing,
    *,
    seed: int,
    start_step: int,
    stop_step: int,
    workers: int = 0,
) -> Iterator[Batch]:
    """The batches of steps `start_step` to `stop_step - 1`, randomly cropped and flipped.

    The crop of an image depends on the seed, the step and its place in the batch alone.

    Raises:
        InputError: an image cannot be read.
    """
    batches = (
        [_Draw(int(index), (seed, step, place)) for place, index in enumerate(sampler.batch(step))]
        for step in range(start_step, stop_step)
    )
    yield from _load(images, preprocessing, batches, workers)


def evaluation_batches(
    images: LabelledImages, preprocessing: Preprocessing, batch_size: int = 64, workers: int = 0
) -> Iterator[Batch]:
    """All images in order by their centre crops; the last batch may be smaller.

    Raises:
        InputError: an image cannot be read.
    """
    batches = (
        [_Draw(index) for index in range(first, min(first + batch_size, len(images)))]
        for first in range(0, len(images), batch_size)
    )
    yield from _load(images, preprocessing, batches, workers)


@dataclass(frozen=True, eq=False)
class CachedImages:
    """A data set that keeps its padded squares in memory, made by `cache_decoded`."""

    source: LabelledImages
    squares: np.ndarray
    """uint8, (N, side, side, 3), shared by all selections."""
    rows: np.ndarray
    """int64, (len(self),): where in `squares`."""

    @property
    def name(self) -> str:
        """As the source's."""
        return self.source.name

    @property
    def labels(self) -> np.ndarray:
        """As the source's."""
        return self.source.labels

    @property
    def class_names(self) -> Sequence[str]:
        """As the source's."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Image.Image:
        """The image as the source has it."""
        return self.source.load(index)

    def describe(self, index: int) -> str:
        """As the source's."""
        return self.source.describe(index)

    def select(self, indices: np.ndarray) -> Self:
        """A part of the images, on the same memory."""
        return replace(self, source=self.source.select(indices), rows=self.rows[indices])


def cache_decoded(images: LabelledImages, side: int) -> CachedImages:
    """Decode every image once, to padded squares of `side` pixels: 3 * side * side bytes each.

    Raises:
        InputError: an image cannot be read.
    """
    squares = np.empty((len(images), side, side, 3), np.uint8)
    for index in range(len(images)):
        squares[index] = pad_to_square(images.load(index), side)
    return CachedImages(images, squares, np.arange(len(images)))


class _Draw(NamedTuple):
    """One image of a batch: where it is, and the seed of its crop; none for the centre crop."""

    index: int
    crop_seed: tuple[int, int, int] | None = None


class _Crops(Dataset[np.ndarray]):
    """The crops that draws ask for; an unreadable image comes back as its error."""

    def __init__(self, images: LabelledImages, preprocessing: Preprocessing) -> None:
        self.images = images
        self.preprocessing = preprocessing

    def __getitem__(self, draw: _Draw) -> np.ndarray | InputError:
        try:
            square = self._square(draw.index)
        except InputError as error:
            return error
        if draw.crop_seed is None:
            return center_crop(square, self.preprocessing.crop)
        rng = np.random.default_rng(draw.crop_seed)
        return random_crop_and_flip(square, self.preprocessing.crop, rng)

    def _square(self, index: int) -> np.ndarray:
        side = self.preprocessing.resize
        if isinstance(self.images, CachedImages) and self.images.squares.shape[1] == side:
            square: np.ndarray = self.images.squares[self.images.rows[index]]
            return square
        return pad_to_square(self.images.load(index), side)


def _collate(crops: list[np.ndarray | InputError]) -> Tensor | InputError:
    for crop in crops:
        if isinstance(crop, InputError):
            return crop
    stacked = torch.from_numpy(np.stack(crops))  # (B, H, W, 3)
    return stacked.permute(0, 3, 1, 2)


def _load(
    images: LabelledImages,
    preprocessing: Preprocessing,
    batches: Iterable[list[_Draw]],
    workers: int,
) -> Iterator[Batch]:
    draws = list(batches)
    loader = DataLoader(
        _Crops(images, preprocessing),
        batch_sampler=draws,
        num_workers=workers,
        collate_fn=_collate,
    )
    for batch, loaded in zip(draws, loader, strict=True):
        if isinstance(loaded, InputError):
            raise loaded
        indices = torch.tensor([draw.index for draw in batch])
        yield Batch(loaded, torch.as_tensor(images.labels)[indices], indices)
