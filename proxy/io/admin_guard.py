"""Who may ask the admin listener, and what a web page may not have a browser ask for it.

With `admin_api_key`, everything wants it except what orchestrators ask and the files of the
dashboard, in which there is nothing to hide. Without one, whoever reaches the listener may read,
as with nginx's status page or Prometheus; so it listens on loopback unless told otherwise. But a
browser on this machine reaches it as well, on behalf of any page that it shows:

- A page may send a POST to any address. Its browser says so in `Origin` (Fetch standard §3.2) and
  `Sec-Fetch-Site`; tools send neither. What comes from another origin is refused, key or not.
- A page may point its own name at 127.0.0.1 (DNS rebinding), so that it is of one origin with us,
  and then read everything too. Its name is in `Host`. So on loopback without a key `Host` must be
  a loopback address or `localhost`: for GETs as well, because the view names models and replicas.
- A page may ask for anything by GET as well, without seeing the answer: it could take up all the
  places of those who watch the view. What browsers fetch for a page of another site is refused; a
  link that somebody follows is not (`Sec-Fetch-Dest: document`).
- Replicas are drained without a key on loopback alone: on a network anybody could.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from aiohttp import web

_SCHEME = "bearer "
WANTS_KEY = "set admin_api_key (--admin-api-key) to drain from another machine"


class RefusedError(Exception):
    """It is not answered: with which status and code, and what would help."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Guard:
    """Judges requests by their heads."""

    def __init__(self, api_key: str | None, *, local: bool) -> None:
        """`local`: nobody on another machine reaches the listener."""
        self._digest = hashlib.sha256(api_key.encode()).digest() if api_key else b""
        self._local = local

    @property
    def can_drain(self) -> str | None:
        """Return why replicas cannot be drained by this listener; None: they can."""
        return None if self._digest or self._local else WANTS_KEY

    def check(self, request: web.Request) -> None:
        """Judge a request for what is not open to all. Raises `RefusedError`."""
        if self._digest:
            self._check_key(request)
        elif self._local and not is_loopback_name(_host_of(request.headers.get("Host", ""))):
            raise RefusedError(
                *(403, "host_not_allowed"),
                "without admin_api_key this listener answers to localhost and loopback addresses "
                "only (DNS rebinding); ask by one of these, or set admin_api_key",
            )
        self._check_origin(request)

    def check_wish(self) -> None:
        """Judge a request that changes something. Raises `RefusedError`."""
        if self.can_drain is not None:
            raise RefusedError(403, "admin_key_required", self.can_drain)

    def _check_key(self, request: web.Request) -> None:
        given = request.headers.get("Authorization", "")
        if given[: len(_SCHEME)].lower() == _SCHEME:  # in any case (RFC 9110 §11.1)
            given = given[len(_SCHEME) :]
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(digest, self._digest):
            raise RefusedError(401, "invalid_api_key", "send the admin key as a bearer token")

    def _check_origin(self, request: web.Request) -> None:
        heads = request.headers
        origin = heads.get("Origin")
        if origin is not None and _authority_of(origin) != heads.get("Host", "").lower():
            raise RefusedError(403, "cross_site", "a page of another origin may not ask for this")
        if heads.get("Sec-Fetch-Site", "none") in ("none", "same-origin"):
            return
        if request.method not in ("GET", "HEAD") or heads.get("Sec-Fetch-Dest") != "document":
            raise RefusedError(403, "cross_site", "a page of another site may not ask for this")


def is_local(listeners: Iterable[socket.socket]) -> bool:
    """Whether all of these can be reached from this machine only."""
    return all(
        listener.family == socket.AF_UNIX or is_loopback_name(listener.getsockname()[0])
        for listener in listeners
    )


def is_loopback_name(host: str) -> bool:
    """Whether a host, without port, means this machine whoever is asked (RFC 6761 §6.3).

    None at all is no browser's: HTTP/1.1 wants one, and browsers send it.
    """
    host = host.strip("[]").lower().rstrip(".")
    if host in ("", "localhost") or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(authority: str) -> str:
    """Return the host of `host:port`; an IPv6 address stands in brackets."""
    if authority.startswith("["):
        return authority.partition("]")[0]
    return authority.partition(":")[0]


def _authority_of(origin: str) -> str:
    """Return host and port of an origin; nothing that equals any `Host` of what is none."""
    try:
        return urlsplit(origin).netloc.lower() or "null"
    except ValueError:
        return "null"
