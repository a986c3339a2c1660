"""What several files of tests do."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

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


# --- Pages whose code blocks run ---

BLOCK = re.compile(
    r"(?P<run>^<!-- test: run -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def run_python(block: re.Match[str], page: Path, namespace: dict[str, object]) -> None:
    above = block.string.count("\n", 0, block.start("code"))  # so that errors name the line
    exec(compile("\n" * above + block["code"], page, "exec"), namespace)


# --- Embeddings whose order is hard to tell ---


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def duplicated(vectors):
    """Every third one a copy of another."""
    vectors = vectors.clone()
    vectors[::3] = vectors[torch.arange(0, len(vectors), 3) * 7 % len(vectors)]
    return vectors


def last_bits(vectors):
    """Every second one as the one before, but for one coordinate's last bit."""
    vectors = vectors.clone()
    vectors[1::2] = vectors[::2]
    vectors[1::2, 0] = vectors[1::2, 0].nextafter(torch.tensor(9.0).to(vectors))
    return vectors


UNIT = F.normalize(normal(300, 40), dim=1)
EMBEDDINGS = {
    "unit length": UNIT,
    "float64": UNIT.double() + 1e-12 * normal(300, 40, seed=1),
    "bfloat16": UNIT.bfloat16(),
    "duplicates": duplicated(UNIT),
    "last bits": last_bits(UNIT),
    "last bits of float64": last_bits(UNIT.double()),
    "few bits": (8 * UNIT).round(),
    "collapsed": F.normalize(UNIT[:1] + 1e-7 * UNIT, dim=1),
    "collapsed far from the origin": 1000 + 1e-4 * UNIT,
    "collapsed onto five points": F.normalize(UNIT[:5].repeat(60, 1) + 1e-7 * UNIT, dim=1),
    "of very different lengths": UNIT * normal(300, 1, seed=2).mul(4).exp(),
    "one far away": torch.cat([UNIT[:-1], 1e8 * UNIT[-1:]]),
    "smaller than products can be": 1e-30 * UNIT,
    "as large as can be squared": 6.5e18 * UNIT,
}
