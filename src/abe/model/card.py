"""The model card of a start."""

from __future__ import annotations

from typing import Any

from abe.config import ModelConfig, PretrainConfig
from abe.data.transforms import Preprocessing


def model_card(
    name: str,
    config: PretrainConfig,
    images: dict[str, Any],
    made_by: dict[str, Any],
    preprocessing: Preprocessing,
    measured: dict[int, float],
    *,
    architecture: str,
    size: str,
) -> str:
    """What to know before a start is used, in Markdown.

    Args:
        name: of the start.
        config: how it was made.
        images: see `ClassImages.describe`.
        made_by: software and hardware, see `environment`, and "precision".
        preprocessing: of its input.
        measured: side of the images in pixels -> top-1 of those held out.
        architecture: what the file holds.
        size: of the file.
    """
    file = f"{name}.safetensors"
    results = ", ".join(f"{100 * top_1:.1f} % at {side} px" for side, top_1 in measured.items())
    other = f" --set model.backbone={config.backbone}"
    other *= config.backbone != ModelConfig().backbone
    rows = {
        "file": f"`{file}`, {size}",
        "network": architecture,
        "fits": f"backbone `{config.backbone}`: `abe train DATA --weights {file}{other}`",
        "data": f"{images['name']}: {images['learned_images']:,} images of {images['classes']:,} "
        f"classes, and {images['held_out_images']:,} held out ({config.held_out} a class, fewer "
        f"of small ones); unreadable files left out: {images['skipped']:,}; digest "
        f"{images['digest']}",
        "training": f"from random weights: {config.epochs} epochs of random crops of "
        f"{config.data.crop} px, and their mirror images, from squares of {config.data.resize} px; "
        f"batches of {config.batch_size}; SGD, momentum {config.momentum:g}, weight decay "
        f"{config.weight_decay:g}; rate {config.lr:g} at its highest, after a warm-up of "
        f"{100 * config.warmup:g} % of the steps, then a cosine; label smoothing "
        f"{config.label_smoothing:g}; {made_by['precision']}; seed {config.seed}",
        "result": f"top-1 on the images held out: {results}",
        "made by": f"abe {made_by['abe']}, commit {made_by['commit']}, PyTorch "
        f"{made_by['torch']}, {made_by['gpu'] or made_by['cpu']}",
        "licence": "**not stated yet: say here what the terms of the pictures allow**",
    }
    table = "\n".join(f"| {what} | {content} |" for what, content in rows.items())
    return f"""# Model card: `{name}`

| | |
|---|---|
{table}

## Input

{preprocessing.channels}, 0..255, `(pixel - {preprocessing.mean}) * {preprocessing.scale}`. The file
says so itself, in its metadata under `preprocessing`, and `abe` carries that into every checkpoint
trained from it.

## Limits

- It has seen all classes of its data: what is trained from it and tested on classes of the same
  data is not tested on unseen ones.
- The result is of the file as it is read, rounded to float16, with the linear layer that it was
  trained with, which the file does not hold.
- It has seen crops of {config.data.crop} px. What it makes of much larger images is untested.
"""
