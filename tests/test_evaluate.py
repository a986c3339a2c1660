"""Embedding and scoring: against loops, and independent of batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from abe.config import Config, DataConfig, ModelConfig
from abe.data.splits import open_splits
from abe.data.synthetic import SyntheticVehicles
from abe.data.transforms import Preprocessing
from abe.evaluate import (
    embed,
    evaluate_baselines,
    evaluate_test,
    pair_cosines,
    raw_pixels,
    score,
    similarity,
)
from abe.intervals import unpack, unpack_classes
from abe.metrics import recall_at_k
from abe.model import AttentionEnsemble, concat

CPU = torch.device("cpu")
TINY = Config(
    device="cpu",
    precision="fp32",
    model=ModelConfig(num_learners=2, embedding_dim=8),
    data=DataConfig(resize=48, crop=40, synthetic_classes=8, synthetic_images=3),
).with_overrides(["data.val_classes=0.5"])


@pytest.fixture(scope="module")
def learners() -> tuple[torch.Tensor, np.ndarray]:
    labels = np.repeat(np.arange(6), 5)
    noise = torch.randn(30, 3, 4, generator=torch.Generator().manual_seed(0))
    centres = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))
    return F.normalize(centres[labels] + noise, dim=-1), labels


def test_pair_cosines_are_those_of_fig_5(learners: tuple[torch.Tensor, np.ndarray]) -> None:
    embeddings, labels = learners
    expected: dict[str, list[float]] = {"positive": [], "negative": [], "self": []}
    for i in range(30):
        for p in range(3):
            for q in range(3):
                if p != q:
                    expected["self"].append(float(embeddings[i, p] @ embeddings[i, q]))
            for j in range(30):
                if i != j:
                    kind = "positive" if labels[i] == labels[j] else "negative"
                    expected[kind].append(float(embeddings[i, p] @ embeddings[j, p]))
    found = pair_cosines(embeddings, torch.as_tensor(labels))
    for kind, values in expected.items():
        torch.testing.assert_close(found[kind].sort().values, torch.tensor(values).sort().values)
    means = similarity(embeddings, torch.as_tensor(labels))
    assert means == pytest.approx({kind: np.mean(v) for kind, v in expected.items()}, abs=1e-6)


def test_classes_are_recorded_of_the_queries_that_have_a_match() -> None:
    """A class of one image has no other to find: neither its hit nor its class is recorded."""
    splits = open_splits(TINY.data, "val", Console(quiet=True))
    labels = splits.test.labels
    alone = np.flatnonzero(labels == labels[0])[1:]  # all but one of a class
    fewer = replace(splits, test=splits.test.select(np.delete(np.arange(len(labels)), alone)))
    with pytest.warns(UserWarning, match="1 of"):
        found = evaluate_test(raw_pixels, TINY, fewer, Preprocessing(resize=48, crop=40))
    hits = found.record["scores"]["hits@1"]
    answered = labels[labels != labels[0]]
    assert len(unpack(hits)) == len(answered)
    np.testing.assert_array_equal(
        np.unique(unpack_classes(hits["classes"]), return_counts=True)[1],
        np.unique(answered, return_counts=True)[1],
    )


def test_a_single_learner_has_no_self_pairs(learners: tuple[torch.Tensor, np.ndarray]) -> None:
    embeddings, labels = learners
    assert similarity(embeddings[:, :1], torch.as_tensor(labels))["self"] is None


def test_scores_are_those_of_the_ensemble_and_of_each_learner(
    learners: tuple[torch.Tensor, np.ndarray],
) -> None:
    embeddings, labels = learners
    scores = score(embeddings, labels, ks=[1, 4])
    classes = torch.as_tensor(labels)
    ensemble = recall_at_k(concat(embeddings), classes, [1, 4])
    assert [scores["ensemble"][f"recall@{k}"] for k in (1, 4)] == [ensemble[1], ensemble[4]]
    for m, learner in enumerate(scores["learners"]):
        assert learner["recall@1"] == recall_at_k(embeddings[:, m], classes, [1])[1]
        assert set(learner) == {"recall@1", "recall@4", "map@r", "r_precision", "nmi", "hits@1"}
        assert unpack(learner["hits@1"]).mean() == learner["recall@1"]
    whole = concat(embeddings).double()
    nearest = torch.cdist(whole, whole).fill_diagonal_(torch.inf).argmin(1)
    hits = unpack(scores["hits@1"]).tolist()
    assert hits == (classes[nearest] == classes).tolist()
    first = embeddings[:, 0].double()
    alone = torch.cdist(first, first).fill_diagonal_(torch.inf).argmin(1)
    assert hits != (classes[alone] == classes).tolist()


def test_the_order_of_the_queries_is_told() -> None:
    splits = open_splits(TINY.data, "val", Console(quiet=True))
    turned = replace(splits, test=splits.test.select(np.arange(len(splits.test))[::-1]))
    assert turned.test_order != splits.test_order
    assert turned.digest == splits.digest
    record = evaluate_test(raw_pixels, TINY, turned, Preprocessing(resize=48, crop=40)).record
    assert record["scores"]["hits@1"]["order"] == turned.test_order


def test_of_very_many_classes_there_is_no_nmi(
    learners: tuple[torch.Tensor, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abe.evaluate.NMI_CLASSES", 5)
    assert "nmi" not in score(*learners, ks=[1])["ensemble"]


def test_embeddings_do_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(0)
    model = AttentionEnsemble(2, 8).eval()
    images = SyntheticVehicles(4, 2, size=40)
    preprocessing = Preprocessing(resize=40, crop=32)
    done: list[int] = []
    whole = embed(model, images, preprocessing, device=CPU, batch_size=3, on_progress=done.append)
    assert done == [3, 6, 8]
    assert whole.shape == (8, 2, 4)
    single = embed(model, images, preprocessing, device=CPU, batch_size=1)
    torch.testing.assert_close(whole, single)


def test_raw_pixels_are_the_shrunk_image() -> None:
    images = torch.rand(2, 3, 8, 8)
    found = raw_pixels(images, side=2)
    for image, embedding in zip(images, found, strict=True):
        blocks = [
            image[c, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean()
            for c in range(3)
            for y in range(2)
            for x in range(2)
        ]
        expected = torch.stack(blocks) / torch.stack(blocks).norm()
        torch.testing.assert_close(embedding[0], expected)


def test_baselines_are_pixels_and_the_start() -> None:
    baselines = evaluate_baselines(TINY, open_splits(TINY.data, TINY.protocol))
    assert list(baselines) == ["raw pixels", "pretrained start"]
    record, embeddings, _ = baselines["pretrained start"]
    assert embeddings.shape == (12, 1, 1024)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(12, 1))
    assert record["weights"]["source"] == "googlenet-mini-imagenet-v2"
    record, embeddings, gallery = baselines["raw pixels"]
    assert gallery is None
    assert embeddings.shape == (12, 1, 3 * 32 * 32)
    assert record["weights"] is None
    assert record["selected_step"] is None
    classes = unpack_classes(record["scores"]["hits@1"]["classes"])
    assert classes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_the_pretrained_start_of_tails_is_scored_without_their_noise() -> None:
    splits = open_splits(TINY.data, TINY.protocol)
    of_heads, of_tails = (
        evaluate_baselines(TINY.with_overrides([f"model.network={name}"]), splits)
        for name in ("m-heads", "m-tails")
    )
    torch.testing.assert_close(
        of_tails["pretrained start"].embeddings, of_heads["pretrained start"].embeddings
    )


@pytest.mark.parametrize("sizes", [[1200, 1200], [5] * 4000, [2000, 3, 3], [30] * 100])
def test_pairs_of_large_sets_are_of_every_kind(sizes: list[int]) -> None:
    """Classes of 5 images as in Stanford Online Products, or so large that one fills the sample."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    embeddings = torch.nn.functional.normalize(torch.ones(len(labels), 2, 3), dim=-1)
    cosines = pair_cosines(embeddings, labels)
    assert all(len(cosines[kind]) > 600 for kind in ("positive", "negative", "self"))
