"""Settings for whole runs, by name: the paper's experiment, photographs, and the demo.

A recipe is a function that returns a full `Config`; `--set key=value` changes a part of one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from abe.config import Config, DataConfig, ModelConfig, TrainConfig
from abe.errors import InputError


def paper() -> Config:
    """ABE-8^512 as section 4 has it: 224 px, pairs in batches of 64, Eqs. 8 and 10 as printed.

    Eq. 9 is divided by the batch, as Eq. 10 is (`train.divergence_normalization=sum` as printed).
    Protocol "val" takes a fifth of the training classes to choose by; the paper learns from all
    (`protocol=paper`). It gives neither rate nor length, and no sweep chose ours; it evaluates
    every 1,000 iterations. The start is GoogLeNet's ImageNet weights, which are downloaded. A GPU's
    work: 10,000 steps of 64 images at 224 px take a CPU days.
    """
    return Config(
        recipe="paper",
        model=ModelConfig(
            network="abe", num_learners=8, embedding_dim=512, weights="bvlc-googlenet"
        ),
        data=DataConfig(resize=256, crop=224),
        train=TrainConfig(steps=10_000, sampler="pairs", batch_size=64, lr=1e-4, eval_every=1000),
    )


def photographs() -> Config:
    """ABE-4^512 on photographs of 128 px, for 2 CPU cores or more.

    All settings are those of earlier runs on CUB-2010 (results/runs.jsonl). Its rate, margin,
    lambda and normalisation were the first and the best of 16 trials of `abe sweep` on held-out
    classes of CUB-2010 (results/sweeps/photographs), and all but the last before that of 12 trials
    of `abe sweep` (results/sweeps/photographs-three-settings): no other was better.
    """
    return Config(
        recipe="photographs",
        model=ModelConfig(network="abe", num_learners=4, embedding_dim=512),
        data=DataConfig(resize=128, crop=96, cache=True),
        train=TrainConfig(
            steps=120,
            sampler="classes",
            batch_size=64,
            images_per_class=4,
            normalization="balanced",
            divergence_weight=0.1,
            lr=0.003,
            new_layer_lr_factor=1.0,
            schedule="cosine",
            warmup=10,
            eval_every=40,
        ),
    )


def demo() -> Config:
    """A few minutes on 2 CPU cores: smaller images, the built-in vehicles by default.

    All but the sizes is that of `photographs`.
    """
    return photographs().with_overrides(
        [
            "recipe=demo",
            "data.resize=80",
            "data.crop=64",
            "data.synthetic_classes=120",
            "data.synthetic_images=16",
        ]
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "paper": paper,
    "photographs": photographs,
    "demo": demo,
}


def get_recipe(name: str) -> Config:
    """The configuration of a recipe.

    Raises:
        InputError: there is no recipe of that name.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"there is no recipe {name!r}: {hint}use one of {', '.join(RECIPES)}")
    return RECIPES[name]()
