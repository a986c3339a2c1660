"""The losses of the paper: Eqs. 8-10 as pure functions.

Shapes: B images, M learners, d the size of one learner's embedding. Every function takes the
learners' embeddings as (B, M, d), and no function loops over learners or pairs.

All distances are squared Euclidean ones, so that no square root has a gradient at zero, and are
computed in float32 whatever autocast says; float64 embeddings stay float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abe.errors import InputError

MetricLoss = Callable[[Tensor, Tensor], Tensor]
"""(embeddings (B, M, d), labels (B,)) -> (M,), one value for each learner."""

ContrastiveNormalization = Literal["per_image", "sum", "balanced"]
DivergenceNormalization = Literal["per_image", "sum", "per_pair"]


class EnsembleLoss(NamedTuple):
    """Eq. 8 and its two parts."""

    total: Tensor
    """What training minimises, a scalar."""
    metric: Tensor
    """L_metric of each learner, (M,)."""
    divergence: Tensor
    """L_div before its weight, a scalar."""


def ensemble_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    metric_loss: MetricLoss | None = None,
    margin: float = 1.0,
    normalization: ContrastiveNormalization = "per_image",
    divergence_weight: float = 1.0,
    divergence_margin: float = 1.0,
    divergence_normalization: DivergenceNormalization = "per_image",
) -> EnsembleLoss:
    """Eq. 8: the learners' metric losses, summed, plus lambda_div times their divergence loss.

    Args:
        embeddings: (B, M, d).
        labels: (B,).
        metric_loss: what stands in for `contrastive_loss`, whose `margin` and `normalization`
            then have no effect.
        margin: m_c of Eq. 10.
        normalization: that of `contrastive_loss`.
        divergence_weight: lambda_div.
        divergence_margin: m_div of Eq. 9.
        divergence_normalization: that of `divergence_loss`.

    Raises:
        InputError: see `contrastive_loss` and `divergence_loss`.
    """
    if metric_loss is None:
        metric = contrastive_loss(embeddings, labels, margin, normalization)
    else:
        metric = metric_loss(embeddings, labels)
    divergence = divergence_loss(embeddings, divergence_margin, divergence_normalization)
    return EnsembleLoss(metric.sum() + divergence_weight * divergence, metric, divergence)


def contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 1.0,
    normalization: ContrastiveNormalization = "per_image",
) -> Tensor:
    """Eq. 10 for every learner: D^2 of positive pairs, [margin - D^2]_+ of negative ones.

    D is the Euclidean distance between one learner's embeddings of two images. The sums run over
    all ordered pairs of images, so each unordered pair counts twice; an image with itself adds 0.

    Args:
        embeddings: (B, M, d).
        labels: (B,); two images are a positive pair where their labels are equal.
        margin: m_c, on the squared distance.
        normalization: what the sums are divided by.
            "per_image": B, as the paper prints it (its N is the number of images).
            "sum": 1.
            "balanced": each sum by its own number of pairs (i != j), those of the negative sum
            being the active ones, [margin - D^2]_+ > 0. Not the paper's: its batch of 64 has some
            4,000 negative ordered pairs and mostly fewer than 100 positive ones, which a common
            factor lets them outweigh. A sum without pairs is 0.

    Returns:
        (M,).

    Raises:
        InputError: wrong shapes, labels of another length, an unknown normalization.
    """
    _check_embeddings(embeddings)
    _check_normalization(normalization, ContrastiveNormalization)
    num_images = len(embeddings)
    if labels.shape != (num_images,):
        raise InputError(
            f"labels have shape {tuple(labels.shape)}: expected ({num_images},), one for each image"
        )
    vectors = embeddings.transpose(0, 1)
    squared = _squared_distances(vectors)  # (M, B, B)
    positive = (labels.unsqueeze(0) == labels.unsqueeze(1)).to(squared.dtype)  # (B, B)
    active = _below(squared, margin).mul_(1 - positive)
    num_active = active.sum((1, 2))
    pull = push = torch.ones_like(num_active)  # weights of a pair, (M,)
    if normalization == "per_image":
        pull = push = pull / num_images
    elif normalization == "balanced":
        pull = pull / (positive.sum() - num_images).clamp(min=1)
        push = push / num_active.clamp(min=1)
    # A sum of distances: those of positive pairs, and minus those of active negative ones.
    weights = active.mul_(-push[:, None, None]).addcmul_(positive, pull[:, None, None])
    return _weighted_distances(vectors, squared, weights) + margin * push * num_active


def divergence_loss(
    embeddings: Tensor,
    margin: float = 1.0,
    normalization: DivergenceNormalization = "per_image",
) -> Tensor:
    """Eq. 9: [margin - D^2]_+ between two learners' embeddings of the same image.

    The sum runs over images and ordered pairs of learners p != q, so each unordered pair counts
    twice. The paper prints no condition on p and q, but defines a self pair by "two different
    learners": p = q, which would add a constant, is left out. Different images never meet.

    Args:
        embeddings: (B, M, d).
        margin: m_div, on the squared distance.
        normalization: what the sum is divided by.
            "per_image": B, the factor of Eq. 10, which Eq. 9 omits; without it the two terms of
            Eq. 8 would scale differently with the batch.
            "sum": 1, as the paper prints it.
            "per_pair": B M (M - 1), the mean over everything that is summed.

    Returns:
        A scalar; 0 for a single learner.

    Raises:
        InputError: wrong shape, an unknown normalization.
    """
    _check_embeddings(embeddings)
    _check_normalization(normalization, DivergenceNormalization)
    num_images, num_learners, _ = embeddings.shape
    squared = _squared_distances(embeddings)  # (B, M, M)
    itself = torch.eye(num_learners, dtype=squared.dtype, device=squared.device)
    active = _below(squared, margin).mul_(1 - itself)
    total = margin * active.sum() - _weighted_distances(embeddings, squared, active).sum()
    if normalization == "sum":
        return total
    if normalization == "per_image":
        return total / num_images
    return total / (num_images * max(num_learners * (num_learners - 1), 1))


@torch.no_grad()
def _squared_distances(vectors: Tensor) -> Tensor:
    """Squared Euclidean distances within each set of n vectors; (*, n, d) -> (*, n, n).

    Rounding can leave a distance between nearly equal vectors just below 0.
    """
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    with torch.autocast(vectors.device.type, enabled=False):
        gram = vectors @ vectors.mT
    # The norms come from the same product, so that the diagonal is exactly 0.
    norms = gram.diagonal(dim1=-2, dim2=-1).clone()
    return gram.mul_(-2).add_(norms.unsqueeze(-1)).add_(norms.unsqueeze(-2))


def _below(squared: Tensor, margin: float) -> Tensor:
    """1 where a distance is below the margin, 0 elsewhere; in its type, which is quicker."""
    return squared.clone().lt_(margin)


def _weighted_distances(vectors: Tensor, squared: Tensor, weights: Tensor) -> Tensor:
    """Sum of w_ij |v_i - v_j|^2 over i and j, for each set of n vectors.

    Args:
        vectors: (*, n, d), where the gradient goes.
        squared: `_squared_distances` of them; its memory is used.
        weights: (*, n, n), symmetric constants.

    Returns:
        (*,)
    """
    value = squared.mul_(weights).sum((-2, -1))
    total: Tensor = _WeightedDistances.apply(vectors, weights, value)
    return total


class _WeightedDistances(torch.autograd.Function):
    """Gives the value, and as its gradient 4 sum_j w_ij (v_i - v_j): a single matrix product."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, weights: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, weights)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        vectors, weights = ctx.saved_tensors
        exact = vectors.to(weights.dtype)
        with torch.autocast(vectors.device.type, enabled=False):
            pulls = weights.sum(-1, keepdim=True) * exact - weights @ exact
        return (pulls * (4 * gradient[..., None, None])).to(vectors.dtype), None, None


def _check_embeddings(embeddings: Tensor) -> None:
    if embeddings.ndim != 3 or 0 in embeddings.shape:
        raise InputError(
            f"embeddings have shape {tuple(embeddings.shape)}: "
            "expected (B, M, d) = (images, learners, size), none of them 0"
        )


def _check_normalization(normalization: str, choices: object) -> None:
    if normalization not in get_args(choices):
        names = ", ".join(map(repr, get_args(choices)))
        raise InputError(f"normalization {normalization!r}: choose one of {names}")
