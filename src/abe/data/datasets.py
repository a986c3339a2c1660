"""Labelled images of one's own: a folder with one sub-folder a class, or a CSV file."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from abe.data.decode import Box, BrokenImageError, read_image
from abe.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
EDGES = ("x1", "y1", "x2", "y2")  # columns of a box
LISTED = 50  # files or classes that a message names at most


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
        InputError: there is no such thing, it is neither, it has fewer than 2 classes or one with a
            single image, or what the two functions object to.
    """
    path = Path(spec)
    split = None
    if os.path.isdir(path):
        images = image_folder(path)
    elif not os.path.exists(path):
        raise InputError(f"{path}: there is no such folder or file")
    elif path.suffix.lower() == ".csv":
        images, split = image_csv(path)
    else:
        what = "an image" if _is_image(path) else "neither a folder nor a .csv file"
        raise InputError(
            f"{path} is {what}: give a folder with one sub-folder a class, or a .csv file with the "
            "columns path and label"
        )
    sizes = np.bincount(images.labels)
    if len(sizes) < 2:
        raise InputError(
            f"{path} has a single class, {images.class_names[0]!r}: an embedding is learned from "
            "2 or more"
        )
    if singles := [images.class_names[int(label)] for label in np.flatnonzero(sizes == 1)]:
        raise InputError(
            f"{path} has classes with a single image ({len(singles)} of {len(sizes)}), which has "
            f"no other to be compared with; add one or leave them out: {_listed(singles)}"
        )
    return images, split


def image_folder(root: str | Path) -> ImageFiles:
    """Open a folder with one sub-folder a class; images may lie in folders within that.

    Classes and files are in natural order ("2" before "10"). What is hidden (".name") is passed
    over, and so are files in class folders whose names do not end as an image's.

    Raises:
        InputError: the folder cannot be read or is empty, images lie directly in it, a class folder
            has none, or a link leads to a folder or out of `root`, where none is followed.
    """
    root = Path(root)
    inside = root.resolve()
    folders, loose = _scan(root, inside)
    if stray := [path.name for path in loose if _is_image(path)]:
        raise InputError(
            f"{root} has images directly in it ({len(stray)}): move them into one sub-folder a "
            f"class, or list them in a CSV file with the columns path and label: {_listed(stray)}"
        )
    if not folders:
        raise InputError(f"{root} has no sub-folders{_seen(loose)}: it needs one a class")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = list(_files(folder, inside))
        images = [path for path in files if _is_image(path)]
        if not images:
            raise InputError(
                f"{folder} has no images{_seen(files)}: remove it, or add files that end in "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        paths += images
        labels += [label] * len(images)
    return ImageFiles(
        inside.name, paths, np.array(labels, np.int64), [folder.name for folder in folders]
    )


def image_csv(path: str | Path) -> tuple[ImageFiles, np.ndarray | None]:
    """Open a CSV file with the columns path and label, and optionally split and x1, y1, x2, y2.

    Paths are relative to the CSV file's folder, classes are in natural order. `split` is train or
    test, and no class may be in both. A box is in pixels of the upright image; a line that leaves
    it empty means the whole image. Other columns are ignored.

    Returns:
        The images, and "train" or "test" for each of them, or None without a split column.

    Raises:
        InputError: the file cannot be read, a column or an image is missing, a value is none of
            those above (the message has its line), or a class is in both parts of the split.
    """
    path = Path(path)
    lines = _read_lines(path)
    if absent := [line.path for line in lines if not os.path.isfile(line.path)]:
        raise InputError(
            f"{path} lists images that are not there ({len(absent)} of {len(lines)}); paths are "
            f"relative to {path.parent.resolve()}:\n{_listed(absent, separator=chr(10))}"
        )
    names = sorted({line.label for line in lines}, key=_natural)
    label_of = {name: label for label, name in enumerate(names)}
    images = ImageFiles(
        path.stem,
        [line.path for line in lines],
        np.array([label_of[line.label] for line in lines], np.int64),
        names,
        [line.box for line in lines],
    )
    if lines[0].split is None:
        return images, None
    split = np.array([line.split for line in lines])
    parts = [set(images.labels[split == part].tolist()) for part in ("train", "test")]
    if not all(parts):
        raise InputError(
            f"{path}: the column split says {split[0]} on every line: mark some classes as the "
            "other part, or remove the column"
        )
    if shared := [names[label] for label in sorted(set.intersection(*parts))]:
        raise InputError(
            f"{path} has classes both in train and in test ({len(shared)} of {len(names)}), but an "
            f"embedding is tested on classes it has not seen; choose one part: {_listed(shared)}"
        )
    return images, split


def split_by_class(
    images: LabelledImages, train_fraction: float = 0.5
) -> tuple[LabelledImages, LabelledImages]:
    """The images of the first classes, to train on, and those of the others, to test on.

    That is the field's protocol: of CUB-200, classes 1-100 train and 101-200 test.

    Raises:
        InputError: fewer than 2 classes are left to train on, or none to test on.
    """
    classes = np.unique(images.labels)
    count = round(train_fraction * len(classes))
    if not 2 <= count < len(classes):
        raise InputError(
            f"{images.name}: data.split_classes={train_fraction} leaves {count} classes to train "
            f"on and {len(classes) - count} to test on: 2 and 1 are the least"
        )
    is_train = np.isin(images.labels, classes[:count])
    return images.select(np.flatnonzero(is_train)), images.select(np.flatnonzero(~is_train))


class BrokenImagesError(InputError):
    """Images of a data set that cannot be read.

    Attributes:
        errors: one for each of them; the message has the first 50.
    """

    def __init__(self, name: str, count: int, errors: Sequence[BrokenImageError]) -> None:
        super().__init__(
            f"{name} has images that cannot be read ({len(errors)} of {count}); replace or remove "
            f"them, or go on without them by --skip-broken:\n{_listed(errors, separator=chr(10))}"
        )
        self.errors = errors


def find_broken(images: LabelledImages, workers: int | None = None) -> dict[int, BrokenImageError]:
    """Decode every image; -> index -> error of those that cannot be read.

    Args:
        images: the data set.
        workers: threads, None for one a processor; Pillow decodes side by side in them.
    """

    def error_of(index: int) -> BrokenImageError | None:
        try:
            images.load(index)
        except BrokenImageError as error:
            return error
        return None

    console = Console(stderr=True)
    with ThreadPool(workers) as pool:
        errors = track(
            pool.imap(error_of, range(len(images)), chunksize=16),
            description="checking images",
            total=len(images),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        return {index: error for index, error in enumerate(errors) if error is not None}


def check_images(images: LabelledImages, skip_broken: bool) -> np.ndarray:
    """Decode every image; -> (n,) indices of those that can be read.

    Raises:
        BrokenImagesError: some cannot be read and `skip_broken` is off, or none can.
    """
    broken = find_broken(images)
    if broken and (not skip_broken or len(broken) == len(images)):
        raise BrokenImagesError(images.name, len(images), list(broken.values()))
    return np.setdiff1d(np.arange(len(images)), list(broken))


def _scan(folder: Path, root: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files directly in a folder, in natural order."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: _natural(entry.name))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    folders: list[Path] = []
    files: list[Path] = []
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and (entry.is_dir() or not path.resolve().is_relative_to(root)):
            raise InputError(
                f"{path} is a link to a folder or out of {root}, and none is followed: put copies "
                "in its place, or list the images in a CSV file"
            )
        (folders if entry.is_dir() else files).append(path)
    return folders, files


def _files(folder: Path, root: Path) -> Iterator[Path]:
    """All files in a folder and in those within it."""
    folders, files = _scan(folder, root)
    yield from files
    for inner in folders:
        yield from _files(inner, root)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _seen(files: Sequence[Path]) -> str:
    """What there is in place of images."""
    kinds = Counter(path.suffix.lower() or "without suffix" for path in files)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    return f" but files ({counts})" if kinds else ""


def _natural(name: str) -> tuple[list[int | str], str]:
    """A key that sorts "2" before "10"."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if part.isdecimal() else part for part in parts], name


def _listed(items: Sequence[object], separator: str = ", ") -> str:
    shown = [str(item) for item in items[:LISTED]]
    more = [f"and {len(items) - LISTED} more"] if len(items) > LISTED else []
    return separator.join(shown + more)


class _Line(NamedTuple):
    """One image of a CSV file."""

    path: Path
    label: str
    split: str | None
    box: Box | None


def _read_lines(path: Path) -> list[_Line]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [column.strip().lower() for column in reader.fieldnames or ()]
            wanted = ["path", "label"]
            if not {*EDGES}.isdisjoint(columns):
                wanted += EDGES
            if missing := [column for column in wanted if column not in columns]:
                raise InputError(
                    f"{path} has no column {', '.join(missing)}: its first line is "
                    f"{','.join(columns)!r}, but has to name path,label and if wanted split and "
                    f"{','.join(EDGES)}"
                )
            reader.fieldnames = columns
            lines = [_line(row, path.parent, f"{path}, line {reader.line_num}") for row in reader]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not in UTF-8: save it as such") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.reader.line_num}: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not lines:
        raise InputError(f"{path} lists no images: after its first line comes one line for each")
    return lines


def _line(row: dict[str | Any, str | Any], folder: Path, where: str) -> _Line:
    if None in row:
        raise InputError(f"{where}: more values than columns; put quotes around one with a comma")
    values = {column: (value or "").strip() for column, value in row.items()}
    if empty := [column for column in ("path", "label") if not values[column]]:
        raise InputError(f"{where}: no {' and no '.join(empty)}")
    split = values["split"].lower() if "split" in values else None
    if split not in (None, "train", "test"):
        raise InputError(f"{where}: split is {values['split']!r}, but has to be train or test")
    box = _box([values[edge] for edge in EDGES], where) if "x1" in values else None
    return _Line(folder / values["path"], values["label"], split, box)


def _box(edges: Sequence[str], where: str) -> Box | None:
    if not any(edges):
        return None
    with contextlib.suppress(ValueError):
        x1, y1, x2, y2 = map(float, edges)
        if -math.inf < x1 < x2 < math.inf and -math.inf < y1 < y2 < math.inf:
            return x1, y1, x2, y2
    raise InputError(
        f"{where}: {','.join(EDGES)} are {','.join(edges)}, but have to be numbers, x1 below x2 "
        "and y1 below y2"
    )
