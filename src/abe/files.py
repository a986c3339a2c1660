"""Files and folders that are whole or not there, JSON whose faults name their file, and locks."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import struct
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import save_file
from torch import Tensor

from abe.errors import InputError, TakenError


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
    """Replace a safetensors file as one step; it is on the disk then.

    The same tensors and metadata are the same bytes.
    """
    with _replacing(path) as beside:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, beside, metadata)
        if metadata:
            _sort_metadata(beside)
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


def write_rows(path: Path, tensors: Mapping[str, tuple[Sequence[int], Iterable[Tensor]]]) -> None:
    """Replace a safetensors file as one step, with rows that together need not fit in memory.

    safetensors itself writes whole tensors only, so this puts its format together: the size of the
    header, the header, and the tensors one after the other.

    Args:
        path: the file.
        tensors: the shape of each, and its rows in order, in blocks of float32 on the CPU.
    """
    header, end = {}, 0
    for name, (shape, _) in tensors.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replaced(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, blocks in tensors.values():
            for block in blocks:
                file.write(block.contiguous().numpy().astype("<f4", copy=False).data)


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
    """A name beside a file: what is written there takes its place and mode, or is removed again.

    Of random bits: processes of machines or containers that share a folder can have one number.
    """
    beside = path.with_name(f".{path.name}.{secrets.randbits(64)}.part")
    try:
        beside.touch()
        mode = (path if path.exists() else beside).stat().st_mode
        yield beside
        beside.chmod(mode)  # safetensors leaves what it writes to its owner alone
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


def require_outside(folder: Path, images: Path) -> None:
    """Raises InputError if a folder to write is among the images, whose folders are classes."""
    if folder.resolve().is_relative_to(images.resolve()):
        raise InputError(f"{folder} is in {images}, the images: name a folder outside of it")
