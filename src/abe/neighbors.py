"""Exact nearest neighbours, in blocks that fit in memory."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from abe.errors import InputError

Similarity = Literal["inner_product", "euclidean"]


class Neighbors(NamedTuple):
    """The k best gallery items of each query, best first."""

    scores: Tensor
    """(Q, k); higher is nearer."""
    indices: Tensor
    """(Q, k), rows of the gallery; int64."""


@torch.no_grad()
def nearest_neighbors(
    query: Tensor,
    gallery: Tensor | None,
    k: int,
    *,
    similarity: Similarity = "inner_product",
    query_block: int = 512,
    gallery_block: int = 8192,
) -> Neighbors:
    """The k most similar gallery items of each query, by exhaustive search.

    Equal scores are ordered by gallery index, so the answer does not depend on the blocks as long
    as the scores do not. Scores are computed in float32 whatever autocast says (in float64 for a
    float64 query) and compared as computed: in general a matrix product rounds by position, so two
    copies of a vector may differ in the last bit.

    Args:
        query: (Q, D).
        gallery: (N, D). None: the queries are their own gallery, and each leaves itself out, by
            index and not by distance, so that its duplicates stay.
        k: neighbours of each query.
        similarity: "inner_product", or "euclidean": minus the squared distance. For vectors of
            unit length both give the same order, but nearly equal ones, of a collapsed network,
            lose their digits in the inner product; here they are moved to the origin first.
        query_block: queries that are compared at a time.
        gallery_block: gallery items that they are compared with at a time. Beyond its input and
            output the search needs a few times query_block x (gallery_block + k) numbers, and
            "euclidean" a few copies of the gallery.

    Raises:
        InputError: shapes that do not fit, a k that is below 1 or above the number of candidates
            (N; Q - 1 without a gallery), embeddings that are not finite, an unknown similarity.
    """
    if similarity not in get_args(Similarity):
        names = ", ".join(map(repr, get_args(Similarity)))
        raise InputError(f"similarity {similarity!r}: choose one of {names}")
    leave_out_self = gallery is None
    query, gallery = checked_search(query, gallery, k)
    norms = gallery.square().sum(1)
    if similarity == "euclidean":
        # The item nearest to the mean, and not the mean, so that exact numbers stay exact.
        middle = gallery[(gallery - gallery.mean(0)).square().sum(1).argmin()]
        moved_norms = (gallery - middle).square().sum(1)
        if moved_norms.sum() < norms.sum():
            query, gallery, norms = query - middle, gallery - middle, moved_norms
    scores = query.new_empty(len(query), k)
    indices = torch.empty(len(query), k, dtype=torch.int64, device=query.device)
    for row in range(0, len(query), query_block):
        rows = slice(row, row + query_block)
        best_scores, best_indices = scores[rows, :0], indices[rows, :0]
        for column in range(0, len(gallery), gallery_block):
            columns = slice(column, column + gallery_block)
            with torch.autocast(query.device.type, enabled=False):
                block = query[rows] @ gallery[columns].mT
            if similarity == "euclidean":
                # |q|^2 is the same for a whole row: it cannot change the order.
                block.mul_(2).sub_(norms[columns])
            if leave_out_self:
                block.diagonal(row - column).fill_(-torch.inf)
            block_indices = torch.arange(column, column + block.shape[1], device=query.device)
            best_scores, positions = _top_leftmost(torch.cat([best_scores, block], dim=1), k)
            best_indices = torch.cat([best_indices, block_indices.expand_as(block)], dim=1).gather(
                1, positions
            )
        scores[rows], indices[rows] = best_scores, best_indices
    if similarity == "euclidean":
        scores -= query.square().sum(1, keepdim=True)
        scores.clamp_(max=0)
    return Neighbors(scores, indices)


def checked_search(query: Tensor, gallery: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Queries and gallery items as they are compared, in float32 or float64 as the query is.

    Raises:
        InputError: as `nearest_neighbors` does.
    """
    query = _checked(query, "query")
    leave_out_self = gallery is None
    gallery = query if gallery is None else _checked(gallery.to(query.dtype), "gallery")
    if query.shape[1] != gallery.shape[1]:
        raise InputError(
            f"query has {query.shape[1]} columns and gallery {gallery.shape[1]}: "
            "they must come from the same model"
        )
    candidates = len(gallery) - leave_out_self
    if k < 1:
        raise InputError(f"k={k}: ask for at least 1 neighbour")
    if k > candidates:
        raise InputError(f"k={k}, but a query has only {max(candidates, 0)} candidates")
    return query, gallery


def _top_leftmost(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(k)` by row, where equal scores come from the left; `topk` leaves that open.

    In a row of best scores so far followed by a new block, left is where the index is smaller.
    """
    k = min(k, scores.shape[1])
    values, positions = scores.topk(min(k + 1, scores.shape[1]))
    chosen = positions[:, :k]
    if values.shape[1] > k:
        cut = values[:, k - 1] == values[:, k]  # the cut goes through equals: which come first?
        chosen[cut] = scores[cut].argsort(dim=1, descending=True, stable=True)[:, :k]
    chosen = chosen.sort(dim=1).values
    values, order = scores.gather(1, chosen).sort(dim=1, descending=True, stable=True)
    return values, chosen.gather(1, order)


def _checked(vectors: Tensor, name: str) -> Tensor:
    """The vectors in float32 or float64."""
    if vectors.ndim != 2:
        raise InputError(f"{name} has shape {tuple(vectors.shape)}: expected (images, size)")
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    largest_distances = 8 * vectors.square().sum(1)  # twice those squared, to one as long
    if not (finite := largest_distances.isfinite()).all():
        row = int(finite.long().argmin())
        raise InputError(f"{name} row {row} is not finite, or too large to be squared")
    return vectors
