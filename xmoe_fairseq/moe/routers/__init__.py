"""Routers by name. A new router is one file with one ``@register_router("name")`` class.

A router outside this package works too: a user-dir package that imports ``xmoe_fairseq`` and registers its own.
"""

from . import adamoe, base_layers, hashed, threshold, top_k  # noqa: F401  registers them
