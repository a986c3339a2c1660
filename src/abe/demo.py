"""`abe demo`: what an attention-based ensemble learns in minutes, on built-in or own images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from abe.checkpoint import checkpoints
from abe.config import Config
from abe.data.splits import open_splits
from abe.evaluate import evaluate_baselines
from abe.report.html import write_report
from abe.results import write_result
from abe.train import Trainer

NETWORKS = {
    "1-head": ("model.network=m-heads", "model.num_learners=1"),
    "ABE-4": ("model.network=abe", "model.num_learners=4"),
}


def run_demo(base: Config, folder: Path, console: Console) -> tuple[list[dict[str, Any]], Path]:
    """Score raw pixels and the pretrained start, train 1-head and ABE-4, write the report.

    A demo that was interrupted goes on where it was; one that is finished is shown again.

    Args:
        base: what the runs have in common.
        folder: where the runs and the report go.
        console: where to report progress.

    Returns:
        The records of all methods, and the report's path.

    Raises:
        InputError: the data cannot be used.
    """
    work = folder / base.digest
    runs = [work / "raw-pixels", work / "pretrained-start"]
    if not all((run / "result.json").exists() for run in runs):
        console.print("Scoring raw pixels and the pretrained start ...")
        splits = open_splits(base.data, base.protocol)
        for run, result in zip(runs, evaluate_baselines(base, splits).values(), strict=True):
            write_result(run, *result)
    for name, settings in NETWORKS.items():
        run = work / name
        runs.append(run)
        if (run / "result.json").exists():
            continue
        console.rule(f"{name}, {base.train.steps} steps")
        trainer = (
            Trainer.resume(run, console)
            if checkpoints(run)
            else Trainer(base.with_overrides(settings), run, console)
        )
        if trainer.fit() is None:
            raise KeyboardInterrupt
    page = folder / "report.html"
    write_report(runs, page, console)
    return [json.loads((run / "result.json").read_text()) for run in runs], page
