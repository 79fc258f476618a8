"""The files of the dashboard: read once, served by name, open to all.

There is nothing to hide in them: what the page shows it asks for, with the admin key where there is
one. No path that a client sends is ever looked for on the disk: the names are those that are there
when this starts. Browsers are told to run nothing else (Content Security Policy, level 3), to show
the page in no frame, where a click on it could be stolen, and to guess no types.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final, NamedTuple

from aiohttp import web

INDEX: Final = "index.html"
_TYPES: Final[Mapping[str, str]] = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
POLICY: Final = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)
# Of every answer of the admin listener.
SECURITY_FIELDS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # for those who know no `frame-ancestors`
}


class File(NamedTuple):
    """One of them."""

    body: bytes
    content_type: str
    tag: str


class Dashboard:
    """All of them, by the path at which each is served."""

    def __init__(self, folder: Traversable | None = None) -> None:
        folder = files("proxy") / "dashboard" if folder is None else folder
        self.files = {
            "/" if entry.name == INDEX else f"/{entry.name}": _read(entry, kind)
            for entry in (folder.iterdir() if folder.is_dir() else ())
            if (kind := _TYPES.get(entry.name.rpartition(".")[2])) is not None
        }

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(("/", *self.files))

    async def serve(self, request: web.Request) -> web.Response:
        file = self.files.get(request.path)
        if file is None:
            raise web.HTTPNotFound(
                reason="the dashboard is not part of this installation: install doherty's wheel"
            )
        # Asked for anew each time, and sent anew when it has changed: with the proxy, that is.
        fields = {"ETag": file.tag, "Cache-Control": "no-cache"}
        if file.tag in request.headers.get("If-None-Match", "").replace(",", " ").split():
            return web.Response(status=304, headers=fields)
        return web.Response(
            body=file.body, content_type=file.content_type, charset="utf-8", headers=fields
        )


async def secure(_: web.Request, answer: web.StreamResponse) -> None:
    """Add to an answer, before its head is sent, what browsers are to keep to."""
    answer.headers.update(SECURITY_FIELDS)


def _read(entry: Traversable, content_type: str) -> File:
    body = entry.read_bytes()
    return File(body, content_type, f'"{hashlib.sha256(body).hexdigest()[:24]}"')
