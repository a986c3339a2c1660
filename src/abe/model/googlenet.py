"""GoogLeNet: the only file that knows its layer names, and where S ends and G begins.

`GOOGLENET` is Caffe's (BVLC) network, the one the authors trained and the only one whose layer
shapes give the parameters and operations of the paper's Tables 1 and 8: real 5x5 convolutions,
biases, local response normalisation, ceil-mode pooling, no batch norm. Its modules carry BVLC's
layer names with "/" turned into ".": `inception_4a/5x5_reduce` is `inception_4a.5x5_reduce`.

`GOOGLENET_BN` has torchvision's layer shapes and names: batch norm, no biases, no response
normalisation, and 3x3 kernels where the paper has 5x5. Its torchvision weights fit; it is not the
paper's network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from abe.data.transforms import Preprocessing
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


class Stem(nn.Sequential):
    """Convolutions named as BVLC names them, a ReLU after each; (B, C, H, W) -> (B, C', h, w)."""

    def __init__(self, convolutions: dict[str, nn.Conv2d]) -> None:
        super().__init__()
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)
            self.add_module(f"relu_{name}", nn.ReLU(inplace=True))
            self.out_channels = convolution.out_channels


class Inception(nn.Module):
    """An inception block of Caffe's GoogLeNet; (B, C, h, w) -> (B, C', h, w)."""

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        c1x1, c3x3_reduce, c3x3, c5x5_reduce, c5x5, pool_proj = channels
        self.add_module("1x1", _conv(in_channels, c1x1, 1))
        self.add_module("3x3_reduce", _conv(in_channels, c3x3_reduce, 1))
        self.add_module("3x3", _conv(c3x3_reduce, c3x3, 3))
        self.add_module("5x5_reduce", _conv(in_channels, c5x5_reduce, 1))
        self.add_module("5x5", _conv(c5x5_reduce, c5x5, 5))
        self.add_module("pool", nn.MaxPool2d(3, stride=1, padding=1))
        self.add_module("pool_proj", _conv(in_channels, pool_proj, 1))
        self.out_channels = c1x1 + c3x3 + c5x5 + pool_proj

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the four branches along the channels."""
        layer = self._modules
        branches = (
            ("1x1",),
            ("3x3_reduce", "3x3"),
            ("5x5_reduce", "5x5"),
            ("pool", "pool_proj"),
        )
        outputs = []
        for branch in branches:
            y = x
            for name in branch:
                y = layer[name](y)  # type: ignore[misc]
                if name != "pool":
                    y = torch.relu_(y)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def _max_pool(in_channels: int) -> nn.Module:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def _response_norm(in_channels: int) -> nn.Module:
    return nn.LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=1.0)


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


def _googlenet_stages() -> tuple[Stage, ...]:
    inception = _inception_stages("inception_", Inception)
    return (
        Stage("conv1", lambda in_channels: Stem({"7x7_s2": _conv(in_channels, 64, 7, stride=2)})),
        Stage("pool1", _max_pool),
        Stage("norm1", _response_norm),
        Stage(
            "conv2",
            lambda in_channels: Stem(
                {"3x3_reduce": _conv(in_channels, 64, 1), "3x3": _conv(64, 192, 3)}
            ),
        ),
        Stage("norm2", _response_norm),
        Stage("pool2", _max_pool),
        *(inception[name] for name in ("3a", "3b")),
        Stage("pool3", _max_pool),
        *(inception[name] for name in ("4a", "4b", "4c", "4d", "4e")),
        Stage("pool4", _max_pool),
        *(inception[name] for name in ("5a", "5b")),
    )


GOOGLENET = Backbone(
    name="googlenet",
    stages=_googlenet_stages(),
    branch_point="pool3",
    attention_depth=5,
    min_image_size=31,
    telling_key="inception_3a.1x1.weight",
    preprocessing=Preprocessing(),
)


# --- torchvision's GoogLeNet -------------------------------------------------------------------


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
