"""`abe sweep`: what it tries, that it goes on exactly, and that it leaves the test images alone."""

from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
from helpers import TINY
from rich.console import Console

from abe import cli, sweep, train
from abe.checkpoint import Best, checkpoints
from abe.config import Config, DataConfig
from abe.errors import DivergedError, InputError
from abe.files import read_json, read_json_lines, write_json
from abe.recipes import RECIPES, get_recipe
from abe.sweep import (
    KEYS,
    Trial,
    best_trial,
    propose,
    read_trials,
    run_sweep,
    search_space,
    size_of,
    trials_table,
)
from abe.train import Trainer

SILENT = Console(quiet=True)
SWEEPS = Path(__file__).parents[1] / "results/sweeps"
SMALL = TINY.with_overrides(["train.eval_every=1"])


def opened(data: DataConfig, *_: object) -> Any:
    return SimpleNamespace(digest=f"{data.synthetic_images} images")


class Quick:
    """In the place of `Trainer`: its recall is highest at a rate of 0.001 and at 10 it diverges."""

    given: ClassVar[list[object]] = []

    def __init__(self, config: Config) -> None:
        self.train = config.train
        self.splits = opened(config.data)

    @classmethod
    def begin(cls, config: Config, run: Path, console: Console, *, splits: object) -> Quick:
        cls.given.append(splits)
        trainer = cls(config)
        trainer.splits = splits or trainer.splits
        return trainer

    def select(self, go_on: str | None) -> Best | None:
        if self.train.lr > 9:
            raise DivergedError("the loss is nan")
        return Best(0, 1 / (1 + abs(self.train.lr / 1e-3 - 1)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "Trainer", Quick)
    monkeypatch.setattr(sweep, "open_splits", opened)
    monkeypatch.setattr(Quick, "given", [])


def settings(trials: list[Trial]) -> list[dict[str, float | str]]:
    return [trial.settings for trial in trials]


# --- What is tried ---


def test_the_first_trial_is_the_recipe_and_others_are_in_the_space(
    quick: None, tmp_path: Path
) -> None:
    done = run_sweep(SMALL, tmp_path, SILENT, trials=8)
    own = SMALL.train
    assert list(done[0].settings.items()) == [
        (key, getattr(own, key.removeprefix("train."))) for key in KEYS
    ]
    assert done[0].digest == SMALL.digest
    assert len({trial.digest for trial in done}) == 8
    size = {name: size_of(name, SMALL) for name in ("balanced", "per_image", "sum")}
    assert size == {"balanced": 1, "per_image": 4, "sum": 4 * own.batch_size}
    assert read_json(tmp_path / "sweep.json")["sizes"] == size
    for lr, margin, weight, normalization in (trial.settings.values() for trial in done):
        assert own.lr / 10 <= lr * size[normalization] <= own.lr * 10
        assert 0.2 <= margin <= 2
        assert own.divergence_weight / 10 <= weight / size[normalization]
        assert weight / size[normalization] <= own.divergence_weight * 10
    assert {trial.settings["train.normalization"] for trial in done} == set(size)
    assert own.normalization == "balanced"
    assert len(Quick.given) == 8
    assert len(set(map(id, Quick.given))) == 1  # read once
    assert Quick.given[0] is not None


def test_only_the_named_keys_are_searched(quick: None, tmp_path: Path) -> None:
    done = run_sweep(SMALL, tmp_path, SILENT, trials=3, keys=["train.margin", "train.lr"])
    assert all(list(trial.settings) == ["train.lr", "train.margin"] for trial in done)


def test_a_value_of_the_recipe_outside_the_usual_range_widens_it() -> None:
    base = SMALL.with_overrides(["train.margin=3.5"])
    space = search_space(base, KEYS)
    assert (space["train.margin"].low, space["train.margin"].high) == (0.2, 3.5)


def test_a_proposal_is_a_function_of_seed_and_trials(quick: None, tmp_path: Path) -> None:
    done = run_sweep(SMALL, tmp_path, SILENT, trials=12)
    space = search_space(SMALL, KEYS)
    for number in (0, 1, 11):
        assert propose(space, done[:number], SMALL, seed=0) == done[number].settings
    assert propose(space, done[:1], SMALL, seed=1) != done[1].settings
    # After the sampler's random beginning, what was found decides.
    other = [
        trial.model_copy(update={"selection_recall": 1 - (trial.selection_recall or 0)})
        for trial in done
    ]
    assert propose(space, done[:8], SMALL, 0) != propose(space, other[:8], SMALL, 0)
    assert propose(space, done[:4], SMALL, 0) == propose(space, other[:4], SMALL, 0)


def test_rates_of_adam_are_those_of_any_normalization(quick: None, tmp_path: Path) -> None:
    base = SMALL.with_overrides(["train.optimizer=adamw"])
    done = run_sweep(base, tmp_path, SILENT, trials=8)
    for lr, _, weight, normalization in (trial.settings.values() for trial in done):
        assert base.train.lr / 10 <= lr <= base.train.lr * 10
        weight /= size_of(normalization, base)
        assert 0.1 <= weight / base.train.divergence_weight <= 10


def test_a_sweep_that_did_not_know_sizes_is_another_one(quick: None, tmp_path: Path) -> None:
    run_sweep(SMALL, tmp_path, SILENT, trials=2)
    file = tmp_path / "sweep.json"
    write_json(file, {k: v for k, v in read_json(file).items() if k != "sizes"})
    with pytest.raises(InputError, match=r"holds a sweep of an early version, .*another --folder"):
        run_sweep(SMALL, tmp_path, SILENT, trials=3)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "sweep-demo-DIGEST"),
        ([f"--search={key}" for key in KEYS], "sweep-demo-DIGEST"),
        (["--search=train.margin", "--search=train.lr"], "sweep-demo-DIGEST-train.lr-train.margin"),
        (["--search=train.lr", "--search=train.lr"], "sweep-demo-DIGEST-train.lr"),
        (["--seed=3"], "sweep-demo-DIGEST-3"),
    ],
)
def test_a_sweep_has_a_folder_of_its_own(
    words: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given: list[tuple[Config, Path]] = []

    def run(base: Config, folder: Path, *_: object, **__: object) -> list[Trial]:
        given.append((base, folder))
        raise InputError("enough")

    monkeypatch.setattr(sweep, "run_sweep", run)
    monkeypatch.setattr(sys, "argv", ["abe", "sweep", "--recipe=demo", *words])
    with pytest.raises(SystemExit):
        cli.main()
    ((base, folder),) = given
    assert folder == Path("runs", name.replace("DIGEST", base.digest))


def test_images_are_looked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="nofolder"):
        run_sweep(SMALL.with_overrides(["data.source=nofolder"]), tmp_path / "sweep", SILENT)
    assert not list(tmp_path.iterdir())


def test_other_images_of_the_same_settings(quick: None, tmp_path: Path) -> None:
    run_sweep(SMALL, tmp_path, SILENT, trials=1)
    file = tmp_path / "sweep.json"
    file.write_text(file.read_text().replace('"4 images"', '"5 images"'))
    assert len(run_sweep(SMALL, tmp_path, SILENT, trials=1)) == 1  # nothing to train
    with pytest.raises(InputError, match=r"holds a sweep with another images: .*--folder"):
        run_sweep(SMALL, tmp_path, SILENT, trials=2)


def test_the_search_finds_the_better_rates(quick: None, tmp_path: Path) -> None:
    done = run_sweep(SMALL, tmp_path, SILENT, trials=40, keys=["train.lr"])
    error = [abs(trial.settings["train.lr"] / 1e-3 - 1) for trial in done]
    assert sum(error[-10:]) < sum(error[1:11]) / 2


def test_a_trial_that_diverges_is_a_line_and_never_the_best(quick: None, tmp_path: Path) -> None:
    base = SMALL.with_overrides(["train.lr=30"])
    done = run_sweep(base, tmp_path, SILENT, trials=6, keys=["train.lr"])
    assert {trial.state for trial in done} == {"complete", "diverged"}
    assert (done[0].state, done[0].selection_recall) == ("diverged", None)
    best = best_trial(done)
    assert best is not None
    assert best.selection_recall == max(trial.selection_recall or 0 for trial in done)
    assert best_trial(done[:1]) is None


def test_the_table_has_the_best_first_and_what_diverged_last() -> None:
    trials = [
        Trial(settings={"train.lr": lr}, digest="", selection_recall=recall, seconds=1, state=state)
        for lr, recall, state in (
            (30.0, None, "diverged"),
            (0.1, 0.0, "complete"),
            (0.01, 0.5, "complete"),
        )
    ]
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(trials_table(trials))
    rows = [line.split() for line in console.export_text().splitlines()[3:6]]
    assert rows == [
        ["3", "0.01", "50.0", "1"],
        ["2", "0.1", "0.0", "1"],
        ["1", "30", "diverged", "1"],
    ]


# --- Going on ---


def test_done_trials_are_not_repeated_and_more_can_be_asked(quick: None, tmp_path: Path) -> None:
    whole = run_sweep(SMALL, tmp_path / "whole", SILENT, trials=5)
    first = run_sweep(SMALL, tmp_path / "parts", SILENT, trials=2)
    again = run_sweep(SMALL, tmp_path / "parts", SILENT, trials=5)
    assert again[:2] == first
    assert settings(again) == settings(whole)
    assert read_trials(tmp_path / "parts" / "trials.jsonl") == again
    line = read_json_lines(tmp_path / "parts" / "trials.jsonl")[0]
    assert list(line) == ["settings", "digest", "selection_recall@1", "seconds", "state"]


def test_checkpoints_that_a_kill_left_of_a_done_trial_go(quick: None, tmp_path: Path) -> None:
    (trial,) = run_sweep(SMALL, tmp_path, SILENT, trials=1)
    left = tmp_path / f"001-{trial.digest}" / "checkpoints"
    left.mkdir(parents=True)
    run_sweep(SMALL, tmp_path, SILENT, trials=1)
    assert not left.exists()
    assert left.parent.exists()


def test_the_budget_is_that_of_all_trials_together(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=10)  # a trial takes 10 seconds
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: next(clock))
    assert len(run_sweep(SMALL, tmp_path, SILENT, budget=25)) == 3
    assert len(run_sweep(SMALL, tmp_path, SILENT, budget=25)) == 3
    assert len(run_sweep(SMALL, tmp_path, SILENT, budget=35)) == 4


def test_what_was_asked_for_tells_a_stopped_sweep_from_a_finished_one(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Quick, "select", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(SMALL, tmp_path, SILENT, trials=2, budget=60)
    assert read_json(tmp_path / "sweep.json")["asked"] == {"trials": 2, "budget": 60}
    assert not read_trials(tmp_path / "trials.jsonl")
    run_sweep(SMALL, tmp_path, SILENT, trials=3)
    saved = read_json(tmp_path / "sweep.json")
    assert saved["asked"] == {"trials": 3, "budget": None}
    run_sweep(SMALL, tmp_path, SILENT, trials=1)  # nothing to train
    assert read_json(tmp_path / "sweep.json") == saved


def test_a_sweep_that_does_not_say_what_was_asked_for_goes_on(quick: None, tmp_path: Path) -> None:
    run_sweep(SMALL, tmp_path, SILENT, trials=1)
    saved = read_json(tmp_path / "sweep.json")
    asked = saved.pop("asked")
    write_json(tmp_path / "sweep.json", saved)
    assert len(run_sweep(SMALL, tmp_path, SILENT, trials=2)) == 2
    assert read_json(tmp_path / "sweep.json") == saved | {"asked": asked | {"trials": 2}}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"base": SMALL.with_overrides(["train.steps=9"])}, "train.steps"),
        ({"base": SMALL.with_overrides(["data.synthetic_images=5"])}, "data.synthetic_images"),
        ({"base": SMALL.with_overrides(["train.lr=1"])}, "search, train.lr"),
        ({"keys": ["train.lr"]}, "search"),
        ({"seed": 1}, "seed"),
    ],
)
def test_another_sweep_in_the_folder(
    change: dict[str, object], name: str, quick: None, tmp_path: Path
) -> None:
    run_sweep(SMALL, tmp_path, SILENT, trials=1)
    with pytest.raises(InputError, match=f"holds a sweep with another {name}: .*--folder"):
        run_sweep(**{"base": SMALL, "folder": tmp_path, "console": SILENT, **change})


def test_a_sweep_is_not_made_among_its_images(tmp_path: Path) -> None:
    base = SMALL.with_overrides([f"data.source={tmp_path}"])
    with pytest.raises(InputError, match=r"is in .*, the images: name a folder outside of it"):
        run_sweep(base, tmp_path / "sweep", SILENT)
    assert list(tmp_path.iterdir()) == []


def test_where_and_how_fast_may_change(quick: None, tmp_path: Path) -> None:
    run_sweep(SMALL, tmp_path, SILENT, trials=1)
    base = SMALL.with_overrides(["data.workers=1", "tracking=tensorboard"])
    assert len(run_sweep(base, tmp_path, SILENT, trials=2)) == 2


def test_two_sweeps_in_a_folder_at_once(quick: None, tmp_path: Path) -> None:
    with (
        sweep.locked(tmp_path / sweep.LOCK, ""),
        pytest.raises(InputError, match="is swept by another process"),
    ):
        run_sweep(SMALL, tmp_path, SILENT)


# --- What came of it ---


@pytest.mark.parametrize("name", [folder.name for folder in sorted(SWEEPS.iterdir())])
def test_a_recipe_has_what_its_sweep_chose(name: str) -> None:
    folder = SWEEPS / name
    best = best_trial(read_trials(folder / "trials.jsonl"))
    assert best is not None
    saved = read_json(folder / "sweep.json")["settings"]
    recipe = get_recipe(saved["recipe"])
    docstring = " ".join((RECIPES[saved["recipe"]].__doc__ or "").split())
    source = f"data.source={saved['data']['source']}"
    swept = recipe.with_overrides([source, *best.overrides]).portable()
    assert swept == recipe.with_overrides([source]).portable() == saved
    told = f"of {len(read_trials(folder / 'trials.jsonl'))} trials of `abe sweep`"
    assert told in docstring
    assert f"results/sweeps/{name})" in docstring


# --- What cannot be swept ---


@pytest.mark.parametrize(
    ("overrides", "keys", "message"),
    [
        (["protocol=paper"], KEYS, "protocol=paper scores the test images"),
        ([], ["train.lr", "train.steps"], "cannot search train.steps: choose among train.lr, "),
        ([], [], "cannot search nothing"),
        (["train.divergence_weight=0"], KEYS, "switches Eq. 9 off"),
        (["model.num_learners=1"], KEYS, "divergence_weight has no effect .* --search train.lr$"),
        (["train.metric_loss=TripletMarginLoss()"], KEYS, "train.margin has no effect"),
    ],
)
def test_what_cannot_be_swept(
    overrides: list[str], keys: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_sweep(SMALL.with_overrides(overrides), tmp_path, SILENT, keys=keys)
    assert not list(tmp_path.iterdir())


def test_without_optuna(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"needs the package optuna.*pip install optuna"):
        run_sweep(SMALL, tmp_path, SILENT)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"settings": {}}', "line 2 is no trial of `abe sweep`"),
        (
            '{"settings": {"train.lr": 99.0}, "digest": "", "selection_recall@1": 1, "seconds": 1, '
            '"state": "complete"}',
            "line 2 is no trial of this sweep, correct or remove it: .*train.lr",
        ),
    ],
)
def test_a_line_that_is_no_trial(line: str, message: str, quick: None, tmp_path: Path) -> None:
    run_sweep(SMALL, tmp_path, SILENT, trials=1)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=f"trials.jsonl, {message}"):
        run_sweep(SMALL, tmp_path, SILENT, trials=3)


# --- With real training ---

KILLED_IN_THE_SECOND_TRIAL = """
import os, signal, sys
from pathlib import Path
from helpers import TINY
from rich.console import Console
from abe.sweep import run_sweep
from abe.train import Trainer

step = Trainer.train_step
def step_or_die(self, batch):
    if self.run.name.startswith("002-") and self.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)

Trainer.train_step = step_or_die
base = TINY.with_overrides(["train.eval_every=1"])
run_sweep(base, Path(sys.argv[1]), Console(quiet=True), trials=3)
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_from_the_checkpoint_and_scores_no_test_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_SECOND_TRIAL, tmp_path / "killed"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (run,) = (tmp_path / "killed").glob("002-*")
    assert checkpoints(run)
    monkeypatch.setattr(train, "evaluate_test", mock.Mock(side_effect=AssertionError))
    trained: list[tuple[str, int]] = []
    step: Callable[..., object] = Trainer.train_step

    def counted(trainer: Trainer, batch: object) -> object:
        trained.append((trainer.run.name[:3], trainer.step))
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", counted)
    done = run_sweep(SMALL, tmp_path / "killed", SILENT, trials=3)
    assert trained == [("002", 2), ("003", 0), ("003", 1), ("003", 2)]
    undisturbed = run_sweep(SMALL, tmp_path / "whole", SILENT, trials=3)
    kept = {"settings", "digest", "selection_recall", "state"}
    assert [t.model_dump(include=kept) for t in done] == [
        t.model_dump(include=kept) for t in undisturbed
    ]
    for trial, run in zip(done, sorted((tmp_path / "killed").glob("00*")), strict=True):
        assert run.name.endswith(trial.digest)
        assert not checkpoints(run)
        recalls = [line.get("recall_at_1", 0) for line in read_json_lines(run / "metrics.jsonl")]
        assert trial.selection_recall == max(recalls)
        assert read_json(run / "images.json")["data"]["select_classes"] == 2


@pytest.mark.slow
def test_a_signal_stops_the_sweep_and_the_trial_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step: Callable[..., object] = Trainer.train_step

    def interrupted(trainer: Trainer, batch: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    console = Console(record=True, width=200, file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        run_sweep(SMALL, tmp_path, console, go_on="abe sweep ...")
    assert "Stopped by SIGTERM after step 1, saved. To go on: abe sweep ..." in (
        console.export_text()
    )
    assert read_trials(tmp_path / "trials.jsonl") == []
    (run,) = tmp_path.glob("001-*")
    assert checkpoints(run)[-1].name == "step-00000001"


# --- The command ---


def abe_here(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["abe", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_prints_a_table_and_how_to_use_the_best(
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--search", "train.lr", "--search", "train.normalization", "--trials", "3"]
    few = ["data.synthetic_classes=8", "data.synthetic_images=4", "data.val_classes=0.5"]
    words += [f"--set={setting}" for setting in few]
    assert abe_here(monkeypatch, "sweep", "--folder", "s", *words, "--seed", "4") == 0
    printed = capsys.readouterr().out
    done = read_trials(tmp_path / "s" / "trials.jsonl")
    best = best_trial(done)
    assert best is not None
    assert f"Best: --set {' --set '.join(best.overrides)}\n" in printed
    rows = [line.split() for line in printed.splitlines()[3:6]]
    assert [float(row[3]) for row in rows] == sorted(
        (round(100 * (trial.selection_recall or 0), 1) for trial in done), reverse=True
    )
    base = cli._configure(None, few)
    assert base.with_overrides(best.overrides).digest == best.digest


@pytest.mark.parametrize("budget", ["2 h", "0s", "h", "-1m"])
def test_a_budget_that_is_no_time(
    budget: str,
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert abe_here(monkeypatch, "sweep", f"--budget={budget}") == 2
    assert "write a number and s, m or h, as in 30m" in capsys.readouterr().err
