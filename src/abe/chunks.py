"""Cached gradients: a batch that is embedded in chunks, with the gradient of the whole batch.

The loss needs the embeddings of all images at once, but not what each of them kept on its way (Gao
et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021): embed all
without keeping anything, take the loss and its gradient of the embeddings, then embed chunk after
chunk again and go back from there. Memory is that of a chunk, and the price a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]  # images (n, 3, H, W) -> embeddings (n, M, d)


@torch.no_grad()
def embed_in_chunks(network: Network, images: Tensor, size: int) -> Tensor:
    """Embeddings without a graph, of `size` images at a time; (B, 3, H, W) -> (B, M, d)."""
    return torch.cat([network(chunk) for chunk in images.split(size)])


def backward_in_chunks(
    network: Network,
    images: Tensor,
    gradient: Tensor,
    size: int,
    not_last: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Add to the parameters' gradients what the gradient of the embeddings leads to.

    Args:
        network: as it embedded them.
        images: (B, 3, H, W).
        gradient: of the loss by the embeddings, (B, M, d).
        size: images at a time.
        not_last: the context of all chunks but the last one, such as one in which several processes
            do not exchange their gradients yet.
    """
    chunks = images.split(size)
    parts = gradient.split(size)
    for number, (chunk, part) in enumerate(zip(chunks, parts, strict=True), start=1):
        with not_last() if number < len(chunks) else nullcontext():
            network(chunk).backward(part)
