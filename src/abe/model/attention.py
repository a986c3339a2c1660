"""The attention module A_m = A'_m(C(.)) of section 4: a shared trunk, one 1x1 convolution each.

Shapes: B images, M learners, K channels of the spatial feature, h x w its size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from abe.model import fused


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

    def forward(self, trunk_features: Tensor, learner: int | None = None) -> Tensor:
        """(B, C, h, w) -> masks (B, M, K, h, w), every element between 0 and 1.

        Args:
            trunk_features: C(S(x)).
            learner: the only one to compute, (B, 1, K, h, w); None for all.
        """
        weight, bias = self.weight, self.bias
        assert bias is not None
        if learner is not None:
            weight, bias = (part.chunk(self.num_learners)[learner] for part in (weight, bias))
        convolution = fused.conv1x1 if fused.pays(trunk_features) else self._conv_forward
        logits = convolution(trunk_features, weight, bias)
        return torch.sigmoid(logits).unflatten(1, (-1, len(self.weight) // self.num_learners))


def gate(spatial: Tensor, masks: Tensor) -> Tensor:
    """S(x) * A_m(S(x)) of Eq. 7 for all learners; (B, K, h, w), (B, M, K, h, w) -> as the masks.

    The product's memory has the channels last and image after image, learner after learner, so that
    G takes it as one batch without a copy.
    """
    product: Tensor = _Gate.apply(spatial, masks)
    return product


class _Gate(torch.autograd.Function):
    """The product, without what autograd would keep and add up M times over."""

    @staticmethod
    def forward(ctx: Any, spatial: Tensor, masks: Tensor) -> Tensor:
        ctx.save_for_backward(spatial, masks)
        batch, _, channels, *size = masks.shape
        product = masks.new_empty(batch, masks.shape[1], *size, channels).movedim(-1, 2)
        return torch.mul(spatial.unsqueeze(1), masks, out=product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        spatial, masks = ctx.saved_tensors
        exact = torch.promote_types(spatial.dtype, torch.float32)
        of_spatial = torch.zeros_like(spatial, dtype=exact)
        of_masks = torch.empty_like(masks)
        for learner in range(masks.shape[1]):
            of_spatial.addcmul_(gradient[:, learner], masks[:, learner])
            torch.mul(gradient[:, learner], spatial, out=of_masks[:, learner])
        return of_spatial.to(spatial.dtype), of_masks
