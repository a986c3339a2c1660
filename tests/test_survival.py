"""Runs that are killed, stopped, out of space or damaged end as if nothing had happened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from abe.checkpoint import checkpoints, load_latest, save_checkpoint
from abe.config import Config
from abe.data.loader import Batch
from abe.errors import InputError
from abe.files import locked, read_json, read_json_lines
from abe.losses import EnsembleLoss
from abe.recipes import get_recipe
from abe.train import Trainer

SILENT = Console(quiet=True)

# As small as a network and its images can be, with a checkpoint every two steps.
SETTINGS = [
    "device=cpu",
    "precision=fp32",
    "seed=6",  # where neither the first nor the last checkpoint is the best
    "train.lr=0.1",
    "model.num_learners=2",
    "model.embedding_dim=4",
    "model.attention_depth=1",
    "model.weights=null",
    "data.resize=36",
    "data.crop=32",
    "data.synthetic_classes=8",
    "data.synthetic_images=3",
    "data.val_classes=0.5",
    "data.cache=true",
    "train.steps=6",
    "train.batch_size=4",
    "train.images_per_class=2",
    "train.eval_every=2",
    "train.log_every=2",
]


class Abe:
    """The command `abe`, in processes forked from one that has imported it all.

    Each is a process of its own, that can be killed, but does not take seconds to start.
    """

    SCRIPT = """
        import json, os, signal, sys, traceback
        import abe.cli, abe.recipes, abe.train, sklearn.cluster, torch

        weight = torch.nn.Parameter(torch.zeros(1))
        torch.optim.SGD([weight]).zero_grad()  # imports a thousand files

        def watch(folder, dies_at):
            'Tell of every change in a folder, and be killed before the one of that number.'
            seen = 0
            def hook(event, arguments):
                nonlocal seen
                changes = event.startswith("os.") or event == "open" and arguments[2] & 3
                if changes and arguments and str(arguments[0]).startswith(folder):
                    print(event, arguments[0], flush=True)
                    seen += 1
                    if seen == dies_at:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)

        for line in sys.stdin:
            words, output, folder, dies_at = json.loads(line)
            process = os.fork()
            if not process:
                written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(written, 1)
                os.dup2(written, 2)
                sys.argv = ["abe", *words]
                status = 0
                if folder:
                    watch(folder, dies_at)
                try:
                    abe.cli.main()
                except SystemExit as end:
                    status = end.code or 0
                except BaseException:
                    traceback.print_exc()
                    status = 1
                sys.stdout.flush()
                os._exit(status)
            print(process, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    """

    def __init__(self, folder: Path) -> None:
        self._output = folder / "output"
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(self.SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, *words: object, folder: str | None = None, dies_at: int = 0) -> int:
        """Start a command; -> its process. `folder` and `dies_at`: see `watch`."""
        words = tuple(map(str, words))
        line = [words, str(self._output), folder, dies_at]
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """Status, negative for a signal, and what the command printed."""
        status = int(self._process.stdout.readline())
        return status, self._output.read_text()

    def __call__(self, *words: object, **options: Any) -> tuple[int, str]:
        self.start(*words, **options)
        return self.wait()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def abe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Abe]:
    abe = Abe(tmp_path_factory.mktemp("abe"))
    yield abe
    abe.close()


def configured(*settings: str) -> Config:
    return get_recipe("photographs").with_overrides([*SETTINGS, *settings])


def begin(run: Path, *settings: str) -> list[str]:
    assignments = (f"--set={setting}" for setting in (*SETTINGS, *settings))
    return ["train", "--run", str(run), *assignments]


def go_on(run: Path, *settings: str) -> list[str]:
    """What a user gives after a kill."""
    return ["train", "--resume", str(run)] if checkpoints(run) else begin(run, *settings)


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves, times apart."""
    left: dict[str, Any] = {}
    for path in [run / "embeddings.safetensors", *run.glob("checkpoints/*/*")]:
        left[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    left["log"] = read_json_lines(run / "metrics.jsonl")
    for line in left["log"]:
        line.pop("images_per_second", None)
    for name in ("result", "config", "environment", "images"):
        left[name] = read_json(run / f"{name}.json")
    del left["result"]["date"]
    left["files"] = sorted(path.name for path in run.iterdir())
    left["record"] = read_json_lines(run.parent / "runs.jsonl")[-1] | {"date": None}
    return left


@pytest.fixture(scope="module")
def undisturbed(abe: Abe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    status, printed = abe(*begin(run))
    assert status == 0, printed
    assert read_json(run / "result.json")["selected_step"] in (2, 4)  # neither the first nor last
    return run


# --- Killed ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_20_random_moments(abe: Abe, undisturbed: Path, tmp_path: Path) -> None:
    expected = outcome(undisturbed)
    started = time.perf_counter()
    assert abe(*begin(tmp_path / "again" / "run"))[0] == 0
    lasted = time.perf_counter() - started
    moments = random.Random(0)
    killed = 0
    for trial in range(20):
        run = tmp_path / str(trial) / "run"
        process = abe.start(*begin(run))
        time.sleep(lasted * moments.random())
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        status, printed = abe.wait()
        if status == 0:  # was done, so it takes less by now
            lasted *= 0.8
        else:
            assert status == -signal.SIGKILL, printed
            killed += 1
            status, printed = abe(*go_on(run))
            assert status == 0, printed
        assert outcome(run) == expected
    assert killed >= 10


@pytest.mark.slow
def test_killed_between_two_changes_of_the_run_s_folder(
    abe: Abe, undisturbed: Path, tmp_path: Path
) -> None:
    """While a run begins, a checkpoint is written or removed, and the result is."""
    expected = outcome(undisturbed)
    run = tmp_path / "watched" / "run"
    status, printed = abe(*begin(run), folder=f"{run}/")
    assert status == 0, printed
    changes = [line for line in printed.splitlines() if f" {run}/" in line]
    moments = {
        [number for number, change in enumerate(changes, 1) if re.search(kind, change)][which]
        for kind, which in (
            ("images.json", 0),
            (r"chmod .*/\.training\.safetensors", 0),
            ("rename .*meta.json", 2),
            ("rename .*/.unfinished$", -1),
            ("rmdir", 0),  # of a checkpoint that is superseded
            ("scandir", -2),  # before the last one is
            ("embeddings", 1),
            ("result.json", -1),
        )
    }
    for dies_at in moments:
        run = tmp_path / str(dies_at) / "run"
        status, printed = abe(*begin(run), folder=f"{run}/", dies_at=dies_at)
        assert status == -signal.SIGKILL, printed
        status, printed = abe(*go_on(run))
        assert status == 0, printed
        assert outcome(run) == expected, changes[dies_at - 1]


# --- Damaged -----------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (flip, "meta.json"),
        (cut, "meta.json"),
        (flip, "model.safetensors"),
        (empty, "training.safetensors"),
        (Path.unlink, "training.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_done_again(
    damage: Callable[[Path], None],
    name: str,
    abe: Abe,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    expected = outcome(undisturbed)
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    damage(checkpoints(run)[-1] / name)
    status, printed = abe("train", "--resume", run)
    assert status == 0, printed
    (warning,) = [line for line in printed.splitlines() if "checkpoint before it" in line]
    assert warning.startswith(f"warning: {checkpoints(run)[-1] / name} ")
    shutil.rmtree(run / "checkpoints" / "damaged-step-00000006")
    assert outcome(run) == expected


# --- Out of space ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_becomes_full(abe: Abe, undisturbed: Path, tmp_path: Path) -> None:
    """At its first byte, and where each checkpoint is written; then more is given."""
    expected = outcome(undisturbed)
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess[str]:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    if mount("size=4k").returncode:
        pytest.skip("may not mount a small disk here")
    run = disk / "run"
    stopped_at = []
    try:
        for pages in (2, 8, 2_000, 14_000, 30_000, 100_000):
            assert mount(f"remount,size={4 * pages}k").returncode == 0
            status, printed = abe(*go_on(run))
            if status == 0:
                break
            assert status == 2, printed
            (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
            assert error.startswith(f"error: {disk}")
            assert "No space left on device" in error
            stopped_at.append(load_latest(run).step if checkpoints(run) else None)
        assert len(set(stopped_at)) >= 3, stopped_at
        assert outcome(run) == expected
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_log_that_cannot_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    # TensorBoard's thread would fail as well, or not, as it is scheduled.
    config = configured("train.log_every=1", "train.eval_every=6", "tracking=none")
    step, limits = Trainer.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def step_with_little_space(trainer: Trainer, batch: Batch) -> EnsembleLoss:
        if trainer.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 100, limits[1]))
        return step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_with_little_space)
        try:
            with pytest.raises(InputError) as error:
                Trainer(config, run, SILENT).fit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"{log} cannot be written (File too large): make room for it or see to its permissions; "
        f"to go on: abe train --resume {run}"
    )
    assert not log.read_text().endswith("\n")
    assert Trainer.resume(run, SILENT).fit() is not None
    steps = [line["step"] for line in read_json_lines(log)]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 6]


def test_the_log_is_on_the_disk_before_the_checkpoint_that_it_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a power cut may take what is not."""
    run, flushed, fsync = tmp_path / "run", {}, os.fsync

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        flushed[found.st_ino] = found.st_size

    def save(*arguments: Any, **options: Any) -> Path:
        log = (run / "metrics.jsonl").stat()
        assert flushed[log.st_ino] == log.st_size
        assert run.stat().st_ino in flushed
        flushed.clear()
        return save_checkpoint(*arguments, **options)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr("abe.train.save_checkpoint", save)
    assert Trainer(configured("train.steps=2"), run, SILENT).fit() is not None
    assert len(checkpoints(run)) == 2


# --- Two at once -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_process_is_refused(abe: Abe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    early = Trainer(configured(), run, SILENT)
    endless = ("train.steps=1000000", "data.workers=2", "data.cache=false")
    process = abe.start(*begin(run, *endless))
    try:
        for _ in range(1000):
            if checkpoints(run):
                break
            time.sleep(0.1)
        for attempt in (
            early.fit,
            lambda: Trainer(configured(), run, SILENT),
            lambda: Trainer.resume(run, SILENT),
        ):
            with pytest.raises(InputError, match=f"{run} is being trained by another process: w"):
                attempt()
    finally:
        os.kill(process, signal.SIGKILL)
        assert abe.wait()[0] == -signal.SIGKILL
    with locked(run / ".lock", "the processes that read images have it still"):
        pass
    with pytest.raises(InputError, match=f"{run} has been trained by another process meanwhile"):
        early.fit()


# --- Exactly -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        (
            "train.sampler=pairs",
            "train.schedule=steps",
            "train.decay_every=2",
            "train.clip_norm=0.5",
            "data.workers=2",
            "data.cache=false",
        ),
        (
            "train.optimizer=adamw",
            "train.metric_loss=ProxyAnchorLoss()",
            "train.schedule=cosine",
            "train.warmup=5",
            "train.divergence_warmup=6",
        ),
        (
            "model.backbone=googlenet_bn",
            "train.metric_loss=TripletMarginLoss(triplets_per_anchor=2)",  # drawn at random
        ),
        ("train.optimizer=adamw", "train.sampler=pairs", "train.metric_loss=SoftTripleLoss()"),
    ],
    ids=["sgd", "adamw-proxies", "batch-norm-random", "adamw-pairs"],
)
def test_whoever_stops_gets_where_it_was_going(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after steps 1 and 4; all of the last checkpoint is the same to the bit."""
    config = configured("train.steps=7", "train.eval_every=3", *settings)
    whole, stopped = (tmp_path / name / "run" for name in ("whole", "stopped"))
    record = Trainer(config, whole, SILENT).fit()
    assert record is not None
    step = Trainer.train_step

    def step_then_stop(trainer: Trainer, batch: Batch) -> EnsembleLoss:
        loss = step(trainer, batch)
        if trainer.step in (1, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(Trainer, "train_step", step_then_stop)
    assert Trainer(config, stopped, SILENT).fit() is None
    assert Trainer.resume(stopped, SILENT).fit() is None
    resumed = Trainer.resume(stopped, SILENT).fit()
    assert resumed is not None
    assert resumed | {"date": None} == record | {"date": None}
    for name in ("model.safetensors", "training.safetensors", "meta.json"):
        found, expected = (checkpoints(run)[-1] / name for run in (stopped, whole))
        assert found.read_bytes() == expected.read_bytes(), name


def test_another_start_is_not_taken_for_that_of_the_run(tmp_path: Path) -> None:
    file, run = tmp_path / "start.safetensors", tmp_path / "run"
    weights = {"inception_3a.1x1.bias": torch.zeros(64)}
    save_file(weights, file)
    trainer = Trainer(configured(f"model.weights={file}", "train.steps=1"), run, SILENT)
    assert trainer.fit() is not None
    save_file(weights | {"inception_3a.5x5.bias": torch.zeros(32)}, file)
    with pytest.raises(
        InputError, match=rf"start\.safetensors: not the pretrained start that {run}"
    ):
        Trainer.resume(run, SILENT)
