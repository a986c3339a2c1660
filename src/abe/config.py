"""Typed configuration of a run: frozen, checked, the same in JSON and in Python.

An unknown key is an error, never a default by accident. `Config` is saved resolved with every run
and in every checkpoint.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from abe.errors import InputError

Protocol = Literal["val", "paper", "both"]


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # --set data.source=2010 is a folder's name
        use_attribute_docstrings=True,
    )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build settings from plain values.

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


class ModelConfig(_Section):
    """Which network (section 3 and supplement), and what it starts from."""

    network: Literal["abe", "m-heads", "m-heads+att", "m-tails"] = "abe"
    """ABE-M, or what it is compared with (Tables 1 and 8); 1-head is m-heads of 1 learner."""
    num_learners: int = Field(8, ge=1)
    """M, of the ensemble."""
    embedding_dim: int = Field(512, ge=1)
    """D, of the ensemble: each learner has D / M."""
    backbone: str = "googlenet"
    """googlenet (the paper's), googlenet_bn or resnet50."""
    branch_point: str | None = None
    """Last stage of S; none: the backbone's own (Fig. 7b)."""
    attention_depth: int | None = Field(None, ge=1)
    """Blocks in the attention trunk C; none: the backbone's own (Fig. 7a)."""
    attention_width: float = Field(1.0, gt=0)
    """Factor on the channels of C; other than 1, C starts from random weights."""
    weights: str | None = "googlenet-mini-imagenet-v2"
    """The pretrained start: a known name or a file; none: random weights."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        from abe.model.backbones import get_backbone
        from abe.model.ensemble import learner_dim
        from abe.model.weights import SOURCES

        learner_dim(self.num_learners, self.embedding_dim)
        backbone = get_backbone(self.backbone).name
        source = SOURCES.get(self.weights or "")
        if source is not None and source.backbone != backbone:
            fitting = [other.name for other in SOURCES.values() if other.backbone == backbone]
            raise InputError(
                f"model.weights={source.name} are of the backbone {source.backbone}, not of "
                f"{backbone}: use {', '.join(fitting)}, a file or none"
            )
        return self


class DataConfig(_Section):
    """Which images, how they are split, and how large they enter the network (section 4)."""

    source: str = "synthetic"
    """synthetic, which abe draws; a folder, a CSV file, or with data.root a benchmark's name."""
    root: str | None = None
    """Folder that the benchmark was unpacked into."""
    allow_partial: bool = False
    """Go on with a part of a benchmark, and say so in every result."""
    split_classes: float = Field(0.5, gt=0, lt=1)
    """Share of the classes to train with; the rest is the test."""
    val_classes: float = Field(0.2, gt=0, lt=1)
    """Share of the training classes that is held out to choose a checkpoint by."""
    resize: int = Field(256, ge=8)
    """Side of the padded square, in pixels."""
    crop: int = Field(224, ge=8)
    """Side of what the network sees of it: a part by chance to train, the centre to test."""
    skip_broken: bool = False
    """Leave out files that cannot be read, and say how many."""
    cache: bool = False
    """Keep the decoded squares in memory."""
    workers: int = Field(0, ge=0)
    """Processes that read images; 0: the main one."""
    synthetic_classes: int = Field(200, ge=4)
    """How many classes abe draws."""
    synthetic_images: int = Field(20, ge=2)
    """How many images it draws of each."""

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.crop > self.resize:
            raise InputError(
                f"data.crop={self.crop} does not fit into data.resize={self.resize}: "
                "make the crop the smaller one"
            )
        return self

    def anchored(self) -> Self:
        """The same with full paths."""
        if self.root is not None:
            return self.model_copy(update={"root": _absolute(self.root)})
        if self.source != "synthetic":
            return self.model_copy(update={"source": _absolute(self.source)})
        return self


class TrainConfig(_Section):
    """Mini-batches, losses (Eqs. 8-10), optimiser and schedule."""

    steps: int = Field(1000, ge=0)
    """How many mini-batches to train with."""
    sampler: Literal["pairs", "classes"] = "pairs"
    """The paper's batches of pairs, half of them positive; or P classes of K images."""
    batch_size: int = Field(64, ge=4)
    """Images of a mini-batch, of all processes together."""
    images_per_class: int = Field(4, ge=2)
    """K of the sampler "classes"."""

    metric_loss: str = "contrastive"
    """Eq. 10; or one of pytorch-metric-learning, as "MultiSimilarityLoss(alpha=2)"."""
    margin: float = Field(1.0, gt=0)
    """Of Eq. 10, in squared distance between unit vectors (0 to 4)."""
    normalization: Literal["per_image", "sum", "balanced"] = "per_image"
    """What divides Eq. 10: the images, as printed; nothing; for each kind of pair, its number."""
    normalize_embeddings: bool = True
    """False hands raw embeddings to `metric_loss`, but for Eq. 10."""
    divergence_weight: float = Field(1.0, ge=0)
    """lambda_div of Eq. 8; 0 switches Eq. 9 off."""
    divergence_margin: float = Field(1.0, gt=0)
    """Of Eq. 9, in squared distance."""
    divergence_normalization: Literal["per_image", "sum", "per_pair"] = "per_image"
    """What divides Eq. 9: the images, as in Eq. 10; nothing, as printed; all pairs of learners."""
    divergence_warmup: int = Field(0, ge=0)
    """Steps in which lambda_div grows from 0."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd, with train.momentum, or adamw."""
    lr: float = Field(1e-3, gt=0)
    """The learning rate at its highest."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD."""
    weight_decay: float = Field(2e-4, ge=0)
    """Of weights; biases and norms do not decay."""
    bias_lr_factor: float = Field(2.0, gt=0)
    """On the rate of biases: Caffe's habit."""
    new_layer_lr_factor: float = Field(10.0, gt=0)
    """On the rate of what no pretrained weights reached."""
    loss_lr_factor: float = Field(10.0, gt=0)
    """On the rate of the metric loss's own parameters, as proxies are."""
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    """What the rate does after its warm-up."""
    warmup: int = Field(0, ge=0)
    """Steps in which the rate grows from 0."""
    decay_every: int = Field(10_000, ge=1)
    """Of the schedule "steps": how often the rate is multiplied by decay_factor."""
    decay_factor: float = Field(0.1, gt=0, le=1)
    """What the rate is multiplied by, every decay_every steps."""
    clip_norm: float | None = Field(None, gt=0)
    """Longest gradient, of all parameters together; a longer one is scaled. none: any."""

    activation_checkpointing: bool = False
    """Less memory: what the gradient needs is computed twice. The same but for rounding."""
    chunk_size: int | None = Field(None, ge=1)
    """Images embedded at a time, for less memory; none: all. The same but for rounding."""

    eval_every: int = Field(1000, ge=1)
    """Steps between evaluations, each with a checkpoint."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of metrics.jsonl."""

    @model_validator(mode="after")
    def _batches_are_whole(self) -> Self:
        if self.sampler == "pairs":
            unit, least, what = 4, 4, "pairs, half of them positive"
        else:
            unit, least = self.images_per_class, 2 * self.images_per_class
            what = f"2 or more classes of train.images_per_class={unit}"
        if self.batch_size < least or self.batch_size % unit:
            below = max(least, self.batch_size // unit * unit)
            raise InputError(
                f"train.batch_size={self.batch_size} cannot be made of {what}: "
                f"use {below} or {below + unit}"
            )
        return self


_INCIDENTAL = (  # decides no result, but for rounding
    "device",
    "ranks_timeout",
    "tracking",
    "data.root",
    "data.allow_partial",
    "data.workers",
    "data.cache",
    "train.activation_checkpointing",
    "train.chunk_size",
)


class Config(_Section):
    """A whole run."""

    recipe: str = "none"
    """Where the settings came from, for the record."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of weights, batches and crops."""
    protocol: Protocol = "val"
    """What picks the checkpoint: held-out classes; the test images (paper); val, with both told."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps ...; auto: the fastest there is."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the network; auto: bf16 where it is faster."""
    ranks_timeout: float = Field(60.0, gt=0, le=86_400)
    """Seconds that a step waits for another process."""
    tracking: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl: names, with commas between them, or none."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @field_validator("tracking", mode="before")
    @classmethod
    def _names_in_a_row(cls, value: Any) -> Any:
        """--set tracking=mlflow,wandb and tracking=none, beside lists."""
        if isinstance(value, str):
            return [name.strip() for name in value.split(",")]
        return () if value is None else value

    @model_validator(mode="after")
    def _backbone_takes_the_crop(self) -> Self:
        _require_crop(self.data.crop, "model.backbone", self.model.backbone)
        return self

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
            if not isinstance(target, dict):
                raise InputError(_unknown_key(key))
            if isinstance(target.get(name), dict):
                raise InputError(f"{key} is a group of settings: see `abe config` for those in it")
            target[name] = _parse(text)
        return self.from_json(values)

    def portable(self) -> dict[str, Any]:
        """What decides a result, without what only says where and how fast it was computed."""
        values = self.to_json()
        for key in _INCIDENTAL:
            *sections, name = key.split(".")
            del reduce(dict.__getitem__, sections, values)[name]
        values["data"]["source"] = PurePath(self.data.source).name
        if self.model.weights is not None:
            values["model"]["weights"] = PurePath(self.model.weights).name
        return values

    def incidental(self) -> list[str]:
        """What `portable` leaves out, and where its files are, as `with_overrides` takes it."""
        values = self.to_json()
        keys = (*_INCIDENTAL, "data.source", "model.weights")
        return [f"{key}={json.dumps(_value(values, key))}" for key in keys]

    def with_batches_that_fit(self, num_classes: int) -> Self:
        """The same, with fewer classes a batch where there are not as many to learn from."""
        train = self.train
        fits = max(2, num_classes) * train.images_per_class
        if train.sampler != "classes" or train.batch_size <= fits:
            return self
        return self.with_overrides([f"train.batch_size={fits}"])

    def anchored(self) -> Self:
        """The same with full paths, so that it finds its files from any working folder."""
        from abe.model.weights import SOURCES

        model = self.model
        if model.weights is not None and model.weights not in SOURCES:
            model = model.model_copy(update={"weights": _absolute(model.weights)})
        return self.model_copy(update={"data": self.data.anchored(), "model": model})

    def on_device(self, device: str | None) -> Self:
        """The same on another device; None for its own."""
        return self if device is None else self.model_copy(update={"device": device})

    @property
    def digest(self) -> str:
        """12 hexadecimal digits of the portable values, and of the weights if they are a file."""
        from abe.model.weights import SOURCES

        found = hashlib.sha256(json.dumps(self.portable(), sort_keys=True).encode())
        if self.model.weights is not None and self.model.weights not in SOURCES:
            file = Path(self.model.weights).expanduser()
            file = file / "model.safetensors" if file.is_dir() else file
            if file.is_file():
                found.update(file.read_bytes())
        return found.hexdigest()[:12]


class PretrainConfig(_Section):
    """A start to be made for a backbone, by classification (`abe pretrain`)."""

    backbone: str = "googlenet"
    """As model.backbone."""
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    data: DataConfig = DataConfig(resize=84, crop=64)
    held_out: int = Field(30, ge=1)
    """Images a class for top-1, but a fifth of a class at most."""
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(128, ge=2)
    lr: float = Field(0.03, gt=0)
    """At its highest."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the rate grows."""
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _backbone_takes_the_crop(self) -> Self:
        _require_crop(self.data.crop, "backbone", self.backbone)
        return self

    def anchored(self) -> Self:
        """The same with full paths, so that it finds its files from any working folder."""
        return self.model_copy(update={"data": self.data.anchored()})

    @property
    def name(self) -> str:
        """What to call the start."""
        return f"{self.backbone}-{PurePath(self.data.source).stem}"

    def schedule(self, steps: int) -> TrainConfig:
        """Its rate and its optimiser, of so many steps."""
        return TrainConfig(
            steps=steps,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            bias_lr_factor=1,
            schedule="cosine",
            warmup=round(self.warmup * steps),
        )


class Setting(NamedTuple):
    """A setting of a run, for a person to read."""

    key: str
    """Its full name, as --set takes it."""
    value: str
    """What it is, as --set takes it."""
    takes: str
    """What it may be: "integer >= 0", "sgd | adamw"."""
    meaning: str


def explain(config: Config) -> list[Setting]:
    """All settings of a run, in their order."""
    schema, values = Config.model_json_schema(), config.to_json()
    found = []
    for key in _keys(Config):
        *sections, name = key.split(".")
        fields = schema["properties"]
        for section in sections:
            fields = schema["$defs"][fields[section]["$ref"].rpartition("/")[2]]["properties"]
        shown, field = _shown(_value(values, key)), fields[name]
        found.append(Setting(key, shown, _takes(field), field["description"]))
    return found


def _value(values: dict[str, Any], key: str) -> Any:
    """What nested settings have under a full name."""
    return reduce(dict.__getitem__, key.split("."), values)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value) or "none"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def _takes(field: dict[str, Any]) -> str:
    """What a field of a JSON schema may be."""
    if "anyOf" in field:
        return " | ".join(_takes(each) for each in field["anyOf"])
    if "enum" in field:
        return " | ".join(field["enum"])
    bounds = {
        "minimum": ">=",
        "exclusiveMinimum": ">",
        "maximum": "<=",
        "exclusiveMaximum": "<",
    }
    limits = [f"{sign} {field[name]}" for name, sign in bounds.items() if name in field]
    match field["type"]:
        case "null":
            return "none"
        case "boolean":
            return "true | false"
        case "array":
            return f"some of {_takes(field['items'])}"
        case "string":
            return "text"
        case kind:
            return " ".join([kind, " and ".join(limits)]).strip()


def _require_crop(crop: int, key: str, backbone: str) -> None:
    """Raises InputError where a backbone cannot process images of `crop` pixels."""
    from abe.model.backbones import get_backbone

    smallest = get_backbone(backbone).min_image_size
    if crop < smallest:
        raise InputError(
            f"data.crop={crop} is too small for {key}={backbone}: it takes {smallest} and above"
        )


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None if text.lower() == "none" else text


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"])) if error["loc"] else "the configuration"
    if error["type"] == "extra_forbidden":
        return _unknown_key(key)
    if error["type"] == "value_error":  # one of our own
        return str(error["ctx"]["error"])
    wanted = re.sub(r"(, (unable|got)| or instance) .*", "", error["msg"])
    return f"{key}={reprlib.repr(error['input'])}: {wanted.replace('Input should', 'it has to')}"


def _unknown_key(key: str) -> str:
    known = {name.rpartition(".")[2]: name for name in _keys(Config)}
    near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    hint = f"did you mean {known[near[0]]!r}?" if near else "see `abe config` for all of them"
    return f"there is no setting {key!r}: {hint}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All settings by their full names; no two of them end alike."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
