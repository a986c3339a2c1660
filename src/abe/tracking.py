"""Trackers: a run's numbers and pictures where others look for them, beside its metrics.jsonl.

    tensorboard   event files in <run>/tensorboard: tensorboard --logdir runs
    mlflow        the server of MLFLOW_TRACKING_URI, or else the folder mlruns beside the run
    wandb         Weights & Biases, as its variables say (WANDB_MODE=offline ...)

A run that goes on from a checkpoint goes on in the same run of a tracker, and what it had reached
beyond that checkpoint does not stay there. TensorBoard is told to pass over it. From MLflow and
Weights & Biases nothing can be taken back: they are sent a point when a checkpoint on the disk has
it, and <run>/tracking.json says which run of theirs it is and up to which step they were sent it;
where a kill came between the two, MLflow is asked what it has. W&B writes down what it is sent a
second later; that is lost if everything is killed before.

No tracker stops a training. What one of them fails at is warned of once; at the next checkpoint the
two are sent again what they lack.
"""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from abe.config import Config
from abe.errors import InputError
from abe.files import read_json, read_json_lines, write_json
from abe.results import flatten

STATE = "tracking.json"
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny", "wandb": "wandb"}
FLUSH_SECONDS = 10  # how much of its events TensorBoard may miss when a run is killed
PROJECT = "abe"  # in MLflow an experiment; their own variables may name another
# What is set of their own variables where it is not set: how long an MLflow server that is away
# holds the training up, and after how many seconds W&B writes down what it was sent.
MLFLOW_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
WANDB_DEFAULTS = {"WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1"}


class Tracker(Protocol):
    """Where a run's numbers and pictures go; connects when it is first told something."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step`, by names with "/" between group and name."""
        ...

    def images(self, step: int, name: str, image: Image.Image) -> None:
        """A picture after `step`, in mode RGB."""
        ...

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is on the disk, and the run will not go back behind it."""
        ...

    def close(self, complete: bool) -> None:
        """The training ends here, `complete` or to be gone on with."""
        ...


class TensorBoard:
    """Event files, written while the run goes on.

    Args:
        run: the run's folder.
        config: shown as hyper-parameters.
        done: step that the run goes on from; None for one that begins.
    """

    def __init__(self, run: Path, config: Config, done: int | None) -> None:
        self._run = run
        self._config = config
        self._first = 0 if done is None else done + 1

    @cached_property
    def _writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        writer: Any = SummaryWriter(
            str(self._run / "tensorboard"), purge_step=self._first, flush_secs=FLUSH_SECONDS
        )
        for summary in hparams(_settings(self._config), {}):
            writer.file_writer.add_summary(summary)
        return writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write them."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, image: Image.Image) -> None:
        """Write it."""
        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def saved(self, step: int) -> None:
        """Bring to the disk what there is."""
        self._writer.flush()

    def close(self, complete: bool) -> None:
        """Close the file, if there is one."""
        if "_writer" in self.__dict__:
            self._writer.close()


@dataclass
class _Point:
    """What there is of a step."""

    milliseconds: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    values: dict[str, float] = field(default_factory=dict)
    images: dict[str, Image.Image] = field(default_factory=dict)


class _AppendOnly:
    """A tracker that is sent what there is of a run when a checkpoint of it is on the disk.

    Args:
        run: the run's folder, where tracking.json is.
        config: what the run was begun with.
        done: step that the run goes on from; what metrics.jsonl has and the tracker lacks of the
            steps up to it is sent, too. None for a run that begins.
    """

    name: str
    _client: Any = None

    def __init__(self, run: Path, config: Config, done: int | None) -> None:
        self._run = run
        self._config = config
        self._done = -1 if done is None else done
        state = {} if done is None else _state(run).get(self.name, {})
        self._id: str | None = state.get("run")
        self._sent: int = state.get("step", -1)
        self._points: dict[int, _Point] = {}  # kept until they are sent
        if done is not None and (run / "metrics.jsonl").exists():
            for line in read_json_lines(run / "metrics.jsonl", cut_off=True):
                self.scalars(line.pop("step"), flat(line))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep them until a checkpoint has them."""
        if step > self._sent:
            self._points.setdefault(step, _Point()).values.update(values)

    def images(self, step: int, name: str, image: Image.Image) -> None:
        """Keep it until a checkpoint has it."""
        if step > self._sent:
            self._points.setdefault(step, _Point()).images[name] = image

    def saved(self, step: int) -> None:
        """Send what was kept; of what cannot be sent now, numbers are kept on."""
        try:
            if self._client is None:
                self._client = self._connect()
            for each, point in list(self._points.items()):
                self._send(each, point)
                del self._points[each]
                self._sent = each
        finally:
            for point in self._points.values():
                point.images.clear()
            own = {self.name: {"run": self._id, "step": self._sent}}
            write_json(self._run / STATE, _state(self._run) | own)

    def _connect(self) -> Any:
        """Begin a run of the tracker, which is `_id` then, or go on with `_id`; -> the client."""
        raise NotImplementedError

    def _send(self, step: int, point: _Point) -> None:
        raise NotImplementedError


class MLflow(_AppendOnly):
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, or "abe"."""

    name = "mlflow"

    def _connect(self) -> Any:
        _set_defaults(MLFLOW_DEFAULTS)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:  # mlflow-skinny has no other store without a server
            _set_defaults({"MLFLOW_ALLOW_FILE_STORE": "true"})
            uri = (self._run.absolute().parent / "mlruns").as_uri()
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(uri)
        if self._id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
            self._id = client.create_run(experiment, run_name=self._run.absolute().name).info.run_id
        else:
            client.update_run(self._id, status="RUNNING")
            self._leave_out_what_it_has(client)
        if self._sent < 0:
            settings = _settings(self._config).items()
            client.log_batch(self._id, params=[Param(key, str(value)) for key, value in settings])
        return client

    def _leave_out_what_it_has(self, client: Any) -> None:
        """A kill may have come between sending points and writing down that they are sent."""
        kept = [(step, point.values) for step, point in self._points.items() if step <= self._done]
        for key in {key for _, values in kept for key in values}:
            has = {metric.step for metric in client.get_metric_history(self._id, key)}
            for step, values in kept:
                if step in has:
                    values.pop(key, None)

    def _send(self, step: int, point: _Point) -> None:
        from mlflow.entities import Metric

        values = point.values.items()
        metrics = [Metric(key, value, point.milliseconds, step) for key, value in values]
        self._client.log_batch(self._id, metrics=metrics)
        for name, image in point.images.items():
            self._client.log_image(self._id, image, key=name, step=step)

    def close(self, complete: bool) -> None:
        """Say how the run stands."""
        if self._client is not None:
            self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


class WandB(_AppendOnly):
    """A run of the project WANDB_PROJECT, or "abe"."""

    name = "wandb"

    def _connect(self) -> Any:
        _set_defaults(WANDB_DEFAULTS)
        import wandb

        client = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._run.absolute().name,
            dir=str(self._run),
            id=self._id,
            resume="allow",
            config=self._config.to_json(),
            settings=wandb.Settings(console="off"),
        )
        self._id = client.id
        return client

    def _send(self, step: int, point: _Point) -> None:
        import wandb

        images = {name: wandb.Image(image) for name, image in point.images.items()}
        self._client.log(point.values | images, step=step, commit=True)

    def close(self, complete: bool) -> None:
        """Hand over what is left, and say how the run stands."""
        if self._client is not None:
            self._client.finish(exit_code=0 if complete else 1)


class Tracking:
    """All trackers of a run; what fails in one of them is warned of, and the training goes on.

    Args:
        trackers: by their names.
        last: step that completes the training.
    """

    def __init__(self, trackers: Mapping[str, Tracker], last: int = 0) -> None:
        self._trackers = trackers
        self._last = last
        self._saved: int | None = None
        self._failed: set[str] = set()

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._trackers)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        numbers = flat(values)
        self._tell_all(lambda tracker: tracker.scalars(step, numbers))

    def images(self, step: int, draw: Callable[[], Mapping[str, Image.Image]]) -> None:
        """Pictures by name, drawn if there is a tracker; that they cannot be is the tracker's."""
        pictures: dict[str, Image.Image] = {}

        def tell(tracker: Tracker) -> None:
            pictures.update(pictures or draw())
            for name, image in pictures.items():
                tracker.images(step, name, image)

        self._tell_all(tell)

    def saved(self, step: int) -> None:
        """The checkpoint of a step is on the disk."""
        self._saved = step
        self._tell_all(lambda tracker: tracker.saved(step))

    def close(self) -> None:
        """The training ends."""
        complete = self._saved == self._last
        self._tell_all(lambda tracker: tracker.close(complete))

    def _tell_all(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                tell(tracker)
            except Exception as error:  # of a client, its server or the disk: it may be any
                if name in self._failed:
                    continue
                self._failed.add(name)
                reason = (str(error).splitlines() or [""])[0]
                warnings.warn(
                    f"tracking by {name} fails ({type(error).__name__}: {reason}): the training "
                    "goes on without it, and metrics.jsonl has every number",
                    stacklevel=2,
                )


def require_packages(names: Iterable[str]) -> None:
    """Raise an `InputError` if a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"tracking={name} needs the package {PACKAGES[name]}, which is not installed: pip "
                f"install {PACKAGES[name]}, or choose others, or none: --set tracking=none"
            )


@contextmanager
def open_tracking(run: Path, config: Config, done: int | None) -> Iterator[Tracking]:
    """The trackers of `config.tracking`, closed at the end.

    Args:
        run: the run's folder.
        config: of the run.
        done: step that the run goes on from; None for one that begins.
    """
    kinds: dict[str, Callable[[Path, Config, int | None], Tracker]]
    kinds = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
    trackers = {str(name): kinds[name](run, config, done) for name in config.tracking}
    tracking = Tracking(trackers, config.train.steps)
    try:
        if done is not None:
            tracking.saved(done)  # which could not be told then, perhaps
        yield tracking
    finally:
        tracking.close()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line of metrics.jsonl; None is left out.

    What is a mapping or a list there gets a name each: "update_to_weight/<layer>", "metric/<m>"
    for learners m = 1..M.
    """
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = {str(number): each for number, each in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{key}/")
        elif value is not None:
            numbers[prefix + key] = float(value)
    return numbers


def _settings(config: Config) -> dict[str, bool | int | float | str]:
    """All settings by their full names, as numbers or text."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in flatten(config.to_json()).items()
    }


def _set_defaults(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _state(run: Path) -> dict[str, Any]:
    """tracking.json; empty if there is none."""
    return read_json(run / STATE) if (run / STATE).exists() else {}
