"""Recall@K's ranks: how many items are nearer than the nearest match, without sorting them.

A query's *match* is a gallery item of its class, and its *rank* the number of items of other
classes that stand before its nearest match: Recall@K counts the ranks below K. Products bound every
distance (`abe.distances`); where queries are their own gallery, one block serves both directions.

Shapes: Q queries, N gallery items, D the size of an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abe.distances import Bounds, Side, checked_search, sides, slices
from abe.ranks import Ranks
from abe.shards import NONE, Shards


@torch.no_grad()
def match_ranks(
    query: Tensor,
    query_classes: Tensor,
    gallery: Tensor | None,
    gallery_classes: Tensor,
    limit: int,
    *,
    block: int = 1024,
    ranks: Ranks | None = None,
) -> Tensor:
    """The rank of each query's nearest match, counted up to `limit`.

    An item stands before another if its distance is smaller, as `abe.distances` defines it, or if
    it is equal and its index smaller. Many pairs that nearly tie, as a collapsed network has them,
    take time but no more memory.

    Of several ranks each has a part of the queries and of the gallery: it compares the queries of
    one rank after the other with its own items, and counts are added.

    Args:
        query: (Q, D), of several ranks this one's.
        query_classes: of all ranks' queries, (Q,), integers.
        gallery: (N, D), of several ranks this one's. None: the queries are their own gallery, and
            each leaves itself out, by index and not by distance, so that its duplicates stay.
        gallery_classes: of all ranks' items, (N,); without a gallery those of the queries.
        limit: the largest rank that is told from larger ones.
        block: rows and columns that are multiplied at a time. Beyond its input the search needs
            a copy or two of the embeddings and some 100 bytes x block^2; several ranks one or two
            more of the largest part of the queries.
        ranks: the processes; None for one by itself.

    Returns:
        Of all ranks' queries, (Q,), int64, from 0 to `limit`, which also stands where nothing
        matches.

    Raises:
        InputError: as `checked_search` does, with `limit` for its k.
    """
    queries, items = checked_search(query, gallery, limit, ranks)
    found = torch.empty(len(queries), dtype=torch.int64, device=query.device)
    for left, right in sides(queries, query_classes, items, gallery_classes):
        counted = queries.sum(_Search(left, right, limit, block, queries).count_all())
        found[left.indices] = counted.clamp(max=limit)
    return found


class _Search:
    """The ranks of queries counted so far, and the pairs that are not decided yet."""

    def __init__(self, queries: Side, items: Side, limit: int, block: int, shards: Shards) -> None:
        self.queries, self.items, self.limit, self.block = queries, items, limit, block
        self.bounds = Bounds(queries, items, block**2)
        self.undecided: list[tuple[Tensor, Tensor]] = []
        self.waiting = 0  # so many of them, before matches were left out
        self.distances, self.matches = shards.first(*self._nearest_matches())
        self.goal = -self.distances / 2
        self.ranks = torch.where(self.distances.isinf(), limit, 0)
        # No item with less can be nearer than the nearest match; of a query that is done, none.
        reach = self.goal.masked_fill(self.distances.isinf(), torch.inf)
        self.reach = reach.to(self.bounds.buffer.dtype)

    def count_all(self) -> Tensor:
        """How many items stand before each query's nearest match, (Q,), exact up to the limit."""
        same, bounds, number = self.queries is self.items, self.bounds, len(self.items)
        for rows in slices(0, len(self.queries), self.block):
            if same:
                closeness = bounds.closeness(rows, rows)
                self.count(closeness.fill_diagonal_(-torch.inf), rows, rows)
            for columns in slices(rows.stop if same else 0, number, self.block):
                closeness = bounds.closeness(rows, columns)
                self.count(closeness, rows, columns)
                if same:
                    self.count(closeness, columns, rows, queries_axis=1)
            self.decide()
        return self.ranks

    def count(
        self, closeness: Tensor, rows: slice, columns: slice, *, queries_axis: int = 0
    ) -> None:
        """Count the items of a block that are surely nearer, and keep the pairs that may be.

        Args:
            closeness: upper bounds; the queries stand along `queries_axis`.
            rows: the queries.
            columns: the items.
            queries_axis: 0, or 1 for a block whose queries and items have changed their roles.
        """
        reach = self.reach[rows]
        near = (closeness.amax(1 - queries_axis) >= reach).nonzero().flatten()
        if near.numel() == 0:
            return
        upper = closeness.index_select(queries_axis, near).movedim(queries_axis, 0)
        i, j = (upper >= reach[near, None]).nonzero(as_tuple=True)
        lower = upper[i, j].double()
        i, j = near[i] + rows.start, j + columns.start
        lower -= 2 * (self.bounds.errors[0][i] + self.bounds.errors[1][j])
        surely = lower > self.goal[i]
        ranks = self.ranks[rows]
        ranks += (i[surely] - rows.start).bincount(minlength=rows.stop - rows.start)
        reach.masked_fill_(ranks >= self.limit, torch.inf)
        maybe = (~surely).nonzero().flatten()
        i, j = i[maybe], j[maybe]
        others = self.queries.classes[i] != self.items.classes[j]
        self.undecided.append((i[others], j[others]))
        self.waiting += maybe.numel()
        if self.waiting > self.block**2:
            self.decide()

    def decide(self) -> None:
        """Compare the undecided pairs."""
        if not self.undecided:
            return
        i, j = map(torch.cat, zip(*self.undecided, strict=True))
        self.undecided, self.waiting = [], 0
        needed = self.ranks[i] < self.limit
        i, j = i[needed], j[needed]
        distances, of_match = self.bounds.distances(i, j), self.distances[i]
        first = self.items.indices[j] < self.matches[i]
        before = (distances < of_match) | ((distances == of_match) & first)
        self.ranks += i[before].bincount(minlength=len(self.ranks))
        self.reach.masked_fill_(self.ranks >= self.limit, torch.inf)

    def _nearest_matches(self) -> tuple[Tensor, Tensor]:
        """Distance and index of each query's nearest match here, (Q,); inf and NONE without one."""
        queries, items, errors = self.queries, self.items, self.bounds.errors
        distances = errors[0].new_full((len(queries),), torch.inf)
        matches = torch.full_like(queries.order, NONE)
        starts = torch.searchsorted(items.classes, queries.classes)
        stops = torch.searchsorted(items.classes, queries.classes, right=True)
        for rows in slices(0, len(matches), min(self.block, 256)):
            classes = queries.classes[rows, None]
            at_least = torch.full_like(distances[rows], torch.finfo(torch.float64).min)
            for columns in slices(int(starts[rows][0]), int(stops[rows][-1]), self.block):
                closeness = self.bounds.closeness(rows, columns)
                others = classes != items.classes[columns]
                if queries is items:
                    others.diagonal(rows.start - columns.start).fill_(True)
                closeness.masked_fill_(others, -torch.inf)
                lower = (closeness - 2 * errors[1][columns]).amax(1) - 2 * errors[0][rows]
                at_least = torch.maximum(at_least, lower)
                i, j = (closeness >= at_least[:, None]).nonzero(as_tuple=True)
                found = self.bounds.distances(i + rows.start, j + columns.start)
                # The first by distance, then by index, of these and of the one so far.
                i = torch.cat([i, torch.arange(len(classes), device=i.device)])
                j = torch.cat([items.indices[columns][j], matches[rows]])
                found = torch.cat([found, distances[rows]])
                distances[rows].scatter_reduce_(0, i, found, "amin")
                first = found == distances[rows][i]
                matches[rows] = NONE
                matches[rows].scatter_reduce_(0, i[first], j[first], "amin")
        return distances, matches
