"""How a run begins: its first loss is printed soon, is the right one, and changes nothing."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from abe.config import Config, DataConfig, ModelConfig, TrainConfig
from abe.data.datasets import image_folder
from abe.data.prepare import prepare
from abe.data.synthetic import SyntheticVehicles
from abe.files import read_json_lines
from abe.train import Trainer

TINY = Config(
    device="cpu",
    precision="fp32",
    tracking=(),
    model=ModelConfig(num_learners=2, embedding_dim=8, backbone="googlenet_bn", weights=None),
    data=DataConfig(resize=40, crop=32, synthetic_classes=8, synthetic_images=4, val_classes=0.5),
    train=TrainConfig(
        steps=1, sampler="classes", batch_size=8, metric_loss="ProxyAnchorLoss()", log_every=1
    ),
)
FIRST_LOSS = re.compile(r"^step +0  loss (\d+\.\d{4}) on the first batch$", re.MULTILINE)


def test_the_first_loss_is_that_of_the_first_step_and_comes_first(tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    Trainer(TINY, tmp_path / "run", console).fit()
    said = console.export_text()
    (first,) = FIRST_LOSS.finditer(said)
    assert first.start() < said.index("Recall@1")
    logged = [line["loss"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")[1:2]]
    assert float(first[1]) == pytest.approx(logged[0], abs=1e-4)


def test_the_first_loss_leaves_no_trace(tmp_path: Path) -> None:
    """Nor in batch norm's statistics, the metric loss, the random state, the run's folder."""
    trainer = Trainer(TINY, tmp_path / "run", Console(quiet=True))
    assert trainer.metric_loss is not None
    modules = trainer.model, trainer.metric_loss
    assert any("running_mean" in key for key in trainer.model.state_dict())
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
    random = torch.get_rng_state()
    forward = trainer.model.forward

    def with_chance(*args: object, **settings: object) -> torch.Tensor:
        return forward(*args, **settings) + 0 * torch.rand(1)

    trainer.model.forward = with_chance  # type: ignore[method-assign]
    trainer._say_first_loss()
    for module, values in zip(modules, before, strict=True):
        for key, value in module.state_dict().items():
            assert torch.equal(value, values[key]), key
        assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not (tmp_path / "run").exists()


# What training, reports and trackers need, and the first loss does not.
HEAVY = {
    "lightning_fabric",
    "matplotlib",
    "mlflow",
    "pandas",
    "pytorch_metric_learning",
    "scipy",
    "sklearn",
    "sympy",
    "tensorboard",
    "torch._dynamo",
    "wandb",
}
UNTIL_THE_FIRST_LOSS = """
import sys
from abe import cli, train

say = train.Trainer._say_first_loss
def say_and_end(trainer):
    say(trainer)
    print(*sys.modules)
    sys.exit()

train.Trainer._say_first_loss = say_and_end
cli.main()
"""


def test_nothing_heavy_is_imported_before_the_first_loss(tmp_path: Path) -> None:
    images = SyntheticVehicles(8, 4, size=40)
    for index in range(len(images)):
        file = tmp_path / "photos" / str(images.labels[index]) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        images.load(index).save(file)
    files = image_folder(tmp_path / "photos")
    prepare(files, tmp_path / "prepared", source=tmp_path / "photos", side=40)
    sizes = ["data.resize=40", "data.crop=32", "train.batch_size=8", "model.embedding_dim=8"]
    words = ["train", tmp_path / "prepared", "--run", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_THE_FIRST_LOSS, *words, *(f"--set={each}" for each in sizes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert FIRST_LOSS.search(done.stderr)
    assert not set(done.stdout.split()) & HEAVY
