"""A ring for people: which part of it is home to whom, in a bounded number of arcs.

The shares are exact. Arcs are, too, as long as there is room for them; a ring of more points is
told by the owners of evenly spaced places, which no drawing could show apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Final

from proxy.contract.view import ArcView
from proxy.core.ring import Ring

WHOLE: Final = 1 << 64


def place_of(key: int) -> float:
    """Return where a hash lies on the ring, of 1."""
    return round(key / WHOLE, 6)


def shares(ring: Ring, servers: Mapping[str, str]) -> dict[str, float]:
    """Return the part of the ring that is home to each server; `servers` are those of the names."""
    points, owners = ring.placed()
    out = dict.fromkeys(servers.values(), 0)
    before = points[-1] - WHOLE if points else 0
    for point, owner in zip(points, owners, strict=True):
        out[servers[owner]] += point - before
        before = point
    return {server: octets / WHOLE for server, octets in out.items()}


def arcs(ring: Ring, servers: Mapping[str, str], most: int) -> tuple[ArcView, ...]:
    """Return at most so many arcs, one after another from 0 to 1."""
    points, owners = ring.placed()
    if not points:
        return ()
    if len(points) < most:
        # From the last point on the ring is the first one's, which goes on at 0.
        ends = [
            (place_of(point), servers[owner]) for point, owner in zip(points, owners, strict=True)
        ]
        ends.append((1.0, servers[owners[0]]))
    else:
        ends = []
        for step in range(most):
            middle = (2 * step + 1) * WHOLE // (2 * most)
            owner = owners[bisect_left(points, middle) % len(owners)]
            ends.append((round((step + 1) / most, 6), servers[owner]))
    return tuple(_merged(ends))


def _merged(ends: list[tuple[float, str]]) -> list[ArcView]:
    """Return the arcs that end there, neighbours of one owner as one."""
    out: list[ArcView] = []
    begin = 0.0
    for place, (end, owner) in enumerate(ends):
        if place + 1 < len(ends) and ends[place + 1][1] == owner:
            continue
        if end > begin:
            out.append(ArcView(begin, end, owner))
            begin = end
    return out
