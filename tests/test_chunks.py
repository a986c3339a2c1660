"""Cached gradients: a batch in chunks has the gradient of the whole, and the memory of a chunk."""

from __future__ import annotations

import pytest
import torch

from abe.chunks import backward_in_chunks, embed_in_chunks
from abe.losses import ensemble_loss
from abe.model import AttentionEnsemble

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3])


@pytest.fixture(scope="module")
def model() -> AttentionEnsemble:
    torch.manual_seed(0)
    return AttentionEnsemble(2, 8).double()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(LABELS), 3, 32, 32, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_chunks_give_the_gradient_of_the_whole_batch(size: int, model, images) -> None:
    model.zero_grad()
    whole = ensemble_loss(model(images), LABELS).total
    whole.backward()
    expected = [parameter.grad for parameter in model.parameters()]

    model.zero_grad()
    embeddings = embed_in_chunks(model, images, size)
    assert not embeddings.requires_grad
    loss = ensemble_loss(embeddings.requires_grad_(), LABELS).total
    loss.backward()
    backward_in_chunks(model, images, embeddings.grad, size)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
    found = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_never_more_than_a_chunk_is_embedded_at_once(model, images) -> None:
    sizes = []
    hook = model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    embeddings = embed_in_chunks(model, images, 3)
    backward_in_chunks(model, images, torch.ones_like(embeddings), 3)
    hook.remove()
    assert sizes == [3, 3, 1] * 2
