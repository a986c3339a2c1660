"""What a fresh clone is set up from: the lock, the scripts, and nothing of one machine."""

import os
import re
import shutil
import subprocess
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")


def lock() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def required() -> list[Requirement]:
    """Everything that pyproject.toml asks for: to run, its extras and the tools."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    groups.append(pyproject["dependency-groups"]["dev"])
    return [Requirement(line) for line in chain.from_iterable(groups)]


def applies(requirement: Requirement, python: str) -> bool:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_holds_what_pyproject_asks_for(python: str) -> None:
    pins = {pin.name: pin for pin in lock() if applies(pin, python)}
    for requirement in required():
        if applies(requirement, python):
            assert requirement.name in pins, f"{requirement} is not in the lock: run `make lock`"
            (pin,) = pins[requirement.name].specifier
            assert requirement.specifier.contains(pin.version), f"{pin}: run `make lock`"


def test_lock_fits_every_machine() -> None:
    for pin in lock():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert "+" not in specifier.version, f"{pin} is one build of a version"
        assert pin.url is None
        assert not re.match(r"nvidia-|cuda-|triton", pin.name), f"{pin} is for CUDA only"
    assert sum(pin.name == "torch" for pin in lock()) == 1


@pytest.mark.parametrize("path", ["requirements.lock", "Makefile", "tools/setup.sh", ".ci/run"])
def test_set_up_names_no_host(path: str) -> None:
    assert "://" not in (ROOT / path).read_text()


def test_no_file_names_a_machine_s_own_paths() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    own = re.compile(rb"(?<![\w.~-])/(?:work|opt|root|home)/|\.\./shared")
    found = [
        f"{name}: {match[0].decode()}"
        for name in listing.stdout.split("\0")
        if (ROOT / name).is_file() and (match := own.search((ROOT / name).read_bytes()))
    ]
    assert found == []


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What tools/setup.sh reads, in a directory with a space in its name."""
    clone = tmp_path / "a clone"
    for name in ("requirements.lock", "pyproject.toml", "tools/setup.sh"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    return clone


def set_up(clone: Path, interpreters: dict[str, str], **variables: str) -> str:
    """The output of setup.sh, which has to fail, with these scripts as the only interpreters."""
    folder = clone / "interpreters"
    folder.mkdir()
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        script = folder / name
        script.write_text(f"#!/bin/sh\n{interpreters.get(name, 'exit 127')}\n")
        script.chmod(0o755)
    result = subprocess.run(
        ["bash", clone / "tools/setup.sh"],
        env={"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    return result.stdout


# Stands in for an interpreter that fits: it passes the probe, and says so when asked for more.
FITTING = '[ "$1" = -c ] || { echo "$0 $*"; exit 3; }'


def test_set_up_passes_over_interpreters_that_do_not_run(clone: Path) -> None:
    output = set_up(clone, {"python3": "exit 1", "python3.12": FITTING})
    assert output == f"{clone}/interpreters/python3.12 -m venv .venv\n"


def test_set_up_prefers_the_plain_interpreter(clone: Path) -> None:
    output = set_up(clone, {"python3": FITTING, "python3.13": FITTING})
    assert output == f"{clone}/interpreters/python3 -m venv .venv\n"


def test_set_up_says_that_no_interpreter_fits(clone: Path) -> None:
    output = set_up(clone, {})
    assert "no Python 3.11, 3.12 or 3.13" in output
    assert "make setup PYTHON=" in output


def test_set_up_takes_the_named_interpreter_or_none(clone: Path) -> None:
    output = set_up(clone, {"python3": FITTING}, PYTHON="python3.13")
    assert output.startswith("setup: PYTHON=python3.13 does not run, is not Python 3.11 to 3.13")


@pytest.mark.parametrize(("setting", "compiled"), [("1", "1"), ("", "")])
def test_set_up_compiles_where_python_keeps_no_bytecode(
    clone: Path, setting: str, compiled: str
) -> None:
    tell = FITTING.replace("$0 $*", "compile=$UV_COMPILE_BYTECODE")
    output = set_up(clone, {"python3": tell}, PYTHONDONTWRITEBYTECODE=setting)
    assert output == f"compile={compiled}\n"
