"""Write docs/performance.md from the benchmarks' JSON files: `python benchmarks/performance.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "performance.md"

EVALUATED = 512  # numbers an image, in scaling.py
MODELLED_STEPS = ((1, 1, 64), (1, 2, 64), (1, 8, 512), (2, 16, 512), (8, 64, 512), (8, 64, 4096))

HEAD = """# Performance

Each section is one command that measured all its sides on one machine; the ratios are what carries
over to another. The last line of its output is the file that the section is taken from. `python
benchmarks/performance.py` writes this page from those files; a test fails when it is stale.
"""


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def table(heading: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    heading = list(heading)
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def machine(name: str, hardware: dict[str, Any]) -> str:
    gpu = f"{hardware['gpu']} beside " if hardware.get("gpu") else ""
    return (
        f"`benchmarks/{name}.py`, {gpu}{hardware['cpu']}, {hardware['threads']} of "
        f"{hardware['cores']} cores, torch {hardware['torch']}, commit {hardware['commit']}\n"
    )


def section(title: str, name: str, result: dict[str, Any], *parts: str) -> str:
    return "\n".join([f"## {title}\n", machine(name, result["hardware"]), *parts])


def recall() -> str:
    result = read("recall")
    rows = [
        (name, f"{result['seconds'][name]:.3g} s", f"{ratio:.2f}")
        for name, ratio in result["to_product"].items()
    ]
    text = (
        f"{result['images']:,} embeddings of {result['size']} numbers, K = 1, 10, 100 and 1000 at "
        f"once; {result['ranks_equal_to_float64_sort']} queries' ranks equal a float64 sort. "
        f"Memory above the embeddings: {result['peak_megabytes_above_embeddings']:,} MB. The "
        "product is float32, in blocks, of all pairs; `recall_at_k` multiplies each pair once, and "
        "in bfloat16 where the processor has tiles of it (AMX): float64 decides what that leaves "
        "open. What others offer was run once each.\n"
    )
    heading = ("", "time", "of one product of the matrix with itself")
    return section("Recall@K", "recall", result, text, table(heading, rows))


def step() -> str:
    """What of the two parts is there, each with the hardware that it is from."""
    result = read("step")
    parts = []
    for name, show in (("speed", step_speed), ("memory", step_memory)):
        if part := result.get(name):
            parts += [machine("step", part["hardware"])] if "hardware" in part else []
            parts += show(part)
    return section("Training step", "step", result, *parts)


def step_speed(speed: dict[str, Any]) -> list[str]:
    names = {
        "ours": "ours, float32",
        "ours_bf16": "ours, bfloat16",
        "port": "the usual port",
        "port_channels_last": "the port, channels last",
        "port_bf16": "the port, channels last, bfloat16",
    }
    rows = [
        (
            title,
            f"{speed[key]['seconds']:.3g} s",
            f"{speed[key]['of_ports_time']:.2f}",
            f"{speed[key]['gflops']:.0f}",
            f"{100 * speed[key]['share_of_sgemm']:.0f} %",
        )
        for key, title in names.items()
        if key in speed
    ]
    return [
        f"ABE-8 at 224 pixels, batch {speed['batch']}: forward pass, Eq. 8 and its gradient. "
        f"float32 matrix product beside it: {speed['sgemm_gflops']:.0f} GFLOP/s.\n",
        table(("", "time", "of the port's", "GFLOP/s", "of the product's rate"), rows),
        "The port has the learners one by one, NCHW, the framework's layers, and losses in loops "
        "(`benchmarks/port.py`); port and product are float32"
        + (", but for the port's last row.\n" if "port_bf16" in speed else ".\n"),
    ]


def step_memory(memory: dict[str, Any]) -> list[str]:
    rows = [
        (
            mode,
            f"{found['peak_mb']:,.0f} MB",
            f"{100 * found['of_plain_memory']:.0f} %",
            f"{found['of_plain_time']:.2f}",
        )
        for mode, found in memory.items()
        if isinstance(found, dict) and "peak_mb" in found
    ]
    return [
        f"Batch {memory['batch']}, with activation checkpointing (`train.activation_checkpointing`)"
        " and with cached gradients (`train.chunk_size`); the gradient is the same.\n",
        table(("", "memory above the start", "of the plain step's", "time to it"), rows),
    ]


def gpu() -> str:
    result = read("gpu")
    names = {
        "ours_bf16_compiled": "ours, bfloat16, compiled",
        "ours_bf16": "ours, bfloat16",
        "ours_tf32": "ours, float32 with TF32",
        "port_bf16": "the usual port, bfloat16",
        "port_channels_last_bf16": "the port, channels last, bfloat16",
        "port_fp32": "the port, float32 without TF32",
    }
    rows = [
        (
            title,
            f"{1000 * found['seconds']:.3g} ms",
            f"{found['of_port_bf16']:.2f}",
            f"{found['tflops']:.0f}",
            f"{100 * found['share_of_product']:.0f} %",
            f"{found['peak_mb'] / 1000:.1f} GB",
        )
        for name, title in names.items()
        if (found := result.get(name))
    ]
    text = (
        f"ABE-8 at {result['crop']} pixels, batch {result['batch']}, images on the GPU: forward "
        f"pass, Eq. 8 and its gradient. Product of two bfloat16 matrices of "
        f"{result['bf16_product_side']:,} rows: {result['bf16_product_tflops']:.0f} TFLOP/s. "
        "Memory is what a step takes above network and images.\n"
    )
    heading = (
        "",
        "time",
        "of the port's in bfloat16",
        "TFLOP/s",
        "of the product's rate",
        "memory",
    )
    return section("Training step on a GPU", "gpu", result, text, table(heading, rows))


def losses() -> str:
    result = read("losses")
    rows = [
        (
            batch,
            f"{found['ms']:.3g} ms",
            f"{found['ratio']:.2f}",
            f"{found['with_divergence_ratio']:.2f}",
        )
        for batch, found in result["batches"].items()
    ]
    return section(
        "Losses",
        "losses",
        result,
        f"Eq. 10 and its gradient for {result['learners']} learners of {result['dim']} numbers.\n",
        table(
            ("batch", "time", "of pytorch-metric-learning's", "with Eq. 9, which it has not"), rows
        ),
    )


def startup() -> str:
    result = read("startup")
    text = (
        "From the command to the first loss, on prepared images, recipe `photographs`; to "
        f"`import torch`, which takes {result['import torch']['seconds']:.2g} s here.\n"
    )
    ratios = result["to_import_torch"].items()
    rows = [
        (name, *(f"{to[key]:.2f}" for key in ("seconds", "cpu_seconds"))) for name, to in ratios
    ]
    return section("Start", "startup", result, text, table(("", "time", "processor's time"), rows))


def loader() -> str:
    result = read("loader")
    rates = result["loaders"]["images_per_second"]
    rows = [(name, f"{rate:,}", f"{rates['prepared'] / rate:.1f}") for name, rate in rates.items()]
    heading = ("", "images a second", "prepared to it")
    return section("Reading images", "loader", result, table(heading, rows))


def ranks() -> str:
    result = read("scaling")
    sent = [
        (x["recipe"], x["ranks"], f"{x['all_reduce']:,}", f"{x['all_gather']:,}")
        for x in result["steps"]
    ]
    held = [
        (
            f"{x['images']:,}",
            x["ranks"],
            ", ".join(f"{size / 1e6:.0f}" for size in x["bytes"]),
            f"{max(x['bytes']) / (x['images'] * 4 * EVALUATED / x['ranks']):.1f}",
        )
        for x in result["evaluations"]
    ]
    (paper,) = (x for x in result["steps"] if (x["recipe"], x["ranks"]) == ("paper", 1))
    parameters, dim = paper["parameters"], paper["embedding"]
    step_model = [
        (
            nodes,
            ranks,
            f"{batch:,}",
            f"{8 * parameters * (ranks - 1) / ranks / 1e6:.1f}",
            f"{4 * batch * dim * (ranks - 1) / ranks / 1e6:.2f}",
        )
        for nodes, ranks, batch in MODELLED_STEPS
    ]
    evaluation_model = [
        (f"{n:,}", f"{34e-9 * n * dim / 64 + 0.1:.2f}", f"{n * n * dim / 64:.1e}")
        for n in (60_502, 10**6, 10**7, 10**8)
    ]
    return section(
        "Several processes",
        "scaling",
        result,
        "Measured: bytes that a rank hands to the collectives of a step (its whole gradient, a "
        "flag of 4 bytes, and its share of the embeddings; gloo, one thread each).\n",
        table(("recipe", "N", "all-reduced", "gathered"), sent),
        f"Measured: memory of an evaluation (embeddings and Recall@1), D = {EVALUATED}.\n",
        table(("images", "N", "each rank, MB", "most, to a rank's embeddings"), held),
        "Modelled by the formulas of [scaling.md](scaling.md), and not run: a step of `paper`.\n",
        table(("nodes", "N", "B", "gradients sent, MB", "embeddings sent, MB"), step_model),
        "Modelled, and not run: an evaluation on 64 ranks.\n",
        table(("images", "each rank, GB", "each rank's products"), evaluation_model),
    )


def page() -> str:
    """The whole page: what has been run."""
    sections = {
        "recall": recall,
        "step": step,
        "gpu": gpu,
        "losses": losses,
        "startup": startup,
        "loader": loader,
        "scaling": ranks,
    }
    run = [make() for name, make in sections.items() if (FOLDER / f"{name}.json").exists()]
    return "\n".join([HEAD, *run])


if __name__ == "__main__":
    PAGE.write_text(page())
