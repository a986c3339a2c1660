"""Batches that no number of workers and no point of resumption changes."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image

from abe.data import loader
from abe.data.datasets import BrokenImagesError, image_folder
from abe.data.decode import BrokenImageError, ReadingError
from abe.data.loader import cache_decoded, evaluation_batches, training_batches
from abe.data.samplers import ClassBalancedBatchSampler, PairBatchSampler
from abe.data.transforms import Preprocessing, center_crop, pad_to_square
from abe.errors import InputError

# Python 3.12 warns of what every DataLoader on Linux does; the workers run no thread of the parent.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

PREPROCESSING = Preprocessing(resize=24, crop=16)


@pytest.fixture
def images(tmp_path):
    """5 classes of 6 photographs of noise, wide and tall."""
    rng = np.random.default_rng(0)
    for label in range(5):
        (tmp_path / f"class {label}").mkdir()
        for number in range(6):
            height, width = rng.integers(20, 60, 2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"class {label}" / f"{number}.png")
    return image_folder(tmp_path)


def train(
    images,
    *,
    start=0,
    stop=6,
    workers=0,
    seed=0,
    sampler=None,
    preprocessing=PREPROCESSING,
    part=(0, 1),
):
    return training_batches(
        images,
        sampler or PairBatchSampler(images.labels, batch_size=8),
        preprocessing,
        seed=seed,
        start_step=start,
        stop_step=stop,
        workers=workers,
        part=part,
    )


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for tensor, expected in zip(batch, other, strict=True):
            assert torch.equal(tensor, expected)


def no_workers_left():
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not multiprocessing.active_children()


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_what_the_sampler_asked_for(images, workers):
    sampler = ClassBalancedBatchSampler(images.labels, classes_per_batch=3, images_per_class=2)
    batches = list(train(images, sampler=sampler, start=4, stop=7, workers=workers))
    assert len(batches) == 3
    for step, batch in enumerate(batches, start=4):
        assert batch.images.shape == (6, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        np.testing.assert_array_equal(batch.indices, sampler.batch(step))
        np.testing.assert_array_equal(batch.labels, images.labels[batch.indices])


def test_every_image_is_a_crop_of_its_padded_square_or_of_its_mirror(images):
    flips = []
    for batch in train(images, stop=20):
        for pixels, index in zip(batch.images, batch.indices, strict=True):
            square = pad_to_square(images.load(int(index)), 24)
            found = [
                flip
                for flip, view in ((0, square), (1, square[:, ::-1]))
                for top in range(9)
                for left in range(9)
                if np.array_equal(pixels.permute(1, 2, 0), view[top : top + 16, left : left + 16])
            ]
            assert found
            flips += found[:1]
    assert 0.35 < np.mean(flips) < 0.65


def test_two_workers_give_the_batches_of_none(images):
    assert_same(train(images, workers=2), train(images))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_batches_of_an_uninterrupted_run(images, workers):
    assert_same(train(images, start=3, workers=workers), list(train(images))[3:])


def test_the_seed_the_step_and_the_place_decide_the_crop(images):
    class SameImage:
        def batch(self, step):
            return np.zeros(4, int)

    def crops(seed):
        batches = train(images, sampler=SameImage(), seed=seed, stop=8)
        return [image.numpy().tobytes() for batch in batches for image in batch.images]

    assert crops(0) == crops(0)
    assert len(set(crops(0))) > 24  # of 32, drawn from 162
    assert crops(0) != crops(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(images, workers):
    torch_state, numpy_state = torch.get_rng_state(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    list(train(images, workers=workers))
    list(evaluation_batches(images, PREPROCESSING, workers=workers))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert pickle.dumps(np.random.get_state()) == numpy_state  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 2])
def test_the_steps_to_come_take_no_memory(images, workers):
    far = 10**15
    batches = train(images, start=far - 2, stop=10**18, workers=workers)
    assert_same(itertools.islice(batches, 3), train(images, start=far - 2, stop=far + 1))
    batches.close()


def test_no_step_is_left(images):
    assert list(train(images, start=6, stop=6)) == []


# --- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_a_batch_are_its_images_and_all_its_labels(images, parts):
    for step, whole in enumerate(train(images)):
        own = [next(train(images, start=step, part=(r, parts))) for r in range(parts)]
        assert torch.equal(torch.cat([batch.images for batch in own]), whole.images)
        assert {len(batch.images) for batch in own} <= {8 // parts, -(-8 // parts)}
        for batch in own:
            assert torch.equal(batch.labels, whole.labels)
            assert torch.equal(batch.indices, whole.indices)


def test_parts_of_an_evaluation_are_its_batches(images):
    whole = evaluation_batches(images, PREPROCESSING, batch_size=7)
    parts = [evaluation_batches(images, PREPROCESSING, 7, part=(r, 3)) for r in range(3)]
    assert_same(itertools.chain(*parts), whole)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 8, 8, 6]), (15, [15, 15]), (64, [30])])
def test_evaluation_takes_all_centre_crops_in_order(images, batch_size, sizes, workers):
    batches = list(evaluation_batches(images, PREPROCESSING, batch_size, workers))
    assert [len(batch.images) for batch in batches] == sizes
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(30))
    assert torch.cat([batch.labels for batch in batches]).tolist() == images.labels.tolist()
    pixels = torch.cat([batch.images for batch in batches])
    for index in range(30):
        expected = center_crop(pad_to_square(images.load(index), 24), 16)
        np.testing.assert_array_equal(pixels[index].permute(1, 2, 0), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches(images, workers):
    sampler = PairBatchSampler(images.labels, batch_size=8)
    options = {"seed": 0, "start_step": 0, "stop_step": 6, "workers": workers}
    pinned = list(training_batches(images, sampler, PREPROCESSING, **options, pin_memory=True))
    assert all(batch.images.is_pinned() for batch in pinned)
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in pinned)
    assert_same(pinned, train(images))


# --- broken files, interruptions ---------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_on_the_way_is_named_by_the_one_error(images, workers):
    broken = images.paths[17]
    broken.write_bytes(broken.read_bytes()[:99])
    batches = evaluation_batches(images, PREPROCESSING, batch_size=8, workers=workers)
    assert next(batches).indices.tolist() == list(range(8))
    next(batches)
    with pytest.raises(BrokenImageError) as error:
        next(batches)
    assert error.value.path == broken
    assert "Traceback" not in str(error.value)
    del error
    assert no_workers_left()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_fails_is_no_broken_file(images, workers, monkeypatch):
    def fail(image):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ReadingError) as error:
        next(evaluation_batches(images, PREPROCESSING, batch_size=8, workers=workers))
    assert (error.value.errno, error.value.filename) == (errno.EIO, str(images.paths[0]))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: bytearray(2**60))
    with pytest.raises(MemoryError, match=f"{images.paths[0]}: too little memory"):
        next(evaluation_batches(images, PREPROCESSING, batch_size=8, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_that_is_left_ends_the_workers(images, workers, capfd):
    batches = train(images, stop=10**6, workers=workers)
    next(batches)
    assert len(multiprocessing.active_children()) == workers
    batches.close()
    assert no_workers_left()
    assert capfd.readouterr() == ("", "")


def test_an_exception_in_the_loop_ends_the_workers(images):
    def loop():
        for _ in train(images, stop=10**6, workers=2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert no_workers_left()


SCRIPT = """
    import signal, sys
    from abe.data.datasets import image_folder
    from abe.data.loader import training_batches
    from abe.data.samplers import PairBatchSampler
    from abe.data.transforms import Preprocessing

    images = image_folder(sys.argv[1])
    batches = training_batches(
        images,
        PairBatchSampler(images.labels, batch_size=8),
        Preprocessing(resize=24, crop=16),
        seed=0,
        start_step=0,
        stop_step=10**9,
        workers=2,
    )
    next(batches)
    interrupts = []
    signal.signal(signal.SIGINT, lambda *event: interrupts.append(event))
    print("ready", flush=True)
    while not interrupts:
        next(batches)
    for _ in range(100):
        next(batches)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell ignores it
        print("went on", flush=True)
        for batch in batches:
            pass
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.slow
def test_ctrl_c_reaches_the_main_process_alone(images):
    """A terminal sends it to every process of the group; the trainer finishes its step first."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), images.paths[0].parents[1]]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        for line in ("ready\n", "went on\n"):
            assert process.stdout.readline() == line
            os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("stopped\n", "", 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


# --- the cache ---------------------------------------------------------------------------------


def test_the_cache_changes_no_pixel(images):
    cached = cache_decoded(images, 24)
    assert cached.squares.shape == (30, 24, 24, 3)
    assert_same(train(cached), train(images))
    assert_same(train(cached, workers=2), train(images))
    assert_same(
        evaluation_batches(cached, PREPROCESSING), evaluation_batches(images, PREPROCESSING)
    )


def test_cached_images_are_decoded_once(images):
    cached = cache_decoded(images, 24)
    expected = list(train(images))
    for path in images.paths:
        path.unlink()
    assert_same(train(cached), expected)


def test_a_cache_of_another_side_is_not_used(images):
    other = Preprocessing(resize=40, crop=32)
    assert_same(
        train(cache_decoded(images, 24), preprocessing=other), train(images, preprocessing=other)
    )


def test_a_selection_of_cached_images_shares_their_memory(images):
    cached = cache_decoded(images, 24)
    rows = np.array([21, 3, 3, 17, 4, 28])
    part = cached.select(rows)
    assert part.squares is cached.squares
    assert part.labels.tolist() == images.labels[rows].tolist()
    assert part.class_names == images.class_names
    assert part.name == images.name
    assert part.describe(1) == images.describe(3)
    assert np.array_equal(part.load(1), images.load(3))
    for cached_part, plain in (
        (part, images.select(rows)),
        (part.select(np.array([5, 0])), images.select(rows[[5, 0]])),
    ):
        assert_same(
            evaluation_batches(cached_part, PREPROCESSING), evaluation_batches(plain, PREPROCESSING)
        )


class NoCopies(np.ndarray):
    def __reduce__(self):
        raise AssertionError("a worker would get a copy of the cache")


@pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="only a fork shares memory"
)
def test_workers_share_the_cache(images):
    cached = cache_decoded(images, 24)
    shared = dataclasses.replace(cached, squares=cached.squares.view(NoCopies))
    assert_same(train(shared, workers=2), train(images))


SPAWN = """
    import sys
    import torch
    from abe.data.datasets import image_folder
    from abe.data.loader import cache_decoded, evaluation_batches
    from abe.data.transforms import Preprocessing

    if __name__ == "__main__":
        torch.multiprocessing.set_start_method("spawn")
        images = cache_decoded(image_folder(sys.argv[1]), 24)
        batches, others = (
            evaluation_batches(images, Preprocessing(resize=24, crop=16), 8, workers)
            for workers in (0, 1)
        )
        for batch, other in zip(batches, others, strict=True):
            assert all(torch.equal(*tensors) for tensors in zip(batch, other, strict=True))
        print("the same")
"""


@pytest.mark.slow
def test_workers_that_are_spawned(images, tmp_path_factory):
    """As on macOS and Windows."""
    script = tmp_path_factory.mktemp("script") / "spawn.py"
    script.write_text(textwrap.dedent(SPAWN))
    command = [sys.executable, script, images.paths[0].parents[1]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("the same\n", "", 0)


def test_a_broken_file_and_the_cache(images):
    for index in (3, 20):
        images.paths[index].write_bytes(b"")
    with pytest.raises(BrokenImagesError, match=r"\(2 of 30\)") as error:
        cache_decoded(images, 24)
    assert [item.path for item in error.value.errors] == [images.paths[3], images.paths[20]]

    done = []
    cached = cache_decoded(images, 24, skip_broken=True, on_progress=done.append)
    assert done == list(range(1, 31))
    kept = images.select(np.setdiff1d(np.arange(30), [3, 20]))
    assert len(cached) == 28
    assert cached.labels.tolist() == kept.labels.tolist()
    assert_same(evaluation_batches(cached, PREPROCESSING), evaluation_batches(kept, PREPROCESSING))


def test_a_cache_larger_than_the_memory_that_is_free(images, monkeypatch):
    """The system would promise it, and end the process when it is filled."""
    monkeypatch.setattr(loader, "available_memory", lambda: 30 * 24 * 24 * 3 - 1)
    with pytest.raises(InputError, match=r"take 0\.0 GB of memory, more than is free: set"):
        cache_decoded(images, 24)
    monkeypatch.setattr(loader, "available_memory", lambda: 30 * 24 * 24 * 3)
    assert len(cache_decoded(images, 24)) == 30


def test_a_cache_larger_than_any_memory(images):
    with pytest.raises(InputError, match=r"take 90,000\.0 GB of memory, more than is free: set"):
        cache_decoded(images, 10**6)
