"""What a run needs from the machine: seeds, device, precision, memory, and a way to stop.

And what is said of it: the environment of a result, and commands as they can be typed there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

import abe
from abe.errors import InputError

Precision = Literal["fp32", "bf16"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


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
    """Resolve "auto": bfloat16 autocast where the hardware has it, on a CPU if a trial is faster.

    A GPU is not tried: it is made to multiply bfloat16 faster, and what a short trial measures
    there is how long kernels take to start.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        capable = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        faster = bool(capable) and bfloat16_is_faster()
    else:
        faster = False
    return "bf16" if faster else "fp32"


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether a CPU takes less than 3/4 of float32's time for a convolution and its gradient.

    Measured once a process, in a tenth of a second.
    """
    images = torch.ones(8, 128, 14, 14).to(memory_format=torch.channels_last)
    weight = torch.ones(256, 128, 3, 3).to(memory_format=torch.channels_last)
    weight.requires_grad_()

    def seconds(precision: Precision) -> float:
        started = time.perf_counter()
        with autocast(images.device, precision):
            output = F.conv2d(images, weight, padding=1)
        torch.autograd.grad(output.sum(), weight)
        return time.perf_counter() - started

    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    rounds = [[seconds(precision) for precision in precisions] for _ in range(6)][1:]
    fp32, bf16 = (min(times) for times in zip(*rounds, strict=True))
    return bf16 < 0.75 * fp32


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for later use, where it is glibc's.

    Else it gives the tensors of a step back to the system after each, and the system has to clear
    every page again: a tenth of a step on a processor. Tensors of 32 MiB and more still go back.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that it can be
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def seed_step(seed: int, step: int) -> None:
    """Have what a step draws from torch's generators depend on the seed and the step alone.

    So it is the same after a resume and on every process. CPUs and GPUs draw other numbers from the
    same seed.
    """
    (drawn,) = np.random.SeedSequence(seed, spawn_key=(step,)).generate_state(1, np.uint64)
    torch.manual_seed(int(drawn))


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
        "device": device.type,
        "gpu": gpu,
    }


def typed(*words: object) -> str:
    """A command of `abe` as it can be typed where this process was started."""
    program = sys.argv[0]
    named = Path(program).name == "abe" and shutil.which("abe") != os.path.abspath(program)
    return shlex.join([program if named else "abe", *map(str, words)])


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that can be taken without swapping; infinity where the system does not say.

    Of a container, what its limit leaves: files that the system keeps in memory give way. Limits of
    groups within groups are not seen.

    Args:
        root: where `proc` and `sys` are.
    """
    free, groups = math.inf, root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, LookupError, ValueError):
        free = 1024 * _numbers(root / "proc/meminfo")["MemAvailable:"]
    versions = (
        (groups, "memory.max", "memory.current", ("active_file", "inactive_file")),
        (
            groups / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_active_file", "total_inactive_file"),
        ),
    )
    for folder, limit, used, files in versions:
        with contextlib.suppress(OSError, LookupError, ValueError):  # no limit is "max"
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            kept = _numbers(folder / "memory.stat")
            free = min(free, most - now + sum(kept[name] for name in files))
    return free


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {name: int(number) for name, number, *_ in lines}


def resume_command(run: Path) -> str:
    """What to type to go on with a run."""
    return typed("train", "--resume", run)


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag, so that a run can save before it stops."""

    def __init__(self) -> None:
        self.received: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Listen while the context lasts, in the main thread; a second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
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
