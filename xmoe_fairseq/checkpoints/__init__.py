"""Load, check, import, average, quantise and export checkpoints."""
