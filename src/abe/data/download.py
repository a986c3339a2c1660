"""Fetching a benchmark from its publisher and unpacking it."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from rich.console import Console

from abe.data.benchmarks import Benchmark, Copy, find_benchmark
from abe.download import RemoteFile, checksum_difference, fetch, partial_path, waiting_for
from abe.errors import InputError

ARCHIVES = (".tgz", ".zip")
DAMAGES = (  # what reading a damaged archive raises
    tarfile.TarError,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,  # names that no file can have
)


def get(name: str, root: str | Path, console: Console | None = None) -> Copy:
    """Fetch what a benchmark's publisher ships, unpack it in `root`, and check what came of it.

    Files that are in `root` already are verified instead of fetched. A download or an unpacking
    that was interrupted is finished by the next call; a copy that is complete is left alone.

    Raises:
        InputError: there is no such benchmark, no network or no address (the message says where to
            put the file by hand), no room; a file is not the publisher's or damaged; or the copy is
            not complete in the end.
    """
    console = console or Console(stderr=True)
    benchmark, root = find_benchmark(name), Path(root)
    copy = benchmark.check(root)
    if copy.complete:
        return copy
    if not benchmark.files:
        raise InputError(
            f"{name} is not published as a file: put it into {root} by hand, as "
            f"{benchmark.homepage} has it\n{copy}"
        )
    absent = [file for file in benchmark.files if not (root / file.name).exists()]
    if nowhere := [file for file in absent if file.url is None]:
        raise InputError(
            f"{name} has to be fetched by hand, its publisher answers no program: "
            f"{_by_hand(benchmark, nowhere, root)}"
        )
    _check_room(copy, absent)
    root.mkdir(parents=True, exist_ok=True)
    with waiting_for(root / name):
        if (copy := benchmark.check(root)).complete:  # another process has got it meanwhile
            return copy
        for file in benchmark.files:
            _get_file(file, benchmark, root, console)
    return benchmark.check(root).require()


def _get_file(file: RemoteFile, benchmark: Benchmark, root: Path, console: Console) -> None:
    """Fetch or verify a file of a benchmark, and unpack it if it is an archive."""
    path = root / file.name
    if not path.exists():
        console.print(f"Fetching {file.name} ...")
        fetch(file, root, _by_hand(benchmark, [file], root))
    else:
        console.print(f"Verifying {file.name} ...")
        if difference := checksum_difference(path, file):
            raise InputError(
                f"{path} has {difference}: it is not what {benchmark.title}'s publisher ships, "
                "remove it"
            )
    if path.suffix in ARCHIVES:
        console.print(f"Unpacking {file.name} ...")
        unpack(path, root)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the files of a .tgz or .zip archive; its links and devices are left out.

    A file gets its name when it is complete, so an interruption leaves no part of one under it. The
    one checksum of a .tgz comes after its last file, when all of them have their names.

    Raises:
        InputError: the archive is damaged or takes a password, a file would land outside `folder`,
            or cannot be written.
    """
    inside = folder.resolve()
    try:
        for name, content in _members(archive):
            target = Path(os.path.realpath(inside / name))  # through links that are there already
            if inside not in target.parents:
                raise InputError(f"{archive}: {name!r} would land outside {folder}; do not use it")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = partial_path(target)
            partial.unlink(missing_ok=True)  # what an interruption has left, or a link to elsewhere
            with partial.open("xb") as file:
                shutil.copyfileobj(content, file)
            partial.replace(target)
    except InputError:
        raise
    except RuntimeError as error:  # how zipfile asks for a password
        raise InputError(f"{archive}: {error}: unpack it by hand in {folder}") from None
    except DAMAGES as error:
        raise InputError(f"{archive} is damaged ({error}): fetch it again") from None
    except OSError as error:
        raise InputError(f"{archive} cannot be unpacked in {folder}: {error}") from None


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of the regular files in an archive."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                    with zipped.open(info) as unzipped:
                        yield info.filename, unzipped
    else:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isreg() and (content := tar.extractfile(member)):
                    yield member.name, content
            while stream.read(2**20):  # to the end, where gzip compares its checksum
                pass


def _by_hand(benchmark: Benchmark, files: Sequence[RemoteFile], root: Path) -> str:
    named = []
    for file in files:
        size = "" if file.size is None else f"{file.size:,} bytes"
        facts = ", ".join(filter(None, (file.url, size, file.checksum)))
        named.append(f"{file.name} ({facts})" if facts else file.name)
    return (
        f"put {' and '.join(named)} into {root} and run `abe data get {benchmark.name} --root "
        f"{root}` again, which verifies and unpacks it; {benchmark.homepage} describes the data"
    )


def _check_room(copy: Copy, absent: Sequence[RemoteFile]) -> None:
    """Photographs are compressed already: unpacked they take about what the archives take."""
    benchmark, root = copy.benchmark, copy.root
    partials = (partial_path(root / file.name) for file in absent)
    there = [*copy.images.paths, *(path for path in partials if path.exists())]
    needed = sum(file.size or 0 for file in (*absent, *benchmark.files))
    needed -= sum(path.stat().st_size for path in there)
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{benchmark.name} needs about {needed / 1e9:.1f} GB in {root}, where "
            f"{free / 1e9:.1f} GB are free: give another folder by --root"
        )
