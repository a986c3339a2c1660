"""Several processes that train one network: equal to one process, however they were started."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import helpers
import pytest
import torch
from helpers import EMBEDDINGS
from rich.console import Console
from safetensors.torch import load_file, save_file

from abe.checkpoint import checkpoints
from abe.config import Config
from abe.errors import InputError
from abe.evaluate import evaluate_run
from abe.files import read_json, read_json_lines
from abe.launch import launched_rank
from abe.ranks import Ranks, _join, share
from abe.train import Trainer

SILENT = Console(quiet=True)
ABE = Path(sys.executable).with_name("abe")
TORCHRUN = Path(sys.executable).with_name("torchrun")

TINY = helpers.TINY.with_overrides(
    [
        "model.weights=googlenet-mini-imagenet-v2",
        "data.synthetic_classes=16",
        "data.synthetic_images=9",
        "data.val_classes=0.4",
        "train.lr=0.01",
    ]
)

PROGRAM = """
import os
os.environ.update(environment)
import json, signal
from pathlib import Path
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from abe.config import Config
from abe.data.loader import training_batches
from abe.errors import InputError
from abe.launch import launched_rank
from abe.model import AttentionEnsemble
from abe.evaluate import evaluate_run
from abe.train import Trainer
torch.set_num_threads(1)
silent, run = Console(quiet=True), Path(folder)
run.mkdir(exist_ok=True)
rank = launched_rank() or 0
config = Config.from_json(json.loads(settings))
"""
TRAIN = """
trainer = Trainer(config, run, silent)
trainer.fit()
"""
RESUME = """
Trainer.resume(run, silent).fit()
"""
SIGNALLED = """
step = Trainer.train_step
def step_and_signal(trainer, batch):
    loss = step(trainer, batch)
    if trainer.step == 1 and rank == 1:
        os.kill(os.getpid(), signal.Signals[name])
    return loss
Trainer.train_step = step_and_signal
try:
    assert Trainer(config, run, silent).fit() is None
except InputError as error:
    Path(f"{folder} {rank}.txt").write_text(str(error))
"""


def environment_of(launcher: str, rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher sets for each process, on one machine."""
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if launcher == "srun":
        return store | {
            "SLURM_JOB_NAME": "abe",
            "SLURM_NTASKS": str(size),
            "SLURM_NTASKS_PER_NODE": str(size),
            "SLURM_NNODES": "1",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
        }
    fabric_run = {"LT_CLI_USED": "1", "LT_DEVICES": str(size), "LT_NUM_NODES": "1"}
    return (
        (fabric_run if launcher == "fabric run" else {})
        | store
        | {
            "TORCHELASTIC_RUN_ID": "none",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "GROUP_RANK": "0",
        }
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_ranks(
    size: int,
    program: str,
    folder: Path,
    config: Config = TINY,
    *,
    launcher: str = "torchrun",
    started: int | None = None,
    **values: Any,
) -> list[int | None]:
    """Exit codes of `size` processes that run a program; 1 of them is started by itself."""
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    processes = []
    for rank in range(size if started is None else started):
        environment = environment_of(launcher, rank, size, port) if size > 1 else {}
        known = {
            "environment": environment,
            "folder": str(folder),
            "settings": json.dumps(config.to_json()),
            **values,
        }
        processes.append(context.Process(target=exec, args=(PROGRAM + program, known)))
    for process in processes:
        process.start()
    deadline = time.monotonic() + 300
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints(run)[-1]
    return load_file(newest / "model.safetensors") | load_file(newest / "training.safetensors")


def losses(run: Path) -> list[float]:
    return [
        line["loss"]
        for line in read_json_lines(run / "metrics.jsonl", cut_off=True)
        if "loss" in line
    ]


# --- Equal to one process ----------------------------------------------------------------------

IN_FLOAT64 = """
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
forward = AttentionEnsemble.forward
AttentionEnsemble.forward = lambda model, images, **told: forward(model, images.double(), **told)
trainer = Trainer(config, run, silent)
found, contiguous = {}, {"memory_format": torch.contiguous_format}
for batch in training_batches(
    trainer.splits.train, trainer.sampler, trainer.preprocessing,
    seed=0, start_step=0, stop_step=2, part=trainer.ranks.part,
):
    found[f"loss {trainer.step}"] = trainer.train_step(batch).total.detach()
    for i, group in enumerate(trainer.optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            found[f"gradient {trainer.step} {i} {j}"] = parameter.grad.clone(**contiguous)
            found[f"weight {trainer.step} {i} {j}"] = parameter.detach().clone(**contiguous)
if trainer.ranks.size == 1:
    save_file(found, expected)
else:
    torch.testing.assert_close(found, load_file(expected), rtol=1e-9, atol=1e-12)
    Path(f"{folder} {rank} is the same").touch()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.sampler=pairs", "train.normalization=per_image"],
        ["train.metric_loss=ProxyAnchorLoss()", "train.clip_norm=1", "train.chunk_size=2"],
    ],
    ids=["pairs", "classes, proxies, chunks"],
)
def test_ranks_compute_what_one_process_does(overrides: list[str], tmp_path: Path) -> None:
    """Each loss, gradient and weight of two steps.

    8 images on 3 ranks are 2, 3 and 3, and in chunks of 2 one chunk, two and two.
    """
    small = ["data.synthetic_classes=8", "data.synthetic_images=4", "data.val_classes=0.5"]
    config = TINY.with_overrides([*small, "data.cache=false", "train.log_every=9", *overrides])
    file = tmp_path / "expected.safetensors"
    for size in (1, 2, 3):
        codes = on_ranks(size, IN_FLOAT64, tmp_path / str(size), config, expected=str(file))
        assert codes == [0] * size
    expected = load_file(file)
    assert len([name for name in expected if name.startswith("loss")]) == 2
    assert all(tensor.dtype == torch.float64 for tensor in expected.values())
    assert any(tensor.abs().max() > 1e-3 for name, tensor in expected.items() if "grad" in name)
    same = sorted(path.name for path in tmp_path.glob("* is the same"))
    assert same == [f"{size} {rank} is the same" for size in (2, 3) for rank in range(size)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    assert Trainer(TINY, run, SILENT).fit() is not None
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "size"), [("torchrun", 3), ("fabric run", 2), ("srun", 2)], ids=str
)
def test_ranks_score_exactly_as_one_process_does(
    launcher: str, size: int, alone: Path, tmp_path: Path, one_thread: None
) -> None:
    """72 test images are 2 batches, so that of 3 ranks one has nothing to embed."""
    score = "Path(output, str(rank)).write_text(json.dumps(evaluate_run(run)))"
    codes = on_ranks(size, score, alone, launcher=launcher, output=str(tmp_path))
    assert codes == [0] * size
    expected = evaluate_run(alone)
    for rank in range(size):
        record = json.loads((tmp_path / str(rank)).read_text())
        assert record["scores"] == expected["scores"]
        assert record["environment"]["ranks"] == size


SEARCH = """
from safetensors.torch import load_file
from abe.evaluate import score
from abe.metrics import retrieval_metrics
from abe.neighbors import nearest_neighbors
from abe.ranks import Ranks
from abe.report.pictures import nearest_others
from abe.results import write_result
ranks, found = Ranks("cpu"), {}
for name, whole in load_file(f"{folder}.safetensors").items():
    labels = torch.arange(len(whole)) % 60
    for separate in (False, True):
        query, items = (whole[:120], whole[120:]) if separate else (whole, None)
        def own(rows):
            if rows is None or ranks.size == 1:
                return rows
            first, last = [0, 7, 7, len(rows)][rank : rank + 2]
            return rows[first:last] if first < last else rows.new_empty(0, 0)
        of_items = labels[120:] if separate else None
        case = own(query), labels[:len(query)], [1, 2, 100], own(items), of_items
        metrics, hits = retrieval_metrics(*case, ranks=ranks)
        found[f"{name}, {separate}"] = [
            metrics,
            hits.tolist(),
            nearest_neighbors(own(query), own(items), 9, ranks=ranks).indices.tolist(),
            nearest_others(own(query), own(items), [5, 7, 110], 9, ranks),
        ]
    learners = whole.view(-1, 2, whole.shape[1] // 2)
    shard = own(learners)
    if not len(shard):
        shard = learners[:0]
    scores = ranks.from_first(score(shard, labels, [1, 2], ranks=ranks))
    found[f"{name}, learners"] = scores
write_result(run / "saved", {"method": "ABE"}, shard, shard, ranks)
Path(f"{folder} {rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_ranks_search_each_others_images_exactly_as_one_process_does(tmp_path: Path) -> None:
    """Of three ranks the first has 7 images, the second none and the third all others."""
    chosen = ("unit length", "duplicates", "last bits", "collapsed", "float64")
    written = {name: EMBEDDINGS[name].contiguous() for name in chosen}
    for size in (1, 3):
        save_file(written, tmp_path / f"{size}.safetensors")
        assert on_ranks(size, SEARCH, tmp_path / str(size)) == [0] * size
    expected = json.loads((tmp_path / "1 0.json").read_text())
    for rank in range(3):
        assert json.loads((tmp_path / f"3 {rank}.json").read_text()) == expected
    saved = [tmp_path / size / "saved" / "embeddings.safetensors" for size in ("1", "3")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


# --- The command -------------------------------------------------------------------------------


def command(run: Path, config: Config, *options: str) -> list[str]:
    """`abe train` under torchrun."""
    settings = [f"--set={key}" for key in flat(config.to_json())]
    return [str(TORCHRUN), *options, "-m", "--", "abe.cli", "train", "--run", str(run), *settings]


def flat(values: dict[str, Any], prefix: str = "") -> list[str]:
    items = []
    for key, value in values.items():
        if isinstance(value, dict):
            items += flat(value, f"{prefix}{key}.")
        else:
            items.append(f"{prefix}{key}={json.dumps(value)}")
    return items


@pytest.mark.slow
def test_torchrun_trains_what_one_process_trains(alone: Path, tmp_path: Path) -> None:
    config = TINY.with_overrides(["tracking=tensorboard", "data.cache=false"])
    done = subprocess.run(
        command(tmp_path / "two", config, "--nproc-per-node=2", f"--master-port={free_port()}"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Result added to") == done.stderr.count("Scoring 72 test images") == 1
    assert "warning" not in done.stderr
    assert len(read_json_lines(tmp_path / "runs.jsonl")) == 1
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    result, expected = (read_json(run / "result.json") for run in (tmp_path / "two", alone))
    assert result["scores"]["ensemble"] == pytest.approx(expected["scores"]["ensemble"], abs=0.03)
    alike = TINY.with_overrides(["data.cache=false"])
    assert result["config_digest"] == alike.digest
    assert expected["config_digest"] == TINY.digest
    torch.testing.assert_close(weights(tmp_path / "two"), weights(alone), rtol=1e-3, atol=1e-5)


def test_other_verbs_are_one_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [ABE, "demo"],
        cwd=tmp_path,
        env=os.environ | environment_of("torchrun", 1, 2, 0),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error, rank 1: abe demo is one process: only `abe train` and")


def test_a_shell_that_slurm_gave_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in environment_of("srun", 3, 4, 0).items():
        monkeypatch.setenv(key, value)
    assert launched_rank() == 3
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert launched_rank() is None


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them, 10.213.77.1 and 10.213.77.2."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    names = (f"abe{os.getpid()}a", f"abe{os.getpid()}b")
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "abe0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "abe0",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.213.77.{number}/30", "dev", "abe0")
            for link in ("lo", "abe0"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root and iproute2 to make network namespaces: {error}")
    finally:
        for name in names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


@pytest.mark.slow
def test_two_machines_train_until_one_is_cut_off(
    machines: tuple[str, str], alone: Path, tmp_path: Path
) -> None:
    """In a step, and not while a rank waits for what another does alone, which may take long."""
    run = tmp_path / "run"
    settings = ["train.steps=100000", "train.eval_every=100", "train.log_every=1"]
    config = TINY.with_overrides([*settings, "ranks_timeout=20"])
    options = ("--nnodes=2", "--master-addr=10.213.77.1")
    processes = [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", name),
                *command(run, config, *options, f"--node-rank={rank}"),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "abe0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(machines)
    ]
    try:
        started = time.monotonic()
        while len(checkpoints(run)) < 2 or len(losses(run)) < 102:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() - started < 240
            time.sleep(0.05)
        subprocess.run(["ip", "-n", machines[1], "link", "set", "abe0", "down"], check=True)
        told = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun ends those that it has started
            process.wait()
    for rank in (0, 1):
        assert processes[rank].returncode
        assert f"rank {rank} of 2 has lost another one" in told[rank], told[rank]
        assert f"; to go on: abe train --resume {run}" in told[rank]
    assert losses(run)[:2] == pytest.approx(losses(alone)[:2], rel=1e-3)
    assert Trainer.resume(run, SILENT).step == 100


# --- Stopped, lost, and resumed ----------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_they_go_on(tmp_path: Path) -> None:
    """To the bit with as many ranks; with rounding of its own with another number."""
    config = TINY.with_overrides(["train.steps=4", "train.eval_every=4"])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert on_ranks(3, TRAIN, whole, config) == [0] * 3
    assert on_ranks(3, SIGNALLED, stopped, config, name="SIGTERM") == [0] * 3
    assert [path.name for path in checkpoints(stopped)] == ["step-00000000", "step-00000001"]

    single = shutil.copytree(stopped, tmp_path / "single")
    assert on_ranks(3, RESUME, stopped) == [0] * 3
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(stopped)[name]), name
    expected = read_json(whole / "result.json")["scores"]
    assert read_json(stopped / "result.json")["scores"] == expected

    assert Trainer.resume(single, SILENT).fit() is not None
    torch.testing.assert_close(weights(single), weights(whole), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_rank_that_is_killed_stops_the_others_with_what_to_do(tmp_path: Path) -> None:
    """At once, whatever the time that they would wait for a slow one."""
    run, patient = tmp_path / "run", TINY.with_overrides(["ranks_timeout=3600"])
    assert on_ranks(3, SIGNALLED, run, patient, name="SIGKILL") == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        told = Path(f"{run} {rank}.txt").read_text()
        assert told.startswith(f"rank {rank} of 3 has lost another one, which ended or did not ")
        assert told.endswith(f"; to go on: abe train --resume {run}")


@pytest.mark.slow
def test_what_ranks_cannot_work_with_is_told(tmp_path: Path) -> None:
    program = """
def told(*overrides):
    try:
        Trainer(config.with_overrides(overrides), run / overrides[-1], silent)
    except InputError as error:
        return str(error)
errors = [
    told("model.backbone=resnet50", "model.weights=none"),
    told("device=cuda:0"),
    told(f"seed={rank}"),
]
Path(f"{folder} {rank}.json").write_text(json.dumps(errors))
"""
    assert on_ranks(2, program, tmp_path / "run") == [0, 0]
    for rank in (0, 1):
        batch_norm, device, settings = json.loads((tmp_path / f"run {rank}.json").read_text())
        assert "this backbone has batch norm" in batch_norm
        assert device.startswith("device=cuda:0: several processes take auto, cpu or cuda")
        first = f"rank {rank} of 2 has lost another one", f"rank {rank} has settings "
        assert settings.startswith(first[rank])


@pytest.mark.slow
def test_all_ranks_take_the_checkpoints_that_the_first_does(alone: Path, tmp_path: Path) -> None:
    """A folder that machines share may show an older listing for a while."""
    run = shutil.copytree(alone, tmp_path / "run")
    program = """
import abe.checkpoint
listed = abe.checkpoint.checkpoints
if rank == 1:
    abe.checkpoint.checkpoints = lambda run: listed(run)[:1]
assert Trainer.resume(run, silent).fit() and evaluate_run(run)
"""
    assert on_ranks(2, program, run) == [0, 0]


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_told(tmp_path: Path) -> None:
    program = """
try:
    Trainer(config, run, silent)
except InputError as error:
    Path(f"{folder}.txt").write_text(str(error))
"""
    config = TINY.with_overrides(["ranks_timeout=2"])
    assert on_ranks(2, program, tmp_path / "run", config, started=1) == [0]
    assert (tmp_path / "run.txt").read_text().startswith("not all processes came within 2 seconds")


def test_several_processes_leave_an_apple_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("lightning_fabric.Fabric", mock := MagicMock())
    _join("auto", timeout=1)
    assert mock.call_args.kwargs["accelerator"] == "cpu"


def test_a_batch_has_an_image_for_each_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require_same(ranks: Ranks, **values: object) -> None:
        ranks.size = 9 if "images" in values else 1

    monkeypatch.setattr(Ranks, "require_same", require_same)
    with pytest.raises(
        InputError, match=r"train\.batch_size=8 has no image for each of 9 processes"
    ):
        Trainer(TINY, tmp_path / "run", SILENT)


@pytest.mark.parametrize(("count", "parts"), [(0, 3), (2, 3), (8, 1), (8, 3), (64, 7)])
def test_shares_cover_the_batch_and_differ_by_one(count: int, parts: int) -> None:
    shares = [range(count)[share(count, (part, parts))] for part in range(parts)]
    assert [row for own in shares for row in own] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
