"""Starts that are made here: exact when folded, the same after a kill, and good to train from."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn

from abe import cli, pretrain
from abe.config import DataConfig, PretrainConfig
from abe.data.classes import open_classes
from abe.data.loader import Batch
from abe.data.splits import open_source
from abe.errors import InputError
from abe.files import locked, read_json, read_json_lines, write_tensors
from abe.model.backbones import get_backbone
from abe.model.classifier import Classifier, exported
from abe.model.googlenet import GOOGLENET, GOOGLENET_UNFOLDED, folded
from abe.model.weights import load_pretrained, read_weights
from abe.pretrain import Pretrainer
from abe.start import start

SILENT = Console(quiet=True)
CLASSES = 4
EPOCHS = 10
STEPS = 4 * EPOCHS  # 16 of 20 images a class are learned, in batches of 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 4 classes, each of a colour of its own."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        colour = [(220, 40, 40), (40, 220, 40), (40, 40, 220), (220, 220, 40)][label]
        (folder / f"class {label}").mkdir(parents=True)
        for number in range(20):
            pixels = (np.array(colour) + rng.integers(-40, 40, (40, 40, 3))).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class {label}/{number}.png")
    return folder


def configured(photos: Path, **settings: object) -> PretrainConfig:
    values = {
        "device": "cpu",
        "precision": "fp32",
        "epochs": EPOCHS,
        "batch_size": 16,
        "lr": 0.003,  # on any processor the classes are learned by then: 0.02 left half of them
        "seed": 1,
        "data": DataConfig(source=str(photos), resize=40, crop=32),
    }
    return PretrainConfig(**values | settings)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Have a step of that number be followed by SIGTERM."""

    def arrange(step: int) -> None:
        train_step = Pretrainer.train_step

        def then_stop(pretrainer: Pretrainer, batch: object) -> float:
            loss = train_step(pretrainer, batch)
            if pretrainer.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss

        monkeypatch.setattr(Pretrainer, "train_step", then_stop)

    return arrange


# --- Folding -----------------------------------------------------------------------------------


def in_use(network: Classifier) -> Classifier:
    """In evaluation mode, with batch norm whose numbers are all different."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data += 0.2 * torch.rand(tensor.shape, generator=generator)
    return network.eval()


def test_folded_layers_compute_what_batch_norm_did() -> None:
    """But for the response norm, which a network that is pretrained does without."""
    network = in_use(Classifier(GOOGLENET_UNFOLDED, 3)).double()
    plain = Classifier(GOOGLENET, 3).double().eval()
    for name in ("norm1", "norm2"):
        plain.spatial.set_submodule(name, nn.Identity())
    layers = {
        key.replace("/", "."): value for part in network for key, value in folded(part).items()
    }
    for part in plain:
        missing, _ = part.load_state_dict(layers, strict=False)
        assert {key.partition(".")[0] for key in missing} <= {"linear"}
    plain.linear.load_state_dict(network.linear.state_dict())
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        expected, found = network(images), plain(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_folding_leaves_the_network_as_it_is() -> None:
    network = Classifier(GOOGLENET_UNFOLDED, 3).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    exported(network, GOOGLENET)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def described(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def test_a_start_has_the_layers_of_the_one_that_ships() -> None:
    own = exported(Classifier(GOOGLENET_UNFOLDED, 3), GOOGLENET)
    pretrained = Path(cli.__file__).parent / "model" / "pretrained"
    with safe_open(pretrained / "googlenet-mini-imagenet-v2.safetensors", framework="pt") as file:
        shipped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert described(own) == described(shipped)
    assert sum(tensor.numel() for tensor in own.values()) == 5_973_552


@pytest.mark.parametrize("name", ["googlenet_bn", "resnet50"])
def test_other_backbones_keep_their_batch_norm(name: str, tmp_path: Path) -> None:
    backbone, file = get_backbone(name), tmp_path / "start.safetensors"
    network = in_use(Classifier(backbone, 3))
    write_tensors(file, exported(network, backbone))
    weights = read_weights(file)
    other = Classifier(backbone, 3).eval()
    report = load_pretrained(dict(other.named_children()), weights)
    assert not report.unused
    assert report.initialised == {"spatial": [], "embedding": ["linear.weight", "linear.bias"]}
    assert weights.preprocessing == backbone.preprocessing
    other.linear.load_state_dict(network.linear.state_dict())
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(other(images), network(images), rtol=0.02, atol=0.02)


# --- Images ------------------------------------------------------------------------------------


def test_some_images_of_each_class_are_held_out(photos: Path) -> None:
    images = open_classes(configured(photos, held_out=3))
    assert (len(images.learned), len(images.held_out)) == (17 * CLASSES, 3 * CLASSES)
    parts = (images.learned, images.held_out)
    assert all(set(part.labels) == set(range(CLASSES)) for part in parts)
    files = [{part.describe(index) for index in range(len(part))} for part in parts]
    assert len(files[0] | files[1]) == 20 * CLASSES
    others = [open_classes(configured(photos, held_out=3, seed=seed)).digest for seed in (1, 2)]
    assert others[0] == images.digest != others[1]


def test_of_a_small_class_a_fifth_is_held_out(photos: Path) -> None:
    assert len(open_classes(configured(photos)).held_out) == 4 * CLASSES


def test_classes_are_numbered_without_gaps(photos: Path) -> None:
    source = open_source(configured(photos).data)
    some = source.images.select(np.flatnonzero(np.isin(source.images.labels, (1, 3))))
    with mock.patch("abe.data.splits.open_source", return_value=source._replace(images=some)):
        images = open_classes(configured(photos))
    assert images.num_classes == 2
    assert images.class_of[torch.tensor([1, 3])].tolist() == [0, 1]


def test_a_split_into_training_and_test_is_not_looked_at(photos: Path, tmp_path: Path) -> None:
    lines = [
        f"{photos}/class {label}/{number}.png,{label},{'train' if label < 2 else 'test'}"
        for label in range(CLASSES)
        for number in range(5)
    ]
    table = tmp_path / "photos.csv"
    table.write_text("\n".join(["path,label,split", *lines]))
    assert open_classes(configured(table)).num_classes == CLASSES


def test_a_file_that_cannot_be_read_is_left_out_if_wanted(photos: Path) -> None:
    broken = photos / "class 1" / "broken.png"
    broken.write_bytes(b"no image")
    try:
        with pytest.raises(InputError, match=r"cannot be read \(1 of 81\).*--skip-broken"):
            open_classes(configured(photos))
        data = configured(photos).data.model_copy(update={"skip_broken": True})
        images = open_classes(configured(photos, data=data))
    finally:
        broken.unlink()
    assert images.describe()["skipped"] == 1
    assert images.digest == open_classes(configured(photos)).digest


# --- What is wrong -----------------------------------------------------------------------------


def test_a_class_with_a_single_image_is_told(photos: Path) -> None:
    source = open_source(configured(photos).data)
    some = source.images.select(np.arange(21))
    with (
        mock.patch("abe.data.splits.open_source", return_value=source._replace(images=some)),
        pytest.raises(
            InputError, match=r"photos has classes with a single image \(1 of 2\).*\nclass 1$"
        ),
    ):
        open_classes(configured(photos))


def test_a_single_class_is_told(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "only").symlink_to(photos / "class 0")
    table = tmp_path / "photos.csv"
    table.write_text("path,label\n" + "".join(f"{photos}/class 0/{n}.png,0\n" for n in range(3)))
    with pytest.raises(InputError, match="has a single class, '0'"):
        Pretrainer(configured(table), tmp_path / "run", SILENT)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"backbone": "googlnet"}, r"'googlnet' is unknown: did you mean 'googlenet'\?"),
        ({"batch_size": 65}, "batch_size=65, but there are 64 images to learn from: lower it"),
        ({"data": {"resize": 40, "crop": 30}}, "data.crop=30 is too small for backbone=googlenet"),
        ({"epochs": 0}, "epochs=0"),
        ({"epoch": 2}, "there is no setting 'epoch'"),
    ],
)
def test_settings_that_cannot_be(
    settings: dict[str, object], problem: str, photos: Path, tmp_path: Path
) -> None:
    values = configured(photos).to_json()
    with pytest.raises(InputError, match=problem):
        Pretrainer(PretrainConfig.from_json(values | settings), tmp_path / "run", SILENT)
    assert not (tmp_path / "run").exists()


def test_a_start_is_not_made_among_its_images(photos: Path) -> None:
    with pytest.raises(InputError, match=r"is in .*, the images: name a folder outside of it"):
        Pretrainer(configured(photos), photos / "start", SILENT)
    assert not (photos / "start").exists()


def test_a_start_that_is_there_is_left(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "googlenet-photos.safetensors"
    file.touch()
    with pytest.raises(InputError, match=f"^{file} is there already: give another folder$"):
        Pretrainer(configured(photos), tmp_path, SILENT)


def test_a_loss_that_is_not_finite_ends_it(photos: Path, tmp_path: Path) -> None:
    pretrainer = Pretrainer(configured(photos, lr=1e30), tmp_path, SILENT)
    with pytest.raises(InputError, match=r"^the loss is (nan|inf) at step \d: lower lr \(1e\+30\)"):
        pretrainer.fit()


def test_one_process_at_a_time(photos: Path, tmp_path: Path, stop_after: object) -> None:
    first, second = (Pretrainer(configured(photos), tmp_path, SILENT) for _ in range(2))
    with (
        locked(tmp_path / ".lock", "taken"),
        pytest.raises(InputError, match=f"^{tmp_path} is being trained by another process"),
    ):
        first.fit()
    stop_after(1)
    assert first.fit() is None
    with pytest.raises(InputError, match=f"^{tmp_path} has been trained by another .* --resume"):
        second.fit()
    with pytest.raises(InputError, match=f"^{tmp_path} holds a start that was begun: go on with"):
        Pretrainer(configured(photos), tmp_path, SILENT)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_an_image_that_can_no_longer_be_read_is_told_with_how_to_go_on(
    number: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrainer = Pretrainer(configured(photos), tmp_path / "start", SILENT)
    gone = mock.Mock(side_effect=OSError(number, os.strerror(number)))
    monkeypatch.setattr(Image, "open", gone)
    told = r"class .*\.png: .*, see to it; to go on: abe pretrain --resume .*start$"
    with pytest.raises(InputError, match=told):
        pretrainer.fit()


def test_a_disk_that_is_full_is_told_with_how_to_go_on(photos: Path, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch("abe.pretrain.write_tensors", side_effect=full),
        pytest.raises(InputError, match=r"checkpoint\.safetensors cannot be written .*--resume "),
    ):
        Pretrainer(configured(photos), tmp_path, SILENT).fit()


def test_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path} has no checkpoint.safetensors: give a fold"):
        Pretrainer.resume(tmp_path, SILENT)


def test_it_goes_on_with_what_it_was_begun_with(
    photos: Path, tmp_path: Path, stop_after: object
) -> None:
    stop_after(1)
    assert Pretrainer(configured(photos), tmp_path / "run", SILENT).fit() is None
    image = photos / "class 0" / "0.png"
    other = image.rename(image.with_name("other.png"))
    try:
        with pytest.raises(InputError, match=r"^photos: images or classes were added, removed or"):
            Pretrainer.resume(tmp_path / "run", SILENT)
    finally:
        other.rename(image)
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    content = bytearray(checkpoint.read_bytes())
    for place in (content.index(b'"step":"1"') + 8, len(content) // 2):
        content[place] ^= 1
        checkpoint.write_bytes(content)
        with pytest.raises(InputError, match=f"^{checkpoint} .* changed since it was written"):
            Pretrainer.resume(tmp_path / "run", SILENT)
        content[place] ^= 1
    checkpoint.write_bytes(content)
    assert Pretrainer.resume(tmp_path / "run", SILENT).step == 1
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    with pytest.raises(InputError, match=f"^{checkpoint} cannot be read .*: begin again in anoth"):
        Pretrainer.resume(tmp_path / "run", SILENT)


def have_auto_be(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pretrain, "choose_precision", lambda name, _: precision if name == "auto" else name
    )


def test_it_goes_on_in_its_precision_and_on_another_device_in_that_one_s(
    photos: Path, tmp_path: Path, stop_after: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where "auto" has become another one, as on a machine that is busy."""
    run, config = tmp_path / "run", configured(photos, device="cuda", precision="auto")
    monkeypatch.setattr(pretrain, "choose_device", lambda _: torch.device("cpu"))
    stop_after(1)
    have_auto_be("bf16", monkeypatch)
    assert Pretrainer(config, run, SILENT).fit() is None
    have_auto_be("fp32", monkeypatch)
    for device, precision in ((None, "bf16"), ("cuda", "bf16"), ("cpu", "fp32")):
        resumed = Pretrainer.resume(run, SILENT, device=device)
        assert resumed.step == 1
        assert resumed.precision == resumed.config.precision == precision
        assert resumed.config.device == (device or "cuda")


# --- Measured ----------------------------------------------------------------------------------


def test_measuring_leaves_batch_norm_s_statistics(photos: Path, tmp_path: Path) -> None:
    pretrainer = Pretrainer(configured(photos), tmp_path, SILENT)
    pretrainer.network.train()
    before = {key: value.clone() for key, value in pretrainer.network.state_dict().items()}
    pretrainer._end_epoch(0.5)
    after = pretrainer.network.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_settings_reach_the_optimiser_and_its_schedule(photos: Path, tmp_path: Path) -> None:
    config = configured(photos, lr=0.2, momentum=0.7, weight_decay=0.03, warmup=0.25)
    schedule = Pretrainer(config, tmp_path, SILENT).schedule
    assert (schedule.steps, schedule.warmup, schedule.schedule) == (STEPS, STEPS // 4, "cosine")
    assert (schedule.lr, schedule.momentum, schedule.weight_decay) == (0.2, 0.7, 0.03)
    assert schedule.bias_lr_factor == 1


def test_a_step_lowers_the_cross_entropy_of_smoothed_labels(photos: Path, tmp_path: Path) -> None:
    pretrainer = Pretrainer(configured(photos, label_smoothing=0.4), tmp_path, SILENT)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    pretrainer.network.train()
    logits = pretrainer.network(pretrainer.preprocessing.normalize(images)).double()
    smoothed = torch.full((6, CLASSES), 0.4 / CLASSES, dtype=torch.double)
    smoothed[torch.arange(6), pretrainer.images.class_of[labels]] += 0.6
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean().item()
    assert pretrainer.train_step(Batch(images, labels, labels)) == pytest.approx(expected, rel=1e-5)


def test_the_seed_decides_the_batches(photos: Path, tmp_path: Path) -> None:
    first, other = (
        Pretrainer(configured(photos, seed=seed), tmp_path / str(seed), SILENT) for seed in (1, 2)
    )
    assert first.sampler.batch(0).tolist() != other.sampler.batch(0).tolist()


def test_what_was_filled_into_a_model_card_stays(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made.parent, tmp_path / "made")
    card = folder / f"{made.stem}.md"
    card.write_text(f"{card.read_text()}\nLicence: mine.\n")
    Pretrainer.resume(folder, SILENT).fit()
    assert card.read_text().endswith("Licence: mine.\n")


# --- Whole ones --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start that nothing disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    file = Pretrainer(configured(photos), tmp_path_factory.mktemp("made") / "run", SILENT).fit()
    torch.set_num_threads(threads)
    assert file is not None
    return file


@pytest.mark.slow
def test_it_learns_and_says_how_well(made: Path) -> None:
    log = read_json_lines(made.parent / "metrics.jsonl")
    assert [line["epoch"] for line in log] == list(range(1, EPOCHS + 1))
    assert log[-1]["top_1"] >= 0.75
    with safe_open(made, framework="pt") as file:
        metadata = file.metadata()
    top_1 = float(metadata["top1_held_out"])
    assert top_1 >= 0.75
    assert metadata["trained_on"] == "photos, 4 classes, 32 px"
    card = made.with_suffix(".md").read_text()
    assert f"top-1 on the images held out: {100 * top_1:.1f} % at 32 px" in card
    images = read_json(made.parent / "images.json")
    assert "64 images of 4 classes, and 16 held out (30 a class, fewer of small ones)" in card
    assert f"digest {images['digest']} |" in card
    assert "licence | **not stated yet" in card
    assert sorted(path.name for path in made.parent.iterdir()) == sorted(
        [
            *(".lock", "checkpoint.safetensors", "config.json", "environment.json"),
            *("googlenet-photos.md", made.name, "images.json", "metrics.jsonl"),
        ]
    )


@pytest.mark.slow
def test_its_score_is_that_of_the_file_in_the_plain_network(made: Path, photos: Path) -> None:
    """A layer less, and the score that the file states is another one."""
    measured = Pretrainer.resume(made.parent, SILENT)._measure(made)
    with safe_open(made, framework="pt") as file:
        assert f"{measured[32]:.4f}" == file.metadata()["top1_held_out"]
        tensors = {name: 0 * file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    nothing = made.parent.parent / "nothing.safetensors"
    write_tensors(nothing, tensors)
    assert Pretrainer.resume(made.parent, SILENT)._measure(nothing)[32] == 1 / CLASSES


@pytest.mark.slow
def test_a_run_can_start_from_it(made: Path, photos: Path) -> None:
    config = TINY.with_overrides([f"model.weights={made}", f"data.source={photos}"])
    begun = start(config)
    assert re.search(r"^spatial\.0: loaded \d+ of \d+ tensors [^;]*$", begun.report, re.MULTILINE)
    assert "not used" not in begun.report
    assert begun.preprocessing.scale == 1 / 58
    assert begun.preprocessing.channels == "BGR"
    heads = {name.partition(".")[0] for name in begun.new_layers}
    assert heads == {"attention_heads", "embedding"}


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 8, STEPS])
def test_stopped_by_a_signal_it_goes_on_to_the_same_bytes(
    step: int, made: Path, photos: Path, tmp_path: Path, stop_after: object, one_thread: None
) -> None:
    """In an epoch, at its end, and at the end of all."""
    run, console = tmp_path / "run", Console(record=True, width=200, file=io.StringIO())
    stop_after(step)
    assert Pretrainer(configured(photos), run, console).fit() is None
    said = f"Stopped by SIGTERM after step {step}, saved. To go on: abe pretrain --resume {run}"
    assert said in console.export_text()
    assert not (run / made.name).exists()
    resumed = Pretrainer.resume(run, SILENT)
    assert resumed.step == step
    assert resumed.fit() == run / made.name
    assert (run / made.name).read_bytes() == made.read_bytes()
    assert (run / "metrics.jsonl").read_text() == (made.parent / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["a step", "the log"])
def test_killed_it_goes_on_to_the_same_bytes(
    moment: str, made: Path, photos: Path, tmp_path: Path
) -> None:
    """In the middle of an epoch, and between its line in the log and its checkpoint."""
    config, run = configured(photos), tmp_path / "run"
    script = """
        import json, os, signal, sys
        from pathlib import Path
        from abe.config import PretrainConfig
        from abe.pretrain import Pretrainer

        moment, run, config = sys.argv[1:]
        method = {"a step": "train_step", "the log": "_end_epoch"}[moment]
        original, calls = getattr(Pretrainer, method), 0

        def then_killed(*arguments):
            global calls
            result, calls = original(*arguments), calls + 1
            if calls == {"a step": 10, "the log": 2}[moment]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(Pretrainer, method, then_killed)
        Pretrainer(PretrainConfig.from_json(json.loads(config)), Path(run)).fit()
    """
    words = [moment, str(run), json.dumps(config.to_json())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), *words]
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = abe("pretrain", "--resume", run, folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (run / made.name).read_bytes() == made.read_bytes()
    assert (run / "metrics.jsonl").read_text() == (made.parent / "metrics.jsonl").read_text()


# --- The command -------------------------------------------------------------------------------


def abe(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("abe"), *map(str, words)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_makes_a_start_that_train_takes(photos: Path, tmp_path: Path) -> None:
    options = {"--epochs": 1, "--batch-size": 16, "--resize": 40, "--crop": 32, "--lr": 0.02}
    settings = ["--device", "cpu", *(word for option in options.items() for word in option)]
    done = abe("pretrain", "--data", photos, *settings, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    file = "runs/pretrain-googlenet-photos/googlenet-photos.safetensors"
    assert done.stdout.startswith(f"Start: {file}\nTo train from it: ")
    assert re.search(rf"abe.? train DATA --weights {re.escape(file)}\n$", done.stdout)
    assert "photos: 64 images of 4 classes, and 16 held out\n" in done.stderr
    assert re.search(r"^epoch   1 of 1  loss \d\.\d{4}  top-1", done.stderr, re.MULTILINE)
    assert "\x1b" not in done.stdout + done.stderr
    again = abe("pretrain", "--data", photos, *settings, folder=tmp_path)
    assert again.returncode == 2
    assert re.search(
        r"holds a start that was begun: go on with `.*abe.? pretrain --resume", again.stderr
    )
    sizes = ["data.resize=40", "data.crop=32", "protocol=paper", "train.steps=1"]
    model = ["model.num_learners=2", "model.embedding_dim=8", "train.batch_size=8", "tracking=none"]
    overrides = [f"--set={setting}" for setting in (*sizes, *model, "device=cpu")]
    trained = abe("train", photos, "--weights", file, "--run", "run", *overrides, folder=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "spatial.0: loaded" in trained.stderr


@pytest.mark.slow
def test_the_command_says_how_to_take_another_backbone_s_start(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--backbone googlenet_bn --epochs 1 --batch-size 16 --resize 40 --crop 32 --device cpu"
    where = ["--data", str(photos), "--out", str(tmp_path / "bn")]
    argv = ["abe", "pretrain", *where, *words.split()]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    file = tmp_path / "bn" / "googlenet_bn-photos.safetensors"
    setting = "--set model.backbone=googlenet_bn"
    assert capsys.readouterr().out.endswith(f"train DATA --weights {file} {setting}\n")
    card = file.with_suffix(".md").read_text()
    assert f"`abe train DATA --weights {file.name} {setting}`" in card
    config = TINY.with_overrides(["model.backbone=googlenet_bn", f"model.weights={file}"])
    begun = start(config)
    assert "not used" not in begun.report
    assert begun.preprocessing.channels == "RGB"


def test_resume_takes_nothing_beside_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["abe", "pretrain", "--resume", str(tmp_path), "--lr", "0.1"]
    with mock.patch.object(sys, "argv", words), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--resume goes on as it was begun: give only --device with it" in capsys.readouterr().err


def test_images_that_were_moved_meanwhile_are_named(
    photos: Path, stop_after: Callable[[int], None], tmp_path: Path
) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    shutil.copytree(photos, there)
    run = tmp_path / "run"
    stop_after(1)
    assert Pretrainer(configured(there), run, SILENT).fit() is None
    there.rename(elsewhere)
    told = (
        r"are not where they were: .*; if they are elsewhere now: .* --resume .*run --data FOLDER"
    )
    with pytest.raises(InputError, match=told):
        Pretrainer.resume(run, SILENT)
    resumed = Pretrainer.resume(run, SILENT, data=str(elsewhere))
    stop_after(2)
    assert resumed.fit() is None
    assert Pretrainer.resume(run, SILENT).fit() == run / "googlenet-there.safetensors"
    assert len(list(run.glob("googlenet-*"))) == 2  # and its card, which names it as it was begun
    card = (run / "googlenet-there.md").read_text()
    assert "--weights googlenet-there.safetensors" in card
    assert "elsewhere" not in card.partition("| data |")[0]
    shutil.rmtree(next(path for path in sorted(elsewhere.iterdir()) if path.is_dir()))
    with pytest.raises(InputError, match="were added, removed or renamed"):
        Pretrainer.resume(run, SILENT, data=str(elsewhere))
