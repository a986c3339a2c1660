"""GoogLeNet: its layers by their names, and where S ends and G begins.

`GOOGLENET` is Caffe's (BVLC) network, the one the authors trained and the only one whose layer
shapes give the parameters and operations of the paper's Tables 1 and 8: real 5x5 convolutions,
biases, local response normalisation, ceil-mode pooling, no batch norm. Its modules carry BVLC's
layer names with "/" turned into ".": `inception_4a/5x5_reduce` is `inception_4a.5x5_reduce`. It is
pretrained as `GOOGLENET_UNFOLDED`, with batch norm, which `abe.pretrain` folds into its layers.

`GOOGLENET_BN` has torchvision's layer shapes and names: batch norm, no biases, no response
normalisation, and 3x3 kernels where the paper has 5x5. Its torchvision weights fit; it is not the
paper's network.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.fusion import fuse_conv_bn_eval

from abe.data.transforms import Preprocessing
from abe.model import fused
from abe.model.backbones import Backbone, Stage

# Output channels of the six convolutions of each inception block, Szegedy et al. 2015, Table 1:
# 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
_INCEPTION = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def _scaled(channels: Sequence[int], width: float) -> list[int]:
    return [max(1, round(width * c)) for c in channels]


# --- Caffe's GoogLeNet -------------------------------------------------------------------------


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)


class ConvBN(nn.Sequential):
    """Convolution without bias, batch norm, ReLU, with torchvision's names `conv` and `bn`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)
        self.relu = nn.ReLU(inplace=True)
        self.out_channels = out_channels


Convolution = Callable[..., nn.Conv2d | ConvBN]
"""Channels of the input and the output, kernel and stride -> layer: `_conv` or `ConvBN`."""


class Stem(nn.Sequential):
    """Convolutions named as BVLC names them, a ReLU after each; (B, C, H, W) -> (B, C', h, w)."""

    def __init__(self, convolutions: dict[str, nn.Conv2d | ConvBN]) -> None:
        super().__init__()
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)
            if isinstance(convolution, nn.Conv2d):  # the other has its own
                self.add_module(f"relu_{name}", nn.ReLU(inplace=True))
            self.out_channels = convolution.out_channels


class Inception(nn.Module):
    """An inception block of Caffe's GoogLeNet; (B, C, h, w) -> (B, C', h, w)."""

    convolution: ClassVar[Convolution] = staticmethod(_conv)

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        c1x1, c3x3_reduce, c3x3, c5x5_reduce, c5x5, pool_proj = channels
        self.add_module("1x1", self.convolution(in_channels, c1x1, 1))
        self.add_module("3x3_reduce", self.convolution(in_channels, c3x3_reduce, 1))
        self.add_module("3x3", self.convolution(c3x3_reduce, c3x3, 3))
        self.add_module("5x5_reduce", self.convolution(in_channels, c5x5_reduce, 1))
        self.add_module("5x5", self.convolution(c5x5_reduce, c5x5, 5))
        self.add_module("pool", nn.MaxPool2d(3, stride=1, padding=1))
        self.add_module("pool_proj", self.convolution(in_channels, pool_proj, 1))
        self.out_channels = c1x1 + c3x3 + c5x5 + pool_proj

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the four branches along the channels.

        The three 1x1 convolutions of `x` run as one, which is one matrix product: apart, the thin
        ones leave most of the processor idle.
        """
        layer: dict[str, Any] = self._modules
        first = [layer[name] for name in ("1x1", "3x3_reduce", "5x5_reduce")]
        weight = torch.cat([convolution.weight for convolution in first])
        bias = torch.cat([convolution.bias for convolution in first])
        if fused.pays(x):
            others = [layer[name] for name in ("3x3", "5x5", "pool_proj")]
            return fused.inception(x, (weight, bias), *((c.weight, c.bias) for c in others))
        sizes = [convolution.out_channels for convolution in first]
        # Not in place: the outputs are dense again, as the next convolutions take them.
        y1x1, y3x3, y5x5 = map(F.relu, F.conv2d(x, weight, bias).split(sizes, dim=1))
        outputs = [layer["3x3"](y3x3), layer["5x5"](y5x5), layer["pool_proj"](layer["pool"](x))]
        return torch.cat([y1x1, *map(torch.relu_, outputs)], dim=1)


class InceptionUnfolded(Inception):
    """The same block with batch norm after each convolution; (B, C, h, w) -> (B, C', h, w)."""

    convolution = ConvBN

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the four branches along the channels."""
        layer: dict[str, Any] = self._modules
        y3x3 = layer["3x3"](layer["3x3_reduce"](x))
        y5x5 = layer["5x5"](layer["5x5_reduce"](x))
        return torch.cat((layer["1x1"](x), y3x3, y5x5, layer["pool_proj"](layer["pool"](x))), 1)


class ResponseNorm(nn.Module):
    """Local response normalisation across channels, as Caffe has it; keeps the shape.

    x / (1 + alpha / size * sum of x^2 over the `size` nearest channels)^0.75
    """

    size = 5
    alpha = 1e-4
    beta = 0.75

    band: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        channel = torch.arange(channels)
        near = (channel[:, None] - channel[None, :]).abs() <= self.size // 2
        self.register_buffer("band", near.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        y: Tensor = _ResponseNorm.apply(x, self.band)
        return y


class _ResponseNorm(torch.autograd.Function):
    """With the channels last, the window's sum is a product with a band matrix.

    n = 1 + a x^2 band and y = x n^-0.75, so dx = g n^-0.75 - 1.5 a x ((g y / n) band), where a is
    alpha / size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, band: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()
        norm = _windows(x.square(), band).mul_(ResponseNorm.alpha / ResponseNorm.size).add_(1)
        ctx.save_for_backward(x, norm, band)
        return (x * _factor(norm)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, norm, band = ctx.saved_tensors
        scaled = gradient.permute(0, 2, 3, 1) * _factor(norm)
        pull = _windows((scaled * x).div_(norm), band)
        share = -2 * ResponseNorm.beta * ResponseNorm.alpha / ResponseNorm.size
        return scaled.addcmul_(x, pull, value=share).permute(0, 3, 1, 2), None


def _factor(norm: Tensor) -> Tensor:
    """n^-0.75, by roots: quicker than by a power."""
    root = norm.rsqrt()
    return root.mul_(root.sqrt())


def _windows(x: Tensor, band: Tensor) -> Tensor:
    """Sums over the nearest channels; (B, h, w, C) -> the same, in its precision."""
    if x.dtype == torch.float32 and not x.is_meta:
        with torch.autocast(x.device.type, enabled=False):
            return (x.flatten(0, 2) @ band).view_as(x)
    return (x.flatten(0, 2) @ band.to(x.dtype)).view_as(x)


def _max_pool(in_channels: int) -> nn.Module:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def _inception_stages(
    prefix: str, block: Callable[[int, Sequence[int]], nn.Module]
) -> dict[str, Stage]:
    def stage(name: str, channels: Sequence[int]) -> Stage:
        return Stage(
            prefix + name,
            lambda in_channels: block(in_channels, channels),
            lambda in_channels, width: block(in_channels, _scaled(channels, width)),
        )

    return {name: stage(name, channels) for name, channels in _INCEPTION.items()}


def _googlenet_stages(block: type[Inception]) -> tuple[Stage, ...]:
    conv = block.convolution
    inception = _inception_stages("inception_", block)
    return (
        Stage("conv1", lambda in_channels: Stem({"7x7_s2": conv(in_channels, 64, 7, stride=2)})),
        Stage("pool1", _max_pool),
        Stage("norm1", ResponseNorm),
        Stage(
            "conv2",
            lambda in_channels: Stem(
                {"3x3_reduce": conv(in_channels, 64, 1), "3x3": conv(64, 192, 3)}
            ),
        ),
        Stage("norm2", ResponseNorm),
        Stage("pool2", _max_pool),
        *(inception[name] for name in ("3a", "3b")),
        Stage("pool3", _max_pool),
        *(inception[name] for name in ("4a", "4b", "4c", "4d", "4e")),
        Stage("pool4", _max_pool),
        *(inception[name] for name in ("5a", "5b")),
    )


GOOGLENET = Backbone(
    name="googlenet",
    stages=_googlenet_stages(Inception),
    branch_point="pool3",
    attention_depth=5,
    min_image_size=31,
    telling_key="inception_3a.1x1.weight",
    preprocessing=Preprocessing(),
)

# How it is pretrained. Near unit scale, where batch norm leaves them, activations pass Caffe's
# response norm almost as they are, so it does without. The scale is the input's: in conv1 it would
# make weights 58 times smaller and their gradients as much larger, too large for the others' rate.
GOOGLENET_UNFOLDED = dataclasses.replace(
    GOOGLENET,
    stages=tuple(
        stage
        for stage in _googlenet_stages(InceptionUnfolded)
        if stage.name not in ("norm1", "norm2")
    ),
    preprocessing=Preprocessing(scale=1 / 58),
)


def folded(part: nn.Module) -> dict[str, Tensor]:
    """The layers of a part of `GOOGLENET_UNFOLDED` as `GOOGLENET` has them, under BVLC's names.

    Batch norm, as it is in evaluation mode, becomes a part of each convolution's weight and bias.
    """
    state = {}
    for name, layer in copy.deepcopy(part).eval().named_modules():
        if isinstance(layer, ConvBN):
            convolution = fuse_conv_bn_eval(layer.conv, layer.bn)
            for key, value in convolution.named_parameters():
                state[f"{name.replace('.', '/')}.{key}"] = value.detach()
    return state


# --- torchvision's GoogLeNet -------------------------------------------------------------------


class InceptionBN(nn.Module):
    """An inception block with torchvision's shapes and names; (B, C, h, w) -> (B, C', h, w)."""

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        c1x1, c3x3_reduce, c3x3, c5x5_reduce, c5x5, pool_proj = channels
        self.branch1 = ConvBN(in_channels, c1x1, 1)
        self.branch2 = nn.Sequential(
            ConvBN(in_channels, c3x3_reduce, 1), ConvBN(c3x3_reduce, c3x3, 3)
        )
        self.branch3 = nn.Sequential(  # 3x3, not 5x5: torchvision issue 906
            ConvBN(in_channels, c5x5_reduce, 1), ConvBN(c5x5_reduce, c5x5, 3)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), ConvBN(in_channels, pool_proj, 1)
        )
        self.out_channels = c1x1 + c3x3 + c5x5 + pool_proj

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the four branches along the channels."""
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), 1)


def _googlenet_bn_stages() -> tuple[Stage, ...]:
    inception = _inception_stages("inception", InceptionBN)
    return (
        Stage("conv1", lambda in_channels: ConvBN(in_channels, 64, 7, stride=2)),
        Stage("maxpool1", _max_pool),
        Stage("conv2", lambda in_channels: ConvBN(in_channels, 64, 1)),
        Stage("conv3", lambda in_channels: ConvBN(in_channels, 192, 3)),
        Stage("maxpool2", _max_pool),
        *(inception[name] for name in ("3a", "3b")),
        Stage("maxpool3", _max_pool),
        *(inception[name] for name in ("4a", "4b", "4c", "4d", "4e")),
        Stage("maxpool4", lambda in_channels: nn.MaxPool2d(2, stride=2, ceil_mode=True)),
        *(inception[name] for name in ("5a", "5b")),
    )


GOOGLENET_BN = Backbone(
    name="googlenet_bn",
    stages=_googlenet_bn_stages(),
    branch_point="maxpool3",
    attention_depth=5,
    min_image_size=15,
    telling_key="inception3a.branch1.conv.weight",
    # torchvision feeds these TensorFlow weights (x - 0.5) / 0.5: `GoogLeNet.transform_input` undoes
    # the ImageNet statistics that its transforms apply.
    preprocessing=Preprocessing(channels="RGB", mean=(127.5, 127.5, 127.5), scale=1 / 127.5),
)
