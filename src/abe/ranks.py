"""Processes that work on one run together, each with a device of its own: ranks 0 to N - 1.

torchrun, `fabric run` or SLURM's srun start them; a process that is started by itself is rank 0 of
1 and sends nothing. lightning-fabric joins them and wraps the network. docs/scaling.md has the
commands, and what is sent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from abe.errors import InputError
from abe.launch import launched_rank, machines, processes_here
from abe.runtime import choose_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Part = tuple[int, int]
"""(r, n): part r of n."""
WAIT = timedelta(days=1)  # for what one rank does alone: reading all images, scoring, saving


class LostRankError(InputError):
    """Another rank ended, or does not answer."""


def share(count: int, part: Part) -> slice:
    """Which of `count` rows are part r of n: parts are contiguous, their sizes differ by one."""
    index, parts = part
    return slice(index * count // parts, (index + 1) * count // parts)


class Ranks:
    """The processes of a run, seen from this one.

    Args:
        device: "auto", "cpu" or "cuda": with several ranks on a machine each takes a GPU of its
            own, or with "auto" the processors where there is no CUDA GPU. A process by itself takes
            what `choose_device` does.
        timeout: seconds that a rank waits in a step for the slowest other one.

    Attributes:
        rank: of this process; rank 0 alone writes and reports.
        size: N, the number of ranks.
        device: of this process.
        first: whether this is rank 0.
        first_here: whether this is the first rank of its machine.
        patient: group of all ranks, for what is on the CPU, that waits however long one takes; None
            for a process by itself.

    Raises:
        InputError: the device cannot be used so, or how the processes were started does not fit.
        LostRankError: not all of them came.
    """

    def __init__(self, device: str = "auto", timeout: float = 60.0) -> None:
        self.patient: distributed.ProcessGroup | None = None
        if launched_rank() is None:
            self.rank, self.size, self.first_here = 0, 1, True
            self.device = choose_device(device)
        else:
            self.fabric = _join(device, timeout)
            self.rank, self.size = self.fabric.global_rank, self.fabric.world_size
            self.first_here = self.fabric.local_rank == 0
            self.device = self.fabric.device
            with self.connected():
                self.patient = distributed.new_group(backend="gloo", timeout=WAIT)
        self.first = self.rank == 0

    @property
    def part(self) -> Part:
        """(rank, size), as the loader and `share` take it."""
        return self.rank, self.size

    def wrap(self, network: nn.Module, images: Tensor) -> nn.Module:
        """The network whose backward pass leaves on every rank the mean of all ranks' gradients.

        Its weights are the same tensors. Their gradients are sent in buckets while the pass goes
        on. What is in a bucket is settled by the first backward pass, and with it how sums round:
        one over `images`, any ones, is made here, so that the first step of a resumed run rounds
        like the same step of one that was not stopped.
        """
        if self.size == 1:
            return network
        self.wait()  # for ranks that read images still
        with self.connected():
            wrapped: nn.Module = self.fabric.setup(network)
            wrapped(images.to(self.device)).sum().backward()
            network.zero_grad()
        return wrapped

    def apart(self, network: Any) -> contextlib.AbstractContextManager[None]:
        """Where a backward pass of a wrapped network leaves its gradients on this rank."""
        if self.size == 1:
            return contextlib.nullcontext()
        return self.fabric.no_backward_sync(network)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """The rows of all ranks in order, without their graph; (own, ...) -> (count, ...).

        Args:
            rows: this rank's `share` of them.
            count: how many they are together.
        """
        rows = rows.detach()
        if self.size == 1:
            return rows
        most = -(-count // self.size)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(self.size * most, *rows.shape[1:])
        with self.connected():
            distributed.all_gather_single(gathered, padded)
        parts = [share(count, (rank, self.size)) for rank in range(self.size)]
        return torch.cat(
            [
                own[: part.stop - part.start]
                for own, part in zip(gathered.split(most), parts, strict=True)
            ]
        )

    def take_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every rank the first one's gradients, where all have computed the same ones."""
        if self.size == 1:
            return
        with self.connected():
            for parameter in parameters:
                if parameter.grad is not None:
                    distributed.broadcast(parameter.grad, 0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        with self.connected():
            distributed.all_reduce(flags)
            return flags.item() > 0

    def wait(self) -> None:
        """Go on when all ranks are here, however long one takes."""
        if self.size > 1:
            with self.connected():
                distributed.barrier(self.patient)

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on every rank; what JSON can say. Waits however long it takes."""
        if self.size == 1:
            return value
        text = bytearray(json.dumps(value).encode())
        length = torch.tensor(len(text))
        with self.connected():
            distributed.broadcast(length, 0, self.patient)
            told = torch.frombuffer(text, dtype=torch.uint8) if self.first else None
            sent = torch.empty(int(length), dtype=torch.uint8) if told is None else told
            distributed.broadcast(sent, 0, self.patient)
        return json.loads(sent.numpy().tobytes())

    def require_same(self, **values: Any) -> None:
        """Make sure that all ranks were started alike and see the same files.

        Raises:
            InputError: this rank has another value than the first; the message names it.
        """
        for name, expected in self.from_first(values).items():
            if values[name] != expected:
                raise InputError(
                    f"rank {self.rank} has {name} {values[name]}, rank 0 has {expected}: give all "
                    "machines the same command, the same images, and one run folder that they share"
                )

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """What other ranks are needed for.

        Raises:
            LostRankError: one ended, or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            raise LostRankError(
                f"rank {self.rank} of {self.size} has lost another one, which ended or did not "
                f"answer in time: see what it said ({_reason(error)})"
            ) from None


def _join(device: str, timeout: float) -> Fabric:
    """The engine of one of several processes, connected with the others."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    kind = device
    if device == "auto":  # processes cannot share what Apple's GPU has computed
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda"):
        raise InputError(
            f"device={device}: several processes take auto, cpu or cuda, and each a GPU of its own"
        )
    strategy = DDPStrategy(timeout=timedelta(seconds=timeout), gradient_as_bucket_view=True)
    try:
        fabric = Fabric(
            accelerator=kind, devices=processes_here(), num_nodes=machines(), strategy=strategy
        )
        if "LT_CLI_USED" not in os.environ:  # `fabric run` has it launched by now
            fabric.launch()
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        if isinstance(error, distributed.DistError):
            raise LostRankError(
                f"not all processes came within {timeout:g} seconds ({_reason(error)}): see what "
                "the others say, or raise ranks_timeout"
            ) from None
        raise InputError(
            f"{processes_here()} processes on each of {machines()} machines cannot run on {kind}: "
            f"{error}"
        ) from None
    return fabric


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because of the connection: gloo tells so by its text alone."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def _reason(error: RuntimeError) -> str:
    """What a connection says of its end, without the place in the source of the library."""
    line = str(error).splitlines()[0]
    return line.partition("] ")[2] or line
