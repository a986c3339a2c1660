"""Attention-based Ensemble for Deep Metric Learning (ABE-M, ECCV 2018), made usable.

The names below are imported when they are first used, so that `import abe` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abe.checkpoint import load_selected
    from abe.config import Config
    from abe.errors import InputError
    from abe.evaluate import embed
    from abe.losses import contrastive_loss, divergence_loss, ensemble_loss
    from abe.metrics import recall_at_k
    from abe.model import AttentionEnsemble, MHeads, MHeadsWithAttention, MTails, concat
    from abe.neighbors import nearest_neighbors
    from abe.recipes import get_recipe
    from abe.train import Trainer

__version__ = "0.1.0"

_SOURCES = {
    "Config": "abe.config",
    "Trainer": "abe.train",
    "get_recipe": "abe.recipes",
    "embed": "abe.evaluate",
    "load_selected": "abe.checkpoint",
    "nearest_neighbors": "abe.neighbors",
    "recall_at_k": "abe.metrics",
    "contrastive_loss": "abe.losses",
    "divergence_loss": "abe.losses",
    "ensemble_loss": "abe.losses",
    "AttentionEnsemble": "abe.model",
    "MHeads": "abe.model",
    "MHeadsWithAttention": "abe.model",
    "MTails": "abe.model",
    "concat": "abe.model",
    "InputError": "abe.errors",
}
__all__ = [
    "AttentionEnsemble",
    "Config",
    "InputError",
    "MHeads",
    "MHeadsWithAttention",
    "MTails",
    "Trainer",
    "__version__",
    "concat",
    "contrastive_loss",
    "divergence_loss",
    "embed",
    "ensemble_loss",
    "get_recipe",
    "load_selected",
    "nearest_neighbors",
    "recall_at_k",
]


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'abe' has no attribute {name!r}")
    return getattr(import_module(_SOURCES[name]), name)
