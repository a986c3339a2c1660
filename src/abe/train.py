"""Training: a plain loop over mini-batches that can stop and go on at any step.

What step t does is a function of the weights, the configuration and t alone (the samplers and the
augmentation count, they do not remember), so a resumed run repeats an uninterrupted one: on a CPU
exactly, on a GPU but for the order in which some of its kernels add.

Several processes can train one network (see `abe.ranks`): each knows the whole batch of a
step and embeds its share of it, each takes the loss of all B embeddings, and the gradients of their
shares are summed. That is the loss and the gradient of one process, apart from rounding. The first
rank alone writes and reports.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from abe.checkpoint import (
    Best,
    Checkpoint,
    checkpoints,
    load_latest,
    load_selected,
    remove_superseded,
    save_checkpoint,
    set_aside_newer,
    training_tensors,
)
from abe.chunks import backward_in_chunks, embed_in_chunks
from abe.config import Config, TrainConfig
from abe.data.classes import class_indices
from abe.data.datasets import LabelledImages
from abe.data.decode import BrokenImageError, ReadingError
from abe.data.loader import Batch, training_batches
from abe.data.samplers import ClassBalancedBatchSampler, PairBatchSampler
from abe.data.splits import Splits, open_splits
from abe.errors import DivergedError, InputError
from abe.evaluate import embed_share, evaluate_test
from abe.files import append_json_line, flush, remove_unfinished, replace_text, write_json
from abe.losses import EnsembleLoss, ensemble_loss
from abe.metric_losses import metric_loss_from_spec
from abe.metrics import recall_at_k
from abe.model.ensemble import AttentionEnsemble, concat
from abe.optimizer import build_optimizer, set_rate, warm_up
from abe.progress import step_progress
from abe.ranks import LostRankError, Ranks, share
from abe.results import divergence_record, write_result
from abe.run_folder import (
    ENVIRONMENT,
    IMAGES,
    LOCK,
    LOG,
    TEST_RECALL,
    add_stretches,
    add_test_pick,
    alone,
    checkpoint_of_first,
    forget_later_steps,
    looking_for_images,
    read_environment,
    recorded_precision,
    require_outside_images,
    require_same_images,
    stretches,
)
from abe.runtime import (
    Precision,
    StopSignal,
    autocast,
    choose_precision,
    environment,
    keep_freed_memory,
    resume_command,
    seed_step,
)
from abe.start import start
from abe.tracking import Tracking, open_tracking, require_packages

Picked = TypeVar("Picked")


class Trainer:
    """Trains the network of a configuration in a run folder.

    The folder receives config.json, environment.json, images.json (which ones, and the classes that
    are learned), weights.txt (what the pretrained start reached), metrics.jsonl, what trackers keep
    there (`abe.tracking`), checkpoints/ and at the end result.json and embeddings.safetensors (the
    test images', (N, M, d)). Where there are fewer classes than a class-balanced batch asks for,
    batches are smaller.

    Args:
        config: the run.
        run: its folder; made if it does not exist. Several machines have to share it.
        console: where to report.
        checkpoint: of the same run, to go on from; see `resume`.
        splits: of the configuration's images, if they are open already.

    Raises:
        InputError: whatever in the configuration, the data or the weights cannot be used; or the
            folder holds a run already; or several processes cannot work on it together.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        console: Console | None = None,
        *,
        checkpoint: Checkpoint | None = None,
        splits: Splits | None = None,
    ) -> None:
        self.run = run
        if checkpoint is None:
            require_outside_images(run, config.data)
        self.config = config.anchored()
        self.tracking = Tracking({})
        require_packages(config.tracking)
        self.ranks = Ranks(config.device, config.ranks_timeout)
        self.ranks.require_same(resumed=checkpoint is not None)
        if checkpoint is not None:
            checkpoint = checkpoint_of_first(self.ranks, checkpoint)
        if self.ranks.first and (run / LOCK).exists():
            with alone(run):
                pass  # who is too late is told before images are read
        if checkpoint is None and checkpoints(run):
            raise InputError(
                f"{run} holds a run already: go on with `{resume_command(run)}`, "
                "or give another folder"
            )
        if checkpoint is None and (run / "result.json").exists():
            raise InputError(
                f"{run} holds the result of a run whose checkpoints are gone: give another folder"
            )
        self.device = self.ranks.device
        self.console = (
            (console or Console(stderr=True)) if self.ranks.first else Console(quiet=True)
        )
        self.precision = self._choose_precision(checkpoint)
        # What takes long comes last: a mistake in the settings is told before images are read.
        self.start = start(config)
        _require_no_batch_statistics(self.start.model, self.ranks, config.train)
        if config.train.activation_checkpointing:
            self.start.model.checkpoint_activations()
        if splits is None:
            splits = self._open_splits(config, begun=checkpoint is not None)
        self.splits = splits
        if checkpoint is not None:
            require_same_images(run, self.splits)
        self.ranks.require_same(settings=config.digest, images=self.splits.digest)
        self.config = self._with_batches_that_fit()
        self.sampler = _sampler(self.config, self.splits.train.labels)
        if self.sampler.batch_size < self.ranks.size:
            raise InputError(
                f"train.batch_size={self.sampler.batch_size} has no image for each of "
                f"{self.ranks.size} processes: raise it, or start fewer"
            )

        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = self.start.model.to(self.device)
        self.network = self.ranks.wrap(self.model, torch.zeros(1, 3, *2 * [config.data.crop]))
        self.preprocessing = self.start.preprocessing
        self.metric_loss, self.class_index = self._metric_loss()
        if self.ranks.size > 1:
            self.optimizer  # noqa: B018  # made now: no step waits for what one has to import
        self.step = 0
        self.best: Best | None = None
        if checkpoint is not None:
            self._restore(checkpoint)

    def _open_splits(self, config: Config, *, begun: bool) -> Splits:
        data = config.data
        key = "data.source" if data.root is None else "data.root"
        advice = f"if a folder of this name is elsewhere now, give it by --set {key}=FOLDER"
        with looking_for_images(self.run, data, advice if begun else None):
            return open_splits(data, config.protocol, self.console, check=self.ranks.first_here)

    def _choose_precision(self, checkpoint: Checkpoint | None) -> Precision:
        """The same on all ranks, and on a device the same after an interruption as before it."""
        name = self.config.precision
        if checkpoint is not None and name == "auto":
            name = recorded_precision(self.run, self.device)
        chosen: Precision = self.ranks.from_first(choose_precision(name, self.device))
        return chosen

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made when it is first asked for: torch imports its compiler for it, which takes long."""
        train, new_layers = self.config.train, self.start.new_layers
        return build_optimizer(train, self.model, self.metric_loss, new_layers)

    @classmethod
    def resume(
        cls,
        run: Path,
        console: Console | None = None,
        *,
        device: str | None = None,
        overrides: Iterable[str] = (),
        splits: Splits | None = None,
    ) -> Trainer:
        """A trainer that goes on from the newest checkpoint of `run`.

        Args:
            run: its folder.
            console: where to report.
            device: to go on with another device, and then not to the bit; None for the run's.
            overrides: settings that decide no result, such as "data.workers=0".
            splits: of the configuration's images, if they are open already.

        Raises:
            InputError: `run` has no checkpoint, or it is damaged; or other settings are given.
        """
        checkpoint = load_latest(run)
        config = checkpoint.config.on_device(device).with_overrides(overrides)
        if config.portable() != checkpoint.config.portable():
            raise InputError(
                f"{run} goes on as it was started: give only what changes no result, such as "
                "data.workers, train.chunk_size, ranks_timeout or tracking"
            )
        return cls(config, run, console, checkpoint=checkpoint, splits=splits)

    @classmethod
    def begin(
        cls,
        config: Config,
        run: Path,
        console: Console | None = None,
        *,
        splits: Splits | None = None,
    ) -> Trainer:
        """A trainer that goes on in `run` if it has a checkpoint, and else begins there.

        What decides no result may be other than it was, and files may have been moved in between.
        The arguments are those of the class.

        Raises:
            InputError: as the class and `resume` do.
        """
        if not checkpoints(run):
            return cls(config, run, console, splits=splits)
        return cls.resume(run, console, overrides=config.incidental(), splits=splits)

    def fit(self, go_on: str | None = None) -> dict[str, Any] | None:
        """Train to the last step, pick the checkpoint, score the test images once.

        Args:
            go_on: the command to go on with, if not `abe train --resume`, for who stops the run.

        Returns:
            The record of the result (see `abe.results`), or None when a signal stopped the run:
            it is saved then and `resume` goes on.

        Raises:
            DivergedError: the loss or a gradient is not finite, and the message names the step and
                the batch's files; or embeddings are not.
            InputError: a file of the run cannot be written; or another process trains it, or has
                gone on with it since this trainer was made.
        """
        return self._fit(go_on, self._finish)

    def select(self, go_on: str | None = None) -> Best | None:
        """As `fit`, without its end: the test images are not scored.

        Args:
            go_on: as in `fit`.

        Returns:
            The checkpoint that the protocol picks, or None when a signal stopped the run.

        Raises:
            InputError: as `fit`.
        """
        return self._fit(go_on, lambda: self.best)

    def _fit(self, go_on: str | None, finish: Callable[[], Picked]) -> Picked | None:
        """Train to the last step, alone in the run's folder, and then do what `finish` does."""
        with alone(self.run) if self.ranks.first else contextlib.nullcontext():
            if self.ranks.first:
                set_aside_newer(self.run, None if self.best is None else self.step)
            self.ranks.wait()
            return self._fit_alone(go_on or resume_command(self.run), finish)

    def _fit_alone(self, go_on: str, finish: Callable[[], Picked]) -> Picked | None:
        try:
            self._begin()
            return finish() if self._train(go_on) else None
        except KeyboardInterrupt:
            if not checkpoints(self.run):
                self._say("Stopped before the first checkpoint: nothing is saved")
            else:
                done = self.step == self.config.train.steps
                where = "the training is complete" if done else "the last checkpoint stands"
                self._say(f"Stopped, {where}. To go on: {go_on}")
            raise
        except LostRankError as error:
            raise InputError(f"{error}; {self._saved(go_on)}") from None
        except (BrokenImageError, ReadingError) as error:
            raise InputError(
                f"{error}: it could be read before, see to it; {self._saved(go_on)}"
            ) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                f"a process that reads images was ended ({error}): see to the memory, or lower "
                f"data.workers; {self._saved(go_on)}"
            ) from None
        except OSError as error:
            if error.filename is None:
                raise
            raise InputError(
                f"{error.filename} cannot be written ({error.strerror}): make room for it or see "
                f"to its permissions; {self._saved(go_on)}"
            ) from None

    def _saved(self, go_on: str) -> str:
        """What of the run is left when it fails, for the end of a message."""
        return f"to go on: {go_on}" if checkpoints(self.run) else "nothing is saved"

    def _train(self, go_on: str) -> bool:
        """Train to the last step; False if a signal stopped it before, when it is saved."""
        if self.best is None:
            self._say_first_loss()
        done = None if self.best is None else self.step
        with self._open_tracking(done) as self.tracking, StopSignal().listening() as stop:
            progress = self._progress()
            if self.best is None:
                self._evaluate_and_save()
            with progress as advance:
                for batch in training_batches(
                    self.splits.train,
                    self.sampler,
                    self.preprocessing,
                    seed=self.config.seed,
                    start_step=self.step,
                    stop_step=self.config.train.steps,
                    workers=self.config.data.workers,
                    pin_memory=self.device.type == "cuda",
                    part=self.ranks.part,
                ):
                    loss = self.train_step(batch)
                    advance(self.step, loss.total.item())
                    last = self.step == self.config.train.steps
                    evaluated = last or self.step % self.config.train.eval_every == 0
                    if evaluated:
                        self._evaluate_and_save()
                    if self.ranks.any(stop.received is not None):  # also while it evaluated
                        if not evaluated:
                            self._save()
                        self._say(
                            f"Stopped by {stop.received or 'a signal to another rank'} after step "
                            f"{self.step}, saved. To go on: {go_on}"
                        )
                        return False
        return True

    def _open_tracking(self, done: int | None) -> AbstractContextManager[Tracking]:
        if self.ranks.first:
            return open_tracking(self.run, self.config, done)
        return contextlib.nullcontext(self.tracking)

    def _say_first_loss(self) -> None:
        """Print the loss of the first step before anything is trained, and leave no trace of it.

        The evaluation before the first step may take long; whether the run is sound shows here.
        """
        (batch,) = training_batches(
            self.splits.train,
            self.sampler,
            self.preprocessing,
            seed=self.config.seed,
            start_step=0,
            stop_step=1,
            part=self.ranks.part,
        )
        self.model.train()
        modules = [module for module in (self.model, self.metric_loss) if module is not None]
        buffers = [buffer for module in modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(gpus):
            seed_step(self.config.seed, 0)
            size = self.config.train.chunk_size or len(batch.images)
            own = embed_in_chunks(self._embed, batch.images, size)
            raw = self.ranks.gather(own, len(batch.labels))
            loss, _ = self._loss(raw, batch.labels)
            for buffer, value in zip(buffers, before, strict=True):  # as batch norm's statistics
                buffer.copy_(value)
        self._say(f"step {0:>6}  loss {loss.total.item():.4f} on the first batch")

    def train_step(self, batch: Batch) -> EnsembleLoss:
        """One step of the optimiser on Eq. 8; the learning rate is the schedule's at this step.

        Args:
            batch: with this rank's share of the images, and the labels of all.

        Raises:
            DivergedError: the loss or the gradient is not finite.
        """
        train = self.config.train
        started = time.perf_counter()
        logged = self.ranks.first and self.step % train.log_every == 0
        self.model.train()
        gates = GateStatistics(self.model) if logged else None
        seed_step(self.config.seed, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        if train.chunk_size is None:
            own = self._embed(batch.images)  # (B / N, M, d)
        else:
            own = embed_in_chunks(self._embed, batch.images, train.chunk_size)
        raw = self.ranks.gather(own, len(batch.labels)).requires_grad_()  # (B, M, d)
        if not raw.isfinite().all():
            self._refuse("embeddings are not finite", batch)
        loss, embeddings = self._loss(raw, batch.labels)
        if not math.isfinite(loss.total.item()):
            self._refuse(f"the loss is {loss.total.item()}", batch)

        factor = set_rate(self.optimizer, self.step, train)
        loss.total.backward()
        self._backward(batch.images, own, raw)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, train.clip_norm or math.inf)
        if not math.isfinite(grad_norm.item()):
            self._refuse(f"the gradient's length is {grad_norm.item()}", batch)
        before = _weights(self.model) if logged else {}
        self.optimizer.step()
        self.step += 1
        if gates is not None:
            self._log(
                loss=loss.total.item(),
                metric=loss.metric.tolist(),
                divergence=loss.divergence.item(),
                lr=train.lr * factor,
                grad_norm=grad_norm.item(),
                learner_cosine=_learner_cosine(embeddings.detach()),
                update_to_weight=_update_ratios(before, _weights(self.model)),
                images_per_second=len(batch.labels) / (time.perf_counter() - started),
                **gates.read(),
            )
        return loss

    def _embed(self, images: Tensor) -> Tensor:
        """The linear layer's output for uint8 images of this rank; (n, 3, H, W) -> (n, M, d)."""
        pixels = self.preprocessing.normalize(images.to(self.device, non_blocking=True))
        with self.ranks.connected(), autocast(self.device, self.precision):
            return self.network(pixels, normalize=False)

    def _loss(self, raw: Tensor, labels: Tensor) -> tuple[EnsembleLoss, Tensor]:
        """Eq. 8 on the whole batch.

        Args:
            raw: (B, M, d), as the linear layer gives them.
            labels: (B,).

        Returns:
            The loss, and the unit embeddings (B, M, d) that it is taken of.
        """
        train = self.config.train
        embeddings = F.normalize(raw, dim=-1)
        loss = ensemble_loss(
            embeddings,
            labels.to(self.device),
            metric_loss=self._applied_metric_loss(raw),
            margin=train.margin,
            normalization=train.normalization,
            divergence_weight=train.divergence_weight * warm_up(self.step, train.divergence_warmup),
            divergence_margin=train.divergence_margin,
            divergence_normalization=train.divergence_normalization,
        )
        return loss, embeddings

    def _backward(self, images: Tensor, own: Tensor, raw: Tensor) -> None:
        """From the loss's gradient of all embeddings to that of the weights, on every rank.

        Args:
            images: of this rank, to be embedded again in chunks if `own` has no graph.
            own: (B / N, M, d), this rank's embeddings with their graph.
            raw: (B, M, d), those of all, with the gradient of the loss.
        """
        assert raw.grad is not None
        # The wrapped network takes the mean over the ranks; the batch's gradient is the sum.
        gradient = raw.grad[share(len(raw), self.ranks.part)] * self.ranks.size
        size = self.config.train.chunk_size
        with self.ranks.connected():
            if size is None:
                own.backward(gradient)
            else:
                silent = partial(self.ranks.apart, self.network)
                backward_in_chunks(self._embed, images, gradient, size, silent)
        if self.metric_loss is not None:
            self.ranks.take_gradients(self.metric_loss.parameters())

    def _metric_loss(self) -> tuple[nn.Module | None, Tensor]:
        """The loss in place of Eq. 10, if any, and label -> class index among those trained on."""
        index = class_indices(self.splits.train.labels)
        if self.config.train.metric_loss == "contrastive":
            return None, index.to(self.device)
        loss = metric_loss_from_spec(
            self.config.train.metric_loss,
            num_learners=self.model.num_learners,
            learner_dim=self.model.learner_dim,
            num_classes=int(index.max()) + 1,
        )
        return loss.to(self.device), index.to(self.device)

    def _applied_metric_loss(self, raw: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
        loss = self.metric_loss
        if loss is None:
            return None
        normalize = self.config.train.normalize_embeddings
        return lambda unit, labels: loss(unit if normalize else raw, self.class_index[labels])

    def _with_batches_that_fit(self) -> Config:
        """The configuration, with fewer classes a batch where there are not as many."""
        num_classes = len(np.unique(self.splits.train.labels))
        found = self.config.with_batches_that_fit(num_classes)
        if found != self.config:
            self._say(
                f"There are {num_classes} classes to learn from: "
                f"batches have {found.train.batch_size} images in place of "
                f"{self.config.train.batch_size}"
            )
        return found

    def _say(self, text: str) -> None:
        """Print what may hold paths: as it is, unbroken."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _begin(self) -> None:
        if not self.ranks.first:
            return
        remove_unfinished(self.run)
        if self.best is None:  # the log may be of an attempt that was killed before it saved
            (self.run / LOG).unlink(missing_ok=True)
            write_json(
                self.run / IMAGES,
                {
                    "digest": self.splits.digest,
                    "data": self.splits.describe(),
                    "learned_classes": self.splits.learned_classes,
                },
            )
        else:
            forget_later_steps(self.run / LOG, self.step)
            remove_superseded(self.run, keep=self.best)  # if a kill came before that
        write_json(self.run / "config.json", self.config.to_json())
        replace_text(self.run / "weights.txt", f"{self.start.report}\n")
        self.console.print(self.start.report, markup=False, highlight=False)
        now = self._environment()
        told = {} if self.best is None else read_environment(self.run)
        done = self.step == self.config.train.steps
        details = {
            "data": self.splits.describe(),
            "weights": self.start.origin,
            "stretches": stretches(told, now, None if told and done else self.step),
        }
        write_json(self.run / ENVIRONMENT, now | details)
        if self.splits.skipped:
            self.console.print(f"{self.splits.skipped} unreadable files are left out")

    def _evaluate_and_save(self) -> None:
        """Score the protocol's images, note the best, write a checkpoint."""
        splits = self.splits
        recall, select, items = self._recall(splits.select, splits.select_gallery)
        if self.config.tracking:
            from abe.report.pictures import some_neighbors

            found = some_neighbors(splits.select, select, splits.select_gallery, items, self.ranks)
            self.tracking.images(self.step, lambda: self._pictures(found))
        scores = {"recall_at_1": recall}
        if self.config.protocol == "both":
            scores[TEST_RECALL], *_ = self._recall(splits.test, splits.gallery)
        self._log(**scores)
        if self.best is None or recall > self.best.recall_at_1:
            self.best = Best(self.step, recall)
        which = "test images" if self.config.protocol == "paper" else "held-out classes"
        self.console.print(
            f"step {self.step:>6}  Recall@1 {100 * recall:5.1f} % on {which}"
            f"  (best {100 * self.best.recall_at_1:.1f} % at step {self.best.step})"
            + (f", {100 * scores[TEST_RECALL]:.1f} % on test images" if len(scores) > 1 else "")
        )
        self._save()

    def _recall(
        self, images: LabelledImages, gallery: LabelledImages | None
    ) -> tuple[float, Tensor, Tensor | None]:
        """Recall@1 as it is now; and this rank's embeddings of images and gallery, (n, D)."""

        def embedded(images: LabelledImages) -> Tensor:
            embeddings = embed_share(
                self.model.eval(),
                images,
                self.preprocessing,
                self.ranks,
                precision=self.precision,
                workers=self.config.data.workers,
            )
            if self.ranks.any(not embeddings.isfinite().all()):
                raise DivergedError(
                    f"embeddings are not finite after step {self.step}: lower train.lr "
                    f"({self.config.train.lr}), or see which layer is fast in "
                    f"{self.run / LOG}, update_to_weight"
                )
            return concat(embeddings)

        query = embedded(images)
        items = None if gallery is None else embedded(gallery)
        against = () if gallery is None or items is None else (items, gallery.labels)
        recall = recall_at_k(query, images.labels, [1], *against, ranks=self.ranks)[1]
        return recall, query, items

    def _pictures(self, found: Mapping[int, list[int]]) -> dict[str, Image.Image]:
        """What learners look at, and what a few of the protocol's images find."""
        from abe.report.pictures import mask_sheet, neighbor_sheet

        select, pictures = self.splits.select, {}
        if self.model.attention_heads is not None:
            pictures["masks"] = mask_sheet(self.model.eval(), self.preprocessing, select)
        if found:
            pictures["neighbours"] = neighbor_sheet(found, select, self.splits.select_gallery)
        return pictures

    def _save(self) -> None:
        if self.ranks.first:
            self._write_checkpoint()
        self.ranks.wait()

    def _write_checkpoint(self) -> None:
        for path in (self.run / LOG, self.run):  # after a power cut, it has the checkpoint's steps
            flush(path)
        save_checkpoint(
            self.run / "checkpoints",
            step=self.step,
            config=self.config,
            preprocessing=self.preprocessing,
            weights=self.start.origin,
            best=self.best,
            model=self.model.state_dict(),
            training=training_tensors(self.optimizer, self.metric_loss),
        )
        remove_superseded(self.run, keep=self.best)
        self.tracking.saved(self.step)

    def _restore(self, checkpoint: Checkpoint) -> None:
        own, begun_with = self.start.origin, checkpoint.weights
        if (own and own["sha256"]) != (begun_with and begun_with["sha256"]):
            raise InputError(
                f"{self.config.model.weights}: not the pretrained start that {self.run} was begun "
                "with: put that back, or train a new run"
            )
        self.step, self.best = checkpoint.step, checkpoint.best
        self.preprocessing = checkpoint.preprocessing
        checkpoint.load_into(self.model)
        checkpoint.load_training_into(self.optimizer, self.metric_loss)

    def _finish(self) -> dict[str, Any]:
        selected = load_selected(self.run) if self.ranks.first else None
        name = self.ranks.from_first(selected and selected.path.name)
        selected = selected or Checkpoint.load(self.run / "checkpoints" / name)
        count = len(self.splits.test)
        self.console.print(f"Scoring {count} test images with step {selected.step} ...")
        evaluation = evaluate_test(
            selected.build_model().to(self.device),
            self.config,
            self.splits,
            self.preprocessing,
            best=self.best,
            weights=self.start.origin,
            precision=self.precision,
            ranks=self.ranks,
        )
        add_test_pick(evaluation.record, self.run, self.ranks)
        add_stretches(evaluation.record, self.run, selected.step, self.ranks)
        write_result(self.run, *evaluation, self.ranks)
        return evaluation.record

    def divergence_record(self) -> dict[str, Any]:
        """The line of a run that ended in a `DivergedError`, in place of its result."""
        record = divergence_record(
            self.config,
            step=self.step,
            data=self.splits.describe(),
            images_digest=self.splits.digest,
            weights=self.start.origin,
            environment=self._environment(),
        )
        add_stretches(record, self.run, self.step + 1, self.ranks)  # the step that it diverged at
        return record

    def _environment(self) -> dict[str, Any]:
        return environment(self.device) | {"precision": self.precision, "ranks": self.ranks.size}

    def _refuse(self, problem: str, batch: Batch) -> None:
        names = [self.splits.train.describe(int(index)) for index in batch.indices]
        raise DivergedError(
            f"{problem} at step {self.step}: lower train.lr ({self.config.train.lr}) or "
            f"look at the images of this batch: {', '.join(names)}"
        )

    def _log(self, **values: Any) -> None:
        if self.ranks.first:
            append_json_line(self.run / LOG, {"step": self.step, **values})
            self.tracking.log(self.step, values)

    def _progress(self) -> AbstractContextManager[Callable[[int, float], None]]:
        """See `step_progress`."""
        return step_progress(
            self.console,
            done=self.step,
            steps=self.config.train.steps,
            batch_size=self.config.train.batch_size,
            told=self.best is None,  # the first loss was told by itself
        )


class GateStatistics:
    """Mean and spread of a rank's attention masks in a step, parts of it computed repeatedly."""

    def __init__(self, model: AttentionEnsemble) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)  # of 1, of the masks and of their squares
        heads = model.attention_heads
        self._hook = None if heads is None else heads.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: object, masks: Tensor) -> None:
        masks = masks.detach().float()
        sums = torch.stack([masks.sum(), masks.square().sum()]).tolist()  # MPS has no float64
        self._sums += torch.tensor([masks.numel(), *sums], dtype=torch.float64)

    def read(self) -> dict[str, float]:
        """Stop watching; -> "gate_mean" and "gate_std", or nothing without attention."""
        if self._hook is None:
            return {}
        self._hook.remove()
        count, total, squares = self._sums.tolist()
        mean = total / count
        return {"gate_mean": mean, "gate_std": math.sqrt(max(squares / count - mean**2, 0))}


def _sampler(config: Config, labels: np.ndarray) -> PairBatchSampler | ClassBalancedBatchSampler:
    train = config.train
    if train.sampler == "pairs":
        return PairBatchSampler(labels, train.batch_size, config.seed)
    classes_per_batch = train.batch_size // train.images_per_class
    return ClassBalancedBatchSampler(labels, classes_per_batch, train.images_per_class, config.seed)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every layer's weight; biases and norms are left out."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }


def _update_ratios(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Length of each layer's last update over the length of its weight."""
    return {
        name.removesuffix(".weight"): float((after[name] - weight).norm() / weight.norm())
        for name, weight in before.items()
    }


def _learner_cosine(embeddings: Tensor) -> float | None:
    """Mean cosine between two learners on the same image; None for a single learner."""
    num_learners = embeddings.shape[1]
    if num_learners == 1:
        return None
    cosines = torch.einsum("ipd,iqd->ipq", embeddings, embeddings).mean(0)
    between = cosines.sum() - cosines.diagonal().sum()
    return between.item() / (num_learners * (num_learners - 1))


def _require_no_batch_statistics(model: nn.Module, ranks: Ranks, train: TrainConfig) -> None:
    """Raises InputError for a network with batch norm whose batches are embedded in parts."""
    in_parts = ranks.size > 1 or train.chunk_size is not None
    if in_parts and any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        raise InputError(
            "this backbone has batch norm, whose statistics would be those of each process's or "
            "chunk's part of a batch: use model.backbone=googlenet, or a single process without "
            "train.chunk_size"
        )
