"""Retrieval and clustering metrics of embeddings.

Nearest means smallest Euclidean distance between rows as they are: nothing is normalised. For
rows of unit length, such as `concat` gives, that is the order of the inner product as well.

Queries are compared with a gallery, or among themselves, where each leaves itself out by index.
Queries that no other image matches cannot be answered: they are left out of the mean, which the
paper takes over the whole test set (section 5), and a warning counts them; its data have none.
Distances are those that `abe.distances` defines, and equal ones are ordered by gallery index: the
order is exact, whatever the products are computed in.

Several ranks can hold the images together. Each gives its own embeddings and the labels of all, and
receives what one process computes, to the bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abe.errors import InputError
from abe.neighbors import neighbors_by_block
from abe.ranking import match_ranks
from abe.ranks import Ranks
from abe.shards import Shards

Array = Tensor | NDArray[Any]  # labels may be of any kind that can be sorted: numbers, strings
KS = (1, 2, 4, 8)  # of Tables 1 to 5


def recall_at_k(
    query: Array,
    query_labels: Array,
    ks: Iterable[int],
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    *,
    ranks: Ranks | None = None,
) -> dict[int, float]:
    """Recall@K of the field: how many queries have their label among their K nearest.

    Not information retrieval's recall: one right neighbour counts as much as K.

    Args:
        query: embeddings (Q, D), of several ranks this one's.
        query_labels: of all of them, (Q,).
        ks: the values of K.
        gallery: embeddings (N, D), of several ranks this one's; the queries themselves if None.
        gallery_labels: of all of them, (N,), given with a gallery.
        ranks: the processes; None for one by itself.

    Returns:
        For each K a fraction between 0 and 1, over the queries that have a match.

    Raises:
        InputError: a K below 1 or above the number of candidates, no list of Ks or an empty one, no
            query with a match, no images, shapes that do not fit, embeddings that are not finite.
    """
    wanted = _checked_ks(ks)
    found = _ranks_of_matches(
        _retrieval(query, query_labels, gallery, gallery_labels, ranks), max(wanted)
    )
    return _recall(found, wanted)


def r_precision(
    query: Array,
    query_labels: Array,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    *,
    ranks: Ranks | None = None,
) -> float:
    """R-precision: the right ones among a query's R nearest, where R images match it.

    From Musgrave et al., "A metric learning reality check", 2020, section 3.2. Arguments and
    errors are those of `recall_at_k`.

    Returns:
        The mean over the queries that have a match, between 0 and 1.
    """
    retrieval = _retrieval(query, query_labels, gallery, gallery_labels, ranks)
    return _precisions(retrieval)["r_precision"]


def map_at_r(
    query: Array,
    query_labels: Array,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    *,
    ranks: Ranks | None = None,
) -> float:
    """MAP@R: mean average precision over a query's R nearest, where R images match it.

    The precision among the first i of them, summed over the ranks i that are right and divided by
    R: like R-precision, but early ranks count more. From Musgrave et al., "A metric learning
    reality check", 2020, section 3.2. Arguments and errors are those of `recall_at_k`.

    Returns:
        The mean over the queries that have a match, between 0 and 1.
    """
    return _precisions(_retrieval(query, query_labels, gallery, gallery_labels, ranks))["map@r"]


def retrieval_metrics(
    query: Array,
    query_labels: Array,
    ks: Iterable[int],
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    *,
    ranks: Ranks | None = None,
) -> tuple[dict[str, float], NDArray[np.bool_]]:
    """Recall@K, MAP@R and R-precision with one search less than one by one.

    Arguments and errors are those of `recall_at_k`.

    Returns:
        "recall@K" for each K, "map@r" and "r_precision"; and of all ranks' queries that have a
        match, in order, whether their nearest image has their label, (Q',): what Recall@1 is the
        mean of.
    """
    wanted = _checked_ks(ks)
    retrieval = _retrieval(query, query_labels, gallery, gallery_labels, ranks)
    found = _ranks_of_matches(retrieval, max(wanted))
    shares = {f"recall@{k}": share for k, share in _recall(found, wanted).items()}
    return shares | _precisions(retrieval), (found == 0).cpu().numpy()


def have_match(labels: Array, gallery_labels: Array | None = None) -> NDArray[np.bool_]:
    """Which queries `retrieval_metrics` has a hit or a miss of: not those without a match.

    Args:
        labels: (Q,), of the queries.
        gallery_labels: (G,); None where they are compared with each other.

    Returns:
        (Q,).
    """
    labels = np.asarray(labels)
    if gallery_labels is not None:
        return np.isin(labels, np.asarray(gallery_labels))
    _, of_query, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    found: NDArray[np.bool_] = sizes[of_query] > 1
    return found


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
    """Who is looked for where: the embeddings are this rank's, the rest is of all ranks."""

    query: Tensor
    """(own, D)."""
    query_classes: Tensor
    """(Q,), from 0."""
    gallery: Tensor | None
    """(own, D)."""
    item_classes: Tensor
    """(N,); the queries' without a gallery."""
    relevant: Tensor
    """(Q,), R: how many gallery items match."""
    ranks: Ranks | None


def _retrieval(
    query: Array,
    query_labels: Array,
    gallery: Array | None,
    gallery_labels: Array | None,
    ranks: Ranks | None,
) -> _Retrieval:
    """Check, number the classes, and warn the caller's caller of queries without a match."""
    if (gallery is None) != (gallery_labels is None):
        raise InputError("gallery and gallery_labels: give both or neither")
    query, query_labels = _checked(query, query_labels, "query", ranks)
    items, item_labels = None, query_labels
    if gallery is not None and gallery_labels is not None:
        items, item_labels = _checked(gallery, gallery_labels, "gallery", ranks)

    names, inverse = np.unique(np.concatenate([query_labels, item_labels]), return_inverse=True)
    classes = torch.as_tensor(inverse, device=query.device)
    query_classes, item_classes = classes.split([len(query_labels), len(item_labels)])
    class_sizes = item_classes.bincount(minlength=len(names))
    relevant = class_sizes[query_classes] - int(gallery is None)
    num_left_out = int((relevant == 0).sum())
    if num_left_out == len(relevant):
        raise InputError(f"none of the {len(relevant)} queries has its label in the gallery")
    if num_left_out and (ranks is None or ranks.first):
        warnings.warn(
            f"{num_left_out} of {len(relevant)} queries have no other image of their label: "
            "they are left out of the mean",
            stacklevel=3,
        )
    return _Retrieval(query, query_classes, items, item_classes, relevant, ranks)


def _recall(found: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Of the ranks of queries' nearest matches (Q',)."""
    return {k: (found < k).double().mean().item() for k in ks}


def _ranks_of_matches(retrieval: _Retrieval, limit: int) -> Tensor:
    """Of the queries that have a match, (Q',)."""
    query, query_classes, gallery, item_classes, relevant, ranks = retrieval
    found = match_ranks(query, query_classes, gallery, item_classes, limit, ranks=ranks)
    return found[relevant > 0]


def _precisions(retrieval: _Retrieval) -> dict[str, float]:
    """R-precision and MAP@R, the means over the queries that have a match."""
    relevant = retrieval.relevant
    right = relevant.new_zeros(len(relevant), dtype=torch.float64)
    average = torch.zeros_like(right)
    for queries, matches in _matches(retrieval):
        most = relevant[queries].clamp(min=1)
        right[queries] = _r_precision(matches, most)
        average[queries] = _average_precision(matches, most)
    found = {"map@r": average, "r_precision": right}
    return {name: values[relevant > 0].mean().item() for name, values in found.items()}


def _matches(retrieval: _Retrieval) -> Iterator[tuple[Tensor, Tensor]]:
    """Some queries (B,) at a time, and which of their R nearest have their label.

    (B, largest R), nearest first; beyond a query's own R they are False.
    """
    query, query_classes, gallery, item_classes, relevant, ranks = retrieval
    depth = int(relevant.max())
    for queries, found in neighbors_by_block(query, gallery, depth, ranks=ranks):
        matches = item_classes[found.indices] == query_classes[queries].unsqueeze(1)
        matches &= torch.arange(depth, device=matches.device) < relevant[queries].unsqueeze(1)
        yield queries, matches


def _r_precision(matches: Tensor, relevant: Tensor) -> Tensor:
    """Of each query (B,)."""
    return matches.sum(1) / relevant.double()


def _average_precision(matches: Tensor, relevant: Tensor) -> Tensor:
    """Of each query over its R nearest (B,)."""
    positions = torch.arange(1, matches.shape[1] + 1, device=matches.device)
    precision = matches.cumsum(1) / positions.double()
    return (precision * matches).sum(1) / relevant


def _checked_ks(ks: Iterable[int]) -> list[int]:
    wanted = list(ks) if isinstance(ks, Iterable) else []
    if not wanted or not all(isinstance(k, int | np.integer) and k >= 1 for k in wanted):
        raise InputError(f"ks={ks}: give at least one K, each 1 or more, as in [1, 2, 4, 8]")
    return wanted


def _checked(
    embeddings: Array, labels: Array, name: str, ranks: Ranks | None = None
) -> tuple[Tensor, NDArray[Any]]:
    embeddings = torch.as_tensor(embeddings)
    labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    found = tuple(embeddings.shape)
    if len(found) == 2:
        rows = Shards(embeddings, ranks)
        embeddings = rows.own
        found = len(rows), embeddings.shape[1]
    if len(found) != 2 or 0 in found or labels.shape != found[:1]:
        raise InputError(
            f"{name} and its labels have shapes {found} and {labels.shape}: "
            "expected (images, size) and (images,), none of them 0"
        )
    return embeddings, labels
