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
_COSTS = {"parameters": 1e6, "MACs": 1e9}  # in which units Fig. 4 has them
_KINDS = (("ABE", "ABE-M", "tab:blue", "o"), ("-head", "M-heads", "tab:orange", "s"))
_NEAR: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}


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
    """Recall@1 of every row with its interval, beside it the paper's on an axis of its own."""
    theirs = any("paper R@1" in row for row in rows)
    figure = Figure(figsize=(7 + 3 * theirs, 1 + 0.35 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 1 + theirs, sharey=True, squeeze=False)[0]
    for axes, source in zip(panels, ("ours", "the paper's"), strict=False):
        found = [
            (place, *_recall(row, source))
            for place, row in enumerate(rows)
            if source == "ours" or "paper R@1" in row
        ]
        places, recalls, below, above = zip(*found, strict=True)
        axes.errorbar(recalls, places, xerr=[below, above], fmt="o", capsize=3)
        axes.set_xlabel(f"Recall@1, %, {source}")
    panels[0].set_yticks(range(len(rows)), [row["method"] for row in rows])
    panels[0].invert_yaxis()
    return figure


def _costs(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Fig. 4: Recall@1 against parameters and multiply-accumulates, ours above the paper's.

    Each has its own axis: on other images and from another start, levels say nothing.
    """
    ours = [row for row in rows if "parameters" in row]
    theirs = [row for row in ours if "paper R@1" in row]
    sources = {"ours": ours} | ({"the paper's": theirs} if theirs else {})
    figure = Figure(figsize=(9, 3.2 * len(sources)), layout="constrained")
    panels = figure.subplots(len(sources), 2, sharex="col", sharey="row", squeeze=False)
    for (source, found), (left, right) in zip(sources.items(), panels, strict=True):
        for axes, (name, unit) in zip((left, right), _COSTS.items(), strict=True):
            for kind, title, colour, marker in _KINDS:
                line = [row for row in found if kind in row["method"]]
                recalls = [_recall(row, source) for row in line]
                axes.errorbar(
                    [row[name] / unit for row in line],
                    [recall for recall, _, _ in recalls],
                    yerr=[[low for _, low, _ in recalls], [high for _, _, high in recalls]],
                    color=colour,
                    marker=marker,
                    capsize=3,
                    label=title,
                )
                for row, (recall, _, _) in zip(line, recalls, strict=True):
                    place = (row[name] / unit, recall)
                    axes.annotate(row["method"].partition("^")[0], place, (4, 4), **_NEAR)
        left.set_ylabel(f"Recall@1, %, {source}")
    panels[-1, 0].set_xlabel("parameters, millions")
    panels[-1, 1].set_xlabel("multiply-accumulates at 224 px, thousand millions")
    panels[0, 0].legend()
    return figure


def _recall(row: Mapping[str, Any], source: str) -> tuple[float, float, float]:
    """Recall@1 in percent, and how far below and above it its interval goes."""
    if source != "ours":
        return row["paper R@1"], 0.0, 0.0
    recall, low, high = (row[name] for name in ("recall@1", "recall@1 low", "recall@1 high"))
    return 100 * recall, 100 * (recall - low), 100 * (high - recall)


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
