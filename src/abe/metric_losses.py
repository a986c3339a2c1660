"""Losses of pytorch-metric-learning in place of Eq. 10, with its miners, one for each learner."""

from __future__ import annotations

import ast
import copy
import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abe.errors import InputError


class PerLearnerLoss(nn.Module):
    """One loss for each learner, each with its own parameters, if it has any.

    Args:
        losses: M modules that take (embeddings (B, d), labels (B,)) and give a scalar.
        name: what to call them in messages.
    """

    def __init__(self, losses: Iterable[nn.Module], name: str) -> None:
        super().__init__()
        self.name = name
        self.losses = nn.ModuleList(losses)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, M, d), (B,) -> (M,), in float32 whatever autocast says.

        Raises:
            InputError: the loss refuses the batch, whatever it raises to say so; `SmoothAPLoss`,
                for one, wants equally many images of every class.
        """
        learners = zip(self.losses, embeddings.float().unbind(1), strict=True)
        try:
            with torch.autocast(embeddings.device.type, enabled=False):
                return torch.stack([loss(learner, labels) for loss, learner in learners])
        except (ValueError, RuntimeError, LookupError, AssertionError, TypeError) as error:
            if isinstance(error, RuntimeError) and "memory" in str(error):  # too little of it
                raise
            raise InputError(
                f"metric loss {self.name!r} refuses the batch ({error}): change train.sampler or "
                "train.batch_size, or choose another train.metric_loss"
            ) from error


class MinedLoss(nn.Module):
    """A loss of the pairs or triplets that a miner picks.

    Args:
        loss: takes (embeddings (B, d), labels (B,), what the miner picks) and gives a scalar.
        miner: takes (embeddings (B, d), labels (B,)).
    """

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, d), (B,) -> a scalar."""
        value: Tensor = self.loss(embeddings, labels, self.miner(embeddings, labels))
        return value


def metric_loss_from_spec(
    spec: str, *, num_learners: int, learner_dim: int, num_classes: int
) -> PerLearnerLoss:
    """A loss of pytorch-metric-learning by name and arguments, for each learner.

    A miner may be added to it: "MarginLoss + DistanceWeightedMiner(cutoff=0.5)" is the margin loss
    with distance-weighted sampling (Wu et al., 2017), "MultiSimilarityLoss +
    MultiSimilarityMiner" the whole of Wang et al., 2019.

    Losses with proxies or class weights (`ProxyAnchorLoss`, `SoftTripleLoss`, `ArcFaceLoss` ...)
    need labels 0 to num_classes - 1. Their parameters are those of the returned module: give them
    to the optimiser and save them with the model.

    Args:
        spec: such as "MultiSimilarityLoss(alpha=2)" or "ProxyAnchorLoss", and behind a "+" the
            miner, if any. Arguments are keywords with literal values; nothing is evaluated. A
            number of classes or a size of embeddings that the loss requires is filled in.
        num_learners: M.
        learner_dim: d.
        num_classes: classes that are trained on.

    Raises:
        InputError: spec is not of this form, names no such loss, miner or argument, or the loss
            fails two steps of a trial, with finite values and gradients.
    """
    from pytorch_metric_learning import losses, miners

    (name, arguments), *mined = _parse(spec)
    sizes = {
        "num_classes": num_classes,
        "embedding_size": learner_dim,
        "descriptors_dim": learner_dim,  # P2SGradLoss
    }
    build = _builder("metric loss", name, arguments, losses.BaseMetricLossFunction, losses, sizes)
    if mined:
        build = partial(
            _with_miner, build, _builder("miner", *mined[0], miners.BaseMiner, miners, {})
        )
    try:
        loss = PerLearnerLoss((build() for _ in range(num_learners)), spec)
        _try(copy.deepcopy(loss.losses[0]), learner_dim, num_classes)
    except Exception as error:  # whatever a loss of another library raises on what it was given
        raise InputError(
            f"metric loss {spec!r} cannot be used: {error}. Correct its arguments or choose another"
        ) from error
    return loss


def _builder(
    what: str,
    name: str,
    arguments: dict[str, Any],
    base: type,
    module: ModuleType,
    sizes: dict[str, int],
) -> Callable[[], nn.Module]:
    """What makes a loss or a miner of the library, with the sizes that it requires.

    Raises:
        InputError: there is none of that name, or it has no such argument.
    """
    known: dict[str, Any] = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and value is not base
    }
    if name not in known:
        raise InputError(
            f"{what} {name!r} is not one of pytorch-metric-learning's that take embeddings "
            f"and labels{_nearest(name, known)}"
        )
    parameters = _constructor_parameters(known[name])
    for key in arguments:
        if key not in parameters:
            raise InputError(f"{name} has no argument {key!r}{_nearest(key, parameters)}")
    required = {key for key, value in parameters.items() if value.default is value.empty}
    filled_in = {key: sizes[key] for key in sizes.keys() & required}
    return partial(known[name], **filled_in | arguments)


def _with_miner(loss: Callable[[], nn.Module], miner: Callable[[], nn.Module]) -> MinedLoss:
    return MinedLoss(loss(), miner())


def _parse(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of "Name(key=literal)" or "Name", one or two with a "+" between them."""
    try:
        whole = ast.parse(spec.strip(), mode="eval").body
        parts = [whole]
        if isinstance(whole, ast.BinOp) and isinstance(whole.op, ast.Add):
            parts = [whole.left, whole.right]
        return [_call(part) for part in parts]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise InputError(
            f"metric loss {spec!r}: write a name and keyword arguments with literal values, "
            "such as 'MultiSimilarityLoss(alpha=2, beta=50)', or a miner added to it, such as "
            "'MarginLoss + DistanceWeightedMiner'"
        ) from None


def _call(part: ast.expr) -> tuple[str, dict[str, Any]]:
    """Raises ValueError where it is something else."""
    if isinstance(part, ast.Name):
        return part.id, {}
    if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and not part.args:
        arguments = {k.arg: ast.literal_eval(k.value) for k in part.keywords if k.arg}
        if len(arguments) == len(part.keywords):  # no **mapping
            return part.func.id, arguments
    raise ValueError


def _constructor_parameters(loss: type) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a class, with those that its **kwargs hand to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in loss.__mro__:
        if "__init__" not in vars(base):
            continue
        own = inspect.signature(base).parameters.values()
        keywords = {p.name: p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        found = keywords | found
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def _nearest(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, choices, n=1)
    return f": did you mean {close[0]!r}?" if close else ""


def _try(loss: nn.Module, learner_dim: int, num_classes: int) -> None:
    """Two steps on random unit vectors, two of each class, from four classes at most.

    The second step is where a loss fails that keeps the first one's graph.

    Raises:
        ValueError: a value that is no finite scalar, or a gradient that is not finite.
        Exception: whatever the loss raises.
    """
    labels = torch.arange(min(num_classes, 4)).repeat_interleave(2)
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        vectors = torch.randn(len(labels), learner_dim, generator=generator)
        embeddings = F.normalize(vectors, dim=1).requires_grad_()
        value = loss(embeddings, labels)
        if value.numel() != 1 or not value.isfinite():
            raise ValueError(f"step {step} of a trial gives {value}")
        value.backward()
        if embeddings.grad is None or not embeddings.grad.isfinite().all():
            raise ValueError(f"step {step} of a trial gives no finite gradient")
