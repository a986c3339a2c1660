"""The images of a classification: those to learn from, and some of each class to measure by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from abe.config import PretrainConfig
from abe.data.datasets import LabelledImages
from abe.data.decode import printable
from abe.data.splits import images_digest, open_images
from abe.errors import InputError


@dataclass(frozen=True, eq=False)
class ClassImages:
    """The images of all classes, to learn from and to measure by; classes are 0 to C - 1."""

    learned: LabelledImages
    held_out: LabelledImages
    class_of: Tensor
    """int64: label -> class."""
    num_classes: int
    skipped: int

    @cached_property
    def digest(self) -> str:
        """See `images_digest`: of those learned and those held out."""
        return images_digest([self.learned], [self.held_out])

    def describe(self) -> dict[str, Any]:
        """Name, sizes and digest, for the record."""
        return {
            "name": printable(self.learned.name),
            "classes": self.num_classes,
            "learned_images": len(self.learned),
            "held_out_images": len(self.held_out),
            "skipped": self.skipped,
            "digest": self.digest,
        }


def class_indices(labels: np.ndarray) -> Tensor:
    """Classes 0 to C - 1 of labels (N,), in their order: label -> class, -1 where there is none."""
    found = np.unique(labels)
    indices = torch.full((int(found.max()) + 1,), -1)
    indices[torch.as_tensor(found)] = torch.arange(len(found))
    return indices


def open_classes(config: PretrainConfig, console: Console | None = None) -> ClassImages:
    """Open the images and hold some of each class out.

    They are `held_out` of a class, a fifth at most and one at least, drawn from the seed. A
    division into training and test images is not looked at.

    Raises:
        InputError: as `open_images`, or a class has a single image.
    """
    images, *_, skipped = open_images(config.data, console)
    labels, of_image, sizes = np.unique(images.labels, return_inverse=True, return_counts=True)
    if singles := [images.class_names[label] for label in labels[sizes == 1]]:
        raise InputError(
            f"{printable(images.name)} has classes with a single image ({len(singles)} of "
            f"{len(labels)}), of which none is left to learn from where one is held out; add one "
            "to each, or leave them out:\n" + "\n".join(map(printable, singles))
        )
    rng = np.random.default_rng(config.seed)
    of_class = np.split(np.argsort(of_image, kind="stable"), np.cumsum(sizes)[:-1])
    held_out = np.concatenate(
        [
            rng.choice(members, min(config.held_out, max(1, len(members) // 5)), replace=False)
            for members in of_class
        ]
    )
    return ClassImages(
        images.select(np.setdiff1d(np.arange(len(images)), held_out)),
        images.select(np.sort(held_out)),
        class_indices(images.labels),
        len(labels),
        skipped,
    )
