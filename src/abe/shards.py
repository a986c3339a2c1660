"""Matrices whose rows several ranks hold together, and what a search in them asks of the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, distributed

from abe.ranks import Ranks

NONE = torch.iinfo(torch.int64).max  # index of no row, behind those of all rows


class Shards:
    """The rows of all ranks one after the other: (N, ...), of which each rank has some.

    What ranks do with shards all of them do, in the same order. They wait for each other however
    long one takes.

    Args:
        own: this rank's rows, of the same type on all ranks, and on the CPU if there are several;
            who has none may leave the sizes behind their number 0.
        ranks: the processes; None for one by itself.

    Attributes:
        own: (own, ...), with the sizes that the other ranks have.
        rows: which of the N these are.
    """

    def __init__(self, own: Tensor, ranks: Ranks | None = None) -> None:
        self._ranks = ranks if ranks is not None and ranks.size > 1 else None
        self.own, self._counts, self.rank = own, [len(own)], 0
        if self._ranks is not None:
            self.rank = self._ranks.rank
            shapes = torch.empty(self._ranks.size, own.ndim, dtype=torch.int64)
            with self._ranks.connected():
                distributed.all_gather_single(shapes, torch.tensor([own.shape]), self._group)
            self._counts = shapes[:, 0].tolist()
            self.own = own.reshape(len(own), *shapes[:, 1:].amax(0).tolist())
        self.rows = self.rows_of(self.rank)

    @property
    def _group(self) -> distributed.ProcessGroup | None:
        return None if self._ranks is None else self._ranks.patient

    def __len__(self) -> int:
        return sum(self._counts)

    def rows_of(self, rank: int) -> slice:
        """Which of the N rows a rank has."""
        first = sum(self._counts[:rank])
        return slice(first, first + self._counts[rank])

    def turns(self) -> Iterator[tuple[int, Tensor]]:
        """Each rank that has rows, and those, on every rank."""
        for rank, count in enumerate(self._counts):
            if not count:
                continue
            rows = self.own
            if self._ranks is not None:
                if rank == self.rank:
                    rows = rows.contiguous()
                else:
                    rows = rows.new_empty(count, *rows.shape[1:])
                with self._ranks.connected():
                    distributed.broadcast(rows, rank, self._group)
            yield rank, rows

    def parts(self) -> Iterator[Tensor]:
        """All rows in order on the first rank, one rank's at a time; none on the others."""
        if self._ranks is None:
            yield self.own
            return
        for rank, count in enumerate(self._counts):
            if rank == 0:
                if self.rank == 0:
                    yield self.own
            elif count and self.rank in (0, rank):
                with self._ranks.connected():
                    if self.rank == rank:
                        distributed.send(self.own.contiguous(), 0, self._group)
                        continue
                    part = self.own.new_empty(count, *self.own.shape[1:])
                    distributed.recv(part, rank, self._group)
                yield part

    def select(self, indices: Tensor) -> Tensor:
        """Some of the N rows on every rank; indices (R,) in any order -> (R, ...)."""
        here = (indices >= self.rows.start) & (indices < self.rows.stop)
        found = self.own.new_zeros(len(indices), *self.own.shape[1:])
        found[here] = self.own[indices[here] - self.rows.start]
        return self.sum(found)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks of tensors of one shape, in place."""
        return self._reduce(values, distributed.ReduceOp.SUM)

    def first(self, distances: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest distance on any rank, (R,), and of the indices that have it the smallest."""
        if self._ranks is None:
            return distances, indices
        least = self._reduce(distances.clone(), distributed.ReduceOp.MIN)
        with_it = indices.masked_fill(distances > least, NONE)
        return least, self._reduce(with_it, distributed.ReduceOp.MIN)

    def beside(self, columns: Tensor) -> Tensor:
        """All ranks' columns side by side, on every rank; (R, k) -> (R, N k)."""
        if self._ranks is None:
            return columns
        gathered = columns.new_empty(self._ranks.size * len(columns), columns.shape[1])
        with self._ranks.connected():
            distributed.all_gather_single(gathered, columns.contiguous(), self._group)
        return torch.cat(gathered.split(len(columns)), dim=1)

    def _reduce(self, values: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        if self._ranks is not None:
            with self._ranks.connected():
                distributed.all_reduce(values, operation, self._group)
        return values
