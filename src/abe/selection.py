"""Which results are of which arm of an experiment, and which can stand side by side.

Everything derives from lines of `runs.jsonl`; nothing is run here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from abe.config import Config
from abe.data.benchmarks import find_benchmark
from abe.errors import InputError
from abe.experiments import Arm, Experiment, Scale, full, get_experiments, small
from abe.results import (
    RANDOM,
    flatten,
    has_diverged,
    is_baseline,
    method_name,
    method_of,
    start_name,
    weights_name,
)


def counts(record: dict[str, Any]) -> bool:
    """Whether a record is a run's that diverged, or holds what intervals are made of.

    Lines of early versions do not, and those of a checkpoint that its run did not select are none.
    """
    if has_diverged(record):
        return True
    own = is_baseline(record) or method_of(record) == method_name(
        Config.from_json(record["config"])
    )
    return own and "hits@1" in record["scores"]


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


def _key(config: Config) -> str:
    """What runs of one arm have in common: all that decides a result but for rate and seed."""
    settings = flatten(config.portable())
    for name in ("seed", "train.lr", "recipe", "model.weights"):
        del settings[name]
    return json.dumps(settings, sort_keys=True)


def of_scales(
    experiment: Experiment, by_key: Mapping[str, Sequence[dict[str, Any]]]
) -> Iterator[tuple[str, Scale, dict[str, list[dict[str, Any]]]]]:
    """The runs of each arm at either scale, of a group of `by_images_and_start`."""
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


def of_arms(
    experiments: Collection[Experiment], groups: Iterable[Mapping[str, Sequence[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """The runs of any arm of some experiments, at either scale, in the order of the arms."""
    found = {
        id(run): run
        for group in groups
        for experiment in experiments
        for _, _, by_arm in of_scales(experiment, group)
        for runs in by_arm.values()
        for run in runs
    }
    return list(found.values())


def has_images_of(experiment: Experiment, by_key: Mapping[str, Sequence[dict[str, Any]]]) -> bool:
    """Whether a group of `by_images_and_start` is of images that an experiment is about."""
    titles = [find_benchmark(name).title for name in experiment.benchmarks]
    return experiment.anywhere or next(iter(by_key.values()))[0]["data"]["name"] in titles


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
        runs = of_arms(experiments, by_images_and_start(runs))
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
    """What a result is of, its method apart: see `abe.results.markdown_table`."""
    return record["data"], record["protocol"], record["config"]["data"]["crop"]
