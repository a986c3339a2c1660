"""What a run's folder holds beside its checkpoints: names, and what reads and guards them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from abe.checkpoint import Checkpoint
from abe.config import DataConfig
from abe.data.splits import Splits
from abe.errors import InputError
from abe.files import locked, make_folder, read_json, read_json_lines, replace_text, require_outside
from abe.ranks import Ranks

IMAGES = "images.json"  # of a run: which images it learns and tests
LOG = "metrics.jsonl"
TEST_RECALL = "test_recall_at_1"  # in it, of protocol "both"
ENVIRONMENT = "environment.json"
LOCK = ".lock"  # of a run: held by the process that trains it


def alone(run: Path) -> AbstractContextManager[object]:
    """While it lasts, no other process trains in the run's folder, which is made if need be."""
    make_folder(run)
    taken = f"{run} is being trained by another process: wait for it, or give another folder"
    return locked(run / LOCK, taken)


def require_outside_images(folder: Path, data: DataConfig) -> None:
    """Raises InputError if a folder to write is in that of the images."""
    images = Path(data.source).expanduser()
    if data.root is None and data.source != "synthetic" and images.is_dir():
        require_outside(folder, images)


@contextlib.contextmanager
def looking_for_images(folder: Path, data: DataConfig, advice: str | None) -> Iterator[None]:
    """While images are opened that a folder was begun with: says so where they are gone.

    Args:
        folder: of a run or a start.
        data: its images.
        advice: how to go on with images that were moved; None for a folder that is not begun.
    """
    try:
        yield
    except InputError as error:
        if advice is None or Path(data.root or data.source).exists():
            raise
        raise InputError(
            f"the images of {folder} are not where they were: {error}; {advice}"
        ) from None


def read_environment(run: Path) -> dict[str, Any]:
    """environment.json of a run; nothing if there is none."""
    file = run / ENVIRONMENT
    return read_json(file) if file.exists() else {}


def stretches(
    told: Mapping[str, Any], now: Mapping[str, Any], step: int | None
) -> list[dict[str, Any]]:
    """The environments that a run was trained in, each with the step that it began "from_step".

    Args:
        told: environment.json as it was; nothing where there is none.
        now: see `abe.runtime.environment`.
        step: from which `now` trains; None if the training is complete.
    """
    known = {key: told[key] for key in now if key in told}  # early versions say less, and no steps
    before = told.get("stretches") or ([{"from_step": 0, **known}] if known else [])
    if step is None:
        return list(before)
    before = [each for each in before if each["from_step"] < step]
    if before and _is_alike(before[-1], now):
        return before
    return [*before, {"from_step": step, **now}]


def _is_alike(environment: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two environments are the same in all that both say."""
    return all(environment[key] == other[key] for key in environment.keys() & other.keys())


def recorded_precision(run: Path, device: torch.device) -> Literal["auto", "fp32", "bf16"]:
    """What the run computes in, if environment.json says it of such a device; else "auto"."""
    told = read_environment(run)
    of_such = told.get("device", device.type) == device.type  # early versions do not say it
    found = told.get("precision") if of_such else None
    return "fp32" if found == "fp32" else "bf16" if found == "bf16" else "auto"


class _Images(BaseModel):
    """images.json."""

    model_config = ConfigDict(strict=True)

    digest: str
    data: dict[str, Any]
    learned_classes: list[str]


def read_images(path: Path) -> dict[str, Any] | None:
    """images.json of a run, or of a checkpoint's run; None if there is none.

    Raises:
        InputError: it is not what a run writes; the message names it.
    """
    for folder in (path, path.parent.parent):
        if (file := folder / IMAGES).exists():
            values = read_json(file)
            try:
                _Images.model_validate(values)
                values["data"]["name"]
            except (ValidationError, KeyError):
                raise InputError(f"{file} is not what abe writes: train a new run") from None
            return values
    return None


def read_log(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to a step; the last one may be cut off.

    Raises:
        InputError: it cannot be read, or a line has no step; the message names it.
    """
    lines = read_json_lines(path, cut_off=True)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int):
            raise InputError(f"{path}, line {number} has no step: correct or remove it")
    return [line for line in lines if line["step"] <= step]


def forget_later_steps(path: Path, step: int) -> None:
    """Cut metrics.jsonl where the checkpoint is; what comes after it is done and logged again.

    A log that is gone is begun anew.

    Raises:
        InputError: as `read_log`.
    """
    lines = read_log(path, step) if path.exists() else []
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def require_same_images(path: Path, splits: Splits) -> None:
    """Raises InputError unless the images are those that the run at `path` learned and tested."""
    own = read_images(path)
    if own is not None and own["digest"] != splits.digest:
        raise InputError(
            f"{splits.name}: images or classes were added, removed or renamed since {path} was "
            "begun, so that classes it has learned may be among the test's: put them back as they "
            "were, or train a new run"
        )


def add_stretches(record: dict[str, Any], run: Path, step: int, ranks: Ranks) -> None:
    """Say in a record what its network was trained in, if it was not scored in the same alone.

    Args:
        record: of the network as it was after some steps.
        run: its folder.
        step: how many.
        ranks: the processes.

    Raises:
        InputError: environment.json cannot be read.
    """
    scored_in = record["environment"]
    found = ranks.from_first(
        stretches(read_environment(run), scored_in, None) if ranks.first else []
    )
    found = [each for each in found if each["from_step"] < max(1, step)]
    if not all(_is_alike(each, scored_in) for each in found):
        record["environment"] = scored_in | {"stretches": found}


def add_test_pick(record: dict[str, Any], run: Path, ranks: Ranks) -> None:
    """Say in the record of a run of protocol "both" what "paper" would have reported of it.

    The best score of its test images in its metrics.jsonl, and the first step that has it.

    Raises:
        InputError: as `read_log`.
    """
    if record["protocol"] != "both":
        return
    best = None
    if ranks.first and (run / LOG).exists():
        lines = [line for line in read_log(run / LOG, sys.maxsize) if TEST_RECALL in line]
        best = max(lines, key=lambda line: line[TEST_RECALL], default=None)
    if best := ranks.from_first(best):
        record["scores"]["test_picked"] = {"step": best["step"], "recall@1": best[TEST_RECALL]}


def checkpoint_of_first(ranks: Ranks, own: Checkpoint) -> Checkpoint:
    """The checkpoint that the first rank found, in place of the one that this rank did.

    A folder that machines share may show some of them what was there a while ago.

    Raises:
        InputError: this rank cannot read it.
    """
    name = ranks.from_first(own.path.name)
    return own if name == own.path.name else Checkpoint.load(own.path.with_name(name))
