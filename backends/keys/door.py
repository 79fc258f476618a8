"""Where the managers of other regions follow the keys of this one.

The manager's own API has no key and can stop replicas, so it stays where nobody else reaches it.
This listener has the pages of keys and nothing else. It speaks TLS with the proxy's certificate
where there is one, asks for a client's as the proxy does, and answers only who shows that he has
the `peer_key` of all regions; the key itself never goes over the wire.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl

from aiohttp import web

from backends.failure import StartError
from backends.keys.api import KeysApi
from backends.keys.feed import KeyFeed
from backends.log import Log
from proxy import tls
from proxy.config import Config


class Door:
    """One listener; `serve` is its life."""

    def __init__(self, config: Config, feed: KeyFeed, address: str, log: Log) -> None:
        """Raises `StartError` and `ConfigError` where it cannot be opened."""
        if config.proxy.peer_key is None:
            raise StartError("manager.keys_listen: set proxy.peer_key, the same in all regions")
        self._tls: ssl.SSLContext | None = tls.server_context(config.proxy)
        self._api = KeysApi(feed, config.proxy.peer_key)
        self._log = log
        self._listener = _listen(address)

    def close(self) -> None:
        self._listener.close()

    async def serve(self) -> None:
        """Answer until cancelled."""
        app = web.Application(client_max_size=1024)
        app.add_routes(self._api.routes())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        try:
            await runner.setup()
            await web.SockSite(runner, self._listener, ssl_context=self._tls).start()
            host, port = self._listener.getsockname()[:2]
            self._log.tell("keys_listening", host=host, port=port, tls=self._tls is not None)
            if self._tls is None and not ipaddress.ip_address(host).is_loopback:
                advice = "set proxy.tls_cert_path, or keep it in a network of your own"
                self._log.caution("keys_in_the_clear", host=host, advice=advice)
            await asyncio.Event().wait()
        finally:
            self._api.end_watches()
            await runner.cleanup()


def _listen(address: str) -> socket.socket:
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536):
        raise StartError(f"manager.keys_listen: {address} must look like HOST:PORT")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=64)
    except OSError as error:
        raise StartError(
            f"manager.keys_listen: {address} cannot be used: {error.strerror or error}"
        ) from error
