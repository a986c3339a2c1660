"""`abe demo`: what an attention-based ensemble learns in minutes, on built-in or own images."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from abe.config import Config
from abe.data.splits import open_splits
from abe.errors import InputError
from abe.evaluate import evaluate_baselines
from abe.files import read_json
from abe.report.html import write_report
from abe.results import write_result
from abe.train import Trainer

NETWORKS = {
    "1-head": ("model.network=m-heads", "model.num_learners=1"),
    "ABE-4": ("model.network=abe", "model.num_learners=4"),
}
# Of train.lr, which is ABE-4's. On held-out classes of the vehicles that abe draws (seed 0), 1-head
# has 49, 70 and 70 % at the rates .003, .01 and .03, and ABE-4 78 and 77 % at .003 and .01; on both
# sets of photographs the same rates are best (results/runs.jsonl).
RATES = {"1-head": 10 / 3, "ABE-4": 1.0}


def run_demo(
    base: Config, folder: Path, console: Console, go_on: str = "the same again"
) -> tuple[list[dict[str, Any]], Path]:
    """Score raw pixels and the pretrained start, train 1-head and ABE-4, write the report.

    A demo that was interrupted goes on where it was; one that is finished is shown again.

    Args:
        base: what the runs have in common.
        folder: where the runs and the report go.
        console: where to report progress.
        go_on: the command that goes on with it, for who stops it.

    Returns:
        The records of all methods, and the report's path.

    Raises:
        InputError: the data cannot be used.
    """
    base = base.anchored()
    # Folders of one name hold different images: the place counts here.
    place = json.dumps([base.data.source, base.data.root])
    work = folder / f"{base.digest}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"
    baselines = [work / "raw-pixels"]
    if base.model.weights is not None:
        baselines.append(work / "pretrained-start")
    trained = [work / name for name in NETWORKS]
    runs = baselines + trained
    page = folder / "report.html"
    try:
        if not all((run / "result.json").exists() for run in baselines):
            console.print("Scoring raw pixels and the pretrained start ...")
            splits = open_splits(base.data, base.protocol)
            found = evaluate_baselines(base, splits).values()
            for run, result in zip(baselines, found, strict=True):
                write_result(run, *result)
        for run, (name, settings) in zip(trained, NETWORKS.items(), strict=True):
            if (run / "result.json").exists():
                continue
            console.rule(f"{name}, {base.train.steps} steps")
            rate = f"train.lr={RATES[name] * base.train.lr:.6g}"
            trainer = Trainer.begin(base.with_overrides([*settings, rate]), run, console)
            if trainer.fit(go_on) is None:
                raise KeyboardInterrupt
        write_report(runs, page, console)
    except InputError as error:
        if not work.exists():
            raise
        raise InputError(f"{error} (to begin the demo anew, remove {work})") from None
    return [read_json(run / "result.json") for run in runs], page
