"""The rungs between serving and nothing, and what each costs to leave and to reach.

awake → asleep → suspended → snapshotted → cold: each lower rung holds less and takes longer to
come back from.
"""

from __future__ import annotations

import enum

import msgspec


class Rung(enum.StrEnum):
    """How much of a replica there is, the most first."""

    AWAKE = "awake"
    ASLEEP = "asleep"  # the engine has let go of its GPU memory, by its own calls
    SUSPENDED = "suspended"  # the driver has moved the process's GPU memory to the host's
    SNAPSHOTTED = "snapshotted"  # no process; an image of one on disk
    COLD = "cold"  # no process, no image


class RungCost(msgspec.Struct, frozen=True):
    """What a rung has cost, as measured: seconds down to it and up from it, and what it holds."""

    up_s: float
    down_s: float = 0.0
    host_bytes: int = 0
    gpu_bytes: int = 0
