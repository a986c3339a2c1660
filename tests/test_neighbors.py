"""Exact neighbours against a sort of the whole float64 matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from abe.errors import InputError
from abe.neighbors import nearest_neighbors


def oracle(query, gallery, k, similarity):
    """Scores and indices by Python's sort, by score and then by index."""
    items = query if gallery is None else gallery
    scores, indices = [], []
    for i, q in enumerate(query.double()):
        ranking = []
        for j, g in enumerate(items.double()):
            if gallery is None and i == j:
                continue
            score = (q * g).sum() if similarity == "inner_product" else -((q - g) ** 2).sum()
            ranking.append((-score.item(), j))
        ranking = sorted(ranking)[:k]
        scores.append([-score for score, _ in ranking])
        indices.append([j for _, j in ranking])
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(indices)


@st.composite
def searches(draw):
    """Small integers: products are exact in any order, and ties and duplicates are many."""
    size, num_queries = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    num_items = draw(st.one_of(st.none(), st.integers(1, 12)))
    if num_items is None:
        num_queries += 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    spread = draw(st.integers(0, 3))

    def vectors(count):
        return torch.randint(-spread, spread + 1, (count, size), generator=generator)

    query = vectors(num_queries)
    gallery = None if num_items is None else vectors(num_items)
    candidates = num_queries - 1 if num_items is None else num_items
    k = draw(st.integers(1, candidates))
    return query, gallery, k, draw(st.sampled_from(["inner_product", "euclidean"]))


@given(searches(), st.integers(1, 9), st.integers(1, 13), st.sampled_from(["float", "double"]))
def test_every_block_size_gives_the_full_ranking(search, query_block, gallery_block, dtype):
    query, gallery, k, similarity = search
    expected_scores, expected_indices = oracle(query, gallery, k, similarity)
    scores, indices = nearest_neighbors(
        getattr(query, dtype)(),
        None if gallery is None else getattr(gallery, dtype)(),
        k,
        similarity=similarity,
        query_block=query_block,
        gallery_block=gallery_block,
    )
    assert indices.tolist() == expected_indices.tolist()
    assert scores.double().tolist() == expected_scores.tolist()


def random_vectors(count, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator)


@pytest.mark.parametrize("similarity", ["inner_product", "euclidean"])
@pytest.mark.parametrize("leave_out_self", [True, False])
def test_blocks_equal_the_full_matrix_on_real_numbers(similarity, leave_out_self):
    query = random_vectors(70)
    gallery = None if leave_out_self else random_vectors(150, seed=1)
    expected_scores, expected_indices = oracle(query, gallery, 20, similarity)
    for blocks in [{}, {"query_block": 16, "gallery_block": 32}, {"gallery_block": 7}]:
        scores, indices = nearest_neighbors(query, gallery, 20, similarity=similarity, **blocks)
        assert torch.equal(indices, expected_indices)
        torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-5, atol=1e-5)


def test_a_query_leaves_itself_out_by_index_and_keeps_its_duplicates():
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    scores, indices = nearest_neighbors(query, None, 3)
    assert indices.tolist() == [[1, 3, 2], [0, 3, 2], [0, 1, 3], [0, 1, 2]]
    assert scores[0].tolist() == [1, 1, 0]
    # Given as a gallery of its own, the same item is a neighbour like any other.
    assert nearest_neighbors(query, query, 1).indices.tolist() == [[0], [0], [2], [0]]


def test_rounding_makes_no_distance_negative():
    query = 30 * random_vectors(50)
    scores = nearest_neighbors(query, query, 1, similarity="euclidean").scores
    assert (scores <= 0).all()
    torch.testing.assert_close(scores, torch.zeros(50, 1), rtol=0, atol=0.01)


@pytest.mark.parametrize("own_gallery", [True, False])
def test_euclidean_tells_the_vectors_of_a_collapsed_network_apart(own_gallery):
    """Unit vectors, all but one within 1e-5 of each other, where float32 ends at 1e-7."""
    vectors = F.normalize(F.normalize(torch.ones(64), dim=0) + 1e-6 * random_vectors(300, 64))
    vectors[0] *= -1
    query, gallery = (vectors, None) if own_gallery else (vectors[:100], vectors[100:])
    expected_scores, expected_indices = oracle(query, gallery, 10, "euclidean")
    scores, indices = nearest_neighbors(query, gallery, 10, similarity="euclidean")
    assert (indices[1:] == expected_indices[1:]).float().mean() > 0.99
    torch.testing.assert_close(scores[1:].double(), expected_scores[1:], rtol=1e-4, atol=0)


def test_for_unit_vectors_both_similarities_agree():
    query, gallery = (F.normalize(random_vectors(n, seed=n).double(), dim=1) for n in (20, 60))
    inner = nearest_neighbors(query, gallery, 10)
    euclidean = nearest_neighbors(query, gallery, 10, similarity="euclidean")
    assert torch.equal(inner.indices, euclidean.indices)
    torch.testing.assert_close(2 * inner.scores - 2, euclidean.scores)


def test_for_other_vectors_they_differ():
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 0.0], [1.0, 0.1]])
    assert nearest_neighbors(query, gallery, 1).indices.item() == 0
    nearest = nearest_neighbors(query, gallery, 1, similarity="euclidean")
    assert nearest.indices.item() == 1
    assert nearest.scores.item() == pytest.approx(-0.01, abs=1e-5)


def test_scores_are_float32_under_autocast_and_for_half_precision():
    query = random_vectors(30)
    expected = nearest_neighbors(query, None, 5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = nearest_neighbors(query, None, 5)
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.indices, expected.indices)
    assert nearest_neighbors(query.bfloat16(), None, 5).scores.dtype == torch.float32


def test_the_query_decides_the_precision():
    query, gallery = random_vectors(5).double(), random_vectors(9, seed=1)
    exact = nearest_neighbors(query, gallery.double(), 3)
    assert torch.equal(nearest_neighbors(query, gallery, 3).scores, exact.scores)
    assert nearest_neighbors(query.float(), gallery.double(), 3).scores.dtype == torch.float32


def test_no_graph_is_kept():
    assert not nearest_neighbors(random_vectors(5).requires_grad_(), None, 2).scores.requires_grad


@pytest.mark.parametrize(
    ("query", "gallery", "k", "message"),
    [
        (torch.ones(5, 2), None, 5, "k=5, but a query has only 4 candidates"),
        (torch.ones(5, 2), torch.ones(3, 2), 4, "k=4, but a query has only 3 candidates"),
        (torch.ones(0, 2), None, 1, "only 0 candidates"),
        (torch.ones(5, 2), None, 0, "k=0: ask for at least 1 neighbour"),
        (torch.ones(5), None, 1, r"query has shape \(5,\): expected \(images, size\)"),
        (torch.ones(5, 2), torch.ones(5), 1, r"gallery has shape \(5,\)"),
        (torch.ones(5, 2), torch.ones(5, 3), 1, "query has 2 columns and gallery 3"),
        (torch.tensor([[1.0], [torch.nan]]), None, 1, "query row 1 is not finite"),
        (torch.ones(2, 1), torch.tensor([[torch.inf]]), 1, "gallery row 0 is not finite"),
        (torch.full((2, 1), 1e30), None, 1, "too large to be squared"),
    ],
)
def test_what_cannot_be_searched(query, gallery, k, message):
    with pytest.raises(InputError, match=message):
        nearest_neighbors(query, gallery, k)


def test_unknown_similarity():
    with pytest.raises(InputError, match="'cosine': choose one of 'inner_product', 'euclidean'"):
        nearest_neighbors(torch.ones(5, 2), None, 1, similarity="cosine")
