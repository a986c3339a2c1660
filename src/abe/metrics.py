"""Retrieval and clustering metrics of embeddings.

Nearest means smallest Euclidean distance between rows as they are: nothing is normalised. For
rows of unit length, such as `concat` gives, that is the order of the inner product as well.

Queries are compared with a gallery, or among themselves, where each leaves itself out by index.
Queries that no other image matches cannot be answered: they are left out of the mean, and a
warning counts them. Equal distances are ordered by gallery index.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abe.errors import InputError
from abe.neighbors import nearest_neighbors

Array = Tensor | NDArray[Any]  # labels may be of any kind that can be sorted: numbers, strings
KS = (1, 2, 4, 8)  # of Tables 1 to 5


def recall_at_k(
    query: Array,
    query_labels: Array,
    ks: Iterable[int],
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
) -> dict[int, float]:
    """Recall@K of the field: how many queries have their label among their K nearest.

    Not information retrieval's recall: one right neighbour counts as much as K.

    Args:
        query: embeddings (Q, D).
        query_labels: (Q,).
        ks: the values of K.
        gallery: embeddings (N, D); the queries themselves if None.
        gallery_labels: (N,), given with a gallery.

    Returns:
        For each K a fraction between 0 and 1, over the queries that have a match.

    Raises:
        InputError: a K below 1 or above the number of candidates, no list of Ks or an empty one, no
            query with a match, no images, shapes that do not fit, embeddings that are not finite.
    """
    wanted = list(ks) if isinstance(ks, Iterable) else []
    if not wanted or not all(isinstance(k, int | np.integer) and k >= 1 for k in wanted):
        raise InputError(f"ks={ks}: give at least one K, each 1 or more, as in [1, 2, 4, 8]")
    matches, _ = _matches(query, query_labels, gallery, gallery_labels, max(wanted))
    return {k: matches[:, :k].any(1).double().mean().item() for k in wanted}


def r_precision(
    query: Array,
    query_labels: Array,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
) -> float:
    """R-precision: the right ones among a query's R nearest, where R images match it.

    From Musgrave et al., "A metric learning reality check", 2020, section 3.2. Arguments and
    errors are those of `recall_at_k`.

    Returns:
        The mean over the queries that have a match, between 0 and 1.
    """
    matches, relevant = _matches(query, query_labels, gallery, gallery_labels)
    return (matches.sum(1) / relevant).mean().item()


def map_at_r(
    query: Array,
    query_labels: Array,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
) -> float:
    """MAP@R: mean average precision over a query's R nearest, where R images match it.

    The precision among the first i of them, summed over the ranks i that are right and divided by
    R: like R-precision, but early ranks count more. From Musgrave et al., "A metric learning
    reality check", 2020, section 3.2. Arguments and errors are those of `recall_at_k`.

    Returns:
        The mean over the queries that have a match, between 0 and 1.
    """
    matches, relevant = _matches(query, query_labels, gallery, gallery_labels)
    ranks = torch.arange(1, matches.shape[1] + 1, device=matches.device)
    precision = matches.cumsum(1) / ranks.double()
    return ((precision * matches).sum(1) / relevant).mean().item()


def nmi(embeddings: Array, labels: Array, seed: int = 0) -> float:
    """Normalised mutual information between labels and k-means clusters, one for each class.

    2 I / (H(clusters) + H(classes)), between 0 and 1. k-means is Lloyd's, over all images at once
    and from one k-means++ start: mini-batches end in worse clusters, and scores points lower.

    Args:
        embeddings: (N, D).
        labels: (N,).
        seed: of k-means; the same seed gives the same clusters.

    Raises:
        InputError: no images, shapes that do not fit, embeddings that are not finite.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    embeddings, labels = _checked(embeddings, labels, "embeddings")
    if not embeddings.isfinite().all():
        raise InputError("embeddings are not finite")
    kmeans = KMeans(n_clusters=len(np.unique(labels)), n_init=1, random_state=seed)
    clusters = kmeans.fit_predict(embeddings.detach().float().cpu().numpy())
    return float(normalized_mutual_info_score(labels, clusters))


def _matches(
    query: Array,
    query_labels: Array,
    gallery: Array | None,
    gallery_labels: Array | None,
    k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Which neighbours have the query's label, for the queries that have a match.

    Returns:
        matches (Q', k), nearest first, and R (Q',), how many gallery items match, in float64.
        Without k it is the largest R, and a query's matches beyond its own R are False.
    """
    if (gallery is None) != (gallery_labels is None):
        raise InputError("gallery and gallery_labels: give both or neither")
    query, query_labels = _checked(query, query_labels, "query")
    items, item_labels = query, query_labels
    if gallery is not None and gallery_labels is not None:
        items, item_labels = _checked(gallery, gallery_labels, "gallery")

    names, inverse = np.unique(np.concatenate([query_labels, item_labels]), return_inverse=True)
    classes = torch.as_tensor(inverse, device=query.device)
    query_classes, item_classes = classes.split([len(query), len(items)])
    class_sizes = item_classes.bincount(minlength=len(names))
    relevant = class_sizes[query_classes] - int(gallery is None)  # (Q,)
    answerable = relevant > 0
    num_left_out = int((~answerable).sum())
    if num_left_out == len(query):
        raise InputError(f"none of the {len(query)} queries has its label in the gallery")
    if num_left_out:
        warnings.warn(
            f"{num_left_out} of {len(query)} queries have no other image of their label: "
            "they are left out of the mean",
            stacklevel=3,
        )

    depth = int(relevant.max()) if k is None else k
    indices = nearest_neighbors(
        query, None if gallery is None else items, depth, similarity="euclidean"
    ).indices
    matches = (item_classes[indices] == query_classes.unsqueeze(1))[answerable]
    relevant = relevant[answerable]
    if k is None:
        matches &= torch.arange(depth, device=matches.device) < relevant.unsqueeze(1)
    return matches, relevant.double()


def _checked(embeddings: Array, labels: Array, name: str) -> tuple[Tensor, NDArray[Any]]:
    embeddings = torch.as_tensor(embeddings)
    labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if embeddings.ndim != 2 or 0 in embeddings.shape or labels.shape != (len(embeddings),):
        raise InputError(
            f"{name} and its labels have shapes {tuple(embeddings.shape)} and "
            f"{tuple(labels.shape)}: expected (images, size) and (images,), none of them 0"
        )
    return embeddings, labels
