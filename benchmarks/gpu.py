"""A training step of ABE-8 on a GPU, against the usual port and the machine's matrix product.

    python benchmarks/gpu.py [--batch 64] [--crop 224] [--rounds N] [--device cuda] [--compiled]

The sides are those of `benchmarks/step.py`, with all images on the device: the port in float32
(without TF32) and under bfloat16 autocast, ours with TF32 and under autocast, and, at the cost of a
minute or more, ours compiled. A step is a forward pass, Eq. 8 and its gradient; the losses have to
agree. The sides take turns, and times are medians. The rate is that of the network's convolutions
and linear layers, its share of that of a bfloat16 product of two 8192 x 8192 matrices. `--device
cpu` tries it for who has a GPU for minutes only, with --batch 4 --crop 64. The last line of the
output is the result as one JSON object, which also goes to benchmarks/gpu.json.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from measure import hardware, options_of, publish, rounded, take_turns
from port import UsualPort
from step import TOLERANCE, network, photographs, step, usual_step
from torch import Tensor

from abe.model.summary import count_macs

SIDE = 8192  # of the matrices
REFERENCE = "port_fp32"
SIDES = (REFERENCE, "port_bf16", "port_channels_last_bf16", "ours_tf32", "ours_bf16")
COMPILED = "ours_bf16_compiled"


def sides(
    device: torch.device, batch: int, crop: int, names: Collection[str]
) -> dict[str, Callable[[], Tensor]]:
    """What each side does in a turn; it gives the loss."""
    model = network().to(device)
    pixels, labels = (part.to(device) for part in photographs(batch, crop))
    images = pixels.contiguous(memory_format=torch.channels_last)
    ours = partial(step, images=images, labels=labels, bf16=True)

    def port(**memory: torch.memory_format) -> UsualPort:
        return UsualPort(model).to(device, **memory)

    makers = {
        REFERENCE: lambda: partial(usual_step, port(), pixels, labels, False),
        "port_bf16": lambda: partial(usual_step, port(), pixels, labels, True),
        "port_channels_last_bf16": lambda: partial(
            usual_step, port(memory_format=torch.channels_last), images, labels, True
        ),
        "ours_tf32": lambda: partial(in_tf32, partial(step, model, images, labels)),
        "ours_bf16": lambda: partial(ours, model),
        COMPILED: lambda: partial(ours, torch.compile(network().to(device))),
    }
    return {name: makers[name]() for name in names}


def in_tf32(turn: Callable[[], Tensor]) -> Tensor:
    """With the convolutions that PyTorch takes for float32 on a GPU, unless one says otherwise."""
    torch.backends.cudnn.allow_tf32 = True
    try:
        return turn()
    finally:
        torch.backends.cudnn.allow_tf32 = False


def main() -> None:
    parser = options_of(__doc__, __file__, rounds=10)
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--crop", type=int, default=224, help="default: %(default)s")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--compiled", action="store_true", help="ours by torch.compile as well")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # inception blocks are one function of many shapes

    names = [*SIDES, *[COMPILED] * options.compiled]
    found = sides(device, options.batch, options.crop, names)
    side = SIDE if on_gpu else 512
    left, right = torch.randn(2, side, side, device=device).bfloat16()

    def waited(turn: Callable[[], Tensor]) -> Callable[[], float]:
        return lambda: turn().flatten()[0].item()  # which waits for the device

    losses = {name: waited(turn)() for name, turn in found.items()}
    for name, loss in losses.items():
        apart = abs(loss - losses[REFERENCE]) / losses[REFERENCE]
        assert apart < TOLERANCE[True], f"{name}: {loss}, not {losses[REFERENCE]}"
    timed = {**found, "product": lambda: left @ right}
    seconds = take_turns({name: waited(turn) for name, turn in timed.items()}, options.rounds)
    rate = 2 * side**3 / 1e12 / seconds.pop("product")
    tera = 3 * 2 * count_macs(network(), options.crop) * options.batch / 1e12
    result: dict[str, Any] = {
        "hardware": hardware(device),
        "batch": options.batch,
        "crop": options.crop,
        "rounds": options.rounds,
        "bf16_product_side": side,
        "bf16_product_tflops": rate,
    }
    for name, taken in seconds.items():
        result[name] = {
            "seconds": taken,
            "images_per_second": options.batch / taken,
            "tflops": tera / taken,
            "share_of_product": tera / taken / rate,
            "of_port_fp32": taken / seconds[REFERENCE],
            "of_port_bf16": taken / seconds["port_bf16"],
            "loss": losses[name],
        }
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found[name]()
            torch.cuda.synchronize()
            result[name]["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    publish(options.output, rounded(result))


if __name__ == "__main__":
    main()
