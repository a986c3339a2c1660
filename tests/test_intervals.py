"""Intervals cover what they should, pair what is paired, and verdicts follow from them."""

import statistics
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import t as student_t

from abe.intervals import (
    Interval,
    bootstrap,
    crossed,
    does_not_exceed,
    exceeds,
    is_behind,
    is_within,
    of_means,
    pack,
    pack_classes,
    unpack,
    unpack_classes,
)


def test_bootstrap_is_that_of_loops() -> None:
    values = np.random.default_rng(0).random((3, 7))
    found = bootstrap(values)
    generator = np.random.default_rng(1)
    means = []
    for _ in range(2000):
        seeds, queries = generator.integers(3, size=3), generator.integers(7, size=7)
        means.append(np.mean([[values[s, q] for q in queries] for s in seeds]))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


@pytest.mark.parametrize(
    ("interval", "seeds", "of_seeds", "least", "most"),
    [
        (bootstrap, 8, 0.05, 0.85, 0.99),
        (bootstrap, 3, 0.02, 0.85, 0.99),  # seeds differ as much as queries do
        (bootstrap, 3, 0.5, 0.65, 0.85),  # seeds decide: too narrow
        (crossed, 8, 0.05, 0.94, 0.99),
        (crossed, 3, 0.0, 0.94, 0.995),
        (crossed, 3, 0.02, 0.94, 0.99),
        (crossed, 3, 0.1, 0.94, 0.99),  # seeds vary most, but not alone
        (crossed, 3, 0.5, 0.94, 0.98),
    ],
)
def test_how_often_intervals_cover_the_mean(
    interval: Callable[[NDArray[np.float64]], Interval],
    seeds: int,
    of_seeds: float,
    least: float,
    most: float,
) -> None:
    """As often as they say, but for the bootstrap where few seeds decide alone."""
    generator = np.random.default_rng(0)
    covered, draws = 0, 400 if interval is bootstrap else 4000
    for _ in range(draws):
        by_seed = of_seeds * generator.standard_normal((seeds, 1))
        by_query = 0.2 * generator.standard_normal((1, 100))
        found = interval(0.5 + by_seed + by_query + 0.1 * generator.standard_normal((seeds, 100)))
        covered += found.low <= 0.5 <= found.high
    assert least <= covered / draws <= most


@pytest.mark.parametrize("of_seeds", [0.0, 1.0])
def test_the_interval_of_crossed_seeds_and_queries_is_that_of_loops(of_seeds: float) -> None:
    values = np.random.default_rng(0).random((3, 5)) + of_seeds * np.array([[0.0], [1.0], [3.0]])
    seeds = [statistics.fmean(row) for row in values.tolist()]
    queries = [statistics.fmean(column) for column in values.T.tolist()]
    parts = [(statistics.variance(seeds) / 3, 2), (statistics.variance(queries) / 5, 4)]
    variance = parts[0][0] + parts[1][0]
    degrees = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    margins = (
        student_t.ppf(0.975, degrees) * variance**0.5,
        student_t.ppf(0.975, 2) * parts[0][0] ** 0.5,  # of the seeds alone
    )
    assert margins[1] > margins[0] or not of_seeds
    margin = max(margins)
    found = crossed(values)
    mean = statistics.fmean(seeds)
    assert (found.low, found.high) == pytest.approx((mean - margin, mean + margin))
    one = crossed(values[:1])
    margin = student_t.ppf(0.975, 4) * (statistics.variance(values[0].tolist()) / 5) ** 0.5
    assert one.high - one.mean == pytest.approx(margin)
    assert crossed(np.zeros((3, 5))) == Interval(0.0, 0.0, 0.0)
    assert crossed(np.ones((1, 1))) == Interval(1.0, -np.inf, np.inf)


def test_queries_count_in_clusters_of_their_class() -> None:
    values = np.random.default_rng(0).random((3, 7))
    classes = np.array([5, 2, 5, 9, 2, 5, 9])
    mean = statistics.fmean(values.flatten().tolist())
    of_query = [statistics.fmean(column) - mean for column in values.T.tolist()]
    sums = [
        sum(value for value, own in zip(of_query, classes, strict=True) if own == label)
        for label in (2, 5, 9)
    ]
    seeds = [statistics.fmean(row) for row in values.tolist()]
    parts = [
        (statistics.variance(seeds) / 3, 2),
        (3 / 2 * sum(each**2 for each in sums) / 7**2, 2),
    ]
    variance = parts[0][0] + parts[1][0]
    degrees = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    margin = student_t.ppf(0.975, degrees) * variance**0.5
    found = crossed(values, classes)
    assert (found.low, found.high) == pytest.approx((mean - margin, mean + margin))

    drawn = bootstrap(values[:1], classes)
    generator = np.random.default_rng(1)
    means = []
    for _ in range(2000):
        rows = [values[0, classes == generator.choice([2, 5, 9])] for _ in range(3)]
        means.append(np.concatenate(rows).mean())
    assert (drawn.low, drawn.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)
    for interval in (crossed, bootstrap):
        assert interval(values, np.arange(7)) == interval(values)
    assert crossed(values[:1], np.zeros(7, int)) == Interval(values[0].mean(), -np.inf, np.inf)


@pytest.mark.parametrize("interval", [bootstrap, crossed])
def test_intervals_over_classes_cover_where_those_over_queries_do_not(
    interval: Callable[..., Interval],
) -> None:
    generator = np.random.default_rng(0)
    classes = np.repeat(np.arange(40), generator.integers(3, 12, size=40))
    covered = {True: 0, False: 0}
    draws = 60 if interval is bootstrap else 1000
    for _ in range(draws):
        by_class = 0.3 * generator.standard_normal(40)[classes]
        values = by_class + 0.3 * generator.standard_normal((8, len(classes)))
        for clustered in covered:
            found = interval(values, classes) if clustered else interval(values)
            covered[clustered] += found.low <= 0 <= found.high
    assert 0.88 < covered[True] / draws < 0.99
    assert covered[False] / draws < 0.8


def test_classes_go_into_a_line_and_back() -> None:
    labels = np.array([7, 7, 900_000, 3, 3, 3, 7])
    packed = pack_classes(labels)
    assert unpack_classes(packed).tolist() == [1, 1, 2, 0, 0, 0, 1]
    assert len(pack_classes(np.repeat(np.arange(100), 30))) < 120
    for broken, message in (
        ("not base64", "base64"),
        (packed[:-8], "no classes of queries"),
        ("AAAA", "no classes of queries"),
    ):
        with pytest.raises(ValueError, match=message):
            unpack_classes(broken)


def test_one_seed_and_many_queries_go_in_blocks() -> None:
    hits = np.random.default_rng(0).random((1, 60_000)) < 0.3
    found = bootstrap(hits)
    spread = np.sqrt(0.3 * 0.7 / 60_000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_differences_of_pairs_are_surer_than_those_of_strangers() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random((1, 500))
    one, other = (generator.random((3, 500)) * 0.2 + hard < level for level in (0.5, 0.55))
    paired = bootstrap(other.astype(float) - one)
    apart = bootstrap(other.astype(float) - np.roll(one, 250, axis=1))
    assert paired.high - paired.low < 0.7 * (apart.high - apart.low)
    assert exceeds(paired) == "shown"


@pytest.mark.parametrize(
    ("low", "high", "more", "similar", "not_more"),
    [
        (0.01, 0.03, "shown", "not shown", "not shown"),
        (0.03, 0.05, "shown", "refuted", "refuted"),
        (-0.01, 0.01, "not shown", "shown", "shown"),
        (-0.05, -0.03, "refuted", "refuted", "shown"),
        (-0.05, 0.05, "not shown", "not shown", "not shown"),
    ],
)
def test_verdicts(low: float, high: float, more: str, similar: str, not_more: str) -> None:
    difference = Interval((low + high) / 2, low, high)
    assert exceeds(difference) == more
    assert is_within(difference, 0.02) == similar
    assert does_not_exceed(difference, 0.02) == not_more


def test_three_means_cover_their_mean_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    found = [of_means(generator.normal(0.5, 0.1, size=3)) for _ in range(1000)]
    assert 0.93 <= np.mean([each.low <= 0.5 <= each.high for each in found]) <= 0.97
    assert of_means(np.array([0.5])) == Interval(0.5, -np.inf, np.inf)
    assert of_means(np.array([0.5, 0.5])) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "most"),
    [(1, 0.0, 0.01), (1, 0.02, 0.01), (3, 0.0, 0.03), (3, 0.02, 0.06), (3, 0.1, 0.12)],
)
def test_level_shares_are_rarely_called_behind_and_distant_ones_mostly(
    seeds: int, of_seeds: float, most: float
) -> None:
    """Also where seeds differ by as much as queries explain, .02, or far more: then less rarely."""
    generator = np.random.default_rng(0)

    def shares(truth: float) -> list[float]:
        truths = np.clip(truth + of_seeds * generator.standard_normal(seeds), 0, 1)
        return list(generator.binomial(600, truths) / 600)

    level = [is_behind(shares(0.5), shares(0.5), 600) for _ in range(2000)]
    distant = [is_behind(shares(0.1), shares(0.7), 600) for _ in range(200)]
    assert np.mean(level) < most
    assert np.mean(distant) > 0.9
    assert not is_behind([0.0] * seeds, [0.0] * seeds, 600)


@pytest.mark.parametrize(
    ("own", "others", "behind"),
    [
        ([0.5], [0.51], False),
        ([0.44], [0.53], False),  # of 800 queries the error is 0.025: one seed takes 0.1
        ([0.40], [0.51], True),
        ([0.44, 0.45], [0.50, 0.51], True),  # two take 0.035
        ([0.44, 0.45], [0.48, 0.49], True),
        ([0.48, 0.49], [0.50, 0.51], False),
        ([0.30, 0.50], [0.50, 0.50], False),  # as far, but seeds differ
        ([0.51], [0.40], False),
    ],
)
def test_what_is_behind(own: list[float], others: list[float], behind: bool) -> None:
    assert is_behind(own, others, 800) == behind


@pytest.mark.parametrize("count", [1, 8, 3043])
def test_packed_hits_come_back(count: int) -> None:
    hits = np.random.default_rng(0).random(count) < 0.5
    assert np.array_equal(unpack(pack(hits)), hits)


def test_hits_that_were_cut_off_are_no_hits() -> None:
    packed = pack(np.ones(20, dtype=bool)) | {"queries": 30}
    with pytest.raises(ValueError, match="3 bytes for 30 queries"):
        unpack(packed)
