"""Convolutions on a processor: the same numbers in fewer passes over memory.

The gradients of 1x1 convolutions are matrix products, which libraries do faster than convolutions'
gradients. In an inception block the three 1x1 convolutions of the input are one, and ReLUs write
where the parts of the output, or of a gradient, belong, so that nothing is concatenated.

Shapes: B images, C and C' channels of the input and the output, h x w their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

aten: Any = torch.ops.aten


def pays(x: Tensor) -> bool:
    """Whether an input is where this is faster."""
    return x.device.type == "cpu"


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution; (B, C, h, w) -> (B, C', h, w), channels last."""
    y: Tensor = _Conv1x1.apply(*_prepared(x, weight, bias))
    return y


def inception(
    x: Tensor,
    first: tuple[Tensor, Tensor],
    c3x3: tuple[Tensor, Tensor],
    c5x5: tuple[Tensor, Tensor],
    pool_proj: tuple[Tensor, Tensor],
) -> Tensor:
    """The block; (B, C, h, w) -> (B, C', h, w), channels last.

    Args:
        x: its input.
        first: weight and bias of the 1x1 convolutions of `x`, one below the other: 1x1, 3x3_reduce,
            5x5_reduce.
        c3x3: of the 3x3 convolution.
        c5x5: of the 5x5 convolution.
        pool_proj: of the 1x1 convolution behind the pooling.
    """
    y: Tensor = _Inception.apply(*_prepared(x, *first, *c3x3, *c5x5, *pool_proj))
    return y


class _Conv1x1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return _conv1x1_backward(_dense(gradient), *ctx.saved_tensors)


class _Inception(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        w1, b1, w3, b3, w5, b5, wp, bp = parameters
        ctx.sizes = [len(w1) - w3.shape[1] - w5.shape[1], len(w3), len(w5), len(wp)]
        merged = F.conv2d(x, w1, b1).split([ctx.sizes[0], w3.shape[1], w5.shape[1]], dim=1)
        y3, y5 = (_dense(F.relu(part)) for part in merged[1:])
        pooled, indices = aten.max_pool2d_with_indices(x, 3, 1, 1)
        y = _empty(x, sum(ctx.sizes))
        outputs = [
            merged[0],
            F.conv2d(y3, w3, b3, padding=1),
            F.conv2d(y5, w5, b5, padding=2),
            F.conv2d(pooled, wp, bp),
        ]
        for part, output in zip(y.split(ctx.sizes, dim=1), outputs, strict=True):
            torch.clamp_min(output, 0, out=part)
        ctx.save_for_backward(x, y3, y5, pooled, indices, y, w1, w3, w5, wp)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, y3, y5, pooled, indices, y, w1, w3, w5, wp = ctx.saved_tensors
        of_outputs = gradient.split(ctx.sizes, dim=1)
        outputs = y.split(ctx.sizes, dim=1)

        of_merged = _empty(x, len(w1))
        of_1x1, of_y3, of_y5 = of_merged.split([ctx.sizes[0], y3.shape[1], y5.shape[1]], dim=1)
        _before_relu(of_outputs[0], outputs[0], of_1x1)
        grown = []
        for index, (below, weight, into) in enumerate([(y3, w3, of_y3), (y5, w5, of_y5)], start=1):
            own = _before_relu(of_outputs[index], outputs[index], _empty(x, len(weight)))
            of_below, *grads = _convolution_backward(own, below, weight)
            _before_relu(of_below, below, into)
            grown += grads
        own = _before_relu(of_outputs[3], outputs[3], _empty(x, len(wp)))
        of_pooled, of_wp, of_bp = _conv1x1_backward(own, pooled, wp)

        of_x = aten.max_pool2d_with_indices_backward(
            of_pooled, x, [3, 3], [1, 1], [1, 1], [1, 1], False, indices
        )
        _rows(of_x).addmm_(_rows(of_merged), w1.flatten(1))
        of_w1, of_b1 = _weight_gradient(of_merged, x)
        return of_x, of_w1, of_b1, *grown, of_wp, of_bp


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a convolution's input, weight and bias that keeps the size."""
    padding = [weight.shape[-1] // 2] * 2
    every = [True, True, True]
    found: tuple[Tensor, ...] = aten.convolution_backward(
        gradient, x, weight, [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], 1, every
    )
    return found


def _conv1x1_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a 1x1 convolution's input, weight and bias."""
    of_x = (_rows(gradient) @ weight.flatten(1)).view(len(x), *x.shape[2:], -1)
    return of_x.permute(0, 3, 1, 2), *_weight_gradient(gradient, x)


def _weight_gradient(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a 1x1 convolution's weight and bias."""
    rows = _rows(gradient)
    of_weight = (rows.mT @ _rows(x))[:, None, None]
    return of_weight.permute(0, 3, 1, 2), rows.sum(0)


def _before_relu(gradient: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """The gradient of a ReLU's input, given its output y, into `out`."""
    found: Tensor = aten.threshold_backward.grad_input(gradient, y, 0, grad_input=out)
    return found


def _prepared(*tensors: Tensor) -> Iterator[Tensor]:
    """As autocast would have them, channels last."""
    device = tensors[0].device.type
    for tensor in tensors:
        if torch.is_autocast_enabled(device):
            tensor = tensor.to(torch.get_autocast_dtype(device))
        yield _dense(tensor) if tensor.ndim == 4 else tensor


def _empty(like: Tensor, channels: int) -> Tensor:
    """(B, channels, h, w), channels last, dense."""
    return like.new_empty(len(like), *like.shape[2:], channels).permute(0, 3, 1, 2)


def _dense(x: Tensor) -> Tensor:
    """The same with the channels last in memory, and nothing between them."""
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """(B, C, h, w) with the channels last -> (B h w, C), the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
