"""From a data set to batches of uint8 images, the same for any number of worker processes.

Shapes: B images of H = W = `preprocessing.crop` pixels, N images in a data set.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from abe.data.datasets import LabelledImages, check_images
from abe.data.transforms import Preprocessing, center_crop, pad_to_square, random_crop_and_flip
from abe.errors import InputError
from abe.ranks import Part, share
from abe.runtime import available_memory


class Batch(NamedTuple):
    """Images as they leave the loader."""

    images: Tensor
    """uint8 RGB, (B, 3, H, W) in channels-last memory; of a part of the batch, the part's."""
    labels: Tensor
    """int64, (B,), of the whole batch."""
    indices: Tensor
    """int64, (B,), of the whole batch: where in the data set."""


class BatchSampler(Protocol):
    """What the samplers of `abe.data.samplers` have in common."""

    def batch(self, step: int) -> np.ndarray:
        """Indices of the images of a step; -> (B,)."""
        ...


@runtime_checkable
class PaddedSquares(Protocol):
    """A data set that has padded squares at hand, or makes them itself."""

    def square(self, index: int, side: int) -> np.ndarray:
        """What `pad_to_square` makes of the image, read-only; -> uint8 (side, side, 3)."""
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
    pin_memory: bool = False,
    part: Part = (0, 1),
) -> Iterator[Batch]:
    """The batches of steps `start_step` to `stop_step - 1`, randomly cropped and flipped.

    The crop of an image depends on the seed, the step and its place in the batch alone, so neither
    the number of workers nor the step that a run is resumed from changes a pixel, nor how many
    processes share a batch: one of them gives its `part`, and loads the images of that alone.
    Workers are two batches each ahead; `pin_memory` puts those where a CUDA device can fetch them
    by itself.

    Raises:
        InputError: an image cannot be read.
        MemoryError: there is too little memory for one.
        OSError: one cannot be read now, because of the disk, say.
    """
    batches = _Batches(images.labels, _padded(images), sampler, preprocessing, seed, part)
    return _load(batches, range(start_step, stop_step), workers, pin_memory)


def evaluation_batches(
    images: LabelledImages,
    preprocessing: Preprocessing,
    batch_size: int = 64,
    workers: int = 0,
    pin_memory: bool = False,
    part: Part = (0, 1),
) -> Iterator[Batch]:
    """All images in order by their centre crops; the last batch may be smaller.

    Given a `part`, its share of the batches: the same ones that a single process has.

    Raises:
        InputError: an image cannot be read.
        MemoryError: there is too little memory for one.
        OSError: one cannot be read now, because of the disk, say.
    """
    sampler = _InOrder(len(images), batch_size)
    batches = _Batches(images.labels, _padded(images), sampler, preprocessing)
    count = -(-len(images) // batch_size)
    return _load(batches, range(count)[share(count, part)], workers, pin_memory)


@dataclass(frozen=True, eq=False)
class CachedImages:
    """A data set whose padded squares are in memory, made by `cache_decoded`.

    `load` still gives the image as the source has it.
    """

    source: LabelledImages
    squares: np.ndarray
    """uint8, (N, side, side, 3), of all images that were read; selections share it."""
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
        """As the source's."""
        return self.source.load(index)

    def square(self, index: int, side: int) -> np.ndarray:
        """The square in memory, or one made of the image if another side is wanted."""
        if side == self.squares.shape[1]:
            return self.squares[self.rows[index]]
        return _padded(self.source).square(index, side)

    def describe(self, index: int) -> str:
        """As the source's."""
        return self.source.describe(index)

    def select(self, indices: np.ndarray) -> Self:
        """A part of the images, on the same memory."""
        return replace(self, source=self.source.select(indices), rows=self.rows[indices])


def cache_decoded(
    images: LabelledImages,
    side: int,
    *,
    skip_broken: bool = False,
    on_progress: Callable[[int], None] = lambda done: None,
) -> CachedImages:
    """Read every image once, into a padded square of `side` pixels: 3 * side * side bytes each.

    Takes the place of `check_images`: the same errors, and the same images left out if
    `skip_broken`. Worker processes that are forked share the squares, those that are spawned (on
    macOS and Windows) get a copy each.

    Raises:
        InputError: as `check_images`, or the squares do not fit into memory.
        MemoryError: as `check_images`.
        ReadingError: as `check_images`.
    """
    shape = (len(images), side, side, 3)
    needed, free = math.prod(shape), available_memory()
    try:
        if needed > free:  # the system promises more than it has
            raise MemoryError
        squares = np.empty(shape, np.uint8)
    except MemoryError:
        raise InputError(
            f"data.cache: {len(images)} images of {side} x {side} pixels take "
            f"{needed / 1e9:,.1f} GB of memory, more than is free: set data.cache=false, or "
            "prepare them once by `abe data prepare`"
        ) from None

    source = _padded(images)

    def read(index: int) -> None:
        squares[index] = source.square(index, side)

    kept = check_images(images, skip_broken, read=read, on_progress=on_progress)
    return CachedImages(images.select(kept), squares, kept)


@dataclass(frozen=True)
class _InOrder:
    """The sampler of `evaluation_batches`."""

    size: int
    batch_size: int

    def batch(self, step: int) -> np.ndarray:
        first = step * self.batch_size
        return np.arange(first, min(first + self.batch_size, self.size))


@dataclass(frozen=True, eq=False)
class _Batches(Dataset["Batch | Exception"]):
    """A sampler's batches by step: random crops, or the centre crops if there is no seed.

    An error is handed over as a value: torch would turn one that a worker raises into another,
    whose message is a traceback.
    """

    labels: np.ndarray
    squares: PaddedSquares
    sampler: BatchSampler
    preprocessing: Preprocessing
    seed: int | None = None
    part: Part = (0, 1)

    def __getitem__(self, step: int) -> Batch | Exception:
        indices = self.sampler.batch(step)
        places = range(len(indices))[share(len(indices), self.part)]
        crop = self.preprocessing.crop
        images = np.empty((len(places), crop, crop, 3), np.uint8)
        try:
            for row, place in enumerate(places):
                images[row] = self._crop(int(indices[place]), step, place)
        except (InputError, MemoryError, OSError) as error:
            return error
        return Batch(
            torch.from_numpy(images).permute(0, 3, 1, 2),
            torch.from_numpy(self.labels[indices]),
            torch.from_numpy(indices),
        )

    def _crop(self, index: int, step: int, place: int) -> np.ndarray:
        square = self.squares.square(index, self.preprocessing.resize)
        if self.seed is None:
            return center_crop(square, self.preprocessing.crop)
        # A spawn key, where a longer seed might repeat the sampler's numbers: zeros at its end
        # change nothing.
        entropy = np.random.SeedSequence(self.seed, spawn_key=(step, place))
        rng = np.random.default_rng(entropy)
        return random_crop_and_flip(square, self.preprocessing.crop, rng)


@dataclass(frozen=True, eq=False)
class _Padding:
    """The squares of images that are padded when they are asked for."""

    images: LabelledImages

    def square(self, index: int, side: int) -> np.ndarray:
        return pad_to_square(self.images.load(index), side)


def _padded(images: LabelledImages) -> PaddedSquares:
    return images if isinstance(images, PaddedSquares) else _Padding(images)


def _load(batches: _Batches, steps: range, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """The batches of these steps; with workers, each of them makes whole batches ahead of time."""
    loader = DataLoader(
        batches,
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        generator=torch.Generator(),  # leaves the global random state alone
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    """Ctrl-C and `timeout` signal a whole group of processes: the main one answers, and saves.

    Where it does not, the thread that hands tensors over to it would print that as an exception.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    sys.excepthook = lambda *exception: None
