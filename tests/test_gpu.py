"""What a CUDA device computes against what the CPU does; skipped loudly where there is none."""

import shutil

import pytest
import torch
from helpers import TINY

from abe.checkpoint import checkpoints, load_latest
from abe.evaluate import evaluate_run
from abe.losses import ensemble_loss
from abe.metrics import retrieval_metrics
from abe.model import AttentionEnsemble
from abe.model.weights import load_pretrained, read_weights
from abe.runtime import autocast, choose_precision
from abe.train import Trainer

pytestmark = pytest.mark.gpu


@pytest.fixture
def exact(monkeypatch):
    """Without TF32, which PyTorch's convolutions have on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def loss_and_gradients(model, images, labels, precision):
    model.zero_grad()
    with autocast(images.device, precision):
        embeddings = model(images)
    loss = ensemble_loss(embeddings, labels, normalization="balanced").total
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def apart(found, expected):
    """Relative to the length of what is expected."""
    found = found.cpu().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_float64(precision, exact):
    torch.manual_seed(0)
    model = AttentionEnsemble(num_learners=4, embedding_dim=64)
    load_pretrained(model.backbone_parts(), read_weights("googlenet-mini-imagenet-v2"))
    images = 50 * torch.randn(8, 3, 96, 96)
    labels = torch.arange(4).repeat_interleave(2)
    expected = loss_and_gradients(model.double(), images.double(), labels, "fp32")
    expected = [tensor.clone() for tensor in expected]
    model.float().cuda()
    found = loss_and_gradients(model, images.cuda(), labels.cuda(), precision)
    loss, *gradients = map(apart, found, expected)
    assert loss < (1e-5 if precision == "fp32" else 0.01)
    assert max(gradients) < (0.01 if precision == "fp32" else 0.3)


def test_a_gpu_with_bfloat16_takes_it():
    capable = torch.cuda.get_device_capability() >= (8, 0)
    assert choose_precision("auto", torch.device("cuda")) == ("bf16" if capable else "fp32")


def test_metrics_are_those_of_the_cpu():
    embeddings = torch.nn.functional.normalize(
        torch.randn(500, 32, generator=torch.Generator().manual_seed(0)), dim=1
    )
    labels = torch.arange(50).repeat(10)
    here, hits = retrieval_metrics(embeddings, labels, [1, 2, 4])
    there, hits_there = retrieval_metrics(embeddings.cuda(), labels, [1, 2, 4])
    assert here == pytest.approx(there, abs=1e-12)
    assert (hits == hits_there).all()


def test_a_run_on_the_gpu_goes_on_and_is_scored_again(tmp_path):
    """From pretrained weights: what random ones embed alike, rounding puts into any order."""
    config = TINY.with_overrides(
        [
            "device=cuda",
            "precision=auto",
            "model.weights=googlenet-mini-imagenet-v2",
            "data.synthetic_classes=12",
            "data.synthetic_images=8",
            "data.resize=80",
            "data.crop=64",
            "train.lr=0.001",
        ]
    )
    whole = Trainer(config, tmp_path / "whole").fit()
    assert whole["environment"]["gpu"] == torch.cuda.get_device_name()

    run = tmp_path / "stopped"
    Trainer(config, run).fit()
    newest = checkpoints(run)[-1]
    assert load_latest(run).step == 3
    shutil.rmtree(newest)
    (run / "result.json").unlink()
    assert load_latest(run).step < 3
    resumed = Trainer.resume(run).fit()
    on_cpu = evaluate_run(run, device="cpu")
    assert on_cpu["environment"]["gpu"] is None
    for record in (resumed, evaluate_run(run), on_cpu):
        assert record["selected_step"] == whole["selected_step"]
        assert record["scores"]["ensemble"] == pytest.approx(whole["scores"]["ensemble"], abs=0.1)
