"""Miniatures of every official layout, as they should be and in the ways they go wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.io import savemat

from abe import cli
from abe.config import Config, DataConfig
from abe.data.benchmarks import BENCHMARKS, Benchmark, Copy, Count, find_benchmark
from abe.data.decode import printable
from abe.data.splits import open_splits
from abe.data.transforms import Preprocessing
from abe.errors import InputError
from abe.evaluate import evaluate_run, evaluate_test, raw_pixels
from abe.files import read_json_lines
from abe.intervals import unpack_classes
from abe.paper import table_rows
from abe.report.html import write_report
from abe.results import append_record, markdown_table, scores_table, summarize
from abe.train import Trainer

# --- Writing copies ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """An image as the lists have it; `number` counts the classes of all parts from 1."""

    number: int
    place: int
    part: str
    mark: str = ""  # in the file's name
    box: tuple[int, int, int, int] = (1, 1, 6, 5)  # x1, y1, x2, y2: pixels from 1, both included


def entries_of(counts: dict[str, Count]) -> list[Entry]:
    """Images of the size of a benchmark, spread evenly; query and gallery share their classes."""
    entries = []
    first = {"train": 1, "gallery": 1 + counts["train"].classes}
    first["test"] = first["query"] = first["gallery"]
    for part, count in counts.items():
        numbers = np.arange(count.images) % count.classes + first[part]
        entries += [
            Entry(int(number), place, part) for place, number in enumerate(np.sort(numbers))
        ]
    return entries


def lines(path: Path, rows: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def cub_folder(number: int) -> str:
    return f"{number:03d}.Bird_{number}"


def cub_path(entry: Entry) -> str:
    return f"images/{cub_folder(entry.number)}/Bird_{entry.part}_{entry.place}{entry.mark}.jpg"


def write_cub(root: Path, entries: list[Entry]) -> None:
    root = root / "CUB_200_2011"
    numbered = list(enumerate(entries, 1))
    classes = range(1, max(200, *(entry.number for entry in entries)) + 1)
    paths = ((i, cub_path(entry).removeprefix("images/")) for i, entry in numbered)
    lines(root / "images.txt", (f"{i} {path}" for i, path in paths))
    lines(root / "classes.txt", (f"{number} {cub_folder(number)}" for number in classes))
    lines(root / "image_class_labels.txt", (f"{i} {entry.number}" for i, entry in numbered))
    boxes = ((i, *entry.box) for i, entry in numbered)
    corners = (
        (i, f"{x1 - 1}.0 {y1 - 1}.0 {x2 - x1 + 1}.0 {y2 - y1 + 1}.0") for i, x1, y1, x2, y2 in boxes
    )
    lines(root / "bounding_boxes.txt", (f"{i} {box}" for i, box in corners))


BOX_FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def write_mat(path: Path, annotations: list[dict[str, object]] | None, classes: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, np.ndarray] = {}
    if annotations is not None:
        table = np.empty((1, len(annotations)), [(name, object) for name in annotations[0]])
        for index, annotation in enumerate(annotations):
            table[0, index] = tuple(annotation.values())
        content["annotations"] = table
    if classes:
        content["class_names"] = np.empty((1, classes), object)
        content["class_names"][0] = [f"Car {number}" for number in range(1, classes + 1)]
    savemat(path, content)


def annotation(entry: Entry, field: str, path: str) -> dict[str, object]:
    return {**dict(zip(BOX_FIELDS, entry.box, strict=True)), "class": entry.number, field: path}


def car_path(entry: Entry) -> str:
    return f"car_ims/{entry.part}{entry.place:06d}{entry.mark}.jpg"


def write_cars(root: Path, entries: list[Entry]) -> None:
    annotations = [annotation(entry, "relative_im_path", car_path(entry)) for entry in entries]
    classes = max(196, *(entry.number for entry in entries))
    write_mat(root / "cars_annos.mat", annotations, classes)


def devkit_path(entry: Entry) -> str:
    """The classification split has every class on both sides."""
    return (
        f"cars_{('test', 'train')[entry.place % 2]}/{entry.part}{entry.place:05d}{entry.mark}.jpg"
    )


def write_devkit(root: Path, entries: list[Entry]) -> None:
    root = root / "stanford_cars"
    classes = max(196, *(entry.number for entry in entries))
    write_mat(root / "devkit" / "cars_meta.mat", None, classes)
    for folder, file in (
        ("cars_train", root / "devkit" / "cars_train_annos.mat"),
        ("cars_test", root / "cars_test_annos_withlabels.mat"),
    ):
        inside = [entry for entry in entries if devkit_path(entry).startswith(folder)]
        names = (devkit_path(entry).partition("/")[2] for entry in inside)
        write_mat(file, [annotation(e, "fname", n) for e, n in zip(inside, names, strict=True)])


def sop_path(entry: Entry) -> str:
    return f"bicycle_final/{entry.number}_{entry.place}{entry.mark}.JPG"


def write_sop(root: Path, entries: list[Entry]) -> None:
    for part in ("train", "test"):
        inside = enumerate((entry for entry in entries if entry.part == part), 1)
        rows = [f"{i} {entry.number} 1 {sop_path(entry)}" for i, entry in inside]
        list_file = root / "Stanford_Online_Products" / f"Ebay_{part}.txt"
        lines(list_file, ["image_id class_id super_class_id path", *rows])


def inshop_path(entry: Entry, images: str = "Img/img") -> str:
    return (
        f"{images}/WOMEN/Dresses/id_{entry.number:08d}/{entry.part}_{entry.place}{entry.mark}.jpg"
    )


def write_inshop(root: Path, entries: list[Entry]) -> None:
    rows = (
        f"{inshop_path(entry, 'img')}    id_{entry.number:08d} {entry.part}" for entry in entries
    )
    head = [len(entries), "image_name item_id evaluation_status"]
    lines(root / "Eval" / "list_eval_partition.txt", [*head, *rows])


@dataclass(frozen=True)
class Layout:
    """How a publisher lays a benchmark out; `lists` are the files that say what there is."""

    benchmark: str
    write: Callable[[Path, list[Entry]], None]
    path: Callable[[Entry], str]
    folder: str
    lists: tuple[str, ...]

    def make(self, root: Path, entries: list[Entry], images: bool = True) -> None:
        self.write(root, entries)
        if images:
            for index, entry in enumerate(entries):
                picture = root / f"picture_{index // 30_000}.jpg"  # may not have too many links
                if index % 30_000 == 0:
                    Image.new("RGB", (8, 6), "red").save(picture)
                file = root / self.folder / self.path(entry)
                file.parent.mkdir(parents=True, exist_ok=True)
                os.link(picture, file)

    def small(self) -> Benchmark:
        """The benchmark with 2 images of each of its classes, of which a part has 100 at most."""
        official = BENCHMARKS[self.benchmark]
        classes = {part: min(count.classes, 100) for part, count in official.counts.items()}
        return replace(official, counts={p: Count(2 * n, n) for p, n in classes.items()})


CUB = Layout(
    "cub200",
    write_cub,
    cub_path,
    "CUB_200_2011",
    ("images.txt", "image_class_labels.txt", "classes.txt", "bounding_boxes.txt"),
)
CARS = Layout("cars196", write_cars, car_path, "", ("cars_annos.mat",))
DEVKIT = Layout(
    "cars196",
    write_devkit,
    devkit_path,
    "stanford_cars",
    (
        "devkit/cars_train_annos.mat",
        "devkit/cars_meta.mat",
        "cars_test_annos_withlabels.mat",
    ),
)
SOP = Layout(
    "sop", write_sop, sop_path, "Stanford_Online_Products", ("Ebay_train.txt", "Ebay_test.txt")
)
INSHOP = Layout("inshop", write_inshop, inshop_path, "", ("Eval/list_eval_partition.txt",))
LAYOUTS = {"cub": CUB, "cars": CARS, "devkit": DEVKIT, "sop": SOP, "inshop": INSHOP}

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def refusal(copy: Copy, allow_partial: bool = False) -> str:
    assert not copy.complete
    with pytest.raises(InputError) as error:
        copy.require(allow_partial)
    return str(error.value)


def says(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text


# --- As they should be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (CUB, {"train": (5864, 100), "test": (5924, 100)}),
        (CARS, {"train": (8054, 98), "test": (8131, 98)}),
        (DEVKIT, {"train": (8054, 98), "test": (8131, 98)}),
        (SOP, {"train": (59551, 11318), "test": (60502, 11316)}),
        (INSHOP, {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)}),
    ],
    ids=LAYOUTS,
)
def test_lists_of_full_length_without_images(layout, expected, tmp_path):
    benchmark = BENCHMARKS[layout.benchmark]
    layout.make(tmp_path, entries_of(benchmark.counts), images=False)
    copy = benchmark.check(tmp_path)
    assert copy.listed == expected == benchmark.counts
    total = sum(images for images, _ in expected.values())
    assert len(copy.missing) == total
    says(refusal(copy), f"missing files: {total:,} of {total:,}: ", "images that are not unpacked")
    says(refusal(copy, allow_partial=True), "found: 0 training images of 0 classes")


@pytest.mark.slow
@every_layout
def test_lists_of_full_length_that_are_wrong(layout, tmp_path):
    """Without the last image; and with the classes of the two sides exchanged."""
    benchmark = BENCHMARKS[layout.benchmark]
    entries = entries_of(benchmark.counts)
    layout.make(tmp_path, entries[:-1], images=False)
    copy = benchmark.check(tmp_path)
    *parts, last = benchmark.counts
    count = benchmark.counts[last]
    assert {part: copy.listed[part] for part in parts} == {p: benchmark.counts[p] for p in parts}
    says(refusal(copy), f"{count.images - 1:,} {last} images of {count.classes:,} classes", CHANGED)

    other = {"train": last, last: "train"}
    middle, end = benchmark.counts["train"].classes, benchmark.counts[last].classes

    def exchanged(entry: Entry) -> Entry:
        number = entry.number + (end if entry.number <= middle else -middle)
        return replace(entry, number=number, part=other.get(entry.part, entry.part))

    layout.make(tmp_path, [*map(exchanged, entries)], images=False)
    copy = benchmark.check(tmp_path)
    if "gallery" not in benchmark.counts:
        assert (copy.listed["train"], copy.listed[last]) == (count, benchmark.counts["train"])
    parts = " and ".join(benchmark.counts)
    says(refusal(copy), f"likely cause: the lists of {parts} are exchanged")


@pytest.mark.slow
@every_layout
def test_copies_of_full_size(layout, tmp_path):
    benchmark = BENCHMARKS[layout.benchmark]
    layout.make(tmp_path, entries_of(benchmark.counts))
    copy = benchmark.check(tmp_path).require()
    assert copy.found == benchmark.counts
    assert copy.stamps == ()
    shutil.rmtree(tmp_path)


@every_layout
def test_a_copy_is_read(layout, tmp_path):
    benchmark = layout.small()
    entries = entries_of(benchmark.counts)
    layout.make(tmp_path, entries)
    for root in (tmp_path, tmp_path / layout.folder):
        copy = benchmark.check(root, decode=True).require()
        assert copy.stamps == ()
        found = {
            path.relative_to(tmp_path / layout.folder).as_posix(): (int(label), str(part))
            for path, label, part in zip(
                copy.images.paths, copy.images.labels, copy.split, strict=True
            )
        }
        assert found == {layout.path(entry): (entry.number - 1, entry.part) for entry in entries}
        assert copy.images.name == benchmark.title
        assert copy.images.load(0).size == (8, 6)


@pytest.mark.parametrize("layout", [CUB, CARS, DEVKIT], ids=["cub", "cars", "devkit"])
def test_official_boxes_crop(layout, tmp_path):
    benchmark = layout.small()
    entries = entries_of(benchmark.counts)
    entries[5] = replace(entries[5], box=(2, 3, 6, 5))
    layout.make(tmp_path, entries)
    picture = Image.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3))
    path = tmp_path / layout.folder / layout.path(entries[5])
    path.unlink()
    picture.save(path, "PNG")

    cropped = replace(benchmark, cropped=True).check(tmp_path).require().images
    index = [*cropped.paths].index(path)
    np.testing.assert_array_equal(cropped.load(index), np.asarray(picture)[2:5, 1:6])
    whole = benchmark.check(tmp_path).require().images
    np.testing.assert_array_equal(whole.load(index), picture)


@every_layout
def test_lists_with_crlf_and_a_byte_order_mark(layout, tmp_path):
    benchmark = layout.small()
    layout.make(tmp_path, entries_of(benchmark.counts))
    for path in (tmp_path / layout.folder / name for name in layout.lists):
        if path.suffix == ".txt":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    benchmark.check(tmp_path).require()


@every_layout
def test_names_with_spaces_and_letters_of_any_language(layout, tmp_path):
    benchmark = layout.small()
    entries = [replace(entry, mark=" ä 鳥") for entry in entries_of(benchmark.counts)]
    layout.make(tmp_path, entries)
    copy = benchmark.check(tmp_path, decode=True).require()
    assert all(path.stem.endswith(" ä 鳥") for path in copy.images.paths)


def test_images_as_publishers_ship_them(tmp_path):
    """Grey, CMYK, turned by EXIF: upright RGB, and boxes are of the upright image."""
    benchmark = CUB.small()
    entries = entries_of(benchmark.counts)
    entries[:3] = [replace(entry, box=(1, 1, 6, 4)) for entry in entries[:3]]
    CUB.make(tmp_path, entries)
    turned = Image.Exif()
    turned[0x0112] = 6
    for entry, mode, size, exif in (
        (entries[0], "L", (8, 6), None),
        (entries[1], "CMYK", (8, 6), None),
        (entries[2], "RGB", (6, 8), turned),
    ):
        path = tmp_path / CUB.folder / CUB.path(entry)
        path.unlink()
        Image.new(mode, size).save(path, **({"exif": exif} if exif else {}))
    copy = replace(benchmark, cropped=True).check(tmp_path, decode=True).require()
    images = {Path(path).name: index for index, path in enumerate(copy.images.paths)}
    for entry in entries[:3]:
        image = copy.images.load(images[Path(CUB.path(entry)).name])
        assert (image.mode, image.size) == ("RGB", (6, 4))


def test_inshop_in_the_other_resolution_is_another_benchmark(tmp_path):
    high = replace(BENCHMARKS["inshop-highres"], counts=INSHOP.small().counts)
    entries = entries_of(high.counts)
    replace(INSHOP, path=lambda e: inshop_path(e, "Img/img_highres")).make(tmp_path, entries)
    copy = high.check(tmp_path).require()
    assert copy.images.paths[0].parts[-5] == "img_highres"
    says(refusal(INSHOP.small().check(tmp_path)), "img_highres is inshop-highres")
    (tmp_path / "Img" / "img_highres").rename(tmp_path / "img_highres")
    high.check(tmp_path).require()


@pytest.mark.parametrize(("name", "classes"), [("cub200-2010", 200), ("cars196-train-half", 196)])
def test_folders_of_numbered_classes(name, classes, tmp_path):
    benchmark = BENCHMARKS[name]
    half = Count(classes, classes // 2)
    benchmark = replace(benchmark, counts={"train": half, "test": half})
    folders = [tmp_path / name / f"{number:03d}.A_{number}" for number in range(1, classes + 1)]
    for folder in folders:
        folder.mkdir(parents=True)
        for number in (1, 2):
            Image.new("RGB", (4, 4)).save(folder / f"{number}.png")
    copy = benchmark.check(tmp_path).require()
    assert copy.stamps == ("not comparable with published results",)
    assert copy.split.tolist() == ["train"] * classes + ["test"] * classes

    for path in folders[0].iterdir():
        path.unlink()
    folders[0].rmdir()
    stopped = benchmark.check(tmp_path)
    says(
        refusal(stopped), f"found: {classes - 2} training", "half a download, or an unpacking that"
    )
    partial = stopped.require(allow_partial=True)
    assert partial.found == {"train": Count(classes - 2, classes // 2 - 1), "test": half}
    assert partial.stamps[1] == f"partial, {2 * classes - 2} of {2 * classes}"
    extra = shutil.copytree(folders[1], folders[-1].with_name(f"{classes + 1}.A"))
    shutil.copytree(folders[1], folders[0].with_name("000.A"))
    text = refusal(benchmark.check(tmp_path), allow_partial=True)
    says(
        text,
        f"{classes + 2} test images of {classes // 2 + 1} classes",
        "not part of it: take them",
    )
    shutil.rmtree(extra)
    folders[-1].rename(folders[-1].with_name("A"))
    says(refusal(benchmark.check(tmp_path)), "class folders begin as 001.Name does")


def test_official_counts():
    """decisions.md of the paper; the variants are those of our own copies."""
    assert {name: tuple(benchmark.counts.values()) for name, benchmark in BENCHMARKS.items()} == {
        "cub200": ((5864, 100), (5924, 100)),
        "cub200-cropped": ((5864, 100), (5924, 100)),
        "cars196": ((8054, 98), (8131, 98)),
        "cars196-cropped": ((8054, 98), (8131, 98)),
        "sop": ((59551, 11318), (60502, 11316)),
        "inshop": ((25882, 3997), (14218, 3985), (12612, 3985)),
        "inshop-highres": ((25882, 3997), (14218, 3985), (12612, 3985)),
        "cub200-2010": ((2990, 100), (3043, 100)),
        "cars196-train-half": ((4034, 98), (4088, 98)),
    }


def test_a_name_that_there_is_not():
    with pytest.raises(InputError, match="no benchmark 'cub20': did you mean 'cub200'"):
        find_benchmark("cub20")


# --- As they should not be ---------------------------------------------------------------------


@dataclass(frozen=True)
class Miniature:
    """A copy that a test may damage, written again from changed entries by `write`."""

    layout: Layout
    benchmark: Benchmark
    root: Path
    entries: list[Entry]

    def list(self, number: int = 0) -> Path:
        return self.root / self.layout.folder / self.layout.lists[number]

    def image(self, entry: Entry) -> Path:
        return self.root / self.layout.folder / self.layout.path(entry)

    def write(self, entries: list[Entry]) -> None:
        self.layout.write(self.root, entries)

    def refusal(self, allow_partial: bool = False, decode: bool = False) -> str:
        return refusal(self.benchmark.check(self.root, decode=decode), allow_partial)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def miniature(request, tmp_path) -> Miniature:
    layout = request.param
    benchmark = layout.small()
    entries = entries_of(benchmark.counts)
    layout.make(tmp_path, entries)
    return Miniature(layout, benchmark, tmp_path, entries)


def test_missing_files(miniature):
    gone = [miniature.entries[index] for index in (0, 3)]
    for entry in gone:
        miniature.image(entry).unlink()
    total = len(miniature.entries)
    text = miniature.refusal()
    train = miniature.benchmark.counts["train"]
    says(
        text,
        f"is not {miniature.benchmark.name} as its publisher ships it",
        f"expected: {train.images} training images of {train.classes} classes, ",
        f"found: {train.images - 2} training images of {train.classes} classes, ",
        f"missing files: 2 of {total}: ",
        *(miniature.layout.path(entry) for entry in gone),
        "half a download",
        "--allow-partial",
    )
    partial = miniature.benchmark.check(miniature.root).require(allow_partial=True)
    assert partial.stamps == (f"partial, {total - 2} of {total}",)
    assert len(partial.images) == len(partial.split) == total - 2


def test_lists_that_are_cut_off(miniature):
    train = miniature.benchmark.counts["train"]
    miniature.write(miniature.entries[4:])
    text = miniature.refusal()
    says(
        text,
        f"expected: {train.images} training images of {train.classes} classes, ",
        f"found: {train.images - 4} training images of {train.classes - 2} classes, ",
        "lists that were changed or cut off",
    )
    assert "missing files" not in text
    miniature.benchmark.check(miniature.root).require(allow_partial=True)


def test_one_image_too_many(miniature):
    last = replace(miniature.entries[-1], place=999)
    miniature.write([*miniature.entries, last])
    os.link(miniature.image(miniature.entries[0]), miniature.image(last))
    count = [*miniature.benchmark.counts.values()][-1]
    text = miniature.refusal(allow_partial=True)
    says(text, f"found: {2 * count.classes} training", f"{count.images + 1} ", "lists that were")
    assert "--allow-partial" not in text


def test_a_class_too_many(miniature):
    numbers = [entry.number for entry in miniature.entries]
    extra = replace(miniature.entries[-1], number=max(*numbers, 196) + 1, place=999)
    miniature.write([*miniature.entries, extra])
    path = miniature.image(extra)
    path.parent.mkdir(exist_ok=True)
    os.link(miniature.image(miniature.entries[0]), path)
    count = [*miniature.benchmark.counts.values()][-1]
    says(
        miniature.refusal(allow_partial=True),
        f"{count.images + 1} {extra.part} images of {count.classes + 1} classes",
    )


@pytest.mark.parametrize("miniature", [CUB], indirect=True, ids=["cub"])
def test_exchanged_halves_of_labels(miniature):
    """Of CUB, whose folders name the classes, too."""
    labels = miniature.list(1)
    rows = [line.split() for line in labels.read_text().splitlines()]
    lines(labels, (f"{i} {(int(number) + 99) % 200 + 1}" for i, number in rows))
    first = "001.Bird_1/Bird_train_0.jpg is of class 101, but by classes.txt that is 101.Bird_101"
    says(miniature.refusal(allow_partial=True), f"wrong: {labels}: {first}")


OTHERS = [CARS, DEVKIT, SOP, INSHOP]


@pytest.mark.parametrize("miniature", OTHERS, indirect=True, ids=[*LAYOUTS][1:])
def test_exchanged_halves(miniature):
    more = [replace(entry, place=entry.place + 500) for entry in miniature.entries[:10]]
    counts = dict(miniature.benchmark.counts)
    counts["train"] = Count(counts["train"].images + 10, counts["train"].classes)
    benchmark = replace(miniature.benchmark, counts=counts)
    last = [*counts][-1]
    other = {"train": last, last: "train"}
    shift = counts["train"].classes

    def exchanged(entry: Entry) -> Entry:
        number = entry.number + (shift if entry.number <= shift else -shift)
        return replace(entry, part=other.get(entry.part, entry.part), number=number)

    entries = [*map(exchanged, [*miniature.entries, *more])]
    miniature.write(entries)
    says(
        refusal(benchmark.check(miniature.root)),
        f"{counts[last].images} training images of {shift} classes",
        f"the lists of {' and '.join(counts)} are exchanged",
    )


@pytest.mark.parametrize("miniature", [SOP, INSHOP], indirect=True, ids=["sop", "inshop"])
def test_a_class_on_both_sides(miniature):
    first, last = miniature.entries[0], miniature.entries[-1]
    miniature.write([*miniature.entries[:-1], replace(last, number=first.number)])
    says(
        miniature.refusal(allow_partial=True),
        "wrong: 1 classes are in train and in test: ",
        str(first.number),
    )


def test_a_file_listed_twice(miniature):
    if miniature.layout is CUB:
        images = miniature.list()
        rows = images.read_text().splitlines()
        lines(images, [*rows[:-1], f"{len(rows)} {rows[-2].partition(' ')[2]}"])
    else:
        miniature.write([*miniature.entries[:-1], miniature.entries[-2]])
    says(
        miniature.refusal(allow_partial=True),
        "wrong: the lists name 1 files more than once: ",
        miniature.layout.path(miniature.entries[-2]),
    )


def test_a_truncated_image(miniature):
    path = miniature.image(miniature.entries[7])
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    miniature.benchmark.check(miniature.root).require()  # lists and names are right
    copy = miniature.benchmark.check(miniature.root, decode=True)
    says(refusal(copy), f"cannot be read: 1: {path}: ", "half a download")
    assert [error.path for error in copy.broken] == [path]


def test_lists_that_are_not_there(miniature):
    for number, path in enumerate(map(miniature.list, range(len(miniature.layout.lists)))):
        away = path.rename(path.with_name("away"))
        text = miniature.refusal(allow_partial=True)
        says(text, "wrong: ", "found: 0 training images of 0 classes", "expected: ", path.name)
        assert number or "there is no " in text
        away.rename(path)


CHANGED = "likely cause: lists that were changed or cut off; take the publisher's"
NO_VALUE = "wrong: {path}, line 1: '<html>' has no value or a second one"
NO_PRODUCT = "wrong: {path}, line 3: 'not found' is not image_id class_id super_class_id path"
NO_ITEM = "is not image_name item_id and train, query or gallery"
NO_MATLAB = "wrong: {path} is no MATLAB file that can be read"
DAMAGED = {  # list -> what is said of it where it is empty, a web page, cut off in the middle
    "images.txt": (CHANGED, NO_VALUE, CHANGED),
    "image_class_labels.txt": (
        "wrong: {path} has no line for 400 images: 1, 2, 3, ",
        NO_VALUE,
        "wrong: {path}, line 221: '22' has no value or a second one",
    ),
    "classes.txt": (
        ": 001.Bird_1/Bird_train_0.jpg is of class 1, but by classes.txt that is none",
        NO_VALUE,
        "107.Bird_107/Bird_test_12.jpg is of class 107, but by classes.txt that is 10",
    ),
    "bounding_boxes.txt": (
        "wrong: {path} has no line for 400 images: 1, 2, 3, ",
        NO_VALUE,
        "wrong: {path} has no line for 197 images: 204, 205, ",
    ),
    **dict.fromkeys(
        [*CARS.lists, *DEVKIT.lists], (NO_MATLAB, NO_MATLAB, "wrong: {path} cannot be")
    ),
    "Ebay_train.txt": (CHANGED, NO_PRODUCT, "wrong: {path}, line 105: '104 52 1' is not image_id"),
    "Ebay_test.txt": (CHANGED, NO_PRODUCT, CHANGED),
    "Eval/list_eval_partition.txt": (
        CHANGED,
        f"wrong: {{path}}, line 4: '404' {NO_ITEM}",
        f"wrong: {{path}}, line 309: 'img/WOMEN/Dresses/id_00000154/query_106.jpg ' {NO_ITEM}",
    ),
}


def test_lists_that_are_something_else(miniature):
    for number, name in enumerate(miniature.layout.lists):
        path = miniature.list(number)
        content = path.read_bytes()
        binary = NO_MATLAB if path.suffix == ".mat" else "wrong: {path} is not in UTF-8"
        for damaged, said in zip(
            (
                b"",
                b"<html>\n\nnot found\n404\n",
                content[: len(content) // 2],
                b"1\nb\n\xff\xfe\xfa",
            ),
            (*DAMAGED[name], binary),
            strict=True,
        ):
            path.write_bytes(damaged)
            says(miniature.refusal(), "expected: ", "found: ", said.format(path=path))
        path.write_bytes(content)


def test_links_out_of_the_folder_are_not_followed(miniature, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    first = miniature.image(miniature.entries[0])
    first.rename(outside / "secret.jpg")
    first.symlink_to(outside / "secret.jpg")
    says(miniature.refusal(), "missing files: 1 of ", miniature.layout.path(miniature.entries[0]))

    first.unlink()
    (outside / "secret.jpg").rename(first)
    first.parent.rename(outside / "images")
    first.parent.symlink_to(outside / "images")
    says(miniature.refusal(), "missing files: ", miniature.layout.path(miniature.entries[0]))

    first.parent.unlink()
    (outside / "images").rename(first.parent)
    twin = first.rename(first.with_name("twin.jpg"))
    first.symlink_to(twin.name)
    miniature.benchmark.check(miniature.root).require()


def test_a_link_to_itself_is_one_missing_file(miniature):
    """And not a folder of them; one in place of a folder is those in it."""
    first = miniature.image(miniature.entries[0])
    first.unlink()
    first.symlink_to(first.name)
    total = len(miniature.entries)
    path = miniature.layout.path(miniature.entries[0])
    says(miniature.refusal(), f"missing files: 1 of {total}: {path}\n")

    shutil.rmtree(first.parent)
    first.parent.symlink_to(first.parent.name)
    says(miniature.refusal(), f" of {total}: {path}, ")


@pytest.mark.parametrize(
    "name",
    [
        "../../outside.jpg",
        "/etc/hostname",
        "a/../../../outside.jpg",
        "a\0b/x.jpg",
        "a" * 300 + "/x.jpg",
    ],
)
def test_lists_that_lead_out_of_the_folder(name, tmp_path):
    root = tmp_path / "all" / "products"
    head = "image_id class_id super_class_id path"
    lines(root / "Ebay_train.txt", [head, f"1 1 1 {name}"])
    lines(root / "Ebay_test.txt", [head, "2 2 1 mug.jpg"])
    for path in (root / "mug.jpg", tmp_path / "outside.jpg"):
        Image.new("RGB", (8, 6)).save(path)
    sop = replace(BENCHMARKS["sop"], counts={"train": Count(1, 1), "test": Count(1, 1)})
    says(refusal(sop.check(root)), f"missing files: 1 of 2: {printable(name)}")


@pytest.mark.parametrize("layout", [CUB, CARS, DEVKIT], ids=["cub", "cars", "devkit"])
def test_a_cropped_copy(layout, tmp_path):
    benchmark = layout.small()
    entries = [replace(entry, box=(3, 2, 10, 7)) for entry in entries_of(benchmark.counts)]
    layout.make(tmp_path, entries)
    text = refusal(benchmark.check(tmp_path), allow_partial=True)
    says(text, "50 of 50 images are smaller than their official boxes say", "cropped or resized")


@pytest.mark.parametrize(
    ("layout", "of_train", "of_test"),
    [
        (CUB, 5994, 5794),
        pytest.param(CARS, 8144, 8041, marks=pytest.mark.slow),
        pytest.param(DEVKIT, 8144, 8041, marks=pytest.mark.slow),
    ],
    ids=["cub", "cars", "devkit"],
)
def test_a_half_of_the_classification_split(layout, of_train, of_test, tmp_path):
    benchmark = BENCHMARKS[layout.benchmark]
    entries = entries_of(benchmark.counts)
    for size, part in ((of_train, "training"), (of_test, "test")):
        layout.make(tmp_path / part, entries[:size])
        says(
            refusal(benchmark.check(tmp_path / part)),
            f"the {part} images of the classification split",
        )


def test_a_copy_sorted_into_the_classification_split(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    says(refusal(BENCHMARKS["cub200"].check(tmp_path)), "is the classification split", "5,864")


def test_12_of_11788_images(tmp_path):
    """Of the lists nothing, of the lists all."""
    benchmark = BENCHMARKS["cub200"]
    entries = entries_of(benchmark.counts)
    CUB.make(tmp_path, entries[:12])
    CUB.write(tmp_path, entries)
    expected = "5,864 training images of 100 classes, 5,924 test images of 100 classes"
    says(
        refusal(benchmark.check(tmp_path)),
        f"expected: {expected}",
        f"listed: {expected}",
        "found: 12 training images of 1 classes, 0 test images of 0 classes",
        "missing files: 11,776 of 11,788: images/001.Bird_1/Bird_train_12.jpg, ",
        ", and 11,756 more",
        "half a download",
    )
    refusal(benchmark.check(tmp_path), allow_partial=True)  # no test image at all
    (tmp_path / "CUB_200_2011" / "images.txt").unlink()
    says(refusal(benchmark.check(tmp_path)), f"expected: {expected}", "there is no images.txt in ")


def test_a_class_that_is_lost_moves_no_other(tmp_path):
    """The part of a class goes by its number, not by its place in classes.txt."""
    benchmark = CUB.small()
    entries = [entry for entry in entries_of(benchmark.counts) if entry.number != 50]
    CUB.make(tmp_path, entries)
    classes = tmp_path / CUB.folder / "classes.txt"
    rows = [row for row in classes.read_text().splitlines() if not row.startswith("50 ")]
    lines(classes, sorted(rows))
    copy = benchmark.check(tmp_path).require(allow_partial=True)
    assert copy.found == {"train": Count(198, 99), "test": Count(200, 100)}
    for path, part in zip(copy.images.paths, copy.split, strict=True):
        assert part == ("train" if int(path.parent.name[:3]) <= 100 else "test")

    lines(classes, [*rows[:-1], f"CC {cub_folder(200)}"])
    text = refusal(benchmark.check(tmp_path), allow_partial=True)
    says(text, f"wrong: {classes} has class numbers that are none: CC")


def test_classes_that_were_joined_are_not_a_part(tmp_path):
    """All images in fewer classes: the stamp could not tell them from the benchmark."""
    benchmark = SOP.small()
    SOP.make(tmp_path, entries_of(benchmark.counts))
    products = tmp_path / SOP.folder / "Ebay_train.txt"
    products.write_text(products.read_text().replace(" 1 1 bicycle", " 2 1 bicycle"))
    text = refusal(benchmark.check(tmp_path), allow_partial=True)
    says(text, "found: 200 training images of 99 classes", CHANGED)
    assert "--allow-partial" not in text


def test_numbers_that_are_none(tmp_path):
    benchmark = CUB.small()
    entries = entries_of(benchmark.counts)
    CUB.make(tmp_path, entries)
    folder = tmp_path / CUB.folder
    for name, line, problem in (
        ("bounding_boxes.txt", "1 0 0 4", "the box of image 1 is '0 0 4', not 4 numbers"),
        ("image_class_labels.txt", "1 201", "is of class 201, but by classes.txt that is none"),
        ("images.txt", "2 001.Bird_1/x.jpg", "line 2: '2 001.Bird_1/Bird_train_1.jpg' has no"),
        ("image_class_labels.txt", "1", "line 1: '1' has no value or a second one"),
        ("image_class_labels.txt", "0 1", "has no line for 1 images: 1"),
    ):
        content = (folder / name).read_text()
        lines(folder / name, [line, *content.splitlines()[1:]])
        says(refusal(benchmark.check(tmp_path)), f"wrong: {folder / name}", problem)
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("line", "benchmark", "file"),
    [
        ("1 1 path.jpg", "sop", "Ebay_train.txt"),
        ("1 one 1 path.jpg", "sop", "Ebay_train.txt"),
        ("img/x.jpg id_1", "inshop", "list_eval_partition.txt"),
        ("img/x.jpg id_1 val", "inshop", "list_eval_partition.txt"),
    ],
)
def test_lines_that_are_none(line, benchmark, file, tmp_path):
    lines(tmp_path / file, ["2", "head", line, line][-3 - (benchmark == "inshop") :])
    number = 2 + (benchmark == "inshop")
    says(refusal(BENCHMARKS[benchmark].check(tmp_path)), f"{file}, line {number}: {line!r} is not")


def test_mat_files_that_are_others(tmp_path):
    benchmark = DEVKIT.small()
    entries = entries_of(benchmark.counts)
    DEVKIT.make(tmp_path, entries)
    test, train, meta = (tmp_path / DEVKIT.folder / DEVKIT.lists[index] for index in (2, 0, 1))
    unlabelled = [{"fname": "00001.jpg", **dict.fromkeys(BOX_FIELDS, 1)}]
    for file, changed, classes, problem in (
        (test, unlabelled, 0, "annotations have no class; the classes of the test images are in"),
        (test, None, 196, "holds no annotations: it is another file than its name says"),
        (meta, None, 100, "names 100 classes, but images are of 101, 102"),
        (train, [annotation(entries[0], "fname", "x") | {"class": "x"}], 0, "cannot be used"),
    ):
        content = file.read_bytes()
        write_mat(file, changed, classes)
        says(refusal(benchmark.check(tmp_path)), f"wrong: {file}", problem)
        file.write_bytes(content)
    train.write_bytes(content.replace(b"\n", b"\r\n"))  # fetched as if it were text
    says(refusal(benchmark.check(tmp_path)), NO_MATLAB.format(path=train))
    train.write_bytes(content)
    (test.parent / "cars_annos.mat").write_bytes(b"of the other layout")
    test.rename(test.parent / "devkit" / test.name)
    benchmark.check(tmp_path).require()


def test_plain_values_for_json(tmp_path):
    benchmark = SOP.small()
    SOP.make(tmp_path, entries_of(benchmark.counts)[:-1])
    values = benchmark.check(tmp_path).to_json()
    assert values["complete"] is False
    assert values["expected"]["train"] == {"images": 200, "classes": 100}
    assert values["found"]["test"] == {"images": 199, "classes": 100}
    assert values["stamps"] == ["partial, 399 of 400"]
    assert values["likely_cause"].startswith("lists that were changed")


# --- abe data ----------------------------------------------------------------------------------


@pytest.fixture
def abe(monkeypatch, capsys) -> Callable[..., tuple[object, str, str]]:
    """Run a command; -> its status, what it printed, and what it said on standard error."""

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["abe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


def test_abe_data_check(abe, tmp_path, monkeypatch):
    benchmark = SOP.small()
    monkeypatch.setitem(BENCHMARKS, "sop", benchmark)
    entries = entries_of(benchmark.counts)
    SOP.make(tmp_path, entries)
    status, printed, _ = abe("data", "check", "sop", "--root", tmp_path)
    assert status == 0
    says(printed, "is sop: 200 training images of 100 classes, 200 test images of 100 classes")

    path = tmp_path / SOP.folder / SOP.path(entries[3])
    path.unlink()
    path.write_bytes(b"not a picture")
    assert abe("data", "check", "sop", "--root", tmp_path, "--lists")[0] == 0
    status, printed, said = abe("data", "check", "sop", "--root", tmp_path)
    assert (status, printed) == (2, "")
    says(said, "error: ", "is not sop as its publisher ships it", f"cannot be read: 1: {path}: ")
    status, printed, said = abe("data", "check", "sop", "--root", tmp_path, "--json")
    assert status == 2
    values = json.loads(printed)
    assert values["broken"][0]["file"] == str(path)
    assert "Traceback" not in said


@pytest.mark.parametrize("lists", [True, False])
def test_abe_data_check_of_12_images(lists, abe, tmp_path):
    """Without their lists nobody can tell what they are, but what there should be."""
    entries = entries_of(BENCHMARKS["cub200"].counts)
    CUB.make(tmp_path, entries[:12])
    CUB.write(tmp_path, entries)
    if not lists:
        (tmp_path / CUB.folder / "images.txt").unlink()
    status, printed, said = abe("data", "check", "cub200", "--root", tmp_path)
    assert (status, printed) == (2, "")
    expected = "5,864 training images of 100 classes, 5,924 test images of 100 classes"
    found = "12 training images of 1 classes" if lists else "0 training images of 0 classes"
    reason = "missing files: 11,776 of 11,788: " if lists else "there is no images.txt in "
    says(" ".join(said.split()), f"expected: {expected}", f"found: {found}", reason)
    assert "Traceback" not in said


def test_abe_data_list_and_get(abe, tmp_path):
    status, printed, _ = abe("data", "list")
    assert status == 0
    assert all(name in printed for name in BENCHMARKS)
    status, _, said = abe("data", "get", "inshop", "--root", tmp_path)
    assert status == 2
    says(said, "error: inshop has to be fetched by hand", "put img.zip and list_eval_partition.txt")


def test_abe_config_names_a_benchmark(abe, tmp_path):
    status, printed, _ = abe("config", "sop", "--root", tmp_path, "--allow-partial")
    assert status == 0
    data = json.loads(printed)["data"]
    assert (data["source"], data["root"], data["allow_partial"]) == ("sop", str(tmp_path), True)


# --- Training and scoring on them --------------------------------------------------------------


@pytest.fixture
def paint(monkeypatch) -> Callable[[Layout, Path], Benchmark]:
    """Make a benchmark of a few classes whose pictures can be told apart, under its own name."""

    def make(layout: Layout, root: Path) -> Benchmark:
        official = BENCHMARKS[layout.benchmark]
        counts = {part: Count(3 * 6, 6) for part in official.counts}
        entries = entries_of(counts)
        layout.make(root, entries)
        rng = np.random.default_rng(0)
        for entry in entries:
            path = root / layout.folder / layout.path(entry)
            path.unlink()
            hue = np.full((40, 40, 3), [100 + 3 * (entry.number % 5), 100 + 4 * entry.number, 90])
            noise = rng.integers(-60, 60, (40, 40, 3))
            Image.fromarray((hue + noise).clip(0, 255).astype(np.uint8)).save(path)
        monkeypatch.setitem(BENCHMARKS, official.name, replace(official, counts=counts))
        return BENCHMARKS[official.name]

    return make


def config_of(benchmark: Benchmark, root: Path, *settings: str) -> Config:
    quick = (
        "device=cpu",
        "precision=fp32",
        "model.num_learners=2",
        "model.embedding_dim=8",
        "model.weights=none",
        "data.resize=40",
        "data.crop=32",
        "data.val_classes=0.5",
        "train.steps=2",
        "train.batch_size=8",
        "train.eval_every=1",
    )
    named = [f"data.source={benchmark.name}", f"data.root={json.dumps(str(root))}"]
    return Config().with_overrides([*quick, *named, *settings])


@pytest.mark.parametrize(
    ("table", "name"), [("table1", "cars196"), ("table6", "sop"), ("table7", "inshop")]
)
def test_recall_is_told_at_the_ks_of_the_papers_table(table, name):
    theirs = {column for row in table_rows(table) for column in row if re.match(r"R@\d", column)}
    assert theirs == {f"R@{k}" for k in find_benchmark(name).ks}


@pytest.mark.parametrize("cache", [False, True])
def test_splits_of_a_benchmark(cache, paint, tmp_path):
    benchmark = paint(INSHOP, tmp_path)
    config = config_of(benchmark, tmp_path, f"data.cache={cache}".lower())
    splits = open_splits(config.data, "val")
    facts_of = {"train": (9, 3), "select": (9, 3), "test": (18, 6), "gallery": (18, 6)}
    facts = splits.describe()
    assert facts["name"] == "In-shop clothes retrieval"
    sizes = {part: (facts[f"{part}_images"], facts[f"{part}_classes"]) for part in facts_of}
    assert sizes == facts_of
    assert splits.ks == (1, 10, 20, 30, 40, 50)
    assert splits.select_gallery is None
    assert open_splits(config.data, "paper").select_gallery is not None
    for images, part in ((splits.test, "query"), (splits.gallery, "gallery")):
        names = [Path(images.describe(index)).name for index in range(len(images))]
        assert all(name.startswith(part) for name in names)


@pytest.mark.parametrize("cache", [False, True])
def test_broken_files_of_a_benchmark_are_skipped(cache, paint, tmp_path):
    benchmark = paint(INSHOP, tmp_path)
    config = config_of(benchmark, tmp_path, f"data.cache={cache}".lower())
    whole = open_splits(config.data, "paper")
    Path(whole.test.describe(4)).write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        open_splits(config.data, "paper")
    splits = open_splits(config.data.model_copy(update={"skip_broken": True}), "paper")
    assert splits.skipped == 1
    assert (len(splits.train), len(splits.test), len(splits.gallery)) == (18, 17, 18)
    assert splits.test.labels.tolist() == np.delete(whole.test.labels, 4).tolist()
    assert splits.gallery.labels.tolist() == whole.gallery.labels.tolist()
    assert whole.stamps == ()
    assert splits.stamps == ("partial, 53 of 54",)


def test_broken_files_count_as_missing_in_the_stamp(abe, paint, tmp_path, monkeypatch):
    """From files and prepared, beside files that are not there and a stamp of its own."""
    benchmark = replace(paint(SOP, tmp_path / "data"), stamp="not comparable")
    BENCHMARKS["sop"] = benchmark  # `paint` puts the official one back
    gone, *_, broken = sorted((tmp_path / "data" / SOP.folder).rglob("*.JPG"))
    gone.unlink()
    broken.write_bytes(b"")
    skip = ("data.skip_broken=true", "data.allow_partial=true")
    config = config_of(benchmark, tmp_path / "data", *skip)
    stamps = ("not comparable", "partial, 34 of 36")
    assert open_splits(config.data, "paper").stamps == stamps
    assert benchmark.check(tmp_path / "data", decode=True).stamps == stamps

    monkeypatch.chdir(tmp_path)
    settings = ("--size", "40", "--out", "prepared", "--skip-broken", "--allow-partial")
    assert abe("data", "prepare", "sop", "--root", "data", *settings)[0] == 0
    splits = open_splits(DataConfig(source="prepared", resize=40, crop=32), "paper")
    assert (splits.skipped, splits.stamps) == (1, stamps)


def test_own_photographs_that_are_called_as_a_benchmark(tmp_path):
    for number in range(4):
        (tmp_path / "CUB-200-2011" / str(number)).mkdir(parents=True)
        for name in ("a", "b", "c"):
            Image.new("RGB", (8, 8)).save(tmp_path / "CUB-200-2011" / str(number) / f"{name}.png")
    data = DataConfig(source=str(tmp_path / "CUB-200-2011"), resize=16, crop=8, val_classes=0.5)
    assert open_splits(data, "paper").stamps == ()


def test_names_of_files_command_no_terminal(tmp_path):
    """ESC, in a file's name, a class folder's and a list's."""
    benchmark = CUB.small()
    entries = entries_of(benchmark.counts)
    CUB.make(tmp_path, entries)
    images = tmp_path / CUB.folder / "images.txt"
    images.write_text(images.read_text().replace("Bird_train_0.jpg", "\x1b[2J.jpg"))
    text = refusal(benchmark.check(tmp_path))
    says(text, r"missing files: 1 of 400: images/001.Bird_1/\x1b[2J.jpg")
    assert all(character == "\n" or character.isprintable() for character in text)
    images.write_text(images.read_text().replace("001.Bird_1/\x1b", "\x1b"))
    says(refusal(benchmark.check(tmp_path)), r": \x1b[2J.jpg is of class 1, but by classes.txt")

    root = tmp_path / "cub200-2010"
    for name in ("001.A", "1.\x1b[2J"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(root / name / "a.png")
    text = refusal(BENCHMARKS["cub200-2010"].check(tmp_path))
    says(text, r"1.\x1b[2J: class folders begin as 001.Name does")


def test_where_a_copy_is_does_not_decide_a_result(paint, tmp_path):
    benchmark = paint(SOP, tmp_path)
    here = config_of(benchmark, tmp_path)
    there = config_of(benchmark, tmp_path / "elsewhere", "data.allow_partial=true")
    assert here.digest == there.digest
    assert "root" not in here.portable()["data"]


def test_names_and_folders_are_not_confused(tmp_path):
    with pytest.raises(InputError, match=r"sop is a benchmark: say where .* --root .* are \./sop"):
        open_splits(DataConfig(source="sop"), "val")
    with pytest.raises(InputError, match="there is no benchmark 'photos'"):
        open_splits(DataConfig(source="photos", root=str(tmp_path)), "val")


def test_queries_are_scored_against_the_gallery(paint, tmp_path):
    benchmark = paint(INSHOP, tmp_path)
    config = config_of(benchmark, tmp_path)
    splits = open_splits(config.data, config.protocol)
    preprocessing = Preprocessing(resize=40, crop=32)
    record, embeddings, gallery = evaluate_test(raw_pixels, config, splits, preprocessing)
    assert embeddings.shape == gallery.shape == (18, 1, 3 * 32 * 32)
    hits = {1: 0, 10: 0}
    for query, label in zip(embeddings[:, 0], splits.test.labels, strict=True):
        distances = [float((query - item).square().sum()) for item in gallery[:, 0]]
        nearest = np.argsort(distances, kind="stable")
        for k in hits:
            hits[k] += label in splits.gallery.labels[nearest[:k]]
    scores = record["scores"]["ensemble"]
    assert 0 < hits[1] < hits[10]
    assert scores["recall@1"] == hits[1] / 18
    assert scores["recall@10"] == hits[10] / 18
    assert list(scores) == ["recall@1", "recall@10", "map@r", "r_precision"]
    _, classes = np.unique(splits.test.labels, return_inverse=True)
    assert unpack_classes(record["scores"]["hits@1"]["classes"]).tolist() == classes.tolist()


@pytest.mark.slow
def test_a_run_on_queries_and_gallery(paint, tmp_path):
    """Trained, selected by its queries under `paper`, scored, scored again, reported."""
    benchmark = paint(INSHOP, tmp_path / "data")
    config = config_of(benchmark, tmp_path / "data", "protocol=paper")
    run = tmp_path / "run"
    record = Trainer(config, run, Console(quiet=True)).fit()
    log = read_json_lines(run / "metrics.jsonl")
    selected = [line["recall_at_1"] for line in log if "recall_at_1" in line]
    assert max(selected) == record["selection_recall@1"]
    assert record["scores"]["ensemble"]["recall@1"] == record["selection_recall@1"]
    again = evaluate_run(run, root=str(tmp_path / "data"))
    assert again["scores"] == record["scores"]

    write_report([run], tmp_path / "report.html", Console(quiet=True))
    page = (tmp_path / "report.html").read_text()
    for part in (
        "on In-shop clothes retrieval</title>",
        "18 test images of 6 classes not seen in training, searched in 18 gallery images",
        "among the K nearest gallery images",
        "of 18 queries",
        "gallery_",
    ):
        assert part in page


def test_stamps_follow_every_result(paint, tmp_path):
    benchmark = paint(SOP, tmp_path)
    stamped = replace(benchmark, stamp="not comparable with published results")
    BENCHMARKS["sop"] = stamped  # `paint` puts the official one back
    next((tmp_path / SOP.folder).rglob("*.JPG")).unlink()
    with pytest.raises(InputError, match="missing files: 1 of 36"):
        open_splits(config_of(benchmark, tmp_path).data, "val")

    config = config_of(benchmark, tmp_path, "data.allow_partial=true")
    run = tmp_path / "run"
    record = Trainer(config, run, Console(quiet=True)).fit()
    stamps = ["not comparable with published results", "partial, 35 of 36"]
    assert record["data"]["stamps"] == stamps
    append_record(tmp_path / "runs.jsonl", record)
    assert read_json_lines(tmp_path / "runs.jsonl")[0]["data"]["stamps"] == stamps
    title = f"Stanford Online Products ({'; '.join(stamps)})"
    assert str(scores_table([record]).caption).startswith(f"{title}: ")
    assert markdown_table(summarize([record])).startswith(f"**{title}**: ")
    write_report([run], tmp_path / "report.html", Console(quiet=True))
    page = (tmp_path / "report.html").read_text()
    assert f"Measured on {title}: " in page
    assert all(f'<span class="stamp">{stamp}</span>' in page for stamp in stamps)


def numbered_path(entry: Entry) -> str:
    number = entry.number if entry.part == "train" else 100 + entry.number
    return f"{number:03d}.Class_{number}/{entry.place}.png"


BIRDS = Layout("cub200-2010", lambda root, entries: root.mkdir(), numbered_path, "cub200-2010", ())
VEHICLES = replace(BIRDS, benchmark="cars196-train-half", folder="cars196-train-half")


def check_20_losses(abe, benchmark: Benchmark, root: Path, folder: Path) -> None:
    """Those of a run on the files are those of one on what `abe data prepare` makes of them."""
    prepared = folder / "prepared"
    words = ("--root", root, "--size", 40, "--out", prepared)
    assert abe("data", "prepare", benchmark.name, *words)[0] == 0
    settings = ("train.steps=20", "train.eval_every=20", "train.log_every=1")
    from_files = config_of(benchmark, root, *settings)
    from_squares = from_files.with_overrides([f"data.source={prepared}", "data.root=null"])
    records, losses = [], []
    for run, config in ((folder / "files", from_files), (folder / "squares", from_squares)):
        records.append(Trainer(config, run, Console(quiet=True)).fit())
        log = read_json_lines(run / "metrics.jsonl")
        losses.append([line["loss"] for line in log if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 20
    for key in ("data", "scores"):
        assert records[0][key] == records[1][key]
    data = records[0]["data"]
    assert data["name"] == benchmark.title
    assert tuple(data.get("stamps", ())) == tuple(filter(None, [benchmark.stamp]))
    assert data["train_images"] + data["select_images"] == benchmark.counts["train"].images


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "layout", [INSHOP, BIRDS, VEHICLES], ids=["inshop", "cub200-2010", "cars196-train-half"]
)
def test_20_losses_through_files_and_preparation(layout, abe, paint, tmp_path):
    check_20_losses(abe, paint(layout, tmp_path / "data"), tmp_path / "data", tmp_path)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["cub200-2010", "cars196-train-half"])
def test_20_losses_on_photographs(name, abe, tmp_path):
    root = Path(os.environ["ABE_DATA_ROOT"])
    if not (root / name).is_dir():
        pytest.skip(f"there is no {root / name}")
    check_20_losses(abe, BENCHMARKS[name], root, tmp_path)
