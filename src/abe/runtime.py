"""What a run needs from the machine: seeds, device, precision, files, and a way to stop."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

import abe
from abe.errors import InputError

Precision = Literal["fp32", "bf16"]


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is a CUDA GPU, Apple's, or the CPU, in this order.

    Raises:
        InputError: torch cannot use a device of that name here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise InputError(f"device={name} is unknown: use auto, cpu, cuda or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device={name}: PyTorch finds no CUDA GPU here: use auto or cpu, or install a build "
            "of PyTorch that fits the GPU"
        )
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device={name} cannot be used ({reason}): use auto or cpu") from None


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """Resolve "auto": bfloat16 autocast where the hardware multiplies it, float32 elsewhere.

    On a CPU that is AVX512-BF16 or AMX, where convolutions ran at twice float32's rate.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cpu":
        capable = torch.cpu.get_capabilities()
        return "bf16" if capable.get("avx512_bf16") or capable.get("amx_bf16") else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def environment(device: torch.device) -> dict[str, Any]:
    """What a result has to say of the software and the hardware it came from."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "abe": abe.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "os": platform.system(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as one step: a reader sees the old one or the new one."""
    text = json.dumps(value, indent=2) + "\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def append_json_line(path: Path, value: Any) -> None:
    """Add one line of JSON to a file, in a single write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(value) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON-lines file.

    Raises:
        InputError: the file cannot be read, or a line is no JSON object; the message names it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not in UTF-8, so abe did not write it") from None
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InputError(
                f"{path}, line {number} is no JSON object: correct or remove it. It begins with "
                f"{line.rstrip()[:40]!r}"
            )
        values.append(value)
    return values


def resume_command(run: Path) -> str:
    """What to type to go on with a run."""
    return shlex.join(["abe", "train", "--resume", str(run)])


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag, so that a run can save before it stops."""

    def __init__(self) -> None:
        self.received: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Listen while the context lasts; a second Ctrl-C stops at once."""
        handled = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._receive) for number in handled}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with "+" where it was changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
