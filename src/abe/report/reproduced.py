"""The picture of a reproduced table or figure: ours beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import load_file

from abe.checkpoint import load_selected
from abe.data.splits import Splits
from abe.evaluate import pair_cosines
from abe.experiments import Experiment
from abe.report.figures import HISTOGRAM_BINS
from abe.report.pictures import mask_sheet
from abe.results import EMBEDDINGS
from abe.runtime import replaced

COLOURS = {"positive": "tab:blue", "negative": "tab:red", "self": "tab:green"}  # as in Fig. 5


def draw(
    experiment: Experiment,
    values: Sequence[Mapping[str, Any]],
    folders: Mapping[str, Path],
    splits: Splits,
    path: Path,
    console: Console,
) -> bool:
    """Write the picture as PNG.

    Args:
        experiment: says which picture.
        values: the rows' figures, see `abe.verdicts.values_of`.
        folders: of a run of each arm, by its name.
        splits: the images.
        path: of the picture.
        console: is told what cannot be drawn.

    Returns:
        False if there is nothing to draw: no results, or those of runs whose folders are elsewhere.
    """
    found = [row for row in values if "recall@1" in row]
    here = {name: folder for name, folder in folders.items() if (folder / EMBEDDINGS).exists()}
    if experiment.picture in ("cosines", "masks") and (gone := folders.keys() - here.keys()):
        console.print(
            f"{path.name} needs the run folders of {', '.join(sorted(gone))}, which are not in "
            f"{path.parent / 'runs'}: remove their lines from the results to run them anew"
        )
    if experiment.picture == "masks":
        for folder in here.values():
            checkpoint = load_selected(folder)
            sheet = mask_sheet(
                checkpoint.build_model().eval(), checkpoint.preprocessing, splits.test
            )
            with replaced(path) as file:
                sheet.save(file, "PNG")
            return True
        return False
    if experiment.picture == "cosines":
        if not here:
            return False
        figure = _cosines(here, splits)
    elif found:
        figure = _costs(found) if experiment.picture == "costs" else _scores(found)
    else:
        return False
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True


def _scores(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Recall@1 of every row with its interval, and the paper's."""
    figure = Figure(figsize=(7, 1 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    ours = [100 * row["recall@1"] for row in rows]
    beside = [
        [100 * (row["recall@1"] - row["recall@1 low"]) for row in rows],
        [100 * (row["recall@1 high"] - row["recall@1"]) for row in rows],
    ]
    axes.errorbar(ours, places, xerr=beside, fmt="o", capsize=3, label="ours")
    theirs = [(row["paper R@1"], place) for place, row in enumerate(rows) if "paper R@1" in row]
    if theirs:
        axes.plot(*zip(*theirs, strict=True), "D", mfc="none", label="the paper's, of its images")
    axes.set_yticks(places, [row["method"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("Recall@1, %")
    axes.legend()
    return figure


def _costs(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Fig. 4: Recall@1 against parameters and multiply-accumulates."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    scales = {"parameters": "parameters, 10^7", "MACs": "multiply-accumulates, 10^9"}
    for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), scales.items(), strict=True):
        for kind, marker in (("ABE", "o-"), ("head", "s--")):
            line = [row for row in rows if kind in row["method"] and name in row]
            unit = 1e7 if name == "parameters" else 1e9
            x = [row[name] / unit for row in line]
            axes.plot(x, [100 * row["recall@1"] for row in line], marker, label=f"{kind}, ours")
            theirs = [row.get("paper R@1") for row in line]
            if all(value is not None for value in theirs):
                axes.plot(x, theirs, marker, mfc="none", alpha=0.4, label=f"{kind}, the paper's")
        axes.set_xlabel(label)
    axes.legend()
    figure.supylabel("Recall@1, %")
    return figure


def _cosines(folders: Mapping[str, Path], splits: Splits) -> Figure:
    """Fig. 5: histograms of positive, negative and self pairs."""
    figure = Figure(figsize=(4 * len(folders), 3), layout="constrained")
    labels = torch.as_tensor(splits.test.labels)
    panels = figure.subplots(1, len(folders), squeeze=False)[0]
    for axes, (name, folder) in zip(panels, folders.items(), strict=True):
        embeddings = load_file(folder / EMBEDDINGS)["embeddings"]
        for kind, cosines in pair_cosines(embeddings, labels).items():
            if len(cosines):
                axes.hist(
                    cosines.numpy(),
                    HISTOGRAM_BINS,
                    (-1, 1),
                    density=True,
                    histtype="step",
                    color=COLOURS[kind],
                    label=kind,
                )
        axes.set_title(name)
        axes.set_xlabel("cosine")
    panels[0].legend()
    return figure
