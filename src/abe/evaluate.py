"""Embed a data set, and score the ensemble and every learner.

Shapes: N images, M learners, d the size of a learner's embedding, D = M * d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abe.checkpoint import Best
from abe.config import Config
from abe.data.datasets import LabelledImages
from abe.data.loader import evaluation_batches
from abe.data.splits import Splits
from abe.data.transforms import Preprocessing
from abe.metrics import map_at_r, nmi, r_precision, recall_at_k
from abe.model.ensemble import AttentionEnsemble, concat
from abe.results import result_record
from abe.runtime import Precision, autocast, choose_device, choose_precision, environment
from abe.start import start

KS = (1, 2, 4, 8)  # of Tables 1 to 5
Embedder = Callable[[Tensor], Tensor]  # normalised images (B, 3, H, W) -> (B, M, d)


@torch.inference_mode()
def embed(
    embedder: Embedder,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    batch_size: int = 64,
    workers: int = 0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Embed a whole data set by its centre crops; -> (N, M, d) in float32, on the CPU.

    `embedder` is a network in evaluation mode, or `raw_pixels`, or `pooled_features` of a network.
    `on_progress` is told the number of images done.
    """
    embeddings: list[Tensor] = []
    done = 0
    for batch in evaluation_batches(images, preprocessing, batch_size, workers):
        pixels = preprocessing.normalize(batch.images.to(device))
        with autocast(device, precision):
            embeddings.append(embedder(pixels).float().cpu())
        done += len(batch.labels)
        on_progress(done)
    return torch.cat(embeddings)


def evaluate_test(
    embedder: Embedder,
    config: Config,
    splits: Splits,
    preprocessing: Preprocessing,
    *,
    best: Best | None = None,
    weights: dict[str, str] | None = None,
    method: str | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """Embed and score the test images of a run.

    Args:
        embedder: as in `embed`.
        config: says device, precision and what was run.
        splits: of `config.data`, or other images to test on.
        preprocessing: what the embedder expects.
        best: the checkpoint that was picked, and by what score.
        weights: origin of the pretrained start.
        method: name of an embedder that is no trained network.

    Returns:
        The record of the result (`abe.results.result_record`), and the embeddings (N, M, d).
    """
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    embeddings = embed(
        embedder,
        splits.test,
        preprocessing,
        device=device,
        precision=precision,
        workers=config.data.workers,
    )
    record = result_record(
        config,
        scores=score(embeddings, splits.test.labels, [k for k in KS if k < len(splits.test)]),
        best=best,
        data=splits.describe(),
        weights=weights,
        environment=environment(device) | {"precision": precision},
        method=method,
    )
    return record, embeddings


def evaluate_baselines(config: Config, splits: Splits) -> dict[str, tuple[dict[str, Any], Tensor]]:
    """What trained networks are compared with: "raw pixels", and the "pretrained start" if any.

    Returns:
        By name the same as `evaluate_test`.

    Raises:
        InputError: the weights of the configuration cannot be used.
    """
    begin = start(config)
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


def score(embeddings: Tensor, labels: np.ndarray, ks: Sequence[int] = KS) -> dict[str, Any]:
    """All metrics of the ensemble and of every learner, and how alike the learners are.

    Args:
        embeddings: (N, M, d), each learner of unit length.
        labels: (N,).
        ks: the K of Recall@K.

    Returns:
        {"ensemble": metrics, "learners": [metrics, ...], "similarity": mean cosines}, fractions
        between 0 and 1; metrics are "recall@K", "map@r", "r_precision" and "nmi".
    """
    classes = torch.as_tensor(labels)
    learners = embeddings.unbind(1)
    ensemble = metrics(concat(embeddings), classes, ks)
    return {
        "ensemble": ensemble,
        "learners": [metrics(learner, classes, ks) for learner in learners]
        if len(learners) > 1
        else [ensemble],
        "similarity": similarity(embeddings, classes),
    }


def metrics(embeddings: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Recall@K, MAP@R, R-precision and NMI of (N, D) embeddings."""
    recall = {f"recall@{k}": r for k, r in recall_at_k(embeddings, labels, ks).items()}
    return recall | {
        "map@r": map_at_r(embeddings, labels),
        "r_precision": r_precision(embeddings, labels),
        "nmi": nmi(embeddings, labels),
    }


def pair_cosines(embeddings: Tensor, labels: Tensor, sample: int = 1000) -> dict[str, Tensor]:
    """Cosines of the three kinds of pairs whose histograms Fig. 5 shows.

    Args:
        embeddings: (N, M, d), each learner of unit length.
        labels: (N,).
        sample: images that the pairs are drawn from, evenly spaced: all pairs of 10^5 are too many.

    Returns:
        "positive" and "negative": pairs of images by the same learner; "self": pairs of learners
        on the same image.
    """
    rows = torch.linspace(0, len(labels) - 1, min(sample, len(labels))).long()
    embeddings, labels = embeddings[rows], labels[rows]
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


def similarity(embeddings: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Mean cosine of positive, negative and self pairs; None where there is no such pair."""
    cosines = pair_cosines(embeddings, labels)
    return {kind: values.mean().item() if len(values) else None for kind, values in cosines.items()}
