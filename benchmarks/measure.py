"""What the benchmarks share: sides that take turns, memory, and one JSON object at the end."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from abe.runtime import environment

Found = TypeVar("Found")
CPU = torch.device("cpu")


def options_of(doc: str | None, file: str, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """The options that benchmarks have in common.

    Args:
        doc: the benchmark's docstring, of which the first line describes it.
        file: its `__file__`; the result goes beside it.
        rounds: how often the sides are measured, unless the user says; None: there is no such.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path(file).with_suffix(".json"))
    return parser


def in_turns(
    sides: Mapping[str, Callable[[], Found]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[Found]]:
    """What each side gives in `rounds` rounds, after one that is thrown away.

    What else the machine does falls on all sides alike.
    """
    given: dict[str, list[Found]] = {name: [] for name in sides}
    for number in range(-warm_up, rounds):
        for name, side in sides.items():
            found = side()
            if number >= 0:
                given[name].append(found)
    return given


def take_turns(
    sides: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, float]:
    """Median seconds of each side over `rounds`, see `in_turns`."""

    def timed(side: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            side()
            return time.perf_counter() - started

        return run

    timers = {name: timed(side) for name, side in sides.items()}
    return {k: median(found) for k, found in in_turns(timers, rounds, warm_up=warm_up).items()}


def hardware(device: torch.device = CPU) -> dict[str, Any]:
    """What a result says of the software and the machine that it came from."""
    amx = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return environment(device) | {"cores": os.cpu_count(), "amx_bf16": amx}


def save(output: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write a benchmark's file; -> what is in it, the hardware named."""
    result = {"hardware": hardware(), **result}  # or what the result says itself
    output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def publish(output: Path, result: Mapping[str, Any]) -> None:
    """Write a benchmark's file, and print it as the last line."""
    print(json.dumps(save(output, result)))


def rounded(value: Any, digits: int = 3) -> Any:
    """The same with numbers of so many significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    return value


def peak_memory(work: Callable[[], object]) -> int:
    """The bytes that this process held at most during `work`, above those before it (Linux, glibc).

    What it had held and given back before does not count, and what its allocator had kept for later
    use is given back first.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, from what is held now
    before = _resident_peak()
    work()
    return _resident_peak() - before


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])
