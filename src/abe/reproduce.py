"""Run what a table or figure of the paper needs, and set our figures beside the paper's.

Runs are lines of a results file. What has a line, by the digests of its configuration and of its
images, is not run again; what was interrupted goes on where it was. Seeds come first: a budget that
ends early leaves a whole table of fewer seeds. They try every rate that has not diverged and is not
clearly behind the best: which one that is on held-out classes differs from seed to seed, and the
mean over the seeds chooses.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from abe.checkpoint import checkpoints, steps_saved
from abe.config import Config
from abe.data.splits import Splits, open_splits
from abe.errors import DivergedError, TakenError
from abe.evaluate import evaluate_baselines
from abe.experiments import PAPERS_LEARNERS, Arm, Experiment, Scale, full
from abe.files import replace_text
from abe.intervals import is_behind
from abe.losses import ensemble_loss
from abe.model.summary import count_macs, count_parameters
from abe.report.reproduced import draw
from abe.report.tables import csv_text, markdown, papers_images, values_of
from abe.results import (
    append_record,
    best_rate,
    data_title,
    differing,
    flatten,
    has_diverged,
    is_baseline,
    read_records,
)
from abe.run_folder import alone
from abe.runtime import autocast, choose_device, choose_precision, keep_freed_memory
from abe.selection import by_images_and_start, counts, runs_of_arms
from abe.start import build_model
from abe.train import Trainer
from abe.verdicts import Row, judge, reservations, rows_of

_CHOSEN_BY = {
    "val": "held-out training classes",
    "both": "held-out training classes",
    "paper": "the test images, which flatters",
}
_LISTED_APART = ("recipe", "train.lr", "precision", "seed", "data.source")
_OF_DRAWN = ("data.synthetic_classes", "data.synthetic_images")


@dataclass(frozen=True)
class Run:
    """One training: an arm with a rate and a seed.

    Attributes:
        arm: of the experiment.
        config: with the rate and the seed.
        digest: of the config: kept, for it may be of a large file of weights too.
        gflop: what it computes, as multiplications and additions, evaluations included.
        kept: bytes of the checkpoints that stay in its folder, the best and the last two.
    """

    arm: Arm
    config: Config
    digest: str
    gflop: float
    kept: int


@dataclass
class Reproduction:
    """The experiments of one scale on one set of images.

    Args:
        scale: what runs begin from; with the images in its base.
        scale_name: "full" or "small".
        results: file of the lines.
        folder: for run folders, tables and pictures.
        console: where to report progress.
        seeds: how many, from the base's on.
        rows: names of the arms to run; the others are shown as they are. None for all.
    """

    scale: Scale
    scale_name: str
    results: Path
    folder: Path
    console: Console
    seeds: int = 3
    rows: Collection[str] | None = None
    splits: Splits = field(init=False)
    _known: dict[Arm, tuple[float, int]] = field(init=False, default_factory=dict)  # see `_costs`
    _speeds: list[float] = field(init=False, default_factory=list)  # GFLOP a second, of the last

    def __post_init__(self) -> None:
        base = self.scale.base.anchored()  # as a run has it: a line says what "." was
        self.scale = replace(self.scale, base=base)
        self.splits = open_splits(base.data, base.protocol, self.console)

    def plan(self, experiment: Experiment) -> list[Run]:
        """All trainings of an experiment, one seed after the other."""
        return [
            Run(arm, config, config.digest, *self._costs(arm, config))
            for seed in self._seeds
            for arm in experiment.arms(self.scale.learners)
            for config in self._configs(arm, experiment.rates(arm, self.scale), seed)
        ]

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Those to run: without a line, not diverged, and of no rate that is given up."""
        left = self._left(runs)["missing"]
        return [run for run in left if self.rows is None or run.arm.name in self.rows]

    def train(self, experiment: Experiment, budget: float | None, go_on: str) -> bool:
        """Train what is missing of an experiment, and add a line for each.

        Several processes may be at it: what one has begun the others leave to it.

        Args:
            experiment: which.
            budget: seconds; a run that is expected to end after them is not begun.
            go_on: the command that goes on, for who stops it.

        Returns:
            False if a signal stopped it.

        Raises:
            InputError: as `Trainer` does.
        """
        began = time.monotonic()
        seen: set[str] = set()  # by this process
        runs = self.plan(experiment)
        while True:
            missing = [run for run in self.missing(runs) if run.digest not in seen]
            if not missing:
                return True
            run, config = missing[0], missing[0].config
            if budget is not None:
                self._speeds = self._speeds or [self.speed()]
                needed = self.remaining(run) / statistics.median(self._speeds)
                left = max(0.0, budget - (time.monotonic() - began))
                if needed > left:
                    self.console.print(
                        f"{run.arm.name} takes about {_minutes(needed)}, and {_minutes(left)} of "
                        f"the budget are left: {len(missing)} runs are not begun"
                    )
                    return True
            seen.add(run.digest)
            self.console.rule(
                f"{run.arm.name}, rate {config.train.lr:g}, seed {config.seed}; "
                f"{len(missing)} to go"
            )
            started = time.monotonic()
            folder = self._run_folder(run.digest)
            begun = bool(checkpoints(folder))
            try:
                splits = self._splits_of(config)
                record = self._fit(
                    Trainer.begin(config, folder, self.console, splits=splits), go_on
                )
                if record is None:
                    return False
                with alone(folder):
                    if self.missing([run]):  # or another process has scored it meanwhile
                        append_record(self.results, record)
            except TakenError:
                told = f"{folder} is left to the process that trains it"
                self.console.print(told, markup=False, highlight=False, soft_wrap=True)
                continue
            if not begun and not has_diverged(record):
                speed = run.gflop / (time.monotonic() - started)
                self._speeds = [*self._speeds, speed][-5:]

    def _fit(self, trainer: Trainer, go_on: str) -> dict[str, Any] | None:
        """The line of a run, of one that diverged too; None if a signal stopped it."""
        try:
            return trainer.fit(go_on)
        except DivergedError as error:
            self.console.print(f"{error}", markup=False)
            return trainer.divergence_record()

    def remaining(self, run: Run) -> float:
        """GFLOP, of a run that was interrupted those of the steps that are left."""
        steps = run.config.train.steps
        return run.gflop * (1 - steps_saved(self._run_folder(run.digest)) / max(1, steps))

    def score_baselines(self) -> None:
        """Raw pixels and the pretrained start, if they have no line."""
        base = self._of_baselines
        names = {"raw pixels"} | ({"pretrained start"} if base.model.weights else set())
        own = (r for r in self._records() if is_baseline(r) and r["config_digest"] == base.digest)
        if missing := names - {record["method"] for record in own}:
            self.console.print("Scoring raw pixels and the pretrained start ...")
            for name, evaluation in evaluate_baselines(base, self.splits).items():
                if name in missing:
                    append_record(self.results, evaluation.record)

    def write(self, name: str, experiment: Experiment) -> list[Path]:
        """The table, its verdicts and its picture, of the lines that there are.

        Returns:
            What was written: Markdown, CSV and, if it can be drawn, a picture.
        """
        rows = self._rows(experiment)
        data, base = self.splits.name, self.scale.base
        values = [values_of(experiment, row, data, base) for row in rows]
        stem = self.folder / f"{name}-{data.replace(' ', '-')}-{self.scale_name}"
        page, table, picture = (
            stem.with_name(f"{stem.name}.{end}") for end in ("md", "csv", "png")
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(
            page, f"# {name}: {experiment.title}\n\n{self._text(experiment, rows, values)}"
        )
        replace_text(table, csv_text(values))
        folders = {
            row.arm.name: self._run_folder(row.found.record["config_digest"])
            for row in rows
            if row.found is not None and row.arm.settings
        }
        drawn = draw(experiment, values, folders, self.splits, picture, self.console)
        return [page, table, *[picture] * drawn]

    def _rows(self, experiment: Experiment) -> list[Row]:
        """The baselines and the arms, with what there is of them."""
        everything = self._records()
        records = self._runs_of_arms(experiment, everything)
        baselines: dict[str, Arm] = {}
        for record in filter(is_baseline, everything):
            if record["config_digest"] == self._of_baselines.digest:
                baselines[record["method"]] = Arm(record["method"], ())
                records[record["method"]] = [record]
        return rows_of([*baselines.values(), *experiment.arms(self.scale.learners)], records)

    def _text(
        self, experiment: Experiment, rows: Sequence[Row], values: Sequence[Mapping[str, Any]]
    ) -> str:
        """What stands under the title of a table: what it is of, the table, and what follows."""
        runs = self.plan(experiment)
        left, arms = self._left(runs), experiment.arms(self.scale.learners)
        judged = [judge(claim, rows) for claim in experiment.claims(self.scale.learners)]
        notes = {
            "missing": f"{len(left['missing'])} of {len(runs)} runs are missing.",
            "diverged": f"{len(left['diverged'])} of {len(runs)} runs diverged: their rates are "
            "chosen only where there is no other.",
            "given up": f"{len(left['given up'])} of {len(runs)} runs are not needed: with other "
            "seeds their rates diverged, or were clearly behind on held-out classes.",
        }
        parts = [
            f"{data_title(self.splits.describe())}, in percent, with the 95 % interval over seeds "
            "and classes; what is said to be the paper's is of "
            f"{papers_images(experiment, self.splits.name)}. {_protocol(runs)}."
            + f" All rows have the recipe's rate, {self.scale.base.train.lr:g}."
            * (not experiment.tuned and not any(arm.rates for arm in arms)),
            markdown(values),
            "\n".join(f"- {verdict}" for verdict in judged),
            *(note for state, note in notes.items() if left[state]),
            *self._reservations(experiment, rows),
            "Departs from the paper's setting: "
            + ("; ".join(self.departures(experiment)) or "nowhere")
            + ". The paper gives no rate, length or weight decay: those of `full` are ours; and "
            "Eq. 9 is divided by the batch, as Eq. 10 is.",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def departures(self, experiment: Experiment) -> list[str]:
        """Where what is run here differs from the paper's setting."""
        paper, chosen = full().base.with_overrides(["protocol=paper"]), self.scale
        pairs = zip(experiment.arms(PAPERS_LEARNERS), experiment.arms(chosen.learners), strict=True)
        return departures(
            [
                (
                    arm.name,
                    paper.with_overrides(experiment.papers_settings(theirs)),
                    self._configs(arm, experiment.rates(arm, chosen)[:1], chosen.base.seed)[0],
                )
                for theirs, arm in pairs
            ]
        )

    def speed(self) -> float:
        """GFLOP a second of a step, measured: of a small network on a processor, to be quick."""
        base = self.scale.base
        device = choose_device(base.device)
        precision = choose_precision(base.precision, device)
        config, images = base, base.train.batch_size
        if device.type == "cpu":
            config = base.with_overrides(["model.num_learners=2", "model.embedding_dim=2"])
            images = min(images, 32)  # fewer take longer for each
            keep_freed_memory()
        model = build_model(config).to(device)
        side = config.data.crop
        pixels = torch.zeros(images, 3, side, side, device=device)
        labels = torch.arange(images, device=device) // 2

        def step() -> float:
            started = time.perf_counter()
            with autocast(device, precision):
                embeddings = model(pixels)
            ensemble_loss(embeddings, labels).total.backward()
            next(model.parameters()).sum().item()  # waits for a GPU
            return time.perf_counter() - started

        seconds = statistics.median([step() for _ in range(4)][1:])
        return 6 * count_macs(model, side) * images / 1e9 / seconds

    def _runs_of_arms(
        self, experiment: Experiment, records: Sequence[dict[str, Any]]
    ) -> dict[str, list[dict[str, Any]]]:
        """The records of each arm, of seeds and rates beyond the plan too."""
        by_key = {
            key: own
            for group in by_images_and_start(records)
            if self._has_this_start(next(iter(group.values()))[0])
            for key, own in group.items()
        }
        return runs_of_arms(experiment, self.scale, by_key, self._classes)

    def _has_this_start(self, record: dict[str, Any]) -> bool:
        """Whether a run began with the weights of these: its digest is of their bytes, too."""
        config = Config.from_json(record["config"])
        model = config.model.model_copy(update={"weights": self.scale.base.model.weights})
        return config.model_copy(update={"model": model}).digest == record["config_digest"]

    def _reservations(self, experiment: Experiment, rows: Sequence[Row]) -> list[str]:
        """A line of why rows may do better than they did, if there are such."""
        told = reservations(
            {row.arm.name: row.reservations(experiment.rates(row.arm, self.scale)) for row in rows}
        )
        return [f"May be better than it is here: {told}."] if told else []

    @property
    def _classes(self) -> int:
        """How many are learned from."""
        return len(np.unique(self.splits.train.labels))

    @property
    def _of_baselines(self) -> Config:
        """What is not trained is the same for every seed."""
        return self.scale.base.with_overrides(["seed=0"])

    @property
    def _seeds(self) -> range:
        first = self.scale.base.seed
        return range(first, first + self.seeds)

    def _left(self, runs: Sequence[Run]) -> dict[str, list[Run]]:
        """The runs without a result: "missing", "diverged", or of a rate that is "given up"."""
        records = {r["config_digest"]: r for r in self._records() if not is_baseline(r)}
        tried: dict[str, dict[float, dict[int, float | None]]] = {}  # arm -> rate -> seed
        for run in runs:
            if record := records.get(run.digest):
                of_rate = tried.setdefault(run.arm.name, {}).setdefault(run.config.train.lr, {})
                recall = record["selection_recall@1"] or 0.0
                of_rate[run.config.seed] = None if has_diverged(record) else recall
        found: dict[str, list[Run]] = {"missing": [], "diverged": [], "given up": []}
        for run in runs:
            if run.digest not in records:
                late = self._is_given_up(run, tried.get(run.arm.name, {}))
                found["given up" if late else "missing"].append(run)
            elif has_diverged(records[run.digest]):
                found["diverged"].append(run)
        return found

    def _is_given_up(self, run: Run, by_rate: Mapping[float, Mapping[int, float | None]]) -> bool:
        """Whether its rate is clearly behind the best on held-out classes, by the seeds before.

        Not by those after it: a line that was removed is missing, whatever was run since. Or
        whether its rate diverged, with any seed, and another did not: it is not chosen then.

        Args:
            run: of an arm.
            by_rate: Recall@1 on held-out classes of the arm's runs, by rate and seed; None for one
                that diverged.
        """
        rate = run.config.train.lr
        stable = {each: found for each, found in by_rate.items() if None not in found.values()}
        if stable and rate in by_rate.keys() - stable.keys():
            return True
        before = {
            each: {seed: recall or 0.0 for seed, recall in found.items() if seed < run.config.seed}
            for each, found in (stable or by_rate).items()
        }
        before = {each: recalls for each, recalls in before.items() if recalls}
        own = before.get(rate)
        if own is None:
            return False
        best = before[best_rate(before)]
        shared = sorted(own.keys() & best.keys())
        recalls, others = ([each[seed] for seed in shared] for each in (own, best))
        return bool(shared) and is_behind(recalls, others, len(self.splits.select))

    def _configs(self, arm: Arm, rates: Sequence[float], seed: int) -> list[Config]:
        """One at each rate."""
        base = self.scale.base
        return [
            base.with_overrides(
                [*arm.settings, f"train.lr={rate}", f"seed={seed}"]
            ).with_batches_that_fit(self._classes)
            for rate in rates
        ]

    def _splits_of(self, config: Config) -> Splits | None:
        """Those of the base, if the run has the same; they are read once then."""
        own, base = ((each.data, each.protocol == "paper") for each in (config, self.scale.base))
        return self.splits if own == base else None

    def _run_folder(self, digest: str) -> Path:
        """Of a configuration on these images: others may be called the same."""
        return self.folder / "runs" / f"{digest}-{self.splits.digest}"

    def _records(self) -> list[dict[str, Any]]:
        """The lines of runs that were trained and tested on these images."""
        found = read_records(self.results) if self.results.exists() else []
        return [
            record
            for record in found
            if counts(record)
            and record["images_digest"] == self.splits.digest
            and "trained_on" not in record["data"]
        ]

    def _costs(self, arm: Arm, config: Config) -> tuple[float, int]:
        """`gflop` and `kept` of a run of an arm, which are the same of every rate and seed."""
        if arm not in self._known:
            with torch.device("meta"):
                model = build_model(config)
                macs = count_macs(model, config.data.crop)
            train = config.train
            copies = {"sgd": 2, "adamw": 3}[
                train.optimizer
            ]  # weights, and what they are updated by
            evaluations = math.ceil(train.steps / train.eval_every) + 1
            gallery = 0 if self.splits.gallery is None else len(self.splits.gallery)
            tested = len(self.splits.test) + gallery
            scored = len(self.splits.select) + tested * (config.protocol == "both")
            images = 3 * train.steps * train.batch_size + evaluations * scored + tested
            kept = min(evaluations, 3) * copies * 4 * count_parameters(model)
            self._known[arm] = 2 * macs * images / 1e9, kept
        return self._known[arm]


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


def _protocol(runs: Sequence[Run]) -> str:
    """By what checkpoints and rates are chosen: "Protocol `val`: ..."."""
    protocols = dict.fromkeys(run.config.protocol for run in runs)
    return "; ".join(
        f"Protocol `{each}`: checkpoints and rates are chosen by {_CHOSEN_BY[each]}"
        for each in protocols
    )


def reproduce(
    reproduction: Reproduction,
    experiments: Mapping[str, Experiment],
    *,
    budget: float | None,
    go_on: str,
    show: Callable[[list[Path]], None],
) -> bool:
    """Run what is missing of some experiments, and write and show what there is of each.

    Returns:
        Whether it went on to its end or to that of its budget; False if a signal stopped it.
    """
    began = time.monotonic()
    reproduction.score_baselines()
    going = True
    for name, experiment in experiments.items():
        if going:
            left = None if budget is None else budget - (time.monotonic() - began)
            going = reproduction.train(experiment, left, go_on)
        show(reproduction.write(name, experiment))
    return going


def dry_run(reproduction: Reproduction, experiments: Mapping[str, Experiment]) -> Table:
    """What there is to run, and how long it takes at the speed that is measured now."""
    speed = reproduction.speed()
    table = Table("experiment", "run", "rate", "seed", "about", box=None, pad_edge=False)
    total, kept = 0.0, 0
    listed: set[str] = set()
    for name, experiment in experiments.items():
        for run in reproduction.missing(reproduction.plan(experiment)):
            if run.digest in listed:
                continue
            listed.add(run.digest)
            seconds = reproduction.remaining(run) / speed
            total, kept = total + seconds, kept + run.kept
            rate, seed = f"{run.config.train.lr:g}", str(run.config.seed)
            table.add_row(name, run.arm.name, rate, seed, _minutes(seconds))
    table.caption = (
        f"at most {len(listed)} runs, about {_minutes(total)} and {kept / 1e9:.1f} GB of "
        f"checkpoints in {reproduction.folder / 'runs'} in all"
    )
    return table


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
