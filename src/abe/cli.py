"""The command `abe`: its verbs parse, call and print; the work is in the modules they import.

Heavy modules are imported inside the verbs, so that `abe --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from abe import __version__
from abe.errors import InputError

app = typer.Typer(
    name="abe",
    help="Learn an image embedding with an attention-based ensemble, measure it, look at it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. train.lr=1e-4."),
]
Weights = Annotated[
    str | None,
    typer.Option(help="Pretrained start: a known name, a file, or 'none'."),
]
Recipe = Annotated[str, typer.Option(help="Settings to begin from: photographs or paper.")]
Source = Annotated[
    str | None,
    typer.Argument(
        metavar="[DATA]", help="A folder of class folders, or a CSV. Default: built-in."
    ),
]
Results = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Where to add the result. Default: runs.jsonl beside RUN."),
]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave unreadable files out.")]


def _configure(
    recipe: str, data: str | None, weights: str | None, skip_broken: bool, overrides: list[str]
) -> Any:
    from abe.recipes import get_recipe

    chosen = [f"data.source={json.dumps(data)}"] if data else []
    chosen += [f"model.weights={json.dumps(None if weights == 'none' else weights)}"] * (
        weights is not None
    )
    chosen += ["data.skip_broken=true"] * skip_broken
    return get_recipe(recipe).with_overrides([*chosen, *overrides])


@app.command()
def train(
    data: Source = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of the run. Default: runs/<settings>.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    recipe: Recipe = "photographs",
    weights: Weights = None,
    skip_broken: SkipBroken = False,
    results: Results = None,
    overrides: Overrides = None,
) -> None:
    """Train, pick the checkpoint on held-out classes, score the test classes once."""
    from abe.results import append_record, scores_table
    from abe.train import Trainer

    if resume is not None:
        if data or weights or overrides or run:
            raise InputError("--resume goes on as the run was started: give nothing else with it")
        trainer = Trainer.resume(resume, err)
    else:
        config = _configure(recipe, data, weights, skip_broken, overrides or [])
        folder = run or Path("runs") / f"{config.recipe}-{config.digest}"
        trainer = Trainer(config, folder, err)
    record = trainer.fit()
    if record is None:
        raise typer.Exit(130)
    append_record(results or trainer.run.parent / "runs.jsonl", record)
    out.print(scores_table([record]))
    out.print(f"Run: {trainer.run}")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or checkpoint.")],
    data: Source = None,
    results: Results = None,
) -> None:
    """Score the ensemble and every learner on the test classes of the run, or of other data."""
    from abe.results import append_record, scores_table
    from abe.train import evaluate_run

    record = evaluate_run(run, data)
    append_record(results or run.parent / "runs.jsonl", record)
    out.print(scores_table([record]))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one self-contained HTML page: results, curves, masks, neighbours."""
    from abe.report.html import write_report

    write_report(runs, output, err)
    out.print(f"Report: {output}", soft_wrap=True)


@app.command()
def results(
    file: Annotated[Path, typer.Argument(metavar="RUNS.JSONL", help="Results of runs.")],
    into: Annotated[
        Path | None,
        typer.Option(help="Markdown file to renew, between its results:begin and :end comments."),
    ] = None,
) -> None:
    """Average results over seeds, as Markdown tables; a chosen learning rate stands for all."""
    from abe.results import markdown_table, replace_between, summarize
    from abe.runtime import read_json_lines

    table = markdown_table(summarize(read_json_lines(file)))
    if into is None:
        typer.echo(table)
    else:
        text = into.read_text(encoding="utf-8")
        into.write_text(replace_between(text, "results", table), encoding="utf-8")


@app.command()
def demo(
    data: Source = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where to work.")] = Path("demo"),
    skip_broken: SkipBroken = False,
) -> None:
    """Compare pixels, the pretrained start, 1-head and ABE-4 in minutes, and write a report."""
    from abe.demo import run_demo
    from abe.results import scores_table

    records, page = run_demo(data, folder, skip_broken, err)
    out.print(scores_table(records))
    out.print(f"Report: {page}", soft_wrap=True)


@app.command()
def summary(
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects instead.")] = False,
) -> None:
    """Print the 13 networks of Tables 1 and 8: parameters and operations, ours and the paper's."""
    from abe.model.summary import summary_rows, summary_table

    rows = summary_rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        out.print(summary_table(rows))


@app.command()
def config(
    data: Source = None,
    recipe: Recipe = "photographs",
    weights: Weights = None,
    skip_broken: SkipBroken = False,
    overrides: Overrides = None,
) -> None:
    """Print the whole configuration that `abe train` would use, as JSON."""
    resolved = _configure(recipe, data, weights, skip_broken, overrides or [])
    typer.echo(json.dumps(resolved.to_json(), indent=2))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"abe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; an input error is one message and exit status 2, never a traceback."""
    try:
        app()
    except InputError as error:
        err.print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("Stopped.")
        sys.exit(130)


if __name__ == "__main__":
    main()
