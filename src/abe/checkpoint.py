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
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from abe.config import Config
from abe.data.transforms import Preprocessing
from abe.errors import InputError
from abe.model.ensemble import AttentionEnsemble
from abe.runtime import write_json
from abe.start import build_model

_MODEL, _TRAINING, _META = "model.safetensors", "training.safetensors", "meta.json"
_REPLACED = ".replaced"  # where a checkpoint is while another takes its place


@dataclass(frozen=True)
class Best:
    """The checkpoint that the protocol picks so far: Recall@1 on the protocol's images."""

    step: int
    recall_at_1: float


class _Meta(BaseModel):
    """meta.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1]
    step: NonNegativeInt
    config: dict[str, Any]
    preprocessing: dict[str, Any]
    weights: dict[str, str] | None
    best: Best | None
    sha256: dict[str, str]


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
        meta = _read_meta(path / _META)
        try:
            config = Config.from_json(meta.config)
            preprocessing = Preprocessing.from_json(meta.preprocessing)
        except InputError as error:
            raise InputError(f"{path / _META}: {error}") from None
        return cls(
            path=path,
            step=meta.step,
            config=config,
            preprocessing=preprocessing,
            weights=meta.weights,
            best=meta.best,
            model=_verified(path / _MODEL, meta),
            training=_verified(path / _TRAINING, meta),
        )

    def load_into(self, model: AttentionEnsemble) -> None:
        """Give a network this checkpoint's weights.

        Raises:
            InputError: they are of another network.
        """
        try:
            model.load_state_dict(self.model)
        except RuntimeError:
            raise InputError(
                f"{self.path}: the weights are of another network than its configuration says: "
                "use another checkpoint"
            ) from None

    def build_model(self) -> AttentionEnsemble:
        """The network with this checkpoint's weights, in evaluation mode, on the CPU.

        Raises:
            InputError: as `load_into`.
        """
        model = build_model(self.config)
        self.load_into(model)
        return model.eval()


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
    """Write the checkpoint of `step` into `folder`; it appears there complete.

    Raises:
        InputError: the disk is full, or the folder cannot be written; what was there stays.
    """
    path = folder / f"step-{step:08d}"
    beside, replaced = folder / ".unfinished", folder / _REPLACED
    try:
        shutil.rmtree(beside, ignore_errors=True)  # left by an attempt that was killed
        beside.mkdir(parents=True)
        for name, tensors in ((_MODEL, model), (_TRAINING, training)):
            save_file({key: value.contiguous() for key, value in tensors.items()}, beside / name)
            _flush(beside / name)
        meta = _Meta(
            format=1,
            step=step,
            config=config.to_json(),
            preprocessing=preprocessing.to_json(),
            weights=weights,
            best=best,
            sha256={name: _sha256(beside / name) for name in (_MODEL, _TRAINING)},
        )
        write_json(beside / _META, meta.model_dump())
        _flush(beside)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        beside.rename(path)
        _flush(folder)
    except (OSError, SafetensorError) as error:  # the latter of an OSError in save_file
        raise InputError(
            f"{path} cannot be written ({error}): make room for it or see to its permissions, "
            "then go on with --resume"
        ) from None
    shutil.rmtree(replaced, ignore_errors=True)
    return path


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; or the only one, aside when a kill came."""
    folder = run / "checkpoints"
    return sorted(folder.glob("step-*")) or list(folder.glob(_REPLACED))


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
        found = "has no checkpoints" if run.is_dir() else "is not a folder"
        raise InputError(f"{run} {found}: give the folder of a run")
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


def _read_meta(path: Path) -> _Meta:
    try:
        return _Meta.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no checkpoint: {path.name} is missing") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        what = ": ".join([*map(str, problem["loc"]), problem["msg"]])
        raise InputError(
            f"{path} is damaged or of another version of abe ({what}): use another checkpoint, or "
            "train anew"
        ) from None


def _verified(path: Path, meta: _Meta) -> dict[str, Tensor]:
    advice = "use another checkpoint, or train anew"
    try:
        if _sha256(path) == meta.sha256.get(path.name):
            return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({reason}): {advice}") from None
    raise InputError(f"{path} was changed or cut since it was written: {advice}")


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
