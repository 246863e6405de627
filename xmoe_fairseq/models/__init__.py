"""fairseq models with mixture-of-experts layers in place of feed-forward networks."""

import fairseq  # noqa: F401  the door opens first, while no module of this folder is half imported

from . import architectures, int8, language_model, translation  # noqa: F401  importing registers them
