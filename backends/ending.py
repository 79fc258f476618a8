"""How a life is ended, and what is told of that: its status, and what its log says.

What is killed from outside says nothing, and of what was ended on purpose nobody asks.
"""

from __future__ import annotations

import signal
from pathlib import Path

from backends.engines.facts import Facts
from backends.fetch import Fetch
from backends.last_words import last_words
from backends.lifecycle import SERVING, SLEEPING, Phase
from backends.providers.base import Process
from backends.redact import secrets_of
from backends.spec import ReplicaSpec

ABORT_TIMEOUT_S = 2.0


def end_in_words(how: str, phase: Phase, spec: ReplicaSpec, log: Path, since_bytes: int) -> str:
    """Return how a life ended that was in `phase`; its log begins at `since_bytes`."""
    starting = phase is Phase.STARTING
    if not starting and ("SIGKILL" in how or phase not in SERVING | SLEEPING):
        return how
    hide = secrets_of(spec.args, spec.env)
    words = last_words(log, int(starting), since_bytes=since_bytes, hide=hide)
    how += " before it was ready" if starting else ""
    how += f": {words}" if words else ""
    return f"{how}; see {log}" if starting or words else how


async def terminate(process: Process, facts: Facts, url: str, fetch: Fetch) -> None:
    """Ask an engine to end; one that would wait for its requests without limit drops them first."""
    if facts.abort_path is not None:
        await fetch.post(url + facts.abort_path, facts.abort_body, ABORT_TIMEOUT_S)
    process.signal_group(signal.SIGTERM)
