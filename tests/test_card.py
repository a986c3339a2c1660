"""The model card of the start that ships: how it transfers is what `results/runs.jsonl` says.

`python tests/test_card.py` writes the card's table anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from abe.config import Config
from abe.experiments import Arm, Claim
from abe.intervals import Interval, exceeds, of_means
from abe.model.weights import SOURCES
from abe.recipes import get_recipe
from abe.results import differing, flatten, is_baseline, read_records, replace_between
from abe.verdicts import Row, judge, rows_of

ROOT = Path(__file__).parents[1]
CARD = ROOT / "src/abe/model/pretrained/README.md"
IMAGES = {
    "CUB-2010, classes 101-200": "CUB-200-2010",
    "half of CARS-196, classes 99-196": "CARS-196 (training half)",
}
STARTS = {  # how their SHA-256 begins
    "the one before": "6f7b10e6635d",
    "this one": SOURCES["googlenet-mini-imagenet-v2"].checksum.removeprefix("sha256:"),
}
AHEAD = Claim("this one", "the one before")
RECIPE = get_recipe("photographs")


def is_of_recipe(record: dict[str, Any]) -> bool:
    """Whether it was trained as the recipe says, but for seed, images and start."""
    settings = [flatten(c.portable()) for c in (RECIPE, Config.from_json(record["config"]))]
    return set(differing(settings)) <= {"seed", "data.source", "model.weights"}


def rows(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Of either start, in the order of `STARTS`."""
    of_start = {
        name: [r for r in records if r["weights"] and r["weights"]["sha256"].startswith(digits)]
        for name, digits in STARTS.items()
    }
    return rows_of([Arm(name, ()) for name in STARTS], of_start)


def percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def points(difference: Interval) -> str:
    mean, low, high = (100 * each for each in (difference.mean, difference.low, difference.high))
    return f"{mean:+z.1f} ({low:z.1f} to {high:z.1f})"


def transfer() -> tuple[str, list[Interval]]:
    """The card's table, and the differences after metric learning, of the seeds of both starts."""
    every = read_records(ROOT / "results/runs.jsonl")
    lines = [
        "| images | | before: pooled features | after: held-out classes | after: test classes |",
        "|---|---|--:|--:|--:|",
    ]
    differences = []
    for title, name in IMAGES.items():
        records = [record for record in every if record["data"]["name"] == name]
        untrained = rows([record for record in records if is_baseline(record)])
        trained = rows([r for r in records if not is_baseline(r) and is_of_recipe(r)])
        ahead = judge(AHEAD, trained)
        before, held_out = [], []
        for label, own, start in zip((title, ""), trained, untrained, strict=True):
            runs = own.runs_of(ahead.pairs)
            assert start.found is not None
            before.append(start.found.scores["recall@1"])
            held_out.append([run["selection_recall@1"] for run in runs])
            tested = [run["scores"]["ensemble"]["recall@1"] for run in runs]
            shown = map(percent, ([before[-1]], held_out[-1], tested))
            lines.append(f"| {label} | {own.arm.name} | {' | '.join(shown)} |")
        assert ahead.difference is not None
        found = [of_means(np.subtract(held_out[1], held_out[0])), ahead.difference]
        cells = [f"{100 * (before[1] - before[0]):+z.1f}", *map(points, found)]
        lines.append(f"|  | difference, {ahead.seeds} seeds | {' | '.join(cells)} |")
        differences += found
    return "\n".join(lines), differences


def test_its_figures_are_those_of_the_recorded_runs() -> None:
    text = CARD.read_text(encoding="utf-8")
    table, differences = transfer()
    assert replace_between(text, "transfer", table) == text, "run `python tests/test_card.py`"
    said = " ".join(text.split())
    assert "it is nowhere behind, and these seeds settle none of the differences" in said
    assert all(each.mean >= 0 and exceeds(each) == "not shown" for each in differences)


if __name__ == "__main__":
    text = CARD.read_text(encoding="utf-8")
    CARD.write_text(replace_between(text, "transfer", transfer()[0]), encoding="utf-8")
