"""Compare 1-head, M-heads and ABE-M on one data set at equal steps, as the README's table shows.

Every method is trained at each of its learning rates with each seed; `abe results` shows the rate
whose selected checkpoints have the best Recall@1 on held-out training classes (protocol `val`), on
average over the seeds. Every run is a line of the results file, those of the rejected rates too,
and a run whose line is there is not repeated: stop it and start it as often as you like.

    python experiments/compare.py photographs --source DATA/cub200-2010
    python experiments/compare.py vehicles --part 1/2  # and 2/2 in a second process
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from abe.checkpoint import checkpoints
from abe.config import Config
from abe.data.splits import open_splits
from abe.evaluate import evaluate_baselines
from abe.recipes import demo, photographs
from abe.results import append_record, method_name, scores_table
from abe.runtime import read_json_lines
from abe.train import Trainer

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Method:
    """A network and a loss, and the learning rates to choose from."""

    settings: tuple[str, ...]
    rates: tuple[float, ...]


def balanced(*settings: str, rates: tuple[float, ...] = (0.003, 0.01)) -> Method:
    """Eq. 10 with each kind of pair averaged by itself, lambda_div 0.1."""
    return Method(settings, rates)


def as_printed(*settings: str, rates: tuple[float, ...] = (1e-4, 3e-4)) -> Method:
    """Eqs. 8-10 as printed."""
    loss = ("train.normalization=per_image", "train.divergence_weight=1")
    return Method((*settings, *loss), rates)


ONE_HEAD = ("model.network=m-heads", "model.num_learners=1")
FOUR_HEADS = ("model.network=m-heads", "model.num_learners=4", "train.divergence_weight=0")
ABE_4 = ("model.network=abe", "model.num_learners=4")
ABE_4_ALIKE = (*ABE_4, "train.divergence_weight=0")

PLANS: dict[str, tuple[Config, tuple[Method, ...]]] = {
    "photographs": (
        photographs(),
        (balanced(*ABE_4), balanced(*ONE_HEAD), balanced(*FOUR_HEADS)),
    ),
    "photographs-as-printed": (
        photographs(),
        (as_printed(*ABE_4), as_printed(*ONE_HEAD)),
    ),
    "photographs-fp32": (
        photographs(),
        (balanced(*ABE_4, "precision=fp32", rates=(0.003,)),),
    ),
    "vehicles": (
        demo(),
        tuple(
            balanced(*network, rates=(0.003, 0.01, 0.03))
            for network in (ABE_4, ONE_HEAD, FOUR_HEADS, ABE_4_ALIKE)
        ),
    ),
}


def part(text: str) -> tuple[int, int]:
    """`2/3` -> (2, 3)."""
    number, of = (int(word) for word in text.split("/"))
    if not 1 <= number <= of:
        raise ValueError(text)
    return number, of


def main() -> None:
    """Run what is missing of one plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--source", default="synthetic", help="folder or CSV of the images")
    parser.add_argument("--results", type=Path, default=Path("results/runs.jsonl"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument(
        "--part", type=part, default=(1, 1), help="I/N: every N-th run from the I-th"
    )
    arguments = parser.parse_args()
    console = Console()
    base, methods = PLANS[arguments.plan]
    base = base.with_overrides([f"data.source={arguments.source}"])

    def done(config: Config) -> bool:
        records = read_json_lines(arguments.results) if arguments.results.exists() else []
        this = (config.digest, method_name(config))
        return any((r["config_digest"], r["method"]) == this for r in records)

    def run(config: Config) -> None:
        folder = arguments.runs / config.digest
        console.rule(f"{config.digest} lr {config.train.lr} seed {config.seed}")
        begun = checkpoints(folder)
        trainer = Trainer.resume(folder, console) if begun else Trainer(config, folder, console)
        record = trainer.fit()
        if record is None:
            raise SystemExit(130)
        append_record(arguments.results, record)
        console.print(scores_table([record]))

    recorded = read_json_lines(arguments.results) if arguments.results.exists() else []
    if not any(record["config_digest"] == base.digest for record in recorded):
        splits = open_splits(base.data, base.protocol)
        for evaluation in evaluate_baselines(base, splits).values():
            append_record(arguments.results, evaluation.record)
    runs = [
        base.with_overrides([*method.settings, f"train.lr={rate}", f"seed={seed}"])
        for method in methods
        for rate in method.rates
        for seed in SEEDS
    ]
    first, step = arguments.part
    for config in runs[first - 1 :: step]:
        if not done(config):
            run(config)


if __name__ == "__main__":
    main()
