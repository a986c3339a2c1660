"""From a data configuration to the class-disjoint sets of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress

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


def open_splits(
    config: DataConfig, protocol: Literal["val", "paper"], console: Console | None = None
) -> Splits:
    """Open the images that a configuration names and split them by class.

    The classes held out under "val" are drawn once for a given number of training classes, the
    same for every seed of a run, so that runs are selected by the same images.

    Args:
        config: which images, and how to split them.
        protocol: what the checkpoint is picked by.
        console: where to show how many images are read; None for nowhere.

    Raises:
        InputError: no such data, files that cannot be read, or too few classes to split.
    """
    images: LabelledImages
    split = None
    if config.source == "synthetic":
        images = SyntheticVehicles(
            config.synthetic_classes, config.synthetic_images, size=config.resize
        )
    else:
        images, split = open_dataset(config.source)
    count, labels = len(images), images.labels
    with Progress(console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task("reading images", total=count)

        def on_progress(done: int) -> None:
            progress.update(task, completed=done)

        if config.cache:
            images = cache_decoded(
                images, config.resize, skip_broken=config.skip_broken, on_progress=on_progress
            )
        elif config.source != "synthetic":
            images = images.select(
                check_images(images, config.skip_broken, on_progress=on_progress)
            )
    name, skipped = images.name, count - len(images)
    if split is None:
        train, test = split_by_class(images, config.split_classes)
    else:
        is_train = np.isin(images.labels, labels[split == "train"])
        train = images.select(np.flatnonzero(is_train))
        test = images.select(np.flatnonzero(~is_train))
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
