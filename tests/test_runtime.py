"""Devices, precision, files that are whole or not there, and signals."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from abe import runtime
from abe.errors import InputError
from abe.runtime import (
    Precision,
    StopSignal,
    append_json_line,
    autocast,
    available_memory,
    bfloat16_is_faster,
    choose_device,
    choose_precision,
    environment,
    locked,
    make_folder,
    read_json_lines,
    replace_text,
    resume_command,
    seed_step,
    write_json,
    write_tensors,
)

CPU = torch.device("cpu")

# --- Device and precision ----------------------------------------------------------------------


def test_cpu_can_always_be_chosen() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device().type in {"cpu", "cuda", "mps"}


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_a_gpu_where_there_is_one(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == expected


@pytest.mark.parametrize("name", ["gpu", "meta", "xla", "", "cpu:", "cpu:x", "cpu0", "CPU"])
def test_unknown_device(name: str) -> None:
    with pytest.raises(InputError, match=f"^device={name} .*: use auto"):
        choose_device(name)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match=f"^device={name}: PyTorch finds no CUDA GPU here"):
            choose_device(name)


@pytest.mark.gpu
def test_a_second_gpu_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"^device=cuda:99 cannot be used"):
        choose_device("cuda:99")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
def test_an_apple_gpu_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"^device=mps cannot be used \(.*\): use auto or cpu"):
        choose_device("mps")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, "fp32"),
        ({"avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ],
)
def test_auto_precision_is_what_the_cpu_multiplies(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(runtime, "bfloat16_is_faster", lambda: True)
    assert choose_precision("auto", CPU) == expected
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"


def test_auto_precision_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(runtime, "bfloat16_is_faster", lambda: False)  # of a CPU
    supported = {"including_emulation": False}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **asked: asked == supported)
    assert choose_precision("auto", cuda) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **asked: False)
    assert choose_precision("auto", cuda) == "fp32"
    assert choose_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize(("bf16_seconds", "expected"), [(0.7, "bf16"), (0.8, "fp32"), (2, "fp32")])
def test_auto_precision_is_measured(
    bf16_seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that a pass in bfloat16 moves by so much, and one in float32 by 1."""
    seconds = 0.0

    def watched(device: torch.device, precision: Precision) -> torch.autocast:
        nonlocal seconds
        seconds += bf16_seconds if precision == "bf16" else 1
        return autocast(device, precision)

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(runtime, "autocast", watched)
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: seconds)
    bfloat16_is_faster.cache_clear()
    assert choose_precision("auto", CPU) == expected
    monkeypatch.undo()
    bfloat16_is_faster.cache_clear()
    random_state = torch.get_rng_state()
    assert choose_precision("auto", CPU) in ("fp32", "bf16")
    assert torch.equal(torch.get_rng_state(), random_state)


def test_autocast_multiplies_in_the_precision() -> None:
    matrix = torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (matrix @ matrix).dtype == torch.float32


def test_what_a_step_draws_depends_on_the_seed_and_the_step() -> None:
    def drawn(seed: int, step: int) -> float:
        seed_step(seed, step)
        return torch.rand(()).item()

    assert drawn(3, 5) == drawn(3, 5)
    assert len({drawn(seed, step) for seed in (0, 3, 2**63 - 1) for step in range(10)}) == 30


def test_environment_says_what_a_result_came_from() -> None:
    found = environment(CPU)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["gpu"] is None
    assert found["cpu"]
    assert json.loads(json.dumps(found)) == found


def test_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "src" / "abe" / "runtime.py"
    module.parent.mkdir(parents=True)
    module.write_text("one\n")
    monkeypatch.setattr(runtime, "__file__", str(module))
    assert environment(CPU)["commit"] is None

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    commit = environment(CPU)["commit"]
    assert commit == git("rev-parse", "--short=12", "HEAD").strip()
    module.write_text("two\n")
    assert environment(CPU)["commit"] == f"{commit}+"


# --- Files -------------------------------------------------------------------------------------


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


def test_tensors_replace_a_file_and_leave_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    for value, mode in ((1, 0o640), (2, 0o604)):
        path.touch()
        path.chmod(mode)
        write_tensors(path, {"a": torch.full((2, 3), value).T})
        assert torch.equal(load_file(path)["a"], torch.full((3, 2), value))
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert os.listdir(tmp_path) == [path.name]


def test_tensors_that_do_not_fit_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    for kept in ([], [path.name]):
        with full_disk(), pytest.raises((OSError, SafetensorError), match="File too large"):
            write_tensors(path, {"a": torch.ones(1000)})
        assert os.listdir(tmp_path) == kept
        write_tensors(path, {"a": torch.zeros(2)})
    assert torch.equal(load_file(path)["a"], torch.zeros(2))


def test_folders_are_made_and_flushed_with_those_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(runtime, "flush", flushed.append)
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
from abe.runtime import locked

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
        "import sys; from pathlib import Path; from abe.runtime import locked\n"
        "with locked(Path(sys.argv[1]), 'taken'): pass"
    )
    (tmp_path / "link").symlink_to(path)
    with locked(path, "taken"):
        for same in (path, tmp_path / "link"):
            with pytest.raises(InputError, match="taken"), locked(same, "taken"):
                pass
        assert subprocess.run(
            [sys.executable, "-c", ask, path], stderr=subprocess.DEVNULL
        ).returncode
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


def test_commands_are_told_as_they_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/abe", "train"])
    assert resume_command(Path("runs/a")) == ".venv/bin/abe train --resume runs/a"
    monkeypatch.setattr(sys, "argv", ["my_script.py"])
    assert resume_command(Path("runs/a")) == "abe train --resume runs/a"
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/abe")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/abe", "train"])
    assert resume_command(Path("runs/a")) == "abe train --resume runs/a"


def test_a_run_in_another_thread_leaves_signals_alone() -> None:
    before, heard = signal.getsignal(signal.SIGINT), []

    def listen() -> None:
        with StopSignal().listening() as stop:
            heard.append((stop.received, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [(None, before)]


def test_resume_command_can_be_pasted_into_a_shell() -> None:
    command = resume_command(Path("my runs/it's [red]"))
    assert shlex.split(command) == ["abe", "train", "--resume", "my runs/it's [red]"]


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


# --- Signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_second_stops_at_once(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with StopSignal().listening() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number.name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert {each: signal.getsignal(each) for each in before} == before


def test_the_old_handlers_are_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignal().listening():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory as they like"
)
def test_memory_that_a_step_frees_is_kept_for_the_next() -> None:
    code = """
import sys, torch
from pathlib import Path
from abe.runtime import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

if sys.argv[1] == "kept":
    keep_freed_memory()
before = resident()
tensors = [torch.zeros(2**22) for _ in range(8)]  # 16 MiB each
held = resident() - before
tensors.clear()
print((resident() - before) / held)
"""

    def left(memory: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", code, memory], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    assert left("kept") > 0.8
    assert left("given back") < 0.2


def test_the_memory_that_is_free(tmp_path: Path) -> None:
    """Of the machine, or what the limit of a container leaves, files in memory not counted."""

    assert available_memory(tmp_path) == math.inf
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8 kB\n")
    assert available_memory(tmp_path) == 8192
    group = "sys/fs/cgroup"
    (tmp_path / group).mkdir(parents=True)
    (tmp_path / group / "memory.max").write_text("max\n")
    (tmp_path / group / "memory.current").write_text("700\n")
    (tmp_path / group / "memory.stat").write_text("anon 1\nactive_file 90\ninactive_file 10\n")
    assert available_memory(tmp_path) == 8192
    (tmp_path / group / "memory.max").write_text("1000\n")
    assert available_memory(tmp_path) == 400
    first = tmp_path / group / "memory"
    first.mkdir()
    (first / "memory.limit_in_bytes").write_text("500\n")
    (first / "memory.usage_in_bytes").write_text("450\n")
    (first / "memory.stat").write_text("total_active_file 20\ntotal_inactive_file 30\n")
    assert available_memory(tmp_path) == 100
    assert 0 < available_memory() < 2**50
