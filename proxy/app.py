"""The command `doherty proxy`: read what it is told, get the sockets, run the supervisor."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import uvloop

from proxy import dumps, flags, settings, tls
from proxy.config import ConfigError, ProxyConfig
from proxy.contract.key_file import KeyFile, KeyFileError
from proxy.io.tracing import check_tracing
from proxy.listeners import Listeners, StartError, arrange, given_by_systemd
from proxy.logs import set_up_logging
from proxy.sources import check_source
from proxy.supervisor import Supervisor
from proxy.takeover import DESCRIPTOR_VARIABLE, Predecessor, socket_in_use

_log = logging.getLogger("doherty.proxy")


def serve(invocation: flags.Invocation, config: ProxyConfig) -> int:
    """Run the proxy until it is told to stop. Raises what `main` tells."""
    set_up_logging(config.log_level, as_json=config.log_json)
    dumps.leave_none()
    check_source(config)
    settings.check_tenants(config)
    check_keys(config)
    warnings = [*tls.check(config, datetime.now(UTC)), *check_tracing(config, os.environ)]
    for warning in warnings:
        _log.warning("%s", warning)
    predecessor = _predecessor(invocation, config)
    path = config.upgrade_socket
    if predecessor is None and path is not None and socket_in_use(path):
        raise StartError(
            f"upgrade_socket: a proxy runs at {path}; with --takeover {path} this takes its place"
        )
    if predecessor is not None:
        found: Listeners | None = predecessor.receive()
    else:
        found = given_by_systemd(invocation.environment)
    listeners = arrange(config, found)
    return uvloop.run(_run(invocation, config, listeners, predecessor))


def check_keys(config: ProxyConfig) -> None:
    """Refuse to start on keys that cannot be read. Raises `ConfigError`."""
    if config.keys_path is not None:
        try:
            KeyFile(config.keys_path).look()
        except KeyFileError as error:
            raise ConfigError(f"keys_path: {error}") from error


def _predecessor(invocation: flags.Invocation, config: ProxyConfig) -> Predecessor | None:
    """Return whom to take over from: our parent, or whoever waits at a path.

    Raises `StartError`.
    """
    fd = os.environ.pop(DESCRIPTOR_VARIABLE, None)  # not for our own children
    if fd is not None:
        end = socket.socket(fileno=int(fd))
        end.set_inheritable(False)
        return Predecessor(end)
    path = invocation.takeover
    if path == "":  # one command for the first proxy and for each that follows it
        path = config.upgrade_socket
        if path is None:
            raise StartError("--takeover: say of which SOCKET, or set --upgrade-socket")
        if not socket_in_use(path):
            return None
    return Predecessor.at(path) if path is not None else None


async def _run(
    invocation: flags.Invocation,
    config: ProxyConfig,
    listeners: Listeners,
    predecessor: Predecessor | None,
) -> int:
    return await Supervisor(invocation, config, listeners, predecessor).run()


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """The command `doherty proxy`."""
    try:
        invocation = flags.parse(
            sys.argv[1:] if argv is None else argv,
            os.environ if environment is None else environment,
        )
        return serve(invocation, invocation.settings())
    except ConfigError as error:
        print(f"doherty proxy: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except (StartError, ValueError) as error:
        print(f"doherty proxy: {error}", file=sys.stderr)  # noqa: T201
        return 1
