"""Load, check, import, average, quantise and export checkpoints."""

from importlib.util import find_spec

if find_spec("fairseq") is not None:
    import fairseq  # noqa: F401  first, since this import registers the package, which imports this folder
