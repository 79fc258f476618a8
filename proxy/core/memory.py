"""How many octets of request bodies one worker may hold, by the memory that there is.

A container's limit is not the machine's: who goes past it is killed, with every stream that it
serves. So the room is the least of what the machine has available and of what each control group
above us still allows. Page cache that the kernel can take back at once counts as room.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from proxy.core import limits


def group_room_bytes(limit: str, usage: str, stat: str) -> int | None:
    """Return what a control group still allows, from its files' texts; None if it has no limit."""
    if not limit.strip().isdigit():
        return None  # "max", or a file that is not there
    cache = re.search(r"^total_inactive_file (\d+)", stat, re.MULTILINE) or re.search(
        r"^inactive_file (\d+)", stat, re.MULTILINE
    )
    used_bytes = int(usage.strip() or 0) - (int(cache[1]) if cache else 0)
    return max(0, int(limit) - max(0, used_bytes))


def machine_room_bytes(meminfo: str) -> int | None:
    """Return what the machine has available, from /proc/meminfo; None if it does not say."""
    found = re.search(r"^MemAvailable: +(\d+) kB", meminfo, re.MULTILINE)
    return int(found[1]) * limits.KIB if found else None


def bodies_bytes_max(rooms: Iterable[int | None], workers: int, body_bytes_max: int) -> int:
    """Return the bound for one of `workers`, each of which may hold bodies of `body_bytes_max`.

    A body is held twice for the moment in which its pieces become one. Half of the rest is for what
    the allocator cannot give back, for sockets and for answers. Where there is little room, a
    quarter of it is better than refusing everything.
    """
    room_bytes = min((room for room in rooms if room is not None), default=None)
    if room_bytes is None:
        return limits.BODIES_BYTES_MAX
    share_bytes = room_bytes // workers
    fitting_bytes = max((share_bytes - body_bytes_max) // 2, share_bytes // 4)
    return min(limits.BODIES_BYTES_MAX, fitting_bytes)
