"""The evaluation half of the pipeline (see eval/README.md): commands here, what they use in the folders below."""
