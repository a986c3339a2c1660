"""Prepared folders: the same batches as the files', and whole or not there, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import pkgutil
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from abe import cli
from abe.config import DataConfig
from abe.data import datasets
from abe.data import prepare as module
from abe.data.datasets import BrokenImagesError, image_folder, open_dataset
from abe.data.decode import BrokenImageError, printable
from abe.data.loader import cache_decoded, evaluation_batches, training_batches
from abe.data.prepare import is_prepared, open_prepared, prepare, verify
from abe.data.samplers import PairBatchSampler
from abe.data.splits import open_splits
from abe.data.transforms import Preprocessing, pad_to_square
from abe.errors import InputError
from abe.recipes import get_recipe

# Python 3.12 warns of what every DataLoader on Linux does; the workers run no thread of the parent.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

SIDE = 24
PREPROCESSING = Preprocessing(resize=SIDE, crop=16)


def photograph(path, rng, size=None):
    """An image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size or rng.integers(12, 60, 2)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def birds(tmp_path):
    """6 classes of 5 photographs, wide and tall."""
    rng = np.random.default_rng(0)
    for label in range(6):
        for number in range(5):
            suffix = ".png" if number % 2 else ".jpg"
            photograph(tmp_path / "birds" / f"class {label}" / f"{number}{suffix}", rng)
    return tmp_path / "birds"


def prepare_folder(source, folder, **options):
    images, split = open_dataset(source)
    return prepare(images, folder, **({"source": source, "split": split, "side": SIDE} | options))


@pytest.fixture
def prepared(birds, tmp_path):
    prepare_folder(birds, tmp_path / "prepared")
    return tmp_path / "prepared"


@pytest.fixture
def flushed_often(monkeypatch):
    """The journal is written every 4 images."""
    monkeypatch.setattr(module, "FLUSHED", 4)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def count_decoded(monkeypatch):
    """Counts the images that are decoded from now on."""
    decoded = []
    use_image = datasets.use_image

    def read(path, box, use):
        decoded.append(Path(path))
        return use_image(path, box, use)

    monkeypatch.setattr(datasets, "use_image", read)
    return decoded


def refusal(function, *arguments, **options):
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    return str(error.value)


# --- the same images ---------------------------------------------------------------------------


def batches_of(images, workers=0):
    sampler = PairBatchSampler(images.labels, batch_size=8)
    training = training_batches(
        images, sampler, PREPROCESSING, seed=0, start_step=2, stop_step=7, workers=workers
    )
    return [*training, *evaluation_batches(images, PREPROCESSING, 8, workers)]


def assert_same_batches(images, others, workers=0):
    for batch, other in zip(batches_of(images, workers), batches_of(others), strict=True):
        for tensor, expected in zip(batch, other, strict=True):
            assert torch.equal(tensor, expected)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_files(birds, prepared, workers):
    images, *others = open_prepared(prepared)
    assert others == [None, None, [], 0]
    assert_same_batches(images, image_folder(birds), workers)


def test_it_is_the_data_set_that_it_was_made_from(birds, prepared):
    images, files = open_prepared(prepared).images, image_folder(birds)
    assert (images.name, images.class_names) == (files.name, files.class_names)
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == files.labels.tolist()
    for index in range(len(files)):
        square = pad_to_square(files.load(index), SIDE)
        np.testing.assert_array_equal(images.square(index, SIDE), square)
        np.testing.assert_array_equal(np.asarray(images.load(index)), square)
        assert images.load(index).mode == "RGB"
        assert images.describe(index) == files.describe(index)


def test_a_selection_shares_the_memory(birds, prepared):
    rows = np.array([21, 3, 3, 17, 4, 28, 9, 20])
    images = open_prepared(prepared).images
    part = images.select(rows).select(np.arange(7, -1, -1))
    assert part.squares is images.squares
    assert part.class_names == images.class_names
    assert_same_batches(part, image_folder(birds).select(rows[::-1]))


def test_the_cache_takes_the_squares(birds, prepared):
    images, files = open_prepared(prepared).images, image_folder(birds)
    assert_same_batches(cache_decoded(images, SIDE), files)
    assert "prepared with --size 24, but data.resize is 32" in refusal(cache_decoded, images, 32)


def test_training_needs_the_prepared_side(prepared):
    message = refusal(open_splits, DataConfig(source=str(prepared), resize=32, crop=16), "paper")
    assert message == (
        f"{prepared} was prepared with --size 24, but data.resize is 32: prepare the images again "
        "with --size 32, or set data.resize=24 and data.crop, which is a part of it"
    )


def test_the_size_by_default_is_that_of_a_training(birds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["abe", "data", "prepare", str(birds)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code, capsys.readouterr().err
    (made,) = (path for path in tmp_path.iterdir() if path.name.startswith(f"{birds.name}-"))
    config = get_recipe("photographs").data.model_copy(update={"source": str(made)})
    assert len(open_splits(config, "paper").train) > 0


def test_splits_are_those_of_the_files(birds, prepared):
    shares = {"split_classes": 0.67, "val_classes": 0.5}
    for protocol in ("val", "paper"):
        splits, expected = (
            open_splits(DataConfig(source=str(source), resize=SIDE, crop=16, **shares), protocol)
            for source in (prepared, birds)
        )
        assert splits.describe() == expected.describe()
        for part in ("train", "select", "test"):
            images, files = getattr(splits, part), getattr(expected, part)
            assert [images.describe(i) for i in range(len(images))] == [*map(str, files.paths)]


def test_a_csv_with_boxes_and_a_split(birds, tmp_path):
    lines = ["path,label,split,x1,y1,x2,y2"]
    for label in range(6):
        for number in range(5):
            path = f"birds/class {label}/{number}.{'png' if number % 2 else 'jpg'}"
            lines.append(f"{path},{label},{'train' if label % 2 else 'test'},1,2,9,11")
            lines.append(f"{path},{label},{'train' if label % 2 else 'test'},,,,")
    source = tmp_path / "birds.csv"
    source.write_text("\n".join(lines))
    prepare_folder(source, tmp_path / "prepared")
    images, split, *_ = open_prepared(tmp_path / "prepared")
    files, expected = open_dataset(source)
    assert split.tolist() == expected.tolist()
    assert images.name == "birds"
    assert_same_batches(images, files)
    splits = open_splits(
        DataConfig(source=str(tmp_path / "prepared"), resize=SIDE, crop=16), "paper"
    )
    assert set(splits.train.labels) == {1, 3, 5}
    assert set(splits.test.labels) == {0, 2, 4}

    source.write_text("\n".join(lines[:-1]))
    assert str(source) in refusal(open_prepared, tmp_path / "prepared")


def test_names_of_files_and_classes_are_bytes(tmp_path):
    """A line break, letters of any script, and one that is in no encoding."""
    rng = np.random.default_rng(0)
    for name in ("Zaunkönig", os.fsdecode(b"na\xefve\n")):
        for file in ("a\nb.png", "ミソサザイ.png", os.fsdecode(b"\xff\xfe .png"), "\x1b[31m.png"):
            photograph(tmp_path / "source" / name / file, rng)
    prepare_folder(tmp_path / "source", tmp_path / "prepared")
    images, files = open_prepared(tmp_path / "prepared").images, image_folder(tmp_path / "source")
    assert images.class_names == files.class_names
    assert [images.describe(i) for i in range(8)] == [*map(str, files.paths)]
    assert_same_batches(images, files)


def test_the_folder_may_have_any_name(birds, prepared, tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"pr\xe4pariert")
    prepare_folder(birds, folder)
    assert contents(folder) == contents(prepared)
    assert len(verify(folder).images) == 30
    (folder / "prepared.json").unlink()
    (folder / "prepared.journal").touch()
    assert "--size 24, not 32" in refusal(prepare_folder, birds, folder, side=32)


def test_another_process_maps_the_file_itself(prepared):
    part = open_prepared(prepared).images.select(np.array([5, 2, 7]))
    sent = pickle.dumps(part)
    assert len(sent) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        square = pool.apply(pickle.loads(sent).square, (1, SIDE))
    np.testing.assert_array_equal(square, part.square(1, SIDE))


def test_the_squares_cannot_be_written_to(prepared):
    square = open_prepared(prepared).images.square(0, SIDE)
    with pytest.raises(ValueError, match="read-only"):
        square[0] = 0


# --- the format, read as docs/data.md describes it ---------------------------------------------


def test_the_format(birds, prepared):
    import pyarrow.parquet

    assert set(contents(prepared)) == {"squares.npy", "index.parquet", "prepared.json"}
    manifest = json.loads((prepared / "prepared.json").read_text())
    index_sha256 = hashlib.sha256((prepared / "index.parquet").read_bytes()).hexdigest()
    assert manifest == {"version": 1, "index_sha256": index_sha256}

    squares = np.load(prepared / "squares.npy")
    assert (squares.shape, squares.dtype) == ((30, SIDE, SIDE, 3), np.uint8)
    index = pyarrow.parquet.read_table(prepared / "index.parquet")
    assert json.loads(index.schema.metadata[b"abe"]) == {
        "name": "birds",
        "class_names": [f"class {label}" for label in range(6)],
        "side": SIDE,
        "ks": None,
        "stamps": [],
        "source": str(birds),
        "sha256": None,
    }
    files = image_folder(birds)
    for row, line in enumerate(index.to_pylist()):
        path = files.paths[row]
        assert line == {
            "path": os.fsencode(path),
            "label": row // 5,
            "split": None,
            **dict.fromkeys(("x1", "y1", "x2", "y2")),
            "size": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "square_sha256": hashlib.sha256(squares[row].tobytes()).hexdigest(),
            "error": None,
        }
    assert [str(field.type) for field in index.schema] == [
        *("binary", "int64", "string"),
        *("double", "double", "double", "double"),
        *("int64", "int64", "string", "string", "string"),
    ]


def test_a_newer_version_is_refused(prepared):
    manifest = json.loads((prepared / "prepared.json").read_text())
    (prepared / "prepared.json").write_text(json.dumps(manifest | {"version": 2}))
    assert "is of version 2, and this program reads 1" in refusal(open_prepared, prepared)


def test_without_pyarrow(birds, prepared, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for attempt in (
        lambda: open_prepared(prepared),
        lambda: prepare_folder(birds, tmp_path / "other"),
    ):
        assert "pip install pyarrow" in refusal(attempt)
    assert not (tmp_path / "other").exists()


# --- interruptions -----------------------------------------------------------------------------


def test_what_takes_long_is_written_to_the_journal_before_there_is_much_of_it(
    birds, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "FLUSHED_SECONDS", 0.0)
    square, seen = datasets.ImageFiles.square, []

    def square_and_look(images, index, side):
        journal = tmp_path / "made" / "prepared.journal"
        seen.append(journal.read_bytes().count(b"\n"))
        return square(images, index, side)

    monkeypatch.setattr(datasets.ImageFiles, "square", square_and_look)
    prepare_folder(birds, tmp_path / "made")
    assert max(seen) > 10  # of 30, and fewer than FLUSHED


def test_going_on_decodes_the_rest_alone(birds, prepared, tmp_path, monkeypatch, flushed_often):
    folder = tmp_path / "interrupted"
    decoded = count_decoded(monkeypatch)
    square = datasets.ImageFiles.square

    def square_then_stop(images, index, side):
        if index == 19:
            raise EOFError
        return square(images, index, side)

    with monkeypatch.context() as patch:
        patch.setattr(datasets.ImageFiles, "square", square_then_stop)
        with pytest.raises(EOFError):
            prepare_folder(birds, folder)
    assert is_prepared(folder)
    assert "is not prepared to the end" in refusal(open_prepared, folder)
    config = DataConfig(source=str(folder), resize=SIDE, crop=16)
    assert "go on with `abe data prepare`" in refusal(open_splits, config, "paper")

    done = (folder / "prepared.journal").read_text().count("\n")
    assert 1 <= done == len(decoded)
    decoded.clear()
    prepare_folder(birds, folder)
    assert len(decoded) == 30 - done
    assert contents(folder) == contents(prepared)


def test_every_state_that_the_disk_goes_through(
    birds, prepared, tmp_path, monkeypatch, flushed_often
):
    """A copy of the folder is made around every write; each of them ends as the undisturbed one.

    Squares that the journal does not vouch for are overwritten with noise first: after a power cut
    they may hold anything.
    """
    folder, states = tmp_path / "watched", []

    def copying(name, function):
        def copy():
            states.append(tmp_path / f"{len(states)} {name}")
            shutil.copytree(folder, states[-1])

        def watched(*arguments, **options):
            copy()
            result = function(*arguments, **options)
            copy()
            return result

        return watched

    with monkeypatch.context() as patch:
        for name in ("_sync", "_write", "_reserve"):
            patch.setattr(module, name, copying(name, getattr(module, name)))
        prepare_folder(birds, folder)
    assert len(states) > 30
    names = {frozenset(contents(state)) for state in states}
    assert {"prepared.journal", "squares.npy", "index.parquet", "prepared.json"} in names

    for state in states:
        vouched = set()
        with contextlib.suppress(FileNotFoundError):
            lines = (state / "prepared.journal").read_text().splitlines()
            vouched = {json.loads(line)[0] for line in lines}
        if (state / "index.parquet").exists():
            squares = np.load(state / "squares.npy", mmap_mode="r+")
            for row in set(range(30)) - vouched:
                squares[row] = 77
            squares.flush()
        prepare_folder(birds, state)
        assert contents(state) == contents(prepared), state


def test_a_journal_that_ends_anywhere(birds, prepared, tmp_path, monkeypatch, flushed_often):
    folder = tmp_path / "killed"
    unlink = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **_: None)
        prepare_folder(birds, folder)
    unlink(folder / "prepared.json")
    journal = (folder / "prepared.journal").read_bytes()
    end = journal.rindex(b"\n", 0, -1) + 1
    decoded = count_decoded(monkeypatch)
    for length in (0, 1, end - 1, end, end + 1, len(journal) - 2, len(journal) - 1, len(journal)):
        state = shutil.copytree(folder, tmp_path / f"cut at {length}")
        (state / "prepared.journal").write_bytes(journal[:length] + b"\0" * (length % 2))
        decoded.clear()
        prepare_folder(birds, state)
        assert len(decoded) == 30 - journal[:length].count(b"\n")
        assert contents(state) == contents(prepared)


@pytest.mark.slow
def test_killed_at_20_random_moments(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for label in range(10):
        for number in range(60):
            photograph(tmp_path / "source" / str(label) / f"{number}.png", rng, (40, 50))
    images = image_folder(tmp_path / "source")
    context = multiprocessing.get_context("forkserver")

    def start(folder):
        options = {"source": tmp_path / "source", "side": SIDE}
        process = context.Process(target=prepare, args=(images, folder), kwargs=options)
        process.start()
        return process

    for _ in range(2):  # the first starts the server
        started = time.perf_counter()
        shutil.rmtree(tmp_path / "whole", ignore_errors=True)
        process = start(tmp_path / "whole")
        process.join()
        lasted = time.perf_counter() - started
        assert process.exitcode == 0
    expected = contents(tmp_path / "whole")

    moments = random.Random(0)
    killed = trials = 0
    while killed < 20:
        trials += 1
        assert trials <= 100
        folder = tmp_path / f"killed {trials}"
        process = start(folder)
        time.sleep(lasted * moments.random())
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:  # was done, so it takes less by now
            lasted *= 0.8
            continue
        killed += 1
        process = start(folder)
        process.join()
        assert process.exitcode == 0
        assert contents(folder) == expected


def test_a_second_process_is_refused(birds, tmp_path):
    script = """
        import sys, time
        from abe.data import datasets, prepare

        images = datasets.image_folder(sys.argv[1])
        square = datasets.ImageFiles.square
        def wait(images, index, side):
            if index == 0:
                print("started", flush=True)
                sys.stdin.read()
            return square(images, index, side)
        datasets.ImageFiles.square = wait
        prepare.prepare(images, sys.argv[2], source=sys.argv[1], side=24)
    """
    folder = tmp_path / "prepared"
    command = [sys.executable, "-c", textwrap.dedent(script), birds, folder]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"started\n"
        message = refusal(prepare_folder, birds, folder)
        assert message == f"{folder} is being prepared by another process: wait for it"
        _, said = process.communicate()
    assert process.returncode == 0, said
    prepare_folder(birds, folder)
    assert len(open_prepared(folder).images) == 30


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_arrow_is_left_no_threads_that_abort_the_end_of_a_process(birds, tmp_path):
    script = """
        import os, sys
        import pyarrow.parquet
        from abe.data import datasets, prepare

        threads = len(os.listdir("/proc/self/task"))
        images = datasets.image_folder(sys.argv[1])
        prepare.prepare(images, sys.argv[2], source=sys.argv[1], side=24)
        print(len(os.listdir("/proc/self/task")) - threads)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), birds, tmp_path / "prepared"]
    # OpenBLAS, OpenMP: none of their threads either
    left = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert left.stdout == "0\n"


# --- files that change or cannot be read -------------------------------------------------------


def test_a_changed_file_is_named(birds, prepared):
    longer, rewritten, gone, touched = (image_folder(birds).paths[i] for i in (3, 8, 9, 20))
    before = rewritten.stat()
    os.utime(touched)
    open_prepared(prepared)

    longer.write_bytes(longer.read_bytes() + b"\0")
    content = bytearray(rewritten.read_bytes())
    content[-1] ^= 1
    rewritten.write_bytes(content)
    gone.unlink()
    message = refusal(open_prepared, prepared)
    assert message.startswith(f"{prepared}: files have changed since they were prepared (3)")
    assert f"remove {prepared} and prepare the images anew" in message
    assert message.splitlines()[1:] == [str(path) for path in (longer, rewritten, gone)]

    # The time that it had before hides a change from all but the checksums.
    os.utime(rewritten, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert str(rewritten) not in refusal(open_prepared, prepared)
    assert f"{rewritten} has changed" in refusal(verify, prepared)


def test_the_files_may_go_away_altogether(birds, prepared):
    batches = batches_of(image_folder(birds))
    shutil.rmtree(birds)
    for batch, expected in zip(batches_of(verify(prepared).images), batches, strict=True):
        assert torch.equal(batch.images, expected.images)


def test_a_finished_folder_is_left_as_it_is(birds, prepared, monkeypatch):
    before = {path.name: path.stat() for path in prepared.iterdir()}
    decoded = count_decoded(monkeypatch)
    prepare_folder(birds, prepared)
    assert not decoded
    assert {path.name: path.stat() for path in prepared.iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_images_are_refused(birds, prepared, tmp_path, finished):
    if not finished:
        (prepared / "prepared.json").unlink()
        (prepared / "prepared.journal").touch()
    assert "was begun with --size 24, not 32" in refusal(prepare_folder, birds, prepared, side=32)

    (birds / "class 0" / "0.jpg").rename(birds / "class 0" / "9.jpg")
    photograph(birds / "class 1" / "new.png", np.random.default_rng(0))
    message = refusal(prepare_folder, birds, prepared)
    assert "was begun with other images (1 of them are gone, 2 are new)" in message
    for line in (
        f"- {birds}/class 0/0.jpg\n",
        f"+ {birds}/class 0/9.jpg\n",
        f"+ {birds}/class 1/new.png\n",
    ):
        assert line in message
    (birds / "class 0" / "9.jpg").rename(birds / "class 0" / "0.jpg")
    (birds / "class 1" / "new.png").unlink()

    images = image_folder(birds)
    split = np.where(images.labels < 3, "train", "test")
    for options, difference in (
        ({"split": split}, "another split of images"),
        ({"stamps": ("new",)}, "stamps [], not ['new']"),
        ({"ks": (3,)}, "ks None, not [3]"),
        ({"source": tmp_path / "elsewhere"}, f"source '{birds}', not '{tmp_path}/elsewhere'"),
    ):
        message = refusal(prepare, images, prepared, **({"source": birds, "side": SIDE} | options))
        assert f"was begun with {difference}; give a new folder, or" in message


def break_file(path):
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_broken_files_are_listed_and_skipped(birds, tmp_path, monkeypatch):
    folder = tmp_path / "prepared"
    broken = [break_file(image_folder(birds).paths[index]) for index in (4, 11, 12)]
    with pytest.raises(BrokenImagesError, match=r"\(3 of 30\).*--skip-broken") as error:
        prepare_folder(birds, folder)
    assert [item.path for item in error.value.errors] == broken
    reasons = [item.reason for item in error.value.errors]

    decoded = count_decoded(monkeypatch)
    images, *_, skipped = prepare_folder(birds, folder, skip_broken=True)
    assert sorted(decoded) == broken  # once more: why they could not be read may have passed
    assert (len(images), skipped) == (27, 3)
    kept = np.delete(np.arange(30), [4, 11, 12])
    assert_same_batches(images, image_folder(birds).select(kept))
    verify(folder)
    import pyarrow.parquet

    errors = pyarrow.parquet.read_table(folder / "index.parquet")["error"].to_pylist()
    assert [errors[row] for row in (4, 11, 12)] == reasons
    assert sum(error is None for error in errors) == 27
    assert not np.load(folder / "squares.npy")[[4, 11, 12]].any()
    splits = open_splits(DataConfig(source=str(folder), resize=SIDE, crop=16), "paper")
    assert splits.describe()["skipped"] == 3
    assert len(splits.train) + len(splits.test) == 27


def test_files_that_change_between_two_attempts_are_read_again(birds, tmp_path, monkeypatch):
    """One that is repaired, and one that is not what it was."""
    folder, whole = tmp_path / "prepared", tmp_path / "whole"
    repaired, worsened, other = (image_folder(birds).paths[index] for index in (4, 11, 12))
    content = repaired.read_bytes()
    break_file(repaired)
    refusal(prepare_folder, birds, folder)
    repaired.write_bytes(content)
    break_file(worsened)
    photograph(other, np.random.default_rng(1))
    decoded = count_decoded(monkeypatch)
    prepare_folder(birds, folder, skip_broken=True)
    assert sorted(decoded) == [repaired, worsened, other]
    prepare_folder(birds, whole, skip_broken=True)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("skip_broken", [True, False])
def test_a_file_that_may_be_read_by_now_is_read_again(birds, prepared, tmp_path, skip_broken):
    """A change of permissions is in neither its size nor its time."""
    folder, path = tmp_path / "again", image_folder(birds).paths[7]
    with pytest.MonkeyPatch.context() as patch:
        use_image = datasets.use_image

        def deny(file, box, use):
            if file == path:
                raise BrokenImageError(path, "Permission denied")
            return use_image(file, box, use)

        patch.setattr(datasets, "use_image", deny)
        assert f"{path}: Permission denied" in refusal(prepare_folder, birds, folder)
    assert prepare_folder(birds, folder, skip_broken=skip_broken).skipped == 0
    assert contents(folder) == contents(prepared)


@pytest.mark.parametrize("skip_broken", [True, False])
@pytest.mark.parametrize("name", ["PIL.ImageFile.ImageFile.load", "hashlib.file_digest"])
def test_a_disk_that_fails_for_a_while_costs_no_image(
    birds, prepared, tmp_path, flushed_often, name, skip_broken
):
    folder, path = tmp_path / "again", image_folder(birds).paths[20]
    working = pkgutil.resolve_name(name)

    def fail(file, *arguments):
        if str(path) in (getattr(file, "name", ""), getattr(file, "filename", "")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return working(file, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, fail)
        assert refusal(prepare_folder, birds, folder, skip_broken=skip_broken) == (
            f"{path} cannot be read: Input/output error; what is done is kept, and the same "
            "command goes on with it"
        )
    assert (folder / "prepared.journal").read_text().count("\n") >= 4
    assert prepare_folder(birds, folder, skip_broken=skip_broken).skipped == 0
    assert contents(folder) == contents(prepared)


def test_a_file_that_becomes_a_pipe_is_not_waited_for(birds, prepared):
    path = image_folder(birds).paths[4]
    path.unlink()
    os.mkfifo(path)
    assert f"{path} has changed" in refusal(verify, prepared)
    assert str(path) in refusal(open_prepared, prepared)


def test_a_file_that_changes_while_it_is_read(birds, tmp_path, monkeypatch):
    square = datasets.ImageFiles.square

    def square_then_touch(images, index, side):
        pixels = square(images, index, side)
        if index == 7:
            os.utime(images.paths[7], ns=(0, time.time_ns()))
        return pixels

    monkeypatch.setattr(datasets.ImageFiles, "square", square_then_touch)
    message = refusal(prepare_folder, birds, tmp_path / "prepared")
    assert f"{image_folder(birds).paths[7]}: changed while it was read" in message
    monkeypatch.undo()
    assert prepare_folder(birds, tmp_path / "prepared").skipped == 0


# --- the disk ----------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of so many bytes at `path`, or changes its options."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"may not mount a small disk here: {done.stderr.strip()}")

    yield path, mount
    while os.path.ismount(path):
        subprocess.run(["umount", path], check=True)


def test_space_is_checked_before_it_starts(birds, disk):
    path, mount = disk
    mount("size=1m")
    message = refusal(prepare_folder, birds, path / "prepared", side=256)
    assert "30 images of 256 x 256 pixels take 0.00593 GB, and 0.00105 GB are free" in message
    assert "squares.npy" not in contents(path / "prepared")


@pytest.mark.parametrize("reserved", [True, False], ids=["reserved", "not reserved"])
def test_a_disk_that_becomes_full(birds, prepared, disk, monkeypatch, flushed_often, reserved):
    """Space that others took since it was checked; more is given bit by bit."""
    path, mount = disk
    folder = path / "prepared"
    mount("size=4k")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    if not reserved:
        monkeypatch.delattr(os, "posix_fallocate")
    messages = []
    for pages in range(1, 60):
        mount(f"remount,size={pages * 4096}")
        try:
            prepare_folder(birds, folder)
        except InputError as error:
            messages.append(str(error))
            assert not (folder / "prepared.json").exists()
        else:
            break
    assert len(messages) > 10
    assert set(messages) == {
        f"{folder} cannot be written: No space left on device; what is done is kept, and the same "
        "command goes on with it"
    }
    assert contents(folder) == contents(prepared)


def test_a_disk_that_cannot_reserve_space(birds, prepared, tmp_path, monkeypatch):
    """There, the C library reads and writes a byte of each block."""

    def allocate(descriptor, offset, length):
        for place in [*range(offset, length, 512), length - 1]:
            os.pwrite(descriptor, os.pread(descriptor, 1, place) or b"\0", place)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    prepare_folder(birds, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(prepared)


def test_a_limit_on_the_size_of_files(birds, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        message = refusal(prepare_folder, birds, tmp_path / "prepared")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot be written: {os.strerror(errno.EFBIG)}" in message
    assert "squares.npy" not in contents(tmp_path / "prepared")
    prepare_folder(birds, tmp_path / "prepared")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; see the next test")
def test_a_folder_that_may_not_be_written(birds, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    message = refusal(prepare_folder, birds, tmp_path / "theirs" / "prepared")
    assert "prepared cannot be written: Permission denied" in message


def test_a_disk_that_may_only_be_read(birds, prepared, disk, monkeypatch):
    path, mount = disk
    mount("size=1m")
    shutil.copytree(prepared, path / "prepared")
    (path / "prepared" / "prepared.journal").touch()  # as an interruption at the end leaves it
    partial = shutil.copytree(prepared, path / "partial")
    (partial / "prepared.json").rename(partial / "prepared.journal")
    mount("remount,ro")
    for name in ("new", "partial"):
        message = refusal(prepare_folder, birds, path / name)
        assert message == (
            f"{path / name} cannot be written: Read-only file system; give another folder by --out"
        )
    assert_same_batches(prepare_folder(birds, path / "prepared").images, image_folder(birds))
    verify(path / "prepared")


def test_folders_that_are_no_place_for_it(birds, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "mine is not empty" in refusal(prepare_folder, birds, tmp_path / "mine")
    message = refusal(prepare_folder, birds, tmp_path / "mine" / "notes.txt")
    assert message.endswith(
        "notes.txt cannot be written: File exists; give another folder by --out"
    )


def test_a_folder_among_the_images(birds, tmp_path):
    """Also where `source` is the folder that a benchmark was unpacked into."""
    for folder in (birds, birds / "class 7", birds / "class 1" / "deep"):
        for source in (birds, tmp_path):
            assert refusal(prepare, image_folder(birds), folder, source=source) == (
                f"{folder} is in {birds}, the images: name a folder outside of it"
            )
    assert not (birds / "class 7").exists()
    prepare(image_folder(birds), tmp_path / "prepared", source=tmp_path, side=SIDE)


def test_windows_can_read_and_not_prepare(birds, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    message = refusal(prepare_folder, birds, tmp_path / "other")
    assert "images can be prepared on Linux or macOS" in message
    assert len(prepare_folder(birds, prepared).images) == 30


# --- on all processors, with progress ----------------------------------------------------------


@pytest.mark.skipif(os.cpu_count() == 1, reason="there is one processor")
def test_several_threads_decode(birds, prepared, tmp_path, monkeypatch):
    square, both = datasets.ImageFiles.square, threading.Barrier(2, timeout=60)

    def wait(images, index, side):
        if index in (0, 29):  # in the first and the last chunk of a thread's work
            both.wait()
        return square(images, index, side)

    monkeypatch.setattr(datasets.ImageFiles, "square", wait)
    prepare_folder(birds, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(prepared)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress(birds, tmp_path, is_terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=is_terminal)
    prepare_folder(birds, tmp_path / "prepared", console=console)
    verify(tmp_path / "prepared", console)
    if is_terminal:
        for part in ("preparing images", "comparing checksums", "100%"):
            assert part in shown.getvalue()
    else:
        assert shown.getvalue() == ""


def test_progress_where_there_is_no_terminal(birds, tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("abe.progress.PROGRESS_SECONDS", 0)
    prepare_folder(birds, tmp_path / "prepared", console=Console(file=shown))
    assert shown.getvalue().endswith("preparing images: 30 of 30\n")


# --- damage ------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bit_that_flips_is_found(prepared, data):
    name = data.draw(st.sampled_from(["squares.npy", "index.parquet", "prepared.json"]))
    path = prepared / name
    content = path.read_bytes()
    # The header of squares.npy ends in blanks that nothing reads.
    first, last = (128, None) if name == "squares.npy" else (0, content.rindex(b"}"))
    position = data.draw(st.integers(first, (last or len(content)) - 1))
    if content[position : position + 1].isspace():
        return
    damaged = bytearray(content)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        message = refusal(verify, prepared)
    finally:
        path.write_bytes(content)
    if name == "squares.npy":
        row = (position - 128) // (3 * SIDE * SIDE)
        assert f"image {row} of squares.npy" in message
        assert "(1 of 30 images)" in message
    assert str(prepared) in message


@pytest.mark.parametrize("name", ["squares.npy", "index.parquet", "prepared.json"])
def test_files_that_are_cut_or_gone(birds, prepared, name):
    path = prepared / name
    content = path.read_bytes()
    for length in (0, 1, 50, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        if (name, length) == ("prepared.json", len(content) - 1):
            continue  # the line break
        for attempt in (lambda: open_prepared(prepared), lambda: prepare_folder(birds, prepared)):
            assert f"{prepared} is damaged" in refusal(attempt)
    path.unlink()
    says = "not prepared to the end" if name == "prepared.json" else "is damaged"
    assert says in refusal(open_prepared, prepared)


@pytest.mark.parametrize("name", ["index.parquet", "prepared.json"])
def test_what_may_not_be_read_is_not_called_damaged(birds, prepared, monkeypatch, name):
    """Here by a patch, because root may read everything."""
    read_bytes = Path.read_bytes

    def deny(path):
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", deny)
    for attempt in (lambda: open_prepared(prepared), lambda: prepare_folder(birds, prepared)):
        assert refusal(attempt) == (
            f"{prepared / name} cannot be read: Permission denied; see to its permissions and to "
            "the disk"
        )


# --- training ----------------------------------------------------------------------------------


# --- a hostile folder --------------------------------------------------------------------------


def png(width, height, *chunks, rows=None, color_type=0):
    """A black PNG file, which takes a thousandth of its pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0))
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(width + 1)) for _ in range(rows or height))
    pixels += packer.flush()
    extra = b"".join(chunk(*item) for item in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def encoded(kind, size=(40, 30), **options):
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_size(kind, content):
    """50,000 x 50,000 in place of 40 x 30 in the header."""
    if kind == "JPEG":
        place = content.index(b"\xff\xc0") + 5
        return content[:place] + struct.pack(">HH", 50000, 50000) + content[place + 4 :]
    if kind == "GIF":
        return content[:6] + struct.pack("<HH", 50000, 50000) + content[10:]
    assert kind == "BMP"
    return content[:18] + struct.pack("<ii", 50000, 50000) + content[26:]


@pytest.fixture
def hostile(tmp_path):
    """More than 100 entries in two class folders; -> the root, and path -> what is wrong with it.

    That is a regular expression, or None where it is fine.
    """
    root = tmp_path / "hostile"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    os.mkfifo(tmp_path / "outside.jpg")  # whoever opens it waits for ever
    reasons = {}

    def add(name, content, reason=None):
        path = root / name
        path.write_bytes(content)
        reasons[path] = reason

    def link(name, target, reason=None):
        path = root / name
        path.symlink_to(target)
        reasons[path] = reason

    unreadable = "damaged, or neither JPEG, .* nor TIFF"
    too_large = "pixels.* exceeds limit"
    away = re.escape(f"a link to a folder or out of {root}, and none is followed")
    huge = png(50_000, 50_000, rows=2)
    bomb = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9))
    for number in range(8):
        add(f"a/empty {number}.jpg", b"", unreadable)
        add(f"a/text {number}.png", b"<?xml version='1.0'?>" * number, unreadable)
        add(f"a/header {number}.png", huge, too_large)
        add(f"a/jpeg {number}.jpg", with_size("JPEG", encoded("JPEG")), too_large)
        add(f"a/gif {number}.gif", with_size("GIF", encoded("GIF")), too_large)
        add(f"a/bmp {number}.bmp", with_size("BMP", encoded("BMP")), too_large)
        add(f"a/cut {number}.webp", encoded("WEBP")[: 100 + number], "could not create decoder")
        add(f"a/cut {number}.tif", encoded("TIFF")[: 100 + number], "Truncated File Read")
        (root / "a" / f"folder {number}.jpg").mkdir()
    for number in range(4):
        add(f"a/text bomb {number}.png", png(40, 30, bomb), "Decompressed data too large")
        link(f"a/loop {number}.jpg", f"loop {number}.jpg", "Too many levels of symbolic links")
        link(f"a/nowhere {number}.jpg", "nothing", "No such file or directory")
        os.mkfifo(root / "a" / f"pipe {number}.jpg")
        reasons[root / "a" / f"pipe {number}.jpg"] = "a pipe, which would be waited for"
    link("a/link to a pipe.jpg", "pipe 0.jpg", "a pipe")
    link("a/cable.jpg", "link to a pipe.jpg", "a pipe")
    link("a/out.jpg", tmp_path / "outside.jpg", away)
    link("b/over.jpg", "../a/out.jpg", away)
    link("a/folder", tmp_path, away)
    link("b/up", "../..", away)
    add("a/\x1b[2J broken.png", b"", unreadable)
    add("a/x.png: all fine\n\nDone.png", b"", unreadable)
    add("a/sparse.webp", b"RIFF\0\0\0\xc0WEBPVP8 ", "3,072 MiB are more than the 512")
    os.truncate(root / "a" / "sparse.webp", 3 * 2**30)

    palette = ((b"PLTE", bytes(6)), (b"tRNS", bytes(2)))
    large = png(9_400, 9_400, *palette, color_type=3)  # as many pixels as are decoded
    for number in range(2):
        add(f"a/palette {number}.png", large)
    add("a/more after its end.gif", encoded("GIF") + bytes(1_000_000))
    add("a/line\nbreak.png", encoded("PNG"))
    add("a/\x1b[2J.png", encoded("PNG"))
    add(os.fsdecode(b"a/\xff.png"), encoded("PNG"))
    add(f"a/{'n' * 250}.png", encoded("PNG"))
    add("a/-rf.jpg", encoded("JPEG"))
    link("a/link to a file.jpg", "-rf.jpg")
    folder = root / "a"
    for _ in range(1200):
        folder /= "d"
        folder.mkdir()
    add(folder / "deep.png", encoded("PNG"))
    add("b/1.png", encoded("PNG"))
    add("b/2.png", encoded("PNG"))
    yield root, reasons
    subprocess.run(["rm", "-r", root / "a" / "d"], check=True)  # too deep for shutil


def abe(*words, folder):
    """Runs the command; -> its exit status, what it printed, and the most memory it took."""
    command = [Path(sys.executable).with_name("abe"), *words]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        printed = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return process.returncode, printed, usage.ru_maxrss * kilobyte


@pytest.mark.slow
def test_a_hostile_folder(hostile, tmp_path):
    root, reasons = hostile
    assert len(reasons) >= 100
    broken = {path: reason for path, reason in reasons.items() if reason}
    status, printed, memory = abe("data", "prepare", root, "--size", "64", folder=tmp_path)
    assert status == 2
    assert f"hostile has images that cannot be read ({len(broken)} of {len(reasons)})" in printed
    assert "Traceback" not in printed
    assert memory < 2**30
    lines = printed.splitlines()
    for path in broken:
        assert [line for line in lines if line.startswith(f"{printable(path)}: ")]

    folder = tmp_path / "hostile-64"
    with pytest.raises(BrokenImagesError) as error:
        prepare_folder(root, folder, side=64)
    assert {item.path for item in error.value.errors} == {*broken}
    for item in error.value.errors:
        assert re.search(broken[item.path], item.reason), item
    prepared = prepare_folder(root, folder, side=64, skip_broken=True)
    names = {prepared.images.describe(index) for index in range(len(prepared.images))}
    assert names == {str(path) for path, reason in reasons.items() if not reason}
    assert prepared.skipped == len(broken)


# --- the command -------------------------------------------------------------------------------


def test_the_command(birds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["abe", "data", *words])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        printed = capsys.readouterr()
        return exit.value.code, printed.out + printed.err

    prepare_birds = ("prepare", "birds", "--size", "24")
    broken = break_file(birds / "class 3" / "2.jpg")
    status, printed = run(*prepare_birds)
    assert status == 2
    assert f"birds/class 3/{broken.name}: " in printed
    done = "birds-24: 29 images, 1 left out\n"
    assert run(*prepare_birds, "--skip-broken") == (0, done)
    assert run(*prepare_birds) == (0, done)
    verified = "birds-24: 29 images as they were prepared\n"
    assert run("verify", "birds-24") == (0, verified)
    for words, message in (
        (("birds-24", "--size", "24"), "birds-24 has no files to decode: train on it as it is"),
        (("synthetic",), "synthetic has no files to decode: train on it as it is"),
    ):
        assert run("prepare", *words) == (2, f"error: {message}\n")
    status, printed = run("prepare", "birds", "--out", "birds/1")
    assert status == 2
    assert re.fullmatch(
        "error: birds/1 is in .*birds, the images: name a folder outside of it\n", printed
    )

    shutil.rmtree(birds)
    assert run("verify", "birds-24")[0] == 0
    with Path("birds-24/squares.npy").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    status, printed = run("verify", "birds-24")
    assert status == 2
    assert "image 2 of squares.npy" in printed


def test_what_results_have_to_say_is_kept(birds, tmp_path):
    """Here of a benchmark; K of 3 and 5 are asked for, and the test images have a gallery."""
    images = image_folder(birds)
    split = np.array(["train", "train", "query", "gallery", "gallery"] * 6)
    split[images.labels < 3] = "train"
    folder = tmp_path / "prepared"
    prepare(
        images, folder, source=birds, split=split, ks=(3, 5), stamps=("partial, 30 of 31",), side=24
    )
    splits = open_splits(DataConfig(source=str(folder), resize=SIDE, crop=16), "paper")
    assert splits.ks == (3, 5)
    assert splits.describe()["stamps"] == ["partial, 30 of 31"]
    assert (len(splits.train), len(splits.test), len(splits.gallery)) == (21, 3, 6)
