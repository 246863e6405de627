"""Evaluation (see docs/evaluation.md): commands are here, and what they use is in the folders below."""
