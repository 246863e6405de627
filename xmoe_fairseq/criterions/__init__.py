"""fairseq criterions that add the balance loss of every MoE layer and log its routing."""

import fairseq  # noqa: F401  first, since this import registers the package, which imports this folder

from . import load_balance  # noqa: F401  importing registers them
