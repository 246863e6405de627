"""All run-time patches of fairseq, one file for each subject; docs/patches.md has a table of them with reasons.

fairseq itself is never edited. `xmoe_fairseq.__init__` installs all patches but ``expert_parallel``, which the first
model with spread experts installs.
"""

from __future__ import annotations


def install() -> None:
    """Install the patches that every command needs; a second call changes nothing."""
    from . import (
        amp,
        checkpoint_files,
        cpu_bfloat16,
        dummy_batches,
        early_stopping,
        kept_memory,
        known_settings,
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
        known_settings,
        signals,
        validation_scores,
    ):
        patch.install()


# `xmoe_fairseq.__init__` calls install() when fairseq is imported, so fairseq is imported here, before this folder's
# modules are.
import fairseq  # noqa: E402, F401
