"""What torchrun, `fabric run` (which is torchrun) and SLURM's srun tell each process they start."""

from __future__ import annotations

import os

_SHELLS = ("bash", "interactive")  # SLURM's jobs that are shells, as lightning-fabric has them


def launched_rank() -> int | None:
    """The process's rank among those of all machines; None if it was started by itself.

    It was so in a shell that SLURM gave, too.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"])
    if {"SLURM_NTASKS", "SLURM_PROCID"} <= os.environ.keys() and os.environ.get(
        "SLURM_JOB_NAME"
    ) not in _SHELLS:
        return int(os.environ["SLURM_PROCID"])
    return None


def processes_here() -> int:
    """How many processes were started on this machine."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))


def machines() -> int:
    """On how many machines processes were started, as many on each."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // processes_here()
    return int(os.environ.get("SLURM_NNODES", 1))
