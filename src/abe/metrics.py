"""Retrieval and clustering metrics of embeddings.

Nearest means smallest Euclidean distance between rows as they are: nothing is normalised. For
rows of unit length, such as `concat` gives, that is the order of the inner product as well.

Queries are compared with a gallery, or among themselves, where each leaves itself out by index.
Queries that no other image matches cannot be answered: they are left out of the mean, and a
warning counts them. Equal distances are ordered by gallery index. Recall@K is exact, see
`abe.ranking`; what looks at R neighbours takes their distances as float32 gives them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abe.errors import InputError
from abe.neighbors import nearest_neighbors
from abe.ranking import match_ranks

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
    wanted = _checked_ks(ks)
    return _recall(_retrieval(query, query_labels, gallery, gallery_labels), wanted)


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
    return _r_precision(*_matches(_retrieval(query, query_labels, gallery, gallery_labels)))


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
    return _map_at_r(*_matches(_retrieval(query, query_labels, gallery, gallery_labels)))


def retrieval_metrics(
    query: Array,
    query_labels: Array,
    ks: Iterable[int],
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
) -> dict[str, float]:
    """Recall@K, MAP@R and R-precision with one search less than one by one.

    Arguments and errors are those of `recall_at_k`.

    Returns:
        "recall@K" for each K, "map@r" and "r_precision".
    """
    wanted = _checked_ks(ks)
    retrieval = _retrieval(query, query_labels, gallery, gallery_labels)
    found = {f"recall@{k}": share for k, share in _recall(retrieval, wanted).items()}
    matches, relevant = _matches(retrieval)
    return found | {
        "map@r": _map_at_r(matches, relevant),
        "r_precision": _r_precision(matches, relevant),
    }


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


class _Retrieval(NamedTuple):
    """Who is looked for where."""

    query: Tensor
    """(Q, D)."""
    query_classes: Tensor
    """(Q,), from 0."""
    gallery: Tensor | None
    """(N, D)."""
    item_classes: Tensor
    """(N,); the queries' without a gallery."""
    relevant: Tensor
    """(Q,), R: how many gallery items match."""


def _retrieval(
    query: Array,
    query_labels: Array,
    gallery: Array | None,
    gallery_labels: Array | None,
) -> _Retrieval:
    """Check, number the classes, and warn the caller's caller of queries without a match."""
    if (gallery is None) != (gallery_labels is None):
        raise InputError("gallery and gallery_labels: give both or neither")
    query, query_labels = _checked(query, query_labels, "query")
    items, item_labels = None, query_labels
    if gallery is not None and gallery_labels is not None:
        items, item_labels = _checked(gallery, gallery_labels, "gallery")

    names, inverse = np.unique(np.concatenate([query_labels, item_labels]), return_inverse=True)
    classes = torch.as_tensor(inverse, device=query.device)
    query_classes, item_classes = classes.split([len(query_labels), len(item_labels)])
    class_sizes = item_classes.bincount(minlength=len(names))
    relevant = class_sizes[query_classes] - int(gallery is None)
    num_left_out = int((relevant == 0).sum())
    if num_left_out == len(query):
        raise InputError(f"none of the {len(query)} queries has its label in the gallery")
    if num_left_out:
        warnings.warn(
            f"{num_left_out} of {len(query)} queries have no other image of their label: "
            "they are left out of the mean",
            stacklevel=3,
        )
    return _Retrieval(query, query_classes, items, item_classes, relevant)


def _recall(retrieval: _Retrieval, ks: Sequence[int]) -> dict[int, float]:
    query, query_classes, gallery, item_classes, relevant = retrieval
    ranks = match_ranks(query, query_classes, gallery, item_classes, max(ks))[relevant > 0]
    return {k: (ranks < k).double().mean().item() for k in ks}


def _matches(retrieval: _Retrieval) -> tuple[Tensor, Tensor]:
    """Which of its R nearest have the query's label, for the queries that have a match.

    Returns:
        matches (Q', largest R), nearest first, and R (Q',) in float64. Beyond a query's own R
        matches are False.
    """
    query, query_classes, gallery, item_classes, relevant = retrieval
    depth = int(relevant.max())
    indices = nearest_neighbors(query, gallery, depth, similarity="euclidean").indices
    matches = item_classes[indices] == query_classes.unsqueeze(1)
    matches &= torch.arange(depth, device=matches.device) < relevant.unsqueeze(1)
    return matches[relevant > 0], relevant[relevant > 0].double()


def _r_precision(matches: Tensor, relevant: Tensor) -> float:
    return (matches.sum(1) / relevant).mean().item()


def _map_at_r(matches: Tensor, relevant: Tensor) -> float:
    ranks = torch.arange(1, matches.shape[1] + 1, device=matches.device)
    precision = matches.cumsum(1) / ranks.double()
    return ((precision * matches).sum(1) / relevant).mean().item()


def _checked_ks(ks: Iterable[int]) -> list[int]:
    wanted = list(ks) if isinstance(ks, Iterable) else []
    if not wanted or not all(isinstance(k, int | np.integer) and k >= 1 for k in wanted):
        raise InputError(f"ks={ks}: give at least one K, each 1 or more, as in [1, 2, 4, 8]")
    return wanted


def _checked(embeddings: Array, labels: Array, name: str) -> tuple[Tensor, NDArray[Any]]:
    embeddings = torch.as_tensor(embeddings)
    labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if embeddings.ndim != 2 or 0 in embeddings.shape or labels.shape != (len(embeddings),):
        raise InputError(
            f"{name} and its labels have shapes {tuple(embeddings.shape)} and "
            f"{tuple(labels.shape)}: expected (images, size) and (images,), none of them 0"
        )
    return embeddings, labels
