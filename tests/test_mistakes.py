"""What a user can get wrong, and what `abe` prints then: one message, status 2, no traceback.

docs/mistakes.md shows the same list with the real output. `python tests/test_mistakes.py` writes
it anew; a test fails when it is stale.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from abe import cli

PAGE = Path(__file__).parents[1] / "docs" / "mistakes.md"
ABE = Path(sys.executable).with_name("abe")
ENVIRONMENT = {  # of a terminal without a network
    "ABE_CACHE": "cache",
    "COLUMNS": "100",
    "http_proxy": "http://127.0.0.1:9",
    "no_proxy": "",
}

INTRODUCTION = """\
# Mistakes, and what `abe` says

Each of these ends with status 2 and one message that names the file or the setting and says what
to do; none with a traceback. `python tests/test_mistakes.py` writes this page from what the
commands really print, here with a small network and small batches where they get as far as that.
"""

# Added to some commands, so that they are quick; the page does not show it.
QUICK = [
    f"--set={setting}"
    for setting in (
        "model.network=m-heads",
        "model.num_learners=2",
        "model.embedding_dim=8",
        "model.weights=none",
        "data.resize=40",
        "data.crop=32",
        "train.batch_size=8",
        "precision=fp32",
    )
]


@dataclass(frozen=True)
class Mistake:
    """A command that cannot work.

    Attributes:
        title: what is wrong.
        command: what the user types.
        says: a regular expression of what the message must not lack.
        given: fills the folder that the command is typed in.
        quick: whether `QUICK` is added.
    """

    title: str
    command: str
    says: str
    given: Callable[[], object] = lambda: None
    quick: bool = False

    def __str__(self) -> str:
        return self.title


# --- What is in the folder ---------------------------------------------------------------------


def photos(classes: int = 40, images: int = 2) -> None:
    """photos/bird<class>/<number>.png"""
    rng = np.random.default_rng(0)
    for label in range(1, classes + 1):
        folder = Path(f"photos/bird{label}")
        folder.mkdir(parents=True)
        for number in range(1, images + 1):
            pixels = rng.integers(0, 256, (24, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


def loose_photos() -> None:
    Path("photos").mkdir()
    for number in (1, 2, 3):
        Image.new("RGB", (20, 20)).save(f"photos/{number}.jpg")


def single_photo() -> None:
    photos()
    Path("photos/bird7/2.png").unlink()


def broken_photos() -> None:
    photos()
    Path("photos/bird3/2.png").write_text("not an image")
    cut("photos/bird9/1.png")


def only_broken_photos() -> None:
    for name in ("bird1", "bird2"):
        folder = Path("photos", name)
        folder.mkdir(parents=True)
        (folder / "1.jpg").touch()
        (folder / "2.jpg").touch()


def csv(*lines: str) -> Callable[[], None]:
    def write() -> None:
        photos(classes=4)
        Path("birds.csv").write_text("\n".join(lines) + "\n")

    return write


def text(name: str, content: str = "hello\n") -> Callable[[], object]:
    return lambda: Path(name).write_text(content)


def cut(name: str) -> None:
    os.truncate(name, os.path.getsize(name) // 2)


def start(name: str, *shape: int) -> None:
    """photos, and start.safetensors with one tensor."""
    photos()
    save_file({name: torch.zeros(shape)}, "start.safetensors")


def cut_start() -> None:
    start("conv1.7x7_s2.weight", 64, 3, 7, 7)
    cut("start.safetensors")


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("harm",)


def malicious_start() -> None:
    photos()
    torch.save({"conv1.7x7_s2.weight": Malicious()}, "start.pth")


def trained(name: str = "birds") -> None:
    """photos, and a run on them that took no step."""
    if not Path("photos").exists():
        photos()
    status, output = typed(f"abe train photos --run runs/{name} --set train.steps=0", quick=True)
    assert status == 0, output


def swept() -> None:
    """photos, and a sweep of them whose only trial took no step."""
    photos()
    command = "abe sweep photos --folder sweeps/birds --trials 1 --set train.steps=0"
    status, output = typed(command, quick=True)
    assert status == 0, output


def unfinished() -> None:
    trained()
    Path("runs/birds/result.json").unlink()


def damaged() -> None:
    trained()
    cut("runs/birds/checkpoints/step-00000000/model.safetensors")


def moved_photos() -> None:
    trained()
    Path("photos").rename("pictures")


# --- The mistakes ------------------------------------------------------------------------------

MISTAKES = {
    "Images": [
        Mistake("The folder is not there", "abe train fotos", "fotos: there is no such", photos),
        Mistake(
            "An image instead of a folder",
            "abe train photos/bird1/1.png",
            "1.png is an image: give a folder",
            photos,
        ),
        Mistake(
            "A file that is neither",
            "abe train birds.txt",
            "birds.txt is neither a folder nor a .csv file: give",
            text("birds.txt"),
        ),
        Mistake(
            "Images directly in the folder",
            "abe train photos",
            "photos has images directly in it",
            loose_photos,
        ),
        Mistake(
            "An empty folder",
            "abe train photos",
            "photos has no sub-folders",
            lambda: Path("photos").mkdir(),
        ),
        Mistake(
            "A single class",
            "abe train photos",
            "photos has a single class, 'bird1'",
            lambda: photos(classes=1),
        ),
        Mistake(
            "Too few classes",
            "abe train photos",
            "photos: 2 training classes are too few",
            lambda: photos(classes=4),
        ),
        Mistake(
            "A class with a single image",
            "abe train photos",
            r"photos has classes with a single image .*:\nbird7",
            single_photo,
        ),
        Mistake(
            "Files that are damaged or no images",
            "abe train photos",
            r"\(2 of 80\); replace .*--skip-.*:\nphotos/bird3/2.png: .*\nphotos/bird9/1.png: ",
            broken_photos,
        ),
        Mistake(
            "No file that is an image",
            "abe train photos --skip-broken",
            r"photos .*\(4 of 4\)",
            only_broken_photos,
        ),
        Mistake(
            "A CSV file without a column",
            "abe train birds.csv",
            "birds.csv has no column label",
            csv("path,name", "photos/bird1/1.png,bird1"),
        ),
        Mistake(
            "A CSV file that lists an image that is not there",
            "abe train birds.csv",
            "birds.csv lists images that are not there .*\nphotos/bird1/3.png",
            csv("path,label", "photos/bird1/1.png,wren", "photos/bird1/3.png,wren"),
        ),
        Mistake(
            "A box that is not made of numbers",
            "abe train birds.csv",
            "birds.csv, line 2: x1,y1,x2,y2 are 3,4,wide,8",
            csv("path,label,x1,y1,x2,y2", "photos/bird1/1.png,wren,3,4,wide,8"),
        ),
        Mistake(
            "A part of the split that does not exist",
            "abe train birds.csv",
            "birds.csv, line 2: split is 'val'",
            csv("path,label,split", "photos/bird1/1.png,wren,val"),
        ),
        Mistake(
            "A class in both parts of the split",
            "abe train birds.csv",
            "birds.csv has classes both in train and in test .*: wren",
            csv(
                "path,label,split",
                "photos/bird1/1.png,wren,train",
                "photos/bird1/2.png,wren,test",
                "photos/bird2/1.png,robin,train",
                "photos/bird2/2.png,robin,train",
            ),
        ),
    ],
    "Settings": [
        Mistake(
            "A setting that does not exist",
            "abe train photos --set train.batchsize=32",
            "no setting 'train.batchsize': did you mean 'train.batch_size'?",
        ),
        Mistake(
            "A setting without its group",
            "abe train photos --set lr=0.1",
            "no setting 'lr': did you mean 'train.lr'?",
        ),
        Mistake(
            "A group of settings",
            "abe train photos --set train=fast",
            "train is a group of settings",
        ),
        Mistake(
            "No equals sign",
            "abe train photos --set train.lr",
            "'train.lr': write key=value",
        ),
        Mistake(
            "A value of another type",
            "abe train photos --set train.steps=many",
            "train.steps='many': it has to be a valid integer$",
        ),
        Mistake(
            "A value out of range",
            "abe train photos --set train.steps=-1",
            "train.steps=-1: it has to be greater than or equal to 0$",
        ),
        Mistake(
            "A number that is none",
            "abe train photos --set train.lr=nan",
            "train.lr='nan': it has to be a finite number$",
        ),
        Mistake(
            "A choice that does not exist",
            "abe train photos --set train.optimizer=adam",
            "train.optimizer='adam': it has to be 'sgd' or 'adamw'$",
        ),
        Mistake(
            "A recipe that does not exist",
            "abe train photos --recipe photo",
            "no recipe 'photo': did you mean 'photographs'?",
        ),
        Mistake(
            "Learners that cannot share the embedding",
            "abe train photos --set model.num_learners=3",
            "embedding_dim=512 cannot be shared by 3 learners: use 510 or 513",
        ),
        Mistake(
            "A crop larger than the image",
            "abe train photos --set data.crop=200",
            "data.crop=200 does not fit into data.resize=128",
        ),
        Mistake(
            "A crop that is too small for the network",
            "abe train photos --set data.crop=8",
            "data.crop=8 is too small for model.backbone=googlenet: it takes 31 and above",
        ),
        Mistake(
            "A batch that whole classes do not fill",
            "abe train photos --set train.batch_size=30",
            "train.batch_size=30 .*train.images_per_class=4: use 28 or 32",
        ),
        Mistake(
            "A batch that pairs do not fill",
            "abe train photos --set train.sampler=pairs --set train.batch_size=30",
            "train.batch_size=30 .*pairs.*: use 28 or 32",
        ),
        Mistake(
            "A batch with more pairs than there are images",
            "abe train photos --set train.sampler=pairs --set train.batch_size=128",
            "train.batch_size=128 takes 64 different images",
            photos,
        ),
        Mistake(
            "A backbone that does not exist",
            "abe train photos --set model.backbone=resnet",
            "backbone 'resnet' is unknown: did you mean 'resnet50'?",
        ),
        Mistake(
            "A branch point that does not exist",
            "abe train photos --set model.branch_point=pool9",
            "branch_point='pool9' is not a stage of googlenet",
            photos,
        ),
        Mistake(
            "Attention that is too deep",
            "abe train photos --set model.attention_depth=9",
            "attention_depth=9: googlenet has 7 blocks",
            photos,
        ),
        Mistake(
            "A metric loss that does not exist",
            "abe train photos --set train.metric_loss=MultiSimilarity",
            "metric loss 'MultiSimilarity' .*: did you mean 'MultiSimilarityLoss'?",
            photos,
        ),
        Mistake(
            "A wrong argument of a metric loss",
            "abe train photos --set 'train.metric_loss=MultiSimilarityLoss(alfa=2)'",
            "MultiSimilarityLoss has no argument 'alfa': did you mean 'alpha'?",
            photos,
        ),
        Mistake(
            "A GPU that is not there",
            "abe train photos --set device=cuda",
            "device=cuda: PyTorch finds no CUDA GPU here: use auto or cpu",
            photos,
        ),
        Mistake(
            "A device that does not exist",
            "abe train photos --set device=gpu",
            "device=gpu is unknown: use auto, cpu, cuda or mps",
            photos,
        ),
    ],
    "Weights": [
        Mistake(
            "A name or a file that does not exist",
            "abe train photos --weights bvlc-googlnet",
            "'bvlc-googlnet': no such file, and no such name: did you mean 'bvlc-googlenet'?",
            photos,
        ),
        Mistake(
            "A download without a network",
            "abe train photos --weights bvlc-googlenet",
            "the download to .* failed .*by hand and give it as --weights FILE",
            photos,
        ),
        Mistake(
            "A file of another kind",
            "abe train photos --weights start.h5",
            "start.h5: is none of .caffemodel, ",
            lambda: (photos(), Path("start.h5").touch()),
        ),
        Mistake(
            "A text file by another name",
            "abe train photos --weights start.caffemodel",
            "start.caffemodel: ",
            lambda: (photos(), text("start.caffemodel")()),
        ),
        Mistake(
            "A file that was cut",
            "abe train photos --weights start.safetensors",
            "start.safetensors: cannot be read as safetensors .*: fetch or save it again",
            cut_start,
        ),
        Mistake(
            "A file that would run code",
            "abe train photos --weights start.pth",
            "start.pth: is damaged, or holds more than plain tensors, and nothing else is ever",
            malicious_start,
        ),
        Mistake(
            "Weights of another network",
            "abe train photos --weights start.safetensors",
            "start.safetensors: no layer has a name of the model's.*: use the backbone resnet50",
            lambda: start("layer1.0.conv1.weight", 64, 64, 1, 1),
        ),
        Mistake(
            "Layers of another shape",
            "abe train photos --weights start.safetensors",
            r"start.safetensors: conv1.7x7_s2.weight has the shape \(64, 3, 5, 5\)",
            lambda: start("conv1.7x7_s2.weight", 64, 3, 5, 5),
        ),
        Mistake(
            "Another backbone, and the weights of the usual one",
            "abe train photos --set model.backbone=resnet50",
            "model.weights=googlenet-mini-imagenet-v2 are of .*: use torchvision-resnet50, ",
            photos,
        ),
        Mistake(
            "A folder that is no checkpoint",
            "abe train photos --weights photos",
            "photos: is no checkpoint",
            photos,
        ),
    ],
    "Training": [
        Mistake(
            "A learning rate that is too high",
            "abe train photos --set train.lr=1e30",
            r"embeddings are not finite at step \d+: lower train.lr \(1e\+30\) .*photos/bird\d+",
            photos,
            quick=True,
        ),
        Mistake(
            "A folder that holds a run already",
            "abe train photos --run runs/birds",
            "runs/birds holds a run already: go on with `abe train --resume runs/birds`",
            trained,
            quick=True,
        ),
        Mistake(
            "A folder that cannot be made",
            "abe train photos --run notes.txt/birds",
            "notes.txt: File exists: give another path",
            lambda: (photos(), text("notes.txt")()),
            quick=True,
        ),
        Mistake(
            "A run that does not exist",
            "abe train --resume runs/bird",
            "runs/bird is not a folder: give the folder of a run",
            trained,
        ),
        Mistake(
            "A folder without checkpoints",
            "abe train --resume runs",
            "runs has no checkpoints: give the folder of a run",
            trained,
        ),
        Mistake(
            "A damaged checkpoint",
            "abe train --resume runs/birds",
            "runs/birds/checkpoints/step-00000000/model.safetensors was changed or cut",
            damaged,
        ),
        Mistake(
            "Other settings for a run that goes on",
            "abe train --resume runs/birds --set train.steps=500",
            "runs/birds goes on as it was started: give only what changes no result",
            trained,
        ),
    ],
    "Scores, tables and reports": [
        Mistake(
            "A file instead of a run",
            "abe eval runs/birds/config.json",
            "runs/birds/config.json is not a folder: give the folder of a run",
            trained,
        ),
        Mistake(
            "A run whose images are gone",
            "abe eval runs/birds",
            "photos: there is no such folder or file",
            moved_photos,
        ),
        Mistake(
            "A run that is not finished",
            "abe report runs/birds",
            "runs/birds is not finished: go on with `abe train --resume runs/birds`",
            unfinished,
        ),
        Mistake(
            "A report that cannot be written",
            "abe report runs/birds -o notes.txt/birds.html",
            "notes.txt/birds.html cannot be written",
            lambda: (trained(), text("notes.txt")()),
        ),
        Mistake(
            "A file of results that is not there",
            "abe results runs.jsonl",
            "runs.jsonl cannot be read: No such file or directory",
        ),
        Mistake(
            "A broken line in a file of results",
            "abe results runs.jsonl",
            "runs.jsonl, line 2 is no JSON object: correct or remove it",
            text("runs.jsonl", '{"method": "ABE-4^512"}\n{"method": "ABE\n'),
        ),
        Mistake(
            "A log instead of results",
            "abe results runs/birds/metrics.jsonl",
            "runs/birds/metrics.jsonl, line 1 is no result of `abe train` or `abe eval`.*remove it",
            trained,
        ),
        Mistake(
            "A page without a place for the tables",
            "abe results runs/runs.jsonl --into README.md",
            "README.md: the text has no <!-- results:begin --> ... <!-- results:end -->",
            lambda: (trained(), text("README.md")()),
        ),
    ],
    "A sweep": [
        Mistake(
            "A sweep that would look at the test images",
            "abe sweep photos --set protocol=paper",
            "protocol=paper scores the test images.*: leave",
            photos,
        ),
        Mistake(
            "A setting that a sweep does not search",
            "abe sweep photos --search train.steps",
            "a sweep cannot search train.steps: choose among train.lr, ",
            photos,
        ),
        Mistake(
            "A budget without a unit",
            "abe sweep photos --budget 2",
            "--budget 2: write a number and s, m or h, as in 30m",
            photos,
        ),
        Mistake(
            "The folder of another sweep",
            "abe sweep photos --folder sweeps/birds",
            "sweeps/birds holds a sweep with another train.steps: give",
            swept,
            quick=True,
        ),
        Mistake(
            "A broken line among the trials",
            "abe sweep photos --folder sweeps/birds --set train.steps=0",
            "sweeps/birds/trials.jsonl, line 1 is no trial of `abe sweep`: correct or remove it",
            lambda: (swept(), text("sweeps/birds/trials.jsonl", "{}\n")()),
            quick=True,
        ),
    ],
    "The command": [
        Mistake("A verb that does not exist", "abe trian photos", "Did you mean 'train'?"),
        Mistake("An option that does not exist", "abe train photos --steps 100", "No such option"),
        Mistake("An argument that is missing", "abe eval", "Missing argument 'RUN'"),
    ],
}


# --- Making them ------------------------------------------------------------------------------


def typed(command: str, quick: bool = False) -> tuple[object, str]:
    """Exit status and output of a command, run in this process."""
    said = io.StringIO()
    status: object = 0
    with (
        mock.patch.object(sys, "argv", shlex.split(command) + QUICK * quick),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code
    return status, said.getvalue()


def make(mistake: Mistake) -> tuple[object, str]:
    """The same of a mistake, in a folder of its own on a machine without GPU and network."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, ENVIRONMENT),
        mock.patch.object(urllib.request, "_opener", None),  # it keeps the proxies it saw first
        mock.patch.object(torch.cuda, "is_available", return_value=False),
    ):
        mistake.given()
        status, output = typed(mistake.command, mistake.quick)
        assert not Path("harm").exists()
        # What differs between machines.
        output = output.replace(os.path.realpath(folder), "~/birds")
        return status, re.sub(r"\[Errno \d+\] ", "", output)


def shown(mistake: Mistake, output: str) -> str:
    """The mistake's part of the page."""
    return f"**{mistake.title}**\n\n```console\n$ {mistake.command}\n{output.strip()}\n```\n"


def page(parts: dict[str, list[str]]) -> str:
    """The whole page; `parts` are by section."""
    sections = [f"## {name}\n\n" + "\n".join(texts) for name, texts in parts.items()]
    return "\n".join([INTRODUCTION, *sections])


@pytest.mark.parametrize("mistake", [m for section in MISTAKES.values() for m in section], ids=str)
def test_a_message_and_no_traceback(mistake: Mistake) -> None:
    status, output = make(mistake)
    assert status == 2, output
    assert re.search(mistake.says, output, re.MULTILINE), output
    assert len(re.findall("^error: ", output, re.MULTILINE | re.IGNORECASE)) == 1
    assert "Traceback" not in output
    assert "pydantic" not in output
    _, title, rest = PAGE.read_text().partition(f"**{mistake.title}**")
    part = shown(mistake, output)
    assert (title + rest)[: len(part)] == part, "stale: run `python tests/test_mistakes.py`"


@pytest.mark.parametrize(
    "title", ["A value out of range", "A run that does not exist", "An argument that is missing"]
)
def test_the_real_command_says_the_same(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mistake,) = [m for section in MISTAKES.values() for m in section if m.title == title]
    monkeypatch.chdir(tmp_path)
    mistake.given()
    ended = subprocess.run(
        [ABE, *shlex.split(mistake.command)[1:]],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert shown(mistake, ended.stderr) in PAGE.read_text()


def test_the_page_has_all_mistakes_and_no_other() -> None:
    empty = page({name: [shown(m, "") for m in section] for name, section in MISTAKES.items()})
    outline = re.compile(r"^(?:#|\*\*|\$ ).*", re.MULTILINE)
    assert outline.findall(PAGE.read_text()) == outline.findall(empty)


if __name__ == "__main__":
    parts = {
        name: [shown(mistake, make(mistake)[1]) for mistake in section]
        for name, section in MISTAKES.items()
    }
    PAGE.write_text(page(parts), encoding="utf-8")
