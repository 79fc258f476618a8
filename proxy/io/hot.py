"""What one worker tells of hot prefixes: those of its own requests, and who holds them.

Each worker counts the requests that came to it; the supervisor adds them up. Who holds a prefix all
workers know alike. A replica's ranks are one holder.
"""

from __future__ import annotations

from proxy.contract.view import HOLDERS_MAX, PREFIXES_MAX
from proxy.core.fleet import Pool
from proxy.io.control import HotPrefix
from proxy.io.plane import Plane


def hot_prefixes(plane: Plane) -> list[HotPrefix]:
    """Return the hottest that somebody holds, the hottest first."""
    picture, out = plane.picture, []
    servers = [
        (replica_id, sum([1 << picture.slots[name] for name in plane.fleet.names_of(replica_id)]))
        for replica_id in sorted(plane.fleet.servers)
    ]
    for name, count, octets in picture.hot.hottest(PREFIXES_MAX):
        bits = picture.index.holders_of(name)
        found = [replica_id for replica_id, slots in servers if slots & bits]
        if found:
            spread = max([_spread(plane, pool, bits, name, octets) for pool in _pools(plane)])
            out.append(HotPrefix(name, octets, count, spread, len(found), found[:HOLDERS_MAX]))
    return out


def _pools(plane: Plane) -> list[Pool]:
    """Return the pools, one of those that have the same replicas."""
    pools = {id(pool.ring): pool for pool in plane.fleet.pools.values()}
    return [*pools.values(), plane.fleet.any_model]


def _spread(plane: Plane, pool: Pool, bits: int, name: int, octets: int) -> int:
    """Return among how many replicas of a pool a request with this prefix may choose freely."""
    seats = plane.picture.seats(pool)
    if not seats.bits & bits:
        return 0
    cache_octets = plane.picture.cache_octets(seats.slots[0])
    if not plane.picture.hot.is_hot(name, octets, cache_octets):
        return 0
    return len({replica.replica_id for replica in pool.available})
