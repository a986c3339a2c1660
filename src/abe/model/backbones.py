"""A backbone as a chain of named stages that can be cut in two: S below the cut, G above it.

Shapes: B images, K channels of the spatial feature, h x w its size, d the size of one learner's
embedding. The paper's Eq. 6 writes the network as a chain of layers and cuts it at a "branching
point"; here the chain is `Backbone.stages` and the cut is the name of the last stage of S.

A backbone of one's own is a `Backbone` object, which the networks' constructors take in place of a
name; configurations and the command line take names alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import nn

from abe.data.transforms import Preprocessing
from abe.errors import InputError

Builder = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Stage:
    """One step of a backbone.

    Attributes:
        name: the prefix of its parameters' names.
        build: channels that reach it -> module. The module has the attribute `out_channels`
            unless it leaves the number of channels alone.
        trunk: (channels that reach it, width) -> the same block as a part of an attention trunk:
            it keeps the feature map's size and scales its channels by `width`. None where the
            stage is no block (a stem, a pooling), so that trunks pass it over.
    """

    name: str
    build: Builder
    trunk: Callable[[int, float], nn.Module] | None = None


class Part(nn.Sequential):
    """Named modules in a row: keys of its state dict are `<stage>.<rest>`."""

    def __init__(self, in_channels: int, builders: Iterable[tuple[str, Builder]]) -> None:
        super().__init__()
        for name, build in builders:
            module = build(in_channels)
            in_channels = getattr(module, "out_channels", in_channels)
            self.add_module(name, module)
        self.out_channels = in_channels


@dataclass(frozen=True)
class Backbone:
    """The stages of a classification network up to its global pooling, and where it is cut.

    Attributes:
        name: what the command line and configurations call it.
        stages: from the image to the last feature map.
        branch_point: name of the last stage of S unless told otherwise.
        attention_depth: number of blocks in the attention trunk C unless told otherwise.
        min_image_size: smallest side in pixels that every stage can process.
        telling_key: a tensor's name that tells its published weights from other backbones'.
        preprocessing: what those weights expect of images where their file does not say.
    """

    name: str
    stages: tuple[Stage, ...]
    branch_point: str
    attention_depth: int
    min_image_size: int
    telling_key: str | None = None
    preprocessing: Preprocessing | None = None

    def spatial(self, branch_point: str) -> Part:
        """S: the stages up to and with `branch_point`; images (B, 3, H, W) -> (B, K, h, w)."""
        stages = self.stages[: self._cut(branch_point)]
        return Part(3, ((stage.name, stage.build) for stage in stages))

    def attention_trunk(
        self, branch_point: str, in_channels: int, depth: int, width: float = 1.0
    ) -> Part:
        """C: the next `depth` blocks after the cut, none of them downsampling (section 6.3).

        Raises:
            InputError: fewer than `depth` blocks follow the branch point, or `width` is not > 0.
        """
        blocks = [
            (stage.name, partial(_with_width, stage.trunk, width))
            for stage in self.stages[self._cut(branch_point) :]
            if stage.trunk is not None
        ]
        if not 1 <= depth <= len(blocks):
            raise InputError(
                f"attention_depth={depth}: {self.name} has {len(blocks)} blocks after "
                f"{branch_point!r}, so use 1 to {len(blocks)}"
            )
        if not width > 0:
            raise InputError(f"attention_width={width}: use a factor above 0 (1 is the paper's)")
        return Part(in_channels, blocks[:depth])

    def embedding(self, branch_point: str, in_channels: int, learner_dim: int) -> Part:
        """G: the stages after the cut, global average pool, linear; (B, K, h, w) -> (B, d)."""
        stages = self.stages[self._cut(branch_point) :]
        part = Part(in_channels, ((stage.name, stage.build) for stage in stages))
        linear = nn.Linear(part.out_channels, learner_dim)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        part.add_module("pool", nn.AdaptiveAvgPool2d(1))
        part.add_module("flatten", nn.Flatten())
        part.add_module("linear", linear)
        return part

    def _cut(self, branch_point: str) -> int:
        names = [stage.name for stage in self.stages]
        if branch_point not in names[:-1]:
            raise InputError(
                f"branch_point={branch_point!r} is not a stage of {self.name} that anything "
                f"follows: use one of {', '.join(names[:-1])}"
            )
        return names.index(branch_point) + 1


def _with_width(
    trunk: Callable[[int, float], nn.Module], width: float, in_channels: int
) -> nn.Module:
    return trunk(in_channels, width)


def pretraining_form(backbone: Backbone) -> Backbone:
    """What is trained in its place where it has no batch norm, which training from nothing takes.

    Its stages are the same apart from the batch norm in them; else the backbone itself.
    """
    from abe.model.googlenet import GOOGLENET, GOOGLENET_UNFOLDED

    return GOOGLENET_UNFOLDED if backbone is GOOGLENET else backbone


def known_backbones() -> dict[str, Backbone]:
    """The backbones that have a name, by it."""
    from abe.model.googlenet import GOOGLENET, GOOGLENET_BN
    from abe.model.resnet import RESNET50

    return {backbone.name: backbone for backbone in (GOOGLENET, GOOGLENET_BN, RESNET50)}


def get_backbone(backbone: str | Backbone) -> Backbone:
    """Look a backbone up by name; a `Backbone` object is returned as it is.

    Raises:
        InputError: there is no backbone of that name.
    """
    if isinstance(backbone, Backbone):
        return backbone
    known = known_backbones()
    if backbone not in known:
        near = difflib.get_close_matches(backbone, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"backbone {backbone!r} is unknown: {hint}use one of {', '.join(known)}")
    return known[backbone]
