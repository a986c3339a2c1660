"""`runs.jsonl`: one line for each evaluated run, and the tables that derive from it.

A record says what was run (configuration and its digest, seed, protocol, weights, data), with
which software on which hardware, and the scores. No figure that we show is typed in by hand.
"""

from __future__ import annotations

import collections
import datetime
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from rich import box
from rich.table import Column, Table
from torch import Tensor

from abe.checkpoint import Best
from abe.config import Config
from abe.data.decode import printable
from abe.errors import InputError
from abe.files import append_json_line, read_json_lines, write_json, write_rows
from abe.intervals import unpack, unpack_classes
from abe.ranks import Ranks
from abe.runtime import resume_command, typed
from abe.shards import Shards

EMBEDDINGS = "embeddings.safetensors"  # of a run: those of its test images
RANDOM = "random weights"


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
    # The paper trains those with one shared G with Eq. 9, and no others (supplement).
    with_it, expected = config.train.divergence_weight > 0, model.network in {"abe", "m-tails"}
    otherwise = f" {'with' if with_it else 'without'} divergence" * (with_it != expected and m > 1)
    return f"{name}^{model.embedding_dim}{otherwise}"


def result_record(
    config: Config,
    *,
    scores: dict[str, Any],
    best: Best | None,
    data: dict[str, Any],
    weights: dict[str, str] | None,
    environment: dict[str, Any],
    method: str | None = None,
    images_digest: str | None = None,
) -> dict[str, Any]:
    """One line of `runs.jsonl`.

    Args:
        config: of the run.
        scores: see `abe.evaluate.score`, and of protocol "both" "test_picked".
        best: the checkpoint that was picked; None for what was not trained.
        data: see `Splits.describe`.
        weights: origin of the pretrained start.
        environment: see `abe.runtime.environment`.
        method: name of what was not trained; the network's by default.
        images_digest: see `Splits.digest`.
    """
    return {
        "method": method or method_name(config),
        "protocol": config.protocol,
        "selected_step": best and best.step,
        "selection_recall@1": best and best.recall_at_1,
        "seed": config.seed,
        "config_digest": config.digest,
        "data": data,
        "images_digest": images_digest,
        "weights": weights,
        "scores": scores,
        "environment": environment,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config.portable(),
    }


def divergence_record(config: Config, *, step: int, **known: Any) -> dict[str, Any]:
    """The line of a run that diverged after so many steps; `known` is as in `result_record`."""
    return result_record(config, scores={}, best=None, **known) | {"diverged": step}


def write_result(
    folder: Path,
    record: dict[str, Any],
    embeddings: Tensor,
    gallery: Tensor | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Leave a result in its run's folder: result.json and embeddings.safetensors.

    Of several ranks the first one writes, and the others send it what they have.

    Args:
        folder: of the run.
        record: see `result_record`.
        embeddings: of the test images, (N, M, d) in float32, of several ranks this one's.
        gallery: of what they were compared with, (G, M, d), if not with each other.
        ranks: the processes; None for one by itself.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    saved, result = folder / EMBEDDINGS, folder / "result.json"
    tensors = {"embeddings": Shards(embeddings, ranks)}
    if gallery is not None:
        tensors["gallery"] = Shards(gallery, ranks)
    if ranks is not None and not ranks.first:
        for rows in tensors.values():
            collections.deque(rows.parts(), maxlen=0)
        return
    writing = saved
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(
            saved,
            {
                name: ((len(rows), *rows.own.shape[1:]), rows.parts())
                for name, rows in tensors.items()
            },
        )
        writing = result
        write_json(result, record)
    except OSError as error:
        kept = (
            f"; the run's checkpoints are kept: `{resume_command(folder)}` scores and writes it "
            f"again, `{typed('eval', folder)}` scores alone"
        )
        raise InputError(
            f"{writing} cannot be written ({error}): make room for it or see to its permissions"
            + kept * (not is_baseline(record))
        ) from None


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a result to a `runs.jsonl`."""
    append_json_line(path, record)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The results in a `runs.jsonl`, and the runs that ended without one: see `has_diverged`.

    Raises:
        InputError: the file cannot be read or has none, or a line is no result.
    """
    records = read_json_lines(path)
    if not records:
        raise InputError(f"{path} has no results: `abe train` and `abe eval` add them")
    for number, record in enumerate(records, start=1):
        try:
            markdown_table(summarize([record]))
            if record["config"]["seed"] != record["seed"]:
                raise ValueError(f"config.seed {record['config']['seed']}")
            if not 0 <= float(record["selection_recall@1"] or 0) <= 1:
                raise ValueError(f"selection_recall@1 {record['selection_recall@1']}")
            whole = "hits@1" in record["scores"]
            if whole or has_diverged(record):
                _ = record["images_digest"], record["date"], record["data"]["train_classes"]
                for environment in (record["environment"], *trained_in(record)):
                    _ = environment["commit"], environment["precision"]
            if whole:
                hits = record["scores"]["hits@1"]
                queries = len(unpack(hits))
                for own in record["scores"]["learners"]:
                    if "hits@1" in own and len(unpack(own["hits@1"])) != queries:
                        raise ValueError(f"hits@1 of a learner on other queries than the {queries}")
                if "classes" in hits and len(unpack_classes(hits["classes"])) != queries:
                    raise ValueError(f"classes of other queries than the {queries}")
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f"{path}, line {number} is no result of `abe train` or `abe eval` ({error!r}): "
                "remove it"
            ) from None
    return records


def scores_table(records: Iterable[dict[str, Any]]) -> Table:
    """Results side by side, for the terminal: fractions as percentages, learners by their range."""
    records = list(records)
    columns = [key for key in records[0]["scores"]["ensemble"] if key.startswith("recall@")]
    table = Table(
        Column("method", overflow="fold", min_width=16), box=box.SIMPLE_HEAD, pad_edge=False
    )
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
            "" if cosine is None else f"{cosine:z.2f}",
            "" if step is None else str(step),
        )
    data, protocol = records[0]["data"], records[0]["protocol"]
    table.caption = f"{data_title(data)}: {_test_images(data)}; protocol {protocol}; %"
    return table


def data_title(data: dict[str, Any]) -> str:
    """What to call the data of a record wherever a score on them is shown.

    With what has to be said of them: other data that the run was trained on, and stamps.
    """
    trained_on = [f"trained on {data['trained_on']}"] if "trained_on" in data else []
    notes = [*trained_on, *data.get("stamps", [])]
    title = f"{data['name']} ({'; '.join(notes)})" if notes else data["name"]
    return printable(title)


def _test_images(data: dict[str, Any]) -> str:
    gallery = data.get("gallery_images")
    against = f", searched in {gallery:,} gallery images" if gallery else ""
    skipped = f", unreadable files left out: {data['skipped']:,}" if data["skipped"] else ""
    unseen = "" if "trained_on" in data else " not seen in training"
    return (
        f"{data['test_images']:,} test images of {data['test_classes']:,} classes{unseen}{against}"
        f"{skipped}"
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full names: {"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all of several flat configurations."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [n for n in names if any(each.get(n) != settings[0].get(n) for each in settings)]


def told_apart(name: str, own: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> str:
    """A name with those settings that differ among all of that name: "ABE-2^8 (lr 0.1)"."""
    notes = []
    for setting in differing(alike):
        value = own.get(setting)
        shown = f"{value:.12g}" if isinstance(value, float) else value
        notes.append(f"{setting.rpartition('.')[2]} {shown}")
    return f"{name} ({', '.join(notes)})" if notes else name


@dataclass(frozen=True)
class Summary:
    """The runs of one method that differ in their seed alone, at the rate that was chosen.

    Or a baseline, which has no training to choose a rate for.

    Attributes:
        runs: the records of the chosen rate, in the order of their seeds.
        rates: learning rates that were tried, those that diverged too.
        scores: name of a score -> its mean over the seeds; see `summarize`.
        spread: the same scores -> their standard deviation, 0 for one seed.
    """

    runs: tuple[dict[str, Any], ...]
    rates: tuple[float, ...]
    scores: dict[str, float]
    spread: dict[str, float]

    @property
    def record(self) -> dict[str, Any]:
        """One of the runs, for what they have in common."""
        return self.runs[0]

    @property
    def seeds(self) -> int:
        """How many seeds the chosen rate was run with."""
        return len(self.runs)


def summarize(records: Iterable[dict[str, Any]]) -> list[Summary]:
    """Group records by everything but seed and learning rate, and average over seeds.

    A run that was scored again counts once: the last record of a seed and rate is taken.
    Of several learning rates the one with the best Recall@1 on the images that the protocol selects
    by is kept: see `best_rate`. One at which a seed diverged is kept only where there is no other.
    Scores are those of the ensemble that all of the seeds have, "learner recall@1" and "best
    learner recall@1" (mean and maximum of the learners) and "learner cosine".
    """
    groups: dict[str, dict[float, dict[int, dict[str, Any]]]] = {}
    for record in records:
        own = _settings(record)
        if record["weights"]:  # whatever their file is called
            own["model.weights"] = record["weights"]["sha256"]
        key = json.dumps([method_of(record), record["data"], own], sort_keys=True)
        rate, seed = float(record["config"]["train"]["lr"]), int(record["seed"])
        groups.setdefault(key, {}).setdefault(rate, {})[seed] = record
    summaries = []
    for tried in groups.values():
        finished = {
            rate: {seed: runs[seed] for seed in sorted(runs) if not has_diverged(runs[seed])}
            for rate, runs in tried.items()
        }
        stable = {rate: runs for rate, runs in finished.items() if len(runs) == len(tried[rate])}
        by_rate = stable or {rate: runs for rate, runs in finished.items() if runs}
        if not by_rate:
            continue
        best = best_rate(
            {
                rate: {seed: run["selection_recall@1"] or 0.0 for seed, run in runs.items()}
                for rate, runs in by_rate.items()
            }
        )
        values = [_scores(record) for record in by_rate[best].values()]
        names = [name for name in values[0] if all(name in value for value in values)]
        columns = {name: [value[name] for value in values] for name in names}
        summaries.append(
            Summary(
                runs=tuple(by_rate[best].values()),
                rates=tuple(sorted(tried)),
                scores={name: statistics.fmean(column) for name, column in columns.items()},
                spread={
                    name: statistics.stdev(column) if len(column) > 1 else 0.0
                    for name, column in columns.items()
                },
            )
        )
    return summaries


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What scores of a method depend on but for seed and learning rate."""
    settings = flatten(Config.from_json(record["config"]).portable())
    del settings["recipe"], settings["seed"], settings["train.lr"]
    if is_baseline(record):
        settings = {k: v for k, v in settings.items() if k.startswith(("data.", "protocol"))}
    if weights := record["weights"]:
        settings["model.weights"] = weights_name(weights)
    return settings


def weights_name(weights: dict[str, str] | None) -> str:
    """What to call a pretrained start: its file, and the first digits of its hash."""
    if weights is None:
        return RANDOM
    return f"{start_name(weights)} {weights['sha256'][:12]}"


def start_name(weights: dict[str, str] | None) -> str:
    """The file of a pretrained start, or the name that it is known by."""
    return RANDOM if weights is None else PurePath(weights["source"]).name


def is_baseline(record: dict[str, Any]) -> bool:
    """Whether a result is of what was not trained."""
    return record["selected_step"] is None and not has_diverged(record)


def has_diverged(record: dict[str, Any]) -> bool:
    """Whether a line is of a run that ended without a result, for it diverged."""
    return "diverged" in record


def trained_in(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The environments that a run was trained in, one after the other: see `add_stretches`."""
    environment = record["environment"]
    stretches: list[dict[str, Any]] = environment.get("stretches", [environment])
    return stretches


def method_of(record: dict[str, Any]) -> str:
    """What a result is of, by the name that it has now: early ones lack " with divergence"."""
    method, name = str(record["method"]), method_name(Config.from_json(record["config"]))
    early = method == name.removesuffix(" with divergence") and not is_baseline(record)
    return name if early else method


def best_rate(by_rate: Mapping[float, Mapping[int, float]]) -> float:
    """Which rate is best on held-out classes, by the seeds that each shares with the most tried.

    That with the most seeds is beaten by another that some of them have tried, even if others have
    not yet: what is said of the method then is of fewer seeds. Of equals that with the most seeds
    is taken, or the lowest; one that shares no seed is behind all that do.

    Args:
        by_rate: Recall@1 on held-out classes by rate and seed.
    """
    most_tried = max(by_rate, key=lambda rate: (len(by_rate[rate]), -rate))

    def ahead(rate: float) -> tuple[float, int, float]:
        recalls, others = by_rate[rate], by_rate[most_tried]
        gains = [recalls[seed] - others[seed] for seed in sorted(recalls.keys() & others.keys())]
        gain = math.fsum(gains) / len(gains) if gains else -math.inf
        return round(gain, 12), len(recalls), -rate  # of equals, not of what rounding left of them

    return max(by_rate, key=ahead)


def _scores(record: dict[str, Any]) -> dict[str, float]:
    scores = record["scores"]
    learners = [learner["recall@1"] for learner in scores["learners"]]
    flat = dict(scores["ensemble"])
    if len(learners) > 1:
        flat["learner recall@1"] = statistics.fmean(learners)
        flat["best learner recall@1"] = max(learners)
        flat["learner cosine"] = scores["similarity"]["self"]
    return flat


def markdown_table(summaries: Iterable[Summary]) -> str:
    """Markdown tables: means over seeds, percent, with standard deviations.

    One for each data set, protocol and crop, and for each start, number of steps and size of a
    batch that networks were trained with there. Raw pixels are in all of those, a pretrained start
    in those of the networks that began with it, or in one of its own.
    """
    by_images: dict[str, list[Summary]] = {}
    for summary in summaries:
        record = summary.record
        crop = record["config"]["data"]["crop"]
        key = json.dumps([record["data"], record["protocol"], crop], sort_keys=True)
        by_images.setdefault(key, []).append(summary)
    tables = []
    for group in by_images.values():
        baselines = [summary for summary in group if is_baseline(summary.record)]
        trained: dict[str, list[Summary]] = {}
        for summary in group:
            if not is_baseline(summary.record):
                trained.setdefault(schedule(summary.record), []).append(summary)
        starts = {weights_name(rows[0].record["weights"]) for rows in trained.values()}
        starts |= {RANDOM} if starts else set()
        of_start = [(weights_name(each.record["weights"]), each) for each in baselines]
        if alone := [each for start, each in of_start if start not in starts]:
            tables.append(_table(alone))
        for rows in trained.values():
            starts = {weights_name(rows[0].record["weights"]), RANDOM}
            tables.append(_table([each for start, each in of_start if start in starts] + rows))
    return "\n\n".join(tables)


def _table(summaries: list[Summary]) -> str:
    """What was trained on the same images by the same schedule, behind its baselines."""
    last = summaries[-1].record
    data = last["data"]
    recalls = [name for name in last["scores"]["ensemble"] if name.startswith("recall@")]
    names = [name.replace("recall@", "R@") for name in recalls]
    lines = [
        f"**{data_title(data)}**: {_test_images(data)}, {data['train_classes']:,} classes to learn "
        f"from, {data['select_classes']:,} to choose by (protocol `{last['protocol']}`), "
        f"{schedule(last)}.",
        "",
        f"| method | loss | rate, of | seeds | {' | '.join(names)} | learners' mean R@1 "
        "| best learner's R@1 | learners' cosine |",
        f"|---|---|---|--:|{'--:|' * len(names)}--:|--:|--:|",
    ]
    for summary in summaries:
        own = _name_and_loss(summary)
        alike = [_settings(each.record) for each in summaries if _name_and_loss(each) == own]
        method, loss = own
        cosine = summary.scores.get("learner cosine")
        cells = [
            told_apart(method, _settings(summary.record), alike),
            loss,
            _rate_name(summary),
            str(summary.seeds),
            *(
                _percent(summary, name)
                for name in (*recalls, "learner recall@1", "best learner recall@1")
            ),
            "" if cosine is None else f"{cosine:z.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def schedule(record: dict[str, Any]) -> str:
    """What a network was trained with: "120 steps from start.pth 0123, of 64 images at 96 px".

    A baseline was not trained: "images at 96 px".
    """
    config = record["config"]
    images = f"images at {config['data']['crop']} px"
    if is_baseline(record):
        return images
    train, start = config["train"], weights_name(record["weights"])
    return f"{train['steps']} steps from {start}, of {train['batch_size']} {images}"


def _name_and_loss(summary: Summary) -> tuple[str, str]:
    record = summary.record
    if is_baseline(record):
        return record["method"], ""
    train = record["config"]["train"]
    if train["metric_loss"] != "contrastive":
        return record["method"], str(train["metric_loss"])
    losses = {"per_image": "Eq. 10", "sum": "Eq. 10, sum", "balanced": "Eq. 10, balanced"}
    return record["method"], losses[train["normalization"]]


def _rate_name(summary: Summary) -> str:
    """The learning rate that was chosen, and how many were tried."""
    if is_baseline(summary.record):
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
