"""Recall@K of as many embeddings as Stanford Online Products has, against one product of them.

    python benchmarks/recall.py [--images N] [--rounds R]

60,502 unit vectors of size 512 in 11,316 seeded clusters, K in {1, 10, 100, 1000}. In this process
and with its number of threads `recall_at_k` takes turns with one product of the matrix with its
transpose, in blocks that are thrown away; where the processor multiplies bfloat16 in tiles, also as
on a processor that does not ("float32"). Then, `--others` times each, what one does else: blocks of
products and `torch.topk`, faiss, and pytorch-metric-learning, which knows
K = 1 alone. Figures are medians. Peak memory above the embeddings is that of a process of its own.

All sides must agree: ranks of some queries with a float64 sort of all distances; `recall_at_k` with
itself in float32, exactly; and others' recall with ours but for the queries that float32 leaves
open (`undecided`), which are all that rounding and rules for ties can tell apart. The last line of
the output is the result as one JSON object, which also goes to benchmarks/recall.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from unittest import mock

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from measure import in_turns, options_of, peak_memory, publish
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor

from abe.metrics import recall_at_k
from abe.ranking import match_ranks

KS = (1, 10, 100, 1000)
IMAGES, CLASSES, SIZE = 60_502, 11_316, 512
Side = Callable[[Tensor, Tensor], dict[int, float] | None]


def clusters(images: int) -> tuple[Tensor, Tensor]:
    """Unit vectors and labels; classes of 2 to 12, some images far from their centre."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.full((round(images * CLASSES / IMAGES),), 2)
    while (missing := images - int(sizes.sum())) > 0:
        room = (sizes < 12).nonzero().flatten()
        more = room[torch.randint(len(room), (min(missing, len(room)),), generator=generator)]
        sizes[more.unique()] += 1
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)
    labels = labels[torch.randperm(images, generator=generator)]
    spectrum = torch.arange(1, SIZE + 1).rsqrt()
    centres = torch.randn(len(sizes), SIZE, generator=generator) * spectrum
    noise = torch.randn(images, SIZE, generator=generator) * spectrum
    spread = torch.randn(images, 1, generator=generator).mul(0.5).exp()
    return F.normalize(centres[labels] + spread * noise, dim=1), labels


def product(embeddings: Tensor, block: int = 2048) -> None:
    out = embeddings.new_empty(block, block)
    for rows in embeddings.split(block):
        for columns in embeddings.split(block):
            torch.mm(rows, columns.mT, out=out[: len(rows), : len(columns)])


def hits(neighbours: Tensor, labels: Tensor) -> dict[int, float]:
    matches = labels[neighbours] == labels[:, None]
    return {k: matches[:, :k].any(1).double().mean().item() for k in KS}


def by_topk(embeddings: Tensor, labels: Tensor) -> dict[int, float]:
    neighbours = []
    for first in range(0, len(embeddings), 512):
        scores = embeddings[first : first + 512] @ embeddings.mT
        scores.diagonal(first).fill_(-torch.inf)
        neighbours.append(scores.topk(max(KS)).indices)
    return hits(torch.cat(neighbours), labels)


def by_faiss(embeddings: Tensor, labels: Tensor) -> dict[int, float]:
    index = faiss.IndexFlatIP(SIZE)
    index.add(embeddings.numpy())
    neighbours = torch.from_numpy(index.search(embeddings.numpy(), max(KS) + 1)[1])
    itself = neighbours == torch.arange(len(labels))[:, None]
    itself[~itself.any(1), -1] = True  # behind more duplicates than were asked for
    return hits(neighbours[~itself].view(len(labels), -1), labels)


def by_pytorch_metric_learning(embeddings: Tensor, labels: Tensor) -> dict[int, float]:
    calculator = AccuracyCalculator(
        include=("precision_at_1",), k=1, device=torch.device("cpu"), kmeans_func=lambda *_: None
    )
    return {1: calculator.get_accuracy(embeddings, labels)["precision_at_1"]}


def without_amx(embeddings: Tensor, labels: Tensor) -> dict[int, float]:
    with mock.patch("torch.cpu.get_capabilities", dict):
        return recall_at_k(embeddings, labels, KS)


def check(embeddings: Tensor, labels: Tensor, queries: int) -> int:
    """How many queries' ranks are compared with a float64 sort of all distances."""
    ranks = match_ranks(embeddings, labels, None, labels, max(KS))
    some = torch.linspace(0, len(labels) - 1, queries).long()
    for i in some.tolist():
        order = (embeddings - embeddings[i].double()).square().sum(1).argsort(stable=True)
        order = order[order != i]
        rank = int((labels[order] == labels[i]).nonzero()[0])
        if ranks[i] != min(rank, max(KS)):
            raise AssertionError(f"query {i}: rank {int(ranks[i])}, but {rank} by definition")
    return len(some)


def peak(file: str) -> None:
    """Print the bytes that `recall_at_k` adds to what this process holds."""
    loaded = np.load(file)
    embeddings, labels = torch.from_numpy(loaded["embeddings"]), loaded["labels"]
    print(peak_memory(lambda: recall_at_k(embeddings, labels, KS)))


def undecided(embeddings: Tensor, labels: Tensor) -> dict[int, float]:
    """For each K the share of queries of which products in float32 may not tell the hit at K.

    In whatever order the product of two unit vectors is summed, it is off by SIZE / 2^24 at most,
    and so are squared lengths. A comparison of two products or distances is off by four times that,
    and those of this function by two.
    """
    margin = 6 * SIZE / 2**24
    surely, perhaps = [], []  # how many stand before the nearest match
    for first in range(0, len(labels), 512):
        scores = embeddings[first : first + 512] @ embeddings.mT
        scores.diagonal(first).fill_(-torch.inf)
        same = labels[first : first + 512, None] == labels
        nearest = scores.where(same, -torch.inf).amax(1, keepdim=True)
        scores.masked_fill_(same, -torch.inf)
        surely.append((scores > nearest + margin).sum(1))
        perhaps.append((scores >= nearest - margin).sum(1))
    least, most = torch.cat(surely), torch.cat(perhaps)
    return {k: ((least < k) & (k <= most)).double().mean().item() for k in KS}


def assert_agreement(recall: dict[str, dict[int, float]], allowed: dict[int, float]) -> None:
    ours = recall["recall_at_k"]
    for name, theirs in recall.items():
        for k, value in theirs.items():
            tolerance = 0.0 if name.startswith("recall_at_k") else allowed[k] + 1e-12
            if abs(value - ours[k]) > tolerance:
                raise AssertionError(f"{name} has Recall@{k} = {value}, recall_at_k {ours[k]}")


def measured_peak(embeddings: Tensor, labels: Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/embeddings.npz"
        np.savez(file, embeddings=embeddings.numpy(), labels=labels.numpy())
        command = [sys.executable, __file__, "--peak-of", file]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = options_of(__doc__, __file__, rounds=5)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--others", type=int, default=1, help="rounds of everything else")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        peak(options.peak_of)
        return
    embeddings, labels = clusters(options.images)
    turns: dict[str, Side] = {
        "product": lambda embeddings, labels: product(embeddings),
        "recall_at_k": lambda embeddings, labels: recall_at_k(embeddings, labels, KS),
    }
    if torch.cpu.get_capabilities().get("amx_bf16"):
        turns["recall_at_k, float32"] = without_amx
    others: dict[str, Side] = {
        "torch.topk": by_topk,
        "faiss": by_faiss,
        "pytorch-metric-learning, K = 1": by_pytorch_metric_learning,
    }
    recall: dict[str, dict[int, float]] = {}

    def run(name: str, side: Side) -> float:
        started = time.perf_counter()
        found = side(embeddings, labels)
        seconds = time.perf_counter() - started
        if found is not None:
            recall[name] = found
        print(f"{name}: {seconds:.1f} s", flush=True)
        return seconds

    def runs(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
        return in_turns(
            {name: partial(run, name, sides[name]) for name in sides}, rounds, warm_up=False
        )

    for side in turns.values():
        side(*clusters(min(options.images, 4096)))  # warms up
    seconds = runs(turns, options.rounds) | runs(others, options.others)
    medians = {name: median(values) for name, values in seconds.items() if values}
    open_queries = undecided(embeddings, labels)
    assert_agreement(recall, open_queries)
    result = {
        "images": len(embeddings),
        "classes": len(labels.unique()),
        "size": SIZE,
        "rounds": {name: len(values) for name, values in seconds.items()},
        "seconds": {name: round(value, 2) for name, value in medians.items()},
        "recall_at_k_to": {
            name: round(medians["recall_at_k"] / value, 3)
            for name, value in medians.items()
            if name != "recall_at_k"
        },
        "to_product": {
            name: round(value / medians["product"], 3)
            for name, value in medians.items()
            if name != "product"
        },
        "peak_megabytes_above_embeddings": round(measured_peak(embeddings, labels) / 1e6),
        "ranks_equal_to_float64_sort": check(embeddings, labels, 200),
        "recall": recall,
        "undecided_in_float32": open_queries,
    }
    publish(options.output, result)


if __name__ == "__main__":
    main()
