"""Preparation: images decoded once, into a file of padded squares that training maps into memory.

A prepared folder holds three files, which docs/data.md describes field by field:

    squares.npy     uint8 RGB, (L, side, side, 3): what `pad_to_square` makes of each listed image
    index.parquet   L lines: file, label, split, box, and checksums of the file and of its square
    prepared.json   version, and the checksum of index.parquet; written last

While it is being made, index.parquet has the list alone, and prepared.journal a line for each image
that is done. A line is written after its square is on the disk, so that a preparation may be killed
at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, Self

import numpy as np
from PIL import Image
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from rich.console import Console

from abe.data.benchmarks import benchmark_of
from abe.data.datasets import (
    EDGES,
    ImageFiles,
    Source,
    check_images,
    in_threads,
    named,
)
from abe.data.decode import BrokenImageError, ReadingError, printable
from abe.errors import InputError
from abe.files import locked, require_outside
from abe.progress import progress

VERSION = 1
SQUARES, INDEX, MANIFEST = "squares.npy", "index.parquet", "prepared.json"
JOURNAL = "prepared.journal"
COLUMNS = {  # of the index
    "path": "binary",
    "label": "int64",
    "split": "string",
    **dict.fromkeys(EDGES, "double"),
    "size": "int64",
    "mtime_ns": "int64",
    "sha256": "string",
    "square_sha256": "string",
    "error": "string",
}
LINE_BYTES = 1024  # of disk space for each image beside its square: lines of journal and index
FLUSHED = 256  # images at most, and
FLUSHED_SECONDS = 5.0  # time, that are between two writes to the journal
GOES_ON = "what is done is kept, and the same command goes on with it"
# Errors of a disk after which the same command may go on.
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE}


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """Images whose padded squares are mapped into memory; satisfies `LabelledImages`.

    Any number of processes may read a prepared folder.

    Attributes:
        folder: where they are.
        name: as the source's.
        labels: int64, (N,): indices into `class_names`.
        class_names: as the source's.
        squares: uint8, (L, side, side, 3), of all images that were listed; selections share it.
        paths: Arrow column of bytes, (L,): the files that were decoded.
        rows: int64, (N,): where in `squares` and `paths`.
    """

    folder: Path
    name: str
    labels: np.ndarray
    class_names: Sequence[str]
    squares: np.ndarray
    paths: Any
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int) -> Image.Image:
        """The padded square, in mode RGB."""
        return Image.fromarray(self.squares[self.rows[index]])

    def square(self, index: int, side: int) -> np.ndarray:
        """The padded square, read-only; -> uint8 (side, side, 3).

        Raises:
            InputError: it was prepared with another side.
        """
        self.require_side(side)
        return self.squares[self.rows[index]]

    def require_side(self, side: int) -> None:
        """Raise an `InputError` if the squares have another side."""
        if side != (prepared := self.squares.shape[1]):
            raise InputError(
                f"{self.folder} was prepared with --size {prepared}, but data.resize is {side}: "
                f"prepare the images again with --size {side}, or set data.resize={prepared} and "
                "data.crop, which is a part of it"
            )

    def describe(self, index: int) -> str:
        """The path of the file that was decoded."""
        return os.fsdecode(self.paths[self.rows[index]].as_py())

    def select(self, indices: np.ndarray) -> Self:
        """A part of the images, on the same memory."""
        return replace(self, labels=self.labels[indices], rows=self.rows[indices])

    def __reduce__(self) -> tuple[Callable[..., PreparedImages], tuple[Path, np.ndarray]]:
        """A process that is spawned maps the file itself, rather than be sent its content."""
        return _map_rows, (self.folder, self.rows)


def is_prepared(path: str | Path) -> bool:
    """Whether a folder is prepared, or partly so."""
    return any((Path(path) / name).is_file() for name in (MANIFEST, JOURNAL))


def open_prepared(folder: str | Path, side: int | None = None) -> Source:
    """Open a prepared folder.

    While the folder or the CSV file that it was made from is still there, the files are looked at:
    one whose size is another, or whose time and content are, has changed. Files that were added to
    a folder since are not noticed; `prepare` compares those, too.

    Args:
        folder: the prepared folder.
        side: of the squares that are wanted, if any will not do.

    Raises:
        InputError: the preparation is unfinished, of an unknown version or damaged (of the squares
            only their number is checked; see `verify`), files have changed since, or the squares
            have another side.
    """
    folder = Path(folder)
    images, index = _map(folder)
    if side is not None:
        images.require_side(side)
    _require_unchanged(folder, index)
    readable = np.flatnonzero(index["error"].is_null())
    split = np.array(index["split"].to_pylist())[readable]
    about = _about(index)
    source = Source(
        images.select(readable),
        None if index["split"].null_count else split,
        about["ks"],
        about["stamps"],
        len(index) - len(readable),
    )
    if benchmark := benchmark_of(source):
        source = source._replace(stamps=benchmark.stamps(len(readable)))
    return source


def prepare(
    images: ImageFiles,
    folder: str | Path,
    *,
    source: str | Path,
    split: np.ndarray | None = None,
    ks: Sequence[int] | None = None,
    stamps: Sequence[str] = (),
    side: int = 256,
    skip_broken: bool = False,
    console: Console | None = None,
) -> Source:
    """Decode images into a prepared folder on all processors, or go on where that was interrupted.

    The result is the same to the byte, however often it was interrupted. A folder that is finished
    is compared with the images and stays as it is.

    Args:
        images: what to decode.
        folder: where to; made if it does not exist, else empty or begun before. Not within the
            folder of the images, where it would be taken for a class.
        source: the folder or CSV file that `images` were opened from.
        split: (N,), the part that each image is in, or None.
        ks: the K of Recall@K that they are scored by, None for the usual. Where they are given, as
            for a benchmark, images that are left out make it a partial one in `stamps`.
        stamps: what every result on them has to say.
        side: of the squares, pixels.
        skip_broken: leave out files that cannot be read.
        console: where to show progress; None for nowhere.

    Raises:
        InputError: the folder is among the images, has other content or other images, cannot be
            written, or is being prepared by another process; the disk is full; files cannot be
            read (`check_images`). What is done by then is kept.
        MemoryError: there is too little memory for an image.
    """
    folder, source = Path(folder), Path(os.path.abspath(source))
    if source.is_dir():  # images of a CSV file may be anywhere
        require_outside(folder, Path(os.path.commonpath({path.parent for path in images.paths})))
    about = {
        "name": images.name,
        "class_names": list(images.class_names),
        "side": side,
        "ks": ks and list(ks),
        "stamps": list(stamps),
        "source": str(source),
        "sha256": _sha256(source) if source.is_file() else None,
    }
    listing = _list(images, split, about)
    try:
        if not os.path.exists(folder / MANIFEST) or os.path.exists(folder / JOURNAL):
            _prepare(images, listing, folder, skip_broken, console)
    except KeyboardInterrupt:
        if console is not None:
            console.print(f"Stopped: {GOES_ON}")
        raise
    except ReadingError as error:
        raise InputError(
            f"{printable(error.filename)} cannot be read: {error.strerror}; {GOES_ON}"
        ) from None
    except OSError as error:
        if not os.path.exists(folder / MANIFEST):  # else it is finished, and the disk read-only
            advice = GOES_ON if error.errno in PASSING else "give another folder by --out"
            raise InputError(f"{folder} cannot be written: {error.strerror}; {advice}") from None
    _require_same(folder, _map(folder)[1], listing)
    return open_prepared(folder)


def verify(folder: str | Path, console: Console | None = None) -> Source:
    """Compare every square, and every file that is still there, with its checksum.

    Raises:
        InputError: some differ; or as `open_prepared`.
    """
    folder = Path(folder)
    images, index = _map(folder)

    def fault_of(row: int) -> str | None:
        path, sha256, square_sha256 = (
            index[column][row].as_py() for column in ("path", "sha256", "square_sha256")
        )
        if hashlib.sha256(images.squares[row].data).hexdigest() != square_sha256:
            return f"image {row} of {SQUARES}, {os.fsdecode(path)}, is damaged"
        if sha256 and os.path.exists(path) and _sha256(path) != sha256:
            return f"{os.fsdecode(path)} has changed"
        return None

    found = []
    with progress(console, "comparing checksums", len(index)) as on_progress:
        for done, fault in enumerate(in_threads(fault_of, len(index)), 1):
            on_progress(done)
            if fault:
                found.append(fault)
    if found:
        raise InputError(
            f"{folder} is not what was prepared ({len(found)} of {len(index)} images); "
            f"{_anew(folder)}:\n" + named(found, "\n")
        )
    return open_prepared(folder)


# --- Reading -----------------------------------------------------------------------------------


def _map(folder: Path) -> tuple[PreparedImages, Any]:
    """All L images that were listed, and the index as a `pyarrow.Table`."""
    with _damage_told(folder):
        if not (folder / MANIFEST).exists():
            raise InputError(f"{folder} is not prepared to the end: go on with `abe data prepare`")
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["version"] != VERSION:
            raise InputError(
                f"{folder} is of version {manifest['version']!r}, and this program reads {VERSION}:"
                " prepare the images again, or use a newer one"
            )
        content = (folder / INDEX).read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest["index_sha256"]:
            raise ValueError(f"{INDEX} does not have its checksum")
        index = _read_parquet(content)
        _require_form(index)
        about = _about(index)
        images = PreparedImages(
            folder,
            about["name"],
            index["label"].to_numpy(),
            about["class_names"],
            np.asarray(_map_squares(folder / SQUARES, (len(index), about["side"]))),
            index["path"],
            np.arange(len(index)),
        )
    return images, index


def _require_form(index: Any) -> None:
    """Raises an exception, of whatever kind, unless an index is as `prepare` writes it."""
    about = _about(index)
    texts = [about["name"], about["source"], about["sha256"] or ""]
    texts += [*about["class_names"], *about["stamps"]]
    numbers = [about["side"], *(about["ks"] or ())]
    labels = index["label"].to_numpy()
    if not (
        {field.name: str(field.type) for field in index.schema} == COLUMNS
        and not any(index[name].null_count for name in ("path", "label", "square_sha256"))
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int) and number > 0 for number in numbers)
        and ((labels >= 0) & (labels < len(about["class_names"]))).all()
    ):
        raise ValueError(f"{INDEX} is not of its form")


def _map_squares(path: Path, expected: tuple[int, int]) -> np.memmap[Any, Any]:
    squares = np.load(path, mmap_mode="r")
    if squares.shape != _shape(*expected) or squares.dtype != np.uint8:
        raise ValueError(f"{path.name} holds {squares.dtype} {squares.shape}")
    return squares


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes its parser raise almost anything
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise InputError(
                f"{error.filename or folder} cannot be read: {error.strerror}; see to its "
                "permissions and to the disk"
            ) from None
        raise InputError(f"{folder} is damaged ({error}): {_anew(folder)}") from None


def _map_rows(folder: Path, rows: np.ndarray) -> PreparedImages:
    return _map(folder)[0].select(rows)


def _require_unchanged(folder: Path, index: Any) -> None:
    about = _about(index)
    source = Path(about["source"])
    if not source.exists():
        return
    changed = [str(source)] if source.is_file() and _sha256(source) != about["sha256"] else []
    columns = (index[name].to_pylist() for name in ("path", "size", "mtime_ns"))
    for row, (path, size, mtime_ns) in enumerate(zip(*columns, strict=True)):
        now = _size_and_time(path)
        if now == (size, mtime_ns):
            continue
        sha256 = index["sha256"][row].as_py()
        if now[0] != size or sha256 is None or _sha256(path) != sha256:
            changed.append(os.fsdecode(path))
    if changed:
        raise InputError(
            f"{folder}: files have changed since they were prepared ({len(changed)}); put them "
            f"back as they were, or {_anew(folder)}:\n" + named(changed, "\n")
        )


def _anew(folder: Path) -> str:
    return f"remove {folder} and prepare the images anew"


# --- Writing -----------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """What the journal has of an image that is done."""

    size: int | None
    mtime_ns: int | None
    sha256: str | None
    square_sha256: str
    error: str | None


_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_LINE = TypeAdapter(  # of the journal: an index, and the entry
    tuple[int, _Int64 | None, _Int64 | None, str | None, str, str | None],
    config=ConfigDict(strict=True),
)


def _list(images: ImageFiles, split: np.ndarray | None, about: dict[str, Any]) -> Any:
    """The columns of the index that are known before an image is read; -> `pyarrow.Table`."""
    pa = _pyarrow()
    boxes = images.boxes or [None] * len(images)
    paths = [os.fsencode(os.path.abspath(path)) for path in images.paths]
    columns = {
        "path": pa.array(paths, pa.binary()),
        "label": pa.array(images.labels, pa.int64()),
        "split": pa.array([None] * len(images) if split is None else split.tolist(), pa.string()),
    }
    for number, edge in enumerate(EDGES):
        columns[edge] = pa.array([box and box[number] for box in boxes], pa.float64())
    return pa.table(columns, metadata={"abe": json.dumps(about)})


def _about(index: Any) -> dict[str, Any]:
    """What an index says of all images."""
    return json.loads(index.schema.metadata[b"abe"])


def _require_same(folder: Path, index: Any, listing: Any) -> None:
    """Refuse to go on with a folder that was begun with another list."""
    begun = index.select(listing.column_names)
    then, now = ({**_about(table), "sha256": None} for table in (begun, listing))
    if then == now and begun.equals(listing):
        return
    paths = [set(table["path"].to_pylist()) for table in (begun, listing)]
    removed, added = paths[0] - paths[1], paths[1] - paths[0]
    if then["side"] != now["side"]:
        difference = f"--size {then['side']}, not {now['side']}"
    elif removed or added:
        files = [f"- {os.fsdecode(path)}" for path in sorted(removed)]
        files += [f"+ {os.fsdecode(path)}" for path in sorted(added)]
        counts = f"{len(removed)} of them are gone, {len(added)} are new"
        difference = "\n".join([f"other images ({counts}):", named(files, "\n"), ""])
    else:
        columns = [name for name in begun.column_names if not begun[name].equals(listing[name])]
        keys = [name for name in now if then[name] != now[name]]
        values = [f"{name} {then[name]!r:.200}, not {now[name]!r:.200}" for name in keys]
        difference = "; ".join([f"another {name} of images" for name in columns] + values)
    raise InputError(f"{folder} was begun with {difference}; give a new folder, or {_anew(folder)}")


def _prepare(
    images: ImageFiles, listing: Any, folder: Path, skip_broken: bool, console: Console | None
) -> None:
    if sys.platform == "win32":
        raise InputError(
            f"{folder}: images can be prepared on Linux or macOS; what is prepared there can be "
            "read here"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not is_prepared(folder):
        raise InputError(f"{folder} is not empty: give a new folder")
    taken = f"{folder} is being prepared by another process: wait for it"
    with locked(folder / JOURNAL, taken) as journal:
        if not (folder / MANIFEST).exists():  # else it is finished but for the journal
            _decode(images, listing, folder, journal, skip_broken, console)
        (folder / JOURNAL).unlink(missing_ok=True)


def _decode(
    images: ImageFiles,
    listing: Any,
    folder: Path,
    journal: BinaryIO,
    skip_broken: bool,
    console: Console | None,
) -> None:
    side = _about(listing)["side"]
    if (folder / INDEX).exists():
        with _damage_told(folder):
            _require_same(folder, _read_parquet((folder / INDEX).read_bytes()), listing)
    else:
        _reserve(folder / SQUARES, _shape(len(images), side))
        journal.truncate(0)
        _write(folder / INDEX, _parquet(listing))
    with _damage_told(folder):
        first = _map_squares(folder / SQUARES, (len(images), side)).offset
    with (
        (folder / SQUARES).open("r+b") as squares,
        progress(console, "preparing images", len(images)) as on_progress,
    ):
        writer = _Writer(images, side, squares, first, journal)
        try:
            check_images(images, skip_broken, read=writer.prepare, on_progress=on_progress)
        finally:
            writer.flush()
    entries = [writer.entries[index] for index in range(len(images))]
    index = listing
    for name, values in zip(_Entry._fields, zip(*entries, strict=True), strict=True):
        kind = _pyarrow().int64() if name in ("size", "mtime_ns") else _pyarrow().string()
        index = index.append_column(name, _pyarrow().array(values, kind))
    content = _parquet(index)
    manifest = {"version": VERSION, "index_sha256": hashlib.sha256(content).hexdigest()}
    _write(folder / INDEX, content)
    _write(folder / MANIFEST, f"{json.dumps(manifest, indent=2)}\n".encode())


class _Writer:
    """Writes squares, and then their entries into the journal; called by several threads.

    Attributes:
        entries: index -> entry, of what is done.
    """

    def __init__(
        self, images: ImageFiles, side: int, squares: BinaryIO, first: int, journal: BinaryIO
    ) -> None:
        self.entries = _read_journal(journal)
        self._images = images
        self._side = side
        self._squares = squares
        self._first = first  # byte of the first square
        self._journal = journal
        self._lines: list[str] = []
        self._flushed = time.monotonic()
        self._lock = threading.Lock()

    def prepare(self, index: int) -> None:
        """Write the square of an image, unless that is done and its file is still the same.

        A file that could not be read is always tried again: its permissions may be others.

        Raises:
            BrokenImageError: the file cannot be read; its square is black.
            MemoryError: there is too little memory for it.
            ReadingError: it cannot be read now.
        """
        path = self._images.paths[index]
        found = _size_and_time(path)
        entry = self.entries.get(index)
        if entry is None or entry.error is not None or found != (entry.size, entry.mtime_ns):
            entry = self._decode(index, found)
        if entry.error is not None:
            raise BrokenImageError(path, entry.error)

    def _decode(self, index: int, found: tuple[int | None, int | None]) -> _Entry:
        path = self._images.paths[index]
        sha256 = error = None
        try:
            square = self._images.square(index, self._side)
            sha256 = _sha256(path)
            if sha256 is None or _size_and_time(path) != found:
                raise BrokenImageError(path, "changed while it was read")
        except BrokenImageError as broken:
            square = np.zeros((self._side, self._side, 3), np.uint8)
            sha256, error = None, broken.reason
        entry = _Entry(*found, sha256, hashlib.sha256(square.data).hexdigest(), error)
        with self._lock:
            self._squares.seek(self._first + index * square.nbytes)
            self._squares.write(square.data)
            self.entries[index] = entry
            self._lines.append(f"{json.dumps([index, *entry])}\n")
            waited = time.monotonic() - self._flushed
            if len(self._lines) == FLUSHED or waited > FLUSHED_SECONDS:
                self._flush()
        return entry

    def flush(self) -> None:
        """Bring what is done to the disk."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        _sync(self._squares)
        self._journal.write("".join(self._lines).encode())
        _sync(self._journal)
        self._lines.clear()
        self._flushed = time.monotonic()


def _read_journal(journal: BinaryIO) -> dict[int, _Entry]:
    """The entries that are whole, up to the first that an interruption or damage has left."""
    entries = {}
    journal.seek(0)
    end = 0
    for line in journal:
        try:
            index, size, mtime_ns, sha256, square_sha256, error = _LINE.validate_json(line)
        except ValidationError:
            break
        if not line.endswith(b"\n"):
            break
        entries[index] = _Entry(size, mtime_ns, sha256, square_sha256, error)
        end += len(line)
    journal.truncate(end)
    return entries


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Make the file of squares, on disk space that nothing else can take from then on."""
    needed, free = math.prod(shape) + shape[0] * LINE_BYTES, shutil.disk_usage(path.parent).free
    if needed > free:
        raise InputError(
            f"{path.parent}: {shape[0]} images of {shape[1]} x {shape[2]} pixels take "
            f"{needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free: choose another disk, or a "
            "smaller size"
        )
    try:
        with path.open("w+b") as file:  # some disks make posix_fallocate read, too
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            size = file.tell() + math.prod(shape)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # on macOS
                file.truncate(size)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _shape(count: int, side: int) -> tuple[int, ...]:
    return count, side, side, 3


def _parquet(table: Any) -> bytes:
    # Into Arrow's memory: what would write to a Python file aborts a process that ends meanwhile.
    sink = _pyarrow().BufferOutputStream()
    _pyarrow().parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _read_parquet(content: bytes) -> Any:
    # Not from a path: pyarrow takes those in UTF-8 alone. Not by `read_table`: the threads that it
    # starts go on after it, and abort a process that ends while they do (Arrow's issue 34314).
    file = _pyarrow().parquet.ParquetFile(_pyarrow().BufferReader(content))
    return file.read(use_threads=False)


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step; an interruption leaves a .part that the next attempt replaces."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(content)
        _sync(file)
    part.replace(path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _size_and_time(path: str | bytes | Path) -> tuple[int | None, int | None]:
    try:
        found = os.stat(path)
    except OSError:
        return None, None
    return found.st_size, found.st_mtime_ns


def _sha256(path: str | bytes | Path) -> str | None:
    """Of a file's content; None if there is no file, or none that may be read.

    Raises:
        ReadingError: it cannot be read now.
    """
    if not os.path.isfile(path):  # but a pipe, which would be waited for
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        raise ReadingError(error.errno, error.strerror, os.fsdecode(path)) from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "prepared images need pyarrow, which is not installed: pip install pyarrow"
        ) from None
    return pyarrow
