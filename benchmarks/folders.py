"""Folders that the benchmarks read: drawn JPEG files, and prepared folders of any length."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from abe.data.prepare import INDEX, MANIFEST, SQUARES, VERSION


def draw_photographs(
    root: Path, classes: int, per_class: int, size: tuple[int, int], *, grain: int, quality: int
) -> Path:
    """JPEG files of a size in class folders; `grain`: pixels between two colours."""
    rng = np.random.default_rng(0)
    width, height = size
    for label in range(classes):
        (root / f"{label:03}").mkdir(parents=True)
        for number in range(per_class):
            shape = (height // grain, width // grain, 3)
            coarse = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            image = coarse.resize(size, Image.Resampling.BICUBIC)
            image.save(root / f"{label:03}" / f"{number}.jpg", quality=quality)
    return root


def list_prepared(folder: Path, index: pa.Table, about: dict[str, Any], side: int) -> Path:
    """A prepared folder with that index, by docs/data.md; its squares take no disk space."""
    folder.mkdir()
    shape = (len(index), side, side, 3)
    np.lib.format.open_memmap(folder / SQUARES, "w+", np.uint8, shape)
    table = index.replace_schema_metadata({"abe": json.dumps(about)})
    pyarrow.parquet.write_table(table, folder / INDEX, compression="zstd")
    digest = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"version": VERSION, "index_sha256": digest}))
    return folder
