"""Checkpoints: what is saved comes back, and what was changed, cut or forged is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from helpers import forge
from safetensors.torch import load_file, save_file

from abe.checkpoint import (
    Best,
    Checkpoint,
    checkpoints,
    load_latest,
    load_selected,
    remove_superseded,
    save_checkpoint,
    set_aside_newer,
    training_tensors,
)
from abe.config import Config, ModelConfig
from abe.data.transforms import Preprocessing
from abe.errors import InputError
from abe.start import build_model

CONFIG = Config(
    seed=3,
    model=ModelConfig(network="m-heads", num_learners=1, embedding_dim=8, weights=None),
)
PREPROCESSING = Preprocessing(channels="RGB", mean=(1.5, 2, 3), scale=(0.1, 0.2, 0.3), resize=300)
ORIGIN = {"source": "start.safetensors", "sha256": "0" * 64}
MODEL = {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)}
TRAINING = {"optimizer.0.momentum_buffer": torch.ones(2, 3), "metric_loss.proxies": torch.ones(4)}
FILES = ("model.safetensors", "training.safetensors", "meta.json")


def save(run: Path, step: int = 12, best: Best | None = None, **changes: Any) -> Path:
    parts: dict[str, Any] = {
        "config": CONFIG,
        "preprocessing": PREPROCESSING,
        "weights": ORIGIN,
        "model": MODEL,
        "training": TRAINING,
    }
    return save_checkpoint(run / "checkpoints", step=step, best=best, **(parts | changes))


def flip(path: Path, offset: int) -> None:
    """Turn one bit."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(run)]


# --- Round trip --------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [None, Best(step=8, recall_at_1=1.0), Best(0, 0.1)])
def test_round_trip(best: Best | None, tmp_path: Path) -> None:
    path = save(tmp_path, best=best)
    assert path == tmp_path / "checkpoints" / "step-00000012"
    assert sorted(os.listdir(path)) == sorted(FILES)
    found = Checkpoint.load(path)
    assert found.path == path
    assert found.step == 12
    assert found.config == CONFIG
    assert found.preprocessing == PREPROCESSING
    assert found.weights == ORIGIN
    assert found.best == best
    for saved, loaded in ((MODEL, found.model), (TRAINING, found.training)):
        assert saved.keys() == loaded.keys()
        for key, value in saved.items():
            assert torch.equal(loaded[key], value)
            assert loaded[key].dtype == value.dtype


def test_a_random_start_has_no_origin(tmp_path: Path) -> None:
    assert Checkpoint.load(save(tmp_path, weights=None)).weights is None


def test_the_network_comes_back(tmp_path: Path) -> None:
    model = build_model(CONFIG).eval()
    path = save(tmp_path, model=model.state_dict())
    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 64)
    found = Checkpoint.load(path).build_model()
    assert not found.training
    with torch.inference_mode():
        assert torch.equal(found(images), model(images))


def test_weights_of_another_network_than_the_configuration_says(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors is of another network than the con"):
        Checkpoint.load(save(tmp_path)).build_model()


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer.1.momentum_buffer": torch.ones(3)},
        {"optimizer.-1.momentum_buffer": torch.ones(3)},
        {"optimizer." + "9" * 5000: torch.ones(3)},
        {"optimizer.0.momentum_buffer": torch.ones(4)},
        {"metric_loss.bias": torch.ones(1)},
        {"metric_loss.weight": torch.ones(4)},
        {},
    ],
    ids=lambda training: str({key[:30]: tuple(value.shape) for key, value in training.items()}),
)
def test_training_state_of_another_network(training: dict, tmp_path: Path) -> None:
    loss = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    found = Checkpoint.load(save(tmp_path, training=training))
    with pytest.raises(InputError, match=r"training\.safetensors is of another network than the c"):
        found.load_training_into(optimizer, loss)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_goes_on(kind: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    def parameters() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.full((2,), 2.0))]

    def make(values: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return kind([{"params": [v], "lr": 0.1} for v in values], **settings)

    def step(optimizer: torch.optim.Optimizer, values: list[torch.nn.Parameter]) -> None:
        optimizer.zero_grad()
        sum((value**3).sum() for value in values).backward()
        optimizer.step()

    ours, others = parameters(), parameters()
    optimizer, other = make(ours), make(others)
    step(optimizer, ours)
    found = Checkpoint.load(save(tmp_path, training=training_tensors(optimizer, None)))
    for value, theirs in zip(ours, others, strict=True):
        theirs.data.copy_(value.data)
    found.load_training_into(other, None)
    for _ in range(3):
        step(optimizer, ours)
        step(other, others)
    for value, theirs in zip(ours, others, strict=True):
        assert torch.equal(value, theirs)


# --- Damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_bit_is_refused(name: str, place: float, tmp_path: Path) -> None:
    path = save(tmp_path)
    size = (path / name).stat().st_size
    flip(path / name, round(place * (size - 1)))
    with pytest.raises(InputError, match=f"{name} was changed or cut since it was written: use"):
        Checkpoint.load(path)


@pytest.mark.parametrize("part", ["format", "step", "config", "preprocessing", "sha256"])
def test_a_flipped_bit_in_a_name_of_meta_json_is_refused(part: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    flip(path / "meta.json", (path / "meta.json").read_bytes().rindex(b'"%s"' % part.encode()) + 1)
    with pytest.raises(InputError, match=rf"meta\.json is damaged \({part}: Field required"):
        Checkpoint.load(path)


def test_a_bit_of_meta_json_that_flips_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, best=Best(8, 0.5))
    whole, content = Checkpoint.load(path), (path / "meta.json").read_bytes()
    places = random.Random(0)
    for position in places.sample(range(len(content)), 400):
        damaged = bytearray(content)
        damaged[position] ^= 1 << places.randrange(8)
        (path / "meta.json").write_bytes(damaged)
        if json_of(bytes(damaged)) == json_of(content):  # a blank became another kind of blank
            assert Checkpoint.load(path).best == whole.best
            continue
        with pytest.raises(InputError, match=re.escape(str(path))):
            Checkpoint.load(path)


def json_of(content: bytes) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_is_refused(name: str, share: float, tmp_path: Path) -> None:
    path = save(tmp_path)
    os.truncate(path / name, int(share * (path / name).stat().st_size))
    with pytest.raises(InputError, match=f"{name} (was changed or cut|cannot be read)"):
        Checkpoint.load(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / name).unlink()
    with pytest.raises(InputError, match=f"{name} (is missing|cannot be read)"):
        Checkpoint.load(path)
    (path / name).mkdir()
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        Checkpoint.load(path)


def test_a_file_with_the_right_hash_that_is_no_safetensors(tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / "model.safetensors").write_bytes(b"no tensors")
    forge(path, sha256={"model.safetensors": hashlib.sha256(b"no tensors").hexdigest()})
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        Checkpoint.load(path)


def test_the_checksum_is_of_the_sorted_rest(tmp_path: Path) -> None:
    path = save(tmp_path, best=Best(8, 0.5))
    before = Checkpoint.load(path)
    forge(path, step=12)  # the same as it was
    assert Checkpoint.load(path).config == before.config
    meta = json.loads((path / "meta.json").read_text())
    for changes in ({"step": 13}, {"best": None}, {"checksum": "0" * 64}):
        (path / "meta.json").write_text(json.dumps(meta | changes))
        with pytest.raises(InputError, match=r"meta\.json was changed or cut since it was written"):
            Checkpoint.load(path)


def test_format_1_is_read(tmp_path: Path) -> None:
    """It knew no checksum of meta.json, and kept torch's random state."""
    training = TRAINING | {"torch_rng": torch.get_rng_state()}
    path = save(tmp_path, best=Best(8, 0.5), training=training)
    expected = Checkpoint.load(path)
    meta = json.loads((path / "meta.json").read_text())
    del meta["checksum"]
    (path / "meta.json").write_text(json.dumps(meta | {"format": 1}))
    found = load_latest(tmp_path)
    for name in ("step", "config", "preprocessing", "weights", "best"):
        assert getattr(found, name) == getattr(expected, name), name
    assert torch.equal(found.model["weight"], MODEL["weight"])
    flip(path / "model.safetensors", 100)
    with pytest.raises(InputError, match=r"model\.safetensors was changed or cut"):
        load_latest(tmp_path)


def test_a_newer_format_is_not_called_damaged(tmp_path: Path) -> None:
    path = save(tmp_path)
    forge(path, format=3, added="something")
    with pytest.raises(InputError, match=r"meta\.json is of format 3, and this .* reads up to 2: "):
        Checkpoint.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 0},
        {"format": None},
        {"format": "1"},
        {"step": -1},
        {"step": "12"},
        {"step": 1.5},
        {"step": True},
        {"config": []},
        {"config": {"seed": "x"}},
        {"config": {"model": 5}},
        {"config": {"unknown": 1}},
        {"config": {"data": {"crop": 9}}},
        {"preprocessing": None},
        {"preprocessing": {"mean": [1, 2]}},
        {"preprocessing": {"mean": [1, 2, float("nan")]}},
        {"preprocessing": {"crop": 10**9}},
        {"preprocessing": {"unknown": 1}},
        {"weights": []},
        {"weights": {"source": 5}},
        {"best": {"step": 1}},
        {"best": {"step": 1, "recall_at_1": "high"}},
        {"best": 5},
        {"sha256": None},
        {"sha256": {"model.safetensors": 5}},
        {"sha256": {"model.safetensors": ""}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_meta_json_that_says_what_it_cannot(changes: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path, best=None)
    forge(path, **changes)
    with pytest.raises(InputError) as error:
        Checkpoint.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"5", b"null", b"{}", b"\xff\xfe", b"[" * 1_000_000, b"9" * 1_000_000],
)
def test_meta_json_that_is_none(content: bytes, tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / "meta.json").write_bytes(content)
    says = r"meta\.json (is damaged|cannot be read|is no JSON object)"
    with pytest.raises(InputError, match=says):
        Checkpoint.load(path)


@pytest.mark.parametrize(
    "key", ["format", "step", "config", "preprocessing", "sha256", "best", "weights", "checksum"]
)
def test_meta_json_without_a_part(key: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    meta = json.loads((path / "meta.json").read_text())
    del meta[key]
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=rf"meta\.json is damaged \({key}: "):
        Checkpoint.load(path)


def test_only_the_folders_own_files_are_read_whatever_sha256_lists(tmp_path: Path) -> None:
    path = save(tmp_path)
    forge(path, sha256={"../../secret": "0" * 64})
    assert Checkpoint.load(path).model.keys() == MODEL.keys()


# --- Writing -----------------------------------------------------------------------------------


def test_a_half_written_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, step=1)

    def stop(tensors: object, path: Path, metadata: object) -> None:
        if "training.safetensors" in path.name:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)

    monkeypatch.setattr("abe.files.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, step=2)
    monkeypatch.undo()
    assert steps(tmp_path) == [1]
    assert load_latest(tmp_path).step == 1
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert len(left) == 2
    save(tmp_path, step=3)  # takes the half one's place
    assert steps(tmp_path) == [1, 3]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, model={"weight": torch.zeros(2)})
    path = save(tmp_path, model={"weight": torch.ones(2)})
    assert steps(tmp_path) == [12]
    assert Checkpoint.load(path).model["weight"].tolist() == [1, 1]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_while_a_step_is_replaced_leaves_the_old_one(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, model={"weight": torch.zeros(2)})
    done = []

    def rename(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(source.replace(target))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, model={"weight": torch.ones(2)})
    for load in (load_latest, load_selected):
        assert load(tmp_path).model["weight"].tolist() == [0, 0]
    save(tmp_path, model={"weight": torch.ones(2)})
    assert load_latest(tmp_path).model["weight"].tolist() == [1, 1]
    assert list((tmp_path / "checkpoints").iterdir()) == [path]


@pytest.mark.parametrize(
    ("again", "expected"),
    [(False, [(1, 0), (2, 1)]), (True, [(2, 0), (1, 0), (2, 1)])],
    ids=["new", "again"],
)
def test_every_state_that_the_disk_goes_through(
    again: bool,
    expected: list[tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy of the run is made around every change; of each a whole checkpoint can be loaded.

    What was not flushed to the disk holds noise in the copy, as it may after a power cut.
    """
    run, fsync = tmp_path / "run", os.fsync
    save(run, 1)
    if again:
        save(run, 2, model={"weight": torch.zeros(2)})
    flushed = {file.stat().st_ino for file in run.rglob("*")}
    states: list[Path] = []

    def copy() -> None:
        states.append(shutil.copytree(run, tmp_path / str(len(states))))
        for file in filter(Path.is_file, run.rglob("*")):
            if file.stat().st_ino not in flushed:
                noise = b"?" * file.stat().st_size
                (states[-1] / file.relative_to(run)).write_bytes(noise)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            copy()
            result = function(*arguments, **options)
            if function is fsync:
                flushed.add(os.fstat(arguments[0]).st_ino)
            copy()
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched(fsync))
        patch.setattr(shutil, "rmtree", watched(shutil.rmtree))
        for name in ("rename", "mkdir", "touch", "chmod"):
            patch.setattr(Path, name, watched(getattr(Path, name)))
        save(run, 2, model={"weight": torch.ones(2)})
    assert len(states) > 20
    seen = []
    for state in states:
        found = load_latest(state)
        seen.append((found.step, found.model["weight"].flatten()[0].item()))
        save(state, 3)
        assert load_latest(state).step == 3
    assert list(dict.fromkeys(seen)) == expected


def test_a_checkpoint_that_may_be_whole_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer, or permissions, say nothing of it."""
    for step in (1, 2):
        save(tmp_path, step=step)
    read, name = Path.read_bytes, f"{os.sep}step-00000002{os.sep}meta.json"

    def refused(path: Path) -> bytes:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        with pytest.raises(InputError, match=r"meta\.json cannot be read \(Perm.*see to its permi"):
            load_latest(tmp_path)
    assert load_latest(tmp_path).step == 2
    scandir = MagicMock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"checkpoints cannot be read .*: see to its permiss"):
        checkpoints(tmp_path)


def test_a_full_disk_is_said_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save(tmp_path, step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # bytes a file may have
    try:
        with pytest.raises(
            InputError, match=r"step-00000002 cannot be written \(.*\): make room for it"
        ):
            save(tmp_path, step=2, model={"large": torch.zeros(10_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(tmp_path) == [1]
    assert load_latest(tmp_path).step == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(InputError, match=r"step-00000012 cannot be written \(.*checkpoints"):
        save(tmp_path)


# --- Which checkpoint --------------------------------------------------------------------------


def test_only_the_best_and_the_two_latest_are_kept(tmp_path: Path) -> None:
    for step in (0, 5, 10, 15, 20):
        save(tmp_path, step)
    remove_superseded(tmp_path, keep=Best(5, 0.5))
    assert steps(tmp_path) == [5, 15, 20]
    remove_superseded(tmp_path, keep=Best(20, 0.5))
    assert steps(tmp_path) == [15, 20]
    remove_superseded(tmp_path, keep=None)
    assert steps(tmp_path) == [15, 20]


def test_latest_falls_back_to_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert load_latest(tmp_path).step == 3
    flip(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors", 100)
    with pytest.warns(UserWarning, match=r"step-00000003/.* was changed .*; taking the checkpoint"):
        assert load_latest(tmp_path).step == 2
    (tmp_path / "checkpoints" / "step-00000002" / "meta.json").unlink()
    with pytest.warns(UserWarning, match="taking the checkpoint before it") as warned:
        assert load_latest(tmp_path).step == 1
    assert len(warned) == 2


def test_no_checkpoint_is_whole(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "training.safetensors", 50)
    with (
        pytest.warns(UserWarning, match="step-00000002"),
        pytest.raises(InputError, match=r"step-00000001/training\.safetensors was changed or cut"),
    ):
        load_latest(tmp_path)


def test_no_run(tmp_path: Path) -> None:
    for load in (load_latest, load_selected):
        with pytest.raises(InputError, match="gone is not a folder: give the folder of a run"):
            load(tmp_path / "gone")
        with pytest.raises(InputError, match="has no checkpoints: give the folder of a run"):
            load(tmp_path)


def test_selected_is_the_best_of_a_run_or_the_folder_itself(tmp_path: Path) -> None:
    save(tmp_path, 1, best=Best(1, 0.5))
    save(tmp_path, 2, best=Best(1, 0.5))
    assert load_selected(tmp_path).step == 1
    assert load_selected(tmp_path / "checkpoints" / "step-00000002").step == 2
    save(tmp_path, 3, best=Best(3, 0.7))
    assert load_selected(tmp_path).step == 3
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "checkpoints" / "step-00000001", moved)
    assert load_selected(moved).step == 1


def test_a_best_checkpoint_that_is_gone_is_not_replaced_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 2, best=Best(1, 0.5))
    says = (
        r"step-00000001 is no checkpoint.* best Recall@1 \(0\.500\); the newest is whole: `abe ev"
    )
    with pytest.raises(InputError, match=says):
        load_selected(tmp_path)


def test_damaged_checkpoints_are_set_aside_and_whole_ones_are_not(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    for _ in range(2):  # the second takes the first one's place
        flip(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors", 100)
        set_aside_newer(tmp_path, 2)
        assert steps(tmp_path) == [1, 2]
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == ["damaged-step-00000003", "step-00000001", "step-00000002"]
        save(tmp_path, 3)
    for step in (2, None):
        with pytest.raises(InputError, match="has been trained by another process meanwhile: go o"):
            set_aside_newer(tmp_path, step)
    assert steps(tmp_path) == [1, 2, 3]


def test_files_are_for_whom_the_umask_lets(tmp_path: Path) -> None:
    for umask in (0o022, 0o007, 0o077):
        before = os.umask(umask)
        try:
            path = save(tmp_path, step=umask)
        finally:
            os.umask(before)
        assert {stat.S_IMODE((path / name).stat().st_mode) for name in FILES} == {0o666 & ~umask}


def test_the_weights_alone_are_plain_safetensors(tmp_path: Path) -> None:
    assert load_file(save(tmp_path) / "model.safetensors").keys() == MODEL.keys()
