"""Loading, importing, averaging and exporting checkpoints."""
