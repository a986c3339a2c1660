"""What ranks send each other in a step, and what an evaluation takes of their memory.

    python benchmarks/scaling.py

Starts itself under torchrun as 1, 2 and 3 processes of this machine (gloo, one thread each). The
bytes of a step are those handed to real collectives, as torch's profiler saw them: what each rank
puts into its gradient buckets, its share of the embeddings, and the flag to stop. Images are of 32
pixels, of which nothing that is sent depends. Memory is the peak of a process (VmHWM) above what it
had before, while images are embedded by a stub and scored by Recall@1, which has to be the same for
any number of processes. The last line of the output is the result as one JSON object, which also
goes to benchmarks/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import options_of, peak_memory, publish
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from abe.config import Config
from abe.data.loader import CachedImages, training_batches
from abe.data.synthetic import SyntheticVehicles
from abe.data.transforms import Preprocessing
from abe.evaluate import embed_share
from abe.metrics import recall_at_k
from abe.model.ensemble import concat
from abe.ranks import Ranks, share
from abe.recipes import get_recipe
from abe.train import Trainer

SIZES = (1, 2, 3)
IMAGES = (20_000, 60_000)
SMALL = (
    "model.weights=googlenet-mini-imagenet-v2",
    "device=cpu",
    "precision=fp32",
    "data.resize=40",
    "data.crop=32",
    "data.synthetic_classes=80",
    "data.synthetic_images=4",
)


def settings() -> dict[str, Config]:
    return {name: get_recipe(name).with_overrides(SMALL) for name in ("demo", "paper")}


def step_bytes(config: Config, folder: Path) -> dict[str, Any]:
    """Bytes that this rank hands to the collectives of its second step."""
    trainer = Trainer(config, folder, Console(quiet=True))
    folder.mkdir(exist_ok=True)
    batches = training_batches(
        trainer.splits.train,
        trainer.sampler,
        trainer.preprocessing,
        seed=config.seed,
        start_step=0,
        stop_step=2,
        part=trainer.ranks.part,
    )
    for batch in batches:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            trainer.train_step(batch)
            trainer.ranks.any(False)
    found = {"parameters": sum(p.numel() for p in trainer.model.parameters())}
    for kind in ("all_reduce", "all_gather", "broadcast"):
        shapes = [e.input_shapes for e in profiled.events() if e.name == f"gloo:{kind}"]
        found[kind] = sum(4 * int(np.prod(shape)) for (shape,) in shapes)
        found[f"{kind}_calls"] = len(shapes)
    return found


def evaluation(count: int) -> dict[str, float]:
    """Recall@1 of `count` images of 8 x 64 numbers, and what it adds to this rank's peak."""
    ranks = Ranks("cpu")
    squares = np.zeros((1, 8, 8, 3), np.uint8)
    source = SyntheticVehicles(count // 10, 10, size=32)
    images = CachedImages(source, squares, np.zeros(count, np.int64))

    preprocessing = Preprocessing(resize=8, crop=8)
    recall = 0.0

    def scored(images: CachedImages) -> None:
        nonlocal recall
        first = share(-(-len(images) // 64), ranks.part).start * 64
        noise = torch.Generator()

        def embedder(batch: Tensor) -> Tensor:
            """Noise around a point for each class, the same for an image on any rank."""
            nonlocal first
            rows = range(first, first + len(batch))
            first = rows.stop
            found = [
                torch.randn(512, generator=noise.manual_seed(int(images.labels[row])))
                + 4 * torch.randn(512, generator=noise.manual_seed(count + row))
                for row in rows
            ]
            return F.normalize(torch.stack(found).view(-1, 8, 64), dim=2)

        own = embed_share(embedder, images, preprocessing, ranks, precision="fp32")
        recall = recall_at_k(concat(own), images.labels, [1], ranks=ranks)[1]

    scored(images.select(np.arange(640)))  # warms up
    taken = peak_memory(lambda: scored(images))
    return {"bytes": taken, "recall_at_1": recall}


def measure(what: str, folder: Path) -> None:
    """The program of one rank."""
    torch.set_num_threads(1)
    kind, _, value = what.partition(" ")
    if kind == "step":
        found = step_bytes(settings()[value], folder / "run")
    else:
        found = evaluation(int(value))
    rank = os.environ.get("RANK", "0")
    (folder / f"{rank}.json").write_text(json.dumps(found))


def on_ranks(size: int, what: str) -> list[dict[str, Any]]:
    """What each of `size` processes measures."""
    with tempfile.TemporaryDirectory() as folder:
        program = [__file__, "--measure", what, "--folder", folder]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command = [sys.executable, *(launcher if size > 1 else []), *program]
        quiet = {"stdout": subprocess.DEVNULL}
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    parser = options_of(__doc__, __file__)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, help="of evaluations")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.folder)
        return
    steps, evaluations = [], []
    for name, config in settings().items():
        for size in SIZES:
            first, *_ = on_ranks(size, f"step {name}")
            batch = {"batch_size": config.train.batch_size, "embedding": config.model.embedding_dim}
            steps.append({"recipe": name, "ranks": size, **batch, **first})
            print(json.dumps(steps[-1]), flush=True)
    for count in options.images:
        for size in SIZES:
            ranks = on_ranks(size, f"evaluation {count}")
            taken, recalls = ([rank[key] for rank in ranks] for key in ("bytes", "recall_at_1"))
            of_embeddings = round(max(taken) / (count * 512 * 4 / size), 2)
            found = {"images": count, "ranks": size, "recall_at_1": recalls[0], "bytes": taken}
            evaluations.append(found | {"most_to_own_embeddings": of_embeddings})
            print(json.dumps(evaluations[-1]), flush=True)
            if {*recalls, evaluations[-size]["recall_at_1"]} != {recalls[0]}:
                raise AssertionError(f"Recall@1 differs: {recalls}")
    publish(options.output, {"steps": steps, "evaluations": evaluations})


if __name__ == "__main__":
    main()
