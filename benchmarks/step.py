"""A training step of ABE-8 at 224 pixels, against the usual port and the machine's matrix product.

    python benchmarks/step.py [--only speed|memory] [--rounds N] [--memory-rounds N]

The port (`benchmarks/port.py`) has the same weights and gives the same loss and gradients, which is
checked first; so has the port in channels-last memory, and that under bfloat16 autocast. A step is
a forward pass, Eq. 8 and its gradient. The sides take turns in this process; times are medians over
the rounds. The rate is the operations of the network's convolutions and linear layers, twice for
the backward pass, over the time; its share is of the rate of a product of two 4096 x 4096 matrices
measured beside it. What activation checkpointing and cached gradients cost and save is measured on
a batch of 64: time and memory, above what there was before, in processes of their own, which
take turns. The gradients must agree. The last line of the output is the result as one JSON object,
which also goes to benchmarks/step.json: a part of it after the other, so that a run that is cut off
leaves what it has found.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

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

SIDE = 4096  # of the matrices
MODES = ("plain", "checkpointed", "chunks of 16", "chunks of 8")


def network() -> AttentionEnsemble:
    torch.manual_seed(0)
    model = AttentionEnsemble()
    load_pretrained(model.backbone_parts(), read_weights("googlenet-mini-imagenet"))
    return model


def photographs(count: int) -> tuple[Tensor, Tensor]:
    """Noise, which costs what photographs do; two images of each class."""
    images = 50 * torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(count // 2).repeat_interleave(2)


def step(model: AttentionEnsemble, images: Tensor, labels: Tensor, mode: str = "plain") -> Tensor:
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
        loss = ensemble_loss(model(images), labels).total
        loss.backward()
    return loss.detach()


def compare_with_port(batch: int, rounds: int) -> dict[str, Any]:
    model = network()
    port = UsualPort(model)
    images, labels = photographs(batch)
    channels_last = images.contiguous(memory_format=torch.channels_last)

    other_port = copy.deepcopy(port).to(memory_format=torch.channels_last)

    def usual(port: UsualPort, images: Tensor, autocast: bool = False) -> Tensor:
        port.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            learners = port(images)
        loss = usual_loss([embeddings.float() for embeddings in learners], labels)
        loss.backward()
        return loss.detach()

    def in_bf16() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = model(channels_last)
        loss = ensemble_loss(embeddings, labels).total
        loss.backward()
        return loss.detach()

    assert_close = torch.testing.assert_close
    loss = step(model, channels_last, labels)
    assert_close(loss, usual(port, images), rtol=1e-3, atol=0)
    assert_close(loss, usual(other_port, channels_last), rtol=1e-3, atol=0)
    for each in (port, other_port):
        for ours, theirs in (
            (model.spatial[0].conv1, each.spatial.conv1),
            (model.embedding[0].linear, each.embedding.linear),
        ):
            ours, theirs = next(ours.parameters()).grad, next(theirs.parameters()).grad
            assert (ours - theirs).norm() < 0.01 * theirs.norm()
    in_bfloat16 = {
        "ours_bf16": in_bf16,
        "port_bf16": lambda: usual(other_port, channels_last, True),
    }
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        in_bfloat16 = {}  # is emulated, in minutes
    for side in in_bfloat16.values():
        assert_close(side(), loss, rtol=0.02, atol=0)

    matrices = torch.randn(2, SIDE, SIDE)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: step(model, channels_last, labels),
        "port": lambda: usual(port, images),
        "port_channels_last": lambda: usual(other_port, channels_last),
        "sgemm": lambda: matrices[0] @ matrices[1],
        **in_bfloat16,
    }
    seconds = take_turns(sides, rounds)
    gflop = 3 * 2 * count_macs(model) * batch / 1e9
    sgemm = 2 * SIDE**3 / 1e9 / seconds["sgemm"]
    result = {"batch": batch, "rounds": rounds, "sgemm_gflops": sgemm}
    for name in sides:
        if name != "sgemm":
            rate = gflop / seconds[name]
            result[name] = {
                "seconds": seconds[name],
                "gflops": rate,
                "share_of_sgemm": rate / sgemm,
                "of_ports_time": seconds[name] / seconds["port"],
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
