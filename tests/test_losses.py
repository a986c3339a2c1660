"""Eqs. 8-10 against float64 loops over learners, images and pairs."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from abe.errors import InputError
from abe.losses import contrastive_loss, divergence_loss, ensemble_loss

CONTRASTIVE = ["per_image", "sum", "balanced"]
DIVERGENCE = ["per_image", "sum", "per_pair"]


def squared_distance(a: Tensor, b: Tensor) -> float:
    return ((a - b) ** 2).sum().item()


def contrastive_oracle(embeddings, labels, margin, normalization):
    num_images, num_learners, _ = embeddings.shape
    losses = []
    for m in range(num_learners):
        pull = push = 0.0
        num_positive = num_active = 0
        for i, j in itertools.permutations(range(num_images), 2):
            squared = squared_distance(embeddings[i, m], embeddings[j, m])
            if labels[i] == labels[j]:
                pull += squared
                num_positive += 1
            elif squared < margin:
                push += margin - squared
                num_active += 1
        if normalization == "balanced":
            losses.append(pull / max(num_positive, 1) + push / max(num_active, 1))
        else:
            losses.append((pull + push) / (num_images if normalization == "per_image" else 1))
    return torch.tensor(losses, dtype=torch.float64)


def divergence_oracle(embeddings, margin, normalization):
    num_images, num_learners, _ = embeddings.shape
    total, count = 0.0, 0
    for i in range(num_images):
        for p, q in itertools.permutations(range(num_learners), 2):
            total += max(0.0, margin - squared_distance(embeddings[i, p], embeddings[i, q]))
            count += 1
    divisor = {"sum": 1, "per_image": num_images, "per_pair": max(count, 1)}[normalization]
    return torch.tensor(total / divisor, dtype=torch.float64)


@st.composite
def batches(draw):
    """Embeddings (B, M, d) in float64 with their labels, degenerate ones among them."""
    num_images, num_learners = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (num_images, num_learners, draw(st.integers(1, 5)))
    embeddings = F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
    match draw(st.sampled_from(["random", "identical", "duplicates", "zero", "same learners"])):
        case "identical":
            embeddings = embeddings[:1, :1].expand(shape).clone()
        case "duplicates":
            embeddings[num_images // 2 :] = embeddings[: num_images - num_images // 2].clone()
        case "zero":
            embeddings = torch.zeros(shape, dtype=torch.float64)
        case "same learners":
            embeddings = embeddings[:, :1].expand(shape).clone()
    labels = draw(
        st.one_of(
            st.just(torch.zeros(num_images, dtype=torch.int64)),
            st.just(torch.arange(num_images)),
            st.lists(st.integers(0, 2), min_size=num_images, max_size=num_images).map(torch.tensor),
        )
    )
    return embeddings, labels


@given(batches(), st.sampled_from(CONTRASTIVE), st.sampled_from([0.5, 1.0, 3.0]))
def test_contrastive_loss_is_equation_10(batch, normalization, margin):
    embeddings, labels = batch
    expected = contrastive_oracle(embeddings, labels, margin, normalization)
    actual = contrastive_loss(embeddings, labels, margin, normalization)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@given(batches(), st.sampled_from(DIVERGENCE), st.sampled_from([0.5, 1.0, 3.0]))
def test_divergence_loss_is_equation_9(batch, normalization, margin):
    embeddings, _ = batch
    expected = divergence_oracle(embeddings, margin, normalization)
    actual = divergence_loss(embeddings, margin, normalization)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@given(batches(), st.sampled_from(CONTRASTIVE), st.sampled_from(DIVERGENCE))
def test_gradients_are_finite(batch, normalization, divergence_normalization):
    embeddings, labels = batch
    embeddings = embeddings.float().requires_grad_()
    ensemble_loss(
        embeddings,
        labels,
        normalization=normalization,
        divergence_normalization=divergence_normalization,
    ).total.backward()
    assert embeddings.grad.isfinite().all()


def unit_batch(num_images=12, num_learners=4, learner_dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(num_images, num_learners, learner_dim, generator=generator)
    return F.normalize(embeddings.to(dtype), dim=-1), torch.arange(num_images) // 3


@pytest.mark.parametrize("normalization", CONTRASTIVE)
def test_contrastive_gradient(normalization):
    embeddings, labels = unit_batch(6)
    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: contrastive_loss(x, labels, 1.5, normalization), embeddings
    )


@pytest.mark.parametrize("normalization", DIVERGENCE)
def test_divergence_gradient(normalization):
    embeddings, _ = unit_batch(4)
    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence_loss(x, 1.5, normalization), embeddings)


def test_losses_by_hand():
    # One learner, squared distances 0.25 (positive), 0.09 and 0.04 (negative).
    embeddings = torch.tensor([0.0, 0.5, 0.3]).view(3, 1, 1)
    labels = torch.tensor([7, 7, 9])
    pull, push = 2 * 0.25, 2 * ((1 - 0.09) + (1 - 0.04))
    for normalization, expected in [
        ("sum", pull + push),
        ("per_image", (pull + push) / 3),
        ("balanced", pull / 2 + push / 4),
    ]:
        actual = contrastive_loss(embeddings, labels, normalization=normalization)
        assert actual.tolist() == pytest.approx([expected])
    # The same numbers as three learners of one image; and far from a second, idle image.
    learners = torch.stack([embeddings.view(3, 1), torch.tensor([[5.0], [10.0], [15.0]])])
    expected = 2 * (0.75 + 0.91 + 0.96)
    assert divergence_loss(learners, normalization="sum").item() == pytest.approx(expected)
    assert divergence_loss(learners).item() == pytest.approx(expected / 2)
    assert divergence_loss(learners, normalization="per_pair").item() == pytest.approx(
        expected / 12
    )


def test_divergence_counts_self_pairs_only():
    """Pairs of other images are far apart or close together: the divergence is the same."""
    apart = torch.eye(4).view(1, 4, 4).repeat(5, 1, 1)  # learners orthogonal, images identical
    assert divergence_loss(apart).item() == 0
    together = torch.eye(5).view(5, 1, 5).repeat(1, 4, 1)  # learners identical, images orthogonal
    assert divergence_loss(together).item() == 4 * 3  # m_div M (M - 1): p = q left out


def test_divergence_of_one_learner_is_zero_with_a_graph():
    embeddings, _ = unit_batch(num_learners=1)
    embeddings.requires_grad_()
    for normalization in DIVERGENCE:
        loss = divergence_loss(embeddings, normalization=normalization)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, embeddings)
        assert gradient.count_nonzero() == 0


def test_a_batch_without_positives_or_without_active_negatives():
    distinct = torch.eye(4).unsqueeze(1)  # squared distances of 2: beyond the margin
    for normalization in CONTRASTIVE:
        no_pairs_count = contrastive_loss(distinct, torch.arange(4), normalization=normalization)
        assert no_pairs_count.tolist() == [0]
        only_positives = contrastive_loss(
            distinct, torch.zeros(4, dtype=torch.int64), normalization=normalization
        )
        assert only_positives.item() == {"sum": 24, "per_image": 6, "balanced": 2}[normalization]


@pytest.mark.parametrize("normalization", CONTRASTIVE)
def test_order_of_images_and_of_learners_does_not_matter(normalization):
    embeddings, labels = unit_batch()
    images, learners = torch.randperm(12), torch.tensor([2, 0, 3, 1])
    expected = contrastive_loss(embeddings, labels, 1.5, normalization)
    permuted = contrastive_loss(embeddings[images], labels[images], 1.5, normalization)
    torch.testing.assert_close(permuted, expected)
    permuted = contrastive_loss(embeddings[:, learners], labels, 1.5, normalization)
    torch.testing.assert_close(permuted, expected[learners])
    expected = divergence_loss(embeddings, 1.5)
    torch.testing.assert_close(divergence_loss(embeddings[images], 1.5), expected)
    torch.testing.assert_close(divergence_loss(embeddings[:, learners], 1.5), expected)


def test_learners_do_not_mix_in_the_contrastive_loss():
    embeddings, labels = unit_batch()
    together = contrastive_loss(embeddings, labels)
    alone = [contrastive_loss(embeddings[:, m : m + 1], labels) for m in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_ensemble_loss_is_equation_8():
    embeddings, labels = unit_batch()
    loss = ensemble_loss(
        embeddings,
        labels,
        margin=1.5,
        normalization="balanced",
        divergence_weight=0.25,
        divergence_margin=1.25,
        divergence_normalization="per_pair",
    )
    metric = contrastive_oracle(embeddings, labels, 1.5, "balanced")
    divergence = divergence_oracle(embeddings, 1.25, "per_pair")
    torch.testing.assert_close(loss.metric, metric)
    torch.testing.assert_close(loss.divergence, divergence)
    torch.testing.assert_close(loss.total, metric.sum() + 0.25 * divergence)


def test_ensemble_loss_takes_another_metric_loss():
    embeddings, labels = unit_batch()
    loss = ensemble_loss(embeddings, labels, metric_loss=lambda e, y: e.sum((0, 2)) + y.sum())
    torch.testing.assert_close(loss.metric, embeddings.sum((0, 2)) + labels.sum())
    torch.testing.assert_close(loss.total, loss.metric.sum() + divergence_loss(embeddings))


def test_losses_are_float32_under_autocast():
    embeddings, labels = unit_batch(dtype=torch.float32)
    expected = ensemble_loss(embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ensemble_loss(embeddings, labels)
        low = ensemble_loss(embeddings.bfloat16(), labels)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
    assert low.total.dtype == torch.float32


def test_float32_is_close_to_float64_for_nearly_equal_learners():
    """Learners start almost alike; distances from a product of matrices must not drown."""
    embeddings, _ = unit_batch()
    alike = F.normalize(embeddings[:, :1] + 0.03 * embeddings, dim=-1)
    exact = divergence_loss(alike)
    assert divergence_loss(alike.float()).item() == pytest.approx(exact.item(), abs=1e-5)


def test_nearly_equal_positives_still_attract():
    """Their distance drowns in float32's rounding; its gradient must not."""
    embeddings, _ = unit_batch(2, 200, dtype=torch.float32)
    embeddings[1] = embeddings[0] + 1e-5 * embeddings[1]
    embeddings.requires_grad_()
    contrastive_loss(embeddings, torch.tensor([0, 0]), normalization="sum").sum().backward()
    expected = 4 * (embeddings[0] - embeddings[1]).detach()
    torch.testing.assert_close(embeddings.grad[0], expected, rtol=0.1, atol=1e-6)


@pytest.mark.parametrize("reducer", ["balanced", "sum"])
def test_contrastive_loss_against_pytorch_metric_learning(reducer):
    from pytorch_metric_learning import losses, reducers
    from pytorch_metric_learning.distances import LpDistance

    embeddings, labels = unit_batch()
    reference = losses.ContrastiveLoss(
        pos_margin=0,
        neg_margin=1.5,
        distance=LpDistance(normalize_embeddings=False, power=2),
        reducer=reducers.SumReducer() if reducer == "sum" else None,  # None: mean of non-zeros
    )
    expected = torch.stack([reference(embeddings[:, m], labels) for m in range(4)])
    torch.testing.assert_close(contrastive_loss(embeddings, labels, 1.5, reducer), expected)


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (
            torch.zeros(4, 8),
            torch.zeros(4),
            r"embeddings have shape \(4, 8\): expected \(B, M, d\)",
        ),
        (torch.zeros(0, 2, 8), torch.zeros(0), "none of them 0"),
        (torch.zeros(4, 2, 8), torch.zeros(3), r"labels have shape \(3,\): expected \(4,\)"),
        (torch.zeros(4, 2, 8), torch.zeros(4, 1), r"labels have shape \(4, 1\)"),
    ],
)
def test_wrong_shapes(embeddings, labels, message):
    with pytest.raises(InputError, match=message):
        ensemble_loss(embeddings, labels)


def test_unknown_normalization():
    embeddings, labels = unit_batch()
    with pytest.raises(InputError, match="'mean': choose one of 'per_image', 'sum', 'balanced'"):
        contrastive_loss(embeddings, labels, normalization="mean")
    with pytest.raises(
        InputError, match="'balanced': choose one of 'per_image', 'sum', 'per_pair'"
    ):
        divergence_loss(embeddings, normalization="balanced")
