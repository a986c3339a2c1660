"""The folders that a report is about: what they hold, and what to call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from abe.config import Config
from abe.errors import InputError
from abe.files import read_json, read_json_lines
from abe.model.ensemble import concat
from abe.results import EMBEDDINGS, data_title, flatten, is_baseline, told_apart
from abe.runtime import resume_command


@dataclass(frozen=True)
class Run:
    """A finished run, or a baseline: a result without training.

    N test images, G gallery images, M learners, d the size of a learner's embedding.

    Attributes:
        path: its folder.
        label: the method, and what tells the run from others of the same method.
        record: result.json.
        recall: Recall@1 of the ensemble on the test images.
        learners_recall: the same of each learner.
        settings: what it was run with, by full names such as "train.lr".
        config: the same as config.json has it, with the data's full path; None for a baseline.
        log: the lines of metrics.jsonl.
        embeddings: of the test images in order, (N, M, d); a baseline may have none.
        gallery: of the gallery images in order, (G, M, d); None if there are none.
    """

    path: Path
    label: str
    record: dict[str, Any]
    recall: float
    learners_recall: list[float]
    settings: dict[str, Any]
    config: Config | None
    log: list[dict[str, Any]]
    embeddings: Tensor | None
    gallery: Tensor | None

    @cached_property
    def ensemble(self) -> Tensor:
        """Embeddings of the ensemble; (N, D)."""
        assert self.embeddings is not None
        return concat(self.embeddings)

    @cached_property
    def ensemble_gallery(self) -> Tensor | None:
        """The same of the gallery, (G, D); None if there is none."""
        return None if self.gallery is None else concat(self.gallery)

    @property
    def images_digest(self) -> str | None:
        """Of its images, see `Splits.digest`; older results know none."""
        return self.record.get("images_digest")

    @property
    def has_attention(self) -> bool:
        """Whether there are masks to show."""
        return self.config is not None and self.config.model.network in {"abe", "m-heads+att"}

    @property
    def preference(self) -> tuple[bool, float]:
        """The greatest is the run that a report is about; test scores decide of "paper" alone."""
        return self.record["protocol"] != "paper", self.record["selection_recall@1"]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs and baselines on the same test images, with labels that tell them apart.

    Raises:
        InputError: no trained run, one that is not finished or damaged, or different test images.
    """
    runs = [_read(path) for path in dict.fromkeys(paths)]
    if not any(run.config for run in runs):
        raise InputError("nothing to report on: give the folder of at least one trained run")
    first, *others = runs
    for other in others:
        if _test_images(other) != _test_images(first):
            raise InputError(
                f"{first.path} was tested on {_test_images(first)}, {other.path} on "
                f"{_test_images(other)}: write a report of each"
            )
    known = [run for run in runs if run.images_digest]
    for run in known:
        if run.images_digest != known[0].images_digest:
            raise InputError(
                f"the images of {known[0].path} and {run.path} are not the same, although both are "
                f"called {data_title(run.record['data'])}: write a report of each"
            )
    return [_labelled(run, [other for other in runs if other.label == run.label]) for run in runs]


def _read(path: Path) -> Run:
    """What a folder holds; its label is the method alone."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give the folder of a run")
    if not (path / "result.json").exists():
        if (path / "config.json").exists():
            raise InputError(f"{path} is not finished: go on with `{resume_command(path)}`")
        raise InputError(f"{path} has no result.json: give the folder of a finished run")
    record = read_json(path / "result.json")
    try:
        trained = not is_baseline(record)
        embeddings, gallery = _read_embeddings(path / EMBEDDINGS, record, trained)
        return Run(
            path=path,
            label=record["method"],
            record=record,
            recall=record["scores"]["ensemble"]["recall@1"],
            learners_recall=[each["recall@1"] for each in record["scores"]["learners"]],
            settings=flatten(record["config"]),
            config=_read_config(path / "config.json") if trained else None,
            log=read_json_lines(path / "metrics.jsonl") if trained else [],
            embeddings=embeddings,
            gallery=gallery,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path / 'result.json'} is not what this version of abe writes ({error!r}): "
            "train the run again"
        ) from None


def _read_config(path: Path) -> Config:
    values = read_json(path)
    try:
        return Config.from_json(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_embeddings(
    path: Path, record: dict[str, Any], trained: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the test images and of the gallery, as far as there are any."""
    if not trained and not path.exists():
        return None, None
    data = record["data"]
    sizes = {"embeddings": data["test_images"], "gallery": data.get("gallery_images")}
    try:
        tensors = load_file(path)
        found = [tensors[name] if sizes[name] else None for name in sizes]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({error}): train the run again") from None
    for tensor, (name, images) in zip(found, sizes.items(), strict=True):
        if tensor is not None and (tensor.ndim != 3 or len(tensor) != images):
            kind = "gallery" if name == "gallery" else "test"
            raise InputError(
                f"{path} holds {tuple(tensor.shape)}, but result.json tells of {images} {kind} "
                "images: the two are not of the same run"
            )
    return found[0], found[1]


def _test_images(run: Run) -> str:
    data = run.record["data"]
    return f"{data_title(data)} ({data['test_images']} images of {data['test_classes']} classes)"


def _labelled(run: Run, same_method: Sequence[Run]) -> Run:
    """Tell a run from others of its method by the settings that differ, or else by its folder."""
    if len(same_method) == 1:
        return run
    label = told_apart(run.label, run.settings, [other.settings for other in same_method])
    return replace(run, label=f"{label} ({run.path})" if label == run.label else label)
