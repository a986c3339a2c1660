"""The network that a run begins with: built from its configuration, loaded with what is known."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from abe.config import Config
from abe.data.transforms import Preprocessing
from abe.model.ensemble import AttentionEnsemble, MHeads, MHeadsWithAttention, MTails
from abe.model.weights import load_pretrained, read_weights

NETWORKS: dict[str, type[AttentionEnsemble]] = {
    "abe": AttentionEnsemble,
    "m-heads": MHeads,
    "m-heads+att": MHeadsWithAttention,
    "m-tails": MTails,
}

TAIL_NOISE = 0.1  # of the deviation of a weight, on each of several S


@dataclass(frozen=True)
class Start:
    """A network before its first step.

    Attributes:
        model: on the CPU.
        preprocessing: the channels, mean and scale that the weights came with, the run's sizes.
        origin: "source" and "sha256" of the weights; None for a random start.
        new_layers: parameters that no pretrained weight reached, empty for a random start.
        report: what was loaded, and what was not, for a person to read.
    """

    model: AttentionEnsemble
    preprocessing: Preprocessing
    origin: dict[str, str] | None
    new_layers: frozenset[str]
    report: str


def build_model(config: Config) -> AttentionEnsemble:
    """The network that a configuration describes, with random weights."""
    settings = config.model.model_dump(exclude={"network", "weights"})
    return NETWORKS[config.model.network](**settings)


def start(config: Config, *, apart: bool = True) -> Start:
    """Build the network with weights drawn from `config.seed`, and load its pretrained start.

    Several S that all began with the same weights before one G would stay the same: alike learners
    have alike gradients, and that of Eq. 9 is 0 between them. Each gets noise of its own, as the
    paper's must have had, which does not say what set them apart.

    Args:
        config: of the run.
        apart: False leaves several S without the noise, as the weights are.

    Raises:
        InputError: the weights cannot be read, or do not fit.
    """
    torch.manual_seed(config.seed)
    model = build_model(config)
    resize, crop = config.data.resize, config.data.crop
    if config.model.weights is None:
        preprocessing = Preprocessing(resize=resize, crop=crop)
        return Start(model, preprocessing, None, frozenset(), "random weights")
    weights = read_weights(config.model.weights)
    report = load_pretrained(model.backbone_parts(), weights, model.new_parts())
    loaded = {f"{part}.{key}" for part, keys in report.loaded.items() for key in keys}
    told = str(report)
    if apart and len(model.spatial) > 1:
        _set_apart(model.spatial)
        told += f"\nspatial: noise of {TAIL_NOISE:g} of its deviation on each weight"
    return Start(
        model,
        dataclasses.replace(weights.preprocessing or Preprocessing(), resize=resize, crop=crop),
        {"source": weights.source, "sha256": weights.sha256},
        frozenset(name for name, _ in model.named_parameters()) - loaded,
        told,
    )


@torch.no_grad()
def _set_apart(copies: nn.ModuleList) -> None:
    """Add noise to the weights of networks that are alike."""
    for weight in (each for each in copies.parameters() if each.ndim > 1):
        weight.add_(TAIL_NOISE * weight.std() * torch.randn_like(weight))
