"""A start for a backbone: its layers, trained from random weights to classify images.

As in `abe.train`, what step t does is a function of the weights, the configuration and t alone, so
one that was stopped goes on to the same bytes on a CPU. All classes are learned, and a few images
of each are held out, by which the file is measured as those who read it will find it: folded,
rounded to float16, in the network that `abe train` builds of it.

Shapes: N images held out.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from abe.checkpoint import load_optimizer, training_tensors
from abe.config import PretrainConfig
from abe.data.classes import ClassImages, open_classes
from abe.data.decode import BrokenImageError, ReadingError, printable
from abe.data.loader import Batch, training_batches
from abe.data.samplers import EpochBatchSampler
from abe.data.transforms import Preprocessing
from abe.errors import DivergedError, InputError
from abe.evaluate import embed
from abe.files import append_json_line, remove_unfinished, replace_text, write_json, write_tensors
from abe.model.backbones import get_backbone, pretraining_form
from abe.model.card import model_card
from abe.model.classifier import Classifier, exported
from abe.model.weights import load_pretrained, read_weights
from abe.optimizer import build_optimizer, set_rate
from abe.progress import step_progress
from abe.run_folder import (
    ENVIRONMENT,
    IMAGES,
    LOG,
    alone,
    forget_later_steps,
    looking_for_images,
    require_outside_images,
)
from abe.runtime import (
    Precision,
    StopSignal,
    autocast,
    choose_device,
    choose_precision,
    environment,
    keep_freed_memory,
    typed,
)

CHECKPOINT = "checkpoint.safetensors"  # weights, momentum, and in its metadata the rest
UNMEASURED = "unmeasured.safetensors"  # the start, until its top-1 is known


@dataclass(frozen=True, eq=False)
class _Saved:
    """What a checkpoint holds."""

    step: int
    config: PretrainConfig
    name: str
    """Of the start, as it was begun."""
    digest: str
    """Of the images, see `ClassImages.digest`."""
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> Self:
        path = folder / CHECKPOINT
        if not path.exists():
            raise InputError(f"{folder} has no {CHECKPOINT}: give a folder that abe pretrain made")
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if meta.pop("checksum") != _checksum(meta, tensors):
                raise InputError("it was changed since it was written")
            config = PretrainConfig.from_json(json.loads(meta["config"]))
            name = meta.get("name", config.name)  # early versions do not say it
            return cls(int(meta["step"]), config, name, meta["digest"], tensors)
        except (OSError, SafetensorError, ValueError, LookupError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be read ({error}): begin again in another folder"
            ) from None


class Pretrainer:
    """Makes the start of a configuration in a folder.

    The folder receives config.json, images.json (name, sizes and digest), environment.json,
    metrics.jsonl (a line an epoch), checkpoint.safetensors (after every epoch), and at the end
    <name>.safetensors, the start, with <name>.md, its model card.

    Args:
        config: what to make.
        folder: where; made if it does not exist.
        console: where to report.
        saved: of the same folder, to go on from; see `resume`.

    Raises:
        InputError: the configuration or the images cannot be used, or are not those that were
            begun with; or the folder holds a start, or one that was begun.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        console: Console | None = None,
        *,
        saved: _Saved | None = None,
    ) -> None:
        config = config.anchored()
        self.folder = folder
        self.console = console or Console(stderr=True)
        name = config.name if saved is None else saved.name  # wherever the images are now
        self.file = folder / f"{name}.safetensors"
        if saved is None and (folder / CHECKPOINT).exists():
            raise InputError(
                f"{folder} holds a start that was begun: go on with `{self._go_on}`, or give "
                "another folder"
            )
        if saved is None and self.file.exists():
            raise InputError(f"{self.file} is there already: give another folder")
        if saved is None:
            require_outside_images(folder, config.data)
        self.device = choose_device(config.device)
        self.precision: Precision = choose_precision(config.precision, self.device)
        # After an interruption as before it, on a busy machine as well.
        self.config = config.model_copy(update={"precision": self.precision})
        self.images = self._open_images(begun=saved is not None)
        if saved is not None and saved.digest != self.images.digest:
            raise InputError(
                f"{printable(self.images.learned.name)}: images or classes were added, removed or "
                f"renamed since {folder} was begun: put them back as they were, or begin again in "
                "another folder"
            )
        self.sampler = EpochBatchSampler(
            len(self.images.learned), self.config.batch_size, self.config.seed
        )
        self.schedule = self.config.schedule(self.config.epochs * self.sampler.steps_per_epoch)
        self.backbone = get_backbone(self.config.backbone)
        trained = pretraining_form(self.backbone)
        self.preprocessing = replace(
            trained.preprocessing or Preprocessing(),
            resize=self.config.data.resize,
            crop=self.config.data.crop,
        )
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(self.config.seed)
        self.network = Classifier(trained, self.images.num_classes).to(self.device)
        self.optimizer = build_optimizer(self.schedule, self.network, None, frozenset())
        self.saved_step: int | None = None
        self.step = 0
        if saved is not None:
            self._restore(saved)

    def _open_images(self, *, begun: bool) -> ClassImages:
        data = self.config.data
        option = "--data" if data.root is None else "--root"
        advice = f"if they are elsewhere now: {self._go_on} {option} FOLDER"
        with looking_for_images(self.folder, data, advice if begun else None):
            return open_classes(self.config, self.console)

    @classmethod
    def resume(
        cls,
        folder: Path,
        console: Console | None = None,
        *,
        device: str | None = None,
        data: str | None = None,
        root: str | None = None,
    ) -> Self:
        """One that goes on where `folder` was left.

        Args:
            folder: which.
            console: where to report.
            device: to go on with another device, and then not to the bit; None for the same.
            data: where the images are now; None for where they were.
            root: likewise, of a benchmark.

        Raises:
            InputError: there is nothing to go on from, or it is damaged; or the images are others.
        """
        saved = _Saved.load(folder)
        config = saved.config
        moved = {key: at for key, at in (("source", data), ("root", root)) if at is not None}
        config = config.model_copy(update={"data": config.data.model_copy(update=moved)})
        if device not in (None, config.device):
            config = config.model_copy(update={"device": device, "precision": "auto"})
        return cls(config, folder, console, saved=saved)

    def fit(self) -> Path | None:
        """Train to the last step, write the start and its model card.

        Returns:
            The start's file, or None when a signal stopped it: it is saved then.

        Raises:
            DivergedError: the loss is not finite.
            InputError: a file cannot be written, or an image no longer read; or another process
                works in the folder, or has gone on there since this was made.
        """
        with alone(self.folder):
            there = (self.folder / CHECKPOINT).exists()
            if (_Saved.load(self.folder).step if there else None) != self.saved_step:
                raise InputError(
                    f"{self.folder} has been trained by another process meanwhile: go on with "
                    f"`{self._go_on}`"
                )
            self._begin()
            try:
                if not self._train():
                    return None
                self._finish()
            except (BrokenImageError, ReadingError) as error:
                raise InputError(
                    f"{error}: it could be read before, see to it; to go on: {self._go_on}"
                ) from None
            return self.file

    @property
    def _go_on(self) -> str:
        return typed("pretrain", "--resume", self.folder)

    def _begin(self) -> None:
        remove_unfinished(self.folder)
        forget_later_steps(self.folder / LOG, self.saved_step or 0)
        write_json(self.folder / "config.json", self.config.to_json())
        facts = self.images.describe()
        write_json(self.folder / IMAGES, facts)
        write_json(self.folder / ENVIRONMENT, environment(self.device))
        self._say(
            f"{facts['name']}: {facts['learned_images']:,} images of {facts['classes']:,} classes, "
            f"and {facts['held_out_images']:,} held out"
        )
        if self.images.skipped:
            self._say(f"{self.images.skipped} unreadable files are left out")
        if self.saved_step is None:
            self._save()

    def _train(self) -> bool:
        """Train to the last step; False if a signal stopped it, when it is saved."""
        with (
            StopSignal().listening() as stop,
            step_progress(
                self.console,
                done=self.step,
                steps=self.schedule.steps,
                batch_size=self.config.batch_size,
            ) as advance,
        ):
            for batch in training_batches(
                self.images.learned,
                self.sampler,
                self.preprocessing,
                seed=self.config.seed,
                start_step=self.step,
                stop_step=self.schedule.steps,
                workers=self.config.data.workers,
                pin_memory=self.device.type == "cuda",
            ):
                loss = self.train_step(batch)
                advance(self.step, loss)
                whole = self.step % self.sampler.steps_per_epoch == 0
                if whole:
                    self._end_epoch(loss)
                if whole or stop.received:
                    self._save()
                if stop.received:
                    self._say(
                        f"Stopped by {stop.received} after step {self.step}, saved. To go on: "
                        f"{self._go_on}"
                    )
                    return False
        return True

    def train_step(self, batch: Batch) -> float:
        """One step of the optimiser on the cross-entropy of smoothed labels; -> the loss.

        Raises:
            DivergedError: the loss is not finite.
        """
        self.network.train()
        classes = self.images.class_of[batch.labels].to(self.device)
        pixels = self.preprocessing.normalize(batch.images.to(self.device, non_blocking=True))
        with autocast(self.device, self.precision):
            logits = self.network(pixels)
        loss = F.cross_entropy(logits.float(), classes, label_smoothing=self.config.label_smoothing)
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"the loss is {loss.item()} at step {self.step}: lower lr ({self.config.lr})"
            )
        set_rate(self.optimizer, self.step, self.schedule)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _end_epoch(self, loss: float) -> None:
        top_1 = self._top_1(self.network, self.preprocessing, self.precision)
        epoch = self.step // self.sampler.steps_per_epoch
        append_json_line(
            self.folder / LOG,
            {"step": self.step, "epoch": epoch, "loss": loss, "top_1": top_1},
        )
        self._say(
            f"epoch {epoch:>3} of {self.config.epochs}  loss {loss:.4f}  top-1 {100 * top_1:5.1f} "
            "% of the images held out"
        )

    def _top_1(
        self, network: Classifier, preprocessing: Preprocessing, precision: Precision = "fp32"
    ) -> float:
        """The share of the N images held out that it names the class of, by their centre crops."""
        network.eval()
        logits = embed(
            lambda pixels: network(pixels)[:, None],
            self.images.held_out,
            preprocessing,
            device=self.device,
            precision=precision,
        ).squeeze(1)
        classes = self.images.class_of[torch.from_numpy(self.images.held_out.labels)]
        return (logits.argmax(1) == classes).double().mean().item()

    def _save(self) -> None:
        path = self.folder / CHECKPOINT
        model = {f"model.{key}": value for key, value in self.network.state_dict().items()}
        tensors = model | training_tensors(self.optimizer, None)
        meta = {
            "step": str(self.step),
            "config": json.dumps(self.config.to_json()),
            "name": self.file.stem,
            "digest": self.images.digest,
        }
        try:
            write_tensors(path, tensors, meta | {"checksum": _checksum(meta, tensors)})
        except (OSError, SafetensorError) as error:  # the latter of an OSError in safetensors
            raise InputError(
                f"{path} cannot be written ({error}): make room for it or see to its permissions; "
                f"to go on: {self._go_on}"
            ) from None
        self.saved_step = self.step

    def _restore(self, saved: _Saved) -> None:
        model: dict[str, Tensor] = {}
        momentum: dict[str, Tensor] = {}
        for key, value in saved.tensors.items():
            kind, _, name = key.partition(".")
            (model if kind == "model" else momentum)[name] = value
        try:
            self.network.load_state_dict(model)
            load_optimizer(self.optimizer, momentum)
        except (RuntimeError, LookupError, ValueError):
            raise InputError(
                f"{self.folder / CHECKPOINT} is of another network: begin again in another folder"
            ) from None
        self.step = self.saved_step = saved.step

    def _finish(self) -> None:
        """Write the start, measured as who reads it will find it, and its model card."""
        self._say("Measuring the start ...")
        stated = self.preprocessing.to_json() | {"range": "0..255"}
        facts = self.images.describe()
        metadata = {
            "format": "pt",
            "trained_on": f"{facts['name']}, {facts['classes']} classes, "
            f"{self.preprocessing.crop} px",
            "architecture": self._architecture(),
            "preprocessing": json.dumps(
                {key: stated[key] for key in ("channels", "range", "mean", "scale")}
            ),
        }
        tensors = exported(self.network, self.backbone)
        unmeasured = self.folder / UNMEASURED
        write_tensors(unmeasured, tensors, metadata)
        measured = self._measure(unmeasured)
        metadata["top1_held_out"] = f"{measured[self.preprocessing.crop]:.4f}"
        write_tensors(self.file, tensors, metadata)
        unmeasured.unlink()
        numbers = sum(tensor.numel() for tensor in tensors.values())
        card = self.file.with_suffix(".md")
        if not card.exists():  # else its owner may have filled in what it asks for
            text = model_card(
                self.file.stem,
                self.config,
                facts,
                environment(self.device) | {"precision": self.precision},
                self.preprocessing,
                measured,
                architecture=self._architecture(),
                size=f"{self.file.stat().st_size / 1e6:.0f} MB, {len(tensors)} tensors, "
                f"{numbers:,} numbers",
            )
            replace_text(card, text)
        scores = ", ".join(f"{100 * top_1:.1f} % at {side} px" for side, top_1 in measured.items())
        self._say(f"top-1 of the start: {scores}")

    def _architecture(self) -> str:
        made = "batch norm folded into convolutions, " * (
            pretraining_form(self.backbone) is not self.backbone
        )
        return f"{self.backbone.name}, {made}no classifier"

    def _measure(self, file: Path) -> dict[int, float]:
        """Top-1 of a start with the linear layer that it was trained with: side in pixels -> it.

        Of the centre crops, and of the whole squares that they are cut from.
        """
        weights = read_weights(file)
        network = Classifier(self.backbone, self.images.num_classes)
        load_pretrained(dict(network.named_children()), weights)
        network.linear.load_state_dict(self.network.linear.state_dict())
        network.to(self.device)
        own = weights.preprocessing or self.preprocessing
        resize = self.preprocessing.resize
        return {
            side: self._top_1(network, replace(own, resize=resize, crop=side))
            for side in (self.preprocessing.crop, resize)
        }

    def _say(self, text: str) -> None:
        """Print what may hold paths: as it is, unbroken."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)


def _checksum(meta: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of what a checkpoint says and holds."""
    found = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
