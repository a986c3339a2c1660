"""`abe sweep`: a search for settings that the paper leaves open, on held-out training classes.

    <folder>/sweep.json           what is searched: the settings to begin from, the space around
                                  them, the seed, and the digest of the images; "sizes": how
                                  rates and lambdas go with the normalisation; "asked": how many
                                  trials, and seconds of all, the last call to train wanted
    <folder>/trials.jsonl         a line for each trial that is done
    <folder>/<number>-<digest>/   a trial's run, whose checkpoints go when the trial is done

Trial t is a function of the seed, t and the lines of the trials before it; the first one is the
recipe as it is. A sweep that was killed therefore proposes the trial again that it was at, finds
its run, and goes on from its checkpoint. The test images are never scored.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from abe.config import Config
from abe.data.splits import open_splits
from abe.errors import DivergedError, InputError
from abe.files import (
    locked,
    make_folder,
    read_json,
    read_json_lines,
    remove_unfinished,
    replace_text,
    write_json,
)
from abe.losses import ContrastiveNormalization
from abe.results import differing, flatten
from abe.run_folder import require_outside_images
from abe.train import Trainer

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SWEEP, TRIALS, LOCK = "sweep.json", "trials.jsonl", ".lock"
NORMALIZATIONS: tuple[str, ...] = get_args(ContrastiveNormalization)
KEYS = ("train.lr", "train.margin", "train.divergence_weight", "train.normalization")
FACTOR = 10  # rate and lambda are searched from a tenth of the recipe's to ten times it
RANDOM_TRIALS = 5  # the first ones: a sweep is small, and the recipe is among them
MARGINS = 0.2, 2.0  # on squared distances, which are 2 between vectors at a right angle


class Trial(BaseModel):
    """A line of trials.jsonl."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, serialize_by_alias=True
    )

    settings: dict[str, float | str]
    digest: str  # of the whole configuration
    selection_recall: float | None = Field(alias="selection_recall@1")  # None: it diverged
    seconds: float  # of a trial that was interrupted those since it went on
    state: Literal["complete", "diverged"]

    @property
    def overrides(self) -> list[str]:
        """Its settings as `--set` takes them."""
        return overrides(self.settings)


def overrides(settings: Mapping[str, float | str]) -> list[str]:
    """Settings as `--set` takes them; {"train.lr": 0.1} -> ["train.lr=0.1"]."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]


def run_sweep(
    base: Config,
    folder: Path,
    console: Console,
    *,
    keys: Sequence[str] = KEYS,
    trials: int = 20,
    budget: float | None = None,
    seed: int = 0,
    go_on: str = "the same again",
) -> list[Trial]:
    """Train with settings that Optuna's TPE proposes, each time to the end.

    A sweep that was interrupted goes on where it was; more trials can be asked of one that is done.

    Args:
        base: the settings to begin from, which are those of the first trial.
        folder: where the sweep is.
        console: where to report progress.
        keys: those of `KEYS` to search.
        trials: how many, with those that are done.
        budget: seconds of all trials together, after which none is begun; None for no limit.
        seed: another one proposes other settings.
        go_on: the command that goes on with the sweep, for who stops it.

    Returns:
        All trials that are done, in their order.

    Raises:
        InputError: Optuna is not installed; the protocol is not "val"; a key that cannot be
            searched; the folder holds another sweep, or another process is at work in it; whatever
            `Trainer` cannot use.
    """
    if base.protocol != "val":
        raise InputError(
            f"protocol={base.protocol} scores the test images, which a sweep leaves alone: "
            "leave --set protocol=val"
        )
    base = base.anchored()
    space, splits = search_space(base, keys), None
    if not (folder / SWEEP).exists():
        require_outside_images(folder, base.data)
        splits = open_splits(base.data, base.protocol, console)
    make_folder(folder)
    with locked(folder / LOCK, f"{folder} is swept by another process: wait for it"):
        remove_unfinished(folder)
        sweep = {
            "search": [{"key": key} | _described(space[key]) for key in space],
            "seed": seed,
            "settings": base.portable(),
        }
        if "train.normalization" in space:
            sweep["sizes"] = {name: size_of(name, base) for name in NORMALIZATIONS}
        _require_same_sweep(folder / SWEEP, sweep)
        done = read_trials(folder / TRIALS)
        for number, trial in enumerate(done):
            _forget_checkpoints(_run(folder, number, trial.digest))
        while len(done) < trials and (budget is None or sum(t.seconds for t in done) < budget):
            settings = propose(space, done, base, seed)
            console.rule(f"trial {len(done) + 1} of {trials}")
            console.print(" ".join(overrides(settings)), highlight=False, soft_wrap=True)
            config = base.with_overrides(overrides(settings))
            run = _run(folder, len(done), config.digest)
            started = time.perf_counter()
            trainer = Trainer.begin(config, run, console, splits=splits)
            splits = trainer.splits  # read once
            if "images" not in sweep:
                sweep["images"] = splits.digest  # wherever they are
                _require_same_sweep(folder / SWEEP, sweep)
                asked = {"trials": trials, "budget": budget}
                write_json(folder / SWEEP, sweep | {"asked": asked})
            recall = _select(trainer, console, go_on)
            trial = Trial(
                settings=settings,
                digest=config.digest,
                selection_recall=recall,
                seconds=round(time.perf_counter() - started, 1),
                state="diverged" if recall is None else "complete",
            )
            done.append(trial)
            lines = (json.dumps(each.model_dump()) + "\n" for each in done)
            replace_text(folder / TRIALS, "".join(lines))
            _forget_checkpoints(run)
    return done


def search_space(base: Config, keys: Sequence[str]) -> dict[str, BaseDistribution]:
    """What is tried of each key, the value of `base` among it.

    Rates and lambdas are those of the normalisation of `base`; others have theirs: see `size_of`.

    Raises:
        InputError: Optuna is not installed, no keys, one that is not in `KEYS`, one without an
            effect, or a divergence that is switched off.
    """
    distributions = _optuna().distributions
    unknown = [key for key in keys if key not in KEYS]
    if unknown or not keys:
        what = ", ".join(unknown) or "nothing"
        raise InputError(f"a sweep cannot search {what}: choose among {', '.join(KEYS)}")
    train = base.train
    for key in ("train.margin", "train.normalization"):
        if key in keys and train.metric_loss != "contrastive":
            raise InputError(
                f"{key} has no effect on train.metric_loss={train.metric_loss}: name the keys to "
                "search without it, as in --search train.lr"
            )
    if "train.divergence_weight" in keys and base.model.num_learners == 1:
        raise InputError(
            "train.divergence_weight has no effect on model.num_learners=1, of which Eq. 9 is 0: "
            "name the keys to search without it, as in --search train.lr"
        )
    if "train.divergence_weight" in keys and train.divergence_weight == 0:
        raise InputError(
            "train.divergence_weight=0 switches Eq. 9 off: begin from another weight, or name the "
            "keys to search without it, as in --search train.lr"
        )

    def around(value: float) -> BaseDistribution:
        return distributions.FloatDistribution(value / FACTOR, value * FACTOR, log=True)

    space = {
        "train.lr": lambda: around(train.lr),
        "train.margin": lambda: distributions.FloatDistribution(
            min(MARGINS[0], train.margin), max(MARGINS[1], train.margin)
        ),
        "train.divergence_weight": lambda: around(train.divergence_weight),
        "train.normalization": lambda: distributions.CategoricalDistribution(NORMALIZATIONS),
    }
    return {key: space[key]() for key in KEYS if key in keys}


def propose(
    space: Mapping[str, BaseDistribution], done: Sequence[Trial], base: Config, seed: int
) -> dict[str, float | str]:
    """The settings of the next trial: a function of the seed and of the trials that are done.

    One that diverged counts as a Recall@1 of 0.

    Raises:
        InputError: a trial's settings are not in the space.
    """
    if not done:
        values = flatten(base.to_json())
        return {key: values[key] for key in space}
    optuna = _optuna()
    (state,) = np.random.SeedSequence(seed, spawn_key=(len(done),)).generate_state(1)
    sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=int(state))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for number, trial in enumerate(done, start=1):
        try:
            known = optuna.trial.create_trial(
                params=_rescaled(trial.settings, base, to_base=True),
                distributions=space,
                value=trial.selection_recall or 0.0,
            )
        except ValueError as error:
            raise InputError(
                f"{TRIALS}, line {number} is no trial of this sweep, correct or remove it: {error}"
            ) from None
        study.add_trial(known)
    return _rescaled(study.ask(dict(space)).params, base, to_base=False)


def _rescaled(
    settings: Mapping[str, float | str], base: Config, *, to_base: bool
) -> dict[str, float | str]:
    """With the rate and lambda that fit their normalisation, for those that fit that of `base`.

    The larger Eq. 10 is, the larger the lambda beside it, and the lower the rate, but for AdamW,
    whose steps are as long. With `to_base` the other way round, which gives exactly what was there.
    """
    own = str(settings.get("train.normalization", base.train.normalization))
    factor = size_of(own, base) / size_of(base.train.normalization, base)
    factor = 1 / factor if to_base else factor
    factors = {"train.divergence_weight": factor}
    if base.train.optimizer == "sgd":
        factors["train.lr"] = 1 / factor
    return {
        key: value * factors.get(key, 1.0) if isinstance(value, float) else value
        for key, value in settings.items()
    }


def size_of(normalization: str, base: Config) -> float:
    """About how large Eq. 10 is beside the balanced one, whose mean pair weighs 1.

    As a power of two, so that products are exact. At 64 images the best rates of experiments are
    0.003 balanced and 1e-4 as printed: 30 times apart, where this says 32.
    """
    batch = 2.0 ** round(math.log2(base.train.batch_size))
    return {"balanced": 1.0, "per_image": batch / 2, "sum": batch * batch / 2}[normalization]


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The first one with the highest Recall@1 on held-out classes; None if all diverged."""
    complete = [trial for trial in trials if trial.selection_recall is not None]
    return max(complete, key=lambda trial: trial.selection_recall or 0.0, default=None)


def trials_table(trials: Sequence[Trial]) -> Table:
    """Trials for the terminal, the best first; those that diverged last."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("trial", *(key.removeprefix("train.") for key in trials[0].settings)):
        table.add_column(column, justify="right")
    for column in ("R@1", "seconds"):
        table.add_column(column, justify="right")
    numbered = [(trial.selection_recall, number, trial) for number, trial in enumerate(trials, 1)]
    for recall, number, trial in sorted(
        numbered, key=lambda each: -1 if each[0] is None else each[0], reverse=True
    ):
        table.add_row(
            str(number),
            *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in trial.settings.values()),
            trial.state if recall is None else f"{100 * recall:.1f}",
            f"{trial.seconds:.0f}",
        )
    table.caption = "R@1 on held-out training classes, %"
    return table


def read_trials(path: Path) -> list[Trial]:
    """The lines of trials.jsonl; none where there is no such file.

    Raises:
        InputError: it cannot be read, or a line is no trial; the message names it.
    """
    trials = []
    for number, line in enumerate(read_json_lines(path) if path.exists() else [], start=1):
        try:
            trials.append(Trial.model_validate(line))
        except ValidationError:
            raise InputError(
                f"{path}, line {number} is no trial of `abe sweep`: correct or remove it"
            ) from None
    return trials


def _select(trainer: Trainer, console: Console, go_on: str) -> float | None:
    """Recall@1 on held-out classes after training to the end; None if it diverged.

    Raises:
        KeyboardInterrupt: a signal stopped it, and it is saved.
    """
    try:
        best = trainer.select(go_on)
    except DivergedError as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return None
    if best is None:
        raise KeyboardInterrupt
    return best.recall_at_1


def _run(folder: Path, number: int, digest: str) -> Path:
    return folder / f"{number + 1:03}-{digest}"


def _forget_checkpoints(run: Path) -> None:
    if (run / "checkpoints").exists():
        shutil.rmtree(run / "checkpoints")


def _described(distribution: BaseDistribution) -> dict[str, Any]:
    """What there is to choose from, for sweep.json."""
    found: dict[str, Any] = json.loads(_optuna().distributions.distribution_to_json(distribution))
    return found


def _require_same_sweep(file: Path, sweep: Mapping[str, Any]) -> None:
    """Raise InputError if sweep.json, where there is one, is of another than what is known."""
    if not file.exists():
        return
    saved = read_json(file)
    saved.pop("asked", None)
    if "images" not in sweep:  # not read yet
        saved.pop("images", None)
    differ = differing([flatten(saved), flatten(sweep)])
    if names := [name for name in differ if not name.startswith("sizes.")]:
        which = ", ".join(name.removeprefix("settings.") for name in names)
        raise InputError(
            f"{file.parent} holds a sweep with another {which}: give the same settings to go on "
            "with it, or another --folder"
        )
    if differ:
        raise InputError(
            f"{file.parent} holds a sweep of an early version, whose rates went otherwise with the "
            "normalisation: give another --folder"
        )


def _optuna() -> Any:
    """The package, which keeps to itself what it does.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise InputError(
            "abe sweep needs the package optuna, which is not installed: pip install optuna"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
