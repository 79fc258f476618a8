"""What is told of a life that ended: its status, and what its log says of that.

What is killed from outside says nothing, and of what was ended on purpose nobody asks.
"""

from __future__ import annotations

from pathlib import Path

from backends.last_words import last_words
from backends.lifecycle import SERVING, SLEEPING, Phase
from backends.redact import secrets_of
from backends.spec import ReplicaSpec


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
