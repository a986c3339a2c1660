"""The README's code blocks.

Python blocks run as they stand, in order, in one namespace; so do shell blocks under the comment
`<!-- test: run -->`, in the same temporary directory. Of the other shell blocks, every `abe` verb
and option and every `make` target has to exist.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
from helpers import blocks, run_python

from abe.results import replace_between

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ABE = Path(sys.executable).with_name("abe")
SHELLS = ("sh", "bash", "console")


def shell_code(block: re.Match[str]) -> str:
    """The block without what a `console` block shows of the commands' output."""
    code = block["code"].replace("\\\n", "")
    if block["language"] != "console":
        return code
    return "".join(re.findall(r"^\$ (.*\n)", code, re.MULTILINE))


def commands() -> Iterator[list[str]]:
    for block in blocks(README):
        if block["language"] in SHELLS:
            for line in shell_code(block).splitlines():
                words = shlex.split(line, comments=True)
                yield list(takewhile(lambda word: word not in ("|", ">", "&&"), words))


@cache
def help_text(*verbs: str) -> str | None:
    """What `abe VERB ... --help` prints, without colour or wrapping; None if it fails."""
    result = subprocess.run(
        [ABE, *verbs, "--help"],
        env={"PATH": os.environ["PATH"], "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout if result.returncode == 0 else None


def test_abe_commands_exist() -> None:
    shown = [words[1:] for words in commands() if words and Path(words[0]).name == "abe"]
    assert shown, "README.md shows no abe command"
    for verb, *arguments in shown:
        verbs = (verb, arguments[0]) if verb == "data" else (verb,)
        text = help_text(*verbs)
        assert text is not None, f"README.md shows `abe {' '.join(verbs)}`, which does not exist"
        for option in (word.partition("=")[0] for word in arguments if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), (
                f"README.md shows `abe {verb} {option}`, which does not exist"
            )


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = {word for words in commands() if words[:1] == ["make"] for word in words[1:]}
    assert {word for word in shown if "=" not in word} <= set(targets)


def test_results_table_is_that_of_the_recorded_runs(tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to(ROOT / "results")
    text = README.read_text(encoding="utf-8")
    (command,) = [words for words in commands() if words[1:2] == ["results"]]
    (tmp_path / "README.md").write_text(replace_between(text, "results", ""), encoding="utf-8")
    subprocess.run([ABE, *command[1:]], cwd=tmp_path, check=True)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text, shlex.join(command)


def test_differences_are_those_of_the_results_page() -> None:
    """Each mean with its interval; no interval stands without its mean."""
    _, _, said = README.read_text(encoding="utf-8").partition("<!-- results:end -->")
    said = " ".join(said.partition("\n## ")[0].split())
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    told = re.findall(r"(-?\d+\.\d) \((-?\d+\.\d) to (-?\d+\.\d)\b", said)
    assert len(told) == len(re.findall(r"\d\.\d to -?\d", said)) > 0
    for figures in told:
        mean, low, high = map(float, figures)
        assert f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" in page, f"{figures}: out of date"


@pytest.mark.slow
def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{ABE.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    namespace: dict[str, object] = {"__name__": "__main__"}
    assert any(block["language"] == "python" for block in blocks(README)), (
        "README.md shows no Python"
    )
    for block in blocks(README):
        if block["language"] == "python":
            run_python(block, README, namespace)
        elif block["run"]:
            subprocess.run(["bash", "-euo", "pipefail", "-c", shell_code(block)], check=True)
