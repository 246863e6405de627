"""Routers by name. A new router is one file with one ``@register_router("name")`` class.

A router may also be in another ``--user-dir`` package that imports ``xmoe_fairseq``; docs/methods.md shows one.
"""

from . import adamoe, base_layers, hashed, threshold, top_k  # noqa: F401  registers them
