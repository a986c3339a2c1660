"""Records of results, and the tables that derive from them."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import resource
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from abe.checkpoint import Best
from abe.config import Config
from abe.errors import InputError
from abe.intervals import pack, pack_classes
from abe.results import (
    Summary,
    append_record,
    best_rate,
    data_title,
    divergence_record,
    has_diverged,
    is_baseline,
    markdown_table,
    method_name,
    read_records,
    replace_between,
    result_record,
    scores_table,
    summarize,
    write_result,
)

DATA = {
    "name": "birds",
    "skipped": 0,
    "train_images": 800,
    "train_classes": 80,
    "select_images": 200,
    "select_classes": 20,
    "test_images": 1234,
    "test_classes": 100,
}


def scores(recall: float, learners: tuple[float, ...] = (0.2, 0.4), cosine: float = 0.5) -> Any:
    metrics = {f"recall@{k}": min(1.0, recall * k) for k in (1, 2, 4, 8)}
    return {
        "ensemble": metrics | {"map@r": recall / 2, "r_precision": 0.1, "nmi": 0.2},
        "learners": [{"recall@1": value} for value in learners],
        "similarity": {"positive": 0.9, "negative": 0.1, "self": cosine},
        "hits@1": pack(np.ones(4, bool)) | {"classes": pack_classes(np.arange(4))},
    }


def record(
    *overrides: str, selection: float | None = 0.3, method: str | None = None, **of_scores: Any
) -> dict[str, Any]:
    return result_record(
        Config().with_overrides(["model.num_learners=2", *overrides]),
        scores=scores(**({"recall": 0.1} | of_scores)),
        best=None if selection is None else Best(40, selection),
        data=DATA,
        images_digest="0123456789ab",
        weights=None,
        environment={"commit": "c0ffee", "precision": "fp32"},
        method=method,
    )


def titles(table: str) -> list[str]:
    return re.findall(r"protocol.*", table)


def methods(table: str) -> list[str]:
    return re.findall(r"^\| (.*?) \|", table, re.M)


# --- Records -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model.num_learners=8"], "ABE-8^512"),
        (["model.num_learners=1", "model.embedding_dim=64"], "ABE-1^64"),
        (["model.network=m-heads", "model.num_learners=1"], "1-head^512"),
        (["model.network=m-heads", "model.num_learners=4"], "4-heads^512 with divergence"),
        (["model.network=m-heads+att"], "8-heads+att^512 with divergence"),
        (["model.network=m-heads+att", "train.divergence_weight=0"], "8-heads+att^512"),
        (["model.network=m-tails"], "8-tails^512"),
        (["train.divergence_weight=0"], "ABE-8^512 without divergence"),
        (["train.divergence_weight=0", "model.num_learners=1"], "ABE-1^512"),
        (["train.divergence_weight=0", "model.network=m-heads"], "8-heads^512"),
    ],
)
def test_methods_are_called_as_in_the_paper(overrides: list[str], name: str) -> None:
    assert method_name(Config().with_overrides(overrides)) == name


def test_a_record_says_what_was_run() -> None:
    found = record("seed=3", "protocol=paper", "device=cpu", "data.source=/here/birds")
    assert found["method"] == "ABE-2^512"
    assert (found["seed"], found["protocol"]) == (3, "paper")
    assert (found["selected_step"], found["selection_recall@1"]) == (40, 0.3)
    assert found["data"] == DATA
    assert found["images_digest"] == "0123456789ab"
    assert found["config"]["data"]["source"] == "birds"
    assert "device" not in found["config"]
    assert len(found["config_digest"]) == 12
    assert json.loads(json.dumps(found)) == found
    baseline = record(selection=None, method="raw pixels")
    assert (baseline["method"], baseline["selected_step"]) == ("raw pixels", None)


def test_records_round_trip(tmp_path: Path) -> None:
    records = [record(), record("seed=1")]
    for each in records:
        append_record(tmp_path / "runs" / "runs.jsonl", each)
    assert read_records(tmp_path / "runs" / "runs.jsonl") == records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", " has no results: `abe train` and `abe eval` add them"),
        ('{"step": 1, "loss": 2.0}\n', ", line 1 is no result of `abe train` or `abe eval`"),
    ],
)
def test_a_file_without_results(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text(content)
    with pytest.raises(InputError, match=f"runs.jsonl{message}"):
        read_records(tmp_path / "runs.jsonl")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", {}),
        ("config.seed", None),
        ("config.train.lr", "fast"),
        ("config.train.steps", None),
        ("config.train.normalization", "unknown"),
        ("config.data", 3),
        ("data", {}),
        ("data.test_images", "many"),
        ("protocol", None),
        ("scores", {}),
        ("scores.ensemble", {"recall@1": "high"}),
        ("scores.learners", [{}, {}]),
        ("scores.similarity", None),
        ("seed", "first"),
        ("selected_step", None),
        ("selection_recall@1", "high"),
        ("selection_recall@1", float("nan")),
        ("images_digest", None),
        ("date", None),
        ("environment.commit", None),
        ("environment.precision", None),
        ("weights", {"source": "x.pth"}),
        ("scores.hits@1", {"queries": 9, "bits": "AA=="}),
        ("scores.hits@1", {}),
        ("scores.learners", [{"recall@1": 1.0, "hits@1": pack(np.ones(3, bool))}]),
        ("scores.hits@1.classes", "x"),
        ("scores.hits@1.classes", pack_classes(np.arange(3))),
    ],
)
def test_a_line_that_no_table_can_be_made_of(key: str, value: Any, tmp_path: Path) -> None:
    """Each value in place of the right one, None for a key that is missing."""
    damaged = copy.deepcopy(record())
    *groups, name = key.split(".")
    target = damaged
    for group in groups:
        target = target[group]
    del target[name]
    if value is not None:
        target[name] = value
    append_record(tmp_path / "runs.jsonl", record())
    append_record(tmp_path / "runs.jsonl", damaged)
    with pytest.raises(InputError, match=r"runs\.jsonl, line 2 is no result of .*: remove it"):
        read_records(tmp_path / "runs.jsonl")


def test_a_result_is_left_in_its_folder(tmp_path: Path) -> None:
    embeddings = torch.randn(5, 2, 3)
    write_result(tmp_path / "run", record(), embeddings)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["method"] == "ABE-2^512"
    saved = load_file(tmp_path / "run" / "embeddings.safetensors")
    assert torch.equal(saved["embeddings"], embeddings)


def test_both_files_of_a_result_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    write_result(tmp_path, record(), torch.zeros(1, 2, 3))
    (tmp_path / "other").touch()
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert modes == {(tmp_path / "other").stat().st_mode}


@pytest.mark.parametrize(("images", "name"), [(1000, "embeddings.safetensors"), (1, "result.json")])
def test_a_full_disk(images: int, name: str, tmp_path: Path) -> None:
    baseline = record(selection=None, method="raw pixels")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes a file may have
    try:
        with pytest.raises(
            InputError,
            match=rf"{name} cannot be written \(.*make room .* checkpoints are kept: `.*abe train "
            rf"--resume {tmp_path}` .* `.*abe eval {tmp_path}` scores alone",
        ):
            write_result(tmp_path, record(), torch.zeros(images, 2, 3))
        with pytest.raises(InputError, match=r"see to its permissions$"):
            write_result(tmp_path, baseline, torch.zeros(images, 2, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- Averages ----------------------------------------------------------------------------------


def test_mean_and_standard_deviation_over_seeds() -> None:
    (found,) = summarize(
        [
            record("seed=2", recall=0.40, learners=(0.1, 0.3), cosine=0.6),
            record("seed=0", recall=0.10, learners=(0.2, 0.4), cosine=0.2),
            record("seed=1", recall=0.25, learners=(0.3, 0.5), cosine=0.1),
        ]
    )
    assert found.seeds == 3
    assert found.record["seed"] == 0
    assert found.scores["recall@1"] == pytest.approx((0.40 + 0.10 + 0.25) / 3)
    assert found.spread["recall@1"] == pytest.approx(0.15)  # sqrt((.15^2 + .15^2 + 0) / 2)
    assert found.scores["learner recall@1"] == pytest.approx((0.2 + 0.3 + 0.4) / 3)
    assert found.spread["learner recall@1"] == pytest.approx(0.1)
    assert found.scores["best learner recall@1"] == pytest.approx((0.3 + 0.4 + 0.5) / 3)
    assert found.scores["learner cosine"] == pytest.approx(0.3)
    assert found.spread["learner cosine"] == pytest.approx(statistics.stdev((0.6, 0.2, 0.1)))


def test_one_seed_has_no_spread_and_one_learner_no_learners() -> None:
    (found,) = summarize([record(learners=(0.1,))])
    assert found.spread["recall@1"] == 0
    assert not [name for name in found.scores if "learner" in name]


def test_a_score_that_one_seed_does_not_have_is_no_average() -> None:
    older = record("seed=1")
    del older["scores"]["ensemble"]["nmi"]
    (found,) = summarize([record("seed=0"), older])
    assert found.seeds == 2
    assert "nmi" not in found.scores
    assert found.scores["recall@1"] == pytest.approx(0.1)


def test_a_run_that_is_scored_again_counts_once() -> None:
    (found,) = summarize([record(recall=0.1), record("seed=1", recall=0.3), record(recall=0.2)])
    assert found.seeds == 2
    assert found.scores["recall@1"] == pytest.approx(0.25)


def test_the_rate_is_picked_by_the_mean_selection_recall() -> None:
    """Not by the test score, and of the seeds that both rates have."""

    def best(of_last: float) -> Summary:
        records = [
            record("train.lr=0.1", "seed=0", selection=0.50, recall=0.10),
            record("train.lr=0.1", "seed=1", selection=0.58, recall=0.20),
            record("train.lr=0.2", "seed=0", selection=0.60, recall=0.90),
            record("train.lr=0.2", "seed=1", selection=0.40, recall=0.90),
            record("train.lr=0.3", "seed=1", selection=of_last, recall=0.90),
        ]
        (found,) = summarize(records)
        return found

    unfinished = best(0.59)
    assert (unfinished.record["config"]["train"]["lr"], unfinished.seeds) == (0.3, 1)
    found = best(0.57)
    assert found.rates == (0.1, 0.2, 0.3)
    assert found.record["config"]["train"]["lr"] == 0.1
    assert found.seeds == 2
    assert found.scores["recall@1"] == pytest.approx(0.15)


@pytest.mark.parametrize("names", list(itertools.permutations((0.1, 0.2, 0.3))))
def test_which_rate_is_best_is_no_question_of_their_order(names: tuple[float, ...]) -> None:
    most, slightly, clearly = names
    recalls = {most: {0: 0.5, 1: 0.5, 2: 0.5}, slightly: {0: 0.51}, clearly: {1: 0.9}}
    assert best_rate(recalls) == clearly
    assert best_rate(recalls | {clearly: {7: 0.9}}) == slightly  # which is of no seed of theirs
    assert best_rate(recalls | {slightly: {0: 0.9}, clearly: {1: 0.9, 2: 0.9}}) == clearly
    assert best_rate({rate: {0: 0.5} for rate in names}) == 0.1
    hits = (101, 57, 83)  # of 601: the same ones of other seeds
    orders = zip(names, itertools.permutations(hits), strict=False)
    assert best_rate({rate: dict(enumerate(n / 601 for n in own)) for rate, own in orders}) == 0.1


def test_a_seed_that_diverged_leaves_its_rate_to_those_without_another() -> None:
    tame = [record("train.lr=0.1", f"seed={seed}", selection=0.4) for seed in (0, 1)]
    lucky = record("train.lr=0.2", "seed=0", selection=0.9)
    known = {key: lucky[key] for key in ("data", "weights", "environment", "images_digest")}
    config = Config().with_overrides(["model.num_learners=2", "train.lr=0.2", "seed=1"])
    lost = divergence_record(config, step=3, **known)
    assert not is_baseline(lost)
    (found,) = summarize([*tame, lucky, lost])
    assert (list(found.runs), found.rates) == (tame, (0.1, 0.2))
    (found,) = summarize([lucky, lost])
    assert list(found.runs) == [lucky]
    assert summarize([lost]) == []
    (found,) = summarize([*tame, lucky, lost, lucky | {"seed": 1}])  # it was run again
    assert [run["seed"] for run in found.runs] == [0, 1]
    assert found.rates == (0.1, 0.2)
    assert found.record["config"]["train"]["lr"] == 0.2


def test_a_stretch_without_its_code_is_no_result(tmp_path: Path) -> None:
    damaged = record()
    damaged["environment"] = damaged["environment"] | {"stretches": [{"from_step": 0}]}
    append_record(tmp_path / "runs.jsonl", damaged)
    with pytest.raises(InputError, match=r"line 1 is no result of .*'commit'.*: remove it"):
        read_records(tmp_path / "runs.jsonl")


def test_a_run_that_diverged_is_a_line_like_others(tmp_path: Path) -> None:
    own = record()
    known = {key: own[key] for key in ("data", "weights", "environment", "images_digest")}
    lost = divergence_record(Config(), step=3, **known)
    append_record(tmp_path / "runs.jsonl", lost)
    assert read_records(tmp_path / "runs.jsonl") == [lost]
    assert has_diverged(lost)
    assert not has_diverged(own)
    append_record(tmp_path / "runs.jsonl", {k: v for k, v in lost.items() if k != "images_digest"})
    with pytest.raises(InputError, match=r"runs\.jsonl, line 2 is no result"):
        read_records(tmp_path / "runs.jsonl")


def test_what_differs_in_more_than_seed_and_rate_is_not_averaged() -> None:
    other_data = record()
    other_data["data"] = DATA | {"name": "cars"}
    records = [
        record(),
        record("train.steps=5"),
        record("protocol=paper"),
        record("model.weights=none"),
        record("train.divergence_weight=0"),
        record(selection=None, method="raw pixels"),
        other_data,
    ]
    assert [found.record for found in summarize(records)] == records


def test_training_has_no_part_in_a_baseline() -> None:
    """Each of two experiments on the same images scores them."""
    first = record(selection=None, method="raw pixels")
    again = record("train.steps=5", "model.network=m-heads", selection=None, method="raw pixels")
    larger = record("data.resize=300", selection=None, method="raw pixels")
    assert [found.seeds for found in summarize([first, again, larger])] == [1, 1]


def test_runs_that_began_with_other_weights_are_not_averaged() -> None:
    runs = [record("seed=0"), record("seed=1")]
    for run, digit in zip(runs, "ab", strict=True):
        run["weights"] = {"source": "/here/start.pth", "sha256": 64 * digit}
    found = summarize(runs)
    assert [each.seeds for each in found] == [1, 1]
    baseline = record(selection=None, method="pretrained start")
    baseline["weights"] = runs[1]["weights"]
    pixels = record(selection=None, method="raw pixels")
    unused = record(selection=None, method="pretrained start")
    unused["weights"] = {"source": "/here/start.pth", "sha256": 64 * "c"}
    text = markdown_table([*found, *summarize([baseline, pixels, unused])])
    alone, *tables = text.split("\n\n**")
    assert (titles(alone), methods(alone)[1:]) == (
        ["protocol `val`), images at 224 px."],
        ["pretrained start"],
    )
    assert [(titles(table), methods(table)[1:]) for table in tables] == [
        (
            [f"protocol `val`), 1000 steps from start.pth {12 * digit}, of 64 images at 224 px."],
            rows,
        )
        for digit, rows in (
            ("a", ["raw pixels", "ABE-2^512"]),
            ("b", ["pretrained start", "raw pixels", "ABE-2^512"]),
        )
    ]


def test_summarize_leaves_the_records_alone() -> None:
    records = [record("seed=1"), record("seed=0")]
    before = copy.deepcopy(records)
    summarize(records)
    assert records == before


# --- Tables ------------------------------------------------------------------------------------


def test_markdown_table() -> None:
    cars = record(recall=0.05)
    cars["data"] = DATA | {"name": "cars"}
    pixels = record(selection=None, method="raw pixels", recall=0.02, learners=(0.02,))
    text = markdown_table(
        summarize(
            [
                pixels,
                record("seed=0", "train.normalization=balanced", recall=0.1, cosine=0.25),
                record("seed=1", "train.normalization=balanced", recall=0.2, cosine=0.35),
                record("train.metric_loss=TripletMarginLoss()", recall=0.08),
                cars,
            ]
        )
    )
    birds, cars_table = text.split("\n\n**")
    title, _, heading, rule, *rows = birds.splitlines()
    assert title == (
        "**birds**: 1,234 test images of 100 classes not seen in training, 80 classes to learn "
        "from, 20 to choose by (protocol `val`), 1000 steps from random weights, of 64 images at "
        "224 px."
    )
    columns = (
        "method | loss | rate, of | seeds | R@1 | R@2 | R@4 | R@8 | learners' mean R@1 | "
        "best learner's R@1 | learners' cosine"
    )
    assert heading == f"| {columns} |"
    assert rule.count("|") == heading.count("|")
    assert rows == [
        "| raw pixels |  |  | 1 | 2.0 | 4.0 | 8.0 | 16.0 |  |  |  |",
        "| ABE-2^512 | Eq. 10, balanced | 0.001, 1 | 2 | 15.0 ± 7.1 | 30.0 ± 14.1 | "
        "60.0 ± 28.3 | 90.0 ± 14.1 | 30.0 ± 0.0 | 40.0 ± 0.0 | 0.30 |",
        "| ABE-2^512 | TripletMarginLoss() | 0.001, 1 | 1 | 8.0 | 16.0 | 32.0 | 64.0 | 30.0 "
        "| 40.0 | 0.50 |",
    ]
    assert cars_table.startswith("cars**: ")
    assert cars_table.endswith(
        "| ABE-2^512 | Eq. 10 | 0.001, 1 | 1 | 5.0 | 10.0 | 20.0 | 40.0 | 30.0 | 40.0 | 0.50 |"
    )


def test_the_title_of_a_table_is_true_of_all_of_its_rows() -> None:
    """Baselines are in the tables of their images, protocol and crop, and first in them."""
    text = markdown_table(
        summarize(
            [
                record(),
                record("train.steps=5"),
                record("train.batch_size=32"),
                record("data.crop=96"),
                record("protocol=paper"),
                record("model.network=m-heads"),
                record(selection=None, method="raw pixels"),
                record("data.crop=96", selection=None, method="pretrained start"),
            ]
        )
    )
    assert [(titles(table), methods(table)[1:]) for table in text.split("\n\n**")] == [
        ([f"protocol `{protocol}`), {schedule} px."], rows)
        for protocol, schedule, rows in (
            (
                "val",
                "1000 steps from random weights, of 64 images at 224",
                ["raw pixels", "ABE-2^512", "2-heads^512 with divergence"],
            ),
            (
                "val",
                "5 steps from random weights, of 64 images at 224",
                ["raw pixels", "ABE-2^512"],
            ),
            (
                "val",
                "1000 steps from random weights, of 32 images at 224",
                ["raw pixels", "ABE-2^512"],
            ),
            (
                "val",
                "1000 steps from random weights, of 64 images at 96",
                ["pretrained start", "ABE-2^512"],
            ),
            ("paper", "1000 steps from random weights, of 64 images at 224", ["ABE-2^512"]),
        )
    ]


def test_baselines_alone_took_no_steps() -> None:
    table = markdown_table(summarize([record(selection=None, method="raw pixels")]))
    assert titles(table) == ["protocol `val`), images at 224 px."]
    assert methods(table)[1:] == ["raw pixels"]


def test_rows_of_one_method_and_loss_are_told_apart() -> None:
    """By all that differs among them but seed and rate; a setting may be newer than a record."""
    older = record("train.lr=0.1", "seed=1")
    del older["config"]["train"]["clip_norm"]
    text = markdown_table(
        summarize(
            [
                older,
                record("train.divergence_weight=7", "train.clip_norm=2"),
                record("train.metric_loss=TripletMarginLoss()", "train.divergence_weight=3"),
                record("model.network=m-heads"),
            ]
        )
    )
    assert methods(text)[1:] == [
        "ABE-2^512 (divergence_weight 1, clip_norm None)",
        "ABE-2^512 (divergence_weight 7, clip_norm 2)",
        "ABE-2^512",
        "2-heads^512 with divergence",
    ]


def test_other_data_than_a_run_was_trained_on_are_said() -> None:
    other = DATA | {"name": "gulls", "trained_on": "finches"}
    assert data_title(other) == "gulls (trained on finches)"
    stamped = other | {"stamps": ["partial, 3 of 9"]}
    assert data_title(stamped) == "gulls (trained on finches; partial, 3 of 9)"
    tested = record() | {"data": stamped}
    table = markdown_table(summarize([tested]))
    assert table.startswith(f"**{data_title(stamped)}**: ")
    assert "not seen in training" not in table
    assert "not seen in training" in markdown_table(summarize([record()]))


def test_names_that_no_terminal_can_show_are_escaped() -> None:
    """A folder's name may be other than UTF-8, and be found out when a run of hours is over."""
    name = os.fsdecode(b"St\xfchle")
    shown = data_title(DATA | {"name": name})
    assert shown == r"St\udcfchle"
    assert shown.encode("utf-8")


def test_a_start_is_the_same_under_another_name() -> None:
    """And a recipe is a name as well: what it sets is in the settings."""
    first, second = record("seed=0"), record("seed=1", "recipe=another")
    for found, name in ((first, "start.safetensors"), (second, "copied.safetensors")):
        found["weights"] = {"source": name, "sha256": "0123456789abcdef"}
        found["config"]["model"]["weights"] = name
    (summary,) = summarize([first, second])
    assert summary.seeds == 2


def test_of_rates_that_are_as_good_the_lowest_is_taken() -> None:
    for order in ((0.01, 0.003), (0.003, 0.01)):
        assert best_rate({rate: {0: 0.1, 1: 0.2} for rate in order}) == 0.003


def test_scores_table_shows_what_it_was_given() -> None:
    """Names of data are shown as they are: brackets are no markup."""
    found = record(recall=0.123)
    found["data"] = DATA | {"name": "[red]birds"}
    console = Console(width=120, markup=False)
    with console.capture() as captured:
        console.print(scores_table([found, record(method="raw pixels", selection=None)]))
    shown = captured.get()
    for part in ("ABE-2^512", "12.3", "20.0-40.0", "0.50", "raw pixels", "[red]birds: 1,234 test"):
        assert part in shown


def test_files_that_were_left_out_are_told() -> None:
    found = record()
    assert "left out" not in markdown_table(summarize([found]))
    found["data"] = DATA | {"skipped": 1200}
    assert "training, unreadable files left out: 1,200, 80 cl" in markdown_table(summarize([found]))


def test_scores_table_cuts_nothing_on_a_narrow_terminal() -> None:
    found = record("model.num_learners=8", "train.divergence_weight=0")
    console = Console(width=80)
    with console.capture() as captured:
        console.print(scores_table([found]))
    assert "divergence" in captured.get()
    assert "…" not in captured.get()


# --- A page with a table -----------------------------------------------------------------------

PAGE = "# Title\n<!-- results:begin -->\nold\n<!-- results:end -->\nrest\n"


def test_replace_between_changes_nothing_else() -> None:
    renewed = "# Title\n<!-- results:begin -->\n\nnew\n\n<!-- results:end -->\nrest\n"
    assert replace_between(PAGE, "results", "new") == renewed
    assert replace_between(renewed, "results", "new") == renewed


@pytest.mark.parametrize(
    "text",
    [
        "",
        PAGE.replace("begin", "start"),
        PAGE.replace("end", "stop"),
        "<!-- results:end --> <!-- results:begin -->",
        PAGE.replace("results", "scores"),
    ],
)
def test_a_page_without_the_comments(text: str) -> None:
    with pytest.raises(InputError, match=r"no <!-- results:begin --> \.\.\. <!-- results:end -->"):
        replace_between(text, "results", "new")
