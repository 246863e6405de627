"""The door of the ``--user-dir`` package: registers its parts with fairseq, and lets their checkpoints load safely.

Without fairseq the layer alone, ``xmoe_fairseq.moe``, still works.
"""

from importlib.util import find_spec

if find_spec("fairseq") is not None:
    from . import criterions, models, optim, patches  # noqa: F401  importing registers them
    from .checkpoints import released  # noqa: F401  registers --arch xmoe_transformer_as_released
    from .checkpoints.safe_types import allow_checkpoint_types

    allow_checkpoint_types()
    patches.install()
