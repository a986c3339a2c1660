"""The ensembles of the paper: ABE-M and the three it is compared with.

Shapes: B images, M learners, D the size of the ensemble's embedding, d = D / M that of one
learner, K channels of the spatial feature, h x w its size. Learner embeddings are (B, M, d)
until `concat` makes them (B, D).

    images -> S (B, K, h, w) -+-> C -> A'_1..A'_M -> masks (B, M, K, h, w)
                              +----------- * -----------> G -> (B, M, d)

| network             | S        | A    | G        | paper                    |
|---------------------|----------|------|----------|--------------------------|
| AttentionEnsemble   | one      | M    | one      | Eqs. 5, 7, 11; Fig. 1(b) |
| MHeads              | one      | none | M        | Eq. 4; Fig. 1(a)         |
| MHeadsWithAttention | one      | M    | M        | supplement, Fig. 8(a)    |
| MTails              | M        | none | one      | supplement, Fig. 8(b)    |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from abe.errors import InputError
from abe.model.attention import AttentionHeads, gate
from abe.model.backbones import Backbone, get_backbone


class AttentionEnsemble(nn.Module):
    """ABE-M: B_m(x) = G(S(x) * A_m(S(x))) for learners m = 1..M (Eqs. 7, 11).

    Shared G sees all learners' features as one batch. For a backbone with batch norm, which the
    paper's has not, this is no loop over learners in training mode: its statistics in G are those
    of B * M feature maps. In evaluation mode it is one.

    Args:
        num_learners: M.
        embedding_dim: D, the size of the ensemble's embedding; each learner has d = D / M.
        backbone: the network that is cut into S and G, by name or as an object.
        branch_point: last stage of S (Fig. 7b); the backbone's own default if None.
        attention_depth: blocks in the attention trunk C (Fig. 7a); the backbone's default if None.
        attention_width: factor on the channels of C. Other than 1, C starts from random weights.
        attention: False leaves the masks out: every learner sees S(x) as it is.
        shared_spatial: False gives every learner an S of its own.
        shared_embedding: False gives every learner a G of its own.

    Raises:
        InputError: M < 1, M does not divide D, a cut that the backbone does not have, or a depth
            or width of C without attention.
    """

    def __init__(
        self,
        num_learners: int = 8,
        embedding_dim: int = 512,
        backbone: str | Backbone = "googlenet",
        *,
        branch_point: str | None = None,
        attention_depth: int | None = None,
        attention_width: float = 1.0,
        attention: bool = True,
        shared_spatial: bool = True,
        shared_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.num_learners = num_learners
        self.embedding_dim = embedding_dim
        self.learner_dim = learner_dim(num_learners, embedding_dim)
        self.attention_width = attention_width
        self.backbone = get_backbone(backbone)
        cut = self.backbone.branch_point if branch_point is None else branch_point

        num_spatial = 1 if shared_spatial else num_learners
        self.spatial = nn.ModuleList(self.backbone.spatial(cut) for _ in range(num_spatial))
        channels: int = self.spatial[0].out_channels  # type: ignore[assignment]

        self.attention_trunk: nn.Module | None = None
        self.attention_heads: AttentionHeads | None = None
        if attention:
            if not shared_spatial:
                raise InputError("attention=True takes one S: leave shared_spatial=True")
            default = self.backbone.attention_depth
            depth = default if attention_depth is None else attention_depth
            trunk = self.backbone.attention_trunk(cut, channels, depth, attention_width)
            self.attention_trunk = trunk
            self.attention_heads = AttentionHeads(trunk.out_channels, num_learners, channels)
        elif attention_depth is not None or attention_width != 1:
            raise InputError(
                f"attention_depth={attention_depth}, attention_width={attention_width}: "
                f"{type(self).__name__} has no attention here, so leave them out (None and 1)"
            )

        num_embedding = 1 if shared_embedding else num_learners
        self.embedding = nn.ModuleList(
            self.backbone.embedding(cut, channels, self.learner_dim) for _ in range(num_embedding)
        )
        self.activation_checkpointing = False
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def checkpoint_activations(self) -> Self:
        """Keep the activations of S, of C or of one learner, and of no more, at a time.

        For the gradient they are computed a second time (Chen et al., "Training deep nets with
        sublinear memory cost", 2016). Embeddings and gradients are the same but for rounding.

        Raises:
            InputError: the network has batch norm: G's statistics are over all learners at once,
                and a second pass would count twice.
        """
        if any(isinstance(module, nn.BatchNorm2d) for module in self.modules()):
            raise InputError(
                f"{self.backbone.name} has batch norm, whose statistics are over all learners at "
                "once: leave activation checkpointing off"
            )
        self.activation_checkpointing = True
        return self

    def forward(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Embed images by every learner; (B, 3, H, W) -> (B, M, d).

        Each learner's embedding has unit length (Fig. 5 plots cosines, and margins of 1 ask for
        it); `normalize=False` gives the linear layer's output, which some published losses want.

        Raises:
            InputError: not (B, 3, H, W), or smaller than the backbone can process.
        """
        self._check(images)
        if self.activation_checkpointing and torch.is_grad_enabled():
            embeddings = self._embed_one_by_one(images)
        else:
            embeddings = self._embed(self._learner_features(images))
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return F.normalize(embeddings, dim=-1) if normalize else embeddings

    def attention_masks(self, images: Tensor) -> Tensor:
        """A_m(S(x)) for all learners; (B, 3, H, W) -> (B, M, K, h, w), between 0 and 1.

        Raises:
            InputError: the network has no attention, or `forward` would refuse the images.
        """
        self._check(images)
        if self.attention_trunk is None:
            raise InputError(f"{type(self).__name__} has no attention masks")
        return self._masks(self.spatial[0](images))

    def backbone_parts(self) -> Mapping[str, nn.Module]:
        """The parts that start from pretrained weights, under their names in the state dict.

        A trunk of another width than the backbone's has no pretrained weights.
        """
        parts = {f"spatial.{i}": part for i, part in enumerate(self.spatial)}
        if self.attention_trunk is not None and self.attention_width == 1:
            parts["attention_trunk"] = self.attention_trunk
        return parts | {f"embedding.{i}": part for i, part in enumerate(self.embedding)}

    def new_parts(self) -> Mapping[str, nn.Module]:
        """The other parts, for which there are no pretrained weights."""
        known = {name.partition(".")[0] for name in self.backbone_parts()}
        return {name: part for name, part in self.named_children() if name not in known}

    def _masks(self, spatial: Tensor) -> Tensor:
        assert self.attention_trunk is not None
        assert self.attention_heads is not None
        masks: Tensor = self.attention_heads(self.attention_trunk(spatial))
        return masks

    def _learner_features(self, images: Tensor) -> Tensor:
        """What reaches G: S_m(x), gated where there is attention; -> (B, M, K, h, w)."""
        if len(self.spatial) > 1:
            return torch.stack([spatial(images) for spatial in self.spatial], dim=1)
        spatial = self.spatial[0](images)  # (B, K, h, w)
        if self.attention_trunk is None:
            return spatial.unsqueeze(1).expand(-1, self.num_learners, -1, -1, -1)
        return gate(spatial, self._masks(spatial))

    def _embed(self, features: Tensor) -> Tensor:
        """G on every learner's features, as one batch; (B, M, K, h, w) -> (B, M, d)."""
        if len(self.embedding) > 1:
            learners = zip(self.embedding, features.unbind(1), strict=True)
            return torch.stack([embedding(feature) for embedding, feature in learners], dim=1)
        # Flattened with the channels last: one copy, which is in the memory format of the weights.
        batch = features.permute(0, 1, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2)
        return self.embedding[0](batch).unflatten(0, features.shape[:2])

    def _embed_one_by_one(self, images: Tensor) -> Tensor:
        """Learner by learner; S, C and each learner are computed again for the gradient.

        (B, 3, H, W) -> (B, M, d)
        """
        spatial = trunk = None
        if len(self.spatial) == 1:
            spatial = checkpoint(self.spatial[0], images, use_reentrant=False)
        if self.attention_trunk is not None:
            trunk = checkpoint(self.attention_trunk, spatial, use_reentrant=False)

        def embed(learner: int, spatial: Tensor | None, trunk: Tensor | None) -> Tensor:
            if spatial is None:
                spatial = self.spatial[learner](images)
            elif trunk is not None:
                assert self.attention_heads is not None
                spatial = gate(spatial, self.attention_heads(trunk, learner)).flatten(0, 1)
            embedding: Tensor = self.embedding[learner % len(self.embedding)](spatial)
            return embedding

        learners = range(self.num_learners)
        return torch.stack(
            [checkpoint(embed, m, spatial, trunk, use_reentrant=False) for m in learners], dim=1
        )

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images have shape {tuple(images.shape)}: expected (B, 3, H, W)")
        smallest = self.backbone.min_image_size
        if min(images.shape[2:]) < smallest:
            height, width = images.shape[2:]
            raise InputError(
                f"images of {height} x {width} pixels are too small for {self.backbone.name}: "
                f"it takes {smallest} x {smallest} and above"
            )


class _Variant(AttentionEnsemble):
    """An ensemble whose parts its name settles; takes the other arguments of `AttentionEnsemble`.

    Raises:
        InputError: see `AttentionEnsemble`; or an argument that the name settles.
    """

    _settled: ClassVar[Mapping[str, Any]]

    def __init__(
        self,
        num_learners: int = 8,
        embedding_dim: int = 512,
        backbone: str | Backbone = "googlenet",
        **cut: Any,
    ) -> None:
        for key in self._settled.keys() & cut.keys():
            raise InputError(
                f"{key}={cut[key]}: {type(self).__name__} settles it, so leave it out or build an "
                "AttentionEnsemble"
            )
        super().__init__(num_learners, embedding_dim, backbone, **cut, **self._settled)


class MHeads(_Variant):
    """M-heads ensemble (Eq. 4, Fig. 1a): one S, a G for each learner. `MHeads(1)` is 1-head."""

    _settled: ClassVar = {"attention": False, "shared_embedding": False}


class MHeadsWithAttention(_Variant):
    """M-heads+att (supplement, Fig. 8a): one S, a mask and a G for each learner."""

    _settled: ClassVar = {"attention": True, "shared_embedding": False}


class MTails(_Variant):
    """M-tails (supplement, Fig. 8b): an S for each learner, one G."""

    _settled: ClassVar = {"attention": False, "shared_spatial": False}


def concat(embeddings: Tensor) -> Tensor:
    """The ensemble's embedding; (B, M, d) -> (B, D).

    Scaled so that the dot product of two ensembles is the mean of their learners' dot products,
    and the squared distance the mean of the learners' squared distances (Eq. 3 with the squared
    Euclidean distance as d_Y): unit learners give a unit ensemble.

    Raises:
        InputError: not three axes.
    """
    if embeddings.ndim != 3:
        raise InputError(
            f"embeddings have shape {tuple(embeddings.shape)}: expected (B, M, d), as networks give"
        )
    return embeddings.flatten(1) / embeddings.shape[1] ** 0.5


def learner_dim(num_learners: int, embedding_dim: int) -> int:
    """Size d = D / M of a learner's embedding.

    Raises:
        InputError: M < 1, D < 1, or M does not divide D; the message says what would fit.
    """
    if num_learners < 1:
        raise InputError(f"num_learners={num_learners}: an ensemble has at least 1 learner")
    if embedding_dim < 1 or embedding_dim % num_learners:
        below = max(embedding_dim, 0) // num_learners * num_learners
        fits = [str(size) for size in (below, below + num_learners) if size > 0]
        raise InputError(
            f"embedding_dim={embedding_dim} cannot be shared by {num_learners} learners: "
            f"use {' or '.join(fits)}"
        )
    return embedding_dim // num_learners
