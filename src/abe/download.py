"""Fetching a file: continued where it broke off, verified before it gets its name."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import wrap_file

from abe.errors import InputError, TakenError
from abe.files import locked

WAIT_SECONDS = 1.0  # between two looks whether another process has fetched a file


@dataclass(frozen=True)
class RemoteFile:
    """A file that somebody publishes.

    Attributes:
        name: what to call it here.
        url: where it can be fetched; None if there is no address that answers a program.
        size: bytes, of which the last digits may be rounded; None if it is not published.
        checksum: "<algorithm>:<hex digits>", the first digits where no more are published; None if
            none is.
    """

    name: str
    url: str | None
    size: int | None
    checksum: str | None


def fetch(file: RemoteFile, folder: Path, by_hand: str) -> Path:
    """Fetch a file that has an address into `folder` unless it is there; -> its path, verified.

    The bytes go to a `.part` file beside it, which an interrupted download leaves behind and the
    next one continues, and which is renamed when it is complete and its checksum is right. Of
    several processes one fetches it, and the others wait.

    Args:
        file: what to fetch.
        folder: made if it does not exist.
        by_hand: what a person may do instead, for the messages.

    Raises:
        InputError: the checksum of the file that is there differs, the download failed, or the
            checksum of what came differs (it is deleted).
    """
    assert file.url is not None
    path = folder / file.name
    partial = partial_path(path)
    try:
        if path.exists():
            if difference := checksum_difference(path, file):
                raise InputError(f"{path} has {difference}: remove it, and it is fetched again")
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with waiting_for(path):
            if path.exists():  # another process has fetched it meanwhile
                return path
            _continue(file, partial)
            if difference := checksum_difference(partial, file):
                partial.unlink()
                raise InputError(
                    f"{file.name}: what {file.url} sent has {difference}, so it was deleted. "
                    f"Try again, or {by_hand}"
                )
            return partial.replace(path)
    except (OSError, HTTPException) as error:
        raise InputError(
            f"{file.name}: the download to {partial} failed ({error}). "
            f"Run the same again to continue it, or {by_hand}"
        ) from error


@contextmanager
def waiting_for(path: Path) -> Iterator[None]:
    """While it lasts, no other process makes `path`; it begins when there is none.

    What the others made meanwhile is there then, so look first.
    """
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as stack:
        for told in itertools.count():
            try:
                file = stack.enter_context(locked(lock, f"{path} is being fetched"))
                if _is(file, lock):
                    break
                stack.close()  # who held it has removed it meanwhile
            except TakenError as error:
                if not told:
                    Console(stderr=True).print(f"{error} by another process: waiting for it ...")
                time.sleep(WAIT_SECONDS)
        try:
            yield
        finally:
            if not partial_path(path).exists():  # else who waits goes on with it, under this lock
                with suppress(OSError):
                    lock.unlink()


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one that a path names now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def partial_path(path: Path) -> Path:
    """Where the bytes of a file are collected until they are complete."""
    return path.with_name(f"{path.name}.part")


def checksum_difference(path: Path, file: RemoteFile) -> str | None:
    """What tells `path` from the published file; None if nothing does, or no checksum is known."""
    if file.checksum is None:
        return None
    algorithm, _, expected = file.checksum.partition(":")
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, algorithm).hexdigest()
    if digest.startswith(expected):
        return None
    return f"the {algorithm} {digest} instead of {expected}"


def _continue(file: RemoteFile, partial: Path) -> None:
    """Append to `partial` what it still lacks, or write it anew if the server cannot continue."""
    assert file.url is not None
    start = partial.stat().st_size if partial.exists() else 0
    request = Request(file.url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(request, timeout=30)
    except HTTPError as error:
        with error:
            if error.code == 416:  # nothing lies beyond `start`: all of it is there
                return
            raise
    with response, partial.open("ab" if response.status == 206 else "wb") as content:
        with wrap_file(
            response,
            total=response.length or file.size or 0,
            description=file.name,
            console=Console(stderr=True),
            transient=True,
        ) as reader:
            shutil.copyfileobj(reader, content)
        if response.length:
            raise ConnectionError(f"the connection closed {response.length} bytes too early")
