"""What the proxy was told, readable again while it runs.

A file that cannot be used changes nothing: the settings in force are the last good ones. What is
bound to the process, its sockets and the number of its workers, waits for an upgrade.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from proxy import tls
from proxy.config import FIXED, ConfigError, ProxyConfig


def check_tenants(config: ProxyConfig) -> None:
    """Refuse tenants of which nobody can be one. Raises `ConfigError`."""
    access = config.access
    told = config.keys_path or config.manager_url or config.api_key
    if access.tenants and not told and access.jwt is None:
        raise ConfigError(
            "tenants: nobody can show that he is one of them; set proxy.keys_path and make keys "
            f"(doherty keys create --tenant {access.tenants[0].name}), or set jwt"
        )


class Change(msgspec.Struct, frozen=True):
    """What a new reading means for a running proxy."""

    config: ProxyConfig  # what goes into force
    changed: tuple[str, ...]
    waiting: tuple[str, ...]  # changed, but only an upgrade will bring it


def change(running: ProxyConfig, read: ProxyConfig) -> Change:
    """Lay a new reading over what runs."""
    kept = {name: getattr(running, name) for name in FIXED}
    config = msgspec.structs.replace(read, **kept)
    return Change(config, _different(running, config), _different(config, read))


def _different(one: ProxyConfig, other: ProxyConfig) -> tuple[str, ...]:
    names = ProxyConfig.__struct_fields__
    return tuple(name for name in names if getattr(one, name) != getattr(other, name))


def fingerprint(path: str | None, config: ProxyConfig) -> tuple[object, ...]:
    """Return what differs when the file, or a certificate that it names, was written anew."""
    return tuple(_stamp(name) for name in _watched(path, config))


def _watched(path: str | None, config: ProxyConfig) -> Iterable[str]:
    return (*([path] if path else []), *tls.files(config))


def _stamp(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError as error:
        return (path, error.errno)
    return (path, found.st_mtime_ns, found.st_size, found.st_ino)
