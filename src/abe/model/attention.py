"""The attention module A_m = A'_m(C(.)) of section 4: a shared trunk, one 1x1 convolution each.

Shapes: B images, M learners, K channels of the spatial feature, h x w its size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AttentionHeads(nn.Conv2d):
    """A'_1..A'_M: one 1x1 convolution and sigmoid a learner, run as a single convolution.

    Rows `m * K` to `(m + 1) * K` of `weight` and `bias` are learner m's. Each learner's kernel is
    initialised on its own as Glorot and Bengio propose (section 4).
    """

    def __init__(self, in_channels: int, num_learners: int, channels: int) -> None:
        super().__init__(in_channels, num_learners * channels, kernel_size=1)
        self.num_learners = num_learners
        for learner_weight in self.weight.chunk(num_learners):
            nn.init.xavier_uniform_(learner_weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, trunk_features: Tensor) -> Tensor:
        """(B, C, h, w) -> masks (B, M, K, h, w), every element between 0 and 1."""
        logits = super().forward(trunk_features)
        return torch.sigmoid(logits).unflatten(1, (self.num_learners, -1))
