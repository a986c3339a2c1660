"""How long `abe train` takes to its first loss, beside `import torch` alone.

    python benchmarks/startup.py [--rounds 7]

JPEG files are generated and prepared at 128 pixels; the recipe is `photographs`, on the CPU. Both
commands are started anew in each round and take turns, and both find their bytecode compiled, as
after a first use. A second prepared folder lists 100,000 files (hard links to the others; its
squares take no disk space), each of which is looked at when it is opened. Seconds are from the
start of the command to the line with the loss, or to the end of the import, medians over the
rounds; CPU seconds are the command's own, user and system, which other work on the machine disturbs
less. The last line of the output is the result as one JSON object, which also goes to
benchmarks/startup.json.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
from folders import draw_photographs, list_prepared
from measure import in_turns, options_of, publish

from abe.data.datasets import image_folder
from abe.data.prepare import INDEX, prepare

SIDE = 128  # data.resize of the recipe
CLASSES, PER_CLASS = 200, 25
COPIES = 20  # of the listed files


class Taken(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_seconds: float


def listed_folder(folder: Path, prepared: Path, root: Path) -> Path:
    """A prepared folder that lists `COPIES` times the files of `prepared`, all of them there."""
    index = pyarrow.parquet.read_table(prepared / INDEX)
    about = json.loads(index.schema.metadata[b"abe"])
    parts, names = [], []
    for copy in range(COPIES):
        paths = []
        for path in map(os.fsdecode, index["path"].to_pylist()):
            link = root / f"{copy:02} {Path(path).parent.name}" / Path(path).name
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
            paths.append(os.fsencode(link))
        labels = index["label"].to_numpy() + copy * len(about["class_names"])
        part = index.set_column(index.column_names.index("path"), "path", pa.array(paths))
        parts.append(part.set_column(part.column_names.index("label"), "label", pa.array(labels)))
        names += [f"{copy:02} {name}" for name in about["class_names"]]
    about |= {"class_names": names, "source": str(root)}
    return list_prepared(folder, pa.concat_tables(parts), about, SIDE)


def taken(command: list[str], environ: dict[str, str], until: str | None = None) -> Taken:
    """Start a command, and end it when it prints a line with `until`, if that is given."""
    started = time.perf_counter()
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        printed = []
        for line in process.stderr:
            printed.append(line)
            if until is not None and until in line:
                break
        seconds = time.perf_counter() - started
        if until is not None:
            os.kill(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if until is not None and until not in printed[-1]:
        sys.exit("".join(printed))
    return Taken(seconds, usage.ru_utime + usage.ru_stime)


def compare(folders: dict[str, Path], scratch: Path, rounds: int) -> dict[str, Any]:
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environ["PYTHONPYCACHEPREFIX"] = str(scratch / "bytecode")
    number = itertools.count()

    def first_loss(folder: Path) -> Taken:
        run = scratch / f"run {next(number)}"
        words = ["train", str(folder), "--run", str(run), "--device", "cpu"]
        command = [sys.executable, "-m", "abe.cli", *words]
        return taken(command, environ, "on the first batch")

    sides = {name: partial(first_loss, folder) for name, folder in folders.items()}
    alone = partial(taken, [sys.executable, "-c", "import torch"], environ)
    found = in_turns({"import torch": alone} | sides, rounds)  # warming up compiles the bytecode
    medians = {
        name: Taken(*(round(median(values), 3) for values in zip(*each, strict=True)))
        for name, each in found.items()
    }
    least = medians["import torch"]
    return {name: of._asdict() for name, of in medians.items()} | {
        "to_import_torch": {
            name: {
                "seconds": round(medians[name].seconds / least.seconds, 2),
                "cpu_seconds": round(medians[name].cpu_seconds / least.cpu_seconds, 2),
            }
            for name in folders
        }
    }


def main() -> None:
    options = options_of(__doc__, __file__, rounds=7).parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        size = (160, SIDE)
        photos = draw_photographs(
            scratch / "photos", CLASSES, PER_CLASS, size, grain=16, quality=85
        )
        prepared = scratch / "prepared"
        prepare(image_folder(photos), prepared, source=photos, side=SIDE)
        folders = {
            f"first loss, {CLASSES * PER_CLASS:,} images": prepared,
            f"first loss, {COPIES * CLASSES * PER_CLASS:,} images": listed_folder(
                scratch / "listed", prepared, scratch / "links"
            ),
        }
        compared = compare(folders, scratch, options.rounds)
    for name, ratios in compared["to_import_torch"].items():
        print(
            f"{name}: {ratios['seconds']} times import torch, {ratios['cpu_seconds']} in CPU time"
        )
    publish(options.output, {"rounds": options.rounds, **compared})


if __name__ == "__main__":
    main()
