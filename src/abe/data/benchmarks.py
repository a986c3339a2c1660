"""The paper's benchmarks (section 5), read as their publishers ship them and counted.

A copy is compared with what its publisher ships before it is used: its lists have to name the
field's class-disjoint split to the last image, and every file that they name has to be there.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from abe.data.datasets import (
    ImageFiles,
    Source,
    find_broken,
    image_folder,
    named,
)
from abe.data.decode import FORMATS, Box, BrokenImageError, printable
from abe.download import RemoteFile
from abe.errors import InputError
from abe.metrics import KS
from abe.progress import progress

PROBED = 50  # images that are compared with their boxes


class Count(NamedTuple):
    """The size of a part of a benchmark."""

    images: int
    classes: int


class Listing(NamedTuple):
    """What the lists of a copy say of its N images."""

    folder: Path
    """What `paths` are relative to."""
    paths: Sequence[str]
    """N, as the lists have them, with "/" on every system."""
    labels: np.ndarray
    """int64, (N,): indices into `class_names`."""
    class_names: Sequence[str]
    split: np.ndarray
    """(N,): "train" or "test"; or "train", "query" or "gallery"."""
    boxes: Sequence[Box] | None = None
    """N official boxes: x1, y1, x2, y2 in pixels."""


@dataclass(frozen=True)
class Benchmark:
    """A published data set with the field's split of its classes.

    Attributes:
        name: what `data.source` and `abe data` call it.
        title: what results call it.
        counts: part -> its size; the parts are "train" and "test", or "train", "query", "gallery".
        read: the lists of a copy, from the folder that it was unpacked into, or its own.
        homepage: where its publisher describes it.
        files: what its publisher ships and `read` needs.
        ks: the K that the paper reports Recall@K for.
        cropped: whether images are cut to the official boxes.
        stamp: what every result on it has to say.
        has_lists: whether lists name its images; else they are what its folders hold.
        mistaken: total of images -> what a copy of this size is likely to be.
    """

    name: str
    title: str
    counts: Mapping[str, Count]
    read: Callable[[Path], Listing] = field(repr=False)
    homepage: str
    files: tuple[RemoteFile, ...] = ()
    ks: tuple[int, ...] = KS
    cropped: bool = False
    stamp: str | None = None
    has_lists: bool = True
    mistaken: Mapping[int, str] = field(default_factory=dict)

    def stamps(self, kept: int) -> tuple[str, ...]:
        """What results on `kept` of its images have to say."""
        of = _total(self.counts)
        part = f"partial, {kept:,} of {of:,}" if kept != of else None
        return tuple(filter(None, (self.stamp, part)))

    def check(
        self,
        root: str | Path,
        *,
        decode: bool = False,
        console: Console | None = None,
    ) -> Copy:
        """Compare a copy with what its publisher ships.

        Args:
            root: the folder that the archives were unpacked into, or the folder that they made.
            decode: read every image, too; else lists and file names are all that is looked at.
            console: where to show how many images are read; None for nowhere.
        """
        root = Path(root)
        faults: list[str] = []
        try:
            listing = self.read(root)
        except InputError as error:
            faults.append(str(error))
            listing = Listing(root, [], np.zeros(0, np.int64), [], np.zeros(0, str))
        there = _are_there(listing.folder, listing.paths)
        images = ImageFiles(
            self.title,
            [listing.folder / path for path in listing.paths],
            listing.labels,
            listing.class_names,
            listing.boxes,
            _real(listing.folder),
        ).select(np.flatnonzero(there))
        split = listing.split[there]
        faults += _repeated(listing) + _shared(listing) + _shrunk(images)
        if not self.cropped:
            images = replace(images, boxes=None)
        return Copy(
            self,
            root,
            images,
            split=split,
            listed=_counts(self, listing.labels, listing.split),
            found=_counts(self, images.labels, split),
            missing=[path for path, here in zip(listing.paths, there, strict=True) if not here],
            broken=_broken(images, console) if decode else [],
            faults=faults,
        )


@dataclass(frozen=True, eq=False)
class Copy:
    """What a folder holds of a benchmark.

    Attributes:
        benchmark: what it should be.
        root: the folder.
        images: the N files that are listed and there.
        split: (N,), the part of each: "train" or "test"; or "train", "query" or "gallery".
        listed: part -> its size by the lists.
        found: part -> how much of that is there.
        missing: files that are listed but not there, as the lists have them.
        broken: files that are there but cannot be read, if they were decoded.
        faults: what rules out even a part of it: lists that cannot be read, name a file twice or
            classes on both sides; images that do not fit their boxes.
    """

    benchmark: Benchmark
    root: Path
    images: ImageFiles = field(repr=False)
    split: np.ndarray = field(repr=False)
    listed: dict[str, Count]
    found: dict[str, Count]
    missing: Sequence[str]
    broken: Sequence[BrokenImageError]
    faults: Sequence[str]

    @property
    def complete(self) -> bool:
        """Whether it is the benchmark to the last image."""
        right = self.listed == self.benchmark.counts
        return right and not self.missing and not self.broken and not self.faults

    @property
    def stamps(self) -> tuple[str, ...]:
        """What results on it have to say."""
        return self.benchmark.stamps(len(self.images) - len(self.broken))

    def require(self, allow_partial: bool = False) -> Copy:
        """Itself, if it may be used.

        Args:
            allow_partial: use it although images are not listed or not there.

        Raises:
            InputError: it is not complete; or, with `allow_partial`, has a fault, more than the
                benchmark has, or fewer than 2 classes in a part.
        """
        if self.complete or (allow_partial and self._is_part):
            return self
        raise InputError(str(self))

    @property
    def _is_part(self) -> bool:
        return not self.faults and all(
            (listed == whole or (listed.images < whole.images and listed.classes <= whole.classes))
            and self.found[part].classes >= 2
            for part, whole in self.benchmark.counts.items()
            for listed in (self.listed[part],)
        )

    def __str__(self) -> str:
        """What it is, or all that is wrong with it, for a person."""
        benchmark = self.benchmark
        if self.complete:
            return f"{self.root} is {benchmark.name}: {_sizes(self.found)}"
        lines = [
            f"{self.root} is not {benchmark.name} as its publisher ships it",
            f"  expected: {_sizes(benchmark.counts)}",
            *([f"  listed: {_sizes(self.listed)}"] * (self.listed != self.found)),
            f"  found: {_sizes(self.found)}",
            *(f"  wrong: {fault}" for fault in self.faults),
        ]
        if self.missing:
            listed = f"{len(self.missing):,} of {_total(self.listed):,}"
            lines.append(f"  missing files: {listed}: {named(self.missing)}")
        if self.broken:
            lines.append(f"  cannot be read: {len(self.broken):,}: {named(self.broken)}")
        if cause := _cause(self):
            lines.append(f"  likely cause: {cause}")
        if self._is_part and not self.broken:
            lines.append("To go on with the part that is there: --allow-partial")
        return "\n".join(map(printable, lines))

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""

        def plain(counts: Mapping[str, Count]) -> dict[str, dict[str, int]]:
            return {part: count._asdict() for part, count in counts.items()}

        return {
            "name": self.benchmark.name,
            "root": str(self.root),
            "complete": self.complete,
            "expected": plain(self.benchmark.counts),
            "listed": plain(self.listed),
            "found": plain(self.found),
            "missing": list(self.missing),
            "broken": [{"file": str(error.path), "why": error.reason} for error in self.broken],
            "faults": list(self.faults),
            "likely_cause": _cause(self),
            "stamps": list(self.stamps),
        }


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        InputError: there is none; the message has the nearest.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name, BENCHMARKS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"there is no benchmark {name!r}: {hint}They are {', '.join(BENCHMARKS)}")


def benchmark_of(source: Source) -> Benchmark | None:
    """The benchmark that images are of, from files or prepared; None if they are of none.

    It goes by the title, which files of one's own may have, too; but they have no K of their own.
    """
    titled = {benchmark.title: benchmark for benchmark in BENCHMARKS.values()}
    return titled.get(source.images.name) if source.ks else None


def benchmarks_table() -> Table:
    """All benchmarks, for the terminal."""
    table = Table()
    table.add_column("name", no_wrap=True)
    table.add_column("data set")
    table.add_column("part")
    for column in ("images", "classes", "fetched"):
        table.add_column(column, justify="right")
    for benchmark in BENCHMARKS.values():
        gigabytes = sum(file.size or 0 for file in benchmark.files) / 1e9
        served = benchmark.files and all(file.url for file in benchmark.files)
        table.add_row(
            benchmark.name,
            "\n".join(filter(None, (benchmark.title, benchmark.stamp))),
            "\n".join(benchmark.counts),
            "\n".join(f"{count.images:,}" for count in benchmark.counts.values()),
            "\n".join(f"{count.classes:,}" for count in benchmark.counts.values()),
            f"{gigabytes:.1f} GB" if served else "by hand",
        )
    return table


# --- Comparing a copy with its benchmark -------------------------------------------------------


def _are_there(folder: Path, paths: Sequence[str]) -> np.ndarray:
    """Which files are in a folder; -> bool, (N,). No link is followed out of it.

    One look at each directory: asking for each of 120,000 files takes many times as long.
    """
    inside = _real(folder)
    pure = [PurePosixPath(path) for path in paths]
    names = {parent: _file_names(inside, parent) for parent in {path.parent for path in pure}}
    return np.array([path.name in names[path.parent] for path in pure], bool)


def _file_names(inside: Path, parent: PurePosixPath) -> set[str]:
    try:
        directory = _real(inside / parent)
        if not directory.is_relative_to(inside):
            return set()
        with os.scandir(directory) as entries:
            return {entry.name for entry in entries if _is_file(entry, inside)}
    except (OSError, ValueError):  # no such directory, or no name that one could have
        return set()


def _is_file(entry: os.DirEntry[str], inside: Path) -> bool:
    try:
        return entry.is_file() and (
            not entry.is_symlink() or _real(Path(entry.path)).is_relative_to(inside)
        )
    except OSError:  # a link to itself, or to where one may not look
        return False


def _real(path: Path) -> Path:
    """Without links; unlike `Path.resolve`, one that leads to itself is left as it is."""
    return Path(os.path.realpath(path))


def _counts(benchmark: Benchmark, labels: np.ndarray, split: np.ndarray) -> dict[str, Count]:
    chosen = {part: labels[split == part] for part in benchmark.counts}
    return {part: Count(len(of), len(np.unique(of))) for part, of in chosen.items()}


def _broken(images: ImageFiles, console: Console | None) -> list[BrokenImageError]:
    with progress(console, "reading images", len(images)) as on_progress:
        return list(find_broken(images, on_progress=on_progress).values())


def _repeated(listing: Listing) -> list[str]:
    twice = [path for path, count in Counter(listing.paths).items() if count > 1]
    return [f"the lists name {len(twice):,} files more than once: {named(twice)}"] * bool(twice)


def _shared(listing: Listing) -> list[str]:
    is_train = listing.split == "train"
    both = np.intersect1d(listing.labels[is_train], listing.labels[~is_train])
    names = [listing.class_names[label] for label in both]
    return [f"{len(names):,} classes are in train and in test: {named(names)}"] * bool(names)


def _shrunk(images: ImageFiles) -> list[str]:
    """A fault if most images of a sample are too small for their boxes."""
    if not images.boxes:
        return []
    sample = np.linspace(0, len(images) - 1, min(PROBED, len(images))).astype(int)
    smaller = known = 0
    for index in sample:
        try:
            with Image.open(images.paths[index], formats=FORMATS) as image:
                width, height = image.size
        except Exception:  # a damaged file makes Pillow raise almost anything; decoding names it
            continue
        _, _, x2, y2 = images.boxes[index]
        known += 1
        smaller += x2 > width + 1 or y2 > height + 1  # some official boxes end a pixel outside
    if 2 * smaller <= known:
        return []
    return [
        f"{smaller} of {known} images are smaller than their official boxes say: a copy that was "
        "cropped or resized; take the publisher's"
    ]


def _cause(copy: Copy) -> str | None:
    """What makes the counts differ, most likely; None if they do not."""
    benchmark, expected = copy.benchmark, copy.benchmark.counts
    for counts in (copy.found, copy.listed):
        if likely := benchmark.mistaken.get(_total(counts)):
            return likely
    if copy.faults and not _total(copy.listed):
        if (copy.root / "train").is_dir() and (copy.root / "test").is_dir():
            return "a copy that was sorted into train and test is the classification split"
        return None  # the faults say what is wrong with the lists
    if copy.listed != expected and benchmark.has_lists:
        if sorted(copy.listed.values()) == sorted(expected.values()):
            return f"the lists of {' and '.join(expected)} are exchanged"
        return "lists that were changed or cut off; take the publisher's"
    if _total(copy.found) > _total(expected):
        return "files that are not part of it: take them out"
    if copy.missing or copy.broken or copy.listed != expected:
        if not len(copy.images):
            return "images that are not unpacked, or not where the lists say"
        return "half a download, or an unpacking that stopped: unpack the archives again"
    return None


def _total(counts: Mapping[str, Count]) -> int:
    return sum(count.images for count in counts.values())


def _sizes(counts: Mapping[str, Count]) -> str:
    adjective = {"train": "training"}
    return ", ".join(
        f"{count.images:,} {adjective.get(part, part)} images of {count.classes:,} classes"
        for part, count in counts.items()
    )


# --- Reading the lists -------------------------------------------------------------------------


def _read_cub200(root: Path) -> Listing:
    """CUB_200_2011/images.txt and three more; classes 1-100 train (Song et al., 2016)."""
    folder = _find(root, "CUB_200_2011", "images.txt")
    names = _numbered(folder / "classes.txt")
    paths = _numbered(folder / "images.txt")
    class_of = _numbered(folder / "image_class_labels.txt", paths)
    box_of = _numbered(folder / "bounding_boxes.txt", paths)
    label_of = {number: label for label, number in enumerate(names)}
    if wrong := [number for number in names if not number.isdecimal()]:
        raise InputError(
            f"{folder / 'classes.txt'} has class numbers that are none: {named(wrong)}"
        )
    labels = []
    for image, path in paths.items():
        number = class_of[image]
        if names.get(number) != path.partition("/")[0]:
            raise InputError(
                f"{folder / 'image_class_labels.txt'}: {path} is of class {number}, but by "
                f"classes.txt that is {names.get(number, 'none')}"
            )
        labels.append(label_of[number])
    return Listing(
        folder,
        [f"images/{path}" for path in paths.values()],
        np.array(labels, np.int64),
        list(names.values()),
        np.where(np.array([int(class_of[image]) for image in paths]) <= 100, "train", "test"),
        [_box(box_of[image], folder / "bounding_boxes.txt", image) for image in paths],
    )


def _box(values: str, path: Path, image: str) -> Box:
    """x, y, width, height."""
    try:
        x, y, width, height = map(float, values.split())
    except ValueError:
        raise InputError(f"{path}: the box of image {image} is {values!r}, not 4 numbers") from None
    return x, y, x + width, y + height


def _read_cars196(root: Path) -> Listing:
    """cars_annos.mat with car_ims/, or devkit/ with cars_train/ and cars_test/.

    Classes 1-98 train (Song et al., 2016), whichever half of the classification split an image is
    in.
    """
    folder = _find(root, "stanford_cars", "cars_annos.mat", "devkit/cars_train_annos.mat")
    devkit = folder / "devkit"
    if (folder / "car_ims").is_dir() or not devkit.is_dir():
        file = folder / "cars_annos.mat"
        annotations = _car_annotations(file, "relative_im_path", "")
    else:
        labelled = "cars_test_annos_withlabels.mat"
        test = _either(folder, labelled, f"devkit/{labelled}")
        annotations = _car_annotations(devkit / "cars_train_annos.mat", "fname", "cars_train/")
        annotations += _car_annotations(test, "fname", "cars_test/")
        file = devkit / "cars_meta.mat"
    names = [str(name) for name in _mat(file, "class_names")]
    paths, numbers, boxes = zip(*annotations, strict=True) if annotations else ((), (), ())
    labels = np.array(numbers, np.int64) - 1
    if outside := sorted({number for number in numbers if not 1 <= number <= len(names)}):
        raise InputError(f"{file} names {len(names)} classes, but images are of {named(outside)}")
    return Listing(folder, paths, labels, names, np.where(labels < 98, "train", "test"), boxes)


def _car_annotations(file: Path, path_field: str, prefix: str) -> list[tuple[str, int, Box]]:
    """Path, class and box of each image; the files count pixels from 1 and include the last one."""
    annotations = _mat(file, "annotations")
    fields = [path_field, "class", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"]
    if absent := [name for name in fields if name not in (annotations.dtype.names or ())]:
        raise InputError(
            f"{file}: its annotations have no {', '.join(absent)}; the classes of the test images "
            "are in cars_test_annos_withlabels.mat"
        )
    try:
        return [
            (f"{prefix}{path}", int(number), (float(x1) - 1, float(y1) - 1, float(x2), float(y2)))
            for path, number, x1, y1, x2, y2 in annotations[fields].tolist()
        ]
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: an annotation cannot be used ({error})") from None


def _mat(path: Path, variable: str) -> np.ndarray:
    """A variable of a MATLAB file, (N,)."""
    from scipy.io import loadmat

    try:
        values = loadmat(path, squeeze_me=True, variable_names=[variable])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged file makes the parser raise almost anything
        raise InputError(f"{path} is no MATLAB file that can be read ({error})") from None
    if variable not in values:
        raise InputError(f"{path} holds no {variable}: it is another file than its name says")
    return np.atleast_1d(values[variable])


def _read_sop(root: Path) -> Listing:
    """Ebay_train.txt and Ebay_test.txt."""
    folder = _find(root, "Stanford_Online_Products", "Ebay_train.txt")
    paths: list[str] = []
    items: list[int] = []
    split: list[str] = []
    for part in ("train", "test"):
        file = folder / f"Ebay_{part}.txt"
        for number, line in _lines(file)[1:]:
            try:
                _, item, _, path = line.split(maxsplit=3)
                items.append(int(item))
            except ValueError:
                raise InputError(
                    f"{file}, line {number}: {line!r} is not image_id class_id super_class_id path"
                ) from None
            paths.append(path)
            split.append(part)
    names, labels = np.unique(items, return_inverse=True)
    return Listing(
        folder, paths, labels.astype(np.int64), [str(name) for name in names], np.array(split)
    )


def _read_inshop(root: Path, images: str, other: str) -> Listing:
    """Eval/list_eval_partition.txt, and the images in Img/<images>/, not those in <other>."""
    name = "list_eval_partition.txt"
    folder = _find(root, "In-shop Clothes Retrieval Benchmark", f"Eval/{name}", name)
    file = _either(folder, f"Eval/{name}", name)
    directory = _either(folder, f"Img/{images}", images)
    if not directory.is_dir() and (there := _either(folder, f"Img/{other}", other)).is_dir():
        raise InputError(
            f"{there} has images of the other resolution: img is inshop, img_highres is "
            "inshop-highres"
        )
    prefix = directory.relative_to(folder).as_posix()
    paths: list[str] = []
    items: list[str] = []
    split: list[str] = []
    for number, line in _lines(file)[2:]:
        try:
            path, item, part = line.rsplit(maxsplit=2)
        except ValueError:
            path = item = part = ""
        if part not in ("train", "query", "gallery"):
            raise InputError(
                f"{file}, line {number}: {line!r} is not image_name item_id and train, query or "
                "gallery"
            )
        paths.append(f"{prefix}/{path.removeprefix('img/')}")
        items.append(item)
        split.append(part)
    names, labels = np.unique(items, return_inverse=True)
    return Listing(folder, paths, labels.astype(np.int64), names.tolist(), np.array(split))


def _read_numbered_folders(root: Path, name: str, train_classes: int) -> Listing:
    """One folder a class, "001.Black_footed_Albatross"; the first classes train."""
    folder = root / name if (root / name).is_dir() else root
    images = image_folder(folder)
    numbers = []
    for class_name in images.class_names:
        if not re.match(r"\d{3}\.", class_name):
            raise InputError(f"{folder / class_name}: class folders begin as 001.Name does")
        numbers.append(int(class_name[:3]))
    return Listing(
        folder,
        [path.relative_to(folder).as_posix() for path in images.paths],
        images.labels,
        images.class_names,
        np.where(np.array(numbers)[images.labels] <= train_classes, "train", "test"),
    )


def _find(root: Path, own: str, *files: str) -> Path:
    """Where any of the files is: in `root` or in the folder that the archive makes in it."""
    for folder in (root, root / own):
        if any((folder / file).is_file() for file in files):
            return folder
    raise InputError(
        f"there is no {' or '.join(files)} in {root}, nor in a folder {own} in it: give the folder "
        "that the archives were unpacked into"
    )


def _either(folder: Path, *names: str) -> Path:
    """The first that exists, or else the first."""
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a list with their numbers, without empty ones."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not in UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _numbered(path: Path, wanted: Iterable[str] = ()) -> dict[str, str]:
    """A list of "<number> <value>" lines; it has to have those that are wanted."""
    values: dict[str, str] = {}
    for line_number, line in _lines(path):
        number, _, value = line.strip().partition(" ")
        if number in values or not value:
            raise InputError(f"{path}, line {line_number}: {line!r} has no value or a second one")
        values[number] = value
    if absent := [number for number in wanted if number not in values]:
        raise InputError(f"{path} has no line for {len(absent):,} images: {named(absent)}")
    return values


# --- The table ---------------------------------------------------------------------------------

NOT_COMPARABLE = "not comparable with published results"

CUB200 = Benchmark(
    name="cub200",
    title="CUB-200-2011",
    counts={"train": Count(5_864, 100), "test": Count(5_924, 100)},
    read=_read_cub200,
    homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    files=(
        RemoteFile(
            "CUB_200_2011.tgz",
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            1_150_585_339,
            "sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
        ),
    ),
    mistaken={
        5_994: "the training images of the classification split without its test images",
        5_794: "the test images of the classification split without its training images",
    },
)

Cars196 = Benchmark(
    name="cars196",
    title="CARS-196",
    counts={"train": Count(8_054, 98), "test": Count(8_131, 98)},
    read=_read_cars196,
    # Neither the page nor the files have been served there since 2023.
    homepage="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    files=(
        RemoteFile("car_ims.tgz", None, 1_956_628_579, "md5:d5c8f0aa497503f355e17dc7886c3f14"),
        RemoteFile("cars_annos.mat", None, 394_471, "md5:b407c6086d669747186bd1d764ff9dbc"),
    ),
    mistaken={
        8_144: "the training images of the classification split without its test images",
        8_041: "the test images of the classification split without its training images",
    },
)

StanfordOnlineProducts = Benchmark(
    name="sop",
    title="Stanford Online Products",
    counts={"train": Count(59_551, 11_318), "test": Count(60_502, 11_316)},
    read=_read_sop,
    homepage="https://cvgl.stanford.edu/projects/lifted_struct/",
    files=(
        RemoteFile(
            "Stanford_Online_Products.zip",
            "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
            3_083_860_082,
            "sha256:b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
        ),
    ),
    ks=(1, 10, 100, 1000),
)

InShop = Benchmark(
    name="inshop",
    title="In-shop clothes retrieval",
    counts={
        "train": Count(25_882, 3_997),
        "query": Count(14_218, 3_985),
        "gallery": Count(12_612, 3_985),
    },
    read=partial(_read_inshop, images="img", other="img_highres"),
    homepage="https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
    files=(
        RemoteFile("img.zip", None, None, None),
        RemoteFile("list_eval_partition.txt", None, None, None),
    ),
    ks=(1, 10, 20, 30, 40, 50),
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        CUB200,
        replace(CUB200, name="cub200-cropped", title="CUB-200-2011 (cropped)", cropped=True),
        Cars196,
        replace(Cars196, name="cars196-cropped", title="CARS-196 (cropped)", cropped=True),
        StanfordOnlineProducts,
        InShop,
        replace(
            InShop,
            name="inshop-highres",
            title="In-shop clothes retrieval (high resolution)",
            read=partial(_read_inshop, images="img_highres", other="img"),
            files=(RemoteFile("img_highres.zip", None, None, None), *InShop.files[1:]),
        ),
        Benchmark(
            name="cub200-2010",
            title="CUB-200-2010",
            counts={"train": Count(2_990, 100), "test": Count(3_043, 100)},
            read=partial(_read_numbered_folders, name="cub200-2010", train_classes=100),
            homepage="https://www.vision.caltech.edu/datasets/",
            stamp=NOT_COMPARABLE,
            has_lists=False,
        ),
        Benchmark(
            name="cars196-train-half",
            title="CARS-196 (training half)",
            counts={"train": Count(4_034, 98), "test": Count(4_088, 98)},
            read=partial(_read_numbered_folders, name="cars196-train-half", train_classes=98),
            homepage=Cars196.homepage,
            stamp=NOT_COMPARABLE,
            has_lists=False,
        ),
    )
}
