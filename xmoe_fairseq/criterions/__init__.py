"""fairseq criterions that add the balance loss of every MoE layer and log its routing."""

import fairseq  # noqa: F401  the door opens first, while no module of this folder is half imported

from . import load_balance  # noqa: F401  importing registers them
