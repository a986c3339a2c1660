"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all.

    <run>/checkpoints/step-00000120/
        model.safetensors     the network
        training.safetensors  optimiser and metric loss: what only training needs
        meta.json             format, step, config, preprocessing, origin of the pretrained start,
                              best so far, SHA-256 of both, and a checksum of what it says itself

What a step draws at random depends on the seed and the step alone, so no random state is kept.

Nothing here is ever unpickled. A checkpoint is written beside its final place, flushed to disk and
renamed, so a kill or a power cut leaves it whole or leaves the one before it. One that is not what
was written, to the bit, is refused. In format 1, meta.json had no checksum; it is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from abe.config import Config
from abe.data.transforms import Preprocessing
from abe.errors import InputError, TakenError
from abe.files import flush, make_folder, write_json, write_tensors
from abe.model.ensemble import AttentionEnsemble
from abe.runtime import resume_command, typed
from abe.start import build_model

_MODEL, _TRAINING, _META = "model.safetensors", "training.safetensors", "meta.json"
_FORMAT = 2
_ADVICE = "use another checkpoint, or train anew"
_SEE_TO = "see to its permissions and to the disk"
_REPLACED = ".replaced"  # where a checkpoint is while another takes its place


class DamagedCheckpointError(InputError):
    """A checkpoint that was changed, cut or not written to its end."""


@dataclass(frozen=True)
class Best:
    """The checkpoint that the protocol picks so far: Recall@1 on the protocol's images."""

    step: int
    recall_at_1: float


class _Meta(BaseModel):
    """meta.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[2]
    step: NonNegativeInt
    config: dict[str, Any]
    preprocessing: dict[str, Any]
    weights: dict[str, str] | None
    best: Best | None
    sha256: dict[str, str]
    checksum: str


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
            raise self._misfit(_MODEL) from None

    def load_training_into(
        self, optimizer: torch.optim.Optimizer, metric_loss: nn.Module | None
    ) -> None:
        """Give an optimiser and a metric loss, if there is one, what `training_tensors` took.

        Raises:
            InputError: it is of other parameters.
        """
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "metric_loss": {}}
        for key, value in self.training.items():
            kind, _, name = key.partition(".")
            parts.setdefault(kind, {})[name] = value
        try:
            load_optimizer(optimizer, parts["optimizer"])
            if metric_loss is not None:
                metric_loss.load_state_dict(parts["metric_loss"])
        except (RuntimeError, LookupError, ValueError):
            raise self._misfit(_TRAINING) from None

    def _misfit(self, file: str) -> InputError:
        return InputError(
            f"{self.path / file} is of another network than the configuration beside it says: "
            "use another checkpoint"
        )

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
    path = folder / _name(step)
    beside, replaced = folder / ".unfinished", folder / _REPLACED
    try:
        shutil.rmtree(beside, ignore_errors=True)  # left by an attempt that was killed
        make_folder(beside)
        write_tensors(beside / _MODEL, model)
        write_tensors(beside / _TRAINING, training)
        meta = {
            "format": _FORMAT,
            "step": step,
            "config": config.to_json(),
            "preprocessing": preprocessing.to_json(),
            "weights": weights,
            "best": best and asdict(best),
            "sha256": {name: _sha256(beside / name) for name in (_MODEL, _TRAINING)},
        }
        write_json(beside / _META, meta | {"checksum": _checksum(meta)})
        flush(beside)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        beside.rename(path)
        flush(folder)
    except (OSError, SafetensorError) as error:  # the latter of an OSError in safetensors
        raise InputError(
            f"{path} cannot be written ({error}): make room for it or see to its permissions, "
            "then go on with --resume"
        ) from None
    shutil.rmtree(replaced, ignore_errors=True)
    return path


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; or the only one, aside when a kill came.

    Raises:
        InputError: their folder cannot be read.
    """
    folder = run / "checkpoints"
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): {_SEE_TO}") from None
    found = [folder / name for name in names if name.startswith("step-")]
    return found or [folder / name for name in names if name == _REPLACED]


def steps_saved(run: Path) -> int:
    """How many steps of a run its newest checkpoint has; 0 if there is none."""
    names = [path.name.removeprefix("step-") for path in checkpoints(run)]
    return int(names[-1]) if names and names[-1].isdecimal() else 0


def remove_superseded(run: Path, keep: Best | None, latest: int = 2) -> None:
    """Delete all checkpoints but the `latest` newest ones and the best one."""
    best = None if keep is None else _name(keep.step)
    for path in checkpoints(run)[:-latest]:
        if path.name != best:
            shutil.rmtree(path)


def set_aside_newer(run: Path, step: int | None) -> None:
    """Rename the checkpoints after `step`, which are damaged, to damaged-step-...

    Args:
        run: its folder.
        step: that a run goes on from; None if it begins.

    Raises:
        InputError: one of them is whole, or cannot be read for another reason.
    """
    for path in checkpoints(run):
        if step is not None and path.name <= _name(step):
            continue
        try:
            Checkpoint.load(path)
        except DamagedCheckpointError:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        else:
            raise TakenError(
                f"{run} has been trained by another process meanwhile: go on with "
                f"`{resume_command(run)}`"
            )


def load_latest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run that is whole, to go on from; a damaged one is warned of.

    Raises:
        InputError: the run has no checkpoint, or only damaged ones, or cannot read the newest one
            for another reason.
    """
    paths = checkpoints(run)
    if not paths:
        found = "has no checkpoints" if run.is_dir() else "is not a folder"
        raise InputError(f"{run} {found}: give the folder of a run")
    for path in reversed(paths):
        try:
            return Checkpoint.load(path)
        except DamagedCheckpointError as error:
            if path == paths[0]:
                raise
            warnings.warn(f"{error}; taking the checkpoint before it", stacklevel=2)
    raise AssertionError("unreachable")


def load_selected(path: str | Path) -> Checkpoint:
    """The checkpoint to use: of a run the one that its protocol picked, or the folder itself.

    Raises:
        InputError: `path` is neither a run nor a checkpoint, or the checkpoint is damaged.
    """
    path = Path(path)
    if (path / _META).exists():
        return Checkpoint.load(path)
    latest = load_latest(path)
    if latest.best is None or latest.best.step == latest.step:
        return latest
    try:
        return Checkpoint.load(path / "checkpoints" / _name(latest.best.step))
    except InputError as error:
        raise InputError(
            f"{error}. It is the one with the best Recall@1 ({latest.best.recall_at_1:.3f}); the "
            f"newest is whole: `{typed('eval', latest.path)}` scores that"
        ) from None


def training_tensors(
    optimizer: torch.optim.Optimizer, metric_loss: nn.Module | None
) -> dict[str, Tensor]:
    """What training needs beside the network; hyper-parameters come from the configuration."""
    tensors = {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }
    if metric_loss is not None:
        own = metric_loss.state_dict()
        tensors |= {f"metric_loss.{name}": value for name, value in own.items()}
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser the state of its parameters, with the strides that it had.

    Tensors with others are slower to update, and may round otherwise.

    Args:
        optimizer: with the parameters that the state is of.
        tensors: "<number of the parameter>.<name>" -> a part of its state.

    Raises:
        LookupError, ValueError: the state is of other parameters.
    """
    of_all = (value for group in optimizer.param_groups for value in group["params"])
    parameters = dict(enumerate(of_all))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, requires_grad=False).copy_(value)
        elif value.ndim:
            raise ValueError(f"{name} of parameter {number} has the shape {tuple(value.shape)}")
        state.setdefault(int(number), {})[name] = value
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _read_meta(path: Path) -> _Meta:
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        missing = f"{path.parent} is no checkpoint: {path.name} is missing"
        raise DamagedCheckpointError(missing) from None
    except OSError as error:  # it may be whole all the same
        raise InputError(f"{path} cannot be read ({error.strerror}): {_SEE_TO}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}: {_ADVICE}") from None
    if not isinstance(values, dict):
        raise DamagedCheckpointError(f"{path} is no JSON object: {_ADVICE}")
    if values.get("format") == 1:
        values = _from_format_1(values)
    format = values.get("format")
    if isinstance(format, int) and format > _FORMAT:
        raise InputError(
            f"{path} is of format {format}, and this version of abe reads up to {_FORMAT}: use a "
            "newer one, or another checkpoint"
        )
    try:
        meta = _Meta.model_validate_json(json.dumps(values))
    except (ValidationError, RecursionError) as error:
        what = "it is too deep"
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            what = ": ".join([*map(str, problem["loc"]), problem["msg"]])
        raise DamagedCheckpointError(f"{path} is damaged ({what}): {_ADVICE}") from None
    if meta.checksum != _checksum(values):
        raise _changed(path)
    return meta


def _from_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """What format 2 says in its place; nothing tells whether meta.json is as it was written."""
    values = values | {"format": 2}
    return values | {"checksum": _checksum(values)}


def _checksum(meta: Mapping[str, Any]) -> str:
    """SHA-256 of what meta.json says but for this itself."""
    said = {key: value for key, value in meta.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _verified(path: Path, meta: _Meta) -> dict[str, Tensor]:
    try:
        if _sha256(path) == meta.sha256.get(path.name):
            return load_file(path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise InputError(f"{path} cannot be read ({error.strerror}): {_SEE_TO}") from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise DamagedCheckpointError(f"{path} cannot be read ({reason}): {_ADVICE}") from None
    raise _changed(path)


def _changed(path: Path) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path} was changed or cut since it was written: {_ADVICE}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
