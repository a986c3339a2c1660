"""A backbone that learns to classify, and what it leaves to those who start from it.

Shapes: B images.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from abe.model.backbones import Backbone, Part, pretraining_form
from abe.model.googlenet import folded


class Classifier(nn.Sequential):
    """A backbone and a linear layer; (B, 3, H, W) -> logits (B, classes)."""

    spatial: Part
    embedding: Part

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        cut = backbone.branch_point
        spatial = backbone.spatial(cut)
        embedding = backbone.embedding(cut, spatial.out_channels, num_classes)
        super().__init__(OrderedDict(spatial=spatial, embedding=embedding))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def linear(self) -> nn.Module:
        """The layer that a start does without."""
        return self.embedding.get_submodule("linear")


def exported(network: Classifier, backbone: Backbone) -> dict[str, Tensor]:
    """What a start for `backbone` holds: all but the linear layer, under names of its own.

    In float16, but batch norm's statistics, whose range is wider, as they are.

    Args:
        network: of `pretraining_form(backbone)`; where that is another, it is `folded`.
        backbone: which the start is for.
    """
    fold = pretraining_form(backbone) is not backbone
    state: dict[str, Tensor] = {}
    for part in network:
        state |= folded(part) if fold else part.state_dict()
    return {
        key: value.cpu() if "running_" in key else value.half().cpu()
        for key, value in state.items()
        if value.is_floating_point() and not key.startswith("linear.")
    }
