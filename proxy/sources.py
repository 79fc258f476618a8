"""Whether it is plain from where the fleet is known, who else is to be spoken with, and by what."""

from __future__ import annotations

import logging

import msgspec

from proxy.config import ProxyConfig
from proxy.contract import NO_REGION, FleetSnapshot
from proxy.core.admission import allowances
from proxy.core.peer_wire import is_near, parse_address
from proxy.core.quota import ROWS_MAX
from proxy.core.replica import parse_url, replica_of
from proxy.io.jwt_tokens import library
from proxy.io.registry import check_urls
from proxy.listeners import StartError

_log = logging.getLogger("doherty.proxy")


def check_source(config: ProxyConfig) -> None:
    """Raise `ConfigError`, `StartError` or `ValueError` with what is wrong and what to do."""
    if config.access.jwt is not None:
        library()
    check_urls(config.worker_urls)
    if config.offline_url is not None:
        parse_url(config.offline_url, "--offline-url")
    for address in (*config.peers, *filter(None, (config.peer_listen,))):
        parse_address(address)
    _check_remotes(config)
    if len(allowances(config.access)) > ROWS_MAX:
        raise StartError(f"tenants: at most {ROWS_MAX} of them may have limits")
    if not config.worker_urls and not config.manager_url:
        raise StartError(
            "the replica list is empty: pass --worker-urls http://HOST:PORT … or --manager-url"
        )
    if config.worker_urls and config.manager_url:
        raise StartError("--worker-urls and --manager-url exclude each other: one names the fleet")


def _check_remotes(config: ProxyConfig) -> None:
    """Between regions nobody is believed without the key, unless all of it is on one machine."""
    if config.access.remote_regions and config.region == NO_REGION:
        raise StartError("remote_regions: name this region, too (region: eu)")
    peers = set(config.peers)
    for remote in config.access.remote_regions:
        what = f"remote_regions: {remote.region}"
        try:
            parse_address(remote.peer)
            host = parse_url(remote.url, "url")[1]
        except ValueError as error:
            raise StartError(f"{what}: {error}") from error
        if remote.peer in peers:
            raise StartError(f"{what}: {remote.peer} is in proxy.peers, of this region, as well")
        peers.add(remote.peer)
        if config.peer_key is None and not (is_near(remote.peer) and is_near(f"{host}:0")):
            raise StartError(
                f"{what}: set proxy.peer_key, the same in all regions; without it requests cross "
                "only between proxies on one machine"
            )


class Usable:
    """Leaves out records that nobody can connect to, so that one cannot spoil the rest."""

    def __init__(self) -> None:
        self._left_out: frozenset[str] = frozenset()

    def of(self, snapshot: FleetSnapshot) -> FleetSnapshot:
        """Return the snapshot without them; each is told of once."""
        kept, unusable = [], {}
        for record in snapshot.replicas:
            try:
                replica_of(record)
                kept.append(record)
            except ValueError as error:
                unusable[record.replica_id] = str(error)
        for replica_id in unusable.keys() - self._left_out:
            _log.error("replica %s is left out: %s", replica_id, unusable[replica_id])
        self._left_out = frozenset(unusable)
        return msgspec.structs.replace(snapshot, replicas=tuple(kept))
