"""Mini-batches as pure functions of a seed and the step.

A sampler remembers nothing: `batch(step)` is the same whenever and wherever it is asked for, so
the step is all that a checkpoint has to hold, and a batch costs no pass over the data set.
"""

from __future__ import annotations

import numpy as np

from abe.errors import InputError


class PairBatchSampler:
    """The paper's mini-batch (section 4): images, and for each one a positive or negative partner.

    With n = batch_size / 2, `batch` holds n different random images, then the partners of the
    first n / 2, another image of the same class each, then those of the other n / 2, an image of
    another class each. Images of classes with a single image never head a positive pair.

    Args:
        labels: (N,) class of every image.
        batch_size: divisible by 4; the paper's is 64.
        seed: another seed gives other batches.

    Raises:
        InputError: a batch size that is not divisible by 4 or too large, fewer than 2 classes,
            or too few images whose class has another one.
    """

    def __init__(self, labels: np.ndarray, batch_size: int = 64, seed: int = 0) -> None:
        if batch_size < 4 or batch_size % 4:
            raise InputError(f"batch_size={batch_size}: pairs need a multiple of 4")
        self.batch_size = batch_size
        self.seed = seed
        self.classes = _Classes(labels)
        self.paired = np.flatnonzero(self.classes.sizes[self.classes.of_image] > 1)
        half = batch_size // 2
        if len(self.paired) < half // 2 or len(labels) < half:
            raise InputError(
                f"batch_size={batch_size} needs {half} images, {half // 2} of them with another "
                f"image of their class: there are {len(labels)} and {len(self.paired)}"
            )

    def batch(self, step: int) -> np.ndarray:
        """Indices of the images of a step; -> (batch_size,)."""
        rng = np.random.default_rng([self.seed, step])
        quarter = self.batch_size // 4
        with_positive = rng.choice(self.paired, quarter, replace=False, shuffle=False)
        taken = set(with_positive.tolist())
        with_negative: list[int] = []
        while len(with_negative) < quarter:
            index = int(rng.integers(len(self.classes.of_image)))
            if index not in taken:
                taken.add(index)
                with_negative.append(index)
        positives = [self._positive(int(index), rng) for index in with_positive]
        negatives = [self._negative(index, rng) for index in with_negative]
        return np.array([*with_positive, *with_negative, *positives, *negatives])

    def _positive(self, index: int, rng: np.random.Generator) -> int:
        members = self.classes.members(self.classes.of_image[index])
        while (partner := int(rng.choice(members))) == index:
            pass
        return partner

    def _negative(self, index: int, rng: np.random.Generator) -> int:
        of_image = self.classes.of_image
        while of_image[partner := int(rng.integers(len(of_image)))] == of_image[index]:
            pass
        return partner


class ClassBalancedBatchSampler:
    """P x K batches: P different random classes, K different random images of each, class by class.

    A class with fewer than K images gives each of them once and draws the rest among them again.

    Args:
        labels: (N,) class of every image.
        classes_per_batch: P.
        images_per_class: K.
        seed: another seed gives other batches.

    Raises:
        InputError: fewer than 2 classes, or fewer than P.
    """

    def __init__(
        self,
        labels: np.ndarray,
        classes_per_batch: int = 16,
        images_per_class: int = 4,
        seed: int = 0,
    ) -> None:
        self.classes = _Classes(labels)
        if classes_per_batch > len(self.classes.sizes):
            raise InputError(
                f"a batch of {classes_per_batch} classes x {images_per_class} images cannot be "
                f"drawn from {len(self.classes.sizes)} training classes: lower train.batch_size "
                "or raise train.images_per_class"
            )
        self.classes_per_batch = classes_per_batch
        self.images_per_class = images_per_class
        self.batch_size = classes_per_batch * images_per_class
        self.seed = seed

    def batch(self, step: int) -> np.ndarray:
        """Indices of the images of a step; -> (batch_size,)."""
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.choice(len(self.classes.sizes), self.classes_per_batch, replace=False)
        return np.concatenate([self._draw(int(index), rng) for index in chosen])

    def _draw(self, index: int, rng: np.random.Generator) -> np.ndarray:
        members = self.classes.members(index)
        drawn = rng.permutation(members)[: self.images_per_class]
        again = rng.choice(members, self.images_per_class - len(drawn))
        return np.concatenate([drawn, again])


class _Classes:
    """The images of every class: `members(c)` for the c-th class in the order of labels."""

    def __init__(self, labels: np.ndarray) -> None:
        names, self.of_image = np.unique(labels, return_inverse=True)
        if len(names) < 2:
            raise InputError(f"{len(names)} training class: a metric needs 2 or more to tell apart")
        self.sizes = np.bincount(self.of_image)
        self._by_class = np.argsort(self.of_image, kind="stable")
        self._first = np.concatenate([[0], np.cumsum(self.sizes)])

    def members(self, index: int) -> np.ndarray:
        return self._by_class[self._first[index] : self._first[index + 1]]
