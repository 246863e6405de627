"""The mixture-of-experts layer. Needs torch, NumPy and SciPy; never imports fairseq."""

from .build import build_layer
from .config import MoEConfig
from .context import SentenceContext
from .layer import MoELayer, record_plans
from .merged.layer import MergedMoELayer
from .plan import RoutingPlan
from .registry import register_router

__all__ = [
    "MergedMoELayer",
    "MoEConfig",
    "MoELayer",
    "RoutingPlan",
    "SentenceContext",
    "build_layer",
    "record_plans",
    "register_router",
]
