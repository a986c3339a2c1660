"""The picture of a reproduced table or figure: ours beside the paper's."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import load_file

from abe.checkpoint import load_selected
from abe.data.splits import Splits
from abe.errors import InputError
from abe.evaluate import pair_cosines
from abe.experiments import Experiment, full, get_experiments, small
from abe.files import replaced
from abe.report.figures import HISTOGRAM_BINS
from abe.report.pictures import mask_sheet
from abe.report.tables import csv_text, values_by_images
from abe.results import EMBEDDINGS

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
        values: the rows' figures, see `abe.report.tables.values_of`.
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
            f"{path.parent / 'runs'}: --results FILE, of a new file, has them run anew"
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
        figure = recall_figure(experiment, {"ours": found})
    else:
        return False
    save(figure, values, path)
    return True


def draw_results(names: Sequence[str], records: Iterable[dict[str, Any]], path: Path) -> None:
    """Write the picture of a table or figure of which there are results, of all their images.

    Args:
        names: of the experiment.
        records: of runs from one start.
        path: of the picture, PNG.

    Raises:
        InputError: it is not one experiment, its picture needs more than results, there are none,
            or images of the same name have runs that are not comparable.
    """
    chosen = {key: each for name in names for key, each in get_experiments(name).items()}
    if len(chosen) != 1:
        raise InputError(
            "a picture is of one table or figure: name it by --of"
            + f", one of {', '.join(chosen)}" * bool(chosen)
        )
    ((name, experiment),) = chosen.items()
    if experiment.picture in ("cosines", "masks"):
        raise InputError(f"{name} is drawn of networks, not of results: `abe reproduce {name}`")
    by_images = values_by_images(experiment, records)
    if not by_images:
        raise InputError(f"no run is of {name}, on images that it is about: nothing to draw")
    figures = [{"images": images} | row for images, rows in by_images.items() for row in rows]
    save(recall_figure(experiment, by_images), figures, path)


def recall_figure(
    experiment: Experiment, by_images: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Figure:
    """Recall@1 of every row with its interval, of each images, and the paper's.

    Each in panels of its own: on other images and from another start, levels say nothing.

    Args:
        experiment: says what Recall@1 is drawn against.
        by_images: the rows' figures, see `abe.report.tables.values_of`, by what to call the images.
    """
    papers: dict[str, dict[str, dict[str, Any]]] = {}
    for row in (row for rows in by_images.values() for row in rows if "paper R@1" in row):
        title = row["paper's images"]
        of_images = papers.setdefault(f"the paper's, {title}", {})
        of_images[row["method"]] = _papers(row)
    panels = {**by_images, **{title: list(rows.values()) for title, rows in papers.items()}}
    if experiment.picture == "costs":
        return _costs(panels)
    arms = [arm.name for each in (small(True), full()) for arm in experiment.arms(each.learners)]
    theirs = {row["method"]: row.get("paper's row") for rows in by_images.values() for row in rows}
    labels = {
        name: f"{name} ({theirs[name]})" if theirs[name] else name
        for name in sorted(theirs, key=lambda name: arms.index(name) if name in arms else -1)
    }
    return _scores(panels, labels)


def save(figure: Figure, figures: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a picture as PNG, which holds what it was drawn from as a CSV file's text.

    Raises:
        OSError: it cannot be written.
    """
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Description": csv_text(figures)})


def _papers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's figures of a row in the place of ours; it gives no intervals."""
    own = {name: row[name] for name in ("method", *_COSTS) if name in row}
    recalls = ("recall@1", "recall@1 low", "recall@1 high")
    return own | dict.fromkeys(recalls, row["paper R@1"] / 100)


def _scores(panels: Mapping[str, Sequence[Mapping[str, Any]]], labels: Mapping[str, str]) -> Figure:
    """Methods one below the other, by what to call them."""
    size = 4 + 3 * len(panels), 1 + 0.35 * len(labels)
    figure = Figure(figsize=size, layout="constrained")
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(columns, panels.items(), strict=True):
        recalls, below, above = _recalls(rows)
        places = [list(labels).index(row["method"]) for row in rows]
        axes.errorbar(recalls, places, xerr=[below, above], fmt="o", capsize=3)
        axes.set_xlabel(f"Recall@1, %\n{textwrap.fill(title, 36)}")
    columns[0].set_yticks(range(len(labels)), labels.values())
    columns[0].invert_yaxis()
    return figure


def _costs(panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Fig. 4: against parameters and multiply-accumulates, of what has any."""
    figure = Figure(figsize=(9, 0.6 + 2.6 * len(panels)), layout="constrained")
    lines = figure.subplots(len(panels), 2, sharex="col", sharey="row", squeeze=False)
    for (title, rows), (left, right) in zip(panels.items(), lines, strict=True):
        for axes, (name, unit) in zip((left, right), _COSTS.items(), strict=True):
            for kind, label, colour, marker in _KINDS:
                line = [row for row in rows if kind in row["method"] and name in row]
                recalls, below, above = _recalls(line)
                costs = [row[name] / unit for row in line]
                axes.errorbar(
                    costs,
                    recalls,
                    yerr=[below, above],
                    color=colour,
                    marker=marker,
                    capsize=3,
                    label=label,
                )
                for row, *place in zip(line, costs, recalls, strict=True):
                    axes.annotate(row["method"].partition("^")[0], place, (4, 4), **_NEAR)
            axes.margins(0.12)  # for the names
        left.set_ylabel(f"Recall@1, %\n{textwrap.fill(title, 36)}")
    lines[-1, 0].set_xlabel("parameters, millions")
    lines[-1, 1].set_xlabel("multiply-accumulates at 224 px, thousand millions")
    lines[0, 0].legend()
    return figure


def _recalls(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    """Recall@1 in percent, and how far below and above it the intervals go."""
    recalls, lows, highs = (
        [100 * row[name] for row in rows] for name in ("recall@1", "recall@1 low", "recall@1 high")
    )
    below = [recall - low for recall, low in zip(recalls, lows, strict=True)]
    above = [high - recall for recall, high in zip(recalls, highs, strict=True)]
    return recalls, below, above


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
