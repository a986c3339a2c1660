"""`abe report`: one page about finished runs that needs no other file and asks no server.

N test images in order, M learners; every figure on the page is computed from the runs' folders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePath
from statistics import median
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console
from torch import Tensor

from abe.checkpoint import load_selected
from abe.data.datasets import LabelledImages
from abe.data.splits import Splits, open_splits
from abe.errors import InputError
from abe.evaluate import pair_cosines
from abe.files import replace_text
from abe.metrics import have_match
from abe.neighbors import nearest_neighbors
from abe.report import figures
from abe.report.pictures import (
    QUERIES,
    RESULTS,
    THUMBNAIL,
    nearest_others,
    seen,
    spread,
)
from abe.report.runs import Run, read_runs
from abe.results import data_title, differing, weights_name

FAILED_QUERIES = 2  # of those shown, how many go wrong at the first rank
CHANNELS, CHANNEL_IMAGES = 3, 2  # single channels of the masks, and the images they are shown on
OUTER_LAYERS = 3  # at either end, whose update-to-weight ratios are listed
STYLES = 8  # of lines, in the page's style sheet


def write_report(runs: Sequence[Path], output: Path, console: Console | None = None) -> None:
    """Write a page about runs on the same test images.

    Args:
        runs: folders of finished runs and of baselines, at least one of a run.
        output: the HTML file; replaced if it exists.
        console: where to report.

    Raises:
        InputError: a run that is not finished or damaged, runs on different test images, images
            that are no longer what or where the run found them, or an `output` that cannot be
            written.
    """
    console = console or Console(stderr=True)
    loaded = read_runs(runs)
    trained = sorted((r for r in loaded if r.config), key=lambda r: r.preference, reverse=True)
    featured = trained[0]
    styles = {run.label: f"line-{number % STYLES}" for number, run in enumerate(trained)}
    attentive = next((run for run in trained if run.has_attention), None)

    console.print("Opening the test images ...")
    splits = _open_splits(featured)
    gallery = splits.gallery
    matched = have_match(splits.test.labels, None if gallery is None else gallery.labels)
    queries = _choose_queries(featured, splits, matched)
    console.print("Drawing the report ...")
    page = _template().render(
        featured=featured,
        runs=loaded,
        trained=trained,
        compared=_compared(featured, loaded),
        queries=int(matched.sum()),
        title=data_title(featured.record["data"]),
        columns=[k for k in featured.record["scores"]["ensemble"] if k.startswith("recall@")],
        styles=styles,
        curves=_curves(trained, styles),
        histograms=_histograms(trained, splits.test.labels),
        attentive=attentive,
        masks=attentive and _masks(attentive, splits.test, queries),
        retrieved=_retrieved(featured, loaded, splits, queries),
        facts=_facts(loaded),
        settings=_differing_settings([run for run in loaded if run.config]),
        updates={run.label: _updates(run.log) for run in trained},
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Names of files and classes need not be UTF-8.
        replace_text(output, page)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}") from None


def _open_splits(run: Run) -> Splits:
    """The images of a run, read from where they are when they are asked for."""
    assert run.config is not None
    key = "data.source" if run.config.data.root is None else "data.root"
    advice = f"put the images back, or correct {key} in {run.path / 'config.json'}"
    try:
        data = run.config.data.model_copy(update={"cache": False})
        splits = open_splits(data, run.config.protocol, check=False)
    except InputError as error:
        raise InputError(f"the images of {run.path} cannot be opened: {error}; {advice}") from None
    if len(splits.test) != run.record["data"]["test_images"]:
        raise InputError(
            f"{run.path} was tested on {run.record['data']['test_images']} images, "
            f"{run.config.data.source} has {len(splits.test)} now: {advice}"
        )
    if run.images_digest not in (None, splits.digest):
        raise InputError(
            f"images or classes of {run.config.data.source} were added, removed or renamed since "
            f"{run.path} was tested on them: {advice}"
        )
    return splits


def _compared(featured: Run, runs: list[Run]) -> list[Run]:
    """What the finding names beside the run that the page is about: baselines, or else runs."""
    others = [run for run in runs if not run.config] or [r for r in runs if r is not featured]
    return sorted(others, key=lambda run: run.recall, reverse=True)[:2]


def _curves(runs: list[Run], styles: dict[str, str]) -> list[figures.Chart]:
    ensembles = [run for run in runs if len(run.learners_recall) > 1]
    protocols = {run.record["protocol"] for run in runs}
    selection = "selection images" if "paper" in protocols else "held-out classes"
    charts = [
        figures.line_chart(
            title,
            y_label,
            {
                run.label: (styles[run.label], figures.series(run.log, key, factor))
                for run in chosen
            },
        )
        for title, y_label, key, factor, chosen in (
            (f"Recall@1 on {selection}", "%", "recall_at_1", 100, runs),
            ("Loss", "Eq. 8", "loss", 1, runs),
            ("Divergence loss", "Eq. 9", "divergence", 1, ensembles),
            ("Learners' cosine", "mean over pairs", "learner_cosine", 1, ensembles),
        )
    ]
    return [chart for chart in charts if chart]


def _histograms(runs: list[Run], labels: NDArray[np.int64]) -> list[figures.Chart]:
    """Fig. 5 for each run."""
    classes = torch.as_tensor(labels)
    cosines = {
        run.label: pair_cosines(run.embeddings, classes)
        for run in runs
        if run.embeddings is not None
    }
    low = min(
        values.min().item()
        for of_run in cosines.values()
        for values in of_run.values()
        if len(values)
    )
    return [
        figures.histogram_chart(label, of_run, max(-1, math.floor(10 * low) / 10))
        for label, of_run in cosines.items()
    ]


def _choose_queries(run: Run, splits: Splits, matched: NDArray[np.bool_]) -> list[int]:
    """Images spread evenly over those whose first result is right, and over those where not.

    Raises:
        InputError: no image has a match, or the run's Recall@1 does not come out: the labels are
            not those it was scored by.
    """
    if not matched.any():
        raise InputError(
            f"by the classes of the images as they are now, none of the test images of {run.path} "
            "has another of its class: put the images back as they were"
        )
    nearest = nearest_neighbors(run.ensemble, run.ensemble_gallery, 1).indices[:, 0].numpy()
    candidates = splits.test if splits.gallery is None else splits.gallery
    right = candidates.labels[nearest] == splits.test.labels
    if abs(right[matched].mean() - run.recall) > 0.01:  # a GPU's rounding flips near-ties
        raise InputError(
            f"{run.path} has Recall@1 {run.recall:.3f}, by the classes of its images as they are "
            f"now it would be {right[matched].mean():.3f}: put the images back as they were"
        )
    failures = spread(np.flatnonzero(~right & matched), FAILED_QUERIES)
    return spread(np.flatnonzero(right), QUERIES - len(failures)) + failures


def _masks(run: Run, test: LabelledImages, queries: list[int]) -> dict[str, Any]:
    """Fig. 6: what each learner lets through, by the run's selected checkpoint."""
    checkpoint = load_selected(run.path)
    crops, masks = seen(checkpoint.build_model(), checkpoint.preprocessing, test, queries)

    def row(image: int, learners: Tensor, channel: int | None = None) -> dict[str, Any]:
        return {
            "picture": figures.data_uri(Image.fromarray(crops[image]), THUMBNAIL),
            "class_name": test.class_names[int(test.labels[queries[image]])],
            "channel": channel,
            "low": learners.min().item(),
            "high": learners.max().item(),
            "learners": [
                figures.data_uri(overlay, THUMBNAIL)
                for overlay in figures.overlays(crops[image], learners)
            ],
        }

    channels = figures.selective_channels(masks, CHANNELS)
    return {
        "means": [row(image, masks[image].mean(1)) for image in range(len(queries))],
        "channels": [
            row(image, masks[image, :, channel], channel)
            for channel in channels
            for image in range(min(CHANNEL_IMAGES, len(queries)))
        ],
    }


def _retrieved(
    featured: Run, runs: list[Run], splits: Splits, queries: list[int]
) -> list[dict[str, Any]]:
    """The first results of each query: by one run of each method, by the learners of `featured`."""
    methods = {run.record["method"]: run for run in reversed(runs) if run.embeddings is not None}
    methods |= {featured.record["method"]: featured}
    ensembles = {
        run.label: nearest_others(run.ensemble, run.ensemble_gallery, queries, RESULTS)
        for run in sorted(methods.values(), key=lambda run: run.recall, reverse=True)
    }
    assert featured.embeddings is not None
    learners = {
        f"learner {number} alone": nearest_others(
            learner,
            None if featured.gallery is None else featured.gallery[:, number - 1],
            queries,
            RESULTS,
        )
        for number, learner in enumerate(featured.embeddings.unbind(1), start=1)
    }
    test = splits.test
    candidates = test if splits.gallery is None else splits.gallery

    @cache
    def image(index: int, of_candidates: bool) -> dict[str, Any]:
        images = candidates if of_candidates else test
        square = ImageOps.fit(images.load(index), (THUMBNAIL, THUMBNAIL))
        return {
            "picture": figures.data_uri(square, THUMBNAIL),
            "class_name": images.class_names[int(images.labels[index])],
            "file": PurePath(images.describe(index)).name,
        }

    def rows(searches: dict[str, list[list[int]]], number: int) -> list[dict[str, Any]]:
        own = test.labels[queries[number]]
        return [
            {
                "name": name,
                "results": [
                    image(index, True) | {"right": bool(candidates.labels[index] == own)}
                    for index in found[number]
                ],
            }
            for name, found in searches.items()
        ]

    return [
        {
            "query": image(query, False),
            "ensembles": rows(ensembles, number),
            "learners": rows(learners, number) if len(learners) > 1 else [],
        }
        for number, query in enumerate(queries)
    ]


def _facts(runs: list[Run]) -> dict[str, list[str]]:
    """What identifies each run; fact -> one value for each run."""

    def of(run: Run) -> dict[str, Any]:
        record, software = run.record, run.record["environment"]
        weights = record["weights"]
        return {
            "Folder": run.path,
            "Configuration": record["config_digest"],
            "Seed": record["seed"],
            "Selected step": record["selected_step"],
            "Weights": weights and weights_name(weights),
            "Date": record["date"],
            "abe": " ".join(filter(None, (software["abe"], software["commit"]))),
            "Python, torch": f"{software['python']}, {software['torch']}",
            "Hardware": software["gpu"] or f"{software['cpu']}; threads: {software['threads']}",
            "Precision": software["precision"],
        }

    facts = [of(run) for run in runs]
    return {name: [_text(fact[name]) for fact in facts] for name in facts[0]}


def _differing_settings(runs: list[Run]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs; setting -> one value for each run."""
    settings = [run.settings for run in runs]
    return {key: [_text(each.get(key)) for each in settings] for key in differing(settings)}


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def _updates(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Update-to-weight ratios of the outermost layers over the logged steps."""
    logged = [line["update_to_weight"] for line in log if line.get("update_to_weight")]
    if not logged:
        return []
    layers = list(logged[0])
    outermost = dict.fromkeys(layers[:OUTER_LAYERS] + layers[-OUTER_LAYERS:])
    return [
        {
            "layer": layer,
            "first": logged[0][layer],
            "median": median(ratios[layer] for ratios in logged),
            "last": logged[-1][layer],
        }
        for layer in outermost
    ]


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("abe", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda fraction: f"{100 * fraction:.1f}"
    environment.filters["method"] = _superscript
    environment.filters["breakable"] = _breakable
    return environment.get_template("report.html.jinja")


def _superscript(method: str) -> Markup:
    """The paper's ABE-8^512, with the size of the embedding raised."""
    return Markup(re.sub(r"\^(\d+)", r"<sup>\1</sup>", str(escape(method))))


def _breakable(name: str) -> Markup:
    """A class or file name that may be broken after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))
