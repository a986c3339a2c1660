"""Typed configuration of a run: frozen, checked, the same in JSON and in Python.

An unknown key is an error, never a default by accident. `Config` is saved resolved with every run
and in every checkpoint.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from abe.errors import InputError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Section):
    """Which network (section 3 and supplement), and what it starts from."""

    network: Literal["abe", "m-heads", "m-heads+att", "m-tails"] = "abe"
    num_learners: int = Field(8, ge=1)
    embedding_dim: int = Field(512, ge=1)  # D, of the ensemble
    backbone: str = "googlenet"
    branch_point: str | None = None  # last stage of S; None: the backbone's own (Fig. 7b)
    attention_depth: int | None = None  # blocks in C; None: the backbone's own (Fig. 7a)
    attention_width: float = Field(1.0, gt=0)
    weights: str | None = "googlenet-mini-imagenet"  # a known name or a file; None: random

    @model_validator(mode="after")
    def _learners_share_the_embedding(self) -> Self:
        from abe.model.ensemble import learner_dim

        learner_dim(self.num_learners, self.embedding_dim)
        return self


class DataConfig(_Section):
    """Which images, how they are split, and how large they enter the network (section 4)."""

    source: str = "synthetic"  # "synthetic", a folder of class folders, or a CSV file
    split_classes: float = Field(0.5, gt=0, lt=1)  # training share of the classes
    val_classes: float = Field(0.2, gt=0, lt=1)  # share of the training classes held out
    resize: int = Field(256, ge=8)  # side of the padded square
    crop: int = Field(224, ge=8)  # side of what the network sees
    skip_broken: bool = False
    cache: bool = False  # keep the decoded squares in memory
    workers: int = Field(0, ge=0)  # processes that read images; 0: the main one
    synthetic_classes: int = Field(200, ge=4)
    synthetic_images: int = Field(20, ge=2)  # a class


class TrainConfig(_Section):
    """Mini-batches, losses (Eqs. 8-10), optimiser and schedule."""

    steps: int = Field(1000, ge=0)
    sampler: Literal["pairs", "classes"] = "pairs"  # the paper's, or P classes x K images
    batch_size: int = Field(64, ge=4)
    images_per_class: int = Field(4, ge=2)  # K of "classes"

    metric_loss: str = "contrastive"  # Eq. 10, or "MultiSimilarityLoss(alpha=2)" and the like
    margin: float = 1.0
    normalization: Literal["per_image", "sum", "balanced"] = "per_image"
    normalize_embeddings: bool = True  # False hands the metric loss raw embeddings
    divergence_weight: float = Field(1.0, ge=0)  # lambda_div of Eq. 8; 0 switches Eq. 9 off
    divergence_margin: float = 1.0
    divergence_normalization: Literal["per_image", "sum", "per_pair"] = "per_image"
    divergence_warmup: int = Field(0, ge=0)  # steps over which lambda_div grows from 0

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(1e-3, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(2e-4, ge=0)
    bias_lr_factor: float = Field(2.0, gt=0)  # Caffe's habit; biases do not decay either
    new_layer_lr_factor: float = Field(10.0, gt=0)  # for what no pretrained weights reached
    loss_lr_factor: float = Field(10.0, gt=0)  # for the metric loss's own parameters
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    warmup: int = Field(0, ge=0)  # steps of linear growth
    decay_every: int = Field(10_000, ge=1)  # "steps": multiply by decay_factor this often
    decay_factor: float = Field(0.1, gt=0, le=1)
    clip_norm: float | None = Field(None, gt=0)  # of the whole gradient

    eval_every: int = Field(1000, ge=1)  # steps between evaluations, each with a checkpoint
    log_every: int = Field(10, ge=1)


class Config(_Section):
    """A whole run."""

    recipe: str = "paper"  # where the settings came from, for the record
    seed: int = Field(0, ge=0)
    protocol: Literal["val", "paper"] = "val"  # what picks the checkpoint, see docs/protocol.md
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build a configuration from plain values.

        Raises:
            InputError: an unknown key (the message names the nearest) or a value that does not fit.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError("; ".join(_explain(item) for item in error.errors())) from None

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` takes."""
        return self.model_dump(mode="json")

    def with_overrides(self, assignments: Iterable[str]) -> Self:
        """Apply `key=value` strings such as `train.lr=1e-4`; values are JSON or plain text.

        Raises:
            InputError: no "=", an unknown key, or a value that does not fit.
        """
        values = self.to_json()
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise InputError(f"{assignment!r}: write key=value, for example train.lr=1e-4")
            *sections, name = key.strip().split(".")
            target: Any = values
            for section in sections:
                target = target.get(section) if isinstance(target, dict) else None
            if not isinstance(target, dict) or isinstance(target.get(name), dict):
                raise InputError(_unknown_key(key))
            target[name] = _parse(text)
        return self.from_json(values)

    def portable(self) -> dict[str, Any]:
        """What decides a result, without what only says where and how fast it was computed."""
        values = self.to_json()
        del values["device"], values["data"]["workers"], values["data"]["cache"]
        values["data"]["source"] = PurePath(self.data.source).name
        return values

    @property
    def digest(self) -> str:
        """12 hexadecimal digits of the portable values."""
        text = json.dumps(self.portable(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None if text.lower() == "none" else text


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown_key(key)
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}={error['input']!r}: {message}" if error["type"] != "value_error" else message


def _unknown_key(key: str) -> str:
    near = difflib.get_close_matches(key, list(_keys(Config)), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "see `abe config` for all of them"
    return f"there is no setting {key!r}: {hint}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
