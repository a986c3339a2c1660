"""How sure a figure is: intervals over classes and seeds, and the verdict on a claim.

Shapes: S seeds, Q queries. Queries of one class are hard or easy together, so that it is classes,
with all their queries, that were drawn from many.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["shown", "not shown", "refuted"]
LEVEL = 0.95
DRAWS = 2000
_BLOCK = 2**22  # numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """A mean, and between what it lies with probability `LEVEL`."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: NDArray[Any], classes: NDArray[np.integer] | None = None, seed: int = 0
) -> Interval:
    """The mean of (S, Q) values, seeds and classes both drawn anew with replacement.

    Methods are compared by the interval of their differences: the same seeds and queries, in pairs.
    The percentiles of `DRAWS` means. Few seeds vary less among themselves than many would: if the
    mean varied with the seed alone, three of them would give an interval that covers it three times
    in four, see `crossed`; one gives that of the classes alone.

    Args:
        values: of each seed's network on each query, such as 1 where its nearest image is right.
        classes: of each query, (Q,); None for one of its own.
        seed: of the draws.
    """
    seeds, _ = values.shape
    sums, sizes = _by_class(values, classes)
    generator = np.random.default_rng(seed)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS) / seeds
    rows = max(1, _BLOCK // len(sizes))
    means = []
    for some in np.split(of_seeds, range(rows, DRAWS, rows)):
        drawn = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), len(some))
        means.append(((some @ sums) * drawn).sum(1) / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def crossed(values: NDArray[np.float64], classes: NDArray[np.integer] | None = None) -> Interval:
    """The mean of (S, Q) values, of seeds and classes that were both drawn, by Student's t.

    The wider of two intervals. One has the variance of the seeds' means plus that of the mean over
    queries, in clusters of a class (Liang and Zeger 1986), with the degrees of freedom of such a
    sum (Satterthwaite 1946); what seeds and queries have in common is counted twice. Where the
    seeds differ most it covers the mean too rarely: the other is that of the seeds' means alone.
    One seed gives the interval of its classes.

    Args:
        values: as in `bootstrap`.
        classes: likewise.
    """
    from scipy.stats import t as student_t  # takes long, and training records hits alone

    mean, of_seeds = float(values.mean()), values.mean(1)
    sums, sizes = _by_class(values.mean(0, keepdims=True) - mean, classes)
    parts = []  # variance of the mean, and its degrees of freedom
    if len(of_seeds) > 1:
        parts.append((of_seeds.var(ddof=1) / len(of_seeds), len(of_seeds) - 1))
    if (groups := len(sizes)) > 1:
        parts.append(((sums**2).sum() * groups / (groups - 1) / sizes.sum() ** 2, groups - 1))
    if not parts:
        return of_means(of_seeds)
    variance, margin = float(sum(part for part, _ in parts)), 0.0
    if variance:
        degrees = variance**2 / sum(part**2 / freedom for part, freedom in parts)
        margin = float(student_t.ppf((1 + LEVEL) / 2, degrees)) * variance**0.5
    if len(of_seeds) > 1:
        margin = max(margin, of_means(of_seeds).high - mean)
    return Interval(mean, mean - margin, mean + margin)


def _by_class(
    values: NDArray[Any], classes: NDArray[np.integer] | None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The sums of (S, Q) values over the queries of each class, (S, C), and their numbers, (C,)."""
    values = values.astype(np.float64)
    if classes is None:
        return values, np.ones(values.shape[1], np.int64)
    _, of_query, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    order = of_query.argsort(kind="stable")
    return np.add.reduceat(values[:, order], sizes.cumsum() - sizes, axis=1), sizes


def of_means(values: NDArray[np.float64]) -> Interval:
    """The mean of one value of each seed, (S,), by Student's t: of one seed nothing follows."""
    from scipy.stats import t as student_t  # takes long, and training records hits alone

    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, -np.inf, np.inf)
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    if not error:
        return Interval(mean, mean, mean)
    low, high = student_t.interval(LEVEL, len(values) - 1, mean, error)
    return Interval(mean, float(low), float(high))


def exceeds(difference: Interval) -> Verdict:
    """Whether what the difference is of is larger than what is subtracted."""
    if difference.low > 0:
        return "shown"
    return "refuted" if difference.high < 0 else "not shown"


def is_within(difference: Interval, margin: float) -> Verdict:
    """Whether the difference is smaller than a margin, in either direction."""
    if -margin < difference.low and difference.high < margin:
        return "shown"
    return "refuted" if difference.low > margin or difference.high < -margin else "not shown"


def does_not_exceed(difference: Interval, margin: float) -> Verdict:
    """Whether the difference is at most a margin."""
    if difference.high < margin:
        return "shown"
    return "refuted" if difference.low > margin else "not shown"


def is_behind(own: Sequence[float], others: Sequence[float], queries: int) -> bool:
    """Whether the mean of shares of hits is clearly below that of others: by two standard errors.

    The error is the wider of two: that of shares p of so many queries, root(2 p (1 - p) / n), and
    that of the seeds' own differences. One seed does not tell how seeds differ, and has to be
    behind by twice as much.

    Args:
        own: of some seeds, (S,).
        others: of the same seeds, (S,).
        queries: how many each share is of.
    """
    differences = np.subtract(others, own)
    share = float(np.mean([*own, *others]))
    error = (2 * share * (1 - share) / (queries * len(differences))) ** 0.5
    if len(differences) == 1:
        error *= 2
    else:
        error = max(error, float(differences.std(ddof=1)) / len(differences) ** 0.5)
    return float(differences.mean()) > 2 * error


def pack(hits: NDArray[np.bool_]) -> dict[str, Any]:
    """(Q,) flags as JSON can say them in a line."""
    return {"queries": len(hits), "bits": base64.b64encode(np.packbits(hits).tobytes()).decode()}


def unpack(packed: dict[str, Any]) -> NDArray[np.bool_]:
    """The flags that `pack` was given, (Q,).

    Raises:
        ValueError: it is not what `pack` gives.
    """
    bits = np.frombuffer(base64.b64decode(packed["bits"], validate=True), np.uint8)
    if len(bits) != -(-packed["queries"] // 8):
        raise ValueError(f"{len(bits)} bytes for {packed['queries']} queries")
    return np.unpackbits(bits, count=packed["queries"]).astype(bool)


def pack_classes(labels: NDArray[np.integer]) -> str:
    """(Q,) classes as JSON can say them in a line: their numbers in the order of their labels."""
    _, of_query = np.unique(labels, return_inverse=True)
    steps = np.diff(of_query.astype("<i4"), prepend=np.int32(0))  # mostly 0: short
    return base64.b64encode(zlib.compress(steps.astype("<i4").tobytes(), 9)).decode()


def unpack_classes(packed: str) -> NDArray[np.int32]:
    """The classes' numbers that `pack_classes` was given, (Q,).

    Raises:
        ValueError: it is not what `pack_classes` gives.
    """
    try:
        steps = zlib.decompress(base64.b64decode(packed, validate=True))
    except zlib.error as error:
        raise ValueError(f"no classes of queries: {error}") from None
    return np.frombuffer(steps, "<i4").cumsum(dtype=np.int32)
