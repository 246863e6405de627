"""The mixture-of-experts layer. Needs torch, NumPy and SciPy; never imports fairseq.

Reading order: ``layer`` (route, dispatch, compute, combine), ``routers/`` (which experts a token takes), ``capacity``
(which of these pairs are kept), ``plan`` (the result, which all that follows reads), ``experts/`` (the computation),
``balance`` (the loss).

A tensor's name ends in its axes, one letter each, the same in every file of this folder:

    A  assignments: the kept (token, expert) pairs of a plan, sorted by expert, then by token
    B  sentences of a batch
    C  rows of the fullest expert
    D  model width
    E  experts
    F  hidden units of one expert
    G  gates: the E experts, and null experts where there are any
    I  input width of one linear map
    K  choices of a token, the first in column 0; in merged/ the experts that are merged
    L  experts of this rank, E / ranks
    M  sentences of one chunk
    N  tokens of a part of the batch: those that are not padding, or those of one sentence
    O  output width of one linear map
    P  (token, expert) pairs before capacity
    Q  quantities that a loss balances
    R  rows that are computed together: of a layout, of a decoding batch (sentences x beams), or from other ranks
    S  source ranks
    T  tokens of the flattened batch, padding included; beside B the positions of a sentence
    U  sentences whose merged matrices are kept
    V  symbols of the vocabulary
    X  numbers of one expert's matrix or bias, flattened

A digit is an axis of that length: ``weight_R1``.
"""

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
