"""Images a second of the prepared loader, against a plain data set and against torchvision's.

    python benchmarks/loader.py [FOLDER]

FOLDER is one of class folders; without it JPEG files are generated. torchvision is compared where
it is installed; only its data sets and transforms are needed, so where its compiled operators do
not fit this build of PyTorch it is used without them. All loaders run in this process
on one thread, do the same work on the same images (padded squares of 256 pixels, random crops of
224 and flips, batches of 64), read from a warm page cache, and take turns; rates are medians over
the rounds. What a million images take of the index and the samplers is measured apart. The last
line of the output is the result as one JSON object, which also goes to benchmarks/loader.json.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from folders import draw_photographs, list_prepared
from measure import options_of, publish, take_turns
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from abe.data.datasets import ImageFiles, image_folder
from abe.data.loader import training_batches
from abe.data.prepare import open_prepared, prepare
from abe.data.samplers import ClassBalancedBatchSampler, PairBatchSampler
from abe.data.transforms import Preprocessing, pad_to_square, random_crop_and_flip

PREPROCESSING = Preprocessing(resize=256, crop=224)
BATCH = 64
SIZES = (10_000, 100_000, 1_000_000)


class PlainImages(Dataset[tuple[Tensor, int]]):
    """What one writes first: open a file, transform it."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files.paths[index]) as image:
            square = pad_to_square(image.convert("RGB"), PREPROCESSING.resize)
        crop = random_crop_and_flip(square, PREPROCESSING.crop, self.rng)
        return torch.from_numpy(crop.copy()).permute(2, 0, 1), int(self.files.labels[index])


def import_torchvision() -> Any:
    """torchvision, its operators declared if they cannot be loaded; None if it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def torchvision_images(torchvision: Any, folder: Path) -> Dataset[tuple[Tensor, int]]:
    """ImageFolder with torchvision's own transforms, to the same sizes."""
    transforms = torchvision.transforms

    def square(image: Image.Image) -> Image.Image:
        side = max(image.size)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        edges = [left, top, side - image.width - left, side - image.height - top]
        return transforms.functional.pad(image, edges)

    chain = [
        transforms.Lambda(square),
        transforms.Resize((PREPROCESSING.resize, PREPROCESSING.resize)),
        transforms.RandomCrop(PREPROCESSING.crop),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
    return torchvision.datasets.ImageFolder(folder, transforms.Compose(chain))


def photographs(root: Path) -> Path:
    """480 JPEG files as photographs of the benchmarks are."""
    return draw_photographs(root, 24, 20, (500, 375), grain=25, quality=90)


def compare_loaders(files: ImageFiles, folder: Path, rounds: int) -> dict[str, Any]:
    root = Path(os.path.commonpath(files.paths))
    started = time.perf_counter()
    prepared = prepare(files, folder, source=root).images
    preparation = time.perf_counter() - started
    sampler = PairBatchSampler(files.labels, BATCH)

    def loader(images: Any) -> Iterator[object]:
        steps = {"start_step": 0, "stop_step": 10**9}
        return training_batches(images, sampler, PREPROCESSING, seed=0, **steps)

    def usual(images: Dataset[tuple[Tensor, int]]) -> Iterator[object]:
        return iter(DataLoader(images, batch_sampler=map(sampler.batch, itertools.count())))

    contenders = {
        "plain": (usual(PlainImages(files)), 4),
        "files": (loader(files), 4),
        "prepared": (loader(prepared), 80),
    }
    torchvision = import_torchvision()
    if torchvision is not None:
        contenders["torchvision"] = (usual(torchvision_images(torchvision, root)), 4)

    def take(batches: Iterator[object], number: int) -> Callable[[], None]:
        return lambda: collections.deque(itertools.islice(batches, number), maxlen=0)

    seconds = take_turns({name: take(*each) for name, each in contenders.items()}, rounds)
    medians = {
        name: round(number * BATCH / seconds[name]) for name, (_, number) in contenders.items()
    }
    return {
        "images": len(files),
        "rounds": rounds,
        "images_per_second": medians,
        **{
            f"prepared_to_{name}": round(medians["prepared"] / medians[name], 1)
            for name in ("plain", "torchvision")
            if name in medians
        },
        "torchvision": torchvision and torchvision.__version__,
        "preparation_images_per_second": round(len(files) / preparation),
    }


def listed_folder(folder: Path, count: int) -> Path:
    """A prepared folder of `count` images."""
    labels = np.arange(count) // 50
    nothing = pa.nulls(count)
    columns = {
        "path": [f"/photographs/{row:09}.jpg".encode() for row in range(count)],
        "label": labels,
        "split": nothing.cast(pa.string()),
        **{edge: nothing.cast(pa.float64()) for edge in ("x1", "y1", "x2", "y2")},
        "size": np.full(count, 100_000),
        "mtime_ns": np.arange(count) + 10**18,
        "sha256": [hashlib.sha256(row.to_bytes(8)).hexdigest() for row in range(count)],
        "square_sha256": [hashlib.sha256(bytes(192)).hexdigest()] * count,
        "error": nothing.cast(pa.string()),
    }
    about = {
        "name": "photographs",
        "class_names": [str(label) for label in range(int(labels[-1]) + 1)],
        "side": 8,
        "ks": None,
        "stamps": [],
        "source": "/photographs",
        "sha256": None,
    }
    return list_prepared(folder, pa.table(columns), about, 8)


def growth(folder: Path, count: int) -> dict[str, Any]:
    """An epoch of the index and each sampler over `count` images."""
    listed_folder(folder, count)
    started = time.perf_counter()
    images = open_prepared(folder).images
    opened = time.perf_counter() - started
    result: dict[str, Any] = {"images": count, "open_seconds": round(opened, 2)}
    samplers: dict[str, Callable[[], Any]] = {
        "pairs": lambda: PairBatchSampler(images.labels, BATCH),
        "classes": lambda: ClassBalancedBatchSampler(images.labels, BATCH // 4, 4),
    }
    for name, make in samplers.items():
        tracemalloc.start()
        sampler = make()
        held, _ = tracemalloc.get_traced_memory()
        peaks = []
        for step in range(20):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            sampler.batch(step)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.stop()
        times = list(epoch(sampler.batch, images.labels, count // BATCH))
        result[name] = {
            "bytes_per_image": round(held / count, 1),
            "peak_kilobytes_per_batch": round(max(peaks) / 1000, 1),
            "microseconds_per_batch": round(1e6 * median(times), 1),
        }
    return result


def epoch(batch: Callable[[int], np.ndarray], labels: np.ndarray, steps: int) -> Iterable[float]:
    """Seconds that each batch of indices and labels takes."""
    for step in range(steps):
        started = time.perf_counter()
        labels[batch(step)]
        yield time.perf_counter() - started


def main() -> None:
    parser = options_of(__doc__, __file__, rounds=9)
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of class folders")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of the indices")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or photographs(Path(scratch) / "generated")
        loaders = compare_loaders(image_folder(folder), Path(scratch) / "prepared", options.rounds)
        print(json.dumps(loaders, indent=2))
        sizes = []
        for count in options.sizes:
            sizes.append(growth(Path(scratch) / str(count), count))
            print(json.dumps(sizes[-1]))
    publish(options.output, {"data": folder.name, "loaders": loaders, "growth": sizes})


if __name__ == "__main__":
    main()
