"""How far something is: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PROGRESS_SECONDS = 60  # between two lines where there is no terminal


@contextmanager
def progress(console: Console | None, doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` images are done; -> what is to be told their number.

    A bar on a terminal; elsewhere a line a minute. None for nothing.
    """
    if console is None:
        yield lambda done: None
    elif console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(doing, total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        told = time.monotonic()

        def tell(done: int) -> None:
            nonlocal told
            if time.monotonic() - told >= PROGRESS_SECONDS:
                told = time.monotonic()
                console.print(f"{doing}: {done:,} of {total:,}")

        yield tell


@contextmanager
def step_progress(
    console: Console, *, done: int, steps: int, batch_size: int, told: bool = False
) -> Iterator[Callable[[int, float], None]]:
    """Show how far a training is: a bar on a terminal, elsewhere a line a minute with the loss.

    Args:
        console: where.
        done: steps before.
        steps: all of them.
        batch_size: images a step.
        told: whether the first line is to come after a minute; else it does after the first step.

    Returns:
        What is to be told the number of steps done and the loss of the last.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    off = not console.is_terminal  # where it would leave an empty line
    with Progress(*columns, console=console, transient=True, disable=off) as bar:
        task = bar.add_task("training", total=steps, completed=done, loss="", rate="")
        started = time.perf_counter()
        last = started if told else -math.inf

        def advance(step: int, loss: float) -> None:
            nonlocal last
            now = time.perf_counter()
            rate = f"{(step - done) / (now - started) * batch_size:.0f} images/s"
            shown = f"loss {loss:.4f}"
            bar.update(task, completed=step, loss=shown, rate=rate)
            if off and now - last >= PROGRESS_SECONDS:
                last = now
                console.print(f"step {step:>6}  {shown}  {rate}", highlight=False)

        yield advance
