"""Losses of pytorch-metric-learning, by name, for each learner."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses, miners

from abe.errors import InputError
from abe.losses import divergence_loss, ensemble_loss
from abe.metric_losses import metric_loss_from_spec

SIZES = {"num_learners": 3, "learner_dim": 8, "num_classes": 5}
WITH_PARAMETERS = {
    "ArcFaceLoss": (8, 5),
    "CosFaceLoss": (8, 5),
    "NormalizedSoftmaxLoss": (8, 5),
    "ProxyAnchorLoss": (5, 8),
    "ProxyNCALoss": (5, 8),
    "SoftTripleLoss": (8, 50),
    "SubCenterArcFaceLoss(sub_centers=2)": (8, 10),
}
WITHOUT_PARAMETERS = [
    "AngularLoss",
    "CircleLoss",
    "ContrastiveLoss(neg_margin=0.5)",
    "FastAPLoss(num_bins=8)",
    "LiftedStructureLoss",
    "MarginLoss",
    "MultiSimilarityLoss(alpha=2, beta=50, base=0.5)",
    "NCALoss",
    "NTXentLoss(temperature=0.1)",
    "RankedListLoss(margin=0.4, Tn=1)",
    "SmoothAPLoss",
    "SupConLoss",
    "ThresholdConsistentMarginLoss",
    "TripletMarginLoss(margin=0.2, swap=True, triplets_per_anchor='all')",
]


REFUSED = {  # what the message says of those that PerLearnerLoss cannot use by their name alone
    "BaseLossWrapper": "is not one of",
    "BaseMetricLossFunction": "is not one of",
    "CrossBatchMemory": "is not one of",
    "DynamicSoftMarginLoss": "cannot be used: Trying to backward .* a second time",
    "EmbeddingRegularizerMixin": "is not one of",
    "GenericPairLoss": "cannot be used: .* 'mat_based_loss'",
    "ManifoldLoss": "cannot be used: .* argument: 'l'",
    "MultipleLosses": "is not one of",
    "RankedListLoss": "cannot be used: .* 'margin' and 'Tn'",
    "SelfSupervisedLoss": "is not one of",
    "VICRegLoss": "cannot be used: labels",
    "WeightRegularizerMixin": "is not one of",
}


REFUSED_MINERS = {
    "BaseMiner": "is not one of",
    "BaseTupleMiner": "is not one of",
    "BaseSubsetBatchMiner": "is not one of",
    "EmbeddingsAlreadyPackagedAsTriplets": "cannot be used",
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(10, 3, 8, generator=generator), dim=-1)
    return embeddings.requires_grad_(), torch.arange(10) % 5


@pytest.mark.parametrize("spec", [*WITHOUT_PARAMETERS, *WITH_PARAMETERS])
def test_losses_give_one_value_for_each_learner(spec, batch):
    embeddings, labels = batch
    values = metric_loss_from_spec(spec, **SIZES)(embeddings, labels)
    assert values.shape == (3,)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert embeddings.grad.isfinite().all()
    assert (embeddings.grad.abs().sum((0, 2)) > 0).all()


@pytest.mark.filterwarnings(
    "ignore:Using a non-tuple sequence",  # HistogramLoss
    "ignore:__array_wrap__ must accept context",  # SphereFaceLoss, LargeMarginSoftmaxLoss
)
@pytest.mark.parametrize("name", [key for key, v in vars(losses).items() if inspect.isclass(v)])
def test_every_loss_of_the_library_trains_or_is_refused(name, batch):
    embeddings, labels = batch
    if name in REFUSED:
        with pytest.raises(InputError, match=f"{name}' {REFUSED[name]}"):
            metric_loss_from_spec(name, **SIZES)
        return
    loss = metric_loss_from_spec(name, **SIZES)
    for _ in range(2):
        values = loss(embeddings, labels)
        assert values.shape == (3,)
        embeddings.grad = None
        values.sum().backward()
        assert embeddings.grad.isfinite().all()
        assert (embeddings.grad.abs().sum((0, 2)) > 0).all()


def test_the_trial_leaves_no_trace():
    """P2SGradLoss normalises its weights whenever it is called."""
    torch.manual_seed(0)
    loss = metric_loss_from_spec("P2SGradLoss", **SIZES)
    torch.manual_seed(0)
    for learner in loss.losses:
        fresh = losses.P2SGradLoss(descriptors_dim=8, num_classes=5)
        assert torch.equal(learner.weight, fresh.weight)
        assert learner.weight.grad is None


def test_values_are_those_of_the_library(batch):
    embeddings, labels = batch
    loss = metric_loss_from_spec("MultiSimilarityLoss(alpha=2, base=0.25)", **SIZES)
    reference = losses.MultiSimilarityLoss(alpha=2, base=0.25)
    expected = torch.stack([reference(embeddings[:, m], labels) for m in range(3)])
    torch.testing.assert_close(loss(embeddings, labels), expected)
    assert not torch.allclose(
        expected, metric_loss_from_spec("MultiSimilarityLoss", **SIZES)(embeddings, labels)
    )


@pytest.mark.parametrize("name", [key for key, v in vars(miners).items() if inspect.isclass(v)])
def test_every_miner_of_the_library_trains_or_is_refused(name, batch):
    embeddings, labels = batch
    if name in REFUSED_MINERS:
        with pytest.raises(InputError, match=f"{name}' {REFUSED_MINERS[name]}"):
            metric_loss_from_spec(f"MarginLoss + {name}", **SIZES)
        return
    loss = metric_loss_from_spec(f"MarginLoss + {name}", **SIZES)
    values = loss(embeddings, labels)
    assert values.shape == (3,)
    values.sum().backward()
    assert embeddings.grad.isfinite().all()


def test_a_loss_is_of_what_its_miner_picks(batch):
    embeddings, labels = batch
    spec = "MarginLoss(margin=0.3) + DistanceWeightedMiner(cutoff=0.6)"
    loss = metric_loss_from_spec(spec, **SIZES)
    torch.manual_seed(0)
    values = loss(embeddings, labels)
    torch.manual_seed(0)
    reference, miner = losses.MarginLoss(margin=0.3), miners.DistanceWeightedMiner(cutoff=0.6)
    learners = [embeddings[:, m] for m in range(3)]
    expected = [reference(one, labels, miner(one, labels)) for one in learners]
    torch.testing.assert_close(values, torch.stack(expected))
    alone = metric_loss_from_spec("MarginLoss(margin=0.3)", **SIZES)(embeddings, labels)
    assert not torch.allclose(values, alone)


def test_parameters_of_a_mined_loss_are_trained_and_saved(batch):
    embeddings, labels = batch
    spec = "MarginLoss(learn_beta=True, num_classes=5) + DistanceWeightedMiner"
    loss = metric_loss_from_spec(spec, **SIZES)
    assert [tuple(p.shape) for p in loss.parameters()] == [(5,)] * 3
    loss(embeddings, labels).sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in loss.parameters())
    assert len(loss.state_dict()) == 3


@pytest.mark.parametrize("spec", WITH_PARAMETERS)
def test_own_parameters_are_sized_trained_and_saved(spec, batch):
    embeddings, labels = batch
    loss = metric_loss_from_spec(spec, **SIZES)
    assert [tuple(p.shape) for p in loss.parameters()] == [WITH_PARAMETERS[spec]] * 3
    first, second, _ = loss.parameters()
    assert not torch.equal(first, second)

    before = loss(embeddings, labels)
    before.sum().backward()
    torch.optim.SGD(loss.parameters(), lr=1e-3).step()
    after = loss(embeddings, labels)
    assert (after < before).all()

    restored = metric_loss_from_spec(spec, **SIZES)
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(restored(embeddings, labels), after)


def test_a_size_that_is_given_is_kept():
    loss = metric_loss_from_spec("ProxyAnchorLoss(num_classes=9)", **SIZES)
    assert next(loss.parameters()).shape == (9, 8)


def test_a_single_class_or_dimension_can_be_tried():
    sizes = {"num_learners": 1, "learner_dim": 1, "num_classes": 1}
    assert metric_loss_from_spec("ProxyAnchorLoss", **sizes)(
        torch.ones(4, 1, 1), torch.zeros(4, dtype=torch.int64)
    ).isfinite()


def test_losses_are_float32_under_autocast(batch):
    embeddings, labels = batch
    loss = metric_loss_from_spec("ProxyAnchorLoss", **SIZES)
    expected = loss(embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(embeddings, labels), expected)
        assert loss(embeddings.bfloat16(), labels).dtype == torch.float32


def test_it_stands_in_for_equation_10(batch):
    embeddings, labels = batch
    loss = metric_loss_from_spec("SupConLoss", **SIZES)
    total, metric, divergence = ensemble_loss(embeddings, labels, metric_loss=loss)
    assert torch.equal(metric, loss(embeddings, labels))
    assert torch.equal(divergence, divergence_loss(embeddings))
    assert torch.equal(total, metric.sum() + divergence)


def test_a_batch_that_the_loss_refuses(batch):
    embeddings, labels = batch
    loss = metric_loss_from_spec("SmoothAPLoss", **SIZES)
    with pytest.raises(InputError, match=r"'SmoothAPLoss' refuses the batch \(All classes must"):
        loss(embeddings[1:], labels[1:])


@pytest.mark.parametrize(
    "error", [RuntimeError, ValueError, IndexError, KeyError, AssertionError, TypeError]
)
def test_a_batch_is_refused_by_any_error(error, batch, monkeypatch):
    loss = metric_loss_from_spec("SupConLoss", **SIZES)

    def refuse(*args):
        raise error("of a size")

    monkeypatch.setattr(loss.losses[1], "forward", refuse)
    with pytest.raises(InputError, match=r"'SupConLoss' refuses the batch \(.*of a size"):
        loss(*batch)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_not_the_batchs_fault(error, batch, monkeypatch):
    loss = metric_loss_from_spec("SupConLoss", **SIZES)

    def fail(*args):
        raise error

    monkeypatch.setattr(loss.losses[0], "forward", fail)
    with pytest.raises(type(error)) as caught:
        loss(*batch)
    assert caught.value is error


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("MultiSimilarityLos(alpha=2)", "'MultiSimilarityLos' .* mean 'MultiSimilarityLoss'"),
        ("Zebra", "'Zebra' is not one of pytorch-metric-learning's .* labels$"),
        ("BaseMetricLossFunction", "'BaseMetricLossFunction' is not one of"),
        ("CrossBatchMemory(memory_size=8)", "'CrossBatchMemory' is not one of"),
        ("MultiSimilarityLoss(alhpa=2)", "has no argument 'alhpa': did you mean 'alpha'"),
        ("MultiSimilarityLoss(alpha='two')", "alpha='two'.* cannot be used"),
        ("NTXentLoss(temperature=0.0)", r"temperature=0.0\)' cannot be used: step 1 .*nan"),
        ("RankedListLoss(Tn=10)", "cannot be used: .* 'margin'"),
        ("GenericPairLoss(mat_based_loss=True)", "cannot be used"),
        ("VICRegLoss", "cannot be used"),
        ("MultiSimilarityLoss(2)", "keyword arguments with literal values"),
        ("MultiSimilarityLoss(**{'alpha': 2})", "keyword arguments with literal values"),
        ("MultiSimilarityLoss(alpha=2", "keyword arguments with literal values"),
        ("losses.SupConLoss()", "keyword arguments with literal values"),
        ("MarginLoss + DistanceWeightedMine", "miner 'DistanceWeightedMine' .* mean 'DistanceW"),
        ("MarginLoss + DistanceWeightedMiner(cut=1)", "has no argument 'cut': did you .* 'cutoff'"),
        ("MarginLoss + MarginLoss", "miner 'MarginLoss' is not one of"),
        ("DistanceWeightedMiner + MarginLoss", "loss 'DistanceWeightedMiner' is not one of"),
        ("MarginLoss - DistanceWeightedMiner", "a miner added to it"),
        ("MarginLoss + HDCMiner + HDCMiner", "a miner added to it"),
        ("", "write a name"),
        ("(" * 500, "write a name"),
    ],
)
def test_what_cannot_be_used(spec, message):
    with pytest.raises(InputError, match=message):
        metric_loss_from_spec(spec, **SIZES)


@pytest.mark.parametrize(
    "spec",
    [
        "SupConLoss(temperature=open('made', 'w'))",
        "open('made', 'w')",
        "(lambda: open('made', 'w'))()",
        "SupConLoss(temperature=[open('made', 'w') for _ in '1'])",
    ],
)
def test_nothing_is_evaluated(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="write a name"):
        metric_loss_from_spec(spec, **SIZES)
    assert not list(tmp_path.iterdir())


def test_slow_libraries_are_imported_on_use():
    code = (
        "import sys, abe.losses, abe.metric_losses, abe.metrics\n"
        "print([m for m in ('pytorch_metric_learning', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
