"""Training: what a step does, what a run leaves behind, and that it goes on exactly."""

from __future__ import annotations

import errno
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from abe import evaluate, train
from abe.checkpoint import checkpoints, load_selected
from abe.config import Config, TrainConfig
from abe.data.loader import Batch
from abe.data.synthetic import SyntheticVehicles
from abe.errors import DivergedError, InputError
from abe.evaluate import evaluate_run
from abe.files import read_json_lines, write_json
from abe.losses import ensemble_loss
from abe.model import AttentionEnsemble
from abe.optimizer import lr_factor
from abe.ranks import Ranks
from abe.results import trained_in
from abe.run_folder import add_stretches, read_log, recorded_precision, stretches
from abe.train import GateStatistics, Trainer

SILENT = Console(quiet=True)
ABE = Path(sys.executable).with_name("abe")

TINY = helpers.TINY.with_overrides(
    ["train.steps=6", "train.divergence_weight=0.1", "train.lr=0.01", "train.eval_every=4"]
)


def tiny(*overrides: str) -> Config:
    return TINY.with_overrides(overrides)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / "model.safetensors")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert Trainer(TINY, run, SILENT).fit() is not None
    return run


def test_select_is_fit_without_the_test_images(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate_test", MagicMock(side_effect=AssertionError))
        best = Trainer(TINY, tmp_path / "run", SILENT).select()
        assert Trainer.resume(tmp_path / "run", SILENT).select() == best
    assert not (tmp_path / "run" / "result.json").exists()
    record = Trainer.resume(tmp_path / "run", SILENT).fit()
    assert best is not None
    assert record is not None
    own = json.loads((finished / "result.json").read_text())
    assert best.recall_at_1 == record["selection_recall@1"] == own["selection_recall@1"]
    assert best.step == record["selected_step"] == own["selected_step"]


def test_a_run_leaves_its_record(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["method"] == "ABE-2^8"
    assert result["protocol"] == "val"
    assert result["config_digest"] == TINY.digest
    assert result["data"]["test_classes"] == 4
    assert result["data"]["train_classes"] == result["data"]["select_classes"] == 2
    assert len(result["scores"]["learners"]) == 2
    assert {"recall@1", "recall@8", "map@r", "r_precision", "nmi"} <= set(
        result["scores"]["ensemble"]
    )
    assert result["environment"]["torch"] == torch.__version__
    embeddings = load_file(finished / "embeddings.safetensors")["embeddings"]
    assert embeddings.shape == (16, 2, 4)
    assert Config.from_json(json.loads((finished / "config.json").read_text())) == TINY
    assert json.loads((finished / "environment.json").read_text())["precision"] == "fp32"
    assert (finished / "weights.txt").read_text() == "random weights\n"


def test_the_log_tells_what_loses_a_good_start(finished: Path) -> None:
    lines = read_json_lines(finished / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    evaluations = [line for line in lines if "recall_at_1" in line]
    assert [line["step"] for line in evaluations] == [0, 4, 6]
    for line in steps:
        expected = sum(line["metric"]) + 0.1 * line["divergence"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert 0 < line["gate_mean"] < 1
        assert line["gate_std"] > 0
        assert -1 <= line["learner_cosine"] <= 1
        ratios = line["update_to_weight"]
        assert "spatial.0.conv1.7x7_s2" in ratios
        assert "attention_heads" in ratios
        assert "embedding.0.linear" in ratios
        assert len(ratios) == 15 + 30 + 1 + 42 + 1  # S, C, A', G, linear
        assert all(0 < ratio < 1 for ratio in ratios.values())


def test_the_protocol_picks_the_checkpoint_with_the_best_recall(finished: Path) -> None:
    lines = read_json_lines(finished / "metrics.jsonl")
    recalls = {line["step"]: line["recall_at_1"] for line in lines if "recall_at_1" in line}
    result = json.loads((finished / "result.json").read_text())
    assert result["selection_recall@1"] == max(recalls.values())
    assert recalls[result["selected_step"]] == max(recalls.values())


def test_eval_repeats_the_score_of_training(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    del result["date"]
    assert result.items() <= evaluate_run(finished).items()


def test_a_record_has_the_hash_of_the_start(tmp_path: Path) -> None:
    overrides = "model.weights=googlenet-mini-imagenet-v2", "train.steps=1"
    record = Trainer(tiny(*overrides), tmp_path / "run", SILENT).fit()
    assert record is not None
    assert record["weights"]["sha256"].startswith("155831710a11")
    assert evaluate_run(tmp_path / "run")["weights"] == record["weights"]


def write_photographs(folder: Path, classes: int = 8, prefix: str = "class") -> None:
    images = SyntheticVehicles(classes, 4, size=40)
    for index in range(len(images)):
        file = folder / f"{prefix} {images.labels[index]}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        images.load(index).save(file)


@pytest.fixture
def photographed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The record of a run on photographs, in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_photographs(tmp_path / "photos")
    record = Trainer(tiny("data.source=photos", "train.steps=1"), Path("run"), SILENT).fit()
    assert record is not None
    return record


def test_a_run_finds_its_images_from_any_folder(
    photographed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("photos")
    assert evaluate_run(tmp_path / "run")["scores"] == photographed["scores"]
    assert Trainer.resume(tmp_path / "run", SILENT).step == 1

    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"images of .*run cannot be opened: .*`abe eval .*run DA"):
        evaluate_run(tmp_path / "run")
    moved = evaluate_run(tmp_path / "run", str(tmp_path / "moved"))
    for key in ("scores", "config_digest", "images_digest"):
        assert moved[key] == photographed[key], key
    assert moved["data"] == photographed["data"] | {"name": "moved", "trained_on": "photos"}
    (tmp_path / "else").mkdir()
    back = (tmp_path / "moved").rename(tmp_path / "else" / "photos")
    assert evaluate_run(tmp_path / "run", str(back))["data"] == photographed["data"]


def test_a_run_goes_on_with_images_that_were_moved(photographed: dict[str, Any]) -> None:
    Path("elsewhere").mkdir()
    Path("photos").rename("elsewhere/photos")
    told = r"images of run are not where they were: .*photos: there is no .* --set data\.source=FO"
    with pytest.raises(InputError, match=told):
        Trainer.resume(Path("run"), SILENT)
    moved = "data.source=elsewhere/photos"
    resumed = Trainer.resume(Path("run"), SILENT, overrides=[moved])
    record = resumed.fit()
    assert record is not None
    assert record["config_digest"] == photographed["config_digest"]
    assert record["scores"] == photographed["scores"]
    write_photographs(Path("elsewhere/photos"), 4, prefix="a new class")
    told = "photos: images or classes were added, removed or renamed"
    with pytest.raises(InputError, match=told):
        Trainer.resume(Path("run"), SILENT, overrides=[moved])
    others = Trainer(tiny(moved, "train.steps=1"), Path("others"), SILENT).splits
    with pytest.raises(InputError, match=told):
        Trainer.resume(Path("run"), SILENT, splits=others)


def test_a_run_is_not_made_among_its_images(
    photographed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("photos")
    for source, run in ((".", "runs/first"), ("../photos", "../photos/run")):
        with pytest.raises(InputError, match=r"is in .*, the images: name a folder outside of it"):
            Trainer(tiny(f"data.source={source}", "train.steps=1"), Path(run), SILENT)
        assert not Path(run).exists()


@pytest.mark.parametrize("error", [FileNotFoundError(2, "x"), OSError(errno.EIO, "x")])
def test_an_image_that_can_no_longer_be_read_ends_a_run_that_can_go_on(
    error: OSError, photographed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = "data.source=photos", "data.cache=false", "train.steps=3", "train.eval_every=2"
    trainer = Trainer(tiny(*overrides), Path("another"), SILENT)
    step = Trainer.train_step

    def step_then_lose(trainer: Trainer, batch: Batch) -> object:
        if trainer.step == 1:
            patch.setattr(Image, "open", MagicMock(side_effect=error))
        return step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_then_lose)
        with pytest.raises(
            InputError, match=r"^photos/class .*png: .*, see to it; to go on: abe t"
        ):
            trainer.fit()
    assert Trainer.resume(Path("another"), SILENT).fit() is not None


def test_learned_classes_are_not_taken_for_unseen_ones(photographed: dict[str, Any]) -> None:
    """New classes shift which half of them is the test."""
    write_photographs(Path("photos"), 4, prefix="a new class")
    for use in (Trainer.resume, evaluate_run):
        with pytest.raises(InputError, match="photos: images or classes were added, removed or re"):
            use(Path("run"))
    others = evaluate_run(Path("run/checkpoints/step-00000001"), "photos")["data"]
    assert (others["test_classes"], "stamps" in others) == (8, False)
    for name in ("photos/class 4", "photos/class 5", "photos/class 6", "photos/class 7"):
        shutil.rmtree(name)
    for number in range(4):
        shutil.rmtree(f"photos/a new class {number}")
    stamped = evaluate_run(Path("run/checkpoints/step-00000001"), "photos")
    assert stamped["data"]["stamps"] == ["2 of 2 test classes were learned from"]


def test_a_score_on_other_images_is_not_one_of_a_run_on_them(photographed: dict[str, Any]) -> None:
    """All of its classes are tested, and 2 are enough."""
    write_photographs(Path("few"), 2, prefix="other")
    assert evaluate_run(Path("run"), "few")["data"]["test_classes"] == 2
    write_photographs(Path("others"), 4, prefix="other")
    record = evaluate_run(Path("run"), "others")
    assert record["config_digest"] == photographed["config_digest"]
    assert record["images_digest"] != photographed["images_digest"]
    assert "stamps" not in record["data"]
    own, data = photographed["data"], record["data"]
    assert (data["name"], data["trained_on"]) == ("others", "photos")
    assert (data["test_images"], data["test_classes"]) == (16, 4)
    assert (data["train_images"], data["train_classes"]) == (own["train_images"], 2)


def test_the_score_of_another_checkpoint_is_not_the_run_s(finished: Path) -> None:
    selected = json.loads((finished / "result.json").read_text())["selected_step"]
    steps = {int(path.name.removeprefix("step-")): path for path in checkpoints(finished)}
    assert selected in steps
    for step, path in steps.items():
        name = "ABE-2^8" if step == selected else f"ABE-2^8 at step {step}"
        assert evaluate_run(path)["method"] == name


def test_the_score_of_an_unfinished_run_is_not_the_run_s(finished: Path, tmp_path: Path) -> None:
    """It has the same configuration, and would count as done."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "result.json").unlink()  # the disk was full when it was whole
    assert evaluate_run(run)["method"] == "ABE-2^8"
    last = checkpoints(run)[-1]
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="taking the checkpoint before it"):
        cut = evaluate_run(run)["method"]
    shutil.rmtree(last)
    step = load_selected(run).step
    assert step < TINY.train.steps
    assert cut == evaluate_run(run)["method"] == f"ABE-2^8 at step {step}"


def test_what_decides_no_result_may_change_when_a_run_goes_on(
    finished: Path, tmp_path: Path
) -> None:
    """As fewer images at a time, where the memory was too small for the first step."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    changed = tiny("train.chunk_size=4", "data.workers=1", 'tracking=["tensorboard"]')
    trainer = Trainer.begin(changed, run, SILENT)
    assert trainer.step == TINY.train.steps
    found = trainer.config
    assert (found.train.chunk_size, found.data.workers) == (4, 1)
    assert found.tracking == ("tensorboard",)


def test_a_log_that_is_gone_is_begun_anew(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(checkpoints(run)[-1])
    (run / "metrics.jsonl").unlink()
    trainer = Trainer.resume(run, SILENT)
    assert trainer.step < TINY.train.steps
    assert trainer.fit() is not None
    assert [line["step"] for line in read_log(run / "metrics.jsonl", 100)][-1] == TINY.train.steps


def test_a_run_goes_on_in_the_precision_it_was_begun_in(tmp_path: Path) -> None:
    """Whatever `auto` would choose now; and so it is scored."""
    run = tmp_path / "run"
    Trainer(tiny("precision=auto", "train.steps=0"), run, SILENT).fit()
    told = json.loads((run / "environment.json").read_text())
    other = {"fp32": "bf16", "bf16": "fp32"}[told["precision"]]
    write_json(run / "environment.json", told | {"precision": other})
    assert Trainer.resume(run, SILENT).precision == other
    assert evaluate_run(run)["environment"]["precision"] == other


def test_precision_is_that_of_the_device_it_was_recorded_on(tmp_path: Path) -> None:
    write_json(tmp_path / "environment.json", {"device": "cuda", "precision": "bf16"})
    assert recorded_precision(tmp_path, torch.device("cuda")) == "bf16"
    assert recorded_precision(tmp_path, torch.device("cpu")) == "auto"
    write_json(tmp_path / "environment.json", {"precision": "fp32"})  # of an early version
    assert recorded_precision(tmp_path, torch.device("cpu")) == "fp32"


def test_a_record_says_in_what_each_part_of_its_run_was_trained(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not only what finished it, or scored it again."""

    def at(commit: str) -> None:
        monkeypatch.setattr(train, "environment", lambda device: own | {"commit": commit})
        monkeypatch.setattr(evaluate, "environment", lambda device: own | {"commit": commit})

    own = train.environment(torch.device("cpu"))
    alone = json.loads((finished / "result.json").read_text())["environment"]
    assert "stretches" not in alone
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(checkpoints(run)[-1])
    begun = Trainer.resume(run, SILENT).step
    at("later")
    record = Trainer.resume(run, SILENT).fit()
    assert record is not None
    both = [(0, alone["commit"]), (begun, "later")]
    of_selected = both if record["selected_step"] > begun else both[:1]
    kept = json.loads((run / "environment.json").read_text())["stretches"]
    assert [(each["from_step"], each["commit"]) for each in kept] == both
    at("much later")
    again = Trainer.resume(run, SILENT).fit()
    assert again is not None
    last = evaluate_run(checkpoints(run)[-1])
    for found, expected in ((evaluate_run(run), of_selected), (again, of_selected), (last, both)):
        assert found["environment"]["commit"] == "much later"
        assert [(each["from_step"], each["commit"]) for each in trained_in(found)] == expected
    assert json.loads((run / "environment.json").read_text())["stretches"] == kept


def test_a_network_is_of_the_stretches_before_it(tmp_path: Path) -> None:
    told = [{"from_step": 0, "commit": "a"}, {"from_step": 40, "commit": "b"}]
    write_json(tmp_path / "environment.json", {"stretches": told})
    for step, expected in ((0, told[:1]), (40, told[:1]), (41, told), (80, told)):
        record = {"environment": {"commit": "c"}}
        add_stretches(record, tmp_path, step, Ranks("cpu"))
        assert trained_in(record) == expected
    write_json(
        tmp_path / "environment.json", {"commit": "a", "device": "cuda"}
    )  # an early version's
    record = {"environment": {"commit": "c", "device": "cpu"}}
    add_stretches(record, tmp_path, 40, Ranks("cpu"))
    assert trained_in(record) == [{"from_step": 0, "commit": "a", "device": "cuda"}]
    write_json(tmp_path / "environment.json", {"stretches": told})
    record = {"environment": {"commit": "a", "threads": 2}}
    add_stretches(record, tmp_path, 40, Ranks("cpu"))
    assert trained_in(record) == [record["environment"]]


def test_a_run_that_diverges_says_so_of_the_whole_of_it(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(checkpoints(run)[-1])
    told = json.loads((run / "environment.json").read_text())
    (before,) = told["stretches"]
    write_json(run / "environment.json", told | {"stretches": [before | {"commit": "before"}]})
    trainer = Trainer.resume(run, SILENT)
    begun = trainer.step
    trainer.model.embedding[0].linear.weight.data.fill_(math.nan)
    with pytest.raises(DivergedError):
        trainer.fit()
    record = trainer.divergence_record()
    assert record["diverged"] == begun
    assert (record["scores"], record["selected_step"]) == ({}, None)
    assert [each["from_step"] for each in trained_in(record)] == [0, begun]
    assert record["config_digest"] == TINY.digest


def test_steps_that_are_done_again_are_of_what_does_them_again() -> None:
    first, second = {"commit": "a", "device": "cpu"}, {"commit": "b", "device": "cpu"}
    begun = stretches({}, first, 0)
    assert begun == [{"from_step": 0, **first}]
    assert stretches({"stretches": begun}, first, 40) == begun
    both = stretches({"stretches": begun}, second, 80)
    assert both == [*begun, {"from_step": 80, **second}]
    assert stretches({"stretches": both}, first, 40) == begun
    assert stretches({"stretches": both}, first, None) == both
    early = {"commit": "a", "weights": None}  # an early version's, which does not say the device
    assert stretches(early, first, 40) == [{"from_step": 0, "commit": "a"}]
    assert stretches(early, second, 40)[1:] == [{"from_step": 40, **second}]
    assert stretches({}, first, 40) == [{"from_step": 40, **first}]
    assert stretches({}, first, None) == []


def test_another_device_can_be_named_for_a_run(finished: Path) -> None:
    for use in (Trainer.resume, evaluate_run):
        with pytest.raises(InputError, match="device=tpu is unknown"):
            use(finished, device="tpu")


def test_both_protocols_on_one_run(finished: Path, tmp_path: Path, one_thread: None) -> None:
    """As "val" to the bit, and the best of the scores that "paper" would have had to pick from."""
    config = TINY.with_overrides(["protocol=both"])
    run = tmp_path / "run"
    record = Trainer(config, run, SILENT).fit()
    assert record is not None
    picked = record["scores"].pop("test_picked")
    own = json.loads((finished / "result.json").read_text())
    assert record["scores"] == own["scores"]
    assert record["selected_step"] == own["selected_step"]

    lines = [e for e in read_json_lines(run / "metrics.jsonl") if "recall_at_1" in e]
    tested = {line["step"]: line["test_recall_at_1"] for line in lines}
    assert list(tested) == [0, 4, 6]
    for step, recall in tested.items():
        there = run / "checkpoints" / f"step-{step:08}"
        if there.exists():
            assert evaluate_run(there)["scores"]["ensemble"]["recall@1"] == recall
    assert tested[record["selected_step"]] == record["scores"]["ensemble"]["recall@1"]
    assert picked["recall@1"] == max(tested.values())
    assert picked["step"] == min(s for s, r in tested.items() if r == max(tested.values()))
    again = Trainer.resume(run, SILENT).fit()
    assert again is not None
    assert again["scores"]["test_picked"] == evaluate_run(run)["scores"]["test_picked"] == picked
    first = run / "checkpoints" / "step-00000006"
    assert ("test_picked" in evaluate_run(first)["scores"]) == (record["selected_step"] == 6)


def first_batch(monkeypatch: pytest.MonkeyPatch, run: Path, *overrides: str) -> Batch:
    """What a run's first step is given."""
    seen: list[Batch] = []
    step = Trainer.train_step

    def recorded(trainer: Trainer, batch: Batch) -> object:
        seen.append(batch)
        return step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", recorded)
        Trainer(tiny("train.steps=1", *overrides), run, SILENT).fit()
    return seen[0]


@pytest.mark.parametrize("sampler", ["classes", "pairs"])
def test_the_seed_decides_which_images_a_batch_has(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, other = (
        first_batch(monkeypatch, tmp_path / name, f"seed={seed}", f"train.sampler={sampler}")
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.indices, other.indices)


def test_the_seed_decides_how_images_are_cropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = train._sampler
    monkeypatch.setattr(
        train, "_sampler", lambda config, labels: sampler(config.with_overrides(["seed=0"]), labels)
    )
    first, other = (
        first_batch(monkeypatch, tmp_path / str(seed), f"seed={seed}") for seed in (1, 2)
    )
    assert torch.equal(first.indices, other.indices)
    assert not torch.equal(first.images, other.images)


def test_paper_protocol_selects_on_the_test_images(tmp_path: Path) -> None:
    config = tiny("protocol=paper", "train.steps=1", "train.images_per_class=2")
    trainer = Trainer(config, tmp_path / "run", SILENT)
    assert trainer.splits.select is trainer.splits.test
    assert trainer.splits.describe()["train_classes"] == 4
    record = trainer.fit()
    assert record is not None
    assert record["protocol"] == "paper"
    assert record["selection_recall@1"] == record["scores"]["ensemble"]["recall@1"]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.optimizer=adamw", "train.lr=0.001"),
        ("train.metric_loss=ProxyAnchorLoss()", "data.workers=1", "train.sampler=pairs"),
        ("train.metric_loss=MarginLoss + DistanceWeightedMiner",),
    ],
    ids=["sgd", "adamw", "proxies", "a miner that draws"],
)
def test_a_stopped_run_goes_on_exactly(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    config = tiny(*overrides)
    if overrides:
        finished = tmp_path / "finished"
        Trainer(config, finished, SILENT).fit()

    step = Trainer.train_step

    def step_then_stop(trainer: Trainer, batch: object) -> object:
        loss = step(trainer, batch)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(Trainer, "train_step", step_then_stop)
    stopped = tmp_path / "stopped"
    said = Console(record=True, quiet=True)
    assert Trainer(config, stopped, said).fit() is None
    monkeypatch.undo()
    assert [path.name for path in checkpoints(stopped)] == ["step-00000000", "step-00000002"]

    assert Trainer.resume(stopped, SILENT).fit() is not None
    assert losses(stopped) == losses(finished)
    for name in ("model.safetensors", "training.safetensors"):
        whole, resumed = (load_file(checkpoints(r)[-1] / name) for r in (finished, stopped))
        assert whole.keys() == resumed.keys()
        for key in whole:
            assert torch.equal(whole[key], resumed[key]), key


def test_a_signal_during_the_last_evaluation_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    """Or a sweep would go on with the next one."""
    recall = Trainer._recall

    def stopped_at_last(trainer: Trainer, *images: object) -> object:
        if trainer.step == trainer.config.train.steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return recall(trainer, *images)

    monkeypatch.setattr(Trainer, "_recall", stopped_at_last)
    run = tmp_path / "run"
    assert Trainer(TINY, run, SILENT).fit() is None
    assert not (run / "result.json").exists()
    monkeypatch.undo()
    record = Trainer.resume(run, SILENT).fit()
    own = json.loads((finished / "result.json").read_text())
    assert record is not None
    assert record["selected_step"] == own["selected_step"]


def test_proxies_are_trained_and_saved(tmp_path: Path) -> None:
    config = tiny("train.metric_loss=ProxyAnchorLoss()", "train.steps=2", "train.eval_every=1")
    trainer = Trainer(config, tmp_path / "run", SILENT)
    assert trainer.metric_loss is not None
    before = [p.detach().clone() for p in trainer.metric_loss.parameters()]
    assert [tuple(p.shape) for p in before] == [(2, 4), (2, 4)]  # classes trained on, d
    trainer.fit()
    saved = load_file(checkpoints(tmp_path / "run")[-1] / "training.safetensors")
    own = [saved[key] for key in sorted(saved) if key.startswith("metric_loss.")]
    assert len(own) == 2
    assert all(not torch.equal(a, b) for a, b in zip(before, own, strict=True))


def _flat(values: dict, prefix: str = "") -> list[str]:
    items = []
    for key, value in values.items():
        if isinstance(value, dict):
            items += _flat(value, f"{prefix}{key}.")
        else:
            items.append(f"{prefix}{key}={json.dumps(value)}")
    return items


def test_a_signal_in_the_last_step_or_in_scoring_stops_too(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = tmp_path / "run", Console(record=True, width=200, file=io.StringIO())
    step = Trainer.train_step

    def last_step_interrupted(trainer: Trainer, batch: object) -> object:
        loss = step(trainer, batch)
        if trainer.step == TINY.train.steps:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    def interrupted(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_step", last_step_interrupted)
    assert Trainer(TINY, run, said).fit() is None
    monkeypatch.setattr(Trainer, "_finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trainer.resume(run, said).fit(go_on="the command")
    monkeypatch.undo()
    text = said.export_text()
    assert f"Stopped by SIGINT after step 6, saved. To go on: abe train --resume {run}" in text
    assert "Stopped, the training is complete. To go on: the command" in text
    record = Trainer.resume(run, SILENT).fit()
    assert record is not None
    assert record["scores"] == json.loads((finished / "result.json").read_text())["scores"]


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run_saves(tmp_path: Path) -> None:
    """As Slurm, systemd and `timeout` stop a job."""
    run = tmp_path / "run"
    settings = _flat(tiny("data.workers=2", "data.cache=false", "train.steps=5000").to_json())
    command = [str(ABE), "train", "--run", str(run), *(f"--set={key}" for key in settings)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and len(checkpoints(run)) < 2:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 130, said
    assert "Stopped by SIGTERM after step" in said
    assert "Traceback" not in said


def test_a_reader_of_images_that_is_killed_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a kernel that is short of memory, for one."""
    step = Trainer.train_step

    def kill_readers(trainer: Trainer, batch: object) -> object:
        for process in multiprocessing.active_children():
            process.kill()
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", kill_readers)
    config = tiny("data.workers=1", "train.steps=500")
    with pytest.raises(InputError, match=r"reads images was ended .*: abe train --resume "):
        Trainer(config, tmp_path / "run", SILENT).fit()


def test_a_log_that_a_full_disk_cut_off_does_not_hinder(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    log = run / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 6, "lo')
    assert Trainer.resume(run, SILENT).fit() is not None
    assert log.read_text() == whole


TOO_FAR = r"(the gradient's length is (nan|inf)|embeddings are not finite) at step \d+"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["train.lr=1e30"], TOO_FAR),
        (["train.lr=1e30", "train.metric_loss=MarginLoss + DistanceWeightedMiner"], TOO_FAR),
        (["train.lr=1e30", "train.eval_every=1"], r"embeddings are not finite after step 1"),
    ],
)
def test_what_is_not_finite_is_told_with_what_to_change(
    settings: list[str], problem: str, tmp_path: Path
) -> None:
    trainer = Trainer(tiny("train.steps=50", *settings), tmp_path / "run", SILENT)
    with pytest.raises(DivergedError, match=f"{problem}: lower train\\.lr") as told:
        trainer.fit()
    if "batch" in str(told.value):
        assert str(told.value).count("synthetic class") == 8


def test_a_gradient_that_is_not_finite_changes_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(TINY, tmp_path / "run", SILENT)
    (tmp_path / "run").mkdir()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.model.embedding[0].register_full_backward_hook(
        lambda module, inputs, outputs: tuple(x * torch.nan for x in inputs)
    )
    with pytest.raises(DivergedError, match=r"the gradient's length is nan at step 0: .*class"):
        trainer.train_step(next(iter(_batches(trainer))))
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())


def test_a_second_run_does_not_overwrite_the_first(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a run already"):
        Trainer(TINY, finished, SILENT).fit()
    result = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(result / "checkpoints")
    with pytest.raises(InputError, match="holds the result of a run whose checkpoints are gone"):
        Trainer(TINY, result, SILENT)


def test_the_log_of_an_attempt_without_a_checkpoint_is_begun_anew(
    finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "loss": 9.0}\n')
    assert Trainer(TINY, tmp_path / "run", SILENT).fit() is not None
    assert losses(tmp_path / "run") == losses(finished)


def test_few_classes_make_small_batches(tmp_path: Path) -> None:
    said = Console(record=True, width=200, file=io.StringIO())
    config = tiny("train.batch_size=64", "train.steps=1")
    trainer = Trainer(config, tmp_path / "run", said)
    assert trainer.fit() is not None
    assert "There are 2 classes to learn from: batches have 8 images in place of 64" in (
        said.export_text()
    )
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["config"]["train"]["batch_size"] == trainer.sampler.batch_size == 8
    assert Trainer.resume(tmp_path / "run", SILENT).config.train.batch_size == 8


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_optimizer_is_the_one_that_was_named(name: str, kind: type, tmp_path: Path) -> None:
    trainer = Trainer(tiny(f"train.optimizer={name}"), tmp_path / "run", SILENT)
    assert type(trainer.optimizer) is kind


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_computes_in_the_precision_that_was_named(precision: str, tmp_path: Path) -> None:
    trainer = Trainer(tiny(f"precision={precision}"), tmp_path / "run", SILENT)
    (tmp_path / "run").mkdir()
    seen = []
    layer = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Conv2d))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss = trainer.train_step(next(iter(_batches(trainer))))
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]
    assert loss.total.dtype == torch.float32


@pytest.mark.parametrize("normalize", [True, False])
def test_raw_embeddings_reach_the_loss_that_wants_them(normalize: bool, tmp_path: Path) -> None:
    config = tiny(
        "train.metric_loss=NPairsLoss()", f"train.normalize_embeddings={json.dumps(normalize)}"
    )
    trainer = Trainer(config, tmp_path / "run", SILENT)
    assert trainer.metric_loss is not None
    given = []
    trainer.metric_loss.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    batch = next(iter(_batches(trainer)))
    trainer._loss(trainer._embed(batch.images), batch.labels)
    pixels = trainer.preprocessing.normalize(batch.images)
    expected = trainer.model.train()(pixels, normalize=normalize)
    assert torch.allclose(given[0], expected, rtol=1e-4, atol=1e-6)


def test_the_settings_of_the_loss_reach_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "margin": 1.5,
        "normalization": "sum",
        "divergence_weight": 0.25,
        "divergence_margin": 3.0,
        "divergence_normalization": "per_pair",
    }
    given = [f"train.{key}={value}" for key, value in settings.items()]
    trainer = Trainer(tiny(*given), tmp_path / "run", SILENT)
    raw = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.as_tensor(trainer.splits.train.labels[:8])
    found, unit = trainer._loss(raw, labels)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(raw, dim=-1))
    torch.testing.assert_close(tuple(found), tuple(ensemble_loss(unit, labels, **settings)))
    for key in settings:
        changed = ensemble_loss(unit, labels, **{k: v for k, v in settings.items() if k != key})
        assert changed.total != found.total, key


def test_the_schedule_reaches_every_group_of_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, biases at twice the rate, and the metric loss's proxies at 3 times."""
    config = tiny(
        "train.schedule=cosine",
        "train.warmup=2",
        "train.steps=4",
        "train.metric_loss=ProxyAnchorLoss()",
        "train.loss_lr_factor=3",
    )
    trainer = Trainer(config, tmp_path / "run", SILENT)
    groups, step, rates = trainer.optimizer.param_groups, trainer.optimizer.step, []

    def watched(*given: Any) -> Any:
        rates.append(sorted({group["lr"] for group in groups}))
        return step(*given)

    monkeypatch.setattr(trainer.optimizer, "step", watched)
    trainer.fit()
    factors = [lr_factor(number, config.train) for number in range(4)]
    assert rates == [pytest.approx([0.01 * f * own for own in (1, 2, 3)]) for f in factors]
    logged = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if "lr" in line]
    assert [line["lr"] for line in logged] == pytest.approx([0.01 * factor for factor in factors])
    assert all(line["grad_norm"] > 0 for line in logged)


def test_some_steps_are_logged(tmp_path: Path) -> None:
    Trainer(tiny("train.log_every=2", "train.steps=5"), tmp_path / "run", SILENT).fit()
    logged = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if "lr" in line]
    assert [line["step"] for line in logged] == [1, 3, 5]


def test_measuring_leaves_batch_norm_s_statistics(tmp_path: Path) -> None:
    overrides = "model.backbone=googlenet_bn", "model.weights=none"
    trainer = Trainer(tiny(*overrides), tmp_path / "run", SILENT)
    trainer.model.train()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer._evaluate_and_save()
    after = trainer.model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_logged_cosines_and_updates_are_those_of_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    unit = torch.nn.functional.normalize(raw, dim=-1)
    pairs = [(p, q) for p in range(3) for q in range(3) if p != q]
    loop = [float(unit[i, p] @ unit[i, q]) for i in range(5) for p, q in pairs]
    assert train._learner_cosine(unit) == pytest.approx(np.mean(loop))
    assert train._learner_cosine(unit[:, :1]) is None
    before, after = ({"a.weight": torch.tensor([[3.0, y]])} for y in (4.0, 5.0))
    assert train._update_ratios(before, after) == {"a": pytest.approx(1 / 5)}


def test_progress_shows_rate_and_time_left(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    trainer = Trainer(TINY, tmp_path / "run", console)
    with trainer._progress() as advance:
        time.sleep(0.2)
        advance(3, 0.5)
    assert re.search(r"training .*3/6.* loss 0.5000 \d+ images/s .*-:--:--", shown.getvalue())


def test_progress_off_a_terminal_is_a_line_a_minute(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one at once where a run goes on: one that begins has told its first loss."""

    def lines_of(trainer: Trainer, minute: float) -> list[str]:
        monkeypatch.setattr("abe.progress.PROGRESS_SECONDS", minute)
        said = trainer.console = Console(record=True, width=200, file=io.StringIO())
        with trainer._progress() as advance:
            advance(1, 0.5)
            advance(2, 0.25)
        return said.export_text().splitlines()

    begun, gone_on = Trainer(TINY, tmp_path / "run", SILENT), Trainer.resume(finished, SILENT)
    assert [len(lines_of(trainer, 3600)) for trainer in (begun, gone_on)] == [0, 1]
    first, second = lines_of(begun, 0)
    assert re.fullmatch(r"step      1  loss 0\.5000  \d+ images/s", first)
    assert second.startswith("step      2  loss 0.2500")


def test_learning_rates_and_decay_by_layer(tmp_path: Path) -> None:
    config = tiny("model.weights=googlenet-mini-imagenet-v2", "train.weight_decay=0.5")
    trainer = Trainer(config, tmp_path / "run", SILENT)
    found = {
        id(parameter): (group["lr"] / 0.01, group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = dict(trainer.model.named_parameters())
    assert len(found) == len(parameters)
    for name, parameter in parameters.items():
        bias = name.endswith("bias")
        new = name.startswith(("attention_heads", "embedding.0.linear"))
        expected = (10 if new else 1) * (2 if bias else 1)
        rate, decay = found[id(parameter)]
        assert rate == pytest.approx(expected), name
        assert decay == (0 if bias else 0.5), name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1]),
        ({"schedule": "steps", "decay_every": 2, "decay_factor": 0.5}, [1, 1, 0.5, 0.5, 0.25]),
        ({"schedule": "cosine", "steps": 4}, [1, 0.853553, 0.5, 0.146447, 0]),
        ({"schedule": "cosine", "steps": 5, "warmup": 1}, [1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(settings: dict, expected: list[float]) -> None:
    train = TrainConfig(**({"steps": 100} | settings))
    assert [lr_factor(step, train) for step in range(5)] == pytest.approx(expected, abs=1e-6)


def test_divergence_warm_up_scales_lambda(tmp_path: Path) -> None:
    config = tiny("train.divergence_warmup=2", "train.divergence_weight=1", "train.steps=3")
    run = tmp_path / "run"
    Trainer(config, run, SILENT).fit()
    lines = [line for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]
    weights = [(line["loss"] - sum(line["metric"])) / line["divergence"] for line in lines]
    assert weights == pytest.approx([0.5, 1, 1], rel=1e-4)


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    def moved(*overrides: str) -> float:
        trainer = Trainer(
            tiny(
                "model.weights=googlenet-mini-imagenet-v2",
                "train.lr=1",
                "train.new_layer_lr_factor=1",
                "train.momentum=0",
                "train.weight_decay=0",
                "train.bias_lr_factor=1",
                *overrides,
            ),
            tmp_path / overrides[-1],
            SILENT,
        )
        before = [p.detach().clone() for p in trainer.model.parameters()]
        (tmp_path / overrides[-1]).mkdir()
        batch = next(iter(_batches(trainer)))
        trainer.train_step(batch)
        after = trainer.model.parameters()
        squares = [(a.detach() - b).square().sum() for a, b in zip(after, before, strict=True)]
        return float(sum(squares)) ** 0.5

    assert moved("train.clip_norm=0.1") == pytest.approx(0.1, rel=1e-3)
    assert moved("train.clip_norm=null") > 0.2


def _batches(trainer: Trainer):
    from abe.data.loader import training_batches

    return training_batches(
        trainer.splits.train,
        trainer.sampler,
        trainer.preprocessing,
        seed=0,
        start_step=0,
        stop_step=1,
    )


# Recorded with `python tests/test_train.py`; a change of the mathematics shows here.
GOLDEN = Path(__file__).parent / "golden" / "loss_trace.json"


def golden_losses(run: Path) -> list[float]:
    config = tiny(
        "model.weights=googlenet-mini-imagenet-v2",
        "train.steps=20",
        "train.eval_every=20",
        "train.sampler=pairs",
        "train.normalization=per_image",
        "train.divergence_weight=1",
        "train.lr=0.00003",
    )
    Trainer(config, run, SILENT).fit()
    return losses(run)


@pytest.mark.parametrize(
    "setting",
    ["train.chunk_size=3", "train.activation_checkpointing=true"],
    ids=["chunks", "again"],
)
def test_less_memory_is_the_same_training(setting: str, finished: Path, tmp_path: Path) -> None:
    config = tiny(setting)
    assert config.digest == TINY.digest
    trainer = Trainer(config, tmp_path / "run", SILENT)
    sizes = []
    trainer.model.embedding[0].register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0])) if torch.is_grad_enabled() else None
    )
    trainer.fit()
    learners = config.model.num_learners
    most = 3 * learners if "chunk" in setting else config.train.batch_size
    assert max(sizes) == most
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-3)
    found, expected = final_weights(tmp_path / "run"), final_weights(finished)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    lines = [
        next(line for line in read_json_lines(run / "metrics.jsonl") if "gate_std" in line)
        for run in (tmp_path / "run", finished)
    ]
    for key in ("gate_mean", "gate_std"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-3)


def test_gate_statistics_are_of_all_masks_on_devices_without_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute = torch.Tensor.sum

    def on_apple(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        assert options.get("dtype") is not torch.float64
        return compute(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "sum", on_apple)
    model = AttentionEnsemble(2, 8, attention_depth=1)
    statistics = GateStatistics(model)
    masks = [model.attention_masks(torch.randn(size, 3, 32, 32) * 50) for size in (1, 3)]
    values = torch.cat(masks).double()
    found = statistics.read()
    assert found["gate_mean"] == pytest.approx(values.mean().item(), rel=1e-5)
    assert found["gate_std"] == pytest.approx(values.std(correction=0).item(), rel=1e-4)


def test_a_run_that_fails_before_it_saved_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny(), tmp_path / "run", SILENT)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log")
    monkeypatch.setattr(trainer, "_begin", MagicMock(side_effect=full))
    with pytest.raises(InputError, match=r"^log cannot be written .*; nothing is saved$"):
        trainer.fit()


def test_a_run_goes_on_with_settings_that_change_no_result(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(tiny("train.steps=0"), run, SILENT).fit()
    trainer = Trainer.resume(run, SILENT, overrides=["train.chunk_size=3", "ranks_timeout=9"])
    assert (trainer.config.train.chunk_size, trainer.config.ranks_timeout) == (3, 9)
    for setting in ("train.lr=1", "precision=bf16", "seed=7"):
        with pytest.raises(InputError, match=r"goes on as it was started.*data\.workers"):
            Trainer.resume(run, SILENT, overrides=[setting])


def test_chunks_refuse_batch_norm(tmp_path: Path) -> None:
    config = tiny("model.backbone=googlenet_bn", "model.weights=none", "train.chunk_size=4")
    with pytest.raises(InputError, match=r"batch norm.*without train\.chunk_size"):
        Trainer(config, tmp_path / "run", SILENT)


def test_golden_loss_trace(tmp_path: Path) -> None:
    """Twenty steps of the paper's loss and sampler from the shipped start."""
    trace = golden_losses(tmp_path / "run")
    assert trace == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)
    assert np.mean(trace[-5:]) < np.mean(trace[:5])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(golden_losses(Path(folder) / "run")) + "\n")
