"""Exact nearest neighbours, in blocks that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from abe.distances import Bounds, checked_search, sides, slices
from abe.ranks import Ranks
from abe.shards import NONE


class Neighbors(NamedTuple):
    """The k nearest gallery items of each query, nearest first."""

    distances: Tensor
    """(Q, k), squared Euclidean, float64."""
    indices: Tensor
    """(Q, k), rows of the gallery; int64."""


@torch.no_grad()
def nearest_neighbors(
    query: Tensor,
    gallery: Tensor | None,
    k: int,
    *,
    query_block: int = 512,
    gallery_block: int = 8192,
    ranks: Ranks | None = None,
) -> Neighbors:
    """The k nearest gallery items of each query, by exhaustive search.

    Distances are those that `abe.distances` defines; equal ones are ordered by gallery index. For
    vectors of unit length, such as `concat` gives, that is the order of the inner product.

    Args:
        query: (Q, D), of several ranks this one's.
        gallery: (N, D), of several ranks this one's. None: the queries are their own gallery, and
            each leaves itself out, by index and not by distance, so that its duplicates stay.
        k: neighbours of each query.
        query_block: queries that are compared at a time.
        gallery_block: gallery items that they are compared with at a time. Beyond its input and
            output the search needs a copy or two of the embeddings, and some 50 bytes x query_block
            x (gallery_block + k).
        ranks: the processes; None for one by itself.

    Returns:
        Of all ranks' queries.

    Raises:
        InputError: shapes that do not fit, a k that is below 1 or above the number of candidates
            (N; Q - 1 without a gallery), embeddings that are not finite.
    """
    found = list(neighbors_by_block(query, gallery, k, query_block, gallery_block, ranks))
    order = torch.cat([queries for queries, _ in found]).argsort()
    distances = torch.cat([neighbors.distances for _, neighbors in found])
    indices = torch.cat([neighbors.indices for _, neighbors in found])
    return Neighbors(distances[order], indices[order])


@torch.no_grad()
def neighbors_by_block(
    query: Tensor,
    gallery: Tensor | None,
    k: int,
    query_block: int = 512,
    gallery_block: int = 8192,
    ranks: Ranks | None = None,
) -> Iterator[tuple[Tensor, Neighbors]]:
    """What `nearest_neighbors` finds, a block of queries at a time, and which queries they are."""
    queries, items = checked_search(query, gallery, k, ranks)

    def no_classes(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=query.device)

    classes = no_classes(len(queries)), no_classes(len(items))
    for left, right in sides(queries, classes[0], items, classes[1]):
        bounds = Bounds(left, right, query_block * gallery_block)
        for rows in slices(0, len(left), query_block):
            own = _nearest(bounds, rows, k, gallery_block)
            found = _first(queries.beside(own.distances), queries.beside(own.indices), k)
            yield left.indices[rows], found


def _nearest(bounds: Bounds, rows: slice, k: int, block: int) -> Neighbors:
    """The k nearest of the items for some queries; inf and NONE where there are fewer."""
    queries, items = bounds.queries, bounds.items
    count = rows.stop - rows.start
    distances = bounds.errors[0].new_full((count, k), torch.inf)
    indices = torch.full_like(distances, NONE, dtype=torch.int64)
    for columns in slices(0, len(items), block):
        closeness = bounds.closeness(rows, columns)
        if queries is items:
            closeness.diagonal(rows.start - columns.start).fill_(-torch.inf)
        reach = -distances[:, -1] / 2  # no item with less is among the k nearest
        if k <= closeness.shape[1] and bool(reach.isinf().any()):
            # k items of this block are at least so near.
            best, which = closeness.topk(k)
            errors = bounds.errors[0][rows, None] + bounds.errors[1][columns][which]
            reach = torch.maximum(reach, (best - 2 * errors).amin(1))
        reach = reach.to(closeness.dtype).clamp(min=torch.finfo(closeness.dtype).min)
        near = (closeness.amax(1) >= reach).nonzero().flatten()
        i, j = (closeness[near] >= reach[near, None]).nonzero(as_tuple=True)
        if not len(i):
            continue
        found = bounds.distances(near[i] + rows.start, j + columns.start)
        sizes = i.bincount(minlength=len(near))
        place = torch.arange(len(i), device=i.device) - (sizes.cumsum(0) - sizes)[i]
        table = distances.new_full((len(near), int(sizes.max())), torch.inf)
        numbers = torch.full_like(table, NONE, dtype=torch.int64)
        table[i, place], numbers[i, place] = found, items.indices[columns][j]
        distances[near], indices[near] = _first(
            torch.cat([distances[near], table], 1), torch.cat([indices[near], numbers], 1), k
        )
    return Neighbors(distances, indices)


def _first(distances: Tensor, indices: Tensor, k: int) -> Neighbors:
    """The first k of each row by distance, then by index."""
    indices, order = indices.sort(1)
    distances, order = distances.gather(1, order).sort(dim=1, stable=True)
    return Neighbors(distances[:, :k], indices.gather(1, order)[:, :k])
