"""The input of a job on its way: on disk, so that it is never whole in memory, and sent again.

Requests may come from a generator, which cannot be asked twice; an upload may break and have to be
repeated. Both want the lines kept until they have arrived.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from backends.offline.client.lines import Lines


class Spool:
    """Lines in an unnamed file, which is gone with it."""

    def __init__(self, endpoint: str) -> None:
        self.lines = Lines(endpoint)
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self.size = 0

    def add(self, request: Mapping[str, Any]) -> None:
        """Take a request's body. Raises `InputError`."""
        self._write(self.lines.of(request))

    def add_text(self, line: int, octets: bytes) -> None:
        """Take line number `line` of a file. Raises `InputError`."""
        self._write(self.lines.of_text(line, octets))

    def _write(self, octets: bytes) -> None:
        self.file.write(octets)
        self.size += len(octets)

    def ready(self) -> None:
        """Everything is there: let those see it who read the file."""
        self.file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()
