"""What the benchmarks share: sides that take turns, and one JSON object at the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from abe.runtime import environment


def take_turns(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each side over `rounds`, after one that warms up.

    What else the machine does falls on all sides alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = clock()
            side()
            if number:
                seconds[name].append(clock() - started)
    return {name: median(values) for name, values in seconds.items()}


def publish(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/<name>.json with the hardware named, and print it as the last line."""
    hardware = environment(torch.device("cpu")) | {"cores": os.cpu_count()}
    result = {"hardware": hardware, **result}
    path = Path(__file__).with_name(f"{name}.json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def rounded(value: Any, digits: int = 3) -> Any:
    """The same with numbers of so many significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    return value


def peak_memory() -> float:
    """The most memory that this process has held, megabytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000
