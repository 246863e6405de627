"""A ``--user-dir`` package outside the project: brings a router of its own to every model of xmoe_fairseq."""

import xmoe_fairseq  # noqa: F401  registers models and criterions

from . import above_average  # noqa: F401  registers the router
