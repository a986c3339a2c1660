"""The usual port of ABE-M: what one writes first, and what `benchmarks/step.py` compares with.

The same network, weights and loss as ours, but learners one by one, layer after layer as the
framework has them, images in NCHW memory, and losses in loops over learners and pairs of learners.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abe.model.ensemble import AttentionEnsemble
from abe.model.googlenet import Inception, ResponseNorm


class PlainInception(nn.Module):
    """An inception block, one layer after the other."""

    def __init__(self, block: Inception) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(dict(block.named_children()))

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers
        return torch.cat(
            [
                F.relu(layers["1x1"](x)),
                F.relu(layers["3x3"](F.relu(layers["3x3_reduce"](x)))),
                F.relu(layers["5x5"](F.relu(layers["5x5_reduce"](x)))),
                F.relu(layers["pool_proj"](layers["pool"](x))),
            ],
            dim=1,
        )


class UsualPort(nn.Module):
    """ABE-M with the weights of an `AttentionEnsemble` on Caffe's GoogLeNet.

    Args:
        network: is left as it is; the port gets a copy.
    """

    def __init__(self, network: AttentionEnsemble) -> None:
        super().__init__()
        network = _plain(copy.deepcopy(network)).to(memory_format=torch.contiguous_format)
        (self.spatial,), (self.embedding,) = network.spatial, network.embedding
        self.trunk = network.attention_trunk
        heads = network.attention_heads
        assert heads is not None
        self.heads = nn.ModuleList()
        for weight, bias in zip(
            heads.weight.detach().chunk(heads.num_learners),
            heads.bias.detach().chunk(heads.num_learners),
            strict=True,
        ):
            head = nn.Conv2d(heads.in_channels, len(weight), kernel_size=1)
            head.weight, head.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            self.heads.append(head)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> M times (B, d), of unit length."""
        spatial = self.spatial(images)
        attention = self.trunk(spatial)
        return [
            F.normalize(self.embedding(spatial * torch.sigmoid(head(attention))), dim=1)
            for head in self.heads
        ]


def _plain(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, Inception):
            setattr(module, name, PlainInception(child))
        elif isinstance(child, ResponseNorm):
            setattr(module, name, nn.LocalResponseNorm(child.size, child.alpha, child.beta, k=1.0))
        else:
            _plain(child)
    return module


def usual_loss(learners: list[Tensor], labels: Tensor) -> Tensor:
    """Eq. 8 with margins and weight of 1: ordered pairs of images and of learners, over B."""
    positive = labels[:, None] == labels[None, :]
    total = 0
    for embeddings in learners:
        squared = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
        squared = squared.pow(2)
        total = total + squared[positive].sum() + F.relu(1 - squared[~positive]).sum()
    for p, first in enumerate(learners):
        for q, second in enumerate(learners):
            if p != q:
                total = total + F.relu(1 - (first - second).pow(2).sum(1)).sum()
    return total / len(labels)
