"""The rows of an experiment as a table, our figures beside the paper's."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from abe.config import Config
from abe.data.benchmarks import find_benchmark
from abe.errors import InputError
from abe.experiments import PAPERS_LEARNERS, PICKED, Arm, Claim, Experiment
from abe.model.summary import count_macs, count_parameters
from abe.paper import table_rows
from abe.results import data_title, is_baseline
from abe.selection import by_images_and_start, has_images_of, of_scales
from abe.start import build_model
from abe.verdicts import Row, rows_of


def papers_images(experiment: Experiment, data: str) -> str:
    """Which of the paper's benchmarks figures are set beside those of our images."""
    birds = [name for name in experiment.benchmarks if name.startswith("cub")]
    return birds[0] if birds and data.lower().startswith("cub") else experiment.benchmarks[-1]


def paper_row(experiment: Experiment, arm: Arm, data: str) -> dict[str, Any]:
    """The paper's figures of an arm, of `papers_images`."""
    rows = table_rows(experiment.table) if experiment.table else []
    (row,) = [row for row in rows if row["method"] == arm.paper] or [{}]
    of_birds = papers_images(experiment, data).startswith("cub")
    own, other = ("CUB_", "CARS_") if of_birds else ("CARS_", "CUB_")
    return {
        key.removeprefix(own): value
        for key, value in row.items()
        if key != "method" and not key.startswith(other)
    }


def papers_difference(experiment: Experiment, claim: Claim, learners: int, data: str) -> str:
    """What a claim is about in the paper's table, in points: "+5.9"; "" where it has no figures.

    Of networks with more learners than ours it says so: "+15.5 (ABE-8^512)".

    Args:
        experiment: whose table.
        claim: of the experiment.
        learners: as many as the claim's arms have where the paper has 8.
        data: name of our images, see `papers_images`.
    """
    columns: dict[str, str] = {"recall@1": "R@1", "learners' recall@1": "learner_R@1"}
    arms = {arm.name: arm for arm in experiment.arms(learners)}
    more, less = (
        paper_row(experiment, arms[name], data).get(columns.get(quantity, ""))
        for name, quantity in (
            (claim.more, claim.quantity),
            (claim.less, claim.against or claim.quantity),
        )
    )
    if more is None or less is None:
        return ""
    known = arms[claim.more].paper
    larger = f" ({known})" if learners < PAPERS_LEARNERS and known != claim.more else ""
    return f"{more - less:+.1f}{larger}"


def costs(config: Config) -> tuple[int, int]:
    """Parameters of a network, and multiply-accumulates at 224 px as the paper counts them."""
    with torch.device("meta"):
        model = build_model(config)
        return count_parameters(model), count_macs(model)


def values_of(experiment: Experiment, row: Row, data: str, base: Config) -> dict[str, Any]:
    """All figures of a row, ours and the paper's, by the names of a CSV file's columns."""
    values: dict[str, Any] = {"method": row.arm.name}
    if row.arm.paper not in (None, row.arm.name):
        values["paper's row"] = row.arm.paper
    if row.found is not None:
        record, interval = row.found.record, row.interval()
        assert interval is not None
        values |= {
            "protocol": record["protocol"],
            "seeds": row.found.seeds,
            "rate": None if is_baseline(record) else record["config"]["train"]["lr"],
            "rates tried": 0 if is_baseline(record) else len(row.found.rates),
            "recall@1 low": interval.low,
            "recall@1 high": interval.high,
            **row.found.scores,
            "runs": " ".join(record["config_digest"] for record in row.found.runs),
        }
        if picked := row.samples(PICKED):
            values[PICKED] = float(np.mean(list(picked.values())))
    if row.arm.settings:
        parameters, macs = costs(base.with_overrides(row.arm.settings))
        values |= {"parameters": parameters, "MACs": macs}
    if theirs := paper_row(experiment, row.arm, data):
        title = find_benchmark(papers_images(experiment, data)).title
        values |= {"paper's images": title} | {f"paper {k}": v for k, v in theirs.items()}
    return values


def values_by_images(
    experiment: Experiment, records: Iterable[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """`values_of` the rows that have runs, by the `data_title` of their images.

    Args:
        experiment: whose rows.
        records: of runs from one start.

    Raises:
        InputError: images of the same name have runs that are not comparable.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for group in by_images_and_start(records):
        if not has_images_of(experiment, group):
            continue
        for _, scale, by_arm in of_scales(experiment, group):
            rows = [row for row in rows_of(experiment.arms(scale.learners), by_arm) if row.found]
            if not rows:
                continue
            assert rows[0].found is not None
            data = rows[0].found.record["data"]
            if (title := data_title(data)) in found:
                raise InputError(
                    f"there are runs of {title} that cannot stand side by side: from several "
                    "starts, of which --start chooses one, at both scales, or of other images"
                )
            found[title] = [values_of(experiment, row, data["name"], scale.base) for row in rows]
    return found


def csv_text(values: Iterable[Mapping[str, Any]]) -> str:
    """A CSV file with a column for every figure that any row has."""
    values = list(values)
    text = io.StringIO()
    columns = dict.fromkeys(name for row in values for name in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue()


def markdown(values: Sequence[Mapping[str, Any]]) -> str:
    """The table that is shown: our scores in percent, and behind each the paper's, if any."""
    ks = [name for name in dict.fromkeys(n for row in values for n in row) if _is_recall(name)]
    columns = {"method": "method", "seeds": "seeds", "rate": "rate"}
    if any("paper's row" in row and any(n.startswith("paper ") for n in row) for row in values):
        columns["paper's row"] = "paper's row"
    for name in [*ks, PICKED, "learner recall@1", "learner cosine", "parameters", "MACs"]:
        theirs = f"paper {_in_paper(name)}"
        if any(name in row for row in values):
            columns[name] = name.replace("recall@", "R@")
        if any(theirs in row for row in values):
            columns[theirs] = "paper's"
    lines = [
        f"| {' | '.join(columns.values())} |",
        f"|---|{'--:|' * (len(columns) - 1)}",
    ]
    lines += [f"| {' | '.join(_cell(row, name) for name in columns)} |" for row in values]
    return "\n".join(lines)


def _is_recall(name: str) -> bool:
    return name.startswith("recall@") and name.removeprefix("recall@").isdigit()


def _in_paper(name: str) -> str:
    """What the paper's tables call a column of ours."""
    known = {"parameters": "params_1e7", "MACs": "macs_1e9"}
    return known.get(name, name.replace("learner recall@", "learner_R@").replace("recall@", "R@"))


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if name == "recall@1":
        return (
            f"{100 * value:.1f} [{100 * row['recall@1 low']:.1f}, {100 * row['recall@1 high']:.1f}]"
        )
    if "recall@" in name:
        return f"{100 * value:.1f}"
    if name == "learner cosine":
        return f"{value:z.2f}"
    if name in ("parameters", "paper params_1e7"):
        return f"{value / 1e7 if name == 'parameters' else value:.2f}e7"
    if name in ("MACs", "paper macs_1e9"):
        return f"{value / 1e9 if name == 'MACs' else value:.2f}e9"
    return f"{value:g}" if isinstance(value, float) else str(value)
