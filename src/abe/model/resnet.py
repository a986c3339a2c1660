"""ResNet-50 (He et al. 2016) with torchvision's layer shapes and names, cut after `layer2`.

The paper uses GoogLeNet only; at the cut the feature map has twice the sides of GoogLeNet's "pool3"
(28 x 28 at 224 px). The attention trunk is `layer3` without its stride.
"""

from __future__ import annotations

from torch import Tensor, nn

from abe.data.transforms import Preprocessing
from abe.model.backbones import Backbone, Stage


class Bottleneck(nn.Module):
    """A residual block, stride on its 3x3 convolution; (B, C, h, w) -> (B, 4 * planes, h', w')."""

    def __init__(self, in_channels: int, planes: int, stride: int, downsample: bool) -> None:
        super().__init__()
        self.out_channels = 4 * planes
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, self.out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(in_channels, self.out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(self.out_channels),
            )
            if downsample
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's residual to its (projected) input."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _layer(
    in_channels: int, planes: int, num_blocks: int, stride: int, width: float = 1.0
) -> nn.Module:
    planes = max(1, round(width * planes))
    blocks = [Bottleneck(in_channels, planes, stride, downsample=True)]
    blocks += [Bottleneck(4 * planes, planes, 1, downsample=False) for _ in range(num_blocks - 1)]
    layer = nn.Sequential(*blocks)
    layer.out_channels = 4 * planes  # type: ignore[assignment]
    return layer


def _layer_stage(name: str, planes: int, num_blocks: int, stride: int) -> Stage:
    return Stage(
        name,
        lambda in_channels: _layer(in_channels, planes, num_blocks, stride),
        lambda in_channels, width: _layer(in_channels, planes, num_blocks, 1, width),
    )


RESNET50 = Backbone(
    name="resnet50",
    stages=(
        Stage("conv1", lambda in_channels: nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)),
        Stage("bn1", nn.BatchNorm2d),
        Stage("relu", lambda in_channels: nn.ReLU(inplace=True)),
        Stage("maxpool", lambda in_channels: nn.MaxPool2d(3, stride=2, padding=1)),
        _layer_stage("layer1", 64, 3, 1),
        _layer_stage("layer2", 128, 4, 2),
        _layer_stage("layer3", 256, 6, 2),
        _layer_stage("layer4", 512, 3, 2),
    ),
    branch_point="layer2",
    attention_depth=1,
    min_image_size=1,
    telling_key="layer1.0.conv1.weight",
    preprocessing=Preprocessing(
        channels="RGB",
        mean=(123.675, 116.28, 103.53),
        scale=(1 / 58.395, 1 / 57.12, 1 / 57.375),
    ),
)
