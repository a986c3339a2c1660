"""The paper's networks: section 3 and the supplement."""

from abe.model.backbones import Backbone, Stage
from abe.model.ensemble import (
    AttentionEnsemble,
    MHeads,
    MHeadsWithAttention,
    MTails,
    concat,
)

__all__ = [
    "AttentionEnsemble",
    "Backbone",
    "MHeads",
    "MHeadsWithAttention",
    "MTails",
    "Stage",
    "concat",
]
