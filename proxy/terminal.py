"""Whether somebody sits before this process, or did until just now."""

from __future__ import annotations

import os


def has_terminal() -> bool:
    """Say whether there is a controlling terminal (tty(4): opening /dev/tty fails without one)."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
