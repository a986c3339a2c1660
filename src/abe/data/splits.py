"""From a data configuration to the class-disjoint sets of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from abe.config import DataConfig
from abe.data.datasets import LabelledImages, check_images, open_dataset, split_by_class
from abe.data.loader import cache_decoded
from abe.data.synthetic import SyntheticVehicles
from abe.errors import InputError


@dataclass(frozen=True)
class Splits:
    """The images to learn from, to select by, and to report on; no class is in two of them.

    Attributes:
        select: what the protocol picks the checkpoint by: held-out training classes under "val";
            under "paper" the test images themselves, which is selection on the test set.
        skipped: files left out because they cannot be read.
    """

    name: str
    train: LabelledImages
    select: LabelledImages
    test: LabelledImages
    skipped: int = 0

    def describe(self) -> dict[str, str | int]:
        """Name and sizes, for the record."""
        sizes: dict[str, str | int] = {"name": self.name, "skipped": self.skipped}
        for part in ("train", "select", "test"):
            images: LabelledImages = getattr(self, part)
            sizes[f"{part}_images"] = len(images)
            sizes[f"{part}_classes"] = len(np.unique(images.labels))
        return sizes


def open_splits(config: DataConfig, protocol: Literal["val", "paper"]) -> Splits:
    """Open the images that a configuration names and split them by class.

    The classes held out under "val" are drawn once for a given number of training classes, the
    same for every seed of a run, so that runs are selected by the same images.

    Raises:
        InputError: no such data, files that cannot be read, or too few classes to split.
    """
    skipped = 0
    images: LabelledImages
    if config.source == "synthetic":
        images = SyntheticVehicles(
            config.synthetic_classes, config.synthetic_images, size=config.resize
        )
        train, test = split_by_class(images, config.split_classes)
    else:
        files, split = open_dataset(config.source)
        kept = check_images(files, skip_broken=config.skip_broken)
        skipped = len(files) - len(kept)
        if split is None:
            train, test = split_by_class(files.select(kept), config.split_classes)
        else:
            train = files.select(kept[split[kept] == "train"])
            test = files.select(kept[split[kept] == "test"])
        images = files
    if config.cache:
        train, test = cache_decoded(train, config.resize), cache_decoded(test, config.resize)
    name = images.name
    if protocol == "paper":
        return Splits(name, train, test, test, skipped)
    classes = np.unique(train.labels)
    held_out = round(config.val_classes * len(classes))
    if held_out < 2 or len(classes) - held_out < 2:
        raise InputError(
            f"{name}: {len(classes)} training classes are too few to hold out "
            f"data.val_classes={config.val_classes} of them and keep 2 on either side: "
            "use another share, more classes, or --set protocol=paper"
        )
    chosen = np.random.default_rng(0).choice(classes, held_out, replace=False)
    is_held_out = np.isin(train.labels, chosen)
    return Splits(
        name,
        train.select(np.flatnonzero(~is_held_out)),
        train.select(np.flatnonzero(is_held_out)),
        test,
        skipped,
    )
