"""What every command of `python -m loadtest` is: a module of this shape, in a table of commands."""

from __future__ import annotations

import argparse
from typing import Protocol


class Command(Protocol):
    """A module that is a command of its own."""

    __doc__: str | None
    SUMMARY: str

    def add_arguments(self, command: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int:
        """Return the exit status. Raises `RunError` when the run failed."""
