"""Embed a data set, and score the ensemble and every learner; of a run, again and on other images.

Shapes: N images, M learners, d the size of a learner's embedding, D = M * d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from abe.checkpoint import Best, Checkpoint, load_latest, load_selected
from abe.config import Config, DataConfig, Protocol
from abe.data.datasets import LabelledImages, Source
from abe.data.loader import evaluation_batches
from abe.data.splits import Splits, open_images, open_splits, split_images, unseen
from abe.data.transforms import Preprocessing
from abe.errors import InputError
from abe.files import read_json
from abe.intervals import pack, pack_classes
from abe.metrics import KS, have_match, nmi, retrieval_metrics
from abe.model.ensemble import AttentionEnsemble, concat
from abe.ranks import Part, Ranks, share
from abe.results import method_name, result_record
from abe.run_folder import (
    add_stretches,
    add_test_pick,
    checkpoint_of_first,
    read_images,
    recorded_precision,
    require_same_images,
)
from abe.runtime import Precision, autocast, choose_device, choose_precision, environment, typed
from abe.shards import Shards
from abe.start import start

NMI_CLASSES = 1000  # at most
Embedder = Callable[[Tensor], Tensor]  # normalised images (B, 3, H, W) -> (B, M, d)


class Evaluation(NamedTuple):
    """The result of a run on its N test images, and G gallery images if they have a gallery.

    Of several ranks each has the embeddings of its own share of the images.
    """

    record: dict[str, Any]
    """See `abe.results.result_record`."""
    embeddings: Tensor
    """(N, M, d)."""
    gallery: Tensor | None
    """(G, M, d)."""


@torch.inference_mode()
def embed(
    embedder: Embedder,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    device: torch.device | str,
    precision: Precision = "fp32",
    batch_size: int = 64,
    workers: int = 0,
    part: Part = (0, 1),
    on_progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Embed a whole data set by its centre crops; -> (N, M, d) in float32, on the CPU.

    `embedder` is a network in evaluation mode, or `raw_pixels`, or `pooled_features` of a network.
    `part` (r, n) embeds part r of n of the batches, to the bit as the whole would have it; where
    there are fewer batches than parts, some are (0, 0, 0).
    `on_progress` is told the number of images done.
    """
    device = torch.device(device)
    batches = share(-(-len(images) // batch_size), part)
    rows = range(len(images))[batches.start * batch_size : batches.stop * batch_size]
    embeddings = torch.empty(0, 0, 0)
    done = 0
    pin_memory = device.type == "cuda"
    for batch in evaluation_batches(images, preprocessing, batch_size, workers, pin_memory, part):
        pixels = preprocessing.normalize(batch.images.to(device, non_blocking=True))
        with autocast(device, precision):
            found = embedder(pixels)
        if not done:  # all of it at once: lists of parts take twice the memory
            embeddings = torch.empty(len(rows), *found.shape[1:])
        embeddings[done : done + len(found)] = found
        done += len(found)
        on_progress(done)
    return embeddings


def embed_share(
    embedder: Embedder,
    images: LabelledImages,
    preprocessing: Preprocessing,
    ranks: Ranks,
    *,
    precision: Precision,
    workers: int = 0,
) -> Tensor:
    """A rank's part of what `embed` makes of a data set; (own, M, d), which may be no rows."""
    own = embed(
        embedder,
        images,
        preprocessing,
        device=ranks.device,
        precision=precision,
        workers=workers,
        part=ranks.part,
    )
    return Shards(own, ranks).own


def evaluate_test(
    embedder: Embedder,
    config: Config,
    splits: Splits,
    preprocessing: Preprocessing,
    *,
    best: Best | None = None,
    weights: dict[str, str] | None = None,
    method: str | None = None,
    facts: dict[str, Any] | None = None,
    precision: Precision | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Embed and score the test images of a run, against their gallery or among themselves.

    Each rank embeds its share of them, and all score together: the scores are those of one process.

    Args:
        embedder: as in `embed`.
        config: says device, precision and what was run.
        splits: of `config.data`, or other images to test on.
        preprocessing: what the embedder expects.
        best: the checkpoint that was picked, and by what score.
        weights: origin of the pretrained start.
        method: name of an embedder that is no trained network.
        facts: what the record says of the data, if not `splits.describe()`.
        precision: if not as `config` says.
        ranks: the processes that take part, and the device, if not as `config` says.
    """
    ranks = ranks or Ranks(config.device, config.ranks_timeout)
    device = ranks.device
    precision = precision or ranks.from_first(choose_precision(config.precision, device))

    def embedded(images: LabelledImages) -> Tensor:
        workers = config.data.workers
        return embed_share(
            embedder, images, preprocessing, ranks, precision=precision, workers=workers
        )

    embeddings = embedded(splits.test)
    gallery = None if splits.gallery is None else embedded(splits.gallery)
    if splits.gallery is None:
        gallery_labels, candidates = None, len(splits.test) - 1
    else:
        gallery_labels, candidates = splits.gallery.labels, len(splits.gallery)
    ks = [k for k in splits.ks if k <= candidates]
    scores = score(embeddings, splits.test.labels, ks, gallery, gallery_labels, ranks)
    answered = splits.test.labels[have_match(splits.test.labels, gallery_labels)]
    scores["hits@1"] |= {"order": splits.test_order, "classes": pack_classes(answered)}
    record = result_record(
        config,
        scores=scores,
        best=best,
        data=facts or splits.describe(),
        images_digest=splits.digest,
        weights=weights,
        environment=environment(device) | {"precision": precision, "ranks": ranks.size},
        method=method,
    )
    return Evaluation(ranks.from_first(record), embeddings, gallery)


def evaluate_baselines(config: Config, splits: Splits) -> dict[str, Evaluation]:
    """What trained networks are compared with: "raw pixels", and the "pretrained start" if any.

    Returns:
        By name the same as `evaluate_test`.

    Raises:
        InputError: the weights of the configuration cannot be used.
    """
    begin = start(config, apart=False)
    model = begin.model.to(choose_device(config.device)).eval()
    embedders: dict[str, Embedder] = {"raw pixels": raw_pixels}
    if begin.origin is not None:
        embedders["pretrained start"] = pooled_features(model)
    return {
        name: evaluate_test(
            embedder,
            config,
            splits,
            begin.preprocessing,
            weights=None if embedder is raw_pixels else begin.origin,
            method=name,
        )
        for name, embedder in embedders.items()
    }


def raw_pixels(images: Tensor, side: int = 32) -> Tensor:
    """The baseline without a network: the image at `side` x `side`; -> (B, 1, 3 * side * side)."""
    return F.normalize(F.adaptive_avg_pool2d(images.float(), side).flatten(1), dim=1).unsqueeze(1)


def pooled_features(model: AttentionEnsemble) -> Embedder:
    """The network's features before its linear layer, without attention; -> (B, 1, C).

    What a pretrained start knows before any metric learning.
    """
    spatial, *_ = model.spatial
    before_linear = nn.Sequential(*list(model.embedding[0].children())[:-1])
    return lambda images: F.normalize(before_linear(spatial(images)).float(), dim=1).unsqueeze(1)


def score(
    embeddings: Tensor,
    labels: np.ndarray,
    ks: Sequence[int] = KS,
    gallery: Tensor | None = None,
    gallery_labels: np.ndarray | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """All metrics of the ensemble and of every learner, and how alike the learners are.

    Args:
        embeddings: (N, M, d), each learner of unit length; of several ranks this one's.
        labels: (N,).
        ks: the K of Recall@K.
        gallery: (G, M, d), what the images are compared with, of several ranks this one's; None:
            with each other.
        gallery_labels: (G,), given with a gallery.
        ranks: the processes; None for one by itself.

    Returns:
        {"ensemble": metrics, "learners": [metrics, ...], "similarity": mean cosines, "hits@1": of
        the ensemble's queries}, see `metrics`, `similarity` and `abe.intervals.pack`. Of several
        learners each has its own "hits@1" among its metrics.
    """

    def alone(learner: Tensor, own_gallery: Tensor | None) -> dict[str, Any]:
        found, hits = metrics(learner, classes, ks, own_gallery, gallery_labels, ranks)
        return found | {"hits@1": pack(hits)}

    classes = torch.as_tensor(labels)
    learners = embeddings.unbind(1)
    galleries = [None] * len(learners) if gallery is None else gallery.unbind(1)
    whole = None if gallery is None else concat(gallery)
    ensemble, hits = metrics(concat(embeddings), classes, ks, whole, gallery_labels, ranks)
    return {
        "ensemble": ensemble,
        "learners": list(map(alone, learners, galleries)) if len(learners) > 1 else [ensemble],
        "similarity": similarity(embeddings, classes, ranks),
        "hits@1": pack(hits),
    }


def metrics(
    embeddings: Tensor,
    labels: Tensor,
    ks: Sequence[int] = KS,
    gallery: Tensor | None = None,
    gallery_labels: np.ndarray | None = None,
    ranks: Ranks | None = None,
) -> tuple[dict[str, float], NDArray[np.bool_]]:
    """Scores of (N, D) embeddings, against a gallery (G, D) or among themselves.

    Returns:
        "recall@K", "map@r" and "r_precision"; and "nmi", unless there is a gallery, of which it
        knows nothing, or more than 1,000 classes, whose k-means would take hours. Fractions. Of
        several ranks the first one clusters all embeddings, and it alone has "nmi". And the
        queries' hits, see `retrieval_metrics`.
    """
    found, hits = retrieval_metrics(embeddings, labels, ks, gallery, gallery_labels, ranks=ranks)
    if gallery is None and len(labels.unique()) <= NMI_CLASSES:
        parts = list(Shards(embeddings, ranks).parts())
        if parts:
            found["nmi"] = nmi(torch.cat(parts), labels)
    return found, hits


def pair_cosines(
    embeddings: Tensor, labels: Tensor, sample: int = 1000, ranks: Ranks | None = None
) -> dict[str, Tensor]:
    """Cosines of the three kinds of pairs whose histograms Fig. 5 shows.

    Args:
        embeddings: (N, M, d), each learner of unit length; of several ranks this one's.
        labels: (N,).
        sample: images that the pairs are drawn from, of whole classes: all pairs of 10^5 images are
            too many, and single images of small classes have no positive pair.
        ranks: the processes; None for one by itself.

    Returns:
        "positive" and "negative": pairs of images by the same learner; "self": pairs of learners
        on the same image.
    """
    rows = _whole_classes(labels, sample)
    embeddings, labels = Shards(embeddings, ranks).select(rows), labels[rows]
    between_images = torch.einsum("imd,jmd->ijm", embeddings, embeddings)
    between_learners = torch.einsum("ipd,iqd->ipq", embeddings, embeddings)
    same = labels[:, None] == labels[None, :]
    other_image = ~torch.eye(len(labels), dtype=torch.bool)
    other_learner = ~torch.eye(embeddings.shape[1], dtype=torch.bool)
    return {
        "positive": between_images[same & other_image].flatten(),
        "negative": between_images[~same].flatten(),
        "self": between_learners[:, other_learner].flatten(),
    }


def _whole_classes(labels: Tensor, sample: int) -> Tensor:
    """Indices of at most `sample` images: classes in a fixed random order, until it is reached.

    Of large classes a part, so that there are 50 of them, or all if they are fewer.
    """
    if len(labels) <= sample:
        return torch.arange(len(labels))
    _, of_image, sizes = labels.unique(return_inverse=True, return_counts=True)
    by_class = of_image.argsort(stable=True)
    place = torch.empty_like(by_class)  # of an image in its class
    place[by_class] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[of_image[by_class]]
    rows = (place < max(2, sample // min(len(sizes), 50))).nonzero().flatten()
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0))
    return rows[order[of_image[rows]].argsort(stable=True)][:sample].sort().values


def similarity(
    embeddings: Tensor, labels: Tensor, ranks: Ranks | None = None
) -> dict[str, float | None]:
    """Mean cosine of positive, negative and self pairs; None where there is no such pair."""
    cosines = pair_cosines(embeddings, labels, ranks=ranks)
    return {kind: values.mean().item() if len(values) else None for kind, values in cosines.items()}


def evaluate_run(
    path: Path,
    data: str | None = None,
    root: str | None = None,
    allow_partial: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Score a run's selected checkpoint, or a checkpoint folder, on its test images.

    Args:
        path: the run or the checkpoint.
        data: other images to test on; None for the run's own. Of those that are not split
            themselves all classes are tested that the run has not learned, by their names, or if
            there are fewer than 2 such, half of all, with a stamp; the run's own, in another
            place, are split as they were.
        root: where a benchmark was unpacked; None, without `data`, for where the run found it.
        allow_partial: go on with a part of a benchmark, given `data` or `root`; of the run's own
            images there may be as many as it was trained with.
        device: another than the run's.

    Returns:
        The record of the result (see `abe.results`).

    Raises:
        InputError: the checkpoint or the data cannot be used.
    """
    checkpoint = load_selected(path)
    config = checkpoint.config.on_device(device)
    ranks = Ranks(config.device, config.ranks_timeout)
    checkpoint = checkpoint_of_first(ranks, checkpoint)
    run = path if checkpoint.path != path else path.parent.parent
    precision: Precision | None = None
    if config.precision == "auto":
        found = recorded_precision(run, ranks.device)
        precision = None if found == "auto" else found
    model = checkpoint.build_model().to(ranks.device)
    if data is None and root is None:
        splits, facts = _open_own_images(path, config, ranks), None
    else:
        changed: dict[str, Any] = {"source": data or config.data.source, "root": root}
        if allow_partial:
            changed["allow_partial"] = True
        own = read_images(path)
        other = config.data.model_copy(update=changed)
        splits = _split_other_images(
            open_images(other, check=ranks.first_here), other, config.protocol, own
        )
        facts = _facts_of_other_images(splits, own)
    ranks.require_same(images=splits.digest)
    method = ranks.from_first(_method(path, checkpoint))
    record = evaluate_test(
        model,
        config,
        splits,
        checkpoint.preprocessing,
        best=checkpoint.best,
        weights=checkpoint.weights,
        method=method,
        facts=facts,
        precision=precision,
        ranks=ranks,
    ).record
    add_stretches(record, run, checkpoint.step, ranks)
    if facts is None and method is None:
        add_test_pick(record, run, ranks)
    return record


def _method(path: Path, checkpoint: Checkpoint) -> str | None:
    """What to call a checkpoint that is not the one its whole run selected; None for that one."""
    if checkpoint.path != path:
        whole = load_latest(path).step == checkpoint.config.train.steps
    else:
        result = path.parent.parent / "result.json"
        whole = result.exists() and read_json(result).get("selected_step") == checkpoint.step
    return None if whole else f"{method_name(checkpoint.config)} at step {checkpoint.step}"


def _open_own_images(path: Path, config: Config, ranks: Ranks) -> Splits:
    try:
        splits = open_splits(config.data, config.protocol, check=ranks.first_here)
        require_same_images(path, splits)
    except InputError as error:
        raise InputError(
            f"the images of {path} cannot be opened: {error}; images that are elsewhere now are "
            f"named behind it, as in `{typed('eval', path, 'DATA')}`"
        ) from None
    return splits


def _split_other_images(
    source: Source, data: DataConfig, protocol: Protocol, own: dict[str, Any] | None
) -> Splits:
    """As `evaluate_run` says; where it is not known what the run learned, as its own were.

    Args:
        source: images that may be the run's own.
        data: their configuration.
        protocol: of the run.
        own: images.json of the run; None if it is not known.
    """
    if own is None:
        return split_images(source, data, protocol)
    others = unseen(source, set(own["learned_classes"])) if source.split is None else None
    try:
        # Nothing is selected: no class has to be held out for it.
        splits = split_images(source, data, "paper")
    except InputError:
        if others is None:
            raise
        return others
    return splits if others is None or splits.digest == own["digest"] else others


def _facts_of_other_images(splits: Splits, own: dict[str, Any] | None) -> dict[str, Any]:
    """What a record says of images that a run was tested on, but perhaps not trained on.

    Args:
        splits: of the images that are tested.
        own: images.json of the run; None if it is not known.
    """
    facts = splits.describe()
    if own is None:
        return facts | {"trained_on": "images that are not known"}
    if (own["digest"], own["data"]["name"]) == (splits.digest, splits.name):
        return own["data"]  # the run's own, in another place
    learned = {key: n for key, n in own["data"].items() if key.startswith(("train_", "select_"))}
    tested = {splits.test.class_names[label] for label in np.unique(splits.test.labels)}
    if seen := tested & set(own["learned_classes"]):
        stamp = f"{len(seen)} of {len(tested)} test classes were learned from"
        facts["stamps"] = [*facts.get("stamps", []), stamp]
    return facts | learned | {"trained_on": own["data"]["name"]}
