"""Every run-time patch of fairseq, one file a subject; docs/patches.md has the table of what and why.

fairseq itself is never edited. The package's door installs all but ``expert_parallel``, which the first model with
spread experts installs.
"""

from __future__ import annotations

import fairseq  # noqa: F401  the door opens first, while no module of this folder is half imported

from . import checkpoint_files, cpu_bfloat16, numpy_names


def install() -> None:
    """Install what every command needs; doing it again changes nothing."""
    for patch in (numpy_names, cpu_bfloat16, checkpoint_files):
        patch.install()
