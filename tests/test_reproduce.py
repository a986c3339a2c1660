"""Tables and figures of the paper: what is run, what is not run again, and what follows from it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from abe.cli import seconds_of
from abe.config import Config
from abe.data.benchmarks import find_benchmark
from abe.errors import InputError, TakenError
from abe.experiments import EXPERIMENTS, Arm, Claim, Scale, abe, full, get_experiments, small
from abe.intervals import crossed, pack, pack_classes
from abe.model.summary import count_macs, count_parameters
from abe.paper import table_rows
from abe.recipes import demo
from abe.report.reproduced import draw, draw_results
from abe.report.results_page import _column_names, results_page
from abe.report.tables import markdown, paper_row, papers_difference, values_of
from abe.reproduce import Reproduction, Run, departures
from abe.reproduce import reproduce as run_all
from abe.results import (
    append_record,
    divergence_record,
    is_baseline,
    method_name,
    read_records,
    result_record,
)
from abe.selection import select
from abe.start import build_model
from abe.train import Trainer
from abe.verdicts import judge, rows_of

ABE = str(Path(sys.executable).with_name("abe"))
ROOT = Path(__file__).parents[1]
TINY = [
    f"--set={setting}"
    for setting in (
        "device=cpu",
        "precision=fp32",
        "tracking=none",
        "model.weights=none",
        "data.synthetic_classes=8",
        "data.synthetic_images=4",
        "data.resize=40",
        "data.crop=32",
        "data.val_classes=0.5",
        "train.batch_size=16",  # more than 2 classes of 4: batches are made to fit
        "train.steps=2",
        "train.eval_every=1",
    )
]
SCALES = {"full": full(), "photographs": small(True), "vehicles": small(False)}


def arguments(name: str, *more: str) -> list[str]:
    return [ABE, "reproduce", name, *TINY, "--rate=0.01", "--seeds=2", *more]


def reproduce(folder: Path, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments(name, *more), cwd=folder, capture_output=True, text=True, timeout=300
    )


def trained(done: subprocess.CompletedProcess[str]) -> int:
    return done.stderr.count("on the first batch")


def lines(folder: Path) -> list[str]:
    return (folder / "results/runs.jsonl").read_text().splitlines()


def colours(picture: Path) -> int:
    """How many a picture has: something is drawn in it."""
    with Image.open(picture) as image:
        return len(image.convert("RGB").getcolors(2**24) or [])


@pytest.fixture(scope="module")
def table2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table 2")
    done = reproduce(folder, "table2")
    assert done.returncode == 0, done.stderr
    assert trained(done) == 4
    assert "85.2" in done.stdout  # the paper's
    return folder


# --- What is compared ---


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_arms_are_configurations_and_claims_are_of_arms(name: str, scale: str) -> None:
    experiment, chosen = EXPERIMENTS[name], SCALES[scale]
    arms = experiment.arms(chosen.learners)
    digests = {chosen.base.with_overrides(arm.settings).digest for arm in arms}
    assert len(digests) == len(arms) == len({arm.name for arm in arms})
    for claim in experiment.claims(chosen.learners):
        assert {claim.more, claim.less} <= {arm.name for arm in arms}
    for benchmark in experiment.benchmarks:
        find_benchmark(benchmark)


@pytest.mark.parametrize("name", [n for n, e in EXPERIMENTS.items() if e.table])
def test_every_row_of_ours_in_the_papers_tables_stands_beside_ours(name: str) -> None:
    experiment = EXPERIMENTS[name]
    assert experiment.table is not None
    known = {arm.paper for arm in experiment.arms(8)} - {None}  # M-heads of equal d are ours
    rows = {row["method"] for row in table_rows(experiment.table)}
    assert known <= rows
    if name != "fig4":
        assert {m for m in rows if m.startswith("ABE") or "-head" in m or "-tail" in m} == known


def test_columns_of_cub_and_of_cars() -> None:
    arm = next(a for a in EXPERIMENTS["table4"].arms(8) if a.name == "ABE-8^512")
    for name, recall in (("cub200", 60.6), ("cub200-2010", 60.6), ("cars196", 85.2)):
        title = find_benchmark(name).title
        assert paper_row(EXPERIMENTS["table4"], arm, title)["R@1"] == recall


def test_departures_from_the_papers_setting_are_told_of_the_rows_that_make_them() -> None:
    of_cars = ["data.source=cars196", "data.root=data"]
    paper = full().base.with_overrides(["protocol=paper", *of_cars])
    ours = full().base.with_overrides([*of_cars, "train.lr=1", "seed=3", "precision=fp32"])
    assert departures([("all", paper, ours)]) == ["protocol paper -> val"]
    cut = ours.with_overrides(["train.batch_size=24"])
    told = ["protocol paper -> val", "train.batch_size 64 -> 24 (b; c)"]
    assert departures([("a", paper, ours), ("b", paper, cut), ("c", paper, cut)]) == told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fig4", "protocol paper -> val"),
        ("table8", "protocol paper -> val"),
        ("fig7b", "protocol paper -> val"),
        ("width", "model.attention_width 1.0 -> 0.25 (attention_width 0.25)"),
        ("protocol", "protocol paper -> both"),
        ("losses", "train.sampler pairs -> classes (ABE-8^512, Eq. 10 balanced; ABE-8^512, Eq. 10"),
        ("losses", "train.metric_loss contrastive -> MultiSimilarityLoss (ABE-8^512, multi-"),
        ("fig7c", "train.normalization per_image -> balanced (divergence_weight 0, balanced; "),
    ],
)
def test_what_the_paper_has_not_is_a_departure(name: str, told: str, tmp_path: Path) -> None:
    whole = object.__new__(Reproduction)  # no images are read
    base = full().base.with_overrides(["data.source=cars196", "data.root=data"])
    whole.scale = replace(full(), base=base)
    whole._configs = lambda arm, rates, seed: [base.with_overrides(arm.settings)]  # type: ignore[method-assign]
    found = whole.departures(EXPERIMENTS[name])
    assert any(each.startswith(told) for each in found), found
    if name in ("fig4", "table8", "fig7b"):
        assert found == [told]


def test_fig7_is_three_panels_and_unknown_names_have_a_neighbour() -> None:
    assert list(get_experiments("fig7")) == ["fig7a", "fig7b", "fig7c"]
    assert list(get_experiments("table1")) == ["table1"]
    with pytest.raises(InputError, match="did you mean 'table2'"):
        get_experiments("tabel2")


# --- What follows from it ---


def record(
    arm: Any,
    seed: int,
    hits: Any,
    cosine: float = 0.5,
    rate: float = 0.01,
    scale: Scale | None = None,
    classes: int = 80,
) -> Any:
    scale = scale or small(True)
    config = scale.base.with_overrides(
        [*arm.settings, f"seed={seed}", f"train.lr={rate}", "data.source=birds"]
    ).with_batches_that_fit(classes)
    recall = float(np.mean(hits))
    found = result_record(
        config,
        scores={
            "ensemble": {"recall@1": recall, "recall@2": recall, "map@r": 0.1},
            "learners": [{"recall@1": recall - 0.1}] * config.model.num_learners,
            "similarity": {"self": cosine},
            "hits@1": pack(np.asarray(hits)) | {"classes": pack_classes(np.arange(len(hits)))},
        },
        best=None,
        data={"name": "birds", "skipped": 0, "test_images": len(hits), "test_classes": 2}
        | {"train_classes": classes, "select_classes": 2},
        weights={"source": "start", "sha256": "0123456789abcdef"},
        environment={"commit": "c0ffee", "gpu": None, "precision": "bf16"},
        images_digest="1" * 12,
    )
    return found | {"selected_step": 1, "selection_recall@1": recall}


def better_and_worse(seeds: int) -> dict[str, list[Any]]:
    better, worse = EXPERIMENTS["table2"].arms(4)
    generator = np.random.default_rng(0)
    found: dict[str, list[Any]] = {better.name: [], worse.name: []}
    for seed in range(seeds):
        hits = generator.random(400) < 0.5
        found[better.name].append(record(better, seed, hits | (generator.random(400) < 0.3), 0.2))
        found[worse.name].append(record(worse, seed, hits, 0.9))
    return found


def test_three_seeds_decide_a_claim() -> None:
    arms, (claim, _, alike, *_) = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)
    records = better_and_worse(3)
    rows = rows_of(arms, records)
    shown = judge(claim, rows)
    difference = np.mean([r["scores"]["ensemble"]["recall@1"] for r in records[arms[0].name]])
    difference -= np.mean([r["scores"]["ensemble"]["recall@1"] for r in records[arms[1].name]])
    assert (shown.verdict, shown.seeds) == ("shown", 3)
    assert shown.difference is not None
    assert shown.difference.mean == pytest.approx(difference)
    assert judge(alike, rows).shown == "+0.70 [+0.70, +0.70], 3 seeds on these classes"
    assert judge(Claim(claim.less, claim.more), rows).verdict == "refuted"
    assert judge(replace(claim, relation="similar to"), rows).verdict == "refuted"
    assert judge(replace(claim, relation="not above"), rows).verdict == "refuted"
    assert judge(claim, rows_of(arms, better_and_worse(2))).verdict == "open, 3 seeds decide"
    assert judge(claim, rows_of(arms, {})).verdict == "not run"


def test_three_seeds_that_differ_widely_show_nothing_though_their_bootstrap_would() -> None:
    arms, claim = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)[0]
    records: dict[str, list[Any]] = {arm.name: [] for arm in arms}
    for seed, gained in enumerate((10, 40, 120)):
        for arm, hits in zip(arms, (100 + gained, 100), strict=True):
            records[arm.name].append(record(arm, seed, np.arange(400) < hits))
    judged = judge(claim, rows_of(arms, records))
    assert judged.bootstrapped is not None
    assert judged.difference is not None
    assert judged.bootstrapped.low > 0 > judged.difference.low
    assert judged.verdict == "not shown"
    assert judged.shown.startswith("+14.2 [-")
    assert "3 seeds (bootstrap [+" in judged.shown


def test_a_gain_in_a_few_classes_alone_is_not_shown() -> None:
    """3 of 20 classes gain on all of their queries: on other classes there might be nothing."""
    arms, claim = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)[0]
    classes = np.repeat(np.arange(20), 20)
    before = np.arange(400) % 2 == 0
    records = {
        arm.name: [record(arm, seed, before | gained) for seed in range(3)]
        for arm, gained in zip(arms, (classes < 3, classes < 0), strict=True)
    }
    assert judge(claim, rows_of(arms, records)).verdict == "shown"
    for run in (run for runs in records.values() for run in runs):
        run["scores"]["hits@1"]["classes"] = pack_classes(classes)
    rows = rows_of(arms, records)
    judged = judge(claim, rows)
    assert judged.verdict == "not shown"
    assert judged.bootstrapped is not None
    del records[arms[0].name][0]["scores"]["hits@1"]["classes"]  # the others have the same
    assert judge(claim, rows_of(arms, records)) == judged
    for run in (run for runs in records.values() for run in runs):
        run["scores"]["hits@1"].pop("classes", None)
    assert judge(claim, rows_of(arms, records)).verdict == "open, its records have no classes"
    whole, alone = rows[0].interval(), crossed(before[None] + 0.0, classes)
    assert whole is not None
    assert whole.high - whole.low > 5 * (alone.high - alone.low)


def test_learners_are_compared_on_other_classes_where_their_hits_are_known() -> None:
    """A gain of the learners in 3 of 20 classes alone, which ensembles of other classes lack."""
    arms = EXPERIMENTS["table2"].arms(4)
    claim = Claim(arms[0].name, arms[1].name, quantity="learners' recall@1")
    classes = np.repeat(np.arange(20), 20)
    before = np.arange(400) % 2 == 0
    records = {arm.name: [record(arm, seed, before) for seed in range(3)] for arm in arms}
    for arm, gained in zip(arms, (classes < 3, classes < 0), strict=True):
        for run in records[arm.name]:
            run["scores"]["hits@1"]["classes"] = pack_classes(classes)
            hits = [before, before | gained, before, before | gained]
            run["scores"]["learners"] = [
                {"recall@1": float(own.mean()), "hits@1": pack(own)} for own in hits
            ]
    judged = judge(claim, rows_of(arms, records))
    assert judged.difference is not None
    gain = np.stack(3 * [((before | (classes < 3)).mean() - before.mean()) / 2 + 0 * before])
    assert judged.difference.mean == pytest.approx(gain.mean())
    difference = np.stack(3 * [(classes < 3) & ~before]) / 2
    assert judged.difference == crossed(difference, classes)
    assert (judged.verdict, judged.shown.count("classes")) == ("not shown", 0)
    for run in records[arms[0].name]:
        for learner in run["scores"]["learners"]:
            del learner["hits@1"]  # an early version's
    judged = judge(claim, rows_of(arms, records))
    assert judged.verdict == "shown"
    assert judged.shown.endswith("3 seeds on these classes")


def test_one_learner_is_compared_by_its_ensemble_s_hits() -> None:
    several, single = (record(abe(m), 0, [True, False] * 9) for m in (2, 1))
    hits = np.arange(18) < 3
    several["scores"]["learners"] = [{"recall@1": 0.0, "hits@1": pack(hits)}] * 2
    arms = abe(2), abe(1)
    claim = Claim(arms[0].name, arms[1].name, quantity="learners' recall@1")
    by_arm = {arms[0].name: [several], arms[1].name: [single]}
    judged = judge(claim, rows_of(arms, by_arm))
    assert judged.bootstrapped is not None
    assert judged.difference == crossed(
        (hits - np.array([True, False] * 9, float))[None], np.arange(18)
    )


def test_runs_of_the_name_that_early_versions_gave_them_are_seeds_of_the_same_row() -> None:
    arm = next(a for a in EXPERIMENTS["table3"].arms(4) if a.name == "4-heads^512 with L_div")
    runs = [record(arm, seed, [True, False]) for seed in range(3)]
    assert {run["method"] for run in runs} == {"4-heads^512 with divergence"}
    for early in range(3):
        named = [run | {"method": "4-heads^512"} if run["seed"] == early else run for run in runs]
        (row,) = rows_of([arm], {arm.name: named})
        assert row.found is not None
        assert row.found.seeds == 3


def diverged(arm: Arm, seed: int, rate: float) -> dict[str, Any]:
    found = record(arm, seed, [True] * 9, rate=rate)
    told = ("data", "weights", "environment", "images_digest")
    known = {key: found[key] for key in told}
    return divergence_record(Config.from_json(found["config"]), step=7, **known)


def test_a_rate_at_which_a_seed_diverged_is_chosen_by_no_table_and_no_page() -> None:
    arms, claim = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)[0]
    good, fair, poor = ([True] * n + [False] * (9 - n) for n in (9, 5, 1))
    better, worse = arms
    lines = [record(worse, seed, fair, rate=0.003) for seed in range(3)]
    lines += [record(better, seed, poor, rate=0.003) for seed in range(3)]
    lucky = [record(better, seed, good, rate=0.01) for seed in range(2)]

    def short(records: list[dict[str, Any]]) -> str:
        page = results_page(records)
        return next(line for line in page.splitlines() if line.startswith(f"| {claim} |"))

    assert "open +44.4" in short(lines + lucky)
    wild = [*lines, *lucky, diverged(better, 2, 0.01)]
    assert "refuted -44.4" in short(wild)
    assert "1 more runs diverged, and have no result." in results_page(wild)
    assert "No claim is judged" not in results_page(wild)
    rows = rows_of(arms, {a.name: [r for r in wild if is_of(r, a)] for a in arms})
    assert judge(claim, rows).mean == "-44.4"
    assert "its rate is the lowest of 0.003, 0.01" in rows[0].reservations()
    alone = [*lines[:3], *lucky, diverged(better, 2, 0.01)]  # and no other rate
    assert "open +44.4" in short(alone)
    assert "not run here" in short([*lines[:3], diverged(better, 2, 0.01)])


def is_of(run: dict[str, Any], arm: Arm) -> bool:
    weight = run["config"]["train"]["divergence_weight"]
    return (weight == 0) == ("without" in arm.name)


def test_seeds_with_their_queries_in_another_order_are_not_mixed_with_the_others() -> None:
    arms, claim = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)[0]
    records = better_and_worse(4)
    three = judge(claim, rows_of(arms, {name: runs[1:] for name, runs in records.items()}))
    for runs in records.values():
        runs[0]["scores"]["hits@1"]["order"] = "another"
    rows = rows_of(arms, records)
    judged = judge(claim, rows)
    assert (judged, judged.seeds) == (three, 3)
    found, interval = rows[0].found, rows[0].interval()
    assert found is not None
    assert interval is not None
    assert (found.seeds, found.scores["recall@1"]) == (3, pytest.approx(interval.mean))


def test_what_test_images_pick_is_compared_within_a_run() -> None:
    arms, (claim, _) = EXPERIMENTS["protocol"].arms(4), EXPERIMENTS["protocol"].claims(4)
    runs = [record(arms[0], seed, [True, False]) for seed in range(4)]
    for run, picked in zip(runs, (0.5, 0.51, 0.52), strict=False):  # one was made without it
        run["scores"]["test_picked"] = {"step": 1, "recall@1": picked}
    judged = judge(claim, rows_of(arms, {arms[0].name: runs}))
    assert (judged.verdict, judged.seeds) == ("not shown", 3)
    assert judged.difference is not None
    assert judged.difference.mean == pytest.approx(0.01)
    (row, _) = rows_of(arms, {arms[0].name: runs})
    values = values_of(EXPERIMENTS["protocol"], row, "birds", small(True).base)
    assert values["recall@1 picked by test images"] == pytest.approx(0.51)
    assert "| R@1 picked by test images |" in markdown([values])
    assert "| 51.0 |" in markdown([values])
    assert str(judged).startswith(
        "recall@1 picked by test images of ABE-4^512 is similar to recall@1 of ABE-4^512: +1.0 ["
    )


def test_only_the_same_queries_of_the_same_seeds_are_pairs() -> None:
    arms, (claim, *_) = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)
    records = better_and_worse(3)
    paired = judge(claim, rows_of(arms, records)).difference
    swapped = {name: list(reversed(runs)) for name, runs in records.items()}
    assert judge(claim, rows_of(arms, swapped)).difference == paired
    strangers = {arms[0].name: records[arms[0].name], arms[1].name: []}
    for run, other in zip(records[arms[1].name], (1, 2, 0), strict=True):
        strangers[arms[1].name].append(run | {"seed": other})
    apart = judge(claim, rows_of(arms, strangers)).difference
    assert paired is not None
    assert apart is not None
    assert apart.high - apart.low > 1.2 * (paired.high - paired.low)
    records[arms[1].name][0]["scores"]["hits@1"]["order"] = "another"
    assert judge(claim, rows_of(arms, records)).seeds == 2


def test_a_better_rate_that_not_all_seeds_have_tried_leaves_a_claim_open() -> None:
    arms, claim = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)[0]
    records = better_and_worse(3)
    hits = [True, False] * 200
    other = record(arms[0], 0, hits, rate=0.003)
    assert judge(claim, rows_of(arms, records)).verdict == "shown"
    for recall, seeds in ((0.1, 3), (0.9, 1)):
        runs = [*records[arms[0].name], other | {"selection_recall@1": recall}]
        judged = judge(claim, rows_of(arms, records | {arms[0].name: runs}))
        assert judged.seeds == seeds
        assert judged.verdict == ("shown" if seeds == 3 else "open, 3 seeds decide")


def test_rates_are_chosen_by_held_out_classes_and_lines_without_hits_do_not_count() -> None:
    arm = EXPERIMENTS["table2"].arms(4)[0]
    low = record(arm, 0, [True, False, False, False], rate=0.003) | {"selection_recall@1": 0.9}
    high = record(arm, 0, [True, True, True, False], rate=0.01) | {"selection_recall@1": 0.1}
    old = record(arm, 1, [True] * 4, rate=0.003)
    del old["scores"]["hits@1"]
    other_step = record(arm, 2, [True] * 4, rate=0.003) | {"method": "ABE-4^512 at step 40"}
    (row,) = rows_of([arm], {arm.name: [low, high, old, other_step]})
    assert row.found is not None
    values = values_of(EXPERIMENTS["table2"], row, "birds", small(True).base)
    assert (values["recall@1"], values["rate"], values["seeds"]) == (0.25, 0.003, 1)
    assert values["rates tried"] == 2
    assert (values["parameters"], values["paper R@1"]) == (10_513_280, 85.2)
    interval = crossed(np.array([[1.0, 0, 0, 0]]))  # of the one seed that has the rate
    told = f"| 25.0 [{100 * interval.low:.1f}, {100 * interval.high:.1f}] | 85.2 |"
    assert told in markdown([values])


def test_the_page_says_of_each_claim_what_it_is_from() -> None:
    found = better_and_worse(3)
    page = results_page([r for runs in found.values() for r in runs])
    arms, claim_of_page = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)[0]
    claim = str(claim_of_page)
    short, line = [line for line in page.splitlines() if line.startswith(f"| {claim} |")]
    assert short == f"| {claim} | shown {judge(claim_of_page, rows_of(arms, found)).mean} |"
    setting = (
        "birds, `small`, protocol `val`: 120 steps from start 0123456789ab, of 64 images at 96 px"
    )
    assert f"- A: {setting}; images {'1' * 12}\n\n| claim | A |\n" in page
    assert "**shown**" in line
    assert line.startswith(f"| {claim} | +15.5 (ABE-8^512) | birds")
    assert "A picture, no figures: `abe reproduce fig6 --scale small --data FOLDER`." in page
    for stamp in (
        "birds, `small`, protocol `val`: 120 steps from start 0123456789ab, of 64 images at 96 px",
        "c0ffee",
        "cpu bf16",
        "0123456789ab",
        "1" * 12,
    ):
        assert stamp in line
    for runs in found.values():
        assert all(f"`{r['config_digest']}`" in line for r in runs)
    assert "not run here: `abe reproduce table6 --scale small --data sop --root FOLDER`" in page
    judged = [line for line in page.partition("## All results")[0].splitlines() if "**" in line]
    assert len(judged) == 5  # those of table 2, of which table 1 has one
    (again,) = [line for line in page.splitlines() if line.endswith("| as under table1 | | |")]
    assert again.startswith(f"| {EXPERIMENTS['table2'].claims(4)[3]} | +10.2 (ABE-8^512) |")
    (again,) = [line for line in page.splitlines() if line.endswith("| as under table2 | | |")]
    assert again.startswith(f"| {EXPERIMENTS['table2'].claims(4)[2]} |")
    (larger,) = [
        x
        for x in page.splitlines()
        if x.startswith("| recall@1 of ABE-8^512 is above that of ABE-8^512 without")
    ]
    assert (
        "not run here: `abe reproduce table2 --scale full --data cars196 --root FOLDER`" in larger
    )


def test_an_ensemble_is_set_beside_its_own_learners() -> None:
    arms, (*_, gains, _) = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)
    judged = judge(gains, rows_of(arms, better_and_worse(3)))
    shown = "+10.0 [+10.0, +10.0], 3 seeds on these classes"
    assert (judged.shown, judged.verdict) == (shown, "shown")
    assert str(gains) == "recall@1 of ABE-4^512 is above learners' recall@1 of ABE-4^512"
    beside = papers_difference(EXPERIMENTS["table2"], gains, 4, "cars")
    assert beside == "+10.2 (ABE-8^512)"  # 85.2 - 75.0
    (of_four,) = [c for c in EXPERIMENTS["table1"].claims(4) if str(c) == str(gains)]
    assert papers_difference(EXPERIMENTS["table1"], of_four, 4, "cars") == "+8.1"  # 79.3 - 71.2


def test_the_page_compares_no_runs_of_different_starts() -> None:
    better, worse = better_and_worse(3).values()
    other = {"source": "start", "sha256": "f" * 16}
    page = results_page([*better, *(run | {"weights": other} for run in worse)])
    (line,) = [x for x in page.splitlines() if f"| {EXPERIMENTS['table2'].claims(4)[0]} |" in x]
    assert "not run here" in line


def test_each_start_and_images_have_a_column_and_stamps_are_told() -> None:
    better, worse = better_and_worse(3).values()
    other = {"source": "start", "sha256": "f" * 16}
    stamped = {"data": better[0]["data"] | {"stamps": ["partial, 1 of 2"]}}
    columns = [
        {},
        {"weights": other},
        {"images_digest": "2" * 12},
        stamped,
    ]
    page = results_page([run | column for column in columns for run in (*better, *worse)])
    assert "| claim | A | B | C | D |" in page
    assert "- A: birds (partial, 1 of 2), `small`" in page
    assert page.count("- shown") == 0
    (line,) = [
        text
        for text in page.partition("## table1")[0].splitlines()
        if f"| {EXPERIMENTS['table2'].claims(4)[0]} |" in text
    ]
    assert line.count("shown +") == 4


def test_tables_of_a_benchmark_are_of_no_other_images() -> None:
    arms = {arm.name: arm for arm in EXPERIMENTS["table6"].arms(4)}
    claim, _ = EXPERIMENTS["table6"].claims(4)
    runs = [
        record(arms[name], seed, [True, name == claim.more] * 8)
        for name in (claim.more, claim.less)
        for seed in range(3)
    ]
    of_products = [
        run | {"data": run["data"] | {"name": find_benchmark("sop").title}} for run in runs
    ]
    for records, told in ((runs, "not run here"), (of_products, "| as under table1 |")):
        section = results_page(records).partition("## table6")[2].partition("## table7")[0]
        (line,) = [line for line in section.splitlines() if line.startswith(f"| {claim} | +0.5 |")]
        assert told in line


def test_a_benchmark_stands_beside_the_papers_figures_of_it_wherever_a_claim_is_told() -> None:
    arms = {arm.name: arm for arm in EXPERIMENTS["table4"].arms(8)}
    claim = EXPERIMENTS["table4"].claims(8)[0]
    title = find_benchmark("cub200").title
    runs = [
        record(arms[name], seed, [True, name == claim.more] * 8, scale=full())
        for name in (claim.more, claim.less)
        for seed in range(3)
    ]
    cars = find_benchmark("cars196").title
    page = results_page(
        [run | {"data": run["data"] | {"name": name}} for name in (title, cars) for run in runs]
    )
    for name, told in (
        ("table1", {f"+5.7 | {title}", f"+5.7 | {cars}"}),
        ("table4", {"+2.2 | | | as under table1", "+5.7 | | | as under table1"}),
    ):
        section = page.partition(f"## {name}:")[2].partition("\n## ")[0]
        lines = [x for x in section.splitlines() if x.startswith(f"| {claim} |")]
        assert len(lines) == len(told)
        for beginning in told:
            assert any(line.startswith(f"| {claim} | {beginning}") for line in lines)


def test_a_page_has_runs_of_both_scales() -> None:
    records = [
        record(arm, seed, [True, False] * 8, scale=scale)
        for scale in (full(), small(True))
        for arm in EXPERIMENTS["fig5"].arms(scale.learners)
        for seed in range(3)
    ]
    page = results_page(records)
    section = page.partition("## fig5:")[2].partition("\n## ")[0]
    for network in ("ABE-8^512", "ABE-4^512"):
        (line,) = [x for x in section.splitlines() if f"above that of {network} |" in x]
        assert line.endswith("| as under table2 | | |")
    assert page.count("`full`, protocol `val`: 10000 steps") > 1


def test_a_page_has_runs_whose_batches_were_made_to_fit() -> None:
    """Few classes make smaller batches: the runs are those of their rows all the same."""
    better, worse = EXPERIMENTS["table2"].arms(4)
    records = [
        record(arm, seed, hits, classes=6)
        for seed in range(3)
        for arm, hits in ((better, [True] * 9), (worse, [False] * 9))
    ]
    assert records[0]["config"]["train"]["batch_size"] == 24
    page = results_page(records)
    assert f"| {EXPERIMENTS['table2'].claims(4)[0]} | shown +100.0 |" in page
    assert "which have settings that no row has" not in page


def test_a_claim_is_not_run_at_the_scale_that_others_of_its_kind_are_run_at() -> None:
    of_single = [arm for arm in EXPERIMENTS["losses"].arms(4) if arm.name.startswith("1-head")]
    (printed,) = [
        a for a in EXPERIMENTS["losses"].arms(4) if a.name == "ABE-4^512, Eq. 10 as printed"
    ]
    runs = [record(arm, seed, [True, False]) for arm in (*of_single, printed) for seed in range(3)]
    section = results_page(runs).partition("## losses:")[2].partition("\n## ")[0]
    assert "ABE-8" not in section
    (line,) = [
        x for x in section.splitlines() if "of ABE-4^512, proxy-anchor is above that of 1" in x
    ]
    assert "not run here: `abe reproduce losses --scale small --data FOLDER`" in line


def test_a_page_says_how_many_runs_it_judges_nothing_by() -> None:
    (arm, _) = EXPERIMENTS["table2"].arms(4)
    longer = replace(arm, settings=(*arm.settings, "train.steps=500"))
    early = record(arm, 1, [True])
    del early["scores"]["hits@1"]
    page = results_page([record(arm, 0, [True]), record(longer, 0, [True]), early])
    assert "by 1 of the 3 runs, which have settings that no row has at either scale" in page
    assert "by 1 of the 3 runs, which do not say which queries were answered" in page
    unpicked = record(arm, 1, [True]) | {"method": "ABE-4^512 at step 40"}
    told = "by 1 of the 1 runs, which are of a checkpoint that their run did not select"
    assert told in results_page([unpicked])
    assert "No claim" not in results_page([record(arm, 0, [True])])


def test_later_seeds_stand_by_themselves_too() -> None:
    better, worse = better_and_worse(6).values()
    for run in better + worse:
        run["date"] = f"2026-01-0{1 + run['seed'] // 3}T12:00:00+00:00"
    for run in better[3:]:
        run["environment"] = run["environment"] | {"gpu": "H200"}
    claim, arms = EXPERIMENTS["table2"].claims(4)[0], EXPERIMENTS["table2"].arms(4)
    halves = [
        judge(claim, rows_of(arms, {a.name: runs for a, runs in zip(arms, part, strict=True)}))
        for part in ((better[:3], worse[:3]), (better[3:], worse[3:]))
    ]
    repeated = results_page(better + worse).partition("## Repeated")[2].partition("\n## ")[0]
    (line,) = [x for x in repeated.splitlines() if x.startswith(f"| {claim} |")]
    first, others = (f"{half.shown} **{half.verdict}**; 2026-01-0" for half in halves)
    assert f"| {first}1, cpu bf16 | {others}2, H200 bf16, cpu bf16 | " in line
    difference, again = halves[0].difference, halves[1].difference
    assert difference is not None
    assert again is not None
    within = difference.low <= again.mean <= difference.high
    assert line.endswith(f"| {'yes' if within else 'no'} |")
    assert "## Repeated" not in results_page(better[:5] + worse[:5])


def test_networks_that_saw_other_batches_are_said_to_have() -> None:
    arms = {arm.name: arm for arm in EXPERIMENTS["table8"].arms(4)}
    (claim,) = [c for c in EXPERIMENTS["table8"].claims(4) if str(c).endswith("4-tails^512")]
    runs = [record(arms[n], s, [True] * 9) for n in (claim.less, claim.more) for s in range(3)]
    page = results_page(runs)
    start = "120 steps from start 0123456789ab, of"
    told = f"{start} 64 images at 96 px, against {start} 32 images at 96 px"
    assert f": birds, `small`, protocol `val`: {told}; images" in page.partition("| claim |")[0]
    (_, line) = [x for x in page.splitlines() if x.startswith(f"| {claim} |")]
    assert f"| birds, `small`, protocol `val`: {told} |" in line


def test_images_of_one_name_that_were_cut_otherwise_have_columns_and_lines_of_their_own() -> None:
    better, worse = better_and_worse(3).values()
    claim = EXPERIMENTS["table2"].claims(4)[0]

    def cut(run: dict[str, Any], size: int) -> dict[str, Any]:
        config = run["config"] | {"data": run["config"]["data"] | {"resize": size}}
        return run | {"config": config, "config_digest": f"{run['config_digest']} {size}"}

    swapped = [
        cut(run, 160) | {"scores": other["scores"]}
        for run, other in zip(better + worse, worse + better, strict=True)
    ]
    page = results_page([*better, *worse, *swapped])
    short, *told = [line for line in page.splitlines() if line.startswith(f"| {claim} |")]
    assert page.count("| claim | A | B |\n") == 1
    assert "- A: birds (resize 128), `small`" in page
    assert "- B: birds (resize 160), `small`" in page
    assert re.fullmatch(r".*\| shown \+\S+ \| refuted -\S+ \|", short)
    assert [line.count("resize 128") for line in told] == [1, 0]


def test_there_is_a_name_for_any_number_of_columns() -> None:
    names = list(itertools.islice(_column_names(), 60))
    assert (names[0], names[25], names[26], names[59]) == ("A", "Z", "AA", "BH")


def test_a_page_of_nothing_judged_has_no_columns() -> None:
    assert "In short" not in results_page([])


def test_some_experiments_and_a_start_are_selected() -> None:
    better, worse = better_and_worse(1).values()
    heads = [record(EXPERIMENTS["table3"].arms(4)[0], 0, [True, False])]
    other = {"source": "some/my start.pth", "sha256": "f" * 16}
    elsewhere = [better[0] | {"weights": other}]

    def baseline(name: str, weights: Any, *overrides: str) -> dict[str, Any]:
        config = small(True).base.with_overrides(["data.source=birds", *overrides])
        own = {"config": config.portable(), "protocol": config.protocol, "weights": weights}
        return better[0] | own | {"selected_step": None, "method": name}

    pixels, smaller, scored_all_along, start, other_start = (
        baseline("raw pixels", None),
        baseline("raw pixels", None, "data.crop=64"),
        baseline("raw pixels", None, "protocol=both"),
        baseline("pretrained start", better[0]["weights"]),
        baseline("pretrained start", other),
    )
    baselines = [pixels, smaller, scored_all_along, start, other_start]
    everything = [*baselines, *heads, *worse, *better, *elsewhere]
    assert select(everything, ["table2"], "start") == [pixels, start, *better, *worse]
    assert select(everything, start="my start.pth") == [pixels, other_start, *elsewhere]
    assert select(everything, start=f"my start.pth {'f' * 12}") == select(
        everything, start="my start.pth"
    )
    with pytest.raises(InputError, match=r"began with 'my': .* from my start\.pth, start"):
        select(everything, start="my")
    with pytest.raises(InputError, match="no run is of table3 at either scale"):
        select(everything, ["table3"], "my start.pth")
    with pytest.raises(InputError, match="did you mean 'table2'"):
        select(everything, ["tabel2"])


def test_docs_results_is_made_of_the_results() -> None:
    page = results_page(read_records(ROOT / "results/runs.jsonl"))
    told = "abe results results/runs.jsonl --page docs/results.md"
    assert (ROOT / "docs/results.md").read_text() == page, f"stale: {told}"


def test_docs_protocol_tells_how_far_runs_on_two_devices_are_apart() -> None:
    recalls: dict[str, dict[str, tuple[str, float, float, str]]] = {}
    for record in read_records(ROOT / "results/runs.jsonl"):
        if "hits@1" in record["scores"] and not is_baseline(record):
            settings = json.dumps(
                [record["images_digest"], record["config"] | {"protocol": None}], sort_keys=True
            )
            found = record["environment"]
            recall = 100 * record["scores"]["ensemble"]["recall@1"]
            selection = 100 * record["selection_recall@1"]
            kind = f"{record['method']} at {record['config']['train']['lr']:g}"
            of_device = recalls.setdefault(settings, {})
            of_device.setdefault(
                found["gpu"] or "cpu", (found["precision"], recall, selection, kind)
            )
    both = [(run["cpu"], run["NVIDIA H200"]) for run in recalls.values() if len(run) == 2]
    assert {here[0] for here, _ in both} == {"bf16"}
    kinds = " and ".join(sorted({here[3] for here, _ in both}))
    on_gpu = [there[0] for _, there in both]
    apart, selected = ([there[n] - here[n] for here, there in both] for n in (1, 2))
    told = (
        f"of the {len(both)} runs ({kinds}) that were made on a CPU in bfloat16 and again on an "
        f"H200, {on_gpu.count('bf16')} of them in bfloat16, Recall@1 is apart by "
        f"{np.mean(np.abs(apart)):.1f} points in the mean and {max(map(abs, apart)):.1f} at most; "
        f"those on the H200 are {np.mean(apart):.1f} higher in the mean. On the fewer images of "
        "held-out classes, which choose checkpoints and rates, it is "
        f"{np.mean(np.abs(selected)):.1f} and {max(map(abs, selected)):.1f}"
    )
    assert told in " ".join((ROOT / "docs/protocol.md").read_text().split())


# --- What is run ---


@pytest.mark.slow
def test_a_table_is_written_and_not_run_again(table2: Path) -> None:
    stem = table2 / "reproduced/table2-synthetic-vehicles-small"
    table = stem.with_suffix(".md").read_text()
    assert "open, 3 seeds decide" in table
    assert "train.steps 10000 -> 2" in table
    rows = list(csv.DictReader(stem.with_suffix(".csv").read_text().splitlines()))
    assert [row["method"] for row in rows][-2:] == ["ABE-4^512", "ABE-4^512 without L_div"]
    records = [json.loads(line) for line in lines(table2)]
    own = [r for r in records if r["config_digest"] in rows[-1]["runs"].split()]
    mean = np.mean([r["scores"]["ensemble"]["recall@1"] for r in own])
    assert (len(own), float(rows[-1]["recall@1"])) == (2, pytest.approx(mean))
    assert colours(stem.with_suffix(".png")) > 50

    before = lines(table2)
    again = reproduce(table2, "table2")
    assert (trained(again), lines(table2)) == (0, before)
    assert stem.with_suffix(".md").read_text() == table


def test_several_are_run_one_after_the_other_and_share_the_budget(
    planned: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run takes 10 s: of 25 s two are begun by the first, and by the second none."""
    clock = [0.0]
    monkeypatch.setattr("abe.reproduce.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(Reproduction, "speed", lambda _: planned.plan(fig6)[0].gflop / 10)
    begun: list[str] = []

    def fit(config: Config) -> dict[str, Any]:
        clock[0] += 10
        begun.append(config.digest)
        run = next(run for run in runs if run.config.digest == config.digest)
        return of_run(run, planned, 0.5)

    trainer = MagicMock(side_effect=lambda config, *_, **__: MagicMock(fit=lambda _: fit(config)))
    monkeypatch.setattr(Trainer, "begin", trainer)
    monkeypatch.setattr(planned, "score_baselines", lambda: None)
    fig6, fig7c = EXPERIMENTS["fig6"], EXPERIMENTS["fig7c"]
    runs = planned.plan(fig6) + planned.plan(fig7c)
    planned.console = Console(file=io.StringIO(), record=True, width=120)
    shown: list[str] = []
    experiments = {"fig6": fig6, "fig7c": fig7c}
    going = run_all(
        planned, experiments, budget=25, go_on="", show=lambda files: shown.append(files[0].name)
    )
    assert going
    assert begun == [run.config.digest for run in runs[:2]]
    assert [name.partition("-")[0] for name in shown] == ["fig6", "fig7c"]
    told = planned.console.export_text()
    assert told.count("5 s of the budget are left") == 2


@pytest.mark.slow
def test_a_line_that_was_removed_is_run_alone(table2: Path, tmp_path: Path) -> None:
    table2 = Path(shutil.copytree(table2, tmp_path / "table2"))  # other tests use it, too
    before = lines(table2)
    gone = json.loads(before[-2])
    (table2 / "results/runs.jsonl").write_text("\n".join([*before[:-2], before[-1]]) + "\n")
    listed = reproduce(table2, "table2", "--dry-run")
    assert "1 runs" in listed.stdout
    reproduce(table2, "table2", "--dry-run", "--results=new/runs.jsonl")
    assert not (table2 / "new").exists()
    done = reproduce(table2, "table2")
    assert done.returncode == 0, done.stderr
    assert len(lines(table2)) == len(before)
    new = json.loads(lines(table2)[-1])
    assert new["config_digest"] == gone["config_digest"]
    assert new["scores"] == gone["scores"]
    assert trained(done) == 0  # its network is there, and was scored again
    (table2 / "results/runs.jsonl").write_text("\n".join(lines(table2)[:-1]) + "\n")
    (folder,) = table2.glob(f"reproduced/runs/{gone['config_digest']}-*")
    shutil.rmtree(folder)
    done = reproduce(table2, "table2")
    assert (done.returncode, trained(done)) == (0, 1), done.stderr
    assert json.loads(lines(table2)[-1])["scores"] == gone["scores"]


def test_a_row_that_is_named_takes_the_rates_given(tmp_path: Path) -> None:
    row = "1-head^512, proxy-anchor"
    done = reproduce(tmp_path, "losses", "--dry-run", f"--row={row}", "--rate=0.02")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(row) == 4  # two rates, two seeds
    assert done.stdout.count("0.02") == done.stdout.count("0.01") == 2


def test_rates_of_rows_by_name() -> None:
    scale, losses, lambdas = small(True), EXPERIMENTS["losses"], EXPERIMENTS["fig7c"]
    first, second, *_ = losses.arms(4)
    changed = losses.at_rates((0.5,), [first.name, "divergence_weight 1"])
    assert [changed.rates(arm, scale) for arm in changed.arms(4)[:2]] == [(0.5,), second.rates]
    same = lambdas.at_rates((0.5,), ["divergence_weight 1"])  # all its rows have one rate
    assert same.arms(4) == lambdas.arms(4)


@pytest.fixture
def planned(tmp_path: Path) -> Reproduction:
    """Of two rates and three seeds, the first of which is 5; nothing is run yet."""
    small_images = ["data.synthetic_classes=8", "data.synthetic_images=8", "data.val_classes=0.5"]
    base = demo().with_overrides(["seed=5", "model.weights=none", *small_images])
    scale = Scale(base, learners=2, rates=(0.01, 0.3))
    return Reproduction(scale, "small", tmp_path / "runs.jsonl", tmp_path, Console(quiet=True))


def test_every_seed_tries_every_rate_and_whole_tables_come_first(planned: Reproduction) -> None:
    runs = planned.plan(EXPERIMENTS["table2"])
    tried = [(run.config.seed, run.config.train.lr) for run in runs]
    assert tried == [(seed, rate) for seed in (5, 6, 7) for _ in range(2) for rate in (0.01, 0.3)]
    assert [run.arm for run in runs[:4:2]] == list(EXPERIMENTS["table2"].arms(2))


def of_run(run: Run, reproduction: Reproduction, recall: float) -> dict[str, Any]:
    """A line of a run, with its Recall@1 on held-out classes."""
    plain = record(run.arm, run.config.seed, [True, False])
    config = {"config": run.config.portable(), "config_digest": run.config.digest}
    found = {"images_digest": reproduction.splits.digest, "method": method_name(run.config)}
    return plain | config | found | {"selection_recall@1": recall}


def left_of(planned: Reproduction, arm: str) -> list[tuple[float, int]]:
    """Rates and seeds of an arm of table 2 that are to be run."""
    missing = planned.missing(planned.plan(EXPERIMENTS["table2"]))
    return [(run.config.train.lr, run.config.seed) for run in missing if run.arm.name == arm]


def has_found(
    planned: Reproduction, arm: str, recalls: dict[tuple[float, int], float | None]
) -> None:
    """Lines of runs of table 2, by rate and seed; None for one that diverged."""
    for run in planned.plan(EXPERIMENTS["table2"]):
        key = run.config.train.lr, run.config.seed
        if run.arm.name == arm and key in recalls:
            if (recall := recalls[key]) is None:
                found = of_run(run, planned, 0.5) | {"diverged": 7, "scores": {}}
                ended = found | {"selected_step": None, "selection_recall@1": None}
                append_record(planned.results, ended)
            else:
                append_record(planned.results, of_run(run, planned, recall))


def test_a_rate_that_is_clearly_behind_is_given_up_by_the_seeds_to_come(
    planned: Reproduction,
) -> None:
    first, second = (arm.name for arm in EXPERIMENTS["table2"].arms(2))
    error = (2 * 0.5 * 0.5 / len(planned.splits.select)) ** 0.5  # of a difference around 1/2
    behind, ahead = 0.5 - 1.1 * error, 0.5 + 1.1 * error  # by more than two errors
    has_found(planned, first, {(0.01, 5): behind, (0.3, 5): ahead})
    has_found(planned, second, {(0.01, 5): 0.0, (0.3, 5): 1.0})  # by more than four
    assert left_of(planned, first) == [(0.01, 6), (0.3, 6), (0.01, 7), (0.3, 7)]
    assert left_of(planned, second) == [(0.3, 6), (0.3, 7)]
    has_found(planned, first, {(0.01, 6): behind, (0.3, 6): ahead})
    assert left_of(planned, first) == [(0.3, 7)]
    has_found(planned, second, {(0.01, 6): 1.0, (0.3, 6): 0.1})  # another process had begun it
    assert left_of(planned, second) == [(0.01, 7), (0.3, 7)]
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert "3 of 12 runs are missing." in table.read_text()
    assert "1 of 12 runs are not needed: with other seeds their rates" in table.read_text()


def test_runs_that_were_trained_on_other_images_are_none_of_these(planned: Reproduction) -> None:
    first, *_ = planned.plan(EXPERIMENTS["table2"])
    row = first.arm
    before = left_of(planned, row.name)
    found = of_run(first, planned, 0.5)
    elsewhere = found | {"data": found["data"] | {"trained_on": "a part of them"}}
    append_record(planned.results, elsewhere)
    assert left_of(planned, row.name) == before
    append_record(planned.results, found)
    assert left_of(planned, row.name) == before[1:]


def test_the_best_rate_is_not_given_up_because_of_one_that_is(planned: Reproduction) -> None:
    planned.scale = replace(planned.scale, rates=(0.01, 0.03, 0.3))
    arm = EXPERIMENTS["table2"].arms(2)[0].name
    has_found(planned, arm, {(0.01, 5): 1.0, (0.03, 5): 0.0, (0.3, 5): 0.1})
    assert left_of(planned, arm) == [(0.01, 6), (0.01, 7)]
    has_found(planned, arm, {(0.03, 6): 1.0, (0.01, 6): 0.0})
    assert left_of(planned, arm) == [(0.01, 7), (0.03, 7)]


def test_a_removed_line_of_a_rate_that_others_gave_up_is_missing_all_the_same(
    planned: Reproduction,
) -> None:
    arm = EXPERIMENTS["table2"].arms(2)[0].name
    has_found(planned, arm, {(0.01, 5): 0.9, (0.01, 6): 0.9, (0.01, 7): 0.9, (0.3, 6): 0.0})
    assert left_of(planned, arm) == [(0.3, 5)]


def test_a_table_is_of_all_seeds_and_rates_that_there_are(planned: Reproduction) -> None:
    first, second = (arm.name for arm in EXPERIMENTS["table2"].arms(2))
    everything = {(rate, seed): 0.4 for rate in (0.01, 0.3) for seed in (5, 6, 7)}
    for arm in (first, second):
        has_found(planned, arm, everything | {(0.01, seed): 0.5 for seed in (5, 6, 7)})
    planned.seeds = 1
    planned.scale = replace(planned.scale, rates=(0.3,))
    assert left_of(planned, first) == []
    table, values, *_ = planned.write("table2", EXPERIMENTS["table2"])
    row, _ = csv.DictReader(values.read_text().splitlines())
    assert (row["seeds"], row["rate"], row["rates tried"]) == ("3", "0.01", "2")
    assert f"{first}: its rate is the lowest of 0.01, 0.3" in table.read_text()
    planned.scale = replace(planned.scale, rates=(0.7,))  # of which there is no line
    _, values, *_ = planned.write("table2", EXPERIMENTS["table2"])
    row, _ = csv.DictReader(values.read_text().splitlines())
    assert row["seeds"] == "3"
    other = planned.scale.base.with_overrides(["train.margin=0.9"])
    planned.scale = replace(planned.scale, base=other)
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert f"| {first} |  |" in table.read_text()  # of another margin


def test_a_run_that_was_begun_needs_the_rest_of_its_time(planned: Reproduction) -> None:
    run = planned.plan(EXPERIMENTS["table2"])[0]
    assert planned.remaining(run) == run.gflop
    saved = planned.folder / "runs" / f"{run.digest}-{planned.splits.digest}" / "checkpoints"
    for step in (10, run.config.train.steps // 4):
        (saved / f"step-{step:08d}").mkdir(parents=True)
    assert planned.remaining(run) == pytest.approx(0.75 * run.gflop)


def test_stamps_stand_over_a_table(planned: Reproduction) -> None:
    planned.splits = replace(planned.splits, stamps=("partial, 1 of 2",))
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert "synthetic vehicles (partial, 1 of 2), in percent" in table.read_text()


def test_reservations_are_told_of_each_claim() -> None:
    better, worse = better_and_worse(3).values()
    worse = [run | {"selected_step": 0} for run in worse[:2]] + worse[2:]
    arms, claim = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)[0]
    lines = results_page([*better, *worse]).splitlines()
    (told,) = [x for x in lines if x.startswith(f"| {claim} |") and "**" in x]
    assert (
        f"| {arms[0].name}: no run at 0.003; {arms[1].name}: the start itself was picked in 2 "
        "of 3, no run at 0.003 |"
    ) in told


def test_figures_near_0_have_a_sign() -> None:
    arms, claim = EXPERIMENTS["table2"].arms(4), EXPERIMENTS["table2"].claims(4)[0]
    hits = [True, False] * 5_000
    records = {
        arm.name: [record(arm, seed, [more, *hits]) for seed in range(3)]
        for arm, more in zip(arms, (True, False), strict=True)
    }
    assert judge(claim, rows_of(arms, records)).mean == "+0.01"


def test_some_rows_are_run_and_all_are_shown(planned: Reproduction) -> None:
    chosen, other = (arm.name for arm in EXPERIMENTS["table2"].arms(2))
    has_found(planned, other, {(0.01, 5): 0.5})
    planned.rows = [chosen]
    assert len(left_of(planned, chosen)) == 6
    assert left_of(planned, other) == []
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert f"| {other} | 1 |" in table.read_text()
    assert "11 of 12 runs are missing." in table.read_text()


def test_a_rate_that_diverged_is_behind_those_that_did_not(planned: Reproduction) -> None:
    arm = EXPERIMENTS["table2"].arms(2)[0].name
    has_found(planned, arm, {(0.01, 5): 0.9, (0.3, 5): None})
    has_found(planned, arm, {(0.01, 6): 0.9, (0.3, 6): None})
    assert left_of(planned, arm) == [(0.01, 7)]
    has_found(planned, arm, {(0.01, 7): 0.1, (0.3, 7): 1.0})  # another process had begun it
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert "2 of 12 runs diverged: their rates" in table.read_text()
    assert f"| {arm} | 3 | 0.01 |" in table.read_text()


def test_a_rate_that_diverged_leaves_no_other_behind(planned: Reproduction) -> None:
    """The one seed that did not is no reason to give up what is chosen in the end."""
    arm = EXPERIMENTS["table2"].arms(2)[0].name
    has_found(planned, arm, {(0.01, 5): 0.1, (0.3, 5): 1.0, (0.3, 6): None})
    assert left_of(planned, arm) == [(0.01, 6), (0.01, 7)]
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert "with other seeds their rates diverged, or were clearly behind" in table.read_text()
    has_found(planned, arm, {(0.01, 6): None})  # neither is stable now
    assert left_of(planned, arm) == [(0.01, 7), (0.3, 7)]


def test_a_table_tells_its_protocol_and_rates_at_the_edge(planned: Reproduction) -> None:
    first, second = (arm.name for arm in EXPERIMENTS["table2"].arms(2))
    planned.scale = replace(planned.scale, rates=(0.01, 0.03, 0.3))
    has_found(planned, first, {(0.01, 5): 0.4, (0.03, 5): 0.5, (0.3, 5): 0.4})
    has_found(planned, second, {(0.01, 5): 0.4, (0.03, 5): 0.5, (0.3, 5): 0.6})
    table, values, *_ = planned.write("table2", EXPERIMENTS["table2"])
    text = table.read_text()
    assert "Protocol `val`: checkpoints and rates are chosen by held-out training classes." in text
    told = f"May be better than it is here: {second}: its rate is the highest of 0.01, 0.03, 0.3."
    assert told in text
    assert "protocol paper -> val" in text
    has_found(planned, second, {(0.01, 6): 0.4, (0.03, 6): 0.5, (0.3, 6): None})
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert "May be better" not in table.read_text()  # the highest is 0.3, and diverged
    table, *_ = planned.write("protocol", EXPERIMENTS["protocol"])
    assert "Protocol `both`: checkpoints and rates are chosen by held-out" in table.read_text()
    (row, _) = csv.DictReader(values.read_text().splitlines())
    assert row["protocol"] == "val"
    paper = planned.scale.base.with_overrides(["protocol=paper"])
    planned.scale = replace(planned.scale, base=paper)
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert "chosen by the test images, which flatters." in table.read_text()
    assert "protocol paper" not in table.read_text()


@pytest.mark.parametrize("name", ["fig7a", "fig7b", "protocol"])
def test_where_one_setting_is_varied_the_rate_is_the_recipes(
    planned: Reproduction, name: str
) -> None:
    runs = planned.plan(EXPERIMENTS[name])
    assert {run.config.train.lr for run in runs} == {planned.scale.base.train.lr}
    assert len(runs) == 3 * len(EXPERIMENTS[name].arms(2))


def test_lambda_is_varied_with_the_papers_loss_and_with_ours(planned: Reproduction) -> None:
    runs = planned.plan(EXPERIMENTS["fig7c"])
    by_loss: dict[tuple[str, float], set[float]] = {}
    for run in runs:
        train = run.config.train
        by_loss.setdefault((train.normalization, train.lr), set()).add(train.divergence_weight)
    assert by_loss == {
        ("per_image", 1e-4): {0, 0.01, 0.1, 1, 10},
        ("balanced", 0.003): {0, 0.01, 0.1, 1, 10},
    }
    assert len(runs) == 3 * 10


def test_a_page_has_runs_of_the_recipes_rate_where_one_setting_is_varied() -> None:
    arms = {arm.name: arm for arm in EXPERIMENTS["fig7a"].arms(4)}
    best, other = arms["attention_depth 5"], arms["attention_depth 1"]
    good, bad = [True] * 20, [False] * 20
    records = [record(best, seed, bad, rate=0.003) for seed in range(3)]
    records += [record(best, seed, good, rate=0.01) for seed in range(3)]
    records += [record(other, seed, good, rate=0.003) for seed in range(3)]
    claim = "recall@1 of attention_depth 5 is above that of attention_depth 1"
    short, line = [text for text in results_page(records).splitlines() if claim in text]
    assert "refuted -100.0" in short
    assert "**refuted**" in line


def test_a_page_has_runs_of_the_rate_that_goes_with_a_loss() -> None:
    arms = {arm.name: arm for arm in EXPERIMENTS["fig7c"].arms(4)}
    best, other = arms["divergence_weight 1"], arms["divergence_weight 10"]
    assert best.rates == other.rates == (1e-4,)
    good, bad = [True] * 20, [False] * 20
    records = [record(best, seed, good, rate=1e-4) for seed in range(3)]
    records += [record(other, seed, bad, rate=1e-4) for seed in range(3)]
    records += [record(other, seed, good, rate=0.003) for seed in range(3)]  # of the recipe
    claim = "recall@1 of divergence_weight 1 is above that of divergence_weight 10"
    short, _ = [text for text in results_page(records).splitlines() if claim in text]
    assert "shown +100.0" in short


def test_baselines_are_scored_once_for_all_seeds(planned: Reproduction) -> None:
    planned.score_baselines()
    assert [found["method"] for found in read_records(planned.results)] == ["raw pixels"]
    planned.scale = replace(planned.scale, base=planned.scale.base.with_overrides(["seed=9"]))
    planned.score_baselines()
    assert len(read_records(planned.results)) == 1
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert "| raw pixels | 1 |" in table.read_text()


def test_what_another_process_trains_is_left_to_it(
    planned: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "begin", MagicMock(side_effect=TakenError("another has it")))
    planned.console = Console(file=io.StringIO(), record=True, width=120)
    assert planned.train(EXPERIMENTS["table2"], None, "abe reproduce table2")
    text = planned.console.export_text()
    assert text.count("is left to the process that trains it") == 12


def test_what_another_process_has_scored_meanwhile_has_one_line(
    planned: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {run.digest: run for run in planned.plan(EXPERIMENTS["table2"])}

    def begin(config: Config, *_: Any, **__: Any) -> MagicMock:
        found = of_run(runs[config.digest], planned, 0.5)
        return MagicMock(fit=lambda _: append_record(planned.results, found) or found)

    monkeypatch.setattr(Trainer, "begin", begin)
    assert planned.train(EXPERIMENTS["table2"], None, "")
    digests = [record["config_digest"] for record in read_records(planned.results)]
    assert len(digests) == len(set(digests)) == len(runs)


def test_images_are_read_once_for_all_runs_of_the_same(
    planned: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = MagicMock(side_effect=TakenError("another has it"))
    monkeypatch.setattr(Trainer, "begin", begin)
    arm = Arm("larger", ("data.crop=48", "data.resize=48"))
    larger = replace(EXPERIMENTS["table2"], arms=lambda most: (arm,))
    for experiment, given in (
        (EXPERIMENTS["table2"], planned.splits),
        (EXPERIMENTS["protocol"], planned.splits),
        (larger, None),
    ):
        begin.reset_mock()
        planned.train(experiment, None, "again")
        assert [call.kwargs["splits"] for call in begin.call_args_list]
        assert all(call.kwargs["splits"] is given for call in begin.call_args_list)


def test_images_of_a_relative_folder_are_read_once_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(32):
        file = Path(f"photos/{number % 8}/{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (number, 0, 0)).save(file)
    begin = MagicMock(side_effect=TakenError("another has it"))
    monkeypatch.setattr(Trainer, "begin", begin)
    base = demo().with_overrides(["data.source=photos", "model.weights=none"])
    scale = Scale(base.with_overrides(["data.val_classes=0.5"]), learners=2, rates=(0.01,))
    own = Reproduction(scale, "small", Path("runs.jsonl"), tmp_path, Console(quiet=True))
    own.train(EXPERIMENTS["table2"], None, "again")
    assert {id(call.kwargs["splits"]) for call in begin.call_args_list} == {id(own.splits)}


def test_a_folder_by_its_dot_has_the_lines_that_its_runs_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(32):
        file = tmp_path / f"photos/{number % 8}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (number, 0, 0)).save(file)
    monkeypatch.chdir(tmp_path / "photos")
    base = demo().with_overrides(["data.source=.", "model.weights=none", "data.val_classes=0.5"])
    scale = Scale(base, learners=2, rates=(0.01,))
    own = Reproduction(scale, "small", Path("runs.jsonl"), tmp_path, Console(quiet=True))
    runs = own.plan(EXPERIMENTS["table2"])
    assert [run.digest for run in runs] == [run.config.anchored().digest for run in runs]
    assert {run.config.portable()["data"]["source"] for run in runs} == {"photos"}


def test_what_a_run_computes_is_that_of_the_batches_that_it_has(
    planned: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and twice as much backward of each step, and what is scored, counted by images."""
    settings = ["train.steps=5", "train.eval_every=2", "model.num_learners=2"]
    planned.scale = replace(planned.scale, base=planned.scale.base.with_overrides(settings))
    run = planned.plan(EXPERIMENTS["table2"])[0]
    classes = len(np.unique(planned.splits.train.labels))
    assert run.config.train.batch_size == classes * run.config.train.images_per_class < 64
    evaluated = 4 * len(planned.splits.select)  # before the first step, at 2, 4, and the last one
    images = 3 * 5 * run.config.train.batch_size + evaluated + len(planned.splits.test)
    macs = count_macs(build_model(run.config), run.config.data.crop)
    assert run.gflop == pytest.approx(2 * macs * images / 1e9)
    assert run.kept == 3 * (4 + 4) * count_parameters(build_model(run.config))  # with momentum
    untrained = planned.scale.base.with_overrides(["train.steps=0"])
    planned.scale, planned._known = replace(planned.scale, base=untrained), {}
    (run, *_) = planned.plan(EXPERIMENTS["table2"])
    assert planned.remaining(run) == run.gflop > 0


def test_a_speed_is_that_of_forward_and_backward(
    planned: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0, 0.5)  # a step takes half a second
    monkeypatch.setattr("abe.reproduce.time.perf_counter", lambda: next(clock))
    base = planned.scale.base.with_overrides(["model.num_learners=2", "model.embedding_dim=2"])
    macs = count_macs(build_model(base), base.data.crop)
    assert planned.speed() == pytest.approx(3 * 2 * macs * 32 / 1e9 / 0.5)


def test_a_budget_is_measured_by_the_runs_that_were_finished(
    planned: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run takes twice the prediction, so that of 35 s the second is the last."""
    clock = [0.0]
    fig6 = EXPERIMENTS["fig6"]
    runs = planned.plan(fig6)
    monkeypatch.setattr("abe.reproduce.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(Reproduction, "speed", lambda _: runs[0].gflop / 5)
    by_digest = {run.digest: run for run in runs}

    def fit(config: Config) -> dict[str, Any]:
        clock[0] += 10
        return of_run(by_digest[config.digest], planned, 0.5)

    trainer = MagicMock(side_effect=lambda config, *_, **__: MagicMock(fit=lambda _: fit(config)))
    monkeypatch.setattr(Trainer, "begin", trainer)
    planned.train(fig6, 28, "")
    assert len(planned._speeds) == 3
    assert planned._speeds[1:] == pytest.approx([runs[0].gflop / 10] * 2)
    assert len(read_records(planned.results)) == 2


def test_a_line_of_another_start_is_of_no_row(planned: Reproduction) -> None:
    first, *_ = planned.plan(EXPERIMENTS["table2"])
    found = of_run(first, planned, 0.5)
    others = {"source": "others", "sha256": "f" * 16}
    append_record(planned.results, found | {"config_digest": "of others", "weights": others})
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert f"| {first.arm.name} |  |" in table.read_text()
    append_record(planned.results, found)
    table, *_ = planned.write("table2", EXPERIMENTS["table2"])
    assert f"| {first.arm.name} | 1 |" in table.read_text()


def test_scoring_the_test_images_all_along_takes_time(planned: Reproduction) -> None:
    protocol, table2 = (planned.plan(EXPERIMENTS[name])[0] for name in ("protocol", "table2"))
    macs = count_macs(build_model(planned.scale.base.with_overrides(table2.arm.settings)), 64)
    assert protocol.gflop - table2.gflop == pytest.approx(2 * macs * 4 * 32 / 1e9)


@pytest.mark.slow
def test_a_budget_begins_nothing_that_would_end_later(tmp_path: Path) -> None:
    done = reproduce(tmp_path, "table2", "--budget=0.01s")
    assert (done.returncode, trained(done)) == (0, 0)
    assert "4 runs are not begun" in done.stderr
    assert "4 of 4 runs are missing" in done.stdout


@pytest.mark.slow
def test_two_folders_of_one_name_are_two_sets_of_images(tmp_path: Path) -> None:
    for place, first in (("a", 0), ("b", 100)):
        for label in range(8):
            (tmp_path / place / "images" / f"class {label}").mkdir(parents=True)
            for number in range(4):
                noise = np.random.default_rng(first + label).integers(256, size=(40, 40, 3))
                file = tmp_path / place / "images" / f"class {label}" / f"{first + number}.png"
                Image.fromarray(noise.astype(np.uint8)).save(file)
    for place in ("a", "b"):
        done = reproduce(tmp_path, "fig6", f"--data={place}/images", "--seeds=1")
        assert (done.returncode, trained(done)) == (0, 1), done.stderr
        assert "runs are missing" not in done.stdout
    (tmp_path / "a").rename(tmp_path / "moved")
    done = reproduce(tmp_path, "fig6", "--data=moved/images", "--seeds=1")
    assert (done.returncode, trained(done)) == (0, 0), done.stderr


@pytest.mark.slow
def test_a_run_that_diverges_is_not_tried_again(tmp_path: Path) -> None:
    wild = ("--rate=1e30", "--seeds=1", "--set=train.steps=6")
    first, again = (reproduce(tmp_path, "fig6", *wild) for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    assert "lower train.lr" in first.stderr
    assert "lower train.lr" not in again.stderr
    assert len(lines(tmp_path)) == 3  # raw pixels, and the runs at the two rates
    told = [line for line in map(json.loads, lines(tmp_path)) if "diverged" in line]
    assert [line["config"]["train"]["lr"] for line in told] == [1e30]
    assert told[0]["environment"]["precision"] == "fp32"
    elsewhere = reproduce(tmp_path, "fig6", *wild, "--out=elsewhere")
    assert "lower train.lr" not in elsewhere.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_table_goes_on(tmp_path: Path, stop: signal.Signals) -> None:
    longer = [*arguments("table2", "--seeds=1"), "--set=train.steps=40"]
    process = subprocess.Popen(longer, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if len([x for x in seen if x.startswith("step     10 ")]) == 2:  # of the second run
            process.send_signal(stop)
            break
    process.communicate(timeout=100)
    assert process.returncode == (130 if stop == signal.SIGINT else -stop)
    finished = lines(tmp_path)
    assert len(finished) == 2  # raw pixels, and the first run
    done = subprocess.run(longer, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert trained(done) == 0  # the second one goes on where it was
    assert lines(tmp_path)[:2] == finished
    assert len(lines(tmp_path)) == 3
    whole = tmp_path / "whole"
    whole.mkdir()
    subprocess.run(longer, cwd=whole, capture_output=True, timeout=300, check=True)
    assert json.loads(lines(tmp_path)[-1])["scores"] == json.loads(lines(whole)[-1])["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fig5", "fig6"])
def test_pictures_are_drawn_of_the_runs(table2: Path, name: str, tmp_path: Path) -> None:
    table2 = Path(shutil.copytree(table2, tmp_path / "table2"))  # other tests use it, too
    done = reproduce(table2, name)
    assert done.returncode == 0, done.stderr
    assert colours(table2 / f"reproduced/{name}-synthetic-vehicles-small.png") > 50


@pytest.mark.slow
def test_a_picture_of_runs_that_are_elsewhere_is_not_drawn(table2: Path) -> None:
    done = reproduce(table2, "fig6", "--out=other")
    assert done.returncode == 0, done.stderr
    assert "fig6-synthetic-vehicles-small.png needs the run folders of ABE-4^512" in done.stderr
    assert not list((table2 / "other").glob("*.png"))


@pytest.mark.parametrize(
    ("name", "panels"),
    [
        ("fig4", {"ours": [8, 8], "the paper's, CARS-196": [8, 8]}),
        ("table2", {"ours": [2], "the paper's, CARS-196": [2]}),
        ("fig7c", {"ours": [10]}),
    ],
)
def test_ours_and_the_papers_are_drawn_on_axes_of_their_own(
    name: str, panels: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    experiment, base = EXPERIMENTS[name], small(True).base
    records = {arm.name: [record(arm, 0, [True, False] * 9)] for arm in experiment.arms(4)}
    values = [
        values_of(experiment, row, "birds", base) for row in rows_of(experiment.arms(4), records)
    ]
    assert draw(experiment, values, {}, None, tmp_path / "x.png", Console(quiet=True))  # type: ignore[arg-type]
    found: dict[str, list[int]] = {}
    label = ""
    for axes in drawn[0].axes:
        label = axes.get_ylabel() if name == "fig4" and axes.get_ylabel() else label
        points = sum(len(bars.lines[0].get_xdata()) for bars in axes.containers)
        title = (label or axes.get_xlabel()).removeprefix("Recall@1, %\n")
        found.setdefault(title, []).append(points)
        assert bool(axes.texts) == (name == "fig4")
    assert found == panels
    bar = drawn[0].axes[0].containers[0].lines[2][0].get_paths()[0]
    for end in ("recall@1 low", "recall@1 high"):
        assert np.isclose(bar.vertices, 100 * values[0][end]).any()


def test_a_picture_of_results_has_all_images_and_the_papers_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    better, worse = better_and_worse(1).values()
    elsewhere = [
        run
        | {"images_digest": "2" * 12, "data": run["data"] | {"name": "cars", "stamps": ["half"]}}
        for run in worse
    ]
    path = tmp_path / "x.png"
    draw_results(["table2"], [*elsewhere, *better, *worse], path)
    panels = {
        axes.get_xlabel().partition("%\n")[2]: list(axes.containers[0].lines[0].get_ydata())
        for axes in drawn[0].axes
    }
    assert panels == {"cars (half)": [1], "birds": [0, 1], "the paper's, CARS-196": [1, 0]}
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == [
        "ABE-4^512 (ABE-8^512)",
        "ABE-4^512 without L_div (ABE-8^512 without L_div)",
    ]

    other_start = [run | {"weights": {"source": "b", "sha256": "b" * 16}} for run in worse]
    for names, records, message in (
        (["table2"], [*better, *other_start], "birds that cannot stand side by side: from several"),
        (["table7"], better, "no run is of table7, on images that it is about"),
        (["fig7"], better, "name it by --of, one of fig7a, fig7b, fig7c"),
        ([], better, "name it by --of$"),
        (["fig6"], better, "fig6 is drawn of networks, not of results: `abe reproduce fig6`"),
    ):
        with pytest.raises(InputError, match=message):
            draw_results(names, records, path)


# --- What cannot be run ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["table9"], "there is no experiment 'table9'"),
        (["table1", "--scale=full"], "--scale full needs photographs: --data cars196"),
        (["table1", "--budget=soon"], "--budget soon: write a number and s, m or h, as in 30m"),
        (["table1", "--data=nowhere"], "nowhere"),
        (["table1", "table6", "--root=data"], "several benchmarks: --data cars196 or sop"),
        (
            ["fig7", "--rate=0.1"],
            "--rate has no effect on fig7a; fig7b; fig7c: leave it out, or give --set train.lr=",
        ),
        (
            ["losses", "--rate=0.1"],
            "--rate has no effect on losses: leave it out, or give --rate=RATE with --row=ROW: its",
        ),
        (
            ["losses", "fig7c", "--rate=0.1", "--row=divergence_weight 1"],
            "--rate has no effect on divergence_weight 1: leave it out: its rates are its own",
        ),
        (
            ["fig7c", "--rate=0.1", "--row=divergence_weight 1"],
            "--rate has no effect on divergence_weight 1: leave it out: its rates are its own",
        ),
        (
            ["losses", "fig7c", "--set=train.lr=0.1"],
            "--set train.lr has no effect on losses; fig7c",
        ),
        (
            ["losses", "table2", "--set=train.lr=0.1"],
            "--set train.lr has no effect on losses; table2: leave it out, or give --rate=RATE",
        ),
        (
            ["table2", "--set=model.num_learners=8"],
            "--set model.num_learners has no effect on table2: leave it out, each row has its own",
        ),
        (
            ["losses", "--row=1-head^512, Eq. 10 balanced", "--set=train.normalization=sum"],
            "--set train.normalization has no effect on 1-head^512, Eq. 10 balanced: leave it out,",
        ),
        (
            ["fig7", "fig4", "--set=model.attention_depth=3"],
            "--set model.attention_depth has no effect on fig7a; fig7b; fig7c; fig4: leave it out",
        ),
        (["table4", "--root=data"], "Of cub200; for the others give --data cars196."),
        (["table2", "--row=ABE-3"], "--row ABE-3: the rows are ABE-4^512; ABE-4^512 without L_div"),
    ],
)
def test_errors(tmp_path: Path, given: list[str], message: str) -> None:
    done = subprocess.run(
        [ABE, "reproduce", *given], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text, "--budget") == seconds


@pytest.mark.slow
def test_two_processes_share_a_table(tmp_path: Path) -> None:
    both = [
        subprocess.Popen(arguments("table3"), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(text.count("on the first batch") for text in said) == 4
    done = reproduce(tmp_path, "table3")
    assert trained(done) == 0
    assert "runs are missing" not in done.stdout
