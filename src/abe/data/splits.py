"""From a data configuration to the class-disjoint sets of a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Console

from abe.config import DataConfig, Protocol
from abe.data.benchmarks import BENCHMARKS, Copy, benchmark_of, find_benchmark
from abe.data.datasets import (
    ImageFiles,
    LabelledImages,
    Source,
    check_images,
    open_dataset,
    split_by_class,
)
from abe.data.loader import cache_decoded
from abe.data.prepare import PreparedImages, is_prepared, open_prepared
from abe.data.synthetic import SyntheticVehicles
from abe.errors import InputError
from abe.metrics import KS
from abe.progress import progress


@dataclass(frozen=True)
class Splits:
    """The images to learn from, to select by, and to report on; no class is in two of them.

    Attributes:
        select: what the protocol picks the checkpoint by: held-out training classes under "val"
            and "both"; under "paper" the test images themselves, which is selection on the test
            set.
        skipped: files left out because they cannot be read.
        gallery: what the test images, as queries, are compared with; None: with each other.
        ks: the K of Recall@K on the test images.
        stamps: what every result has to say of the data, such as "partial, 12 of 11,788"; files of
            a benchmark that were left out count as missing.
    """

    name: str
    train: LabelledImages
    select: LabelledImages
    test: LabelledImages
    skipped: int = 0
    gallery: LabelledImages | None = None
    ks: tuple[int, ...] = KS
    stamps: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """12 hexadecimal digits of the images to learn from, to test and to search in.

        Of their classes and file names, wherever the files are; it is the same for all protocols.
        """
        return images_digest(self._learned, [self.test], [self.gallery] if self.gallery else [])

    @cached_property
    def test_order(self) -> str:
        """12 hexadecimal digits of the test images' file names, in their order."""
        names = (os.path.basename(self.test.describe(i)) for i in range(len(self.test)))
        return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:12]

    @property
    def learned_classes(self) -> list[str]:
        """Names of the classes that are learned from or, but for "paper", selected by."""
        return [
            images.class_names[label]
            for images in self._learned
            for label in np.unique(images.labels)
        ]

    @property
    def _learned(self) -> list[LabelledImages]:
        return [self.train] if self.select is self.test else [self.train, self.select]

    @property
    def select_gallery(self) -> LabelledImages | None:
        """What the images to select by are compared with; None: with each other."""
        return self.gallery if self.select is self.test else None

    def describe(self) -> dict[str, Any]:
        """Name, sizes and stamps, for the record."""
        facts: dict[str, Any] = {"name": self.name, "skipped": self.skipped}
        for part in ("train", "select", "test", "gallery"):
            images: LabelledImages | None = getattr(self, part)
            if images is not None:
                facts[f"{part}_images"] = len(images)
                facts[f"{part}_classes"] = len(np.unique(images.labels))
        if self.stamps:
            facts["stamps"] = list(self.stamps)
        return facts


def images_digest(*parts: Sequence[LabelledImages]) -> str:
    """12 hexadecimal digits of the classes and file names in each of the parts, in any order."""
    found = hashlib.sha256()
    for part in parts:
        names = sorted(
            f"{images.class_names[label]}/{os.path.basename(images.describe(index))}"
            for images in part
            for index, label in enumerate(images.labels)
        )
        found.update("\n".join([*names, "\n"]).encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:12]


def open_splits(
    config: DataConfig,
    protocol: Protocol,
    console: Console | None = None,
    *,
    check: bool = True,
) -> Splits:
    """Open the images that a configuration names and split them by class: see `split_images`.

    Args:
        config: which images, and how to split them.
        protocol: what the checkpoint is picked by.
        console: where to show how many images are read; None for nowhere.
        check: read every file before any is used; without it a broken one is met later. Files are
            read anyway where the broken ones are to be left out.

    Raises:
        InputError: no such data, a copy of a benchmark that is not complete, files that cannot be
            read, or too few classes to split.
    """
    return split_images(open_images(config, console, check=check), config, protocol)


def split_images(source: Source, config: DataConfig, protocol: Protocol) -> Splits:
    """Split images by class, as they say themselves or else the first from the others.

    The classes held out but under "paper", 2 at least, are drawn once for a given number of
    training classes, the same for every seed of a run, so that runs are selected by the same
    images.

    Raises:
        InputError: there are too few classes.
    """
    images, split, ks, stamps, skipped = source
    gallery = None
    if split is None:
        train, test = split_by_class(images, config.split_classes)
    else:
        train = images.select(np.flatnonzero(split == "train"))
        test = images.select(np.flatnonzero((split == "test") | (split == "query")))
        if "gallery" in split:
            gallery = images.select(np.flatnonzero(split == "gallery"))
    splits = Splits(
        images.name, train, test, test, skipped, gallery, tuple(ks or KS), tuple(stamps)
    )
    if protocol == "paper":
        return splits
    classes = np.unique(train.labels)
    held_out = max(2, round(config.val_classes * len(classes)))
    if len(classes) - held_out < 2:
        raise InputError(
            f"{images.name}: {len(classes)} training classes are too few to hold out "
            f"data.val_classes={config.val_classes} of them and keep 2 on either side: "
            "use a smaller share, more classes, or --set protocol=paper"
        )
    chosen = np.random.default_rng(0).choice(classes, held_out, replace=False)
    is_held_out = np.isin(train.labels, chosen)
    return replace(
        splits,
        train=train.select(np.flatnonzero(~is_held_out)),
        select=train.select(np.flatnonzero(is_held_out)),
    )


def unseen(source: Source, learned: Collection[str]) -> Splits | None:
    """All classes as the test but those of some names; None if fewer than 2 are left.

    Args:
        source: images that are not split themselves.
        learned: names of classes.
    """
    images = source.images
    known = [name in learned for name in images.class_names]
    rows = np.flatnonzero(~np.array(known)[images.labels])
    if len(np.unique(images.labels[rows])) < 2:
        return None
    test, none = images.select(rows), images.select(rows[:0])
    ks, stamps = tuple(source.ks or KS), tuple(source.stamps)
    return Splits(images.name, none, test, test, source.skipped, None, ks, stamps)


def open_images(
    config: DataConfig, console: Console | None = None, *, check: bool = True
) -> Source:
    """Open the images that a configuration names, those left out that cannot be read.

    The arguments and errors are those of `open_splits`.
    """
    source = open_source(config)
    images, split, ks, stamps, skipped = source
    count = len(images)
    kept = np.arange(count)
    with progress(console, "reading images", count) as on_progress:
        if config.cache and not isinstance(images, PreparedImages):  # those are in memory as it is
            images = cached = cache_decoded(
                images, config.resize, skip_broken=config.skip_broken, on_progress=on_progress
            )
            kept = cached.rows
        elif isinstance(images, ImageFiles) and (check or config.skip_broken):
            kept = check_images(images, config.skip_broken, on_progress=on_progress)
            images = images.select(kept)
    skipped += count - len(images)
    if benchmark := benchmark_of(source):
        stamps = benchmark.stamps(len(images))
    return Source(images, None if split is None else split[kept], ks, stamps, skipped)


def open_source(config: DataConfig) -> Source:
    """Open the images that a configuration names; none is decoded.

    Raises:
        InputError: as `open_splits`.
    """
    if config.source == "synthetic" and config.root is None:
        size = config.synthetic_classes, config.synthetic_images
        return Source(SyntheticVehicles(*size, size=config.resize))
    if copy := _benchmark(config):
        return Source(copy.images, copy.split, copy.benchmark.ks, copy.stamps)
    source = os.path.expanduser(config.source)
    if is_prepared(source):
        return open_prepared(source, config.resize)
    return Source(*open_dataset(source))


def _benchmark(config: DataConfig) -> Copy | None:
    """The copy of a benchmark that a configuration names, if it names one.

    Raises:
        InputError: there is no such benchmark, or the copy may not be used.
    """
    if config.root is not None:
        return find_benchmark(config.source).check(config.root).require(config.allow_partial)
    if config.source in BENCHMARKS:
        raise InputError(
            f"{config.source} is a benchmark: say where it was unpacked by --root or data.root; "
            f"images of your own in a folder of this name are ./{config.source}"
        )
    return None
