"""What records say of an experiment: its rows beside the paper's, and a verdict on each claim.

Everything derives from lines of `runs.jsonl` and the paper's tables; nothing is run here.
"""

from __future__ import annotations

import collections
import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from abe.config import Config
from abe.data.benchmarks import find_benchmark
from abe.errors import InputError
from abe.experiments import (
    EXPERIMENTS,
    PICKED,
    Arm,
    Claim,
    Experiment,
    Quantity,
    Scale,
    full,
    get_experiments,
    small,
)
from abe.intervals import (
    Interval,
    bootstrap,
    crossed,
    does_not_exceed,
    exceeds,
    is_within,
    of_means,
    unpack,
    unpack_classes,
)
from abe.model.summary import count_macs, count_parameters
from abe.paper import table_rows
from abe.results import (
    RANDOM,
    Summary,
    data_title,
    differing,
    flatten,
    is_baseline,
    markdown_table,
    method_name,
    schedule,
    start_name,
    summarize,
    weights_name,
)
from abe.start import build_model

MIN_SEEDS = 3  # below that a claim is left open
PAPERS_LEARNERS = 8  # where an experiment has as many as asked for
OPEN = "open"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Row:
    """An arm and what its runs found; None where there is no run yet."""

    arm: Arm
    found: Summary | None

    @property
    def _runs(self) -> tuple[dict[str, Any], ...]:
        return () if self.found is None else self.found.runs

    def samples(self, quantity: Quantity) -> dict[tuple[int, str], NDArray[np.float64]]:
        """What a quantity is the mean of: values, of each query if there are such.

        By seed and order of the queries: what is alike in both can be compared in pairs. Runs
        that do not know it are left out.
        """
        return {
            _pair(record): values
            for record in self._runs
            if len(values := _values(record, quantity))
        }

    def runs_of(self, pairs: Collection[tuple[int, str]]) -> list[dict[str, Any]]:
        """The records that `samples` has of some seeds and orders."""
        return [record for record in self._runs if _pair(record) in pairs]

    def interval(self) -> Interval | None:
        """Of Recall@1, over seeds and classes."""
        samples = self.samples("recall@1")
        return crossed(np.stack(list(samples.values())), _classes(self._runs)) if samples else None

    def reservations(
        self, planned: Collection[float] = (), diverged: Collection[float] = ()
    ) -> list[str]:
        """Why an arm may do better than its figures: "the start itself was picked in 2 of 3".

        Args:
            planned: learning rates to choose from.
            diverged: those of them that were tried and lost.
        """
        if self.found is None or is_baseline(self.found.record):
            return []
        notes = []
        if at_start := sum(run["selected_step"] == 0 for run in self._runs):
            notes.append(f"the start itself was picked in {at_start} of {len(self._runs)}")
        rates = sorted({*self.found.rates, *diverged})
        chosen = self.found.record["config"]["train"]["lr"]
        if len(rates) > 1 and chosen in (rates[0], rates[-1]):
            end = "lowest" if chosen == rates[0] else "highest"
            notes.append(f"its rate is the {end} of {', '.join(f'{each:g}' for each in rates)}")
        if untried := sorted({*planned} - {*rates}):
            notes.append(f"no run at {', '.join(f'{each:g}' for each in untried)}")
        return notes


@dataclass(frozen=True)
class Judged:
    """A claim, the difference that it is about with its interval, and what follows."""

    claim: Claim
    difference: Interval | None
    verdict: str
    pairs: tuple[tuple[int, str], ...] = ()
    """Seed and order of the queries of what was compared."""
    bootstrapped: Interval | None = None
    """The same difference by `bootstrap`, if it has a value of each query."""

    @property
    def seeds(self) -> int:
        """How many were compared."""
        return len(self.pairs)

    @property
    def shown(self) -> str:
        """The difference in points of Recall@1, or of cosine: "+1.0 [-0.2, +2.2], 3 seeds"."""
        if self.difference is None:
            return ""

        def between(found: Interval) -> str:
            return f"[{self._points(found.low)}, {self._points(found.high)}]"

        seeds = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        if not np.isfinite(self.difference.low):  # nothing follows from one seed's mean
            return f"{self.mean}, {seeds}"
        drawn = self.bootstrapped
        beside = "" if drawn is None else f" (bootstrap {between(drawn)})"
        return f"{self.mean} {between(self.difference)}, {seeds}{beside}"

    @property
    def mean(self) -> str:
        """The mean of the difference alone."""
        return "" if self.difference is None else self._points(self.difference.mean)

    def _points(self, value: float) -> str:
        """One digit behind the point; two where one would hide on which side of 0 it is."""
        points = 100 * value if "recall" in self.claim.quantity else value
        digits = 1 if "recall" in self.claim.quantity and not 0.005 < abs(points) < 0.05 else 2
        return f"{points:+z.{digits}f}"

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.claim), self.shown, self.verdict) if part)


def counts(record: dict[str, Any]) -> bool:
    """Whether a record is a run's, or a baseline's, and holds what intervals are made of.

    Lines of early versions do not, and those of a checkpoint that its run did not select are none.
    """
    if "hits@1" not in record["scores"]:
        return False
    name = method_name(Config.from_json(record["config"]))
    known = name, name.removesuffix(" with divergence")  # early versions did not say it
    return is_baseline(record) or record["method"] in known


def _pair(record: dict[str, Any]) -> tuple[int, str]:
    return record["seed"], record["scores"]["hits@1"].get("order", "")


def _values(record: dict[str, Any], quantity: Quantity) -> NDArray[np.float64]:
    scores = record["scores"]
    if quantity == "recall@1":
        return unpack(scores["hits@1"]).astype(np.float64)
    if quantity == "learners' recall@1":
        return np.array([np.mean([learner["recall@1"] for learner in scores["learners"]])])
    if quantity == PICKED:
        picked = scores.get("test_picked")
        return np.array([picked["recall@1"]] if picked else [])
    cosine = scores["similarity"]["self"]
    return np.array([np.nan if cosine is None else cosine])


def rows_of(arms: Iterable[Arm], records: Mapping[str, Sequence[dict[str, Any]]]) -> list[Row]:
    """Each arm with its records, by its name, at the rate that held-out classes choose.

    Runs whose queries are in another order than most have them are left out; of a run that was
    scored again the last record counts.
    """
    rows = []
    for arm in arms:
        latest = {r["config_digest"]: r for r in records.get(arm.name, ()) if counts(r)}
        orders = collections.Counter(_pair(record)[1] for record in latest.values())
        usual = orders.most_common(1)[0][0] if orders else ""
        summaries = summarize(r for r in latest.values() if _pair(r)[1] == usual)
        rows.append(Row(arm, summaries[-1] if summaries else None))
    return rows


def _classes(runs: Iterable[dict[str, Any]]) -> NDArray[np.int32] | None:
    """Of each query of runs that have the same; None if none of their records says it."""
    hits = (run["scores"]["hits@1"] for run in runs)
    return next((unpack_classes(each["classes"]) for each in hits if "classes" in each), None)


def judge(
    claim: Claim, rows: Iterable[Row], among: Collection[tuple[int, str]] | None = None
) -> Judged:
    """The verdict on a claim, if there are `MIN_SEEDS`: by seeds in pairs.

    Of Recall@1 by queries in pairs as well, in clusters of their classes, without which the claim
    stays open; of all else a record has the means.

    Args:
        claim: of two of the rows.
        rows: of an experiment.
        among: seeds and orders of the queries to compare; None for all that both have.
    """
    against = claim.against or claim.quantity
    by_name = {row.arm.name: row for row in rows}
    more, less = (
        by_name[name].samples(quantity) if name in by_name else {}
        for name, quantity in ((claim.more, claim.quantity), (claim.less, against))
    )
    pairs = sorted((more.keys() & less.keys()).intersection(more if among is None else among))
    if not pairs:
        return Judged(claim, None, NOT_RUN)
    bootstrapped, lacking = None, "" if len(pairs) >= MIN_SEEDS else f"{MIN_SEEDS} seeds decide"
    if claim.quantity == against == "recall@1":
        values = np.stack([more[pair] - less[pair] for pair in pairs])
        rows_compared = by_name[claim.more], by_name[claim.less]
        classes = _classes([run for row in rows_compared for run in row.runs_of(pairs)])
        lacking = lacking or ("its records have no classes" if classes is None else "")
        difference, bootstrapped = crossed(values, classes), bootstrap(values, classes)
    else:
        difference = of_means(np.array([more[pair].mean() - less[pair].mean() for pair in pairs]))
    verdicts = {
        "above": exceeds(difference),
        "not above": does_not_exceed(difference, claim.margin),
        "similar to": is_within(difference, claim.margin),
    }
    verdict = f"{OPEN}, {lacking}" if lacking else verdicts[claim.relation]
    return Judged(claim, difference, verdict, tuple(pairs), bootstrapped)


def reservations(by_arm: Mapping[str, Sequence[str]]) -> str:
    """`Row.reservations` of several arms, behind their names; "" if none has any."""
    return "; ".join(f"{name}: {', '.join(notes)}" for name, notes in by_arm.items() if notes)


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
        if not _has_images_of(experiment, group):
            continue
        for _, scale, by_arm in _of_scales(experiment, group):
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


_LISTED_APART = ("recipe", "train.lr", "precision", "seed", "data.source")
_OF_DRAWN = ("data.synthetic_classes", "data.synthetic_images")


def departures(rows: Sequence[tuple[str, Config, Config]]) -> list[str]:
    """Where rows differ from the paper's setting: "train.steps 10000 -> 120".

    What not all of them do has the names of those that do behind it.

    Args:
        rows: of each its name, the paper's configuration and ours.
    """
    changes: dict[str, list[str]] = {}
    for row, theirs, ours in rows:
        paper, own = (flatten(config.portable()) for config in (theirs, ours))
        for name in differing([paper, own]):
            # Of a learner alone Eq. 9 has nothing to say.
            alone = name == "train.divergence_weight" and ours.model.num_learners == 1
            if not alone and name not in (*_LISTED_APART, *_OF_DRAWN):
                changes.setdefault(f"{name} {paper.get(name)} -> {own.get(name)}", []).append(row)
    return [
        change + f" ({'; '.join(named)})" * (len(named) < len(rows))
        for change, named in changes.items()
    ]


def results_page(records: Iterable[dict[str, Any]]) -> str:
    """docs/results.md: each claim of each experiment on the images that it was tried on.

    Behind the claims stand the tables of all results.
    """
    records = list(records)
    groups = by_images_and_start(records)
    lines = [_PAGE_HEAD, "", *_left_out(records, groups)]
    all_told = {
        name: [told for group in groups for told in _judged_claims(experiment, group)]
        for name, experiment in EXPERIMENTS.items()
    }
    if short := [told for each in all_told.values() for told in each]:
        lines += [
            "\n## In short\n",
            "Verdicts, and the differences without their intervals; an empty cell was not run, and "
            "what several claims say of the same runs is told once.\n",
        ]
        lines += _in_short(short)
        lines += _repeated(short)
    first: dict[_Compared, tuple[str, Claim]] = {}
    for name, experiment in EXPERIMENTS.items():
        lines += [f"\n## {name}: {experiment.title}\n", *_section(name, all_told[name], first)]
        first = {told.compared: (name, told.claim) for told in all_told[name]} | first
    lines += ["\n## All results\n", markdown_table(summarize(records))]
    return "\n".join(lines) + "\n"


def _left_out(
    records: Iterable[dict[str, Any]], groups: Iterable[Mapping[str, Sequence[dict[str, Any]]]]
) -> list[str]:
    """How many of the runs no claim is judged by, and why."""
    runs = [record for record in records if not is_baseline(record)]
    known = [run for run in runs if counts(run)]
    early = [run for run in runs if "hits@1" not in run["scores"]]
    judged = _of_arms(EXPERIMENTS.values(), groups)
    notes = {
        "do not say which queries were answered": len(early),
        "are of a checkpoint that their run did not select": len(runs) - len(early) - len(known),
        "have settings that no row has at either scale": len(known) - len(judged),
    }
    return [
        f"No claim is judged by {number} of the {len(runs)} runs, which {why}: they stand under "
        "All results alone."
        for why, number in notes.items()
        if number
    ]


def select(
    records: Iterable[dict[str, Any]], names: Collection[str] = (), start: str | None = None
) -> list[dict[str, Any]]:
    """Some of the results: runs, and the baselines of the same images.

    Args:
        records: of a results file.
        names: experiments whose arms the runs are of, at either scale, in the order of the arms;
            none for all runs. Lines of early versions, without each query's hit, are of none.
        start: name of the weights that the runs began with, with or without the digits of their
            hash; None for any.

    Raises:
        InputError: no run is left, or there is no such experiment.
    """
    records = list(records)
    runs = [record for record in records if not is_baseline(record)]
    known = sorted({start_name(run["weights"]) for run in runs})
    if start is not None:
        names_of = (start_name, weights_name)
        runs = [run for run in runs if start in {name(run["weights"]) for name in names_of}]
        if not runs:
            raise InputError(
                f"no run began with {start!r}: there are runs from {', '.join(known) or 'nothing'}"
            )
    if names:
        experiments = [each for name in names for each in get_experiments(name).values()]
        runs = _of_arms(experiments, by_images_and_start(runs))
        if not runs:
            raise InputError(
                f"no run is of {', '.join(names)} at either scale: `abe reproduce` makes them"
            )
    shown = [(*_images(run), weights) for run in runs for weights in (RANDOM, run["weights"])]
    baselines = [
        record
        for record in filter(is_baseline, records)
        if (*_images(record), record["weights"] or RANDOM) in shown
    ]
    return baselines + runs


def _images(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a result is of, its method apart: see `markdown_table`."""
    return record["data"], record["protocol"], record["config"]["data"]["crop"]


def by_images_and_start(
    records: Iterable[dict[str, Any]],
) -> list[dict[str, list[dict[str, Any]]]]:
    """Runs that can be compared: of each images and start, by the settings of their arm."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        if is_baseline(record) or not counts(record):
            continue
        start = record["weights"] and record["weights"]["sha256"]
        key = [record["data"], record["images_digest"], record["config"]["data"], start]
        of_images = groups.setdefault(json.dumps(key, sort_keys=True), {})
        of_images.setdefault(_key(Config.from_json(record["config"])), []).append(record)
    return list(groups.values())


def _section(
    name: str, all_told: Sequence[_Told], first: Mapping[_Compared, tuple[str, Claim]]
) -> list[str]:
    """What is told of the claims of an experiment, but for what another one has told of the runs.

    Args:
        name: of the experiment.
        all_told: of its claims.
        first: which experiment and claim have told of what was compared.
    """
    experiment = EXPERIMENTS[name]
    by_claim: dict[Claim, list[_Told]] = {}
    for told in all_told:
        by_claim.setdefault(told.claim, []).append(told)
    images = "FOLDER" if experiment.anywhere else f"{experiment.benchmarks[0]} --root FOLDER"
    commands = {
        small(True).learners: f"--scale small --data {images}",
        full().learners: f"--scale full --data {experiment.benchmarks[0]} --root FOLDER",
    }
    not_run = {
        claim: (learners, f"`abe reproduce {name} {options}`")
        for learners, options in reversed(commands.items())
        for claim in experiment.claims(learners)
        if claim not in by_claim and not (experiment.ours and learners == full().learners)
    }
    if not (not_run or by_claim):
        return [f"A picture, no figures: `abe reproduce {name} {commands[small(True).learners]}`."]
    lines = [_CLAIMS_HEAD]
    for claim in dict.fromkeys([*experiment.claims(small(True).learners), *by_claim, *not_run]):
        if claim in not_run:
            learners, command = not_run[claim]
            theirs = papers_difference(experiment, claim, learners, "")
            lines.append(f"| {claim} | {theirs} | | | not run here: {command} | | |")
            continue
        own = by_claim[claim]
        lines += [told.line for told in own if told.compared not in first]
        elsewhere = dict.fromkeys(
            (*first[told.compared], told.theirs) for told in own if told.compared in first
        )
        for other, known, theirs in elsewhere:
            where = f"as under {other}" + f": {known}" * (known != claim)
            lines.append(f"| {claim} | {theirs} | | | {where} | | |")
    return lines


_PAGE_HEAD = """# Results

Made from `results/runs.jsonl` by `abe results results/runs.jsonl --page docs/results.md`, and from
nothing else. A claim is the paper's, of its own images and setting, but for those of `losses`,
`protocol`, `width`, of the balanced loss in `fig7c` and of M-heads of equal d, which are ours; the
figures are ours, of the setting in the same line: the difference of the two means in points of
Recall@1, with its 95 % interval over classes and seeds in pairs, or of learners' recall, cosines
and what test images pick over seeds, by Student's t. Shown: all of the interval is above 0, or for
what is said to be similar or not above, within 1 point (cosines: 0.02). Refuted: all of it is on
the other side. Fewer than 3 seeds leave a claim open. A run that diverges leaves no line: rates are
chosen among those that did not. Each verdict is by itself: of 40 claims of things that do not
differ, one would be shown by chance, and another refuted. The bootstrap over classes and seeds
stands behind; of 3 seeds it is too narrow where seeds decide, and decides nothing. Runs in pairs
have the same seed, and where only the network or the loss differs the same batches, but not always
the same device and precision: the last column names these, docs/protocol.md tells how far they set
runs apart. "The paper's" is the difference in its own table, in points, on its own images:
CUB-200-2011 beside ours of CUB, else the last that the table has, mostly CARS-196; of which
network, if of one with more learners than ours. Reservations say why a row may do better than its
figure: in some of its runs held-out classes picked the network before its first step, its rate is
at an end of those tried, or there is no run at some that were meant to be tried. A claim that was
not run names the command that it needs."""
_CLAIMS_HEAD = (
    "| claim | the paper's | setting | difference | verdict | reservations | runs |\n"
    "|---|--:|---|---|---|---|---|"
)


def _of_scales(
    experiment: Experiment, by_key: Mapping[str, Sequence[dict[str, Any]]]
) -> Iterator[tuple[str, Scale, dict[str, list[dict[str, Any]]]]]:
    """The runs of each arm at either scale, of runs on the same images by `_key`."""
    record = next(iter(by_key.values()))[0]
    config = Config.from_json(record["config"])
    for name, scale in {"full": full(), "small": small(config.data.source != "synthetic")}.items():
        of_images = replace(scale, base=scale.base.model_copy(update={"data": config.data}))
        classes = record["data"]["train_classes"]
        yield name, scale, runs_of_arms(experiment, of_images, by_key, classes)


def runs_of_arms(
    experiment: Experiment,
    scale: Scale,
    by_key: Mapping[str, Sequence[dict[str, Any]]],
    classes: int,
) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm by its name, of all seeds; where arms choose a rate, at all rates.

    Args:
        experiment: whose arms.
        scale: what they begin from, with the images in its base.
        by_key: see `by_images_and_start`.
        classes: how many are learned from.
    """

    def runs_of(arm: Arm) -> list[dict[str, Any]]:
        config = scale.base.with_overrides(arm.settings).with_batches_that_fit(classes)
        rates = experiment.rates(arm, scale)
        runs = by_key.get(_key(config), ())
        return [run for run in runs if experiment.tuned or run["config"]["train"]["lr"] in rates]

    return {arm.name: runs_of(arm) for arm in experiment.arms(scale.learners)}


def _of_arms(
    experiments: Collection[Experiment], groups: Iterable[Mapping[str, Sequence[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """The runs of any arm of some experiments, at either scale, in the order of the arms."""
    found = {
        id(run): run
        for group in groups
        for experiment in experiments
        for _, _, by_arm in _of_scales(experiment, group)
        for runs in by_arm.values()
        for run in runs
    }
    return list(found.values())


@dataclass(frozen=True)
class _Told:
    """What runs on some images, at one scale, say of a claim; and the paper's difference."""

    judged: Judged
    theirs: str
    scale: str
    runs: Sequence[dict[str, Any]]
    """Of the network that is said to have more first."""
    halves: tuple[Judged, ...]
    """By the first `MIN_SEEDS` seeds and by the others, if these are as many."""
    doubts: str
    """See `reservations`."""

    @property
    def claim(self) -> Claim:
        return self.judged.claim

    @property
    def setting(self) -> str:
        """The images, the scale and how the networks were trained."""
        data, protocol = data_title(self.runs[0]["data"]), self.runs[0]["protocol"]
        schedules = ", against ".join(dict.fromkeys(map(schedule, self.runs)))
        return f"{data}, `{self.scale}`, protocol `{protocol}`: {schedules}"

    @property
    def compared(self) -> _Compared:
        """What it is about: claims of differently named arms may be of the same runs."""
        claim = self.claim
        runs = tuple((run["config_digest"], run["images_digest"]) for run in self.runs)
        return claim.relation, claim.quantity, claim.against, self.setting, runs

    @property
    def line(self) -> str:
        judged = self.judged
        cells = str(self.claim), self.theirs, self.setting, judged.shown, f"**{judged.verdict}**"
        return f"| {' | '.join((*cells, self.doubts, _stamps(self.runs)))} |"


_Compared = tuple[str, Quantity, Quantity | None, str, tuple[tuple[str, str], ...]]


def _has_images_of(experiment: Experiment, by_key: Mapping[str, Sequence[dict[str, Any]]]) -> bool:
    """Whether runs on the same images, by `_key`, are of images that an experiment is about."""
    titles = [find_benchmark(name).title for name in experiment.benchmarks]
    return experiment.anywhere or next(iter(by_key.values()))[0]["data"]["name"] in titles


def _judged_claims(
    experiment: Experiment, by_key: Mapping[str, Sequence[dict[str, Any]]]
) -> list[_Told]:
    """The claims that runs on the same images, by `_key`, say something of, at either scale."""
    told: list[_Told] = []
    if not _has_images_of(experiment, by_key):
        return told
    for name, scale, own in _of_scales(experiment, by_key):
        rows = rows_of(experiment.arms(scale.learners), own)
        by_name = {row.arm.name: row for row in rows}
        for claim in experiment.claims(scale.learners):
            judged = judge(claim, rows)
            if judged.difference is None:
                continue
            compared = dict.fromkeys([claim.more, claim.less])
            runs = [run for arm in compared for run in by_name[arm].runs_of(judged.pairs)]
            theirs = papers_difference(experiment, claim, scale.learners, runs[0]["data"]["name"])
            halves = (judged.pairs[:MIN_SEEDS], judged.pairs[MIN_SEEDS:])
            enough = len(halves[1]) >= MIN_SEEDS
            again = tuple(judge(claim, rows, half) for half in halves) if enough else ()
            doubts = reservations(
                {
                    arm: by_name[arm].reservations(experiment.rates(by_name[arm].arm, scale))
                    for arm in compared
                }
            )
            told.append(_Told(judged, theirs, name, runs, again, doubts))
    return told


def _in_short(told: Iterable[_Told]) -> list[str]:
    """Each claim that was tried in a line, with a column for each images, scale and start."""
    by_claim: dict[Claim, dict[tuple[str, str], str]] = {}
    known: dict[Claim, set[_Compared]] = {}
    for each in told:
        column = each.setting, each.runs[0]["images_digest"]
        verdict = each.judged.verdict.partition(",")[0]
        by_claim.setdefault(each.claim, {})[column] = f"{verdict} {each.judged.mean}"
        known.setdefault(each.claim, set()).add(each.compared)
    for claim, compared in reversed(list(known.items())):
        if any(compared <= others for other, others in known.items() if other != claim):
            del by_claim[claim], known[claim]
    columns = {
        column: chr(ord("A") + number)
        for number, column in enumerate(sorted({c for cells in by_claim.values() for c in cells}))
    }
    return [
        *(f"- {name}: {setting}; images {images}" for (setting, images), name in columns.items()),
        "",
        f"| claim | {' | '.join(columns.values())} |",
        f"|---|{'---|' * len(columns)}",
        *(
            f"| {claim} | {' | '.join(cells.get(column, '') for column in columns)} |"
            for claim, cells in by_claim.items()
        ),
    ]


def _repeated(all_told: Iterable[_Told]) -> list[str]:
    """The claims that had seeds enough for two verdicts: the first seeds', and the others'."""
    lines: dict[_Compared, str] = {}
    for told in all_told:
        if not told.halves or told.compared in lines:
            continue
        first, others = told.halves
        assert first.difference is not None
        assert others.difference is not None
        within = first.difference.low <= others.difference.mean <= first.difference.high
        cells = [str(told.claim), told.setting]
        for half in told.halves:
            runs = [run for run in told.runs if _pair(run) in half.pairs]
            days = sorted({str(run["date"])[:10] for run in runs})
            where = ", ".join(dict.fromkeys(map(_device, runs)))
            cells.append(f"{half.shown} **{half.verdict}**; {' to '.join(days)}, {where}")
        lines[told.compared] = f"| {' | '.join([*cells, 'yes' if within else 'no'])} |"
    if not lines:
        return []
    return [
        "\n## Repeated\n",
        f"Claims that have {2 * MIN_SEEDS} seeds or more, by the first {MIN_SEEDS} and by the "
        "others, at the rates that all of them chose; and whether the mean of the others lies "
        "within the interval of the first.",
        "",
        f"| claim | setting | the first {MIN_SEEDS} seeds | the others | within |",
        "|---|---|---|---|---|",
        *lines.values(),
    ]


def _device(record: dict[str, Any]) -> str:
    """Where a run was made, and in which precision: "NVIDIA H200 bf16"."""
    found = record["environment"]
    return f"{found.get('gpu') or found.get('device', 'cpu')} {found['precision']}"


def _key(config: Config) -> str:
    """What runs of one arm have in common: all that decides a result but for rate and seed."""
    settings = flatten(config.portable())
    for name in ("seed", "train.lr", "recipe", "model.weights"):
        del settings[name]
    return json.dumps(settings, sort_keys=True)


def _stamps(records: Sequence[dict[str, Any]]) -> str:
    """Which configurations, code, images, devices and precisions figures are from."""
    digests = " ".join(dict.fromkeys(f"`{record['config_digest']}`" for record in records))
    commits = ", ".join(dict.fromkeys(str(r["environment"]["commit"]) for r in records))
    images = ", ".join(dict.fromkeys(str(r["images_digest"]) for r in records))
    devices = ", ".join(dict.fromkeys(map(_device, records)))
    return f"{digests}; code {commits}; images {images}; {devices}"
