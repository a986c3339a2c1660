"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all.

    <run>/checkpoints/step-00000120/
        model.safetensors     the network
        training.safetensors  optimiser, metric loss, random state: what only training needs
        meta.json             format, step, config, preprocessing, origin of the pretrained start,
                              best so far, SHA-256 of both

Nothing here is ever unpickled. A checkpoint is written beside its final place, flushed to disk and
renamed; one whose files do not have the hash that meta.json tells is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from abe.config import Config
from abe.data.transforms import Preprocessing
from abe.errors import InputError
from abe.model.ensemble import AttentionEnsemble
from abe.runtime import write_json
from abe.start import build_model

FORMAT = 1
_MODEL, _TRAINING, _META = "model.safetensors", "training.safetensors", "meta.json"


@dataclass(frozen=True)
class Best:
    """The checkpoint that the protocol picks so far: Recall@1 on the protocol's images."""

    step: int
    recall_at_1: float


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a checkpoint folder holds."""

    path: Path
    step: int
    config: Config
    preprocessing: Preprocessing
    weights: dict[str, str] | None
    best: Best | None
    model: dict[str, Tensor]
    training: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a checkpoint folder and verify it.

        Raises:
            InputError: no checkpoint, one of another format, or a file that was changed or cut.
        """
        try:
            meta = json.loads((path / _META).read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise InputError(
                    f"{path} has checkpoint format {meta['format']}, this version of abe reads "
                    f"{FORMAT}: use the version of abe that wrote it"
                )
            tensors = {name: _verified(path / name, meta["sha256"][name]) for name in _FILES}
            return cls(
                path=path,
                step=meta["step"],
                config=Config.from_json(meta["config"]),
                preprocessing=Preprocessing.from_json(meta["preprocessing"]),
                weights=meta["weights"],
                best=Best(**meta["best"]) if meta["best"] else None,
                model=tensors[_MODEL],
                training=tensors[_TRAINING],
            )
        except InputError:
            raise
        except FileNotFoundError as error:
            raise InputError(f"{path} is no checkpoint: {error.filename} is missing") from None
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise InputError(f"{path} is damaged: {error!r}") from None

    def build_model(self) -> AttentionEnsemble:
        """The network with this checkpoint's weights, in evaluation mode, on the CPU."""
        model = build_model(self.config)
        model.load_state_dict(self.model)
        return model.eval()


_FILES = (_MODEL, _TRAINING)


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    config: Config,
    preprocessing: Preprocessing,
    weights: dict[str, str] | None,
    best: Best | None,
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
) -> Path:
    """Write the checkpoint of `step` into `folder`; it appears there complete."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}"
    beside = folder / f".{path.name}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for name, tensors in ((_MODEL, model), (_TRAINING, training)):
        save_file({key: value.contiguous() for key, value in tensors.items()}, beside / name)
        _flush(beside / name)
    meta = {
        "format": FORMAT,
        "step": step,
        "config": config.to_json(),
        "preprocessing": preprocessing.to_json(),
        "weights": weights,
        "best": None if best is None else vars(best),
        "sha256": {name: _sha256(beside / name) for name in _FILES},
    }
    write_json(beside / _META, meta)
    _flush(beside)
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)
    _flush(folder)
    return path


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def remove_superseded(run: Path, keep: Best | None, latest: int = 2) -> None:
    """Delete all checkpoints but the `latest` newest ones and the best one."""
    best = None if keep is None else f"step-{keep.step:08d}"
    for path in checkpoints(run)[:-latest]:
        if path.name != best:
            shutil.rmtree(path)


def load_latest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run that is whole, to go on from; a damaged one is warned of.

    Raises:
        InputError: the run has no checkpoint, or only damaged ones.
    """
    paths = checkpoints(run)
    if not paths:
        raise InputError(f"{run} holds no checkpoint: give the folder of a run")
    for path in reversed(paths):
        try:
            return Checkpoint.load(path)
        except InputError as error:
            if path == paths[0]:
                raise
            warnings.warn(f"{error}; taking the checkpoint before it", stacklevel=2)
    raise AssertionError("unreachable")


def load_selected(path: Path) -> Checkpoint:
    """The checkpoint to use: of a run the one that its protocol picked, or the folder itself.

    Raises:
        InputError: `path` is neither a run nor a checkpoint, or the checkpoint is damaged.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give the folder of a run or of a checkpoint")
    if (path / _META).exists():
        return Checkpoint.load(path)
    latest = load_latest(path)
    if latest.best is None or latest.best.step == latest.step:
        return latest
    return Checkpoint.load(path / "checkpoints" / f"step-{latest.best.step:08d}")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors; its hyper-parameters come from the configuration."""
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser the state that `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            index, _, name = rest.partition(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _verified(path: Path, sha256: str) -> dict[str, Tensor]:
    if _sha256(path) != sha256:
        raise InputError(f"{path} was changed or cut since it was written: use another checkpoint")
    return load_file(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the file's or folder's contents reach the disk before what follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
