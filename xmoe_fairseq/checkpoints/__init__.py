"""Loading, importing, averaging and exporting checkpoints."""

from importlib.util import find_spec

if find_spec("fairseq") is not None:
    import fairseq  # noqa: F401  the door opens first, while no module of this folder is half imported
