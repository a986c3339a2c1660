"""Recall@K's ranks: how many items are nearer than the nearest match, without sorting them.

A query's *match* is a gallery item of its class, and its *rank* the number of items of other
classes that stand before its nearest match: Recall@K counts the ranks below K.

Products of blocks bound every distance from both sides; where queries are their own gallery, one
block serves both directions. The few pairs whose bounds leave their order open are compared as it
is defined.

Shapes: Q queries, N gallery items, D the size of an embedding, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from abe.neighbors import checked_search

PAIRS = 128  # compared at a time: their embeddings stay in a core's cache


@torch.no_grad()
def match_ranks(
    query: Tensor,
    query_classes: Tensor,
    gallery: Tensor | None,
    gallery_classes: Tensor,
    limit: int,
    *,
    block: int = 1024,
) -> Tensor:
    """The rank of each query's nearest match, counted up to `limit`.

    An item stands before another if its squared distance is smaller, summed in float64 over the
    differences of the embeddings as given, or if it is equal and its index smaller. The products
    that estimate distances round more than that, but decide only what lies beyond a bound on all
    their rounding: the ranks depend neither on the blocks nor on the precision of the products.
    That is the query's, or bfloat16 for float32 where the processor multiplies tiles of it (AMX).
    Many pairs that nearly tie, as a collapsed network has them, take time but no more memory.

    Args:
        query: (Q, D).
        query_classes: (Q,), integers.
        gallery: (N, D). None: the queries are their own gallery, and each leaves itself out, by
            index and not by distance, so that its duplicates stay.
        gallery_classes: (N,); without a gallery those of the queries.
        limit: the largest rank that is told from larger ones.
        block: rows and columns that are multiplied at a time. Beyond its input the search needs
            a copy or two of the embeddings and some 100 bytes x block^2.

    Returns:
        (Q,), int64, from 0 to `limit`, which also stands where nothing matches.

    Raises:
        InputError: as `nearest_neighbors` does, with `limit` for its k.
    """
    query, items = checked_search(query, gallery, limit)
    centre = items.mean(0)  # what is near the origin rounds least
    right = _Side(items, gallery_classes, centre)
    left = right if gallery is None else _Side(query, query_classes, centre)
    with _products(query):
        search = _Search(left, right, limit, block)
        for rows in _slices(0, len(query), block):
            if left is right:
                search.count(search.closeness(rows, rows).fill_diagonal_(-torch.inf), rows, rows)
            for columns in _slices(rows.stop if left is right else 0, len(items), block):
                closeness = search.closeness(rows, columns)
                search.count(closeness, rows, columns)
                if left is right:
                    search.count(closeness, columns, rows, queries_axis=1)
            search.decide()
    ranks = torch.empty_like(search.ranks)
    ranks[left.indices] = search.ranks.clamp(max=limit)
    return ranks


class _Side:
    """Queries or gallery items in the order of their classes, moved to the origin."""

    def __init__(self, embeddings: Tensor, classes: Tensor, centre: Tensor) -> None:
        self.embeddings = embeddings
        self.indices = classes.argsort(stable=True)  # of the embeddings
        self.classes = classes[self.indices]
        self.points = embeddings.index_select(0, self.indices).sub_(centre)
        self.lengths = vector_norm(self.points, dim=1, dtype=torch.float64)
        self.loss = 0.0  # how far rounding moves a point at most, as a share of its length
        if _has_fast_bfloat16(embeddings):
            rounded = self.points.bfloat16().float()
            moved = vector_norm(self.points.sub_(rounded), dim=1, dtype=torch.float64)
            self.loss = float((moved / self.lengths.clamp(min=1e-300)).max())
            self.points = rounded

    def error(self, loss: float) -> Tensor:
        """The share of each point in the error of a product with another, (N,).

        -|x - y|^2 / 2 as x y - |x|^2 / 2 - |y|^2 / 2 is a sum of D + 2 terms, together no larger
        than |x|^2 + |y|^2; in any order it is off by less than (D + 2) u times that, with u half
        of eps [Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1]. The
        subtraction of the centre and the rounding of what follows count as 6 terms more, and as
        many again the float64 distance that is to be told. Points moved by a share r of their
        lengths change x y by less than (r + r^2 / 2) (|x|^2 + |y|^2).
        """
        number = torch.finfo(self.points.dtype)
        terms = self.points.shape[1] + 8
        share = loss + loss**2 / 2 + terms * number.eps
        return share * self.lengths.square() + terms * number.tiny

    @cached_property
    def distinct(self) -> tuple[Tensor, Tensor]:
        """The different embeddings, (U, D), and which of them each one is, (N,)."""
        embeddings, inverse = self.embeddings.unique(dim=0, return_inverse=True)
        return embeddings, inverse


class _Search:
    """The ranks counted so far, and the pairs that are not decided yet."""

    def __init__(self, queries: _Side, items: _Side, limit: int, block: int) -> None:
        self.queries, self.items, self.limit, self.block = queries, items, limit, block
        loss = max(queries.loss, items.loss)
        self.errors = queries.error(loss), items.error(loss)
        self.offsets = [
            (error - side.lengths.square() / 2).to(side.points.dtype)
            for side, error in zip((queries, items), self.errors, strict=True)
        ]
        self.buffer = queries.points.new_empty(block * block)
        self.undecided: list[tuple[Tensor, Tensor]] = []
        self.waiting = 0  # so many of them, before matches were left out
        self.distances, self.matches = self._nearest_matches()
        self.goal = -self.distances / 2
        self.ranks = torch.where(self.distances.isinf(), limit, 0)
        # No item with less can be nearer than the nearest match; of a query that is done, none.
        self.reach = self.goal.masked_fill(self.distances.isinf(), torch.inf).to(self.buffer.dtype)

    def closeness(self, rows: slice, columns: slice) -> Tensor:
        """Upper bounds of -|x - y|^2 / 2, (rows, columns), in memory that the next ones take."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        bounds = self.buffer[: shape[0] * shape[1]].view(shape)
        torch.add(self.offsets[0][rows, None], self.offsets[1][columns], out=bounds)
        return bounds.addmm_(self.queries.points[rows], self.items.points[columns].mT)

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
        bounds = closeness.index_select(queries_axis, near).movedim(queries_axis, 0)
        i, j = (bounds >= reach[near, None]).nonzero(as_tuple=True)
        lower = bounds[i, j].double()
        i, j = near[i] + rows.start, j + columns.start
        lower -= 2 * (self.errors[0][i] + self.errors[1][j])
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
        i, items = i[needed], self.items.indices[j[needed]]
        distances = self._distances(self.queries.indices[i], items)
        matches, of_match = self.matches[i], self.distances[i]
        before = (distances < of_match) | ((distances == of_match) & (items < matches))
        self.ranks += i[before].bincount(minlength=len(self.ranks))
        self.reach.masked_fill_(self.ranks >= self.limit, torch.inf)

    def _nearest_matches(self) -> tuple[Tensor, Tensor]:
        """Distance and index of each query's nearest match, (Q,); inf and N where there is none."""
        queries, items = self.queries, self.items
        distances = self.errors[0].new_full(queries.classes.shape, torch.inf)
        matches = torch.full_like(queries.indices, len(items.indices))
        starts = torch.searchsorted(items.classes, queries.classes)
        stops = torch.searchsorted(items.classes, queries.classes, right=True)
        for rows in _slices(0, len(matches), min(self.block, 256)):
            classes = queries.classes[rows, None]
            at_least = torch.full_like(distances[rows], torch.finfo(torch.float64).min)
            for columns in _slices(int(starts[rows][0]), int(stops[rows][-1]), self.block):
                closeness = self.closeness(rows, columns)
                others = classes != items.classes[columns]
                if queries is items:
                    others.diagonal(rows.start - columns.start).fill_(True)
                closeness.masked_fill_(others, -torch.inf)
                lower = (closeness - 2 * self.errors[1][columns]).amax(1) - 2 * self.errors[0][rows]
                at_least = torch.maximum(at_least, lower)
                i, j = (closeness >= at_least[:, None]).nonzero(as_tuple=True)
                j = items.indices[columns][j]
                found = self._distances(queries.indices[rows][i], j)
                # The first by distance, then by index, of these and of the one so far.
                i = torch.cat([i, torch.arange(len(classes), device=i.device)])
                j = torch.cat([j, matches[rows]])
                found = torch.cat([found, distances[rows]])
                distances[rows].scatter_reduce_(0, i, found, "amin")
                first = found == distances[rows][i]
                matches[rows] = len(items.indices)
                matches[rows].scatter_reduce_(0, i[first], j[first], "amin")
        return distances, matches

    def _distances(self, i: Tensor, j: Tensor) -> Tensor:
        """Squared distances of queries i (P,) and items j (P,), numbered as given, in float64."""
        queries, items = self.queries.embeddings, self.items.embeddings
        pairs = None
        if len(i) > len(queries) + len(items):  # the same vectors over and over?
            (queries, query_of), (items, item_of) = self.queries.distinct, self.items.distinct
            codes, pairs = (query_of[i] * len(items) + item_of[j]).unique(return_inverse=True)
            i, j = codes // len(items), codes % len(items)
        distances = torch.empty(len(i), dtype=torch.float64, device=i.device)
        for some in _slices(0, len(i), PAIRS):
            differences = queries.index_select(0, i[some]).double()
            differences -= items.index_select(0, j[some])
            distances[some] = differences.square_().sum(1)
        return distances if pairs is None else distances[pairs]


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _has_fast_bfloat16(vectors: Tensor) -> bool:
    """Whether products of bfloat16 are several times as fast as of these vectors: AMX."""
    on_cpu = vectors.device.type == "cpu" and vectors.dtype == torch.float32
    return on_cpu and bool(torch.cpu.get_capabilities().get("amx_bf16"))


@contextmanager
def _products(vectors: Tensor) -> Iterator[None]:
    """Products in the precision that `_Side` rounds to, whatever is set outside.

    Autocast leaves them alone, as all that is done in place.
    """
    cpu: Any = torch.backends.mkldnn
    backends = cpu.matmul, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if _has_fast_bfloat16(vectors):
            cpu.matmul.fp32_precision = "bf16"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
