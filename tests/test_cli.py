"""The command as a user types it: what it prints where, how it stops, and how it goes on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path
from unittest import mock
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from helpers import shorten
from PIL import Image

from abe import cli
from abe.checkpoint import checkpoints
from abe.config import Config
from abe.data.decode import ReadingError
from abe.errors import InputError
from abe.files import read_json_lines
from abe.results import flatten

ABE = Path(sys.executable).with_name("abe")
VERBS = (
    "train",
    "pretrain",
    "eval",
    "report",
    "results",
    "demo",
    "reproduce",
    "sweep",
    "summary",
    "config",
    "data",
)
DATA_VERBS = ("check", "get", "list", "prepare", "verify")
HEAVY = {"torch", "numpy", "matplotlib", "PIL", "sklearn", "safetensors", "jinja2"}
TINY = [
    f"--set={setting}"
    for setting in (
        "device=cpu",
        "precision=fp32",
        "model.num_learners=2",
        "model.embedding_dim=8",
        "model.weights=none",
        "data.resize=40",
        "data.crop=32",
        "data.val_classes=0.5",
        "train.batch_size=8",
        "train.steps=4",
        "train.eval_every=2",
        "train.log_every=1",
    )
]


def abe(*words: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ABE, *words],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def abe_here(*words: str) -> object:
    """Exit status of the command, run in this process."""
    with mock.patch.object(sys, "argv", ["abe", *words]):
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos of 8 classes, one of them not readable, and a name as names can be."""
    folder = tmp_path_factory.mktemp("a [red]folder of :cat: pictures")
    rng = np.random.default_rng(0)
    for label in range(8):
        colour = rng.integers(0, 256, 3)
        (folder / "photos" / f"class {label}").mkdir(parents=True)
        for number in range(4):
            pixels = (colour + rng.integers(-40, 40, (30, 24, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / f"class {label}" / f"{number}.png")
    (folder / "photos" / "class 3" / "9.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> subprocess.CompletedProcess[str]:
    return abe("train", "photos", "--run", "runs/first", "--skip-broken", *TINY, folder=folder)


# --- Help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom abe import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout
    imported = {name.partition(".")[0] for name in done.stderr.split()}
    assert "abe" in imported
    assert not imported & HEAVY
    assert "pydantic" not in imported or "train" in words  # typer's own, for a verb's parameters


@pytest.mark.parametrize("verb", [*VERBS, *(f"data {verb}" for verb in DATA_VERBS)])
def test_every_verb_explains_itself(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert not abe_here(*verb.split(), "--help")
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: abe {verb} ")
    for option in re.findall(r"^  (?:-\w, )?(--[\w-]+)(.*)$", shown, re.MULTILINE):
        assert option[1].strip(), f"{option[0]} is not explained"
    assert max(map(len, shown.splitlines())) <= 80


def test_the_list_of_verbs_cuts_no_explanation_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert not abe_here("--help")
    shown = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^  {verb} +[A-Z].*[^.]\.$", shown, re.MULTILINE), verb


# --- Train, eval, report, results --------------------------------------------------------------


@pytest.mark.slow
def test_train_prints_the_result_and_says_where_it_is(
    trained: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert trained.returncode == 0, trained.stderr
    assert "ABE-2^8" in trained.stdout
    summary = (
        "photos: 16 test images of 4 classes not seen in training, unreadable files left out: 1;"
    )
    assert summary in " ".join(trained.stdout.split())
    assert trained.stdout.endswith("Run: runs/first\nResult added to runs/runs.jsonl\n")
    assert "Recall@1" not in trained.stdout
    assert re.findall(r"^step +(\d+)  Recall@1", trained.stderr, re.MULTILINE) == ["0", "2", "4"]
    assert "1 unreadable file" in trained.stderr
    assert "\x1b" not in trained.stdout + trained.stderr
    (record,) = read_json_lines(folder / "runs" / "runs.jsonl")
    assert record == json.loads((folder / "runs" / "first" / "result.json").read_text())


@pytest.mark.slow
def test_eval_report_and_results_follow_it(
    trained: subprocess.CompletedProcess[str], folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folder, tmp_path / folder.name))  # other tests read it, too
    (first,) = read_json_lines(folder / "runs" / "runs.jsonl")
    scored = abe("eval", "runs/first", "--results", "again.jsonl", folder=folder)
    assert scored.returncode == 0, scored.stderr
    assert scored.stdout.endswith("Result added to again.jsonl\n")
    (again,) = read_json_lines(folder / "again.jsonl")
    assert again["scores"] == first["scores"]
    for run, where in (
        ("runs/first/checkpoints/step-00000004", folder),
        (".", folder / "runs" / "first"),
    ):
        assert abe("eval", run, folder=where).returncode == 0
    assert len(read_json_lines(folder / "runs" / "runs.jsonl")) == 3

    written = abe("report", "runs/first", "-o", "pages/[red].html", folder=folder)
    assert written.returncode == 0, written.stderr
    assert written.stdout == "Report: pages/[red].html\n"
    assert "<html" in (folder / "pages" / "[red].html").read_text()

    table = abe("results", "runs/runs.jsonl", folder=folder)
    assert table.returncode == 0, table.stderr
    assert table.stdout.startswith("**photos**: 16 test images")
    assert table.stderr == ""
    page = folder / "page.md"
    page.write_text("above\n<!-- results:begin --><!-- results:end -->\nbelow\n")
    assert abe_here("results", str(folder / "runs" / "runs.jsonl"), "--into", str(page)) == 0
    assert table.stdout.strip() in page.read_text()
    assert page.read_text().startswith("above\n")
    assert page.read_text().endswith("\nbelow\n")
    own = ["results", "runs/runs.jsonl"]
    start = abe(*own, "--start", "random weights", folder=folder)
    assert start.stdout == table.stdout
    none = abe(*own, "--start", "", folder=folder)
    assert (none.returncode, "no run began with ''" in none.stderr) == (2, True)
    both = abe(*own, "--page", "claims.md", "--of", "table1", folder=folder)
    assert (both.returncode, "leave out --of and --start" in both.stderr) == (2, True)
    assert not (folder / "claims.md").exists()


def test_a_place_for_results_that_cannot_be_written_is_told_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = ["train", "photos", "--run", "runs/lost", "--results", "photos", "--skip-broken"]
    assert abe_here(*words, *TINY) == 2
    assert "photos: Is a directory" in capsys.readouterr().err
    assert not (folder / "runs" / "lost").exists()
    assert abe_here("eval", "runs/absent") == 2
    assert "runs/absent: there is no such run" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_prints_the_table_and_ends_with_the_report_s_path(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    settings = [word for word in TINY if "weights" not in word and "learners" not in word]
    assert abe_here("demo", "photos", "--skip-broken", *settings) == 0
    shown = capsys.readouterr().out
    for method in ("raw pixels", "pretrained start", "1-head^8", "ABE-4^8"):
        assert method in shown
    assert "photos: 16 test images of 4 classes" in " ".join(shown.split())
    assert shown.splitlines()[-1] == "Report: demo/report.html"
    assert "photos" in (folder / "demo" / "report.html").read_text()


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert abe_here("--version") == 0
    assert capsys.readouterr().out == f"abe {project['version']}\n"


def test_output_can_be_cut_by_head() -> None:
    command = f"set -o pipefail; {shlex.quote(str(ABE))} train --help | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "U"
    assert done.stderr == ""


# --- Stopping and going on ---------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path("runs") / ("[bold]a long :cat: name" * 5) / "second"
    words = ["train", "photos", "--run", run, "--skip-broken", *TINY, "--set=train.steps=2000"]
    with subprocess.Popen(
        [ABE, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not checkpoints(folder / run):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate()
    assert process.returncode == 130, said
    assert printed == ""
    (line,) = [line for line in said.splitlines() if line.startswith("Stopped by SIGINT")]
    (step,) = re.findall(r"after step (\d+), saved\.", line)
    (command,) = re.findall(r"To go on: (.* train --resume .*)$", line)
    last = checkpoints(folder / run)[-1]
    assert last.name == f"step-{int(step):08d}"

    shorten(folder / run, steps=int(step) + 1)
    name, *arguments = shlex.split(command)
    assert name == str(ABE)
    monkeypatch.chdir(folder)
    assert abe_here(*arguments) == 0
    assert "ABE-2^8" in capsys.readouterr().out
    lines = read_json_lines(folder / run / "metrics.jsonl")
    taken = [line["step"] for line in lines if "loss" in line]
    assert taken == list(range(1, int(step) + 2))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_warned_of_and_the_one_before_taken(
    trained: subprocess.CompletedProcess[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert trained.returncode == 0, trained.stderr
    monkeypatch.chdir(folder)
    run = Path("runs") / "first"
    newest = checkpoints(run)[-1] / "model.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert abe_here("train", "--resume", str(run), "--results", "resumed.jsonl") == 0
    said = capsys.readouterr().err
    line, left_out = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert left_out == "warning: photos has images that cannot be read (1 of 33), and are left out:"
    assert line.endswith("; taking the checkpoint before it")
    assert "UserWarning" not in said
    assert newest.read_bytes() == whole


def test_ctrl_c_outside_of_training_prints_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("abe.model.summary.summary_rows", interrupt)
    assert abe_here("summary") == 130
    assert "Traceback" not in capsys.readouterr().err


# --- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "runs/x"), "runs/x: No space left on device: give"),
        (OSError("no number"), "no number: give another path"),
        (torch.OutOfMemoryError("CUDA out of memory"), "there is too little memory: lower train."),
        (
            ReadingError(5, "Input/output error", "a.jpg"),
            "a.jpg: Input/output error: see to the",
        ),
        (MemoryError(), "there is too little memory: lower train."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "too little mem"),
    ],
    ids=str,
)
def test_what_the_machine_lacks_is_a_message(
    error: Exception,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("abe.model.summary.summary_rows", fail)
    assert abe_here("summary") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


def test_a_defect_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abe.model.summary.summary_rows", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        abe_here("summary")
    monkeypatch.setattr("abe.model.summary.summary_rows", lambda: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        abe_here("summary")


def test_paths_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[bold red]no[/] :cat: " + "a long name " * 12
    assert abe_here("train", name) == 2
    assert capsys.readouterr().err == f"error: {name}: there is no such folder or file\n"


# --- Summary and config ------------------------------------------------------------------------


def test_summary_prints_the_13_networks(capsys: pytest.CaptureFixture[str]) -> None:
    assert abe_here("summary", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 13
    for row in rows:
        assert row.keys() >= {"name", "params", "macs", "paper_params", "paper_macs"}
        assert row["params"] == pytest.approx(row["paper_params"], abs=5e4)
        assert row["macs"] == pytest.approx(row["paper_macs"], rel=5e-3)
    assert {"ABE-8^512": 12_047_040}.items() <= {r["name"]: r["params"] for r in rows}.items()
    assert abe_here("summary") == 0
    table = capsys.readouterr().out
    for row in rows:
        assert row["name"] in table
        assert f"{row['params']:,}" in table


def test_explained_settings_are_named_in_full(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the width: --set takes these names."""
    monkeypatch.setattr(cli.out, "_width", 80)
    assert abe_here("config", "--explain") == 0
    shown = capsys.readouterr().out
    for section, values in Config().to_json().items():
        for name in values if isinstance(values, dict) else [None]:
            assert f"{section}.{name} " in shown if name else f"{section} " in shown


def test_a_folder_that_is_called_as_the_drawn_images_is_not_passed_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert abe_here("config", "synthetic") == 0
    (tmp_path / "synthetic").mkdir()
    assert abe_here("config", "./synthetic") == abe_here("config") == 0
    assert abe_here("config", "synthetic") == 2
    assert "a folder of this name are ./synthetic" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        "photos",
        "--run x",
        "--root x",
        "--recipe demo",
        "--weights none",
        "--split-classes 0.5",
        "--skip-broken",
        "--allow-partial",
    ],
)
def test_resume_takes_no_other_images_or_settings(
    more: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert abe_here("train", *more.split(), "--resume", "runs/x") == 2
    assert "give nothing with it but --results" in capsys.readouterr().err


OPTIONS = {
    "--device=cpu": ("device", "cpu"),
    "--split-classes=0.3": ("data.split_classes", 0.3),
    "--skip-broken": ("data.skip_broken", True),
    "--allow-partial": ("data.allow_partial", True),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("words", "target"),
    [
        ("train photos", "abe.train.Trainer"),
        ("demo photos", "abe.demo.run_demo"),
        ("sweep photos", "abe.sweep.run_sweep"),
        ("reproduce table2 --data photos", "abe.reproduce.Reproduction"),
    ],
)
def test_options_reach_what_a_verb_calls(
    words: str, target: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = MagicMock(side_effect=InputError("called"))
    monkeypatch.setattr(target, called)
    assert abe_here(*words.split(), option) == 2
    first = called.call_args.args[0]
    key, value = OPTIONS[option]
    assert flatten(getattr(first, "base", first).to_json())[key] == value


def test_eval_hands_on_all_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = MagicMock(side_effect=InputError("called"))
    monkeypatch.setattr("abe.evaluate.evaluate_run", called)
    words = ("DATA", "--root", "ROOT", "--allow-partial", "--device", "cpu")
    assert abe_here("eval", str(tmp_path), *words) == 2
    assert called.call_args.args == (tmp_path, "DATA", "ROOT", True, "cpu")


def test_a_part_of_a_run_s_own_images_is_no_choice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert abe_here("eval", str(tmp_path), "--allow-partial") == 2
    assert "--allow-partial has no effect on the run's own images" in capsys.readouterr().err


def test_config_prints_what_train_would_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "photos --recipe paper --weights none --skip-broken --set train.lr=0.5"
    assert abe_here("config", *words.split()) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["recipe"], shown["data"]["source"]) == ("paper", "photos")
    assert (shown["model"]["weights"], shown["data"]["skip_broken"]) == (None, True)
    assert shown["train"]["lr"] == 0.5
    monkeypatch.setattr(cli.out, "_width", 200)
    assert abe_here("config", *words.split(), "--explain") == 0
    (line,) = (row for row in capsys.readouterr().out.splitlines() if "train.lr " in row)
    assert line.split() == [
        "train.lr",
        "0.5",
        "number",
        ">",
        "0",
        "The",
        "learning",
        "rate",
        "at",
        "its",
        "highest.",
    ]
