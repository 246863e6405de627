"""Every run-time patch of fairseq, one file a subject; docs/patches.md has the table of what and why.

fairseq itself is never edited. The package's door installs all but ``expert_parallel``, which the first model with
spread experts installs.
"""

from __future__ import annotations


def install() -> None:
    """Install what every command needs; doing it again changes nothing."""
    from . import (
        amp,
        checkpoint_files,
        cpu_bfloat16,
        dummy_batches,
        early_stopping,
        kept_memory,
        numpy_names,
        signals,
        validation_scores,
    )

    for patch in (
        numpy_names,
        amp,
        cpu_bfloat16,
        kept_memory,
        checkpoint_files,
        dummy_batches,
        early_stopping,
        signals,
        validation_scores,
    ):
        patch.install()


# The door calls install() when fairseq is imported: here, before any module of this folder is half imported.
import fairseq  # noqa: E402, F401
