"""fairseq criterions that add the balance loss of every MoE layer and log its routing."""

from . import load_balance  # noqa: F401  importing registers them
