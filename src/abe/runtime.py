"""What a run needs from the machine: seeds, device, precision, files, and a way to stop."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import abe
from abe.errors import InputError, TakenError

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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of ours.

    Raises:
        InputError: it cannot be read or is no JSON object; the message names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is no JSON object, so abe did not write it")
    return value


def replace_text(path: Path, text: str) -> None:
    """Replace a text file as one step: a reader sees the old one or the new one.

    What of a name is not UTF-8 is written as an escape. A link stays one, and what is no file, such
    as a pipe, is written to.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return
    with replaced(path) as file:
        file.write(text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` as one step when it is whole and on the disk."""
    with _replacing(path) as beside, _named(path), beside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as one step."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def append_json_line(path: Path, value: Any) -> None:
    """Add one line of JSON to a file, in a single write; a last line that was cut off is ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path), path.open("ab+") as file:
        whole = file.tell() == 0
        if not whole:
            file.seek(-1, os.SEEK_END)
            whole = file.read() == b"\n"
        file.write((b"" if whole else b"\n") + json.dumps(value).encode() + b"\n")


def read_json_lines(path: Path, *, cut_off: bool = False) -> list[dict[str, Any]]:
    """All lines of a JSON-lines file.

    Args:
        path: the file.
        cut_off: pass over a last line without an end, as a full disk or a kill leaves it.

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
    if cut_off and lines and not lines[-1].endswith("\n"):
        del lines[-1]
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


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Replace a safetensors file as one step, which keeps its mode; it is on the disk then.

    The same tensors and metadata are the same bytes.
    """
    with _replacing(path) as beside:
        beside.touch()
        mode = (path if path.exists() else beside).stat().st_mode
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, beside, metadata)
        if metadata:
            _sort_metadata(beside)
        beside.chmod(mode)  # save_file leaves it readable by its owner alone
        flush(beside)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file, which come in a random order, into that of names."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
        file.write(text.encode().ljust(size))


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, that a power cut does not take away again."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def flush(path: Path) -> None:
    """Have a file's content, or the names in a folder, reach the disk before what follows."""
    if path.is_dir() and sys.platform == "win32":
        return  # which cannot
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        with _named(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


_locked_here: set[str] = set()  # files that this process has locked


@contextlib.contextmanager
def locked(path: Path, taken: str) -> Iterator[BinaryIO]:
    """A file open to be read and appended to, at one place at a time; however its process ends.

    Where a file system knows no locks, a warning says so, and other processes are let in.

    Args:
        path: the file, which is made if need be and stays.
        taken: the message where another process, or another place in this one, has it.

    Raises:
        TakenError: it is taken.
    """
    # POSIX lets a process lock a file again, and closing it there once gives up the first lock.
    own = os.path.realpath(path)
    if own in _locked_here:
        raise TakenError(taken)
    _locked_here.add(own)
    try:
        with path.open("a+b") as file:
            try:
                _lock(file)
            except (BlockingIOError, PermissionError):
                raise TakenError(taken) from None
            except OSError as error:
                warnings.warn(
                    f"{path} cannot be locked ({error.strerror}): see to it that no other process "
                    f"uses {path.parent}",
                    stacklevel=3,
                )
            yield file
    finally:
        _locked_here.remove(own)


def _lock(file: BinaryIO) -> None:
    """Lock a file for this process alone: one that reads images does not hold it when this ends."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside a file: what is written there takes the file's place, or is removed again."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed left beside the files that they replaced."""
    for path in folder.glob(".*.[0-9]*.part"):
        path.unlink()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have an error of the disk name the file; Python knows it when one is opened, not later."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def typed(*words: object) -> str:
    """A command of `abe` as it can be typed where this process was started."""
    program = sys.argv[0]
    named = Path(program).name == "abe" and shutil.which("abe") != os.path.abspath(program)
    return shlex.join([program if named else "abe", *map(str, words)])


def require_outside(folder: Path, images: Path) -> None:
    """Raises InputError if a folder to write is among the images, whose folders are classes."""
    if folder.resolve().is_relative_to(images.resolve()):
        raise InputError(f"{folder} is in {images}, the images: name a folder outside of it")


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


def seconds_of(text: str, option: str) -> float:
    """A time such as 90s, 30m or 2h.

    Raises:
        InputError: it is none, or no time at all; the message names the option.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None or float(found[1]) == 0:
        raise InputError(f"{option} {text}: write a number and s, m or h, as in 30m")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


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
