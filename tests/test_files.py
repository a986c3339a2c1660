"""Files are whole or not there, say what is wrong with them, and are locked by one process."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from abe import files
from abe.errors import InputError
from abe.files import (
    append_json_line,
    locked,
    make_folder,
    read_json_lines,
    remove_unfinished,
    replace_text,
    replaced,
    write_json,
    write_rows,
    write_tensors,
)


def test_write_json_replaces_a_file_or_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"name": "Zaunkönig \u2028 \udce9", "value": [1, None, 0.1]})
    before = path.read_text(encoding="utf-8")
    assert json.loads(before) == {"name": "Zaunkönig \u2028 \udce9", "value": [1, None, 0.1]}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"value": [1] * 100_000, "no JSON": object()})
    assert path.read_text(encoding="utf-8") == before
    write_json(path, 2)
    assert json.loads(path.read_text(encoding="utf-8")) == 2
    assert os.listdir(tmp_path) == ["value.json"]


def test_text_goes_through_links_and_into_pipes(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("page")
    replace_text(tmp_path / "link", "new \udce9")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "page").read_text() == "new \\udce9"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    replace_text(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert sorted(os.listdir(tmp_path)) == ["link", "page", "pipe"]


def test_write_json_is_whole_when_the_machine_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new contents are on the disk before they take the old one's name."""
    path = tmp_path / "value.json"
    write_json(path, "old")
    flushed: list[int] = []
    replace = Path.replace

    def stop(self: Path, target: Path) -> Path:
        assert flushed
        assert json.loads(path.read_text()) == "old"
        assert json.loads(self.read_text()) == "new"
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushed.append)
    monkeypatch.setattr(Path, "replace", stop)
    write_json(path, "new")
    assert json.loads(path.read_text()) == "new"


def test_json_lines_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "runs.jsonl"
    values = [{"name": "a"}, {"name": "line\nbreak \u2028 \x85 \udce9"}, {"nested": {"b": [1]}}]
    for value in values:
        append_json_line(path, value)
    assert read_json_lines(path) == values
    assert path.read_bytes().count(b"\n") == 3


def test_json_lines_of_an_empty_file_and_without_a_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.touch()
    assert read_json_lines(path) == []
    path.write_bytes(b'{"a": 1}\r\n{"b": 2}')
    assert read_json_lines(path) == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", "1", "null", "", '{"a": 1} {"b": 2}', '{"half": "a li', "[" * 100_000, "9" * 5000],
)
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(InputError) as error:
        read_json_lines(path)
    begin = f"{path}, line 2 is no JSON object: correct or remove it. It begins with "
    assert str(error.value) == f"{begin}{line[:40]!r}"


def test_json_lines_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl cannot be read: No such file or directory"):
        read_json_lines(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_json_lines(tmp_path)
    path = tmp_path / "image.jsonl"
    path.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(InputError, match=r"image\.jsonl is not in UTF-8"):
        read_json_lines(path)


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    assert read_json_lines(path, cut_off=True) == [{"a": 1}]
    append_json_line(path, {"c": 3})
    assert path.read_text() == '{"a": 1}\n{"b"\n{"c": 3}\n'
    with pytest.raises(InputError, match="line 2 is no JSON object"):
        read_json_lines(path, cut_off=True)


@contextmanager
def full_disk() -> Iterator[None]:
    """Where no file may have more than 100 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    """Python names no file in an error of a write."""
    for write in (append_json_line, write_json):
        with full_disk(), pytest.raises(OSError, match=r"File too large: .*value\.json'"):
            write(tmp_path / "value.json", {"long": "a" * 200})


def test_tensors_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    for value in (1, 2):
        write_tensors(path, {"a": torch.full((2, 3), value).T})
        assert torch.equal(load_file(path)["a"], torch.full((3, 2), value))
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    """A new one has that of any new file."""
    path = tmp_path / "file"
    (tmp_path / "new").touch()
    new = (tmp_path / "new").stat().st_mode
    for write in (
        lambda: write_tensors(path, {"a": torch.zeros(1)}),
        lambda: replace_text(path, "text"),
    ):
        write()
        assert path.stat().st_mode == new
        for mode in (0o640, 0o604):
            path.chmod(mode)
            write()
            assert stat.S_IMODE(path.stat().st_mode) == mode
        path.unlink()


def test_two_that_replace_a_file_at_once_write_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two machines they can be processes of one number; the last to end is what stays."""
    path = tmp_path / "file"
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with replaced(path) as one:
        one.write(b"one, ")
        with replaced(path) as other:
            other.write(b"other")
        assert path.read_bytes() == b"other"
        one.write(b"whole")
    assert path.read_bytes() == b"one, whole"
    assert os.listdir(tmp_path) == [path.name]


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with replaced(tmp_path / "file"):
        (beside,) = tmp_path.iterdir()
    beside.touch()
    (tmp_path / ".file.1234.part").touch()  # of a version that named it after its process
    kept = {"file", "1.jpg.part", ".file.part", ".file.mine.part", "file.1234.part"}
    for name in kept:
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert set(os.listdir(tmp_path)) == kept


def test_a_file_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"gone/\.file\.\d+\.part'$"),
        replaced(tmp_path / "gone" / "file"),
    ):
        pass


def test_tensors_that_do_not_fit_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    for kept in ([], [path.name]):
        with full_disk(), pytest.raises((OSError, SafetensorError), match="File too large"):
            write_tensors(path, {"a": torch.ones(1000)})
        assert os.listdir(tmp_path) == kept
        write_tensors(path, {"a": torch.zeros(2)})
    assert torch.equal(load_file(path)["a"], torch.zeros(2))


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path: Path) -> None:
    file, metadata = tmp_path / "file.safetensors", {name: f"é {name}" for name in "badfce"}
    written = set()
    for _ in range(10):
        write_tensors(file, {"x": torch.ones(3)}, metadata)
        written.add(file.read_bytes())
    assert len(written) == 1
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == metadata
        assert torch.equal(opened.get_tensor("x"), torch.ones(3))


def test_rows_are_written_block_by_block(tmp_path: Path) -> None:
    file, rows = tmp_path / "rows.safetensors", {name: torch.randn(5, 2, 3) for name in "ba"}
    given: list[weakref.ref[torch.Tensor]] = []

    def blocks(name: str) -> Iterator[torch.Tensor]:
        for first, end in ((0, 2), (2, 2), (2, 5)):
            assert sum(block() is not None for block in given) <= 1  # the one before
            block = rows[name][first:end].mT
            given.append(weakref.ref(block))
            yield block

    tensors = {name: ((5, 3, 2), blocks(name)) for name in rows}
    write_rows(file, tensors | {"none": ((0, 4), [torch.empty(0, 4)])})
    saved = load_file(file)
    assert all(torch.equal(saved[name], rows[name].mT) for name in rows)
    assert saved["none"].shape == (0, 4)
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # so tensors are aligned
    assert os.listdir(tmp_path) == [file.name]


def test_folders_are_made_and_flushed_with_those_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(files, "flush", flushed.append)
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert flushed == [tmp_path, tmp_path / "a"]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


HOLD = """
import os, sys
from pathlib import Path
from abe.files import locked

with locked(Path(sys.argv[1]), "taken"):
    if os.fork():  # as a process that reads images
        print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process_whatever_that_has_started(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"kept")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="it is taken"), locked(path, "it is taken"):
            pass
        process.kill()
        process.wait()
        with locked(path, "it is taken") as file:  # while the process that it forked goes on
            file.write(b", and more")
        assert path.read_bytes() == b"kept, and more"


def test_a_lock_holds_within_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    ask = (
        "import sys; from pathlib import Path; from abe.files import locked\n"
        "with locked(Path(sys.argv[1]), 'taken'): pass"
    )
    (tmp_path / "link").symlink_to(path)
    with locked(path, "taken"):
        for same in (path, tmp_path / "link"):
            with pytest.raises(InputError, match="taken"), locked(same, "taken"):
                pass
        other = subprocess.run([sys.executable, "-c", ask, path], capture_output=True, text=True)
        assert other.stderr.endswith("TakenError: taken\n")
    for _ in range(2):
        with locked(path, "taken"):
            pass


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with (
        pytest.warns(UserWarning, match=r"lock cannot be locked \(No locks available\): see to it"),
        locked(tmp_path / "lock", "it is taken") as file,
    ):
        assert not file.closed


def test_windows_locks_by_its_own_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def locking(descriptor: int, mode: int, count: int) -> None:
        asked.append((mode, count))
        if len(asked) == 2:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(sys, "platform", "win32")
    with locked(tmp_path / "lock", "it is taken"):
        pass
    with pytest.raises(InputError, match="it is taken"), locked(tmp_path / "lock", "it is taken"):
        pass
    assert asked == [(2, 1), (2, 1)]
