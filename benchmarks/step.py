"""A training step of ABE-8 at 224 pixels, against the usual port and the machine's matrix product.

    python benchmarks/step.py [--only speed|memory] [--rounds N] [--memory-rounds N]

The port (`benchmarks/port.py`) has the same weights and gives the same loss and gradients, which is
checked; so has the port in channels-last memory, and that under bfloat16 autocast. A step is a
forward pass, Eq. 8 and its gradient. Each side has a process of its own, since ours keeps freed
memory as `abe train` does; they take turns, and times and their ratios are medians over the rounds.
The rate is the operations of the network's convolutions and linear layers, twice for the backward
pass, over the time; its share is of the rate of a product of two 4096 x 4096 matrices measured
beside it. What activation checkpointing and cached gradients cost and save is measured on a batch
of 64: time and memory, above what there was before, in processes of their own, which take turns.
The gradients must agree. The last line of the output is the result as one JSON object, which also
goes to benchmarks/step.json: a part of it after the other, so that a run that is cut off leaves
what it has found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import hardware, in_turns, options_of, peak_memory, rounded, save, take_turns
from port import UsualPort, usual_loss
from safetensors.torch import load_file, save_file
from torch import Tensor

from abe.chunks import backward_in_chunks, embed_in_chunks
from abe.losses import ensemble_loss
from abe.model.ensemble import AttentionEnsemble
from abe.model.summary import count_macs
from abe.model.weights import load_pretrained, read_weights
from abe.runtime import keep_freed_memory

SIDE = 4096  # of the matrices
MODES = ("plain", "checkpointed", "chunks of 16", "chunks of 8")


def network() -> AttentionEnsemble:
    torch.manual_seed(0)
    model = AttentionEnsemble()
    load_pretrained(model.backbone_parts(), read_weights("googlenet-mini-imagenet-v2"))
    return model


def photographs(count: int, side: int = 224) -> tuple[Tensor, Tensor]:
    """Noise, which costs what photographs do; two images of each class."""
    images = 50 * torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(count // 2).repeat_interleave(2)


class Side(NamedTuple):
    """What takes steps, and how."""

    port: bool
    channels_last: bool
    bf16: bool = False


SIDES = {
    "ours": Side(port=False, channels_last=True),
    "port": Side(port=True, channels_last=False),
    "port_channels_last": Side(port=True, channels_last=True),
    "ours_bf16": Side(port=False, channels_last=True, bf16=True),
    "port_bf16": Side(port=True, channels_last=True, bf16=True),
}
TOLERANCE = {False: 1e-3, True: 0.02}  # of the loss, with bf16


def step(
    model: AttentionEnsemble,
    images: Tensor,
    labels: Tensor,
    mode: str = "plain",
    bf16: bool = False,
) -> Tensor:
    """The gradient of Eq. 8, into the parameters; -> the loss."""
    model.zero_grad()
    model.activation_checkpointing = mode == "checkpointed"
    if mode.startswith("chunks of "):
        size = int(mode.removeprefix("chunks of "))
        embeddings = embed_in_chunks(model, images, size).requires_grad_()
        loss = ensemble_loss(embeddings, labels).total
        loss.backward()
        assert embeddings.grad is not None
        backward_in_chunks(model, images, embeddings.grad, size)
    else:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            embeddings = model(images)
        loss = ensemble_loss(embeddings, labels).total
        loss.backward()
    return loss.detach()


def usual_step(port: UsualPort, images: Tensor, labels: Tensor, bf16: bool) -> Tensor:
    """The same by the port."""
    port.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        learners = port(images)
    loss = usual_loss([embeddings.float() for embeddings in learners], labels)
    loss.backward()
    return loss.detach()


def prepared(name: str, batch: int) -> Callable[[], Any]:
    """What a side does in a turn; it gives the loss, and gradients of the first and last layer."""
    if name == "sgemm":
        left, right = torch.randn(2, SIDE, SIDE)
        return lambda: (left @ right).sum().item()
    side = SIDES[name]
    model = network()
    images, labels = photographs(batch)
    layout = torch.channels_last if side.channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    take: Callable[[], Tensor]
    if side.port:
        port = UsualPort(model).to(memory_format=layout)
        take = partial(usual_step, port, images, labels, side.bf16)
        layers = port.spatial.conv1, port.embedding.linear
    else:
        keep_freed_memory()
        take = partial(step, model, images, labels, bf16=side.bf16)
        layers = model.spatial[0].conv1, model.embedding[0].linear
    weights = [next(layer.parameters()) for layer in layers]
    return lambda: [part.numpy() for part in (take(), *(weight.grad for weight in weights))]


def _prepare(name: str, batch: int) -> None:
    global _turn
    _turn = prepared(name, batch)


def _timed_turn() -> tuple[float, Any]:
    started = time.perf_counter()
    found = _turn()
    return time.perf_counter() - started, found


def compare_with_port(batch: int, rounds: int) -> dict[str, Any]:
    """Each side in a process of its own, as its users have it; they take turns."""
    names = [name for name, side in SIDES.items() if not side.bf16]
    if torch.cpu.get_capabilities().get("avx512_bf16"):  # or it is emulated, in minutes
        names = list(SIDES)
    with contextlib.ExitStack() as stack:

        def turns_of(name: str) -> Callable[[], tuple[float, Any]]:
            pool = ProcessPoolExecutor(1, get_context("spawn"), _prepare, (name, batch))
            stack.enter_context(pool)
            return lambda: pool.submit(_timed_turn).result()

        found = in_turns({name: turns_of(name) for name in [*names, "sgemm"]}, rounds)

    loss, *gradients = found["ours"][0][1]
    for name in names:
        other, *others = found[name][0][1]
        np.testing.assert_allclose(other, loss, rtol=TOLERANCE[SIDES[name].bf16], err_msg=name)
        for own, theirs in zip(gradients, others, strict=True):
            apart = np.linalg.norm(theirs - own) / np.linalg.norm(own)
            assert SIDES[name].bf16 or apart < 0.01, f"{name}: another gradient"
    times = {name: np.array([one for one, _ in turns]) for name, turns in found.items()}
    seconds = {name: float(np.median(taken)) for name, taken in times.items()}
    gflop = 3 * 2 * count_macs(network()) * batch / 1e9
    sgemm = 2 * SIDE**3 / 1e9 / seconds["sgemm"]
    result: dict[str, Any] = {"batch": batch, "rounds": rounds, "sgemm_gflops": sgemm}
    for name in names:
        rate = gflop / seconds[name]
        result[name] = {
            "seconds": seconds[name],
            "gflops": rate,
            "share_of_sgemm": rate / sgemm,
            "of_ports_time": float(np.median(times[name] / times["port"])),  # in the same round
        }
    return rounded(result)


def compare_memory(batch: int, rounds: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Each mode's step in processes of its own; what is found so far is kept after each of them."""
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    gradients: dict[str, Tensor] = {}

    def measure(mode: str, file: Path) -> None:
        command = [sys.executable, __file__, "--mode", mode, "--batch", str(batch)]
        command += ["--gradient", str(file)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[mode].append(json.loads(done.stdout))
        gradients[mode] = load_file(file)["gradient"]
        keep(rounded({"batch": batch, "rounds": rounds, **summary()}))

    def summary() -> dict[str, dict[str, float]]:
        taken = {
            mode: {key: median(each[key] for each in runs) for key in ("peak_mb", "seconds")}
            for mode, runs in found.items()
            if runs
        }
        plain = gradients["plain"]
        for mode, one in taken.items():
            one["of_plain_memory"] = one["peak_mb"] / taken["plain"]["peak_mb"]
            one["of_plain_time"] = one["seconds"] / taken["plain"]["seconds"]
            difference = ((gradients[mode] - plain).norm() / plain.norm()).item()
            assert difference < 1e-3, f"{mode}: another gradient"
            one["gradient_difference"] = difference
        return taken

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gradient.safetensors"
        sides = {mode: partial(measure, mode, file) for mode in MODES}
        in_turns(sides, rounds, warm_up=False)


def measured_step(mode: str, batch: int, file: Path) -> dict[str, float]:
    """Seconds of a step, and megabytes above what there was before, after one on two images."""
    keep_freed_memory()
    model = network()
    images, labels = photographs(batch)
    images = images.contiguous(memory_format=torch.channels_last)
    step(model, images[:2], labels[:2], mode)  # imports what it needs
    model.zero_grad()
    sides = {mode: lambda: step(model, images, labels, mode)}
    seconds: dict[str, float] = {}
    taken = peak_memory(lambda: seconds.update(take_turns(sides, 1, warm_up=False)))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    save_file({"gradient": gradient}, file)
    return {"peak_mb": taken / 1e6, "seconds": seconds[mode]}


def save_part(output: Path, name: str, part: dict[str, Any]) -> dict[str, Any]:
    """Write a part into the file; one that another run has left there keeps its hardware."""
    parts = json.loads(output.read_text()) if output.exists() else {}
    now, before = hardware(), parts.pop("hardware", None)
    for other in parts.values():
        said = other.pop("hardware", before)
        if said != now:
            other["hardware"] = said
    return save(output, {**parts, name: part})


def main() -> None:
    parser = options_of(__doc__, __file__, rounds=5)
    parser.add_argument("--memory-rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--only", choices=("speed", "memory"), help="measure one of the parts")
    parser.add_argument("--speed-batch", type=int, default=8, help="beside the port")
    parser.add_argument("--batch", type=int, default=64, help="for checkpointing and chunks")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measured_step(options.mode, options.batch, options.gradient)))
        return
    if options.only != "memory":
        speed = compare_with_port(options.speed_batch, options.rounds)
        save_part(options.output, "speed", speed)
        print(json.dumps(speed, indent=2), flush=True)
    if options.only != "speed":

        def keep(memory: dict[str, Any]) -> None:
            save_part(options.output, "memory", memory)
            print(json.dumps(memory, indent=2), flush=True)

        compare_memory(options.batch, options.memory_rounds, keep)
    print(json.dumps(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
