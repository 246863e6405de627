"""The ``--user-dir`` package: it registers its parts with fairseq and lets their checkpoints load safely.

Both happen as soon as fairseq and torch are imported, before or after this package. Therefore the layer alone
(``xmoe_fairseq.moe``) never imports fairseq, and commands that need neither start at once.
"""

from ._when_imported import when_imported

__version__ = "0.1.0"


def _allow_checkpoint_types() -> None:
    from .safe_types import allow_checkpoint_types

    allow_checkpoint_types()


def _register_with_fairseq() -> None:
    from . import criterions, models, optim, patches  # noqa: F401  importing registers them
    from .checkpoints import official  # noqa: F401  registers --arch xmoe_transformer_as_official

    patches.install()


when_imported("torch", _allow_checkpoint_types)
when_imported("fairseq", _register_with_fairseq)
