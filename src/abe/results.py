"""`runs.jsonl`: one line for each evaluated run, and the tables that derive from it.

A record says what was run (configuration and its digest, seed, protocol, weights, data), with
which software on which hardware, and the scores. No figure that we show is typed in by hand.
"""

from __future__ import annotations

import copy
import datetime
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from abe.checkpoint import Best
from abe.config import Config
from abe.errors import InputError
from abe.runtime import append_json_line, read_json_lines, write_json


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


def write_result(
    folder: Path, record: dict[str, Any], embeddings: Tensor, gallery: Tensor | None = None
) -> None:
    """Leave a result in its run's folder: result.json and embeddings.safetensors.

    Args:
        folder: of the run.
        record: see `result_record`.
        embeddings: of the test images, (N, M, d).
        gallery: of what they were compared with, (G, M, d), if not with each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"embeddings": embeddings} | ({} if gallery is None else {"gallery": gallery})
    save_file(tensors, folder / "embeddings.safetensors")
    write_json(folder / "result.json", record)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a result to a `runs.jsonl`."""
    append_json_line(path, record)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The results in a `runs.jsonl`.

    Raises:
        InputError: the file cannot be read or has none, or a line is no result.
    """
    records = read_json_lines(path)
    if not records:
        raise InputError(f"{path} has no results: `abe train` and `abe eval` add them")
    for number, record in enumerate(records, start=1):
        if not {"method", "seed", "data", "config", "scores"} <= record.keys():
            raise InputError(
                f"{path}, line {number} is no result of `abe train` or `abe eval`: remove it"
            )
    return records


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
    table.caption = f"{data_title(data)}: {_test_images(data)}; protocol {protocol}; %"
    return table


def data_title(data: dict[str, Any]) -> str:
    """What to call the data of a record wherever a score on them is shown, stamps included."""
    stamps = data.get("stamps")
    return f"{data['name']} ({'; '.join(stamps)})" if stamps else data["name"]


def _test_images(data: dict[str, Any]) -> str:
    gallery = data.get("gallery_images")
    against = f", searched in {gallery:,} gallery images" if gallery else ""
    return (
        f"{data['test_images']:,} test images of {data['test_classes']:,} classes not seen in "
        f"training{against}"
    )


@dataclass(frozen=True)
class Summary:
    """The runs of one method that differ in their seed alone, at the rate that was chosen.

    Attributes:
        record: one of the runs, for what they have in common.
        rates: learning rates that were tried; the chosen one is the record's.
        seeds: how many seeds the chosen rate was run with.
        scores: name of a score -> its mean over the seeds; see `summarize`.
        spread: the same scores -> their standard deviation, 0 for one seed.
    """

    record: dict[str, Any]
    rates: tuple[float, ...]
    seeds: int
    scores: dict[str, float]
    spread: dict[str, float]


def summarize(records: Iterable[dict[str, Any]]) -> list[Summary]:
    """Group records by everything but seed and learning rate, and average over seeds.

    A run that was scored again counts once: the last record of a seed and rate is taken.
    Of several learning rates the one with the best Recall@1 on the images that the protocol
    selects by is kept, judged by the smallest seed, which every rate was run with. Scores are those
    of the ensemble, "learner recall@1" (mean of the learners) and "learner cosine".
    """
    groups: dict[str, dict[float, dict[int, dict[str, Any]]]] = {}
    for record in records:
        config = copy.deepcopy(record["config"])
        del config["seed"]
        rate = config["train"].pop("lr")
        key = json.dumps([record["method"], record["data"], config], sort_keys=True)
        groups.setdefault(key, {}).setdefault(rate, {})[record["seed"]] = record
    summaries = []
    for by_seed in groups.values():
        by_rate = {rate: [runs[seed] for seed in sorted(runs)] for rate, runs in by_seed.items()}
        best = max(by_rate, key=lambda rate: by_rate[rate][0]["selection_recall@1"] or 0)
        values = [_scores(record) for record in by_rate[best]]
        columns = {name: [value[name] for value in values] for name in values[0]}
        summaries.append(
            Summary(
                record=by_rate[best][0],
                rates=tuple(sorted(by_rate)),
                seeds=len(values),
                scores={name: statistics.fmean(column) for name, column in columns.items()},
                spread={
                    name: statistics.stdev(column) if len(column) > 1 else 0.0
                    for name, column in columns.items()
                },
            )
        )
    return summaries


def _scores(record: dict[str, Any]) -> dict[str, float]:
    scores = record["scores"]
    learners = [learner["recall@1"] for learner in scores["learners"]]
    flat = dict(scores["ensemble"])
    if len(learners) > 1:
        flat["learner recall@1"] = statistics.fmean(learners)
        flat["learner cosine"] = scores["similarity"]["self"]
    return flat


def markdown_table(summaries: Iterable[Summary]) -> str:
    """One Markdown table a data set: means over seeds, percent, with standard deviations."""
    by_data: dict[str, list[Summary]] = {}
    for summary in summaries:
        by_data.setdefault(json.dumps(summary.record["data"]), []).append(summary)
    return "\n\n".join(_data_table(group) for group in by_data.values())


def _data_table(summaries: list[Summary]) -> str:
    first = summaries[0].record
    data, train = first["data"], first["config"]["train"]
    recalls = [name for name in first["scores"]["ensemble"] if name.startswith("recall@")]
    names = [name.replace("recall@", "R@") for name in recalls]
    lines = [
        f"**{data_title(data)}**: {_test_images(data)}, {data['train_classes']:,} classes to learn "
        f"from, {data['select_classes']:,} to choose by (protocol `{first['protocol']}`), "
        f"{train['steps']} steps of {train['batch_size']} images at "
        f"{first['config']['data']['crop']} px.",
        "",
        f"| method | loss | rate, of | seeds | {' | '.join(names)} | a learner's R@1 "
        "| learners' cosine |",
        f"|---|---|---|--:|{'--:|' * len(names)}--:|--:|",
    ]
    for summary in summaries:
        cosine = summary.scores.get("learner cosine")
        cells = [
            summary.record["method"],
            _loss_name(summary.record),
            _rate_name(summary),
            str(summary.seeds),
            *(_percent(summary, name) for name in (*recalls, "learner recall@1")),
            "" if cosine is None else f"{cosine:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _loss_name(record: dict[str, Any]) -> str:
    if record["selected_step"] is None:
        return ""
    train = record["config"]["train"]
    if train["metric_loss"] != "contrastive":
        return str(train["metric_loss"])
    return {"per_image": "Eq. 10", "sum": "Eq. 10, sum", "balanced": "Eq. 10, balanced"}[
        train["normalization"]
    ]


def _rate_name(summary: Summary) -> str:
    """The learning rate that was chosen, and how many were tried."""
    if summary.record["selected_step"] is None:
        return ""
    return f"{summary.record['config']['train']['lr']:g}, {len(summary.rates)}"


def _percent(summary: Summary, name: str) -> str:
    if name not in summary.scores:
        return ""
    mean = f"{100 * summary.scores[name]:.1f}"
    return mean if summary.seeds == 1 else f"{mean} ± {100 * summary.spread[name]:.1f}"


def replace_between(text: str, marker: str, content: str) -> str:
    """Put content between `<!-- marker:begin -->` and `<!-- marker:end -->`.

    Raises:
        InputError: the text does not hold the two comments.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise InputError(f"the text has no {begin} ... {end} to put the table between")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"
