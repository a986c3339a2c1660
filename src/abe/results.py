"""`runs.jsonl`: one line for each evaluated run, and the tables that derive from it.

A record says what was run (configuration and its digest, seed, protocol, weights, data), with
which software on which hardware, and the scores. No figure that we show is typed in by hand.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from abe.checkpoint import Best
from abe.config import Config
from abe.runtime import append_json_line, write_json


def method_name(config: Config) -> str:
    """The paper's way to name a network: ABE-8^512, 1-head^512, 8-tails^512."""
    model = config.model
    m = model.num_learners
    name = {
        "abe": f"ABE-{m}",
        "m-heads": f"{m}-head" + "s" * (m > 1),
        "m-heads+att": f"{m}-head" + "s" * (m > 1) + "+att",
        "m-tails": f"{m}-tail" + "s" * (m > 1),
    }[model.network]
    without = " without divergence" * (m > 1 and config.train.divergence_weight == 0)
    # Only networks with one shared G are trained with Eq. 9 (supplement): say it of them alone.
    return f"{name}^{model.embedding_dim}" + without * (model.network in {"abe", "m-tails"})


def result_record(
    config: Config,
    *,
    scores: dict[str, Any],
    best: Best | None,
    data: dict[str, Any],
    weights: dict[str, str] | None,
    environment: dict[str, Any],
    method: str | None = None,
) -> dict[str, Any]:
    """One line of `runs.jsonl`; `method` other than the network's for what was not trained."""
    return {
        "method": method or method_name(config),
        "protocol": config.protocol,
        "selected_step": best and best.step,
        "selection_recall@1": best and best.recall_at_1,
        "seed": config.seed,
        "config_digest": config.digest,
        "data": data,
        "weights": weights,
        "scores": scores,
        "environment": environment,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config.portable(),
    }


def write_result(folder: Path, record: dict[str, Any], embeddings: Tensor) -> None:
    """Leave a result in its run's folder: result.json and embeddings.safetensors (N, M, d)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": embeddings}, folder / "embeddings.safetensors")
    write_json(folder / "result.json", record)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a result to a `runs.jsonl`."""
    append_json_line(path, record)


def scores_table(records: Iterable[dict[str, Any]]) -> Table:
    """Results side by side, for the terminal: fractions as percentages, learners by their range."""
    records = list(records)
    columns = [key for key in records[0]["scores"]["ensemble"] if key.startswith("recall@")]
    table = Table("method")
    for column in columns:
        table.add_column(column.replace("recall@", "R@"), justify="right")
    for column in ("MAP@R", "learners' R@1", "learners' cosine", "step"):
        table.add_column(column, justify="right")
    for record in records:
        scores = record["scores"]
        learners = [100 * learner["recall@1"] for learner in scores["learners"]]
        cosine = scores["similarity"]["self"]
        step = record["selected_step"]
        table.add_row(
            record["method"],
            *(f"{100 * scores['ensemble'][column]:.1f}" for column in columns),
            f"{100 * scores['ensemble']['map@r']:.1f}",
            f"{min(learners):.1f}-{max(learners):.1f}" if len(learners) > 1 else "",
            "" if cosine is None else f"{cosine:.2f}",
            "" if step is None else str(step),
        )
    data, protocol = records[0]["data"], records[0]["protocol"]
    table.caption = (
        f"{data['name']}: {data['test_images']:,} test images of {data['test_classes']} classes "
        f"not seen in training; protocol {protocol}; %"
    )
    return table
