"""Why a command cannot run, for a person to read."""

from __future__ import annotations


class StartError(Exception):
    """It cannot run; the text says why and what to do."""
