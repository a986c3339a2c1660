"""Parameters and operations of the paper's 13 networks (Tables 1 and 8), counted, not typed in.

The networks are built on torch's meta device, where a forward pass costs nothing; the convolutions
and linear layers that it runs through are counted as they run.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from abe.model.ensemble import AttentionEnsemble, MHeads, MHeadsWithAttention, MTails
from abe.paper import table_rows

# Names as in the paper's tables; the superscript is the ensemble's embedding size.
_NETWORKS: dict[str, tuple[type[AttentionEnsemble], int, int]] = {
    "1-head^512": (MHeads, 1, 512),
    "2-heads^512": (MHeads, 2, 512),
    "4-heads^512": (MHeads, 4, 512),
    "8-heads^512": (MHeads, 8, 512),
    "ABE-1^512": (AttentionEnsemble, 1, 512),
    "ABE-2^512": (AttentionEnsemble, 2, 512),
    "ABE-4^512": (AttentionEnsemble, 4, 512),
    "ABE-8^512": (AttentionEnsemble, 8, 512),
    "ABE-1^64": (AttentionEnsemble, 1, 64),
    "ABE-2^128": (AttentionEnsemble, 2, 128),
    "ABE-4^256": (AttentionEnsemble, 4, 256),
    "8-heads+att^512": (MHeadsWithAttention, 8, 512),
    "8-tails^512": (MTails, 8, 512),
}


def count_parameters(model: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_size: int = 224) -> int:
    """Multiply-accumulates of one image's forward pass: the paper's "flops".

    Convolutions and linear layers are counted as often as they run; biases, pooling, response
    normalisation and the masks' products are not. The model is left as it was.
    """
    device = next(model.parameters()).device
    in_training = [layer for layer in model.modules() if layer.training]
    model.eval()  # or batch norm would take the image into its statistics
    try:
        with torch.no_grad(), _Counter() as counter:
            model(torch.zeros(1, 3, image_size, image_size, device=device))
    finally:
        for layer in in_training:
            layer.training = True
    return counter.macs


class _Counter(TorchDispatchMode):
    """Counts the multiply-accumulates of the convolutions and linear layers that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:  # of images, weights
            self.macs += output.numel() * args[1][0].numel()  # one row of weights an output value
        elif function is torch.ops.aten.addmm.default:  # of biases, features, transposed weights
            self.macs += output.numel() * len(args[2])
        return output


def summary_rows() -> list[dict[str, Any]]:
    """One row a network: name, params and macs as counted, paper_params and paper_macs."""
    printed = {row["method"]: row for row in table_rows("table1")}
    printed |= {f"{row['method']}^512": row for row in table_rows("table8")}
    rows = []
    for name, (network, num_learners, embedding_dim) in _NETWORKS.items():
        with torch.device("meta"):
            model = network(num_learners, embedding_dim)
        rows.append(
            {
                "name": name,
                "params": count_parameters(model),
                "macs": count_macs(model),
                "paper_params": round(printed[name]["params_1e7"] * 1e7),
                "paper_macs": round(printed[name]["macs_1e9"] * 1e9),
            }
        )
    return rows


def summary_table(rows: list[dict[str, Any]]) -> Table:
    """The rows as the command line shows them, with the paper's figures at its own precision."""
    table = Table("network", title="Tables 1 and 8: multiply-accumulates at 224 x 224")
    for heading in ("parameters", "paper, 1e7", "MACs", "paper, 1e9"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['params']:,}",
            f"{row['paper_params'] / 1e7:.2f}",
            f"{row['macs']:,}",
            f"{row['paper_macs'] / 1e9:.3g}",
        )
    return table
