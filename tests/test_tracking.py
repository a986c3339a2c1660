"""Trackers, read back by their own clients: what they are told, and that it stays right."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import shorten
from PIL import Image
from rich.console import Console

from abe.config import Config
from abe.data.synthetic import SyntheticVehicles
from abe.data.transforms import Preprocessing
from abe.errors import InputError
from abe.files import append_json_line, read_json, read_json_lines
from abe.model.ensemble import AttentionEnsemble
from abe.report.pictures import (
    FRAME,
    RESULTS,
    RIGHT,
    THUMBNAIL,
    WRONG,
    mask_sheet,
    neighbor_sheet,
    some_neighbors,
)
from abe.results import flatten
from abe.tracking import PACKAGES, Tracking, flat, open_tracking
from abe.train import Trainer

ABE = Path(sys.executable).with_name("abe")
NAMES = ["tensorboard", "mlflow", "wandb"]
SILENT = Console(quiet=True)
BLACK = Image.new("RGB", (8, 8))
TINY = helpers.TINY.with_overrides([f"tracking={','.join(NAMES)}"])

Series = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module", autouse=True)
def _to_themselves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No server, nothing in the home folder, and no process that stays."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
            patch.delenv(variable, raising=False)
        # set here, so that what abe sets by itself is undone, too
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for variable in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(variable, str(home))
        yield
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()


# --- Reading back ------------------------------------------------------------------------------


def tensorboard_of(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def mlflow_of(run: Path) -> tuple[Any, Any]:
    """A client, and the only run there is of that name."""
    from mlflow import MlflowClient

    client = MlflowClient((run.absolute().parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("abe")
    (found,) = client.search_runs([experiment.experiment_id], f"run_name = '{run.name}'")
    assert found.info.run_id == read_json(run / "tracking.json")["mlflow"]["run"]
    return client, found


def wandb_of(run: Path) -> Iterator[Any]:
    """The records of the run's offline files, oldest first, all of one id."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # waits for what its process has yet to write
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=os.path.getmtime)
    assert {file.stem for file in files} == {
        f"run-{read_json(run / 'tracking.json')['wandb']['run']}"
    }
    for file in files:
        for content in leveldb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            yield record


def history_of(record: Any) -> dict[tuple[str, ...], Any]:
    """The values of a step; a picture's have two parts to their names."""
    items = record.history.item
    return {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in items}


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format after W&B's header of 7 bytes; W&B ships no reader of it in Python."""
    block, at, parts = 32768, 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # what is left of a block is padding
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def scalars_of(name: str, run: Path) -> Series:
    found: Series = defaultdict(list)
    if name == "tensorboard":
        events = tensorboard_of(run)
        for tag in events.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    elif name == "mlflow":
        client, own = mlflow_of(run)
        for key in own.data.metrics:
            history = client.get_metric_history(own.info.run_id, key)
            found[key] = [(metric.step, metric.value) for metric in history]
    else:
        for row in map(history_of, wandb_of(run)):
            for (key, *parts), value in row.items():
                if not parts and not key.startswith("_"):
                    found[key].append((row["_step",], value))
    return found


def image_steps_of(name: str, run: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    if name == "tensorboard":
        events = tensorboard_of(run)
        for tag in events.Tags()["images"]:
            found[tag] = [event.step for event in events.Images(tag)]
    elif name == "mlflow":
        client, own = mlflow_of(run)
        for file in client.list_artifacts(own.info.run_id, "images"):
            if match := re.fullmatch(r"images/(\w+)\+step\+(\d+)\+.*\.png", file.path):
                found[match[1]].append(int(match[2]))
    else:
        for row in map(history_of, wandb_of(run)):
            for (key, *parts), value in row.items():
                if parts == ["path"]:
                    assert list((run / "wandb").glob(f"*/files/{value}"))
                    found[key].append(row["_step",])
    return {key: sorted(steps) for key, steps in found.items()}


def settings_of(name: str, run: Path) -> dict[str, Any]:
    if name == "mlflow":
        return mlflow_of(run)[1].data.params
    if name == "wandb":
        configs = [record.run.config for record in wandb_of(run) if record.HasField("run")]
        values = {item.key: json.loads(item.value_json) for item in configs[0].update}
        return flatten(values)
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    data = HParamsPluginData()
    data.ParseFromString(
        tensorboard_of(run).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    )
    hparams = data.session_start_info.hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in hparams.items()}


def logged(run: Path) -> Series:
    """All numbers of metrics.jsonl."""
    found: Series = defaultdict(list)
    log = run / "metrics.jsonl"
    for line in read_json_lines(log, cut_off=True) if log.exists() else ():
        step = line.pop("step")
        for key, value in flat(line).items():
            found[key].append((step, value))
    return found


def assert_same(found: Series, expected: Series) -> None:
    assert found.keys() == expected.keys()
    for key, points in expected.items():
        assert [step for step, _ in found[key]] == [step for step, _ in points], key
        values = [value for _, value in points]
        assert [value for _, value in found[key]] == pytest.approx(values, rel=1e-6), key


# --- A whole run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert Trainer(TINY, run, SILENT).fit() is not None
    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_has_every_number_of_the_log(name: str, finished: Path) -> None:
    expected = logged(finished)
    assert {"loss", "metric/1", "metric/2", "recall_at_1"} <= expected.keys()
    assert "update_to_weight/embedding.0.linear" in expected
    assert_same(scalars_of(name, finished), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_has_masks_and_neighbours_of_every_evaluation(name: str, finished: Path) -> None:
    assert image_steps_of(name, finished) == {"masks": [0, 2, 3], "neighbours": [0, 2, 3]}


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_has_the_settings(name: str, finished: Path) -> None:
    found = settings_of(name, finished)
    for key, value in (("train.margin", 1.0), ("train.steps", 3), ("data.resize", 40)):
        assert float(found[key]) == value, key
    assert found["model.network"] == "abe"
    assert found.keys() >= flatten(TINY.to_json()).keys()


def test_mlflow_is_told_how_a_run_stands(finished: Path) -> None:
    assert mlflow_of(finished)[1].info.status == "FINISHED"


def test_without_trackers_there_is_nothing_but_the_log(tmp_path: Path) -> None:
    config = TINY.with_overrides(["tracking=none", "train.steps=1"])
    assert Trainer(config, tmp_path / "run", SILENT).fit() is not None
    assert not {"tensorboard", "wandb", "tracking.json"} & {p.name for p in tmp_path.rglob("*")}
    assert len(logged(tmp_path / "run")["loss"]) == 1


def has_first_evaluation(name: str, run: Path) -> bool:
    from google.protobuf.message import DecodeError

    try:
        recall, images = scalars_of(name, run)["recall_at_1"], image_steps_of(name, run)
    except (AssertionError, DecodeError):  # of a file that is being written
        return False
    return (recall, images) == (logged(run)["recall_at_1"], {"masks": [0], "neighbours": [0]})


def processes_with(variable: str) -> list[Path]:
    """Those with a variable in their environment: who was given it, and all that they started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # has ended, or is another user's
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process)
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_in_its_trackers(tmp_path: Path) -> None:
    """`abe train` under kill -9, far behind its only checkpoint; then --resume of a shorter one."""
    run = tmp_path / "runs" / "killed"
    config = TINY.with_overrides(["train.steps=400", "train.eval_every=400"])
    sets = [f"--set={key}={json.dumps(value)}" for key, value in flatten(config.to_json()).items()]
    own = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}  # not this process's
        | {"ABE_TEST": str(run)},
    }
    with subprocess.Popen([ABE, "train", "--run", run, *sets], **own) as process:
        try:
            while len(logged(run)["loss"]) < 6:
                assert process.poll() is None
                time.sleep(0.05)
            assert processes_with(f"ABE_TEST={run}")
            deadline = time.monotonic() + 60
            while not has_first_evaluation("wandb", run):  # it writes when it likes
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            process.kill()
    assert all(has_first_evaluation(name, run) for name in NAMES)
    shorten(run, steps=3)
    subprocess.run([ABE, "train", "--resume", run], check=True, **own)
    deadline = time.monotonic() + 30
    while left := processes_with(f"ABE_TEST={run}"):  # W&B's helper ends with who started it
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert logged(run)["loss"][-1][0] == 3
    for name in NAMES:
        assert_same(scalars_of(name, run), logged(run))
        assert image_steps_of(name, run) == {"masks": [0, 3], "neighbours": [0, 3]}


# --- Going on ----------------------------------------------------------------------------------


def config_of(name: str) -> Config:
    return TINY.with_overrides([f"tracking={name}"])


def tell(tracking: Tracking, run: Path, step: int, **values: float) -> None:
    append_json_line(run / "metrics.jsonl", {"step": step, **values})
    tracking.log(step, values)


@pytest.mark.parametrize("name", NAMES)
def test_what_came_after_the_checkpoint_does_not_stay(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with open_tracking(run, config_of(name), None) as tracking:
        tell(tracking, run, 0, recall_at_1=0.5)
        tracking.images(0, lambda: {"masks": BLACK})
        tracking.saved(0)
        for step in (1, 2, 3):
            tell(tracking, run, step, loss=100)
            tracking.images(step, lambda: {"masks": BLACK})
    (run / "metrics.jsonl").write_text('{"step": 0, "recall_at_1": 0.5}\n')  # as `resume` leaves it
    with open_tracking(run, config_of(name), 0) as tracking:
        for step in (1, 2):
            tell(tracking, run, step, loss=step)
        tracking.images(2, lambda: {"masks": BLACK})
        tracking.saved(2)
    assert scalars_of(name, run) == {"recall_at_1": [(0, 0.5)], "loss": [(1, 1), (2, 2)]}
    assert image_steps_of(name, run) == {"masks": [0, 2]}


def test_mlflow_has_no_point_twice_that_a_kill_left_unnoted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with open_tracking(run, config_of("mlflow"), None) as tracking:
        for step in (0, 1):
            tell(tracking, run, step, loss=step, recall_at_1=0.5)
            tracking.saved(step)
            if step == 0:
                noted = (run / "tracking.json").read_text()
    (run / "tracking.json").write_text(noted)
    append_json_line(run / "metrics.jsonl", {"step": 1, "lr": 0.1})  # and this was not sent yet
    with open_tracking(run, config_of("mlflow"), 1) as tracking:
        tell(tracking, run, 2, loss=2)
        tracking.saved(2)
    assert_same(scalars_of("mlflow", run), logged(run))


def test_an_attempt_without_a_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for value in (100, 1):
        with open_tracking(run, TINY, None) as tracking:
            tell(tracking, run, 0, loss=value)
            tell(tracking, run, 1, loss=value)
    assert scalars_of("tensorboard", run) == {"loss": [(0, 1), (1, 1)]}
    assert not (run / "tracking.json").exists()
    assert not (run / "wandb").exists()


def leave_untold(name: str, run: Path) -> None:
    """A run of 2 steps whose tracker was sent what there was before the first."""
    run.mkdir()
    with open_tracking(run, config_of(name), None) as tracking:
        tell(tracking, run, 0, recall_at_1=0.5)
        tracking.saved(0)
        tell(tracking, run, 1, loss=1)
        tell(tracking, run, 2, loss=2)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_what_a_kill_kept_from_a_tracker_is_sent_later(name: str, tmp_path: Path) -> None:
    """The checkpoint of step 2 was written, and nothing was sent after that."""
    run = tmp_path / "run"
    leave_untold(name, run)
    with open_tracking(run, config_of(name), 2) as tracking:
        tell(tracking, run, 3, loss=3)
        tracking.saved(3)
    assert_same(scalars_of(name, run), logged(run))


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_run_that_is_done_is_sent_what_its_last_checkpoint_could_not(
    name: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    leave_untold(name, run)
    with open_tracking(run, config_of(name), 2):
        pass
    assert_same(scalars_of(name, run), logged(run))


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_what_was_sent_is_not_sent_again(name: str, tmp_path: Path) -> None:
    """The newest checkpoint was damaged: the run goes on from the one before it."""
    run = tmp_path / "run"
    run.mkdir()
    with open_tracking(run, config_of(name), None) as tracking:
        for step in range(3):
            tell(tracking, run, step, loss=step)
        tracking.saved(2)
    with open_tracking(run, config_of(name), 1) as tracking:
        for step in (2, 3):
            tell(tracking, run, step, loss=step)
            tracking.images(step, lambda: {"masks": BLACK})
        tracking.saved(3)
    assert scalars_of(name, run) == {"loss": [(0, 0), (1, 1), (2, 2), (3, 3)]}
    assert image_steps_of(name, run) == {"masks": [3]}


# --- What fails --------------------------------------------------------------------------------


def test_a_server_that_is_away_is_warned_of_once_and_gets_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with open_tracking(run, config_of("mlflow"), None) as tracking:
        for step in (0, 1):
            tell(tracking, run, step, loss=step)
            tracking.images(step, lambda: {"masks": BLACK})
        with pytest.warns(UserWarning, match=r"tracking by mlflow fails \(.*127.0.0.1") as told:  # noqa: PT031
            tracking.saved(0)
            tracking.saved(1)
        assert len(told) == 1
        assert "metrics.jsonl has every number" in str(told[0].message)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        tell(tracking, run, 2, loss=2)
        tracking.images(2, lambda: {"masks": BLACK})
        tracking.saved(2)
    assert_same(scalars_of("mlflow", run), logged(run))
    assert image_steps_of("mlflow", run) == {"masks": [2]}  # pictures are not kept meanwhile


def test_a_tracker_that_cannot_write_stops_no_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("in the way")
    config = TINY.with_overrides(["tracking=tensorboard"])
    with pytest.warns(UserWarning, match="tracking by tensorboard fails") as told:
        assert Trainer(config, run, SILENT).fit() is not None
    assert len(told) == 1
    assert len(logged(run)["loss"]) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_told_before_images_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda of: None if of == name else find_spec(of)
    )
    config = config_of(name).with_overrides([f"data.source={tmp_path / 'nowhere'}"])
    with pytest.raises(InputError, match=f"tracking={name} needs .*: pip install {PACKAGES[name]}"):
        Trainer(config, tmp_path / "run", SILENT)


def test_the_installed_packages_have_the_names_that_are_told() -> None:
    from importlib.metadata import packages_distributions

    for module, package in PACKAGES.items():
        assert package in packages_distributions()[module]


# --- Pictures ----------------------------------------------------------------------------------


def test_masks_of_the_same_images_each_time() -> None:
    images = SyntheticVehicles(4, 4, size=40)
    preprocessing = Preprocessing(resize=40, crop=32)
    model = AttentionEnsemble(2, 8).eval()
    sheet = mask_sheet(model, preprocessing, images)
    assert sheet.size == (3 * THUMBNAIL, 4 * THUMBNAIL)  # the image and two learners; 4 images
    torch.nn.init.constant_(model.attention_heads.weight, 0)
    other = mask_sheet(model, preprocessing, images)
    cells = [np.asarray(each).reshape(4, THUMBNAIL, 3, THUMBNAIL, 3) for each in (sheet, other)]
    assert np.array_equal(cells[0][:, :, 0], cells[1][:, :, 0])
    assert not np.array_equal(cells[0][:, :, 1:], cells[1][:, :, 1:])


def frames_of(sheet: Image.Image) -> list[list[tuple[int, ...]]]:
    """The colour of each cell's upper left corner."""
    columns, rows = (size // THUMBNAIL for size in sheet.size)
    return [
        [sheet.getpixel((x * THUMBNAIL, y * THUMBNAIL)) for x in range(columns)]
        for y in range(rows)
    ]


def verdicts(right: Sequence[Sequence[bool]]) -> list[list[tuple[int, ...]]]:
    from PIL.ImageColor import getrgb

    return [[getrgb("white"), *(getrgb(RIGHT if each else WRONG) for each in row)] for row in right]


def test_neighbours_are_framed_by_whether_they_are_right() -> None:
    images = SyntheticVehicles(4, 6, size=40)
    embeddings = torch.nn.functional.normalize(torch.randn(24, 5), dim=1)
    queries = [2, 6, 10, 14, 18, 22]  # 6 of 24, at even distances
    right = []
    for query in queries:
        scores = [float(embeddings[query] @ embeddings[index]) for index in range(24)]
        order = sorted((i for i in range(24) if i != query), key=lambda i: -scores[i])
        right.append([images.labels[i] == images.labels[query] for i in order[:RESULTS]])
    sheet = neighbor_sheet(some_neighbors(images, embeddings), images)
    assert frames_of(sheet) == verdicts(right)
    inside = sheet.crop((FRAME, FRAME, THUMBNAIL - FRAME, THUMBNAIL - FRAME))
    assert np.array_equal(inside, images.load(queries[0]).resize(inside.size, Image.BICUBIC))


def test_neighbours_come_from_the_gallery_if_there_is_one() -> None:
    images = SyntheticVehicles(4, 3, size=40)
    queries, gallery = images.select(np.arange(0, 6)), images.select(np.arange(3, 12))
    found = torch.eye(9)[[0, 1, 2]].repeat(2, 1)  # of class 1, which images 3, 4, 5 are of
    sheet = neighbor_sheet(some_neighbors(queries, found, gallery, torch.eye(9)), queries, gallery)
    assert frames_of(sheet)[0][:2] == verdicts([[True]])[0]
    assert len(frames_of(sheet)) == 3  # class 0 is not in the gallery
    none = images.select(np.arange(6, 9))
    assert some_neighbors(none, found[:3], images.select(np.arange(3)), found[:3]) == {}


def test_flat_names() -> None:
    line = {"loss": 1, "metric": [2.0, 3.0], "a": {"b.c": 4, "d": {"e": 5}}, "learner_cosine": None}
    assert flat(line) == {"loss": 1, "metric/1": 2, "metric/2": 3, "a/b.c": 4, "a/d/e": 5}
