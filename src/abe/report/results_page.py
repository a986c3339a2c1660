"""docs/results.md: each claim of each experiment with its verdict, of the results alone."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abe.experiments import EXPERIMENTS, Claim, Experiment, Quantity, full, small
from abe.report.tables import papers_difference
from abe.results import (
    data_title,
    flatten,
    has_diverged,
    is_baseline,
    markdown_table,
    schedule,
    summarize,
    told_apart,
    trained_in,
)
from abe.selection import by_images_and_start, counts, has_images_of, of_arms, of_scales
from abe.verdicts import MIN_SEEDS, Judged, judge, pair_of, reservations, rows_of

_PAGE_HEAD = """# Results

Made from `results/runs.jsonl` by `abe results results/runs.jsonl --page docs/results.md`, and from
nothing else. A claim is the paper's, of its own images and setting, but for those of `losses`,
`protocol`, `width`, of the balanced loss in `fig7c` and of M-heads of equal d, which are ours; the
figures are ours, of the setting in the same line: the difference of the two means in points of
Recall@1, with its 95 % interval over classes and seeds in pairs; or "on these classes", by
Student's t over seeds alone, where records hold no more than the mean: of cosines, of what test
images pick, and of learners in early versions. On other classes that might be otherwise. Shown: all
of the interval is above 0, or for what is said to be similar or not above, within 1 point (cosines:
0.02). Refuted: all of it is on the other side. Fewer than 3 seeds leave a claim open. A rate at
which a seed diverged is chosen only where there is no other; early versions left no line of such a
run. Each verdict is by itself: of 40 claims of things that do not differ, one would be shown by
chance, and another refuted. The bootstrap over classes and seeds stands behind; of 3 seeds it is
too narrow where seeds decide, and decides nothing. Runs in pairs have the same seed, and where only
the network or the loss differs the same batches, but not always the same device and precision: the
last column names these, docs/protocol.md tells how far they set runs apart. "The paper's" is the
difference in its own table, in points, on its own images: CUB-200-2011 beside ours of CUB, else the
last that the table has, mostly CARS-196; of which network, if of one with more learners than ours.
Reservations say why a row may do better than its figure: in some of its runs held-out classes
picked the network before its first step, its rate is at an end of those tried, or there is no run
at some that were meant to be tried. A claim that was not run names the command that it needs."""
_CLAIMS_HEAD = (
    "| claim | the paper's | setting | difference | verdict | reservations | runs |\n"
    "|---|--:|---|---|---|---|---|"
)


def results_page(records: Iterable[dict[str, Any]]) -> str:
    """docs/results.md: each claim of each experiment on the images that it was tried on.

    Behind the claims stand the tables of all results.
    """
    records = list(records)
    groups = by_images_and_start(records)
    lines = [_PAGE_HEAD, "", *_left_out(records, groups)]
    all_told = {
        name: [
            told
            for group, images in zip(groups, _images_of(groups), strict=True)
            for told in _judged_claims(experiment, group, images)
        ]
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
    lines = [record for record in records if not is_baseline(record)]
    runs = [record for record in lines if not has_diverged(record)]
    known = [run for run in runs if counts(run)]
    early = [run for run in runs if "hits@1" not in run["scores"]]
    judged = [run for run in of_arms(EXPERIMENTS.values(), groups) if not has_diverged(run)]
    diverged = len(lines) - len(runs)
    notes = {
        "do not say which queries were answered": len(early),
        "are of a checkpoint that their run did not select": len(runs) - len(early) - len(known),
        "have settings that no row has at either scale": len(known) - len(judged),
    }
    return [
        *(
            f"No claim is judged by {number} of the {len(runs)} runs, which {why}: they stand "
            "under All results alone."
            for why, number in notes.items()
            if number
        ),
        *[f"{diverged} more runs diverged, and have no result."] * bool(diverged),
    ]


def _images_of(groups: Iterable[Mapping[str, Sequence[dict[str, Any]]]]) -> list[str]:
    """What to call the images of each group: with settings of theirs where others have others."""
    titles, settings = [], []
    for group in groups:
        record = next(iter(group.values()))[0]
        titles.append(data_title(record["data"]))
        settings.append(flatten(record["config"]["data"]))
    alike = {
        title: [own for other, own in zip(titles, settings, strict=True) if other == title]
        for title in titles
    }
    return [
        told_apart(title, own, alike[title]) for title, own in zip(titles, settings, strict=True)
    ]


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
    first_of_paper = experiment.benchmarks[0]
    benchmarks = {
        small(True).learners: "" if experiment.anywhere else first_of_paper,
        full().learners: first_of_paper,
    }
    commands = {
        learners: f"--scale {scale} --data " + (f"{data} --root FOLDER" if data else "FOLDER")
        for scale, (learners, data) in zip(("small", "full"), benchmarks.items(), strict=True)
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
            theirs = papers_difference(experiment, claim, learners, benchmarks[learners])
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


@dataclass(frozen=True)
class _Told:
    """What runs on some images, at one scale, say of a claim; and the paper's difference."""

    judged: Judged
    theirs: str
    images: str
    """What they are called."""
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
        schedules = ", against ".join(dict.fromkeys(map(schedule, self.runs)))
        protocol = self.runs[0]["protocol"]
        return f"{self.images}, `{self.scale}`, protocol `{protocol}`: {schedules}"

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


def _judged_claims(
    experiment: Experiment, by_key: Mapping[str, Sequence[dict[str, Any]]], images: str
) -> list[_Told]:
    """The claims that a group of `by_images_and_start` says something of, at either scale.

    Args:
        experiment: whose claims.
        by_key: the group.
        images: what to call its images.
    """
    told: list[_Told] = []
    if not has_images_of(experiment, by_key):
        return told
    for name, scale, own in of_scales(experiment, by_key):
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
            told.append(_Told(judged, theirs, images, name, runs, again, doubts))
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
    of_all = sorted({column for cells in by_claim.values() for column in cells})
    columns = dict(zip(of_all, _column_names(), strict=False))
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


def _column_names() -> Iterator[str]:
    """A, B, ... Z, AA, AB, ..."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_uppercase, repeat=length))


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
            runs = [run for run in told.runs if pair_of(run) in half.pairs]
            days = sorted({str(run["date"])[:10] for run in runs})
            where = ", ".join(_devices(runs))
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


def _devices(records: Iterable[dict[str, Any]]) -> list[str]:
    """Where runs were made, and in which precision: ["NVIDIA H200 bf16"]."""
    environments = (each for record in records for each in trained_in(record))
    return list(
        dict.fromkeys(
            f"{each.get('gpu') or each.get('device', 'cpu')} {each['precision']}"
            for each in environments
        )
    )


def _stamps(records: Sequence[dict[str, Any]]) -> str:
    """Which configurations, code, images, devices and precisions figures are from."""
    digests = " ".join(dict.fromkeys(f"`{record['config_digest']}`" for record in records))
    commits = ", ".join(
        dict.fromkeys(str(each["commit"]) for record in records for each in trained_in(record))
    )
    images = ", ".join(dict.fromkeys(str(r["images_digest"]) for r in records))
    return f"{digests}; code {commits}; images {images}; {', '.join(_devices(records))}"
