"""Gauges of what one worker believes of where requests can go: replicas, and other regions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proxy.core.fleet import Fleet
from proxy.core.lease import Lease
from proxy.core.picture import Picture
from proxy.io.telemetry import Sample


def of_servers(
    fleet: Fleet, picture: Picture, others: Mapping[str, int], now_s: float
) -> list[Sample]:
    """Return what is believed of each server; `others` have so many requests on a replica."""
    out = []
    for replica_id, server in fleet.servers.items():
        out += _of_server(replica_id, fleet.names_of(replica_id), picture, others, now_s)
        suspect = float(server.suspect)
        out.append(Sample("replica_suspect", (("replica", replica_id),), suspect))
    return out


def _of_server(
    replica_id: str,
    names: tuple[str, ...],
    picture: Picture,
    others: Mapping[str, int],
    now_s: float,
) -> list[Sample]:
    """Return what is believed of a server, with all of its ranks."""
    loads = picture.loads
    slots = [picture.slots[name] for name in names]
    ours = sum([loads.inflight[slot] for slot in slots]) - sum([others.get(n, 0) for n in names])
    by = (("replica", replica_id),)
    queued_tokens = sum([loads.prefilling.queued_tokens(slot) for slot in slots])
    speed = sum([1.0 / loads.s_per_token[slot] for slot in slots])
    return [
        Sample("replica_inflight", by, ours),
        Sample("replica_queued_tokens", by, queued_tokens),
        # A newcomer would go to the rank that has least to do.
        Sample("replica_wait_seconds", by, min([loads.wait_s(slot, now_s) for slot in slots])),
        Sample("replica_decoding", by, sum([loads.decoding(slot) for slot in slots])),
        Sample("replica_prefill_tokens_per_second", by, speed),
        Sample("replica_cache_tokens", by, sum([picture.cache_tokens(slot) for slot in slots])),
    ]


def of_remotes(
    fleet: Fleet, picture: Picture, leases: Iterable[Lease], now_s: float
) -> list[Sample]:
    """Return what this worker has in other regions, and what it believes could go there."""
    inflight: dict[str, int] = {remote.replica_id: 0 for remote in fleet.remotes.values()}
    for lease in leases:
        remote = fleet.remotes.get(lease.replica_name)
        if remote is not None:
            inflight[remote.replica_id] += 1
    out = [Sample("remote_inflight", (("remote", name),), n) for name, n in inflight.items()]
    for name, remote in fleet.remotes.items():
        slot = picture.slots[name]
        outlook = picture.outlooks.of[slot]
        gone = outlook.why_not(now_s)
        room = 0 if gone else outlook.room(picture.loads.inflight[slot], now_s)
        by = (("remote", remote.replica_id), ("model", min(remote.models)))
        out.append(Sample("remote_room", by, max(0, room)))
    return out
