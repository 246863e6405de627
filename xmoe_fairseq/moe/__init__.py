"""The mixture-of-experts layer. Needs torch, NumPy and SciPy; never imports fairseq."""

from .config import MoEConfig
from .layer import MoELayer, record_plans
from .merged import MergedMoELayer, SentenceContext
from .plan import RoutingPlan
from .routers import register_router

__all__ = [
    "MergedMoELayer",
    "MoEConfig",
    "MoELayer",
    "RoutingPlan",
    "SentenceContext",
    "record_plans",
    "register_router",
]
