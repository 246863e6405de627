"""The mixture-of-experts layer. Needs torch, NumPy and SciPy; never imports fairseq."""

from .config import MoEConfig
from .layer import MoELayer, record_plans
from .plan import RoutingPlan
from .routers import register_router

__all__ = ["MoEConfig", "MoELayer", "RoutingPlan", "record_plans", "register_router"]
