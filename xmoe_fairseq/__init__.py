"""The door of the ``--user-dir`` package: registers models and criterions, and lets their checkpoints load safely."""

from .checkpoints.safe_types import allow_checkpoint_types
from .cpu_bfloat16 import allow_cpu_bfloat16
from . import criterions, models  # noqa: F401  importing registers them

allow_checkpoint_types()
allow_cpu_bfloat16()
