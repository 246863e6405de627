"""Translate, score and compare: the evaluation half of the pipeline (see eval/README.md)."""
