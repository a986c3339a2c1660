"""Metrics against float64 loops over queries, and against pytorch-metric-learning."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from abe.errors import InputError
from abe.metrics import have_match, map_at_r, nmi, r_precision, recall_at_k, retrieval_metrics


def oracle(query, query_labels, gallery=None, gallery_labels=None):
    """All three metrics, one query at a time; recall for every K there is."""
    itself_is_there = gallery is None
    if gallery is None:
        gallery, gallery_labels = query, query_labels
    hits, precisions, averages = [], [], []
    for i, q in enumerate(query.double()):
        distances = ((gallery.double() - q) ** 2).sum(1).tolist()
        ranking = sorted(
            (distance, j)
            for j, distance in enumerate(distances)
            if not (itself_is_there and i == j)
        )
        right = [bool(gallery_labels[j] == query_labels[i]) for _, j in ranking]
        num_right = sum(right)
        if num_right == 0:
            continue
        hits.append([any(right[:k]) for k in range(1, len(right) + 1)])
        precisions.append(sum(right[:num_right]) / num_right)
        averages.append(
            sum(sum(right[:r]) / r for r in range(1, num_right + 1) if right[r - 1]) / num_right
        )
    if not hits:
        return None
    recall = dict(enumerate(np.mean(hits, axis=0).tolist(), start=1))
    return recall, np.mean(precisions).item(), np.mean(averages).item()


@st.composite
def retrievals(draw):
    """Small integers, so that distances are exact: random, tied, duplicated or all the same."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    spread, size = draw(st.integers(0, 4)), draw(st.integers(1, 3))

    def images(count):
        vectors = torch.randint(-spread, spread + 1, (count, size), generator=generator)
        labels = draw(
            st.one_of(
                st.just([3] * count),
                st.just(list(range(count))),
                st.lists(st.integers(-1, 3), min_size=count, max_size=count),
            )
        )
        return vectors.float(), torch.tensor(labels)

    if draw(st.booleans()):
        return images(draw(st.integers(2, 10)))
    return *images(draw(st.integers(1, 8))), *images(draw(st.integers(1, 8)))


@given(retrievals())
def test_metrics_are_their_definitions(retrieval):
    query, query_labels, *gallery = retrieval
    num_candidates = len(gallery[0]) if gallery else len(query) - 1
    expected = oracle(*retrieval)
    ks = range(1, num_candidates + 1)
    if expected is None:
        with pytest.raises(InputError, match="none of the"):
            recall_at_k(query, query_labels, ks, *gallery)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert recall_at_k(query, query_labels, ks, *gallery) == pytest.approx(expected[0])
        assert r_precision(*retrieval) == pytest.approx(expected[1])
        assert map_at_r(*retrieval) == pytest.approx(expected[2])


def clustered(num_classes=8, per_class=6, size=12, noise=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, size, generator=generator)
    labels = torch.arange(num_classes).repeat(per_class)
    embeddings = centres[labels] + noise * torch.randn(len(labels), size, generator=generator)
    return F.normalize(embeddings, dim=1), labels


def test_metrics_by_hand():
    # From 0 the others stand in the order right, wrong, right, ...: R = 2.
    embeddings = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [10.5]])
    labels = torch.tensor([0, 0, 1, 0, 1, 1])
    gallery, gallery_labels = embeddings[1:4], labels[1:4]
    query, query_labels = embeddings[:1], labels[:1]
    args = (query, query_labels, gallery, gallery_labels)
    assert recall_at_k(query, query_labels, [3, 1], gallery, gallery_labels) == {3: 1.0, 1: 1.0}
    assert r_precision(*args) == 1 / 2
    assert map_at_r(*args) == (1 / 1) / 2
    # Among themselves: which of the nearest are right, for each query.
    # 0: 1 right, 2 wrong. 1: 0 right (tie with 2, by index). 2: 1, 3 wrong. 3: 2 wrong, 1 right.
    # 4 and 5: each other, then 3 wrong (7 and 7.5 away).
    assert recall_at_k(embeddings, labels, [1, 2]) == {1: 4 / 6, 2: 5 / 6}
    assert r_precision(embeddings, labels) == pytest.approx((1 + 1 + 0 + 1 + 1 + 1) / 12)
    assert map_at_r(embeddings, labels) == pytest.approx((1 + 1 + 0 + 0.5 + 1 + 1) / 12)


def test_perfect_and_hopeless_embeddings():
    labels = torch.arange(5).repeat(4)
    perfect = F.one_hot(labels).float()
    assert recall_at_k(perfect, labels, [1, 8]) == {1: 1.0, 8: 1.0}
    assert r_precision(perfect, labels) == map_at_r(perfect, labels) == 1.0
    assert nmi(perfect, labels) == pytest.approx(1.0)
    # Two far-apart pairs, each of two labels: the nearest is always wrong.
    pairs = torch.tensor([[0.0], [0.1], [9.0], [9.1]])
    assert recall_at_k(pairs, torch.tensor([0, 1, 0, 1]), [1]) == {1: 0.0}


def test_nearest_is_euclidean_whatever_the_lengths():
    """A long vector has the largest inner product with everything, and is near to nothing."""
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [90.0, 0.0], [91.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert recall_at_k(embeddings, labels, [1]) == {1: 1.0}


def test_a_query_is_left_out_by_index_so_that_its_duplicate_counts():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert recall_at_k(embeddings, torch.tensor([0, 0, 1, 1]), [1]) == {1: 1.0}
    assert recall_at_k(embeddings, torch.tensor([0, 1, 0, 1]), [1]) == {1: 0.0}


def test_a_separate_gallery_keeps_what_is_equal_to_the_query():
    embeddings = torch.eye(3)
    labels = torch.arange(3)
    assert recall_at_k(embeddings, labels, [1], embeddings, labels) == {1: 1.0}
    assert map_at_r(embeddings, labels, embeddings, labels) == 1.0


@pytest.mark.parametrize("gallery", [None, [1, 4, 4]])
def test_queries_that_have_a_match(gallery):
    """Those that `retrieval_metrics` has a hit or a miss of, in its order."""
    labels = [1, 2, 1, 3, 4]
    images = torch.eye(8)
    others = () if gallery is None else (images[5:], gallery)
    with pytest.warns(UserWarning, match="queries have no"):
        _, hits = retrieval_metrics(images[:5], labels, [1], *others)
    found = have_match(labels, gallery)
    assert found.tolist() == [each in (gallery or [1]) for each in labels]
    assert len(hits) == found.sum()


def test_queries_without_a_match_are_left_out_and_counted():
    embeddings, labels = clustered()
    expected = recall_at_k(embeddings, labels, [1, 5])
    lonely = torch.cat([embeddings, torch.full((2, 12), 9.0)])  # near to nothing but each other
    lonely_labels = torch.cat([labels, torch.tensor([98, 99])])
    message = "2 of 50 queries have no other image of their label"
    with pytest.warns(UserWarning, match=message) as caught:
        assert recall_at_k(lonely, lonely_labels, [1, 5]) == pytest.approx(expected)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=message):
        assert r_precision(lonely, lonely_labels) == r_precision(embeddings, labels)
    with pytest.warns(UserWarning, match=message):
        assert map_at_r(lonely, lonely_labels) == map_at_r(embeddings, labels)


@pytest.mark.parametrize("separate_gallery", [True, False])
def test_all_metrics_at_once_are_those_one_by_one(separate_gallery):
    embeddings, labels = clustered(noise=1.2)
    args = embeddings, torch.cat([labels[:-1], torch.tensor([99])])  # one query has no match
    if separate_gallery:
        args = *args, embeddings[:20], labels[:20]
    query, query_labels, *gallery = args
    with pytest.warns(UserWarning, match="have no other image of their label") as caught:
        found, hits = retrieval_metrics(query, query_labels, [1, 5], *gallery)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recall = recall_at_k(query, query_labels, [1, 5], *gallery)
        assert found == {
            "recall@1": recall[1],
            "recall@5": recall[5],
            "map@r": map_at_r(*args),
            "r_precision": r_precision(*args),
        }
    assert found["map@r"] < found["r_precision"] < found["recall@1"] < found["recall@5"]

    items, item_labels = gallery or (query, query_labels)
    distances = torch.cdist(query.double(), items.double())
    if not separate_gallery:
        distances.fill_diagonal_(torch.inf)
    right = item_labels[distances.argmin(1)] == query_labels
    answerable = np.isin(query_labels, item_labels) & (query_labels.numpy() != 99)
    assert hits.tolist() == right[torch.from_numpy(answerable)].tolist()
    assert len(hits) < len(query)
    assert hits.mean() == recall[1]


def test_recall_is_exact_where_float32_products_are_not():
    """Unit vectors, three of each, that differ in their last bits or not at all."""
    embeddings, _ = clustered(num_classes=40, per_class=1, size=50)
    embeddings = embeddings.repeat(3, 1)
    embeddings[40:] += 1e-7 * torch.randn(80, 50, generator=torch.Generator().manual_seed(1))
    embeddings[::3] = embeddings[1::3]
    labels = torch.randperm(120, generator=torch.Generator().manual_seed(0)) % 15
    assert recall_at_k(embeddings, labels, range(1, 120)) == oracle(embeddings, labels)[0]


def test_order_of_images_does_not_matter():
    embeddings, labels = clustered()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    shuffled = embeddings[order], labels[order]
    assert recall_at_k(*shuffled, [1, 2, 4]) == recall_at_k(embeddings, labels, [1, 2, 4])
    assert r_precision(*shuffled) == pytest.approx(r_precision(embeddings, labels))
    assert map_at_r(*shuffled) == pytest.approx(map_at_r(embeddings, labels))


def test_numpy_arrays_are_taken_as_well():
    embeddings, labels = clustered()
    arrays = embeddings.numpy(), labels.numpy()
    assert recall_at_k(*arrays, [1, 4]) == recall_at_k(embeddings, labels, [1, 4])
    assert map_at_r(*arrays, *arrays) == map_at_r(embeddings, labels, embeddings, labels)
    assert nmi(*arrays) == nmi(embeddings, labels)


@pytest.mark.parametrize("separate_gallery", [True, False])
def test_against_pytorch_metric_learning(separate_gallery):
    """Of Recall@K it knows K = 1 alone, as "precision_at_1"; the others are held by the loop."""
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(LpDistance(normalize_embeddings=False)),
        kmeans_func=lambda embeddings, num_clusters: None,
    )
    embeddings, labels = clustered(noise=1.2)
    embeddings = embeddings * torch.linspace(0.5, 2, len(labels)).unsqueeze(1)  # not of unit length
    labels = labels.where(labels < 6, 5 + torch.arange(len(labels)) % 2)  # uneven classes
    if separate_gallery:
        args = embeddings[:20], labels[:20], embeddings[20:], labels[20:]
    else:
        args = embeddings, labels
    expected = calculator.get_accuracy(*args)
    query, query_labels, *gallery = args
    assert recall_at_k(query, query_labels, [1], *gallery) == {
        1: pytest.approx(expected["precision_at_1"])
    }
    assert r_precision(*args) == pytest.approx(expected["r_precision"])
    assert map_at_r(*args) == pytest.approx(expected["mean_average_precision_at_r"])
    assert 0.1 < map_at_r(*args) < r_precision(*args) < 0.9  # neither trivial nor equal


def test_nmi_is_that_of_the_clusters():
    """The six points have one sensible clustering; the labels disagree with it at one point."""
    embeddings = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]])
    labels = np.array([0, 0, 0, 1, 1, 0])
    joint = np.array([[3, 0], [1, 2]]) / 6  # clusters x labels
    clusters, classes = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)

    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    information = entropy(clusters) + entropy(classes) - entropy(joint)
    expected = 2 * information / (entropy(clusters) + entropy(classes))
    assert nmi(embeddings, labels) == pytest.approx(expected)
    assert nmi(embeddings.bfloat16().requires_grad_(), labels) == pytest.approx(expected)


@given(st.data(), st.integers(2, 6))
def test_nmi_is_its_definition_and_that_of_pytorch_metric_learning(data, count):
    """k-means finds any clusters whose points coincide; as many as there are classes."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    def assignment():
        more = data.draw(st.lists(st.integers(0, count - 1), min_size=num_more, max_size=num_more))
        return np.array(data.draw(st.permutations([*range(count), *more])))

    num_more = data.draw(st.integers(0, 12))
    labels, clusters = assignment(), assignment()
    embeddings = 10 * np.eye(count)[clusters]

    joint = np.zeros((count, count))
    for label, cluster in zip(labels, clusters, strict=True):
        joint[label, cluster] += 1 / len(labels)
    information, entropies = 0.0, 0.0
    for i in range(count):
        for p in (joint[i].sum(), joint[:, i].sum()):
            entropies -= p * np.log(p)
        for j in range(count):
            if joint[i, j] > 0:
                independent = joint[i].sum() * joint[:, j].sum()
                information += joint[i, j] * np.log(joint[i, j] / independent)
    measured = nmi(embeddings, labels)
    assert measured == pytest.approx(2 * information / entropies, abs=1e-12)

    calculator = AccuracyCalculator(
        include=("NMI",),
        device=torch.device("cpu"),
        knn_func=lambda *args: None,
        kmeans_func=lambda *args: clusters,
    )
    theirs = calculator.get_accuracy(torch.as_tensor(embeddings), torch.as_tensor(labels))
    assert measured == pytest.approx(theirs["NMI"], abs=1e-12)


def test_nmi_repeats_with_its_seed_and_knows_noise_from_classes():
    embeddings, labels = clustered(noise=0.4)
    assert nmi(embeddings, labels, seed=3) == nmi(embeddings, labels, seed=3)
    noise = torch.randn(48, 12, generator=torch.Generator().manual_seed(0))
    assert nmi(noise, labels) + 0.3 < nmi(embeddings, labels)


def test_nmi_of_collapsed_embeddings_is_zero():
    with pytest.warns(UserWarning, match="distinct clusters"):
        assert nmi(torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])) == 0.0


def test_nmi_refuses_what_is_not_finite():
    with pytest.raises(InputError, match="not finite"):
        nmi(torch.tensor([[0.0], [torch.nan]]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("args", "ks", "message"),
    [
        ((torch.ones(5, 2), torch.zeros(5)), [5], "k=5, but a query has only 4 candidates"),
        ((torch.ones(5, 2), torch.zeros(5)), [0, 1], r"ks=\[0, 1\]: give at least one K"),
        ((torch.ones(5, 2), torch.zeros(5)), [], r"ks=\[\]"),
        ((torch.ones(5, 2), torch.zeros(5)), 1, r"ks=1: give at least one K, .* as in \[1, 2"),
        ((torch.ones(5, 2), torch.zeros(5)), [1, 1.5], r"ks=\[1, 1.5\]"),
        ((torch.ones(5, 2), torch.zeros(5)), "12", "ks=12"),
        ((torch.ones(0, 2), torch.zeros(0)), [1], r"\(0, 2\) and \(0,\): .* none of them 0"),
        ((np.ones((5, 0)), np.zeros(5)), [1], r"shapes \(5, 0\)"),
        ((torch.ones(5, 2), torch.zeros(4)), [1], r"query and its labels have shapes \(5, 2\)"),
        ((torch.ones(5), torch.zeros(5)), [1], r"expected \(images, size\) and \(images,\)"),
        ((torch.ones(5, 2), torch.arange(5)), [1], "none of the 5 queries has its label"),
    ],
)
def test_what_cannot_be_measured(args, ks, message):
    with pytest.raises(InputError, match=message):
        recall_at_k(*args, ks)


@pytest.mark.parametrize("kind", [list, np.array], ids=["list", "array"])
def test_labels_may_be_strings(kind):
    embeddings, labels = clustered(noise=1.2)
    names = kind([f"class {label}" for label in labels.tolist()])
    assert recall_at_k(embeddings, names, [1, 4]) == recall_at_k(embeddings, labels, [1, 4])
    assert map_at_r(embeddings, names, embeddings, names) == map_at_r(
        embeddings, labels, embeddings, labels
    )
    assert nmi(embeddings, names) == pytest.approx(nmi(embeddings, labels))


def test_an_empty_gallery_or_clustering():
    embeddings, labels = clustered()
    with pytest.raises(InputError, match=r"gallery and its labels have shapes \(0, 12\)"):
        recall_at_k(embeddings, labels, [1], embeddings[:0], labels[:0])
    with pytest.raises(InputError, match=r"embeddings and its labels have shapes \(0, 12\)"):
        nmi(embeddings[:0], labels[:0])


def test_a_gallery_comes_with_its_labels():
    query, labels = torch.ones(5, 2), torch.zeros(5)
    with pytest.raises(InputError, match="give both or neither"):
        recall_at_k(query, labels, [1], gallery=query)
    with pytest.raises(InputError, match="give both or neither"):
        r_precision(query, labels, gallery_labels=labels)
    with pytest.raises(InputError, match="gallery and its labels have shapes"):
        map_at_r(query, labels, query, labels[:3])
