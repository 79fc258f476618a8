"""Whether the manager sends traces, and where: as the proxy's part of the configuration says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from backends.log import Log
from backends.moves import Follows, Moves, Nobody
from proxy.config import Config, ConfigError, ProxyConfig
from proxy.contract.span_export import (
    SpanExport,
    export_settings,
    missing_library,
    process_resource,
    switched_off,
)
from proxy.contract.spans import endpoint_url
from proxy.contract.version import package_version


def check_endpoint(proxy: ProxyConfig) -> None:
    """Refuse what is no collector. Raises `ConfigError`."""
    if proxy.otlp_traces_endpoint is not None:
        try:
            endpoint_url(proxy.otlp_traces_endpoint)
        except ValueError as error:
            raise ConfigError(f"otlp_traces_endpoint: {error}") from error


def missing_exporter(proxy: ProxyConfig, environment: Mapping[str, str]) -> str:
    """Return what has to be installed before a proxy with these settings starts; mostly empty."""
    return missing_library() if _are_on(proxy, environment) else ""


def _are_on(proxy: ProxyConfig, environment: Mapping[str, str]) -> bool:
    told = proxy.enable_trace or proxy.otlp_traces_endpoint is not None
    return told and not switched_off(environment)


@contextmanager
def open_moves(config: Config, environment: Mapping[str, str], log: Log) -> Iterator[Follows]:
    """Give what is told of replicas' moves, and send what waits at the end."""
    proxy = config.proxy
    if not _are_on(proxy, environment):
        yield Nobody()
        return
    if missing := missing_library():
        log.caution("no_traces", reason=missing)
        yield Nobody()
        return
    resource = process_resource("doherty-manager", config.region, package_version())
    settings = export_settings(proxy.otlp_traces_endpoint, resource, environment)
    export = SpanExport(settings, lambda span: (span,))
    try:
        yield Moves(export.put, lambda octets: int.from_bytes(os.urandom(octets)))
    finally:
        export.close()
