"""Devices, precision, what commands are called, signals and memory."""

from __future__ import annotations

import json
import math
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from abe import runtime
from abe.errors import InputError
from abe.runtime import (
    Precision,
    StopSignal,
    autocast,
    available_memory,
    bfloat16_is_faster,
    choose_device,
    choose_precision,
    environment,
    resume_command,
    seed_step,
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


# --- Commands ----------------------------------------------------------------------------------


def test_commands_are_told_as_they_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/abe", "train"])
    assert resume_command(Path("runs/a")) == ".venv/bin/abe train --resume runs/a"
    monkeypatch.setattr(sys, "argv", ["my_script.py"])
    assert resume_command(Path("runs/a")) == "abe train --resume runs/a"
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/abe")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/abe", "train"])
    assert resume_command(Path("runs/a")) == "abe train --resume runs/a"


def test_resume_command_can_be_pasted_into_a_shell() -> None:
    command = resume_command(Path("my runs/it's [red]"))
    assert shlex.split(command) == ["abe", "train", "--resume", "my runs/it's [red]"]


# --- Signals -----------------------------------------------------------------------------------


def test_a_run_in_another_thread_leaves_signals_alone() -> None:
    before, heard = signal.getsignal(signal.SIGINT), []

    def listen() -> None:
        with StopSignal().listening() as stop:
            heard.append((stop.received, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [(None, before)]


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


# --- Memory ------------------------------------------------------------------------------------


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
