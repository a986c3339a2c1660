"""Composition, purity and distribution of the mini-batches."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abe.data.samplers import ClassBalancedBatchSampler, EpochBatchSampler, PairBatchSampler
from abe.errors import InputError

# 12 classes of 3 to 14 images, shuffled, with labels that are neither 0..11 nor contiguous.
LABELS = np.random.default_rng(0).permutation(np.repeat(5 + 3 * np.arange(12), np.arange(3, 15)))


def both(labels=LABELS, seed=0):
    return [
        PairBatchSampler(labels, batch_size=16, seed=seed),
        ClassBalancedBatchSampler(labels, classes_per_batch=4, images_per_class=4, seed=seed),
    ]


@st.composite
def label_arrays(draw):
    """At least 2 classes, one of them with 2 images; single-image classes among them."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=8).filter(lambda s: max(s) > 1))
    labels = np.repeat(draw(st.permutations(range(20)))[: len(sizes)], sizes)
    return np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)


# --- both samplers -----------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_a_batch_is_a_function_of_labels_seed_and_step(index):
    sampler, again, other = both()[index], both()[index], both(seed=1)[index]
    forward = [sampler.batch(step) for step in range(6)]
    backward = [again.batch(step) for step in reversed(range(6))][::-1]
    np.testing.assert_array_equal(forward, backward)
    assert len({tuple(batch) for batch in forward}) == 6
    assert not any(np.array_equal(other.batch(step), forward[step]) for step in range(6))
    for batch in forward:
        assert batch.shape == (sampler.batch_size,) == (16,)
        assert batch.dtype == np.int64


def bytes_per_step(sampler):
    """What a batch takes at most while it is drawn; arrays of numpy count."""
    sampler.batch(0)
    tracemalloc.start()
    for step in range(20):
        sampler.batch(step)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def alike(size):
    """20 classes of about the same size."""
    return np.random.default_rng(0).integers(0, 20, size)


def lopsided(size):
    """3 classes of 4 images, and one with all the others."""
    return np.minimum(np.arange(size) // 4, 3)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("labels", [alike, lopsided])
def test_a_batch_of_a_million_images_takes_what_one_of_a_hundred_takes(index, labels):
    """A pass over the labels would show as an array of a million of something."""
    million, hundred = both(labels(1_000_000))[index], both(labels(100))[index]
    assert bytes_per_step(million) < bytes_per_step(hundred) + 50_000
    drawn = np.concatenate([million.batch(step) for step in range(50)])
    assert drawn.max() > 900_000


@pytest.mark.parametrize("sampler", [PairBatchSampler, ClassBalancedBatchSampler])
def test_labels_without_pairs(sampler):
    with pytest.raises(InputError, match="1 training classes"):
        sampler(np.zeros(200, int))
    with pytest.raises(InputError, match="every training class has a single image"):
        sampler(np.arange(200))


# --- PairBatchSampler --------------------------------------------------------------------------


def quarters(sampler, step):
    return np.split(sampler.batch(step), 4)


def test_the_papers_batch_of_64():
    labels = np.repeat(np.arange(50), 20)
    sampler = PairBatchSampler(labels)
    assert sampler.batch_size == 64
    first, second, positives, negatives = quarters(sampler, 0)
    assert len(first) == 16
    assert len({*first, *second}) == 32
    assert (labels[first] == labels[positives]).all()
    assert (first != positives).all()
    assert (labels[second] != labels[negatives]).all()


@given(label_arrays(), st.integers(0, 1000), st.integers(0, 1000))
def test_pairs_are_pairs_whatever_the_classes(labels, seed, step):
    sizes = np.bincount(labels)[labels]
    quarter = min(len(labels) // 2, int((sizes > 1).sum()))
    sampler = PairBatchSampler(labels, batch_size=4 * quarter, seed=seed)
    first, second, positives, negatives = quarters(sampler, step)
    assert len({*first, *second}) == 2 * quarter
    assert (labels[first] == labels[positives]).all()
    assert (first != positives).all()
    assert (labels[second] != labels[negatives]).all()


def test_images_and_partners_are_drawn_evenly():
    labels = np.repeat([0, 1, 2], [2, 6, 12])
    sampler = PairBatchSampler(labels, batch_size=4)
    steps = 20_000
    pairs = np.array([sampler.batch(step) for step in range(steps)])
    first, second, positives, negatives = pairs.T
    for images in (first, second):
        np.testing.assert_allclose(np.bincount(images) / steps, 1 / 20, atol=0.01)
    for image in (0, 2, 7, 8, 19):
        same = np.setdiff1d(np.flatnonzero(labels == labels[image]), image)
        other = np.flatnonzero(labels != labels[image])
        for anchors, partners, candidates in (
            (first, positives, same),
            (second, negatives, other),
        ):
            drawn = np.bincount(partners[anchors == image], minlength=20)
            assert set(np.flatnonzero(drawn)) == set(candidates)
            expected = drawn.sum() / len(candidates)
            # Pearson's statistic has mean k - 1 and variance 2 (k - 1): five deviations.
            statistic = ((drawn[candidates] - expected) ** 2 / expected).sum()
            free = len(candidates) - 1
            assert statistic <= free + 5 * (2 * free) ** 0.5


def test_images_of_single_image_classes_have_no_positive_but_take_part():
    labels = np.array([0, 0, 0, 1, 2, 3, 3, 4])
    sampler = PairBatchSampler(labels, batch_size=8)
    batches = np.array([np.split(sampler.batch(step), 4) for step in range(500)])
    lonely = {3, 4, 7}
    assert set(np.unique(batches[:, 0])) == {0, 1, 2, 5, 6}
    assert lonely <= set(np.unique(batches[:, 1]))
    assert not lonely & set(np.unique(batches[:, 2]))
    assert lonely <= set(np.unique(batches[:, 3]))


@pytest.mark.parametrize("batch_size", [0, 2, 6, 63])
def test_a_batch_size_without_quarters(batch_size):
    with pytest.raises(InputError, match=f"train.batch_size={batch_size}.*multiple of 4"):
        PairBatchSampler(LABELS, batch_size=batch_size)


def test_too_few_images_for_a_batch():
    with pytest.raises(InputError, match=r"takes 32 different images, 16 .*: there are 31 and 31"):
        PairBatchSampler(np.arange(31) % 4)
    with pytest.raises(InputError, match="there are 42 and 2, lower it"):
        PairBatchSampler(np.array([0, 0, *range(1, 41)]))


# --- ClassBalancedBatchSampler -----------------------------------------------------------------


def test_p_classes_of_k_different_images():
    sampler = ClassBalancedBatchSampler(np.repeat(np.arange(30), 9))
    assert sampler.batch_size == 64
    batch = sampler.batch(0)
    assert len(set(batch)) == 64
    by_class = (batch // 9).reshape(16, 4)
    assert (by_class == by_class[:, :1]).all()
    assert len(set(by_class[:, 0])) == 16


@given(label_arrays(), st.integers(2, 8), st.integers(0, 1000))
def test_small_classes_give_each_image_before_any_twice(labels, images_per_class, step):
    num_classes = len(set(labels))
    sampler = ClassBalancedBatchSampler(labels, num_classes, images_per_class)
    groups = sampler.batch(step).reshape(num_classes, images_per_class)
    assert {labels[group[0]] for group in groups} == set(labels)
    for group in groups:
        assert len(set(labels[group])) == 1
        size = (labels == labels[group[0]]).sum()
        assert len(set(group)) == min(size, images_per_class)


def test_classes_and_images_are_drawn_evenly():
    labels = np.repeat([4, 7, 9, 11], [2, 3, 8, 20])
    sampler = ClassBalancedBatchSampler(labels, classes_per_batch=2, images_per_class=2)
    steps = 10_000
    drawn = np.bincount(np.concatenate([sampler.batch(step) for step in range(steps)])) / steps
    expected = np.repeat([1 / 2, 1 / 3, 1 / 8, 1 / 20], [2, 3, 8, 20])  # half the steps, 2 of them
    np.testing.assert_allclose(drawn, expected, rtol=0.15)


def test_more_classes_than_there_are():
    with pytest.raises(InputError, match="16 classes x 4 images cannot be drawn from 12 training"):
        ClassBalancedBatchSampler(LABELS)


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (0, 4)])
def test_batches_without_positives_or_negatives(shape):
    with pytest.raises(InputError, match="both have to be 2 or more"):
        ClassBalancedBatchSampler(LABELS, *shape)


# --- Epochs ------------------------------------------------------------------------------------


def test_an_epoch_takes_each_image_once_in_an_order_of_its_own():
    sampler = EpochBatchSampler(12, 4)
    assert sampler.steps_per_epoch == 3
    epochs = [
        np.concatenate([sampler.batch(3 * epoch + place) for place in range(3)])
        for epoch in range(2)
    ]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1])
    assert list(EpochBatchSampler(12, 4, seed=1).batch(0)) != list(sampler.batch(0))


def test_what_an_epoch_leaves_over_is_another_in_each():
    sampler = EpochBatchSampler(11, 4)
    assert sampler.steps_per_epoch == 2
    taken = [{*sampler.batch(2 * epoch), *sampler.batch(2 * epoch + 1)} for epoch in range(8)]
    assert all(len(epoch) == 8 for epoch in taken)
    assert set.union(*taken) == set(range(11))


def test_batches_of_epochs_are_functions_of_the_step():
    sampler = EpochBatchSampler(12, 4, seed=3)
    in_order = [sampler.batch(step) for step in range(9)]
    for step in (8, 0, 4, 1):
        assert np.array_equal(EpochBatchSampler(12, 4, seed=3).batch(step), in_order[step])
        assert np.array_equal(sampler.batch(step), in_order[step])


def test_a_batch_that_is_larger_than_an_epoch_is_refused():
    assert EpochBatchSampler(4, 4).steps_per_epoch == 1
    with pytest.raises(InputError, match="batch_size=5, but there are 4 images to learn from: low"):
        EpochBatchSampler(4, 5)
