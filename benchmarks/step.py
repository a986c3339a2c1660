"""A training step of ABE-8 at 224 pixels, against the usual port and the machine's matrix product.

    python benchmarks/step.py [--rounds N] [--memory-rounds N]

The port (`benchmarks/port.py`) has the same weights and gives the same loss and gradients, which is
checked first. A step is a forward pass, Eq. 8 and its gradient. The sides take turns in this
process; times are medians over the rounds. The rate is the operations of the network's convolutions
and linear layers, twice for the backward pass, over the time; its share is of the rate of a product
of two 4096 x 4096 matrices measured beside it. What activation checkpointing and cached gradients
cost and save is measured on a batch of 64: time in this process, memory each in a process of its
own, above what it held before the step. The last line of the output is the result as one JSON
object, which also goes to benchmarks/step.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from measure import peak_memory, publish, rounded, take_turns
from port import UsualPort, usual_loss
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

    def usual() -> Tensor:
        port.zero_grad()
        loss = usual_loss(port(images), labels)
        loss.backward()
        return loss.detach()

    def in_bf16() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = model(channels_last)
        loss = ensemble_loss(embeddings, labels).total
        loss.backward()
        return loss.detach()

    torch.testing.assert_close(step(model, channels_last, labels), usual(), rtol=1e-3, atol=0)
    for ours, theirs in (
        (model.spatial[0].conv1, port.spatial.conv1),
        (model.embedding[0].linear, port.embedding.linear),
    ):
        ours, theirs = next(ours.parameters()).grad, next(theirs.parameters()).grad
        assert (ours - theirs).norm() < 0.01 * theirs.norm()

    matrices = torch.randn(2, SIDE, SIDE)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: step(model, channels_last, labels),
        "port": usual,
        "ours_bf16": in_bf16,
        "sgemm": lambda: matrices[0] @ matrices[1],
    }
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        del sides["ours_bf16"]
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


def compare_memory(batch: int, rounds: int) -> dict[str, Any]:
    model = network()
    images, labels = photographs(batch)
    images = images.contiguous(memory_format=torch.channels_last)

    gradients = {}
    for mode in MODES:
        step(model, images, labels, mode)
        gradients[mode] = torch.cat([p.grad.flatten() for p in model.parameters()])
    sides = {mode: lambda mode=mode: step(model, images, labels, mode) for mode in MODES}
    seconds = take_turns(sides, rounds)
    plain = gradients["plain"]
    result: dict[str, Any] = {"batch": batch, "rounds": rounds}
    for mode in MODES:
        command = [sys.executable, __file__, "--peak", mode, "--batch", str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result[mode] = {
            "peak_mb": json.loads(done.stdout),
            "seconds": seconds[mode],
            "of_plain_time": seconds[mode] / seconds["plain"],
            "gradient_difference": ((gradients[mode] - plain).norm() / plain.norm()).item(),
        }
        result[mode]["of_plain_memory"] = result[mode]["peak_mb"] / result["plain"]["peak_mb"]
    return rounded(result)


def peak(mode: str, batch: int) -> float:
    """Megabytes that a step takes above what there was before."""
    model = network()
    images, labels = photographs(batch)
    images = images.contiguous(memory_format=torch.channels_last)
    before = peak_memory()
    step(model, images, labels, mode)
    return peak_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="for checkpointing and chunks")
    parser.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.peak, options.batch)))
        return
    speed = compare_with_port(8, options.rounds)
    print(json.dumps(speed, indent=2), flush=True)
    memory = compare_memory(options.batch, options.memory_rounds)
    publish("step", {"speed": speed, "memory": memory})


if __name__ == "__main__":
    main()
