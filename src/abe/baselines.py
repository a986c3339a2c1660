"""What a trained ensemble is compared with: raw pixels, and the pretrained start as it is."""

from __future__ import annotations

from typing import Any

import torch

from abe.config import Config
from abe.data.splits import open_splits
from abe.evaluate import KS, embed, pooled_features, raw_pixels, score
from abe.model.ensemble import MHeads
from abe.model.weights import load_pretrained, read_weights
from abe.results import result_record
from abe.runtime import choose_device, choose_precision, environment
from abe.train import preprocessing_of


def evaluate_baselines(config: Config) -> list[dict[str, Any]]:
    """Score the test images of a configuration by raw pixels and, if it has one, by its start.

    Returns:
        Records like those of trained runs; their methods are "raw pixels" and "pretrained start".

    Raises:
        InputError: the data or the weights of the configuration cannot be used.
    """
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    splits = open_splits(config.data, config.protocol)
    weights = read_weights(config.model.weights) if config.model.weights else None
    embedders = {"raw pixels": raw_pixels}
    if weights is not None:
        torch.manual_seed(config.seed)
        model = MHeads(1, 1, config.model.backbone)
        load_pretrained(model.backbone_parts(), weights)
        embedders["pretrained start"] = pooled_features(model.to(device).eval())
    return [
        result_record(
            config,
            method=method,
            scores=score(
                embed(
                    embedder,
                    splits.test,
                    preprocessing_of(config, weights),
                    device=device,
                    precision=precision,
                    workers=config.data.workers,
                ),
                splits.test.labels,
                [k for k in KS if k < len(splits.test)],
            ),
            best=None,
            data=splits.describe(),
            weights=weights and {"source": weights.source, "sha256": weights.sha256},
            environment=environment(device) | {"precision": precision},
        )
        for method, embedder in embedders.items()
    ]
