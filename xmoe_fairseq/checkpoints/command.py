"""What the commands of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Callable


def run_command(main: Callable[[], int | None]) -> int:
    """Run ``main``; an error a user can act on becomes one line on standard error and exit code 1."""
    try:
        return main() or 0
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
