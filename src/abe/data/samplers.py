"""Mini-batches as pure functions of a seed and the step.

A sampler remembers nothing: `batch(step)` is the same whenever and wherever it is asked for, so
the step is all that a checkpoint has to hold. A batch takes no pass over the data set; only an
epoch of `EpochBatchSampler` does.
"""

from __future__ import annotations

import numpy as np

from abe.errors import InputError


class PairBatchSampler:
    """The paper's mini-batch (section 4): random images, each with a positive or negative partner.

    `batch` holds four quarters: images 0 and 1, their partners 2 and 3. The images of quarters 0
    and 1 are all different; a partner in 2 is another image of the same class as its image in 0, a
    partner in 3 is an image of another class than its image in 1. Partners are drawn on their own,
    so one may be in the batch already. Departure from the paper, which does not mention them:
    images of classes with a single image are never in quarter 0.

    Args:
        labels: (N,) class of every image.
        batch_size: divisible by 4; the paper's is 64.
        seed: another seed gives other batches.

    Raises:
        InputError: a batch size that is not divisible by 4 or too large for the images, fewer than
            2 classes, or only classes with a single image.
    """

    def __init__(self, labels: np.ndarray, batch_size: int = 64, seed: int = 0) -> None:
        if batch_size < 4 or batch_size % 4:
            raise InputError(
                f"train.batch_size={batch_size}: pairs, half of them positive, need a multiple of 4"
            )
        self.batch_size = batch_size
        self._seed = seed
        self._classes = _Classes(labels)
        self._with_positive = np.flatnonzero(self._classes.sizes[self._classes.of_image] > 1)
        quarter = batch_size // 4
        if len(labels) < 2 * quarter or len(self._with_positive) < quarter:
            raise InputError(
                f"train.batch_size={batch_size} takes {2 * quarter} different images, {quarter} of "
                f"them with another image of their class: there are {len(labels)} and "
                f"{len(self._with_positive)}, lower it"
            )

    def batch(self, step: int) -> np.ndarray:
        """Indices of the images of a step; -> (batch_size,)."""
        rng = _generator(self._seed, step)
        quarter = self.batch_size // 4
        first = rng.choice(self._with_positive, quarter, replace=False)
        # At most a quarter of these are in `first` already.
        spare = rng.choice(len(self._classes.of_image), 2 * quarter, replace=False)
        second = spare[~np.isin(spare, first)][:quarter]
        positives, negatives = self._positives(first, rng), self._negatives(second, rng)
        return np.concatenate([first, second, positives, negatives])

    def _positives(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each image any other one of its class: a draw that skips the image's own place."""
        classes = self._classes
        of_image = classes.of_image[images]
        place = classes.first[of_image] + rng.integers(classes.sizes[of_image] - 1)
        return classes.members[place + (place >= classes.place[images])]

    def _negatives(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each image any one of another class: a draw that skips the places of its class."""
        classes = self._classes
        of_image = classes.of_image[images]
        first, sizes = classes.first[of_image], classes.sizes[of_image]
        place = rng.integers(len(classes.of_image) - sizes)
        return classes.members[place + np.where(place >= first, sizes, 0)]


class ClassBalancedBatchSampler:
    """P x K batches: P different random classes, K random images of each, class after class.

    The images of a class are different, except where it has fewer than K: then the batch holds each
    of them once, and the rest is drawn among them again.

    Args:
        labels: (N,) class of every image.
        classes_per_batch: P, 2 or more.
        images_per_class: K, 2 or more.
        seed: another seed gives other batches.

    Raises:
        InputError: fewer than 2 classes or than P, only classes with a single image, or P or K
            below 2.
    """

    def __init__(
        self,
        labels: np.ndarray,
        classes_per_batch: int = 16,
        images_per_class: int = 4,
        seed: int = 0,
    ) -> None:
        if classes_per_batch < 2 or images_per_class < 2:
            raise InputError(
                f"a batch of {classes_per_batch} classes x {images_per_class} images has no "
                "negative or no positive pair: both have to be 2 or more"
            )
        self._classes = _Classes(labels)
        if classes_per_batch > len(self._classes.sizes):
            raise InputError(
                f"a batch of {classes_per_batch} classes x {images_per_class} images cannot be "
                f"drawn from {len(self._classes.sizes)} training classes: lower train.batch_size "
                "or raise train.images_per_class"
            )
        self._classes_per_batch = classes_per_batch
        self._images_per_class = images_per_class
        self._seed = seed
        self.batch_size = classes_per_batch * images_per_class

    def batch(self, step: int) -> np.ndarray:
        """Indices of the images of a step; -> (batch_size,)."""
        rng = _generator(self._seed, step)
        chosen = rng.choice(len(self._classes.sizes), self._classes_per_batch, replace=False)
        return np.concatenate([self._images(index, rng) for index in chosen])

    def _images(self, index: int, rng: np.random.Generator) -> np.ndarray:
        first, size = self._classes.first[index], self._classes.sizes[index]
        members = self._classes.members[first : first + size]
        drawn = rng.choice(members, min(size, self._images_per_class), replace=False)
        again = rng.choice(members, self._images_per_class - len(drawn))
        return np.concatenate([drawn, again])


class EpochBatchSampler:
    """Batches of a classifier: every epoch takes the images in an order of its own.

    What is left of an epoch, fewer images than a batch, is passed over: others in each.

    Args:
        num_images: N.
        batch_size: 1 to N.
        seed: another seed gives other batches.

    Attributes:
        steps_per_epoch: whole batches that there are of N images.

    Raises:
        InputError: there are fewer images than a batch has.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int = 0) -> None:
        if num_images < batch_size:
            raise InputError(
                f"batch_size={batch_size}, but there are {num_images} images to learn from: "
                "lower it"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = num_images // batch_size
        self._num_images = num_images
        self._seed = seed
        self._drawn: tuple[int, np.ndarray] | None = None  # the latest epoch's order

    def batch(self, step: int) -> np.ndarray:
        """Indices of the images of a step; -> (batch_size,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, _generator(self._seed, epoch).permutation(self._num_images)
        return self._drawn[1][place * self.batch_size :][: self.batch_size]


class _Classes:
    """The images sorted by class: the c-th one's are `members[first[c] : first[c] + sizes[c]]`.

    `of_image` (N,) is each image's c, `place` (N,) where it is in `members`.
    """

    def __init__(self, labels: np.ndarray) -> None:
        classes, self.of_image = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise InputError(
                f"{len(classes)} training classes: an embedding is learned from 2 or more"
            )
        self.sizes = np.bincount(self.of_image)
        if self.sizes.max() < 2:
            raise InputError("every training class has a single image: none has a positive pair")
        self.first = np.cumsum(self.sizes) - self.sizes
        self.members = np.argsort(self.of_image, kind="stable")
        self.place = np.empty_like(self.members)
        self.place[self.members] = np.arange(len(self.members))


def _generator(seed: int, step: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step,)))
