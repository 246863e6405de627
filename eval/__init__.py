"""The evaluation half of the pipeline (see docs/evaluation.md): commands here, what they use in the folders below."""
