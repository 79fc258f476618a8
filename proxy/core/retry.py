"""May this request be tried again? Decided by how far it came, never by what failed.

A completion is not idempotent (RFC 9110 §9.2.2): it costs GPU seconds, and a second answer may
differ from the first. So it goes to another replica only while none can have begun it, that is,
while no octet of it was handed to a connection, or to one that provably ended before it could be
read (`io/acknowledged`). Routers that repeat a POST after the engine took it deliver it up to five
times.
"""

from __future__ import annotations

import enum


class Progress(enum.IntEnum):
    """How far an exchange came with its present replica."""

    CHOOSING = 0
    QUEUED = 1  # held until a replica is open
    CONNECTING = 2
    REQUEST_SENT = 3
    RESPONSE_STARTED = 4


def may_retry(progress: Progress, attempts: int, retries_max: int) -> bool:
    """`attempts` counts the replicas tried so far, this one included."""
    match progress:
        case Progress.CHOOSING | Progress.QUEUED | Progress.CONNECTING:
            return attempts <= retries_max
        case Progress.REQUEST_SENT | Progress.RESPONSE_STARTED:
            return False
