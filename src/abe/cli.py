"""The command `abe`: its verbs parse, call and print; the work is in the modules they import.

Heavy modules are imported inside the verbs, so that `abe --help` answers at once. Results go to
standard output, progress and errors to standard error.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO

import typer
from rich.console import Console
from rich.text import Text

from abe import __version__
from abe.errors import InputError
from abe.launch import launched_rank

if TYPE_CHECKING:
    from abe.config import Config

app = typer.Typer(
    name="abe",
    help="Learn image embeddings with an attention-based ensemble, measure them, look at them.\n\n"
    "`abe demo` is the place to start; `abe VERB --help` tells more.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Paths are printed as they are: neither wrapped, nor read as markup, nor coloured.
_PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False, "emoji": False, "highlight": False}
data_app = typer.Typer(
    name="data",
    help="Fetch and check benchmarks; prepare images.",
    no_args_is_help=True,
)
app.add_typer(data_app)
# Of processes that torchrun or SLURM started together only the first reports.
_RANK = launched_rank() or 0
out = Console(**_PLAIN, quiet=_RANK > 0)
err = Console(stderr=True, **_PLAIN, quiet=_RANK > 0)

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, e.g. train.lr=1e-4; `abe config --explain` lists all. Repeatable.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="START",
        help="Pretrained start: a file, a checkpoint, a published network's name, or none.",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Settings to begin from: photographs (small images, for CPUs), demo (smaller still) "
        "or paper (section 4; for a GPU). Default: photographs.",
    ),
]
Source = Annotated[
    str | None,
    typer.Argument(
        metavar="DATA",
        help="Folder with one sub-folder of images a class, or made by `abe data prepare`; CSV "
        "file with the columns path, label and optionally split and x1, y1, x2, y2; or with --root "
        "a benchmark's name. "
        "Default: images drawn by abe.",
    ),
]
Root = Annotated[
    str | None,
    typer.Option(
        "--root", metavar="FOLDER", help="Where the benchmark was unpacked: see `abe data list`."
    ),
]
AllowPartial = Annotated[
    bool,
    typer.Option(
        "--allow-partial", help="Go on with a part of a benchmark, and say so in every result."
    ),
]
Benchmark = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a benchmark: see `abe data list`.")
]
Unpacked = Annotated[
    Path,
    typer.Option(
        "--root", metavar="FOLDER", help="Where its archives are, or are to be, unpacked."
    ),
]
OtherSource = Annotated[
    str | None,
    typer.Argument(
        metavar="DATA",
        help="Other images to score: all classes that the run has not learned, or the test of "
        "their own split. Default: the run's.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps ... Default: the fastest there is."),
]
OtherDevice = Annotated[
    str | None, typer.Option(metavar="NAME", help="Another device than the run's.")
]
Results = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON-lines file to add the result to. Default: runs.jsonl beside the run.",
    ),
]
SplitClasses = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the classes to train with, the rest is the test; a CSV file's column split "
        "goes first. Default: 0.5.",
    ),
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out files that cannot be read.")
]


def _configure(recipe: str | None, overrides: list[str] | None, **settings: object) -> Config:
    """A recipe with the settings of the options that were given, then with those of --set."""
    from abe.recipes import get_recipe

    return get_recipe(recipe or "photographs").with_overrides(_settings(overrides, **settings))


def _settings(overrides: list[str] | None, **settings: object) -> list[str]:
    """What `Config.with_overrides` takes, of the options that were given and then of --set."""
    names = {
        "data": "data.source",
        "root": "data.root",
        "weights": "model.weights",
        "device": "device",
        "split_classes": "data.split_classes",
        "skip_broken": "data.skip_broken",
        "allow_partial": "data.allow_partial",
    }
    if settings.get("data") == "synthetic" and Path("synthetic").exists():
        raise InputError(
            "synthetic is what abe draws: images of your own in a folder of this name are "
            "./synthetic; for drawn ones leave it out"
        )
    chosen = [
        f"{names[option]}={json.dumps(None if (option, value) == ('weights', 'none') else value)}"
        for option, value in settings.items()
        if value is not None and value is not False
    ]
    return [*chosen, *(overrides or [])]


@app.command()
def train(
    data: Source = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="FOLDER",
            help="Folder to make for the run. Default: runs/<recipe>-<digest of all settings>.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Go on with the run in this folder where it stopped."),
    ] = None,
    root: Root = None,
    recipe: Recipe = None,
    weights: Weights = None,
    device: Device = None,
    split_classes: SplitClasses = None,
    skip_broken: SkipBroken = False,
    allow_partial: AllowPartial = False,
    results: Results = None,
    overrides: Overrides = None,
) -> None:
    """Train an ensemble and score it on classes it has not seen.

    Half of the classes is for training, the other half is the test (--split-classes, or
    the column split of a CSV file). A part of the training classes is held out to pick the best
    checkpoint, which is scored on the test once, at the end. Ctrl-C saves and says how to go on.
    """
    from abe.results import append_record, scores_table
    from abe.train import Trainer

    if resume is not None:
        given = (data, run, root, recipe, weights, skip_broken, allow_partial)
        if any(given) or split_classes is not None:
            raise InputError(
                "--resume goes on as the run was started: give nothing with it but --results, "
                "--device or a --set that changes no result"
            )
        trainer = Trainer.resume(resume, err, device=device, overrides=overrides or ())
    else:
        config = _configure(
            recipe,
            overrides,
            data=data,
            root=root,
            weights=weights,
            device=device,
            split_classes=split_classes,
            skip_broken=skip_broken,
            allow_partial=allow_partial,
        )
        folder = run or Path("runs", f"{config.recipe}-{config.digest}")
        trainer = Trainer(config, folder, err)
    file = _results_file(results, trainer.run)
    record = trainer.fit()
    if record is None:
        raise typer.Exit(130)
    if _RANK == 0:
        append_record(file, record)
    out.print(scores_table([record]))
    out.print(f"Run: {trainer.run}\nResult added to {file}")


@app.command()
def pretrain(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Folder, CSV file, or with --root a benchmark's name: as `train`. "
            "Default: images drawn by abe.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Folder to make. Default: runs/pretrain-<backbone>-<data>.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Go on in this folder where it stopped."),
    ] = None,
    root: Root = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="googlenet (default), googlenet_bn or resnet50: what to start."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Passes over the images. Default: 30.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="IMAGES", help="Images a step. Default: 128.")
    ] = None,
    resize: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Side of the padded square. Default: 84.")
    ] = None,
    crop: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Side of what the network sees. Default: 64."),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="RATE", help="Highest learning rate. Default: 0.03.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Another one, another start. Default: 0.")
    ] = None,
    device: Device = None,
    skip_broken: SkipBroken = False,
    allow_partial: AllowPartial = False,
) -> None:
    """Make a start for --weights: train a backbone to classify.

    All classes are learned, and a few images of each are held out to measure the start by. It is
    written into the folder with a model card. Ctrl-C saves and says how to go on.
    """
    from abe.config import ModelConfig, PretrainConfig
    from abe.pretrain import Pretrainer
    from abe.runtime import typed

    of_data = {
        "source": data,
        "root": root,
        "resize": resize,
        "crop": crop,
        "skip_broken": skip_broken or None,
        "allow_partial": allow_partial or None,
    }
    settings = {
        "backbone": backbone,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "device": device,
    }
    if resume is not None:
        moved = {"source": None, "root": None, "device": None}
        given = of_data | settings | moved | {"folder": folder}
        if any(value is not None for value in given.values()):
            raise InputError(
                "--resume goes on as it was begun: give only --device with it, or where the images "
                "are now, by --data or --root"
            )
        pretrainer = Pretrainer.resume(resume, err, device=device, data=data, root=root)
    else:
        values = PretrainConfig().to_json()
        values["data"] |= {key: value for key, value in of_data.items() if value is not None}
        values |= {key: value for key, value in settings.items() if value is not None}
        config = PretrainConfig.from_json(values).anchored()
        pretrainer = Pretrainer(config, folder or Path("runs", f"pretrain-{config.name}"), err)
    file = pretrainer.fit()
    if file is None:
        raise typer.Exit(130)
    name = pretrainer.config.backbone
    other = () if name == ModelConfig().backbone else ("--set", f"model.backbone={name}")
    command = typed("train", "DATA", "--weights", file, *other)
    out.print(f"Start: {file}\nTo train from it: {command}")


@app.command("eval")
def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one of its checkpoints.")
    ],
    data: OtherSource = None,
    root: Root = None,
    device: OtherDevice = None,
    allow_partial: AllowPartial = False,
    results: Results = None,
) -> None:
    """Score a run's ensemble and each of its learners once more."""
    from abe.evaluate import evaluate_run
    from abe.results import append_record, scores_table

    if not run.exists():
        raise InputError(f"{run}: there is no such run")
    if allow_partial and data is None and root is None:
        raise InputError(
            "--allow-partial has no effect on the run's own images: give DATA or --root with it, "
            "or leave it out"
        )
    file = _results_file(results, run)
    record = evaluate_run(run, data, root, allow_partial, device)
    if _RANK == 0:
        append_record(file, record)
    out.print(scores_table([record]))
    out.print(f"Result added to {file}")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs on the same images.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="HTML file to write.")
    ] = Path("report.html"),
) -> None:
    """Write an HTML page about runs: curves, masks, neighbours."""
    from abe.report.html import write_report

    write_report(runs, output, err)
    out.print(f"Report: {output}")


@app.command()
def results(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON-lines file that train and eval add to.")
    ],
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a Markdown page: the paper's claims, each with a verdict."
        ),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Put the tables into this Markdown file, between its comments "
            "<!-- results:begin --> and <!-- results:end -->.",
        ),
    ] = None,
    experiments: Annotated[
        list[str] | None,
        typer.Option(
            "--of",
            metavar="NAME",
            help="Only rows of this table or figure, as `abe reproduce` names it. Repeatable.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only networks that began with weights of this name."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the table or figure that --of names, as PNG, of all images."
        ),
    ] = None,
) -> None:
    """Print Markdown tables of results, averaged over seeds.

    Runs that differ in their learning rate alone are one row: that of the rate with the best
    Recall@1 on held-out classes.
    """
    from abe.files import replace_text
    from abe.results import markdown_table, read_records, replace_between, summarize

    records = read_records(file)
    if page is not None:
        from abe.report.results_page import results_page

        if experiments or start is not None:
            raise InputError("--page has all results: leave out --of and --start")

        replace_text(page, results_page(records))
    if experiments or start is not None:
        from abe.selection import select

        records = select(records, experiments or (), start)
    if picture is not None:
        from abe.report.reproduced import draw_results

        draw_results(experiments or (), records, picture)
    table = markdown_table(summarize(records))
    if into is None and page is None and picture is None:
        typer.echo(table)
    if into is not None:
        try:
            text = replace_between(into.read_text(encoding="utf-8"), "results", table)
        except ValueError as error:  # not in UTF-8, or without the comments
            raise InputError(f"{into}: {error}") from None
        replace_text(into, text)


@app.command()
def demo(
    data: Source = None,
    root: Root = None,
    folder: Annotated[
        Path, typer.Option("--folder", metavar="FOLDER", help="Folder to work in.")
    ] = Path("demo"),
    device: Device = None,
    split_classes: SplitClasses = None,
    skip_broken: SkipBroken = False,
    allow_partial: AllowPartial = False,
    overrides: Overrides = None,
) -> None:
    """Compare 1-head and ABE-4 in minutes and write a report.

    Each has the rate that held-out classes chose for it: train.lr is ABE-4's, and 1-head's is 10/3
    of it. Beside them: raw pixels, and the pretrained start before it is trained. A demo that was
    interrupted goes on when it is called again.
    """
    from abe.demo import run_demo
    from abe.results import scores_table
    from abe.runtime import typed

    base = _configure(
        "demo",
        overrides,
        data=data,
        root=root,
        device=device,
        split_classes=split_classes,
        skip_broken=skip_broken,
        allow_partial=allow_partial,
    )
    records, page = run_demo(base, folder, err, go_on=typed(*sys.argv[1:]))
    out.print(scores_table(records))
    out.print(f"Report: {page}")


@app.command()
def reproduce(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...", help="table1 ... table8, fig4 ... fig7, width, losses or protocol."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Images, as `abe train` takes them. Default: with --root the paper's, else images "
            "drawn by abe.",
        ),
    ] = None,
    root: Root = None,
    scale: Annotated[
        Literal["full", "small"],
        typer.Option(help="full: the paper's setting, for a GPU; small: cut to fit a laptop."),
    ] = "small",
    rows: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="ROW", help="Run only this row, e.g. ABE-4^512. Repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 3,
    rates: Annotated[
        list[float] | None,
        typer.Option(
            "--rate",
            metavar="RATE",
            help="Learning rate to choose from, by held-out classes, of rows that choose: of those "
            "that --row names, else of all that have none of their own. Repeatable. Default: the "
            "row's or the scale's.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Begin no run that would end later, e.g. 90s, 30m or 2h."
        ),
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="List the missing runs and about how long they take.")
    ] = False,
    folder: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="For runs, tables and pictures."),
    ] = Path("reproduced"),
    results: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Lines of runs: what is there is not run again."),
    ] = Path("results/runs.jsonl"),
    device: Device = None,
    split_classes: SplitClasses = None,
    skip_broken: SkipBroken = False,
    allow_partial: AllowPartial = False,
    overrides: Overrides = None,
) -> None:
    """Repeat tables and figures of the paper on your images.

    Every row has the same steps and chooses its rate by held-out classes, in the mean over the
    seeds; those of fig7a, fig7b, width and protocol have the recipe's, of fig7c one for each loss.
    An interrupted or exhausted budget goes on when the same command is given again; rows that the
    results file has are not run again. Writes Markdown, CSV and a picture.
    """
    from dataclasses import replace

    from abe.experiments import check_changes, full, get_experiments, small
    from abe.reproduce import Reproduction, dry_run
    from abe.reproduce import reproduce as run
    from abe.runtime import typed

    experiments = {key: each for name in names for key, each in get_experiments(name).items()}
    limit = None if budget is None else seconds_of(budget, "--budget")
    own = list(dict.fromkeys(name for each in experiments.values() for name in each.benchmarks))
    if root is not None and data is None:
        first, *others = {each.benchmarks[0] for each in experiments.values()}
        if others:
            raise InputError(f"these are of several benchmarks: --data {' or '.join(own)}")
        data = first
        if others := [f"--data {name}" for name in own if name != data]:
            err.print(f"Of {data}; for the others give {' or '.join(others)}.", highlight=False)
    if scale == "full" and data is None:
        raise InputError(f"--scale full needs photographs: --data {' or '.join(own)} --root FOLDER")
    chosen = full() if scale == "full" else small(data is not None)
    check_changes(experiments, chosen.learners, rows=rows, rates=rates, overrides=overrides)
    settings = _settings(
        overrides,
        data=data,
        root=root,
        device=device,
        split_classes=split_classes,
        skip_broken=skip_broken,
        allow_partial=allow_partial,
    )
    base = chosen.base.with_overrides(settings)
    chosen = replace(chosen, base=base)
    if rates:
        experiments = {key: each.at_rates(tuple(rates), rows) for key, each in experiments.items()}
    whole = Reproduction(chosen, scale, results, folder, err, seeds, rows)
    if dry:
        out.print(dry_run(whole, experiments))
        return
    results.parent.mkdir(parents=True, exist_ok=True)

    def show(files: list[Path]) -> None:
        typer.echo(files[0].read_text(encoding="utf-8"))
        out.print(f"Written: {', '.join(map(str, files))}")

    if not run(whole, experiments, budget=limit, go_on=typed(*sys.argv[1:]), show=show):
        raise typer.Exit(130)


@app.command()
def sweep(
    data: Source = None,
    root: Root = None,
    recipe: Recipe = None,
    weights: Weights = None,
    device: Device = None,
    split_classes: SplitClasses = None,
    skip_broken: SkipBroken = False,
    allow_partial: AllowPartial = False,
    overrides: Overrides = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="What to search: train.lr, train.margin, train.divergence_weight or "
            "train.normalization. Repeatable. Default: all four.",
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many, with those that are done.")
    ] = 20,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Begin no trial after this time of all trials together: 90s, 30m or 2h.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            metavar="FOLDER",
            help="Folder to work in. Default: runs/sweep-<recipe>-<digest of all settings>, with "
            "the keys and the seed that are given.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Another one proposes other settings.")
    ] = 0,
) -> None:
    """Search learning rate, margin, divergence and normalisation.

    Trials are judged by Recall@1 on held-out training classes; the test images are not scored. A
    sweep that was interrupted goes on when it is called again. Needs the package optuna.
    """
    from abe.runtime import typed
    from abe.sweep import KEYS, best_trial, run_sweep, trials_table

    base = _configure(
        recipe,
        overrides,
        data=data,
        root=root,
        weights=weights,
        device=device,
        split_classes=split_classes,
        skip_broken=skip_broken,
        allow_partial=allow_partial,
    )
    keys = sorted({*(search or KEYS)})
    parts = [*keys * (keys != sorted(KEYS)), *[str(seed)] * (seed > 0)]
    folder = folder or Path("runs", "-".join(["sweep", base.recipe, base.digest, *parts]))
    done = run_sweep(
        base,
        folder,
        err,
        keys=keys,
        trials=trials,
        budget=None if budget is None else seconds_of(budget, "--budget"),
        seed=seed,
        go_on=typed(*sys.argv[1:]),
    )
    out.print(trials_table(done))
    out.print(f"Trials: {folder / 'trials.jsonl'}")
    if best := best_trial(done):
        out.print(f"Best: {' '.join(f'--set {setting}' for setting in best.overrides)}")


@app.command()
def summary(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of objects instead of a table.")
    ] = False,
) -> None:
    """Count parameters and operations of the paper's networks.

    Ours and the paper's for the 13 networks of Tables 1 and 8. The paper's "flops" are
    multiply-accumulates.
    """
    from abe.model.summary import summary_rows, summary_table

    rows = summary_rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        out.print(summary_table(rows))


@app.command()
def config(
    data: Source = None,
    root: Root = None,
    recipe: Recipe = None,
    weights: Weights = None,
    device: Device = None,
    split_classes: SplitClasses = None,
    skip_broken: SkipBroken = False,
    allow_partial: AllowPartial = False,
    overrides: Overrides = None,
    explained: Annotated[
        bool, typer.Option("--explain", help="Print a table instead: what each takes and means.")
    ] = False,
) -> None:
    """Print all settings that `abe train` would use, as JSON.

    Each can be changed by --set, for example --set train.lr=1e-4 --set model.network=m-heads.
    """
    from rich.table import Column, Table

    from abe.config import explain

    resolved = _configure(
        recipe,
        overrides,
        data=data,
        root=root,
        weights=weights,
        device=device,
        split_classes=split_classes,
        skip_broken=skip_broken,
        allow_partial=allow_partial,
    )
    if not explained:
        typer.echo(json.dumps(resolved.to_json(), indent=2))
        return
    others = (Column(name, overflow="fold") for name in ("is", "takes", "meaning"))
    table = Table(Column("setting", no_wrap=True), *others, box=None, pad_edge=False)
    for setting in explain(resolved):
        table.add_row(*setting)
    out.print(table)


@data_app.command()
def check(
    name: Benchmark,
    root: Unpacked,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead.")] = False,
    lists: Annotated[
        bool, typer.Option("--lists", help="Compare lists and file names; read no image.")
    ] = False,
) -> None:
    """Compare a copy of a benchmark with what its publisher ships.

    Ends with status 0 if it is complete, and with status 2 and what differs if it is not.
    """
    from abe.data.benchmarks import find_benchmark

    copy = find_benchmark(name).check(root, decode=not lists, console=err)
    if as_json:
        typer.echo(json.dumps(copy.to_json(), indent=2))
        raise typer.Exit(0 if copy.complete else 2)
    out.print(str(copy.require()))


@data_app.command()
def get(name: Benchmark, root: Unpacked) -> None:
    """Fetch a benchmark from its publisher, unpack it, and check it.

    A download that was interrupted goes on. Files that you have put into the folder are verified
    instead of fetched. Archives stay in the folder.
    """
    from abe.data.download import get

    out.print(str(get(name, root, err)))


@data_app.command("list")
def list_benchmarks() -> None:
    """List the benchmarks, with the sizes that a copy has to have."""
    from abe.data.benchmarks import benchmarks_table

    out.print(benchmarks_table())


@data_app.command("prepare")
def prepare_data(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Folder, CSV file, or with --root a benchmark's name: as `train`."
        ),
    ],
    root: Root = None,
    size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=8,
            help="Side of the squares: data.resize of what is to be trained. Default: that of "
            "`abe train DATA`, 128.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Folder to make. Default: <DATA>-<PIXELS>."),
    ] = None,
    skip_broken: SkipBroken = False,
    allow_partial: AllowPartial = False,
) -> None:
    """Decode images once, into a folder that `abe train FOLDER` reads in their place.

    An interrupted preparation goes on where it was when the same command is given again.
    """
    from abe.config import DataConfig
    from abe.data.datasets import ImageFiles
    from abe.data.prepare import prepare
    from abe.data.splits import open_source
    from abe.recipes import photographs

    size = size or photographs().data.resize
    settings = {"root": root, "allow_partial": allow_partial, "resize": size, "crop": size}
    source = open_source(DataConfig(source=data, **settings))
    if not isinstance(source.images, ImageFiles):
        raise InputError(f"{data} has no files to decode: train on it as it is")
    folder = folder or Path(f"{data if root else source.images.name}-{size}")
    images, _, _, _, skipped = prepare(
        source.images,
        folder,
        source=root or data,
        split=source.split,
        ks=source.ks,
        stamps=source.stamps,
        side=size,
        skip_broken=skip_broken,
        console=err,
    )
    out.print(f"{folder}: {len(images):,} images" + f", {skipped:,} left out" * bool(skipped))


@data_app.command("verify")
def verify_data(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A prepared folder.")],
) -> None:
    """Compare all images of a prepared folder, and their files, with their checksums."""
    from abe.data.prepare import verify

    out.print(f"{folder}: {len(verify(folder, err).images):,} images as they were prepared")


def _results_file(chosen: Path | None, run: Path) -> Path:
    """Where a result goes, the chosen file or runs.jsonl beside the run; made sure of in advance.

    `run` is the run's folder, or that of one of its checkpoints.
    """
    if chosen is None:
        up = "../../.." if (run / "meta.json").exists() else ".."
        chosen = Path(os.path.normpath(run / up), "runs.jsonl")
    chosen.parent.mkdir(parents=True, exist_ok=True)
    chosen.open("ab+").close()
    return chosen


def seconds_of(text: str, option: str) -> float:
    """A time such as 90s, 30m or 2h.

    Raises:
        InputError: it is none, or no time at all; the message names the option.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None or float(found[1]) == 0:
        raise InputError(f"{option} {text}: write a number and s, m or h, as in 30m")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"abe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    if _RANK > 0 and context.invoked_subcommand not in ("train", "eval"):
        raise InputError(
            f"abe {context.invoked_subcommand} is one process: only `abe train` and `abe eval` are "
            "started as several"
        )


def main() -> None:
    """Run the command; what a user got wrong is one message and exit status 2, no traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a console that is not UTF-8
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        # An image that is too large is refused by name; Pillow's own words have none.
        warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
        try:
            app(prog_name="abe")
        except InputError as error:
            _fail(str(error))
        except OSError as error:
            from abe.data.decode import ReadingError, printable

            where = f"{printable(error.filename)}: " if error.filename else ""
            advice = (
                "see to the disk, then give the same command again"
                if isinstance(error, ReadingError)
                else "give another path, or see to its permissions and the space that is left"
            )
            _fail(f"{where}{error.strerror or error}: {advice}")
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            where = f" ({error})" if isinstance(error, MemoryError) and str(error) else ""
            _fail(
                f"there is too little memory{where}: lower train.batch_size, data.crop or the "
                "learners"
            )


def _out_of_memory(error: Exception) -> bool:
    """Whether it is Python's, or torch's of a GPU or of a CPU."""
    gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or gpu or "can't allocate memory" in str(error)


def _fail(message: str) -> NoReturn:
    err.quiet = False
    where = f", rank {_RANK}" * (_RANK > 0)
    err.print(Text.assemble((f"error{where}: ", "bold red"), message))
    sys.exit(2)


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    err.print(Text.assemble(("warning: ", "bold yellow"), str(message)))


if __name__ == "__main__":
    main()
