"""What a network looks at and what it finds, as pictures for the report and for trackers.

Shapes: B images, M learners, K channels of the masks, h x w their size, N images in a data set, G
in their gallery, D the size of an ensemble's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from abe.data.datasets import LabelledImages
from abe.data.loader import evaluation_batches
from abe.data.transforms import Preprocessing
from abe.metrics import have_match
from abe.model.ensemble import AttentionEnsemble
from abe.neighbors import nearest_neighbors
from abe.ranks import Ranks, share
from abe.report import figures
from abe.shards import Shards

THUMBNAIL = 128  # pixels
MASKED, QUERIES, RESULTS = 4, 6, 5  # images with masks; queries, and the results of each
FRAME = 6  # pixels
RIGHT, WRONG, NO_VERDICT = "#12943c", "#d02020", "white"


def mask_sheet(
    model: AttentionEnsemble, preprocessing: Preprocessing, images: LabelledImages
) -> Image.Image:
    """Fig. 6 of a few images, the same ones each time: a row is an image and its mean masks.

    Args:
        model: with attention, in evaluation mode.
        preprocessing: what it expects.
        images: to choose from.
    """
    chosen = spread(np.arange(len(images)), MASKED)
    crops, masks = seen(model, preprocessing, images, chosen)
    means = masks.mean(2)
    return figures.sheet(
        [
            [_thumbnail(Image.fromarray(crop)), *map(_thumbnail, figures.overlays(crop, of_image))]
            for crop, of_image in zip(crops, means, strict=True)
        ]
    )


def some_neighbors(
    images: LabelledImages,
    embeddings: Tensor,
    gallery: LabelledImages | None = None,
    gallery_embeddings: Tensor | None = None,
    ranks: Ranks | None = None,
) -> dict[int, list[int]]:
    """What a few images find, the same ones each time: query -> its nearest images.

    Args:
        images: to choose queries from.
        embeddings: of `images`, (N, D), of several ranks this one's.
        gallery: what is searched; None: the other images.
        gallery_embeddings: of `gallery`, (G, D), of several ranks this one's.
        ranks: the processes; None for one by itself.

    Returns:
        Nothing where no image has another of its class to be found.
    """
    matched = have_match(images.labels, None if gallery is None else gallery.labels)
    queries = spread(np.flatnonzero(matched), QUERIES)
    if not queries:
        return {}
    found = nearest_others(embeddings, gallery_embeddings, queries, RESULTS, ranks)
    return dict(zip(queries, found, strict=True))


def neighbor_sheet(
    found: Mapping[int, list[int]], images: LabelledImages, gallery: LabelledImages | None = None
) -> Image.Image:
    """A row for each query, and behind it what it found, framed green where right, else red.

    Args:
        found: query -> its nearest images.
        images: that the queries are of.
        gallery: that was searched; None: the other images.
    """
    candidates = images if gallery is None else gallery

    def framed(of: LabelledImages, index: int, colour: str) -> Image.Image:
        return ImageOps.expand(_thumbnail(of.load(index), THUMBNAIL - 2 * FRAME), FRAME, colour)

    return figures.sheet(
        [
            [
                framed(images, query, NO_VERDICT),
                *(
                    framed(
                        candidates,
                        index,
                        RIGHT if candidates.labels[index] == images.labels[query] else WRONG,
                    )
                    for index in indices
                ),
            ]
            for query, indices in found.items()
        ]
    )


@torch.inference_mode()
def seen(
    model: AttentionEnsemble,
    preprocessing: Preprocessing,
    images: LabelledImages,
    indices: list[int],
) -> tuple[NDArray[np.uint8], Tensor]:
    """Centre crops as the network sees them, (B, H, W, 3), and its masks (B, M, K, h, w).

    Args:
        model: with attention, in evaluation mode.
        preprocessing: what it expects.
        images: the data set.
        indices: B images of it.
    """
    (batch,) = evaluation_batches(images.select(np.array(indices)), preprocessing, len(indices))
    device = next(model.parameters()).device
    masks = model.attention_masks(preprocessing.normalize(batch.images.to(device)))
    return batch.images.permute(0, 2, 3, 1).contiguous().numpy(), masks.cpu()


def nearest_others(
    embeddings: Tensor,
    gallery: Tensor | None,
    queries: list[int],
    count: int,
    ranks: Ranks | None = None,
) -> list[list[int]]:
    """The nearest of the gallery for each query, nearest first; `count` of them, or all.

    Without a gallery the nearest other images, where the query is left out by index.

    Args:
        embeddings: (N, D), of several ranks this one's.
        gallery: (G, D), of several ranks this one's; or None.
        queries: indices of embeddings.
        count: how many are wanted.
        ranks: the processes; None for one by itself.
    """
    chosen = Shards(embeddings, ranks).select(torch.tensor(queries))
    own = chosen[share(len(chosen), (0, 1) if ranks is None else ranks.part)]
    candidates = embeddings if gallery is None else gallery
    k = min(count + (gallery is None), len(Shards(candidates, ranks)))
    found = nearest_neighbors(own, candidates, k, ranks=ranks).indices.tolist()
    if gallery is not None:
        return found
    return [
        [index for index in indices if index != query][:count]
        for query, indices in zip(queries, found, strict=True)
    ]


def spread(indices: NDArray[np.intp], count: int) -> list[int]:
    """`count` of the indices, or all, at even distances."""
    count = min(count, len(indices))
    places = (np.arange(count) + 0.5) * len(indices) / max(count, 1)
    return indices[places.astype(int)].tolist()


def _thumbnail(picture: Image.Image, side: int = THUMBNAIL) -> Image.Image:
    return ImageOps.fit(picture, (side, side))
