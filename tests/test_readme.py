"""The README's code blocks.

Python blocks run as they stand, in order, in one namespace; so do shell blocks under the comment
`<!-- test: run -->`, in the same temporary directory. Of the other shell blocks, every `abe` verb
and option and every `make` target has to exist.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from helpers import blocks, run_python
from PIL import Image

from abe.config import Config
from abe.results import read_records, replace_between

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
    (command,) = [words for words in commands() if "--into" in words]
    (tmp_path / "README.md").write_text(replace_between(text, "results", ""), encoding="utf-8")
    subprocess.run([ABE, *command[1:]], cwd=tmp_path, check=True)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text, shlex.join(command)


def test_picture_is_that_of_the_recorded_runs(tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to(ROOT / "results")
    (command,) = [words for words in commands() if "--picture" in words]
    picture = Path(command[command.index("--picture") + 1])
    (tmp_path / picture.parent).mkdir(parents=True)
    subprocess.run([ABE, *command[1:]], cwd=tmp_path, check=True)
    assert f"({picture})" in README.read_text(encoding="utf-8")
    with Image.open(tmp_path / picture) as drawn, Image.open(ROOT / picture) as shown:
        assert drawn.size == shown.size
        figures = drawn.info["Description"]
        assert figures == shown.info["Description"], shlex.join(command)
    assert figures.count("\nCUB-200-2010 (not comparable with published results),ABE-") == 4


CLAIMS = {  # of README's table
    "ABE-2 above 2-heads": "recall@1 of ABE-2^512 is above that of 2-heads^512",
    "ABE-4 above 4-heads": "recall@1 of ABE-4^512 is above that of 4-heads^512",
    "ABE-8 above 8-heads": "recall@1 of ABE-8^512 is above that of 8-heads^512",
    "ABE-4 above 1-head": "recall@1 of ABE-4^512 is above that of 1-head^512",
    "4-heads above 1-head": "recall@1 of 4-heads^512 is above that of 1-head^512",
    "ABE-8 above ABE-4": "recall@1 of ABE-8^512 is above that of ABE-4^512",
    "learners of ABE-8 above those of ABE-4, both of 64 dimensions": (
        "learners' recall@1 of ABE-8^512 is above that of ABE-4^256"
    ),
    "ABE-4 above its learners": "recall@1 of ABE-4^512 is above learners' recall@1 of ABE-4^512",
    "ABE-4 above ABE-4 without Eq. 9": (
        "recall@1 of ABE-4^512 is above that of ABE-4^512 without L_div"
    ),
    "learners of ABE-4 above those of ABE-4 without Eq. 9": (
        "learners' recall@1 of ABE-4^512 is above that of ABE-4^512 without L_div"
    ),
    "4-heads with Eq. 9 not above 4-heads": (
        "recall@1 of 4-heads^512 with L_div is not above that of 4-heads^512"
    ),
    "ABE-4 above 4-heads with attention": "recall@1 of ABE-4^512 is above that of 4-heads+att^512",
    "ABE-4 above 4-tails": "recall@1 of ABE-4^512 is above that of 4-tails^512",
    "4-heads with attention above 4-heads": (
        "recall@1 of 4-heads+att^512 is above that of 4-heads^512"
    ),
    "ABE-4: Eq. 10 balanced above as printed": (
        "recall@1 of ABE-4^512, Eq. 10 balanced is above that of ABE-4^512, Eq. 10 as printed"
    ),
    "ABE-4 above 1-head, both with multi-similarity": (
        "recall@1 of ABE-4^512, multi-similarity is above that of 1-head^512, multi-similarity"
    ),
    "ABE-4 above 1-head, both with the margin loss": (
        "recall@1 of ABE-4^512, margin, weighted by distance is above that of "
        "1-head^512, margin, weighted by distance"
    ),
    "1-head: multi-similarity above Eq. 10": (
        "recall@1 of 1-head^512, multi-similarity is above that of 1-head^512, Eq. 10 balanced"
    ),
    "ABE-4: multi-similarity above Eq. 10": (
        "recall@1 of ABE-4^512, multi-similarity is above that of ABE-4^512, Eq. 10 balanced"
    ),
    "1-head: margin loss above Eq. 10": (
        "recall@1 of 1-head^512, margin, weighted by distance is above that of "
        "1-head^512, Eq. 10 balanced"
    ),
    "ABE-4: margin loss above Eq. 10": (
        "recall@1 of ABE-4^512, margin, weighted by distance is above that of "
        "ABE-4^512, Eq. 10 balanced"
    ),
    "ABE-4, Eq. 10 balanced: lambda 0.1 above 1": (
        "recall@1 of divergence_weight 0.1, balanced is above that of divergence_weight 1, balanced"
    ),
    "ABE-4: five attention blocks above one": (
        "recall@1 of attention_depth 5 is above that of attention_depth 1"
    ),
    "ABE-4: best test score like the picked one": (
        "recall@1 picked by test images of ABE-4^512 is similar to recall@1 of ABE-4^512"
    ),
}
IMAGES = ("CUB-200-2010", "CARS-196 (training half)")
FIGURES = re.compile(
    r"^\| .*? \| ([^|]*) \| .* \| (\S+) \[(\S+), (\S+)\], (\d+) seed.* \| \*\*([^*]+)\*\* "
    r"\| ([^|]*) \|"
)


def in_short(claim: str, page: str) -> str:
    """The rest of a row of README's table: what docs/results.md says of runs from its start.

    With a star where it has reservations.
    """
    cells, paper = [], ""
    for images in IMAGES:
        lines = [
            (found, line)
            for line in page.splitlines()
            if line.startswith(f"| {claim} |") and f"| {images} " in line
            if "from googlenet-mini-imagenet-v2" in line and (found := FIGURES.match(line))
        ]
        if not lines:
            cells.append("")
            continue
        found, line = lines[0]
        paper, *figures, seeds, verdict, doubts = found.groups()
        mean, low, high = (f"{float(figure):.1f}" for figure in figures)
        several = f", {seeds} seeds" * (seeds != "3")
        alone = ", these classes" * ("on these classes" in line)
        cell = f"{mean} ({low} to {high}{several}{alone})"
        if verdict.startswith("open"):
            cell = ""
        told = {"shown": f"**{cell}**", "refuted": f"refuted: {cell}"}.get(verdict, cell)
        cells.append(told + " \\*" * bool(doubts.strip() and cell))
    return f"{' | '.join(cells)} | {paper.removeprefix('+')} |"


def test_differences_are_those_of_the_results_page() -> None:
    """Rows of the table, and what the text says of its column of the paper's figures."""
    _, _, said = README.read_text(encoding="utf-8").partition("<!-- results:end -->")
    said = said.partition("\n## ")[0]
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    rows = [line for line in said.splitlines() if re.match(r"\| \w", line)]
    assert rows == [f"| {told} | {in_short(claim, page)}" for told, claim in CLAIMS.items()]

    against_heads = [row.split(" | ") for row in rows[:3]]
    shares = [
        float(re.sub(r"[*]|\(.*", "", cell)) / float(cells[-1].removesuffix(" |"))
        for cells in against_heads
        for cell in cells[1:3]
    ]
    least, most = (round(100 * share) for share in (min(shares), max(shares)))
    assert f"{least} to {most} % of its size" in " ".join(said.split())


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


def test_eq_9_changes_nothing_in_heads_on_one_device() -> None:
    """What the text says of pairs of runs of 4-heads that differ in Eq. 9 alone."""
    pairs: dict[str, dict[bool, dict[str, Any]]] = {}
    for record in read_records(ROOT / "results/runs.jsonl"):
        config = Config.from_json(record["config"])
        if config.model.network != "m-heads" or config.model.num_learners != 4:
            continue
        ran = [record["environment"].get(key) for key in ("device", "cpu", "gpu", "precision")]
        alone = config.with_overrides(["train.divergence_weight=0", "recipe=any"]).portable()
        key = json.dumps([alone, record["weights"]["sha256"], record.get("images_digest"), ran])
        pairs.setdefault(key, {})[config.train.divergence_weight > 0] = record
    both = [tuple(pair.values()) for pair in pairs.values() if len(pair) == 2]
    for first, second in both:
        assert first["scores"]["ensemble"] == second["scores"]["ensemble"]
        assert first["scores"]["similarity"] == second["scores"]["similarity"]
        assert first["selection_recall@1"] == second["selection_recall@1"]
    said = " ".join(README.read_text(encoding="utf-8").split())
    assert (
        f"of {len(both)} pairs of runs on one device and precision every score is the same" in said
    )
