"""Bounds of distances by bounded products, and distances as they are defined.

The *distance* of two embeddings is the squared Euclidean one, summed in float64 over the
differences of the embeddings as given. Products of blocks estimate all of them at once, in float32
or less, with a bound on what rounding can have done; the few pairs whose bounds leave their order
open are compared as defined. So an answer depends neither on blocks, nor on the precision of the
products, nor on how many processes share the work.

Shapes: Q queries, N items, D the size of an embedding, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from abe.errors import InputError
from abe.ranks import Ranks
from abe.shards import Shards

PAIRS = 128  # compared at a time: their embeddings stay in a core's cache


class Side:
    """Queries or items of a search in the order of their classes, moved to the origin.

    Args:
        embeddings: (N, D).
        classes: (N,); who looks for no classes may give all the same.
        centre: (D,), about their mean: what is near the origin rounds least.
        first: index of the first one among those of all ranks.
    """

    def __init__(self, embeddings: Tensor, classes: Tensor, centre: Tensor, first: int = 0) -> None:
        self.embeddings = embeddings
        self.first = first
        self.order = classes.argsort(stable=True)  # rows of the embeddings
        self.classes = classes[self.order]
        self.points = embeddings.index_select(0, self.order).sub_(centre)
        self.lengths = vector_norm(self.points, dim=1, dtype=torch.float64)
        self.loss = 0.0  # how far rounding moves a point at most, as a share of its length
        if _has_fast_bfloat16(embeddings):
            rounded = self.points.bfloat16().float()
            moved = vector_norm(self.points.sub_(rounded), dim=1, dtype=torch.float64)
            shares = moved / self.lengths.clamp(min=1e-300)
            self.loss = max(shares.tolist(), default=0.0)
            self.points = rounded

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def indices(self) -> Tensor:
        """Of each one among those of all ranks, (N,)."""
        return self.order + self.first

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
        """The different embeddings, (U, D), and which of them each row is, (N,)."""
        embeddings, inverse = self.embeddings.unique(dim=0, return_inverse=True)
        return embeddings, inverse


class Bounds:
    """Bounds of the distances of queries and items, numbered in the order of their sides.

    Args:
        queries: the Q queries.
        items: the N items; the queries' side itself where they are their own gallery.
        size: of the largest block, in pairs.
    """

    def __init__(self, queries: Side, items: Side, size: int) -> None:
        self.queries, self.items = queries, items
        loss = max(queries.loss, items.loss)
        self.errors = queries.error(loss), items.error(loss)
        self.offsets = [
            (error - side.lengths.square() / 2).to(side.points.dtype)
            for side, error in zip((queries, items), self.errors, strict=True)
        ]
        self.buffer = queries.points.new_empty(size)

    def closeness(self, rows: slice, columns: slice) -> Tensor:
        """Upper bounds of -|x - y|^2 / 2, (rows, columns), in memory that the next ones take.

        What lies below one by more than twice the errors of row and column is a lower bound.
        """
        shape = rows.stop - rows.start, columns.stop - columns.start
        bounds = self.buffer[: shape[0] * shape[1]].view(shape)
        torch.add(self.offsets[0][rows, None], self.offsets[1][columns], out=bounds)
        with _products(self.queries.points):
            return bounds.addmm_(self.queries.points[rows], self.items.points[columns].mT)

    def distances(self, i: Tensor, j: Tensor) -> Tensor:
        """The distances of queries i (P,) and items j (P,) as they are defined, float64."""
        i, j = self.queries.order[i], self.items.order[j]
        queries, items = self.queries.embeddings, self.items.embeddings
        pairs = None
        if len(i) > len(queries) + len(items):  # the same vectors over and over?
            (queries, query_of), (items, item_of) = self.queries.distinct, self.items.distinct
            codes, pairs = (query_of[i] * len(items) + item_of[j]).unique(return_inverse=True)
            i, j = codes // len(items), codes % len(items)
        distances = torch.empty(len(i), dtype=torch.float64, device=i.device)
        for some in slices(0, len(i), PAIRS):
            differences = queries.index_select(0, i[some]).double()
            differences -= items.index_select(0, j[some])
            distances[some] = differences.square_().sum(1)
        return distances if pairs is None else distances[pairs]


def checked_search(
    query: Tensor, gallery: Tensor | None, k: int, ranks: Ranks | None = None
) -> tuple[Shards, Shards]:
    """Queries and gallery items as they are compared, in float32 or float64 as the query is.

    Args:
        query: (Q, D), of several ranks this one's.
        gallery: (N, D), of several ranks this one's; None: the queries, without oneself.
        k: how many of the gallery are wanted.
        ranks: the processes; None for one by itself.

    Raises:
        InputError: shapes that do not fit, a k that is below 1 or above the number of candidates
            (N; Q - 1 without a gallery), embeddings that are not finite.
    """
    queries = Shards(_checked(query, "query"), ranks)
    items = queries
    if gallery is not None:
        items = Shards(_checked(gallery.to(queries.own.dtype), "gallery"), ranks)
    sizes = queries.own.shape[1], items.own.shape[1]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"query has {sizes[0]} columns and gallery {sizes[1]}: they must come from the same "
            "model"
        )
    candidates = len(items) - (gallery is None)
    if k < 1:
        raise InputError(f"k={k}: ask for at least 1 neighbour")
    if k > candidates:
        raise InputError(f"k={k}, but a query has only {max(candidates, 0)} candidates")
    return queries, items


def sides(
    queries: Shards, query_classes: Tensor, items: Shards, item_classes: Tensor
) -> Iterator[tuple[Side, Side]]:
    """What this rank compares: one rank's queries after the other with its own items.

    Args:
        queries: (Q, D).
        query_classes: of all of them, (Q,).
        items: (N, D); the very queries where they are their own gallery.
        item_classes: of all of them, (N,).

    Yields:
        the side of a rank's queries, and that of this rank's items: the same object where they
        are the same.
    """
    centre = items.own.mean(0) if len(items.own) else items.own.new_zeros(items.own.shape[1])
    right = Side(items.own, item_classes[items.rows], centre, items.rows.start)
    for rank, rows in queries.turns():
        theirs = queries.rows_of(rank)
        if queries is items and rank == queries.rank:
            yield right, right
        else:
            yield Side(rows, query_classes[theirs], centre, theirs.start), right


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Neighbouring slices of at most `size` from start to stop."""
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


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


def _has_fast_bfloat16(vectors: Tensor) -> bool:
    """Whether products of bfloat16 are several times as fast as of these vectors: AMX."""
    on_cpu = vectors.device.type == "cpu" and vectors.dtype == torch.float32
    return on_cpu and bool(torch.cpu.get_capabilities().get("amx_bf16"))


@contextmanager
def _products(vectors: Tensor) -> Iterator[None]:
    """Products in the precision that `Side` rounds to, whatever is set outside.

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
