"""Ranks of the nearest match against float64 loops over queries, ties by index included."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import EMBEDDINGS, UNIT, normal
from hypothesis import given
from hypothesis import strategies as st

from abe.distances import Bounds, sides
from abe.errors import InputError
from abe.ranking import match_ranks
from abe.shards import Shards


def oracle(query, query_classes, gallery, gallery_classes, limit, of=None):
    """One query (of `of`) at a time: all items in order, until the first match."""
    items = query if gallery is None else gallery
    ranks = []
    for i in range(len(query)) if of is None else of:
        distances = (items.double() - query[i].double()).square().sum(1)
        order = distances.argsort(stable=True)
        if gallery is None:
            order = order[order != i]
        matches = (gallery_classes[order] == query_classes[i]).nonzero().flatten().tolist()
        ranks.append(min([*matches[:1], limit]))
    return ranks


@st.composite
def retrievals(draw):
    """Small integers: ties and duplicates are many, and their distances are exact."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size, spread, classes = (
        draw(st.integers(1, 3)),
        draw(st.integers(0, 3)),
        draw(st.integers(1, 6)),
    )

    def images(count):
        vectors = torch.randint(-spread, spread + 1, (count, size), generator=generator)
        return vectors, torch.randint(classes, (count,), generator=generator)

    query, query_classes = images(draw(st.integers(2, 25)))
    if draw(st.booleans()):
        return query, query_classes, None, query_classes
    return query, query_classes, *images(draw(st.integers(1, 25)))


@given(
    retrievals(),
    st.integers(1, 24),
    st.integers(1, 30),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_every_block_and_limit_gives_the_definition(retrieval, limit, block, dtype, amx):
    query, query_classes, gallery, gallery_classes = retrieval
    limit = min(limit, len(query) - 1 if gallery is None else len(gallery))
    query, gallery = query.to(dtype), None if gallery is None else gallery.to(dtype)
    retrieval = query, query_classes, gallery, gallery_classes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
        found = match_ranks(*retrieval, limit, block=block)
    assert found.tolist() == oracle(*retrieval, limit)


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("separate_gallery", [True, False])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_real_numbers_are_ranked_as_by_float64(name, separate_gallery):
    embeddings = EMBEDDINGS[name]
    classes = torch.randint(60, (300,), generator=torch.Generator().manual_seed(3))
    if separate_gallery:
        retrieval = embeddings[:120], classes[:120], embeddings[120:], classes[120:]
    else:
        retrieval = embeddings, classes, None, classes
    for limit in (1, 20, 170):
        expected = oracle(*retrieval, limit)
        assert match_ranks(*retrieval, limit).tolist() == expected
        assert match_ranks(*retrieval, limit, block=64).tolist() == expected
    assert len(set(expected)) > 20  # limit 170: neither all right nor all wrong


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("num_different", [1, 2, 40])
def test_thousands_of_duplicates(num_different):
    embeddings = normal(num_different, 64).repeat_interleave(2000 // num_different, 0)
    embeddings = embeddings[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    classes = torch.arange(2000) % 500
    retrieval = embeddings, classes, None, classes, 1900
    some = [0, 1, 499, 500, 999, 1999, *range(7, 2000, 299)]
    assert match_ranks(*retrieval)[some].tolist() == oracle(*retrieval, of=some)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pairs_that_are_undecided():
    """A constant network's are all of them: a row of blocks would take 1.4 GB at a time."""
    program = """
import torch
from abe.ranking import match_ranks
def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1])
embeddings, classes = torch.randn(1, 16).expand(8000, 16), torch.arange(8000) % 3001
match_ranks(embeddings[:100], classes[:100] % 9, None, classes[:100] % 9, 9)
before = peak()
ranks = match_ranks(embeddings, classes, None, classes, 8)
assert ranks.tolist() == [8] * 3001 + [min(i % 3001, 8) for i in range(3001, 8000)], ranks
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kilobytes = int(run.stdout)
    assert kilobytes < 500_000


@pytest.mark.usefixtures("fast_bfloat16")
def test_the_precision_that_is_set_outside_changes_nothing(monkeypatch):
    query, classes = normal(300, 40), torch.arange(300) % 60
    expected = oracle(query, classes, None, classes, 100)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("bf16", "tf32", "ieee"):
            matmul.fp32_precision = precision
            with torch.autocast("cpu", torch.bfloat16):
                assert match_ranks(query, classes, None, classes, 100).tolist() == expected
            assert matmul.fp32_precision == precision
        monkeypatch.setattr(torch.Tensor, "addmm_", None)
        with pytest.raises(TypeError):
            match_ranks(query, classes, None, classes, 100)
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.usefixtures("fast_bfloat16")
def test_the_precision_of_who_takes_blocks_is_left_to_him():
    """Between two of them, other products are as precise as was set for them."""
    matmul, embeddings = torch.backends.mkldnn.matmul, normal(300, 40)
    before = matmul.fp32_precision
    shards = Shards(embeddings, None)
    classes = torch.arange(300)
    for side, other in sides(shards, classes, shards, classes):
        bounds = Bounds(side, other, 300 * 300)
        bounds.closeness(slice(0, 300), slice(0, 300))
        assert matmul.fp32_precision == before


def test_a_query_without_a_match_has_the_limit():
    embeddings, classes = UNIT[:6], torch.tensor([0, 0, 1, 2, 2, 2])
    assert match_ranks(embeddings, classes, None, classes, 3)[2] == 3
    ranks = match_ranks(embeddings[:3], classes[:3], embeddings[3:], classes[3:], 3)
    assert ranks.tolist() == [3, 3, 3]


def test_the_query_decides_the_precision():
    """In float64 the second item is the nearer one; in float32 they are equal."""
    query, gallery = torch.zeros(1, 1), torch.tensor([[1.0], [1 - 1e-9]], dtype=torch.float64)
    classes = torch.tensor([0]), torch.tensor([1, 0])
    assert match_ranks(query.double(), classes[0], gallery, classes[1], 2).tolist() == [0]
    assert match_ranks(query, classes[0], gallery, classes[1], 2).tolist() == [1]


def test_no_graph_is_kept_and_no_input_changed():
    query, classes = UNIT.clone().requires_grad_(), torch.arange(300) % 60
    assert not match_ranks(query, classes, None, classes, 5).requires_grad
    assert torch.equal(query, UNIT)


@pytest.mark.parametrize(
    ("query", "gallery", "limit", "message"),
    [
        (torch.ones(5, 2), None, 5, "k=5, but a query has only 4 candidates"),
        (torch.ones(5, 2), None, 0, "k=0: ask for at least 1 neighbour"),
        (torch.ones(5, 2), torch.ones(5, 3), 1, "query has 2 columns and gallery 3"),
        (torch.full((5, 2), torch.nan), None, 1, "query row 0 is not finite"),
    ],
)
def test_what_cannot_be_ranked(query, gallery, limit, message):
    classes = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(InputError, match=message):
        match_ranks(query, classes, gallery, classes, limit)
