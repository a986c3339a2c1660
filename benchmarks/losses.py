"""Eq. 10 of all learners and its gradient, against pytorch-metric-learning learner by learner.

    python benchmarks/losses.py [--rounds N]

Both compute the sum over learners of the squared-distance contrastive loss with margin 1 on the
same embeddings (M = 8, d = 64), divided by the number of images, and its gradient; what they give
is compared first. They take turns; times are medians over the rounds. Eqs. 8 and 9 on top (the
divergence loss, which the library has not) are measured apart. The last line of the output is the
result as one JSON object, which also goes to benchmarks/losses.json.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import options_of, publish, rounded, take_turns
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.reducers import SumReducer
from torch import Tensor

from abe.losses import contrastive_loss, ensemble_loss

LEARNERS, DIM, IMAGES_PER_CLASS = 8, 64, 4
BATCHES = (64, 128, 256, 512)


def compare(batch: int, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(batch, LEARNERS, DIM, generator=generator)
    embeddings = torch.nn.functional.normalize(vectors, dim=-1).requires_grad_()
    labels = torch.arange(batch // IMAGES_PER_CLASS).repeat_interleave(IMAGES_PER_CLASS)
    library = ContrastiveLoss(
        pos_margin=0,
        neg_margin=1,
        distance=LpDistance(normalize_embeddings=False, p=2, power=2),
        reducer=SumReducer(),
    )

    def with_gradient(loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        embeddings.grad = None
        value = loss()
        value.backward()
        assert embeddings.grad is not None
        return value.detach(), embeddings.grad

    def ours() -> tuple[Tensor, Tensor]:
        return with_gradient(lambda: contrastive_loss(embeddings, labels).sum())

    def theirs() -> tuple[Tensor, Tensor]:
        learners = embeddings.unbind(1)
        return with_gradient(lambda: sum(library(one, labels) for one in learners) / batch)

    def whole() -> tuple[Tensor, Tensor]:
        return with_gradient(lambda: ensemble_loss(embeddings, labels).total)

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    seconds = take_turns({"ours": ours, "theirs": theirs, "whole": whole}, rounds)
    return rounded(
        {
            "ms": 1e3 * seconds["ours"],
            "pytorch_metric_learning_ms": 1e3 * seconds["theirs"],
            "ratio": seconds["ours"] / seconds["theirs"],
            "with_divergence_ratio": seconds["whole"] / seconds["theirs"],
        }
    )


def main() -> None:
    options = options_of(__doc__, __file__, rounds=20).parse_args()
    result = {}
    for batch in BATCHES:
        result[str(batch)] = found = compare(batch, options.rounds)
        print(f"batch {batch}: {found['ratio']:.3f} of pytorch-metric-learning's time", flush=True)
    shapes = {"learners": LEARNERS, "dim": DIM}
    publish(options.output, {**shapes, "rounds": options.rounds, "batches": result})


if __name__ == "__main__":
    main()
