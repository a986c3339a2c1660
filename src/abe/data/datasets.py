"""Labelled images of one's own: a folder with one sub-folder a class, or a CSV file."""

from __future__ import annotations

import csv
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple, Protocol, Self, TypeVar

import numpy as np
from PIL import Image

from abe.data.decode import Box, BrokenImageError, printable, read_image, use_image
from abe.data.transforms import pad_to_square
from abe.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
COMPANION_SUFFIX = re.compile(  # of what often lies beside images
    r"\.(csv|db|html|ini|json|mat|md|tsv|txt|xml|yaml|yml)", re.IGNORECASE
)
OTHER_SUFFIX = re.compile(  # of images that are not read
    r"\.(apng|arw|avif|cr2|cr3|dib|dng|eps|exr|hdr|heic|heif|ico|j2k|jp2|jpe|jpx|jxl|jxr|nef|nrw|"
    r"orf|pbm|pcx|pef|pgm|pnm|ppm|psd|qoi|raf|raw|rw2|srw|svg|tga|xcf)",
    re.IGNORECASE,
)
EDGES = ("x1", "y1", "x2", "y2")  # columns of a box
COLUMNS = ("path", "label", "split", *EDGES)
LISTED = 20  # files or classes that a message names at most


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
Result = TypeVar("Result")


class Source(NamedTuple):
    """What `data.source` names."""

    images: LabelledImages
    split: np.ndarray | None = None
    """(N,), the part that each image is in: "train" or "test", or "train", "query" or "gallery"."""
    ks: Sequence[int] | None = None
    """The K of Recall@K; None for the usual."""
    stamps: Sequence[str] = ()
    """What every result has to say of the data."""
    skipped: int = 0
    """How many files were left out before because they cannot be read."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files with labels; satisfies `LabelledImages`.

    Attributes:
        name: of the folder or the CSV file.
        paths: N files.
        labels: int64, (N,): indices into `class_names`.
        class_names: label -> name.
        boxes: x1, y1, x2, y2 in pixels of the upright image for each file, or None for all of it.
        root: the resolved folder that links must not lead out of; None if they may lead anywhere.
    """

    name: str
    paths: Sequence[Path]
    labels: np.ndarray
    class_names: Sequence[str]
    boxes: Sequence[Box | None] | None = None
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image:
        """The image, or what its box holds of it, in mode RGB.

        Raises:
            BrokenImageError: it cannot be read, or is a link to a folder or out of `root`.
            MemoryError: as `read_image`.
            ReadingError: as `read_image`.
        """
        return read_image(*self._file(index))

    def square(self, index: int, side: int) -> np.ndarray:
        """What `pad_to_square` makes of it; -> uint8 (side, side, 3).

        Of large images a process has one in memory at a time.

        Raises:
            BrokenImageError: as `load`.
            MemoryError: as `load`.
            ReadingError: as `load`.
        """
        return use_image(*self._file(index), lambda image: pad_to_square(image, side))

    def _file(self, index: int) -> tuple[Path, Box | None]:
        path = self.paths[index]
        if self.root is not None and os.path.islink(path):
            target = Path(os.path.realpath(path))
            if os.path.isdir(target) or not target.is_relative_to(self.root):
                raise BrokenImageError(
                    path, f"a link to a folder or out of {self.root}, and none is followed"
                )
        return path, self.boxes[index] if self.boxes else None

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
    if path.is_dir():
        images = image_folder(path)
    elif not path.exists():
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
            "2 or more; of a folder, the sub-folders are the classes"
        )
    if singles := [images.class_names[int(label)] for label in np.flatnonzero(sizes == 1)]:
        raise InputError(
            f"{path} has classes with a single image ({len(singles)} of {len(sizes)}), which has "
            "no other to be compared with; add one to each, or leave them out:\n"
            + "\n".join(map(printable, singles))
        )
    return images, split


def image_folder(root: str | Path) -> ImageFiles:
    """Open a folder with one sub-folder a class; images may lie in folders within that.

    Classes and files are in natural order ("2" before "10"). What is hidden (".name") is passed
    over, and so are files in class folders whose names do not end as an image's: but for what
    often lies beside images, such as .txt, a warning says how many. In class folders, links to
    folders or out of `root` are images that cannot be read.

    Raises:
        InputError: the folder cannot be read or is empty, images or links to folders lie directly
            in it, or a class folder has no images.
    """
    root = Path(root)
    inside = root.resolve()
    folders, loose = _scan(root)
    if links := [path.name for path in loose if _leads_to_folder(path)]:
        raise InputError(
            f"{root} has links to folders ({len(links)}), and none is followed: put copies in "
            "their place, or list the images in a CSV file with the columns path and label: "
            f"{named(links)}"
        )
    if stray := [path.name for path in loose if _is_image(path)]:
        raise InputError(
            f"{root} has images directly in it ({len(stray)}): move them into one sub-folder a "
            f"class, or list them in a CSV file with the columns path and label: {named(stray)}"
        )
    if not folders:
        raise InputError(f"{root} has no sub-folders{_seen(loose)}: it needs one a class")
    paths: list[Path] = []
    labels: list[int] = []
    empty: list[str] = []
    others = [path for path in loose if _is_other_image(path)]
    for label, folder in enumerate(folders):
        files = list(_files(folder))
        images = [path for path in files if _is_image(path) or _leads_to_folder(path)]
        if not images:
            empty.append(f"{folder.name}{_seen(files)}")
        paths += images
        labels += [label] * len(images)
        known = set(images)
        others += [path for path in files if path not in known and not _is_companion(path)]
    if empty:
        raise InputError(
            f"{root} has class folders without images ({len(empty)} of {len(folders)}); remove "
            f"them, or add files that end in {', '.join(IMAGE_SUFFIXES)}: {named(empty)}"
        )
    if others:
        warnings.warn(
            f"{root} has files whose names do not end as those of images that are read, and which "
            f"are passed over ({_kinds(others)}): if they are images, save them as .jpg or .png",
            stacklevel=2,
        )
    names = [folder.name for folder in folders]
    return ImageFiles(inside.name, paths, np.array(labels, np.int64), names, root=inside)


def image_csv(path: str | Path) -> tuple[ImageFiles, np.ndarray | None]:
    """Open a CSV file with the columns path and label, and optionally split and x1, y1, x2, y2.

    Paths are relative to the CSV file's folder, classes are in natural order. `split` is train or
    test, and no class may be in both. A box is in pixels of the upright image; a line that leaves
    it empty means the whole image. Other columns are ignored.

    Returns:
        The images, and "train" or "test" for each of them, or None without a split column.

    Raises:
        InputError: the file cannot be read, a column or an image is missing, a column is there
            twice, or an image with the same box; a value is none of those above (the message has
            its line), a class is in both parts of the split, or a part has fewer than 2 classes.
    """
    path = Path(path)
    lines = _read_lines(path)
    if absent := [line.path for line in lines if not os.path.isfile(line.path)]:
        raise BrokenImagesError(
            f"{path} lists images that are not there ({len(absent)} of {len(lines)}); paths are "
            f"relative to {path.parent.resolve()}",
            [BrokenImageError(file, "no such file") for file in absent],
        )
    names = sorted({line.label for line in lines}, key=_natural)
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of[line.label] for line in lines], np.int64)
    images = ImageFiles(
        path.stem, [line.path for line in lines], labels, names, [line.box for line in lines]
    )
    if lines[0].split is None:
        return images, None
    split = np.array([line.split for line in lines])
    train, test = (set(labels[split == part].tolist()) for part in ("train", "test"))
    if shared := [names[label] for label in sorted(train & test)]:
        raise InputError(
            f"{path} has classes both in train and in test ({len(shared)} of {len(names)}), but an "
            f"embedding is tested on classes it has not seen; choose one part: {named(shared)}"
        )
    if min(len(train), len(test)) < 2:
        raise InputError(
            f"{path} splits {len(names)} classes into {len(train)} of train and {len(test)} of "
            "test: mark 2 or more as each, or remove the column split"
        )
    return images, split


def split_by_class(images: Images, train_fraction: float = 0.5) -> tuple[Images, Images]:
    """The images of the first classes, to train on, and those of the others, to test on.

    That is the field's protocol: of CUB-200, classes 1-100 train and 101-200 test.

    Raises:
        InputError: fewer than 2 classes are left on either side.
    """
    classes = np.unique(images.labels)
    count = round(train_fraction * len(classes))
    if min(count, len(classes) - count) < 2:
        raise InputError(
            f"{images.name}: data.split_classes={train_fraction} splits {len(classes)} classes "
            f"into {count} to train on and {len(classes) - count} to test on: use another share, "
            "or more classes, so that each side has 2"
        )
    is_train = np.isin(images.labels, classes[:count])
    return images.select(np.flatnonzero(is_train)), images.select(np.flatnonzero(~is_train))


class BrokenImagesError(InputError):
    """Images of a data set that cannot be read; the message names all of them.

    Attributes:
        errors: one for each of them.
    """

    def __init__(self, problem: str, errors: Sequence[BrokenImageError]) -> None:
        super().__init__("\n".join([f"{problem}:", *map(str, errors)]))
        self.errors = errors


def find_broken(
    images: LabelledImages,
    workers: int | None = None,
    *,
    read: Callable[[int], object] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[int, BrokenImageError]:
    """Read every image once; -> index -> error of those that cannot be read, in order.

    Args:
        images: the data set.
        workers: threads, None for one a processor; Pillow decodes side by side in them.
        read: what reads the image of an index; None for `images.load`.
        on_progress: told the number of images done.

    Raises:
        MemoryError: there is too little memory for an image.
        ReadingError: one cannot be read now, because of the disk, say.
    """
    read = read or images.load

    def error_of(index: int) -> BrokenImageError | None:
        try:
            read(index)
        except BrokenImageError as error:
            return error.with_traceback(None)  # whose frames hold the pixels
        return None

    broken = {}
    for index, error in enumerate(in_threads(error_of, len(images), workers)):
        if error is not None:
            broken[index] = error
        on_progress(index + 1)
    return broken


def in_threads(
    function: Callable[[int], Result], count: int, workers: int | None = None
) -> Iterator[Result]:
    """`function` of 0, 1 ... count - 1, in order, computed by threads.

    At the end they have ended, too: a thread that is left to the end of Python may abort it.
    """
    with ThreadPool(workers) as pool:
        yield from pool.imap(function, range(count), chunksize=16)
        pool.close()
        pool.join()


def check_images(
    images: LabelledImages,
    skip_broken: bool,
    *,
    read: Callable[[int], object] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Read every image once (see `find_broken`); -> int64, (n,): those that can be read.

    A warning names those that are left out.

    Raises:
        BrokenImagesError: some cannot be read, and `skip_broken` is off or leaves a class with
            fewer than 2 images that had more.
        MemoryError: as `find_broken`.
        ReadingError: as `find_broken`.
    """
    broken = find_broken(images, read=read, on_progress=on_progress)
    kept = np.delete(np.arange(len(images)), list(broken))
    if not broken:
        return kept
    problem = f"{images.name} has images that cannot be read ({len(broken)} of {len(images)})"
    if not skip_broken:
        advice = (
            "replace them; or remove them or give --skip-broken, if no run and no prepared folder "
            "has begun with them"
        )
        raise BrokenImagesError(f"{problem}; {advice}", list(broken.values()))
    before = np.bincount(images.labels)
    left = np.bincount(images.labels[kept], minlength=len(before))
    if few := np.flatnonzero((left < 2) & (before >= 2)).tolist():
        names = named([images.class_names[label] for label in few])
        raise BrokenImagesError(
            f"{problem}, and without them classes are left with fewer than 2 ({names}): replace "
            "the images, or leave the classes out",
            [error for index, error in broken.items() if images.labels[index] in few],
        )
    left_out = BrokenImagesError(f"{problem}, and are left out", list(broken.values()))
    warnings.warn(str(left_out), stacklevel=2)
    return kept


def named(items: Sequence[object], separator: str = ", ") -> str:
    """The first of them, and how many more there are."""
    shown = [printable(item) for item in items[:LISTED]]
    more = [f"and {len(items) - LISTED:,} more"] if len(items) > LISTED else []
    return separator.join(shown + more)


def _scan(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders, and files and links, directly in a folder, in natural order."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: _natural(entry.name))
    except OSError as error:
        raise InputError(
            f"{printable(folder)} cannot be read: {error.strerror}; see to its permissions, or "
            "move it elsewhere"
        ) from None
    folders: list[Path] = []
    files: list[Path] = []
    for entry in entries:
        if not entry.name.startswith("."):
            kind = folders if entry.is_dir(follow_symlinks=False) else files
            kind.append(folder / entry.name)
    return folders, files


def _files(folder: Path) -> Iterator[Path]:
    """All files in a folder and in those within it."""
    stack = [folder]
    while stack:
        folders, files = _scan(stack.pop())
        yield from files
        stack += reversed(folders)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _is_other_image(path: Path) -> bool:
    return OTHER_SUFFIX.fullmatch(path.suffix) is not None


def _is_companion(path: Path) -> bool:
    """Whether a file is what often lies beside images and is none."""
    return COMPANION_SUFFIX.fullmatch(path.suffix) is not None


def _leads_to_folder(file: Path) -> bool:
    """Of what `_scan` takes for a file: a link that it has not followed."""
    return os.path.isdir(file)


def _seen(files: Sequence[Path]) -> str:
    """What there is in place of images."""
    return f" but files ({_kinds(files)})" if files else ""


def _kinds(files: Iterable[Path]) -> str:
    kinds = Counter(path.suffix.lower() or "without suffix" for path in files)
    return named([f"{count} {kind}" for kind, count in kinds.most_common()])


def _natural(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """A key that sorts "2" before "10"; `int` refuses numbers of thousands of digits."""
    parts = re.split(r"0*(\d+)", name.casefold())
    return [(len(part), part) if part.isdecimal() else part for part in parts], name


class _Line(NamedTuple):
    """One image of a CSV file."""

    number: int
    path: Path
    label: str
    split: str | None
    box: Box | None


def _read_lines(path: Path) -> list[_Line]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [column.strip().lower() for column in reader.fieldnames or ()]
            if twice := [column for column in COLUMNS if columns.count(column) > 1]:
                raise InputError(
                    f"{path} has more than one column {', '.join(twice)}: rename or remove the "
                    "others"
                )
            wanted = ["path", "label", *(EDGES if {*EDGES} & {*columns} else ())]
            if missing := [column for column in wanted if column not in columns]:
                raise InputError(
                    f"{path} has no column {', '.join(missing)}: its first line is "
                    f"{','.join(columns)!r}, but has to name path,label and if wanted split and "
                    f"{','.join(EDGES)}"
                )
            reader.fieldnames = columns
            lines = [_line(row, path, reader.line_num) for row in reader]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not in UTF-8: save it as such") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.reader.line_num}: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not lines:
        raise InputError(f"{path} lists no images: after its first line comes one line for each")
    lines_of: dict[tuple[str, Box | None], list[_Line]] = defaultdict(list)
    for line in lines:
        lines_of[os.path.abspath(line.path), line.box].append(line)
    if repeated := [same for same in lines_of.values() if len(same) > 1]:
        places = [
            f"lines {' and '.join(str(line.number) for line in same)}: {same[0].path}"
            for same in repeated
        ]
        raise InputError(
            f"{path} lists {len(repeated)} images, or boxes of images, more than once; keep one "
            f"line of each: {named(places)}"
        )
    return lines


def _line(row: dict[str, str], path: Path, number: int) -> _Line:
    where = f"{path}, line {number}"
    if None in row:
        raise InputError(f"{where}: more values than columns; put quotes around one with a comma")
    values = {column: (value or "").strip() for column, value in row.items()}
    if empty := [column for column in ("path", "label") if not values[column]]:
        raise InputError(f"{where}: no {' and no '.join(empty)}")
    split = values["split"].lower() if "split" in values else None
    if split not in (None, "train", "test"):
        raise InputError(f"{where}: split is {values['split']!r}, but has to be train or test")
    box = _box([values[edge] for edge in EDGES], where) if EDGES[0] in values else None
    return _Line(number, path.parent / values["path"], values["label"], split, box)


def _box(edges: Sequence[str], where: str) -> Box | None:
    if not any(edges):
        return None
    try:
        x1, y1, x2, y2 = map(float, edges)
    except ValueError:
        x1 = y1 = x2 = y2 = math.nan
    if not (-math.inf < x1 < x2 < math.inf and -math.inf < y1 < y2 < math.inf):
        raise InputError(
            f"{where}: {','.join(EDGES)} are {','.join(edges)}, but have to be numbers, x1 below "
            "x2 and y1 below y2"
        )
    return x1, y1, x2, y2
