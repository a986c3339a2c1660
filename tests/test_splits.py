"""From a configuration to sets of images that share no class."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from abe.config import DataConfig
from abe.data.datasets import BrokenImagesError, image_folder
from abe.data.decode import BrokenImageError
from abe.data.loader import CachedImages
from abe.data.prepare import PreparedImages, prepare
from abe.data.splits import open_splits
from abe.errors import InputError

SYNTHETIC = DataConfig(synthetic_classes=20, synthetic_images=2, resize=32, crop=32)


@pytest.fixture
def birds(tmp_path):
    """12 classes of 3 images, each of a colour of its own."""
    root = tmp_path / "birds"
    for label in range(12):
        (root / f"class {label}").mkdir(parents=True)
        for number in range(3):
            color = (10 * label, 40 * number, 200)
            Image.new("RGB", (12, 8), color).save(root / f"class {label}" / f"{number}.png")
    return root


def config(source, **settings):
    return DataConfig(source=str(source), resize=16, crop=12, **settings)


def classes(images):
    return set(images.labels.tolist())


def names(images):
    return [images.describe(index) for index in range(len(images))]


# --- which classes where -----------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
def test_no_class_is_in_two_parts(birds, cache):
    splits = open_splits(config(birds, cache=cache, val_classes=0.34), "val")
    assert classes(splits.test) == {6, 7, 8, 9, 10, 11}
    assert classes(splits.train) | classes(splits.select) == {0, 1, 2, 3, 4, 5}
    assert not classes(splits.train) & classes(splits.select)
    assert len(classes(splits.select)) == 2
    assert splits.describe() == {
        "name": "birds",
        "skipped": 0,
        "train_images": 12,
        "train_classes": 4,
        "select_images": 6,
        "select_classes": 2,
        "test_images": 18,
        "test_classes": 6,
    }


def test_under_paper_the_test_images_select(birds):
    splits = open_splits(config(birds), "paper")
    assert splits.select is splits.test
    assert classes(splits.train) == {0, 1, 2, 3, 4, 5}


def test_every_run_selects_by_the_same_classes():
    """A run's seed is not part of what decides; the classes below stay as they are."""
    assert classes(open_splits(SYNTHETIC, "val").select) == {6, 7}
    # They are those of any other data with as many training classes.
    other = SYNTHETIC.model_copy(update={"synthetic_images": 3, "resize": 48, "cache": True})
    assert classes(open_splits(other, "val").select) == {6, 7}


@pytest.mark.parametrize("val_classes", [0.9, 0.95])
def test_too_few_classes_to_hold_some_out(val_classes):
    few = SYNTHETIC.model_copy(update={"val_classes": val_classes})
    assert len(classes(open_splits(few, "paper").train)) == 10
    with pytest.raises(InputError) as error:
        open_splits(few, "val")
    message = str(error.value)
    assert "10 training classes are too few" in message
    assert f"data.val_classes={val_classes}" in message
    assert "--set protocol=paper" in message


def test_too_few_classes_to_test_on(birds):
    with pytest.raises(InputError, match=r"data\.split_classes=0\.95 splits 12 classes into 11"):
        open_splits(config(birds, split_classes=0.95), "paper")


# --- files -------------------------------------------------------------------------------------


def write_csv(folder, lines, columns):
    path = folder / "list.csv"
    path.write_text("\n".join([columns, *lines]), encoding="utf-8")
    return path


@pytest.mark.parametrize("cache", [False, True])
def test_a_csv_with_boxes_and_a_split_of_its_own(birds, cache):
    """Each file gives two images, its left and its right part; odd classes train."""
    lines = [
        f"class {label}/{number}.png,class {label},{'train' if label % 2 else 'test'},{box}"
        for label in range(12)
        for number in range(3)
        for box in ("0,0,6,8", "6,2,12,6")
    ]
    path = write_csv(birds, lines, "path,label,split,x1,y1,x2,y2")
    splits = open_splits(config(path, cache=cache), "paper")
    assert splits.name == "list"
    assert classes(splits.train) == {1, 3, 5, 7, 9, 11}
    assert classes(splits.test) == {0, 2, 4, 6, 8, 10}
    assert len(splits.train) == len(splits.test) == 36
    assert splits.test.describe(7) == str(birds / "class 2" / "0.png")
    image = splits.test.load(7)
    assert image.size == (6, 4)
    assert image.getpixel((3, 3)) == (20, 0, 200)


def test_the_cache_holds_what_the_parts_load(birds):
    splits = open_splits(config(birds, cache=True, val_classes=0.34), "val")
    for part in (splits.train, splits.select, splits.test):
        assert isinstance(part, CachedImages)
        for index in range(len(part)):
            square = part.squares[part.rows[index]]
            assert square.shape == (16, 16, 3)
            assert tuple(square[8, 8]) == part.load(index).getpixel((0, 0))


def test_prepared_images_are_not_copied_into_the_cache(birds, tmp_path):
    """They are mapped into memory, and may be larger than it."""
    prepare(image_folder(birds), tmp_path / "prepared", source=birds, side=16)
    splits = open_splits(config(tmp_path / "prepared", cache=True), "val")
    for part in (splits.train, splits.select, splits.test):
        assert isinstance(part, PreparedImages)


def test_the_digest_tells_images_and_their_parts_not_their_place(birds, tmp_path):
    digest = open_splits(config(birds), "val").digest
    assert re.fullmatch("[0-9a-f]{12}", digest)
    assert open_splits(config(birds, cache=True), "paper").digest == digest
    assert open_splits(config(birds, split_classes=0.4), "val").digest != digest
    moved = birds.rename(tmp_path / "moved")
    assert open_splits(config(moved), "val").digest == digest
    (moved / "class 3" / "0.png").rename(moved / "class 3" / "9.png")
    renamed = open_splits(config(moved), "val")
    assert renamed.digest != digest
    assert set(renamed.learned_classes) == {f"class {label}" for label in range(6)}
    (moved / "class 3" / "9.png").unlink()
    assert open_splits(config(moved), "val").digest not in (digest, renamed.digest)


def test_two_classes_at_least_are_held_out(birds):
    splits = open_splits(config(birds, split_classes=0.34, val_classes=0.01), "val")
    assert (len(classes(splits.train)), len(classes(splits.select))) == (2, 2)


# --- broken files ------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
def test_broken_files_stop_or_are_counted(birds, cache):
    broken = [birds / "class 1" / "2.png", birds / "class 9" / "0.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(
        BrokenImagesError, match=r"birds has .* \(2 of 36\).*--skip-broken"
    ) as error:
        open_splits(config(birds, cache=cache), "val")
    assert [item.path for item in error.value.errors] == broken

    settings = config(birds, cache=cache, skip_broken=True, val_classes=0.34)
    splits = open_splits(settings, "val")
    assert splits.skipped == splits.describe()["skipped"] == 2
    kept = names(splits.train) + names(splits.select) + names(splits.test)
    assert len(kept) == 34
    assert not {*kept} & {str(path) for path in broken}
    assert classes(splits.test) == {6, 7, 8, 9, 10, 11}


def test_broken_files_are_met_later_without_a_check(birds):
    path = birds / "class 9" / "0.png"
    path.write_bytes(b"")
    splits = open_splits(config(birds), "paper", check=False)
    with pytest.raises(BrokenImageError):
        splits.test.load(names(splits.test).index(str(path)))
    assert open_splits(config(birds, skip_broken=True), "paper", check=False).skipped == 1


def test_a_csv_split_survives_skipping(birds):
    (birds / "class 0" / "0.png").write_bytes(b"")
    lines = [
        f"class {label}/{number}.png,{label},{'test' if label < 3 else 'train'}"
        for label in range(6)
        for number in range(3)
    ]
    path = write_csv(birds, lines, "path,label,split")
    splits = open_splits(config(path, skip_broken=True, cache=True), "paper")
    assert classes(splits.test) == {0, 1, 2}
    assert names(splits.test)[:2] == [str(birds / "class 0" / f"{n}.png") for n in (1, 2)]
    assert len(splits.train) == 9


# --- progress ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
def test_progress_is_shown_where_it_is_wanted(birds, cache, capfd):
    open_splits(config(birds, cache=cache), "paper")
    assert capfd.readouterr() == ("", "")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    open_splits(config(birds, cache=cache), "paper", terminal)
    assert "reading images" in terminal.file.getvalue()


def test_indices_of_the_parts_are_int64():
    splits = open_splits(SYNTHETIC, "val")
    assert {part.labels.dtype for part in (splits.train, splits.select, splits.test)} == {
        np.dtype(np.int64)
    }
