"""Losses of pytorch-metric-learning in place of Eq. 10, one instance for each learner."""

from __future__ import annotations

import ast
import copy
import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abe.errors import InputError


class PerLearnerLoss(nn.Module):
    """One loss for each learner, each with its own parameters, if it has any.

    Args:
        losses: M modules that take (embeddings (B, d), labels (B,)) and give a scalar.
    """

    def __init__(self, losses: Iterable[nn.Module]) -> None:
        super().__init__()
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
            name = type(self.losses[0]).__name__
            raise InputError(
                f"metric loss {name!r} refuses the batch ({error}): change train.sampler or "
                "train.batch_size, or choose another train.metric_loss"
            ) from error


def metric_loss_from_spec(
    spec: str, *, num_learners: int, learner_dim: int, num_classes: int
) -> PerLearnerLoss:
    """A loss of pytorch-metric-learning by name and arguments, for each learner.

    Losses with proxies or class weights (`ProxyAnchorLoss`, `SoftTripleLoss`, `ArcFaceLoss` ...)
    need labels 0 to num_classes - 1. Their parameters are those of the returned module: give them
    to the optimiser and save them with the model.

    Args:
        spec: such as "MultiSimilarityLoss(alpha=2)" or "ProxyAnchorLoss". Arguments are keywords
            with literal values; nothing is evaluated. A number of classes or a size of embeddings
            that the loss requires is filled in.
        num_learners: M.
        learner_dim: d.
        num_classes: classes that are trained on.

    Raises:
        InputError: spec is not of this form, names no such loss or argument, or the loss fails
            two steps of a trial, with finite values and gradients.
    """
    from pytorch_metric_learning import losses

    name, arguments = _parse(spec)
    known: dict[str, Any] = {
        key: value
        for key, value in vars(losses).items()
        if inspect.isclass(value)
        and issubclass(value, losses.BaseMetricLossFunction)
        and value is not losses.BaseMetricLossFunction
    }
    if name not in known:
        raise InputError(
            f"metric loss {name!r} is not one of pytorch-metric-learning's that take embeddings "
            f"and labels{_nearest(name, known)}"
        )
    parameters = _constructor_parameters(known[name])
    for key in arguments:
        if key not in parameters:
            raise InputError(f"{name} has no argument {key!r}{_nearest(key, parameters)}")
    sizes = {
        "num_classes": num_classes,
        "embedding_size": learner_dim,
        "descriptors_dim": learner_dim,  # P2SGradLoss
    }
    required = {key for key, value in parameters.items() if value.default is value.empty}
    arguments = {key: sizes[key] for key in sizes.keys() & required} | arguments

    try:
        loss = PerLearnerLoss(known[name](**arguments) for _ in range(num_learners))
        _try(copy.deepcopy(loss.losses[0]), learner_dim, num_classes)
    except Exception as error:  # whatever a loss of another library raises on what it was given
        raise InputError(
            f"metric loss {spec!r} cannot be used: {error}. Correct its arguments or choose another"
        ) from error
    return loss


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of "Name(key=literal)" or "Name"."""
    try:
        call = ast.parse(spec.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
            if len(arguments) == len(call.keywords):  # no **mapping
                return call.func.id, arguments
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        pass
    raise InputError(
        f"metric loss {spec!r}: write a name and keyword arguments with literal values, "
        "such as 'MultiSimilarityLoss(alpha=2, beta=50)'"
    )


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
