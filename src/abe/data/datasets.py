"""Labelled images of one's own: a folder with one sub-folder a class, or a CSV file."""

from __future__ import annotations

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from abe.data.decode import Box, BrokenImageError, read_image
from abe.errors import InputError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
LISTED = 50  # files or classes that an error message names


class LabelledImages(Protocol):
    """A data set: N images, each of one class."""

    @property
    def name(self) -> str:
        """What to call it in results."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """int64, (N,): indices into `class_names`."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """Label -> name; a selection keeps those of classes that it has no image of."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """The image in mode RGB."""
        ...

    def describe(self, index: int) -> str:
        """What to call the image in a message: its file."""
        ...

    def select(self, indices: np.ndarray) -> Self:
        """A part of the images, with the same labels."""
        ...


Images = TypeVar("Images", bound=LabelledImages)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files with labels; satisfies `LabelledImages`.

    Attributes:
        name: of the folder or the CSV file.
        paths: N files.
        labels: int64, (N,): indices into `class_names`.
        class_names: label -> name.
        boxes: x1, y1, x2, y2 in pixels of the upright image for each file, or None for all of it.
    """

    name: str
    paths: Sequence[Path]
    labels: np.ndarray
    class_names: Sequence[str]
    boxes: Sequence[Box | None] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image:
        """The image, or what its box holds of it, in mode RGB.

        Raises:
            BrokenImageError: it cannot be read.
        """
        return read_image(self.paths[index], self.boxes[index] if self.boxes else None)

    def describe(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])

    def select(self, indices: np.ndarray) -> Self:
        """A part of the files, with the same labels."""
        return replace(
            self,
            paths=[self.paths[index] for index in indices],
            labels=self.labels[indices],
            boxes=self.boxes and [self.boxes[index] for index in indices],
        )


def open_dataset(spec: str | Path) -> tuple[ImageFiles, np.ndarray | None]:
    """Open a folder with one sub-folder a class (`image_folder`) or a CSV file (`image_csv`).

    Returns:
        The images, and "train" or "test" for each of them if the CSV file says so, or else None.

    Raises:
        InputError: there is no such thing, it is neither, it has fewer than 2 classes or a class
            with a single image, or what the two functions object to.
    """
    path = Path(spec)
    split = None
    if path.is_dir():
        images = image_folder(path)
    elif not path.exists():
        raise InputError(f"{path}: there is no such folder or file")
    elif path.suffix.lower() == ".csv":
        images, split = image_csv(path)
    else:
        what = "an image" if path.suffix.lower() in IMAGE_SUFFIXES else "neither"
        raise InputError(
            f"{path} is {what}: give a folder with one sub-folder a class, or a .csv file with the "
            "columns path and label"
        )
    sizes = np.bincount(images.labels)
    if len(sizes) < 2:
        raise InputError(
            f"{path} has a single class, {images.class_names[0]!r}: 2 or more are needed to tell "
            "apart"
        )
    if singles := [images.class_names[label] for label in np.flatnonzero(sizes == 1)]:
        raise InputError(
            f"{path} has {len(singles)} classes with a single image, which nothing can be compared "
            f"with: give each a second one or leave them out: {_listed(singles)}"
        )
    return images, split


def image_folder(root: str | Path) -> ImageFiles:
    """Open a folder with one sub-folder a class; images may lie in folders within that.

    Classes and files are in natural order ("2" before "10"). What is hidden (".name") is passed
    over, and so are files in class folders whose names are no image's.

    Raises:
        InputError: the folder cannot be read or is empty, images lie directly in it, a class folder
            has none, or a link leads to a folder or out of `root`: none is followed.
    """
    root = Path(root)
    try:
        folders, loose = _scan(root, root.resolve())
        if stray := [path.name for path in loose if _is_image(path)]:
            raise InputError(
                f"{len(stray)} images lie directly in {root}: give each class a sub-folder, or list "
                f"them in a CSV file with the columns path and label: {_listed(stray)}"
            )
        if not folders:
            raise InputError(
                f"{root} holds no folders{_seen(loose)}: it needs one sub-folder a class"
            )
        paths: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            files = list(_files(folder, root.resolve()))
            images = [path for path in files if _is_image(path)]
            if not images:
                raise InputError(
                    f"{folder} holds no image{_seen(files)}: images end in "
                    f"{', '.join(sorted(IMAGE_SUFFIXES))}"
                )
            paths += images
            labels += [label] * len(images)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None
    names = [folder.name for folder in folders]
    return ImageFiles(root.resolve().name, paths, np.array(labels), names)


def image_csv(path: str | Path) -> tuple[ImageFiles, np.ndarray | None]:
    """Open a CSV file with the columns path and label, and optionally split and x1, y1, x2, y2.

    Paths are relative to the CSV file's folder, classes are in natural order. `split` is train or
    test, and no class may be in both. A box is in pixels of the upright image; a row without one is
    the whole image. Other columns are ignored.

    Returns:
        The images, and "train" or "test" for each of them, or None without a split column.

    Raises:
        InputError: the file cannot be read, a column or an image is missing, a value is none of
            those above (the message has its line), or a class is in both parts of the split.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read_csv(path, csv.DictReader(file, strict=True))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not in UTF-8: save it as such") from None
    except (OSError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def split_by_class(images: Images, train_fraction: float = 0.5) -> tuple[Images, Images]:
    """The images of the first classes, to train on, and those of the others, to test on.

    That no class is in both is the field's protocol: classes 1-100 of CUB-200 train, 101-200 test.

    Raises:
        InputError: fewer than 2 classes are left to train on, or none to test on.
    """
    classes = np.unique(images.labels)
    count = round(train_fraction * len(classes))
    if not 2 <= count < len(classes):
        raise InputError(
            f"{images.name}: data.split_classes={train_fraction} of {len(classes)} classes leaves "
            f"{count} to train on and {len(classes) - count} to test on: 2 and 1 are the least"
        )
    is_train = np.isin(images.labels, classes[:count])
    return images.select(np.flatnonzero(is_train)), images.select(np.flatnonzero(~is_train))


class BrokenImagesError(InputError):
    """Images of a data set that cannot be read.

    Attributes:
        errors: all of them; the message names the first 50.
    """

    def __init__(self, name: str, errors: Sequence[BrokenImageError]) -> None:
        super().__init__(name, errors)
        self.name = name
        self.errors = errors

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.errors)} images cannot be read; mend or remove them, or leave "
            f"them out with --skip-broken:\n{_listed(self.errors, chr(10))}"
        )


def find_broken(images: LabelledImages, workers: int | None = None) -> dict[int, BrokenImageError]:
    """Decode every image and return the errors of those that cannot be, by index.

    Args:
        images: the data set.
        workers: threads; None for one a processor. Pillow lets them run side by side.
    """

    def error_of(index: int) -> BrokenImageError | None:
        try:
            images.load(index)
        except BrokenImageError as error:
            return error
        return None

    with ThreadPool(workers) as pool:
        errors = track(
            pool.imap(error_of, range(len(images)), chunksize=16),
            description="checking images",
            total=len(images),
            console=Console(stderr=True),
            transient=True,
        )
        return {index: error for index, error in enumerate(errors) if error is not None}


def check_images(images: LabelledImages, skip_broken: bool) -> np.ndarray:
    """Decode every image; -> (n,) indices of those that can be read.

    Raises:
        BrokenImagesError: some cannot be read and `skip_broken` is off, or none can.
    """
    broken = find_broken(images)
    if broken and (not skip_broken or len(broken) == len(images)):
        raise BrokenImagesError(images.name, list(broken.values()))
    return np.setdiff1d(np.arange(len(images)), list(broken))


def _scan(folder: Path, root: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files directly in a folder, in natural order."""
    folders: list[Path] = []
    files: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: _natural(entry.name)):
            if entry.name.startswith("."):
                continue
            path = folder / entry.name
            if entry.is_symlink() and (entry.is_dir() or not _leads_into(root, path)):
                raise InputError(
                    f"{path} is a link to a folder or out of {root}, and none is followed: copy "
                    "what it leads to, or list the images in a CSV file"
                )
            (folders if entry.is_dir() else files).append(path)
    return folders, files


def _leads_into(root: Path, link: Path) -> bool:
    return link.resolve().is_relative_to(root)


def _files(folder: Path, root: Path) -> Iterator[Path]:
    folders, files = _scan(folder, root)
    yield from files
    for inner in folders:
        yield from _files(inner, root)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _seen(files: Sequence[Path]) -> str:
    """What there is instead of images, for a message."""
    kinds = Counter(path.suffix.lower() or "without a suffix" for path in files)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    return f" (files seen: {counts})" if kinds else ""


def _natural(name: str) -> tuple[list[int | str], str]:
    """A key that sorts "2" before "10"."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if part.isdecimal() else part for part in parts], name


def _listed(items: Sequence[object], separator: str = ", ") -> str:
    shown = separator.join(map(str, items[:LISTED]))
    more = len(items) - LISTED
    return f"{shown}{separator}and {more} more" if more > 0 else shown


def _read_csv(path: Path, rows: csv.DictReader[str]) -> tuple[ImageFiles, np.ndarray | None]:
    columns = [column.strip().lower() for column in rows.fieldnames or ()]
    rows.fieldnames = columns
    edges = [column for column in ("x1", "y1", "x2", "y2") if column in columns]
    missing = [column for column in ("path", "label") if column not in columns]
    if edges:
        missing += [column for column in ("x1", "y1", "x2", "y2") if column not in columns]
    if missing:
        raise InputError(
            f"{path} has no column {' and no column '.join(missing)}: its first line is "
            f"{','.join(columns)!r} and has to name path,label and if wanted split and x1,y1,x2,y2"
        )
    paths: list[Path] = []
    classes: list[str] = []
    splits: list[str] = []
    boxes: list[Box | None] = []
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        if None in row:
            raise InputError(f"{where}: more values than columns; quote what holds a comma")
        values = {column: (value or "").strip() for column, value in row.items()}
        for column in ("path", "label"):
            if not values[column]:
                raise InputError(f"{where}: no {column}")
        paths.append(path.parent / values["path"])
        classes.append(values["label"])
        if "split" in columns:
            splits.append(_split(values["split"], where))
        if edges:
            boxes.append(_box(values, where))
    if not paths:
        raise InputError(f"{path} has no lines after the first: list an image in each")
    if absent := [file for file in paths if not file.is_file()]:
        raise InputError(
            f"{path}: {len(absent)} of {len(paths)} images are not there (paths are relative to "
            f"{path.parent.resolve()}):\n{_listed(absent, chr(10))}"
        )
    names = sorted(set(classes), key=_natural)
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of[name] for name in classes])
    split = np.array(splits) if splits else None
    if split is not None:
        _check_split(path, names, labels, split)
    return ImageFiles(path.stem, paths, labels, names, boxes or None), split


def _split(value: str, where: str) -> str:
    if value.lower() not in ("train", "test"):
        raise InputError(f"{where}: split is {value!r}, neither train nor test")
    return value.lower()


def _box(values: Mapping[str, str], where: str) -> Box | None:
    texts = [values[edge] for edge in ("x1", "y1", "x2", "y2")]
    if not any(texts):
        return None
    try:
        x1, y1, x2, y2 = map(float, texts)
    except ValueError:
        raise InputError(f"{where}: x1,y1,x2,y2 are {','.join(texts)}: give four numbers") from None
    if not (math.isfinite(x1 + y1 + x2 + y2) and x1 < x2 and y1 < y2):
        raise InputError(
            f"{where}: x1,y1,x2,y2 are {','.join(texts)}: x1 has to be left of x2, y1 above y2"
        )
    return x1, y1, x2, y2


def _check_split(path: Path, names: Sequence[str], labels: np.ndarray, split: np.ndarray) -> None:
    train, test = labels[split == "train"], labels[split == "test"]
    if not (len(train) and len(test)):
        raise InputError(
            f"{path}: split is {split[0]} on every line: mark other classes as the other part, or "
            "remove the column"
        )
    if shared := [names[label] for label in np.intersect1d(train, test)]:
        raise InputError(
            f"{path}: {len(shared)} classes are both in train and in test, where an embedding is "
            f"judged by classes it has not seen: put each in one of them: {_listed(shared)}"
        )
