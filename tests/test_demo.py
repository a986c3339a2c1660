"""`abe demo`, at a size that a test can afford."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from abe.data.synthetic import SyntheticVehicles
from abe.demo import run_demo
from abe.errors import InputError
from abe.recipes import demo
from abe.train import Trainer

SILENT = Console(quiet=True)


TINY = demo().with_overrides(
    [
        "device=cpu",
        "precision=fp32",
        "tracking=none",
        "model.embedding_dim=16",
        "data.resize=48",
        "data.crop=40",
        "data.synthetic_classes=16",
        "data.synthetic_images=4",
        "data.val_classes=0.25",
        "train.steps=2",
        "train.eval_every=1",
        "train.batch_size=8",
    ]
)


@pytest.mark.slow
def test_demo_compares_four_methods_and_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, page = run_demo(TINY, tmp_path, SILENT)
    assert [record["method"] for record in records] == [
        "raw pixels",
        "pretrained start",
        "1-head^16",
        "ABE-4^16",
    ]
    rates = [record["config"]["train"]["lr"] for record in records[2:]]
    assert rates == [0.01, 0.003]  # each its own
    assert page == tmp_path / "report.html"
    text = page.read_text(encoding="utf-8")
    for record in records:
        assert f"{100 * record['scores']['ensemble']['recall@1']:.1f}" in text

    def never(trainer: Trainer) -> None:
        pytest.fail("a finished demo trained again")

    monkeypatch.setattr(Trainer, "fit", never)
    again, _ = run_demo(TINY, tmp_path, SILENT)
    assert again == records


@pytest.mark.slow
def test_an_interrupted_demo_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", lambda trainer: None)  # as a signal leaves it
        with pytest.raises(KeyboardInterrupt):
            run_demo(TINY, tmp_path, SILENT)
    resumed = []
    resume = Trainer.resume.__func__
    monkeypatch.setattr(
        Trainer, "resume", classmethod(lambda *a, **k: resumed.append(a[1].name) or resume(*a, **k))
    )
    records, _ = run_demo(TINY, tmp_path, SILENT)
    assert len(records) == 4
    assert resumed == ["1-head"]


@pytest.mark.slow
def test_folders_of_one_name_are_different_demos(tmp_path: Path) -> None:
    """And 8 classes are enough for one."""
    scores = []
    for where in ("here", "there"):
        images = SyntheticVehicles(8, 4, size=48, seed=len(where))
        for index in range(len(images)):
            file = tmp_path / where / "photos" / str(images.labels[index]) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            images.load(index).save(file)
        base = TINY.with_overrides(
            [f"data.source={tmp_path / where / 'photos'}", "train.batch_size=64"]
        )
        records, _ = run_demo(base, tmp_path / "demo", SILENT)
        scores.append([record["scores"] for record in records])
        assert records[-1]["config"]["train"]["batch_size"] == 8
    assert scores[0] != scores[1]

    shutil.rmtree(file.parent)
    with pytest.raises(InputError, match=r"\(to begin the demo anew, remove .*demo/\w+-\w+\)$"):
        run_demo(base, tmp_path / "demo", SILENT)


@pytest.mark.slow
def test_a_demo_goes_on_with_another_device_and_without_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = TINY.with_overrides(["model.weights=none"])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", lambda trainer: None)  # as a signal leaves it
        with pytest.raises(KeyboardInterrupt):
            run_demo(base, tmp_path, SILENT)
    with pytest.raises(InputError, match="device=tpu is unknown"):
        run_demo(base.with_overrides(["device=tpu"]), tmp_path, SILENT)
    records, _ = run_demo(base, tmp_path, SILENT)
    assert [record["method"] for record in records] == ["raw pixels", "1-head^16", "ABE-4^16"]
