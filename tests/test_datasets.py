"""Folders and CSV files as users have them, and what is wrong with some."""

from __future__ import annotations

import os
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from abe.data import datasets
from abe.data.datasets import (
    BrokenImagesError,
    ImageFiles,
    check_images,
    find_broken,
    image_csv,
    image_folder,
    named,
    open_dataset,
    split_by_class,
)
from abe.data.decode import BrokenImageError
from abe.errors import InputError


def paint(path, color="red", size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def birds(tmp_path):
    """3 classes of 2 images."""
    root = tmp_path / "birds"
    for name in ("wren", "auk", "kite"):
        for number in (1, 2):
            paint(root / name / f"{number}.png")
    return root


def relative(images, root):
    return [path.relative_to(root).as_posix() for path in images.paths]


def write_csv(folder, text, *, encoding="utf-8"):
    path = folder / "list.csv"
    path.write_bytes(text.encode(encoding))
    return path


def assert_refused(function, *arguments, says):
    with pytest.raises(InputError) as error:
        function(*arguments)
    for part in [says] if isinstance(says, str) else says:
        assert part in str(error.value)


# --- folders -----------------------------------------------------------------------------------


def test_a_folder_of_class_folders(birds):
    images, split = open_dataset(birds)
    assert split is None
    assert images.name == "birds"
    assert images.class_names == ["auk", "kite", "wren"]
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.labels.dtype == np.int64
    assert len(images) == 6
    assert images.describe(2) == str(birds / "kite" / "1.png")
    loaded = images.load(2)
    assert (loaded.mode, loaded.size) == ("RGB", (8, 6))


def test_a_folder_is_named_by_itself_however_it_is_spelled(birds, monkeypatch):
    monkeypatch.chdir(birds)
    assert image_folder(".").name == "birds"
    assert image_folder(f"{birds}/wren/..").name == "birds"


def test_natural_order_of_classes_and_files(tmp_path):
    classes = ["class 10", "Class 9", "class 2", "10", "9", "b", "A", "a"]
    for name in classes:
        for file in ("image10.png", "image9.png", "Image1.png"):
            paint(tmp_path / name / file)
    images = image_folder(tmp_path)
    assert images.class_names == ["9", "10", "A", "a", "b", "class 2", "Class 9", "class 10"]
    assert [path.name for path in images.paths[:3]] == ["Image1.png", "image9.png", "image10.png"]


def test_numbers_of_any_length_are_sorted(tmp_path):
    names = ["0", "00", "1", "007", "8", "10", f"{'0' * 100}11", "9" * 200, f"1{'0' * 200}"]
    for name in reversed(names):
        paint(tmp_path / name / "1.png")
    assert image_folder(tmp_path).class_names == names
    long = [f"1{'0' * 5000}", "9" * 5000, "a"]
    assert sorted(long, key=datasets._natural) == ["9" * 5000, f"1{'0' * 5000}", "a"]


def test_suffixes_nested_folders_and_what_is_passed_over(tmp_path):
    for name in ("a/1.JPG", "a/x/y/2.jpeg", "a/x/3.webp", "b/4.gif", "b/5.tif", "b/6.BMP"):
        paint(tmp_path / name)
    for name in ("notes.txt", "a/Thumbs.db", "a/.hidden.png", ".git/7.png", "b/.cache/8.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert relative(image_folder(tmp_path), tmp_path) == [
        "a/1.JPG",
        "a/x/3.webp",
        "a/x/y/2.jpeg",
        "b/4.gif",
        "b/5.tif",
        "b/6.BMP",
    ]


def test_a_link_to_a_file_within_is_as_good_as_the_file(birds):
    (birds / "wren" / "3.png").symlink_to(birds / "wren" / "1.png")
    assert relative(image_folder(birds), birds)[-1] == "wren/3.png"


def test_a_root_that_is_a_link_is_opened(birds, tmp_path):
    (tmp_path / "link").symlink_to(birds)
    (birds / "wren" / "3.png").symlink_to(birds / "wren" / "1.png")
    assert len(image_folder(tmp_path / "link")) == 7


def test_a_link_out_of_the_root_that_is_no_image_is_passed_over(birds, tmp_path):
    (tmp_path / "notes.txt").touch()
    (birds / "wren" / "notes.txt").symlink_to(tmp_path / "notes.txt")
    assert len(image_folder(birds)) == 6


def test_a_link_that_leads_nowhere_is_a_broken_image(birds):
    (birds / "wren" / "3.png").symlink_to(birds / "wren" / "absent.png")
    (birds / "wren" / "4.png").symlink_to(birds / "wren" / "4.png")
    assert list(find_broken(image_folder(birds))) == [6, 7]


def test_names_that_look_like_something_else(tmp_path):
    names = ["a.jpg/1.png", "a.jpg/b.png/2.png", "x\ny/3\n.png", "Zaunkönig/4 ü.png", "²/5.png"]
    for name in names:
        paint(tmp_path / name)
    images = image_folder(tmp_path)
    assert set(images.class_names) == {"a.jpg", "x\ny", "Zaunkönig", "²"}
    assert set(relative(images, tmp_path)) == set(names)
    assert find_broken(images) == {}


def test_links_out_of_the_root_and_to_folders_are_broken_images(birds, tmp_path):
    outside = paint(tmp_path / "elsewhere" / "1.png")
    links = {
        birds / "wren" / "again": birds / "wren",
        birds / "wren" / "elsewhere": outside.parent,
        birds / "wren" / "folder.png": outside.parent,
        birds / "wren" / "out.png": outside,
        birds / "wren" / "over.png": birds / "wren" / "out.png",
    }
    for link, target in links.items():
        link.symlink_to(target)
    images = image_folder(birds)
    with pytest.raises(BrokenImagesError, match=r"\(5 of 11\).*--skip-broken") as error:
        check_images(images, skip_broken=False)
    assert {item.path for item in error.value.errors} == {*links}
    reason = f"a link to a folder or out of {birds}, and none is followed"
    assert {item.reason for item in error.value.errors} == {reason}
    with pytest.warns(UserWarning, match=r"cannot be read .*, and are left out:\n.*") as warned:
        kept = images.select(check_images(images, skip_broken=True))
    assert all(str(error.path) in str(warned[0].message) for error in find_broken(images).values())
    assert len(kept) == 6
    assert not {*kept.paths} & {*links}


def test_links_to_folders_in_place_of_class_folders(birds, tmp_path):
    for name in ("owl", "rail"):
        (birds / name).symlink_to(tmp_path)
    says = [f"{birds} has links to folders (2), and none is followed", "CSV", ": owl, rail"]
    assert_refused(image_folder, birds, says=says)


@pytest.fixture
def deep(birds):
    """1,200 folders within each other, and an image in the last."""
    folder = birds / "wren"
    for _ in range(1200):
        folder /= "d"
        folder.mkdir()
    yield paint(folder / "3.png")
    subprocess.run(["rm", "-r", birds / "wren" / "d"], check=True)  # too deep for shutil


def test_folders_of_any_depth(birds, deep):
    images = image_folder(birds)
    assert images.paths[-1] == deep
    assert find_broken(images) == {}


def test_what_may_be_an_image_is_not_passed_over_in_silence(birds):
    names = ("a.heic", "b.HEIC", "deep/c.avif", "d.png.txt", "Thumbs.db", ".e.heic", "f.json")
    names += ("5f3a9c", "8d21b0", "g.JPG_large")
    for name in names:
        (birds / "wren" / name).parent.mkdir(exist_ok=True)
        (birds / "wren" / name).touch()
    (birds / "loose.heif").touch()
    counts = r"2 without suffix, 2 \.heic, 1 \.heif, 1 \.jpg_large, 1 \.avif"
    says = rf"birds has files whose names do not end .* passed over \({counts}\): if they are im"
    with pytest.warns(UserWarning, match=says) as warned:
        assert len(image_folder(birds)) == 6
    assert len(warned) == 1


def test_folders_that_are_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(
        open_dataset, tmp_path / "empty", says="has no sub-folders: it needs one a class"
    )

    (tmp_path / "texts").mkdir()
    for name in ("1.txt", "2.txt", "README"):
        (tmp_path / "texts" / name).touch()
    says = "no sub-folders but files (2 .txt, 1 without suffix)"
    assert_refused(open_dataset, tmp_path / "texts", says=says)

    paint(tmp_path / "flat" / "1.png")
    paint(tmp_path / "flat" / "2.png")
    says = ["images directly in it (2)", "1.png, 2.png", "one sub-folder a class", "CSV"]
    assert_refused(open_dataset, tmp_path / "flat", says=says)


def test_an_image_beside_the_class_folders(birds):
    paint(birds / "stray.jpg")
    assert_refused(open_dataset, birds, says=["images directly in it (1)", "stray.jpg"])


def test_a_class_folder_without_images(birds):
    (birds / "owl" / "deep").mkdir(parents=True)
    (birds / "rail").mkdir()
    says = ["class folders without images (2 of 5)", ".jpeg", ": owl, rail"]
    assert_refused(open_dataset, birds, says=says)
    (birds / "owl" / "deep" / "1.heic").touch()
    assert_refused(open_dataset, birds, says="owl but files (1 .heic), rail")


def test_too_few_classes_or_images(tmp_path):
    paint(tmp_path / "auk" / "1.png")
    assert_refused(open_dataset, tmp_path, says="has a single class, 'auk'")
    paint(tmp_path / "kite" / "1.png")
    paint(tmp_path / "kite" / "2.png")
    says = ["classes with a single image (1 of 2)", "leave them out:\nauk"]
    assert_refused(open_dataset, tmp_path, says=says)


def test_neither_a_folder_nor_a_csv(tmp_path):
    for name in ("absent", "absent.csv", "absent.png"):
        says = f"{name}: there is no such folder or file"
        assert_refused(open_dataset, tmp_path / name, says=says)
    image = paint(tmp_path / "one.JPG")
    assert_refused(open_dataset, str(image), says="one.JPG is an image: give a folder")
    archive = tmp_path / "birds.zip"
    archive.touch()
    assert_refused(open_dataset, archive, says="birds.zip is neither a folder nor a .csv file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(birds):
    (birds / "wren").chmod(0)
    assert_refused(open_dataset, birds, says="wren cannot be read: Permission denied")
    (birds / "wren").chmod(0o700)


# --- CSV files ---------------------------------------------------------------------------------


def test_a_csv_of_paths_and_labels(birds):
    rows = "path,label\nwren/1.png,small\nauk/1.png,large\nwren/2.png,small\nauk/2.png,large\n"
    images, split = open_dataset(write_csv(birds, rows))
    assert split is None
    assert images.name == "list"
    assert images.class_names == ["large", "small"]
    assert images.labels.tolist() == [1, 0, 1, 0]
    assert relative(images, birds) == ["wren/1.png", "auk/1.png", "wren/2.png", "auk/2.png"]
    assert images.load(0).size == (8, 6)


def test_what_spreadsheets_write(birds):
    """A byte order mark, CRLF, quotes, blank lines, capitals, spaces, columns of one's own."""
    rows = (
        "\ufeffLabel, Path ,price,SPLIT\r\n"
        '"Zaunkönig, klein",wren/1.png,3,Train\r\n'
        "\r\n"
        '"a ""b""", auk/1.png ,,TEST\r\n'
        "c,kite/1.png,,train\r\n"
        '"two\r\nlines",kite/2.png,,test'
    )
    images, split = image_csv(write_csv(birds, rows))
    assert images.class_names == ['a "b"', "c", "two\r\nlines", "Zaunkönig, klein"]
    assert relative(images, birds) == ["wren/1.png", "auk/1.png", "kite/1.png", "kite/2.png"]
    assert split.tolist() == ["train", "test", "train", "test"]


def test_columns_of_ones_own_may_have_any_name(birds):
    rows = "path,label,,,note,note\nwren/1.png,a,,,1,2\nauk/1.png,b,,,3,4\n"
    assert len(image_csv(write_csv(birds, rows))[0]) == 2


def test_paths_may_lead_anywhere(birds, tmp_path):
    other = tmp_path / "lists"
    other.mkdir()
    rows = f"path,label\n../birds/wren/1.png,a\n{birds / 'auk' / '1.png'},b\n"
    images, _ = image_csv(write_csv(other, rows))
    assert [images.load(index).size for index in (0, 1)] == [(8, 6), (8, 6)]


def test_a_split_by_class(birds):
    rows = "path,label,split\nwren/1.png,w,test\nauk/1.png,a,train\nwren/2.png,b,train\n"
    images, split = image_csv(write_csv(birds, rows + "auk/2.png,x,test\n"))
    assert split.tolist() == ["test", "train", "train", "test"]
    assert images.select(np.flatnonzero(split == "train")).labels.tolist() == [0, 1]


def test_boxes(tmp_path):
    pixels = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    rows = "path,label,x1,y1,x2,y2\n1.png,a,1,2,4,5\n1.png,a,,,,\n1.png,b,-1,0.0,2,1e3\n"
    images, _ = image_csv(write_csv(tmp_path, rows))
    np.testing.assert_array_equal(images.load(0), pixels[2:5, 1:4])
    np.testing.assert_array_equal(images.load(1), pixels)
    np.testing.assert_array_equal(images.load(2), pixels[:, :2])
    chosen = images.select(np.array([2, 0]))
    np.testing.assert_array_equal(chosen.load(0), pixels[:, :2])
    np.testing.assert_array_equal(chosen.load(1), pixels[2:5, 1:4])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("", "has no column path, label: its first line is ''"),
        ("file,label\na,b\n", "has no column path: its first line is 'file,label'"),
        ("path;label\n1;2\n", "has no column path, label: its first line is 'path;label'"),
        ("path,label,x1,y1\n", "has no column x2, y2"),
        ("path,label,split,Label, path\n", "has more than one column path, label: rename"),
        ("path,label\nwren/1.png,a\nauk/1.png,b\nwren/1.png,a\n", "lines 2 and 4: "),
        ("path,label\nwren/1.png,a\nauk/../wren/1.png,b\n", "lines 2 and 3: "),
        ("path,label,split\nwren/1.png,a,train\nwren/1.png,a,test\n", "lines 2 and 3: "),
        (
            "path,label,x1,y1,x2,y2\nwren/1.png,a,1,2,3,4\nwren/1.png,b,1,2,3,4.0\n",
            "lists 1 images, or boxes of images, more than once; keep one line of each: lines 2",
        ),
        ("path,label\n", "lists no images"),
        ("path,label\n\n,\n", "line 3: no path and no label"),
        ("path,label\nwren/1.png\n", "line 2: no label"),
        ("path,label\nwren/1.png,a\n\n,b\n", "line 4: no path"),
        ("path,label\nwren/1.png,a,b\n", "line 2: more values than columns"),
        ('path,label\n"wren/1.png"x,a\n', "line 2: "),
        ("path,label,split\nwren/1.png,a,\n", "line 2: split is ''"),
        ("path,label,split\nwren/1.png,a,val\n", "line 2: split is 'val', but has to be train or"),
        ("path,label,x1,y1,x2,y2\nwren/1.png,a,1,2,x,4\n", "line 2: x1,y1,x2,y2 are 1,2,x,4"),
        ("path,label,x1,y1,x2,y2\nwren/1.png,a,1,2,,4\n", "line 2: x1,y1,x2,y2 are 1,2,,4"),
        ("path,label,x1,y1,x2,y2\nwren/1.png,a,5,2,5,4\n", "x1 below x2"),
        ("path,label,x1,y1,x2,y2\nwren/1.png,a,0,nan,5,4\n", "have to be numbers"),
        ("path,label,x1,y1,x2,y2\nwren/1.png,a,0,0,inf,4\n", "have to be numbers"),
    ],
)
def test_a_csv_that_cannot_be_used(birds, rows, says):
    path = write_csv(birds, rows)
    assert_refused(image_csv, path, says=[str(path), says])


def test_a_csv_that_is_not_utf8(birds):
    path = write_csv(birds, "path,label\nwren/1.png,Zaunkönig\n", encoding="cp1252")
    assert_refused(image_csv, path, says=[str(path), "not in UTF-8"])


def test_a_csv_that_is_a_folder_or_absent(tmp_path):
    (tmp_path / "list.csv").mkdir()
    assert_refused(image_csv, tmp_path / "list.csv", says="list.csv cannot be read: Is a directory")
    assert_refused(image_csv, tmp_path / "no.csv", says="no.csv cannot be read: No such file")


def test_all_missing_images_are_listed(birds):
    rows = "path,label\nwren/1.png,a\nwren/7.png,a\nnowhere/1.png,b\nwren,b\n"
    path = write_csv(birds, rows)
    says = ["not there (3 of 4)", str(birds.resolve()), "wren/7.png: no such file", "nowhere/1.png"]
    assert_refused(image_csv, path, says=says)
    write_csv(birds, rows + "".join(f"{number}.png,c\n" for number in range(1000)))
    with pytest.raises(BrokenImagesError) as error:
        image_csv(path)
    assert len(str(error.value).splitlines()) == 1 + 1003
    assert len(error.value.errors) == 1003


def test_a_split_that_is_none(birds):
    head = "path,label,split\nwren/1.png,w,train\nauk/1.png,a,train\n"
    says = "splits 2 classes into 2 of train and 0 of test: mark 2 or more as each"
    assert_refused(image_csv, write_csv(birds, head), says=says)
    says = "splits 3 classes into 2 of train and 1 of test"
    assert_refused(image_csv, write_csv(birds, head + "kite/1.png,k,test\n"), says=says)
    shared = head + "wren/2.png,w,test\nkite/1.png,k,test\n"
    says = ["classes both in train and in test (1 of 3)", "choose one part: w"]
    assert_refused(image_csv, write_csv(birds, shared), says=says)


def test_a_csv_with_too_few_classes_or_images(birds):
    rows = "path,label\nwren/1.png,a\nwren/2.png,a\n"
    assert_refused(open_dataset, write_csv(birds, rows), says="has a single class, 'a'")
    says = ["classes with a single image (1 of 2)", "leave them out:\nb"]
    assert_refused(open_dataset, write_csv(birds, rows + "auk/1.png,b\n"), says=says)


# --- selections and splits ---------------------------------------------------------------------


def files_of(labels):
    names = [f"class {label}" for label in range(max(labels) + 1)]
    paths = [f"{index}.png" for index in range(len(labels))]
    return ImageFiles("numbers", paths, np.array(labels), names)


def test_a_selection_keeps_labels_and_names():
    images = files_of([0, 1, 2, 1, 0]).select(np.array([3, 2]))
    assert list(images.paths) == ["3.png", "2.png"]
    assert images.labels.tolist() == [1, 2]
    assert images.class_names == ["class 0", "class 1", "class 2"]
    assert images.select(np.array([1])).labels.tolist() == [2]


@pytest.mark.parametrize(
    ("classes", "fraction", "num_train"),
    [(200, 0.5, 100), (196, 0.5, 98), (4, 0.5, 2), (10, 0.29, 3), (10, 0.8, 8)],
)
def test_the_first_classes_train_and_the_others_test(classes, fraction, num_train):
    labels = np.random.default_rng(0).permutation(np.repeat(2 * np.arange(classes), 3))
    train, test = split_by_class(files_of(labels.tolist()), fraction)
    assert set(train.labels.tolist()) == set(range(0, 2 * num_train, 2))
    assert set(test.labels.tolist()) == set(range(2 * num_train, 2 * classes, 2))
    assert len(train) == 3 * num_train
    assert len(train) + len(test) == len(labels)


@pytest.mark.parametrize(
    ("classes", "fraction", "train", "test"),
    [(2, 0.5, 1, 1), (3, 0.5, 2, 1), (10, 0.9, 9, 1), (10, 0.99, 10, 0), (10, 0.1, 1, 9)],
)
def test_a_split_with_too_few_classes(classes, fraction, train, test):
    images = files_of([*range(classes), *range(classes)])
    says = [
        f"data.split_classes={fraction} splits {classes} classes",
        f"into {train} to train on and {test} to test on: use another share, or more classes",
    ]
    assert_refused(split_by_class, images, fraction, says=says)


# --- broken files ------------------------------------------------------------------------------


def damage(root, count):
    """Cut every second of the first 2 * count files of a class off."""
    paths = [paint(root / "owl" / f"{number}.png") for number in range(2 * count)]
    for path in paths[::2]:
        path.write_bytes(path.read_bytes()[:50])
    return paths[::2]


@pytest.mark.parametrize("workers", [1, 3, None])
def test_broken_files_are_found(birds, workers):
    broken = damage(birds, 20)
    images = image_folder(birds)
    found = find_broken(images, workers)
    assert [error.path for error in found.values()] == broken
    assert [images.paths[index] for index in found] == broken
    assert all(type(error) is BrokenImageError for error in found.values())


def test_broken_files_stop_with_a_list_or_are_skipped(birds, capfd):
    broken = damage(birds, 3)
    images = image_folder(birds)
    with pytest.raises(BrokenImagesError) as error:
        check_images(images, skip_broken=False)
    message = str(error.value)
    assert "birds has images that cannot be read (3 of 12)" in message
    assert "--skip-broken" in message
    for path, listed in zip(broken, message.splitlines()[1:], strict=True):
        assert re.fullmatch(f"{re.escape(str(path))}: .+", listed)
    kept = check_images(images, skip_broken=True)
    assert kept.dtype == np.int64
    assert sorted({*images.paths} - {*images.select(kept).paths}) == broken
    assert kept.tolist() == sorted(kept)
    assert capfd.readouterr() == ("", "")  # the progress bar is for terminals


def test_a_long_list_has_all_of_them(birds):
    broken = damage(birds, 60)
    with pytest.raises(BrokenImagesError) as error:
        check_images(image_folder(birds), skip_broken=False)
    lines = str(error.value).splitlines()[1:]
    assert [line.partition(": ")[0] for line in lines] == [str(path) for path in broken]
    assert [item.path for item in error.value.errors] == broken


def test_a_name_adds_no_line_to_the_list(birds):
    for name in ("\x1b[2J.png", "x.png: all fine\n\nDone.png"):
        (birds / "wren" / name).touch()
    with pytest.raises(BrokenImagesError) as error:
        check_images(image_folder(birds), skip_broken=False)
    first, *lines = str(error.value).splitlines()
    assert "(2 of 8)" in first
    assert [line.partition(": damaged")[0] for line in lines] == [
        rf"{birds}/wren/\x1b[2J.png",
        rf"{birds}/wren/x.png: all fine\n\nDone.png",
    ]


def test_the_first_names():
    assert named(["a", "b\n"]) == r"a, b\n"
    assert named(range(1022), "\n").splitlines() == [*map(str, range(20)), "and 1,002 more"]


def test_a_class_that_had_one_image_from_the_start(birds):
    """As benchmarks have them: such a class is not why the others have to be repaired."""
    paint(birds / "owl" / "1.png")
    (birds / "wren" / "3.png").write_bytes(b"")
    images = image_folder(birds)
    assert len(check_images(images, skip_broken=True)) == len(images) - 1


def test_nothing_is_broken(birds):
    np.testing.assert_array_equal(check_images(image_folder(birds), False), np.arange(6))
    np.testing.assert_array_equal(check_images(image_folder(birds), True), np.arange(6))


def test_there_has_to_be_something_left(birds):
    images = image_folder(birds)
    for path in images.paths:
        path.write_bytes(b"")
    with pytest.raises(BrokenImagesError, match=r"\(6 of 6\), .* than 2 \(auk, kite, wren\)"):
        check_images(images, skip_broken=True)


def test_a_class_is_not_left_with_a_single_image(birds):
    for name in ("auk/3.png", "kite/3.png"):
        paint(birds / name)
    for name in ("auk/2.png", "kite/1.png", "kite/3.png", "wren/1.png"):
        (birds / name).write_bytes(b"")
    with pytest.raises(BrokenImagesError, match=r"\(4 of 8\), .* than 2 \(kite, wren\)") as error:
        check_images(image_folder(birds), skip_broken=True)
    broken = [birds / name for name in ("kite/1.png", "kite/3.png", "wren/1.png")]
    assert [item.path for item in error.value.errors] == broken


def test_what_reads_an_image_and_what_hears_of_it_can_be_given(birds):
    images, done, seen = image_folder(birds), [], set()

    def read(index):
        seen.add(index)
        if index == 4:
            raise BrokenImageError(images.paths[4], "no")

    found = find_broken(images, 2, read=read, on_progress=done.append)
    assert {index: str(error) for index, error in found.items()} == {4: f"{images.paths[4]}: no"}
    assert seen == set(range(6))
    assert done == [1, 2, 3, 4, 5, 6]


def test_an_error_of_another_kind_is_not_taken_for_a_broken_image(birds):
    def read(index):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        find_broken(image_folder(birds), read=read)


def test_what_was_read_of_a_broken_file_is_not_kept(birds):
    damage(birds, 1)
    (error,) = find_broken(image_folder(birds)).values()
    assert error.__traceback__ is None
    assert error.__context__ is None


def test_a_box_beside_its_image_is_broken(birds):
    rows = "path,label,x1,y1,x2,y2\nwren/1.png,a,0,0,2,2\nauk/1.png,b,50,0,60,2\n"
    images, _ = image_csv(write_csv(birds, rows))
    found = find_broken(images)
    assert list(found) == [1]
    assert "the box 50,0,60,2 holds none of its 8 x 6 pixels" in str(found[1])
