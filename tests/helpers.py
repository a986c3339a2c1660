"""What several files of tests do."""

import hashlib
import json
from pathlib import Path
from typing import Any

from abe.checkpoint import checkpoints
from abe.config import Config, DataConfig, ModelConfig, TrainConfig

TINY = Config(  # a run of seconds
    device="cpu",
    precision="fp32",
    tracking=(),
    model=ModelConfig(num_learners=2, embedding_dim=8, weights=None),
    data=DataConfig(
        resize=40, crop=32, synthetic_classes=8, synthetic_images=4, val_classes=0.5, cache=True
    ),
    train=TrainConfig(
        steps=3,
        sampler="classes",
        batch_size=8,
        normalization="balanced",
        eval_every=2,
        log_every=1,
    ),
)


def forge(path: Path, **changes: Any) -> None:
    """Change meta.json and its checksum; a dictionary changes a part of one."""
    meta = json.loads((path / "meta.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(meta[key], dict):
            meta[key] |= value
        else:
            meta[key] = value
    del meta["checksum"]
    content = json.dumps(meta, sort_keys=True).encode()
    meta = {"checksum": hashlib.sha256(content).hexdigest()} | meta
    (path / "meta.json").write_text(json.dumps(meta))


def shorten(run: Path, *, steps: int) -> None:
    """Let the newest checkpoint of a run have only a few steps to go."""
    path = checkpoints(run)[-1]
    config = json.loads((path / "meta.json").read_text())["config"]
    forge(path, config=config | {"train": config["train"] | {"steps": steps}})
