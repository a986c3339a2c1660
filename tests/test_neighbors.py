"""Exact neighbours against a sort of all float64 distances."""

from __future__ import annotations

import pytest
import torch
from helpers import EMBEDDINGS, UNIT, normal
from hypothesis import given
from hypothesis import strategies as st

from abe.errors import InputError
from abe.neighbors import nearest_neighbors


def oracle(query, gallery, k):
    """Distances and indices, one query at a time, by distance and then by index."""
    items = query if gallery is None else gallery
    distances, indices = [], []
    for i in range(len(query)):
        found = (items.double() - query[i].double()).square().sum(1)
        order = found.argsort(stable=True)
        if gallery is None:
            order = order[order != i]
        distances.append(found[order[:k]].tolist())
        indices.append(order[:k].tolist())
    return distances, indices


@st.composite
def searches(draw):
    """Small integers: ties and duplicates are many, and their distances are exact."""
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
    return query, gallery, draw(st.integers(1, candidates))


@given(
    searches(),
    st.integers(1, 9),
    st.integers(1, 13),
    st.sampled_from(["float", "double"]),
    st.booleans(),
)
def test_every_block_size_gives_the_full_ranking(search, query_block, gallery_block, dtype, amx):
    query, gallery, k = search
    query, gallery = (None if v is None else getattr(v, dtype)() for v in (query, gallery))
    blocks = {"query_block": query_block, "gallery_block": gallery_block}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
        found = nearest_neighbors(query, gallery, k, **blocks)
    assert (found.distances.tolist(), found.indices.tolist()) == oracle(query, gallery, k)


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("separate_gallery", [True, False])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_real_numbers_are_ordered_as_by_float64(name, separate_gallery):
    query, gallery = EMBEDDINGS[name], None
    if separate_gallery:
        query, gallery = query[:120], query[120:]
    for k in (1, 20, 170):
        expected = oracle(query, gallery, k)[1]
        for blocks in ({}, {"query_block": 64, "gallery_block": 64}):
            found = nearest_neighbors(query, gallery, k, **blocks)
            assert found.indices.tolist() == expected
            assert (found.distances.diff(dim=1) >= 0).all()


@pytest.mark.usefixtures("fast_bfloat16")
def test_of_unit_vectors_the_nearest_have_the_largest_products():
    products = (UNIT.double() @ UNIT.double().mT).fill_diagonal_(-torch.inf)
    expected = products.argsort(dim=1, descending=True)[:, :9]
    assert torch.equal(nearest_neighbors(UNIT, None, 9).indices, expected)


def test_a_query_leaves_itself_out_by_index_and_keeps_its_duplicates():
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    distances, indices = nearest_neighbors(query, None, 3)
    assert indices.tolist() == [[1, 3, 2], [0, 3, 2], [0, 1, 3], [0, 1, 2]]
    assert distances[0].tolist() == [0, 0, 2]
    # Given as a gallery of its own, the same item is a neighbour like any other.
    assert nearest_neighbors(query, query, 1).indices.tolist() == [[0], [0], [2], [0]]


def test_autocast_changes_nothing():
    query = normal(30, 16)
    expected = nearest_neighbors(query, None, 5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = nearest_neighbors(query, None, 5)
    assert torch.equal(actual.distances, expected.distances)
    assert torch.equal(actual.indices, expected.indices)


def test_the_query_decides_the_precision():
    """In float64 the second item is the nearer one; in float32 they are equal."""
    query, gallery = torch.zeros(1, 1), torch.tensor([[1.0], [1 - 1e-9]], dtype=torch.float64)
    assert nearest_neighbors(query.double(), gallery, 1).indices.tolist() == [[1]]
    assert nearest_neighbors(query, gallery, 1).indices.tolist() == [[0]]


def test_no_graph_is_kept_and_no_input_changed():
    query = UNIT.clone().requires_grad_()
    assert not nearest_neighbors(query, None, 2).distances.requires_grad
    assert torch.equal(query, UNIT)


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
