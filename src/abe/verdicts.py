"""What runs say of the claims of an experiment: rows, differences with intervals, verdicts."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abe.experiments import PICKED, Arm, Claim, Quantity
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
from abe.results import Summary, has_diverged, is_baseline, summarize
from abe.selection import counts

MIN_SEEDS = 3  # below that a claim is left open
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
            pair_of(record): values
            for record in self._runs
            if len(values := _values(record, quantity))
        }

    def runs_of(self, pairs: Collection[tuple[int, str]]) -> list[dict[str, Any]]:
        """The records that `samples` has of some seeds and orders."""
        return [record for record in self._runs if pair_of(record) in pairs]

    def interval(self) -> Interval | None:
        """Of Recall@1, over seeds and classes."""
        samples = self.samples("recall@1")
        return crossed(np.stack(list(samples.values())), _classes(self._runs)) if samples else None

    def reservations(self, planned: Collection[float] = ()) -> list[str]:
        """Why an arm may do better than its figures: "the start itself was picked in 2 of 3".

        Args:
            planned: learning rates to choose from.
        """
        if self.found is None or is_baseline(self.found.record):
            return []
        notes = []
        if at_start := sum(run["selected_step"] == 0 for run in self._runs):
            notes.append(f"the start itself was picked in {at_start} of {len(self._runs)}")
        rates = self.found.rates
        chosen = self.found.record["config"]["train"]["lr"]
        if len(rates) > 1 and chosen in (rates[0], rates[-1]):
            end = "lowest" if chosen == rates[0] else "highest"
            notes.append(f"its rate is the {end} of {', '.join(f'{each:g}' for each in rates)}")
        if untried := sorted({*planned}.difference(rates)):
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
        seeds += " on these classes" * (self.bootstrapped is None)
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


def pair_of(record: dict[str, Any]) -> tuple[int, str]:
    """Seed and order of the queries: results that have both alike are compared in pairs."""
    return record["seed"], record["scores"]["hits@1"].get("order", "")


def _values(record: dict[str, Any], quantity: Quantity) -> NDArray[np.float64]:
    scores = record["scores"]
    if quantity == "recall@1":
        return unpack(scores["hits@1"]).astype(np.float64)
    if quantity == "learners' recall@1":
        learners = scores["learners"]
        hits = [scores] if len(learners) == 1 else learners  # it is the ensemble itself
        if all("hits@1" in each for each in hits):
            return np.mean([unpack(each["hits@1"]) for each in hits], axis=0)
        return np.array([np.mean([learner["recall@1"] for learner in learners])])
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
        runs = [record for record in latest.values() if not has_diverged(record)]
        diverged = [record for record in latest.values() if has_diverged(record)]
        orders = collections.Counter(pair_of(record)[1] for record in runs)
        usual = orders.most_common(1)[0][0] if orders else ""
        runs = [record for record in runs if pair_of(record)[1] == usual]
        found: Sequence[Summary | None] = summarize(runs + diverged) or [None]
        (summary,) = found  # an arm's runs differ in rate and seed alone
        rows.append(Row(arm, summary))
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
    stays open. Of cosines and picks, and of learners in early versions, a record has the mean: the
    verdict is on these classes.

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
    if all(1 < len(more[pair]) == len(less[pair]) for pair in pairs):
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
