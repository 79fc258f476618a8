"""What operators wish of replicas: to drain, and to serve again.

The manager is asked where there is one, because it decides who serves, and its journal remembers.
Without one the wish is kept by the proxy that was asked (`proxy/roster.py`), over reloads and
upgrades: it takes effect there, and a second proxy is to be asked as well. Each wish is told in the
log, with who had it and what became of it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import Final, Protocol
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from proxy.contract import FleetSnapshot
from proxy.contract.bodies import TooLongError, whole_body
from proxy.io.admin_guard import RefusedError

_log = logging.getLogger("doherty.admin")

WISHES: Final = ("drain", "undrain")
TIMEOUT: Final = aiohttp.ClientTimeout(total=5.0)
ANSWER_BYTES_MAX: Final = 64 * 1024
NAMED_MAX: Final = 8  # replicas that an error names
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Fleet(Protocol):
    """Who is told; the supervisor has it."""

    def fleet(self) -> FleetSnapshot | None: ...

    def manager_url(self) -> str | None: ...

    def held(self) -> frozenset[str]: ...

    def hold(self, held: frozenset[str]) -> None:
        """Have these replicas drain from now on, and no others."""


class Granted(msgspec.Struct, frozen=True):
    """What has become of a replica."""

    replica_id: str
    state: str
    held: bool = False


class _Problem(msgspec.Struct, frozen=True):
    message: str = ""


class _Refusal(msgspec.Struct, frozen=True):
    error: _Problem = _Problem()


def shown_url(url: str) -> str:
    """Return a URL as it may be shown: without the secret that may stand in it."""
    try:
        return str(URL(url).with_user(None))
    except ValueError:
        return url.rpartition("@")[2]


class Operators:
    """Serves their wishes."""

    def __init__(self, fleet: Fleet, session: Callable[[], aiohttp.ClientSession]) -> None:
        """`session()` returns the client by which managers are asked now."""
        self._fleet = fleet
        self._session = session

    async def answer(self, request: web.Request) -> web.Response:
        """Grant a wish. Raises `RefusedError`."""
        replica_id, wish = request.match_info["replica_id"], request.match_info["wish"]
        given = request.headers.get("X-Request-Id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        who = (request.remote or "unix", request_id)
        try:
            granted = await self._grant(replica_id, wish)
        except RefusedError as error:
            _log.warning(
                *("%s of replica %r refused (%s), asked by %s, request %s", wish, replica_id),
                *(error.code, *who),
            )
            raise
        _log.info("%s of replica %r, asked by %s, request %s", wish, replica_id, *who)
        return web.Response(
            body=msgspec.json.encode(granted),
            content_type="application/json",
            headers={"X-Request-Id": request_id, "Cache-Control": "no-store"},
        )

    async def _grant(self, replica_id: str, wish: str) -> Granted:
        if wish not in WISHES:
            raise RefusedError(404, "unknown_path", f"there are {' and '.join(WISHES)}")
        url = self._fleet.manager_url()
        if url is not None:
            return await self._ask_manager(url, replica_id, wish)
        if replica_id not in self._names():
            raise self._unknown(replica_id)
        held = self._fleet.held()
        self._fleet.hold(held | {replica_id} if wish == "drain" else held - {replica_id})
        fleet = self._fleet.fleet()
        for record in fleet.replicas if fleet else ():
            if record.replica_id == replica_id:
                return Granted(replica_id, str(record.state), record.held)
        raise self._unknown(replica_id)

    async def _ask_manager(self, url: str, replica_id: str, wish: str) -> Granted:
        if replica_id in (".", ".."):  # which a path would take for a step (RFC 3986 §5.2.4)
            raise self._unknown(replica_id)
        path = f"/v1/replicas/{quote(replica_id, safe='')}/{wish}"
        target = URL(url.rstrip("/") + path, encoded=True)
        try:
            async with self._session().post(target, timeout=TIMEOUT) as answer:
                status = answer.status
                body = await whole_body(answer, ANSWER_BYTES_MAX)
        except TooLongError as error:
            raise RefusedError(502, "manager_failed", str(error)) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RefusedError(
                *(503, "manager_unreachable"),
                f"the manager at {shown_url(url)} does not answer ({type(error).__name__}); "
                "nothing has changed. See that it runs, then ask again",
            ) from error
        if status == 404:
            raise self._unknown(replica_id)
        try:
            if status == 200:
                granted = msgspec.json.decode(body, type=Granted)
                return msgspec.structs.replace(granted, held=wish == "drain")
            said = msgspec.json.decode(body, type=_Refusal).error.message
        except msgspec.MsgspecError:
            said = "it says nothing that can be read"
        if 400 <= status < 500:
            raise RefusedError(status, "refused_by_manager", said)
        raise RefusedError(502, "manager_failed", f"the manager answers {status}: {said}")

    def _names(self) -> list[str]:
        fleet = self._fleet.fleet()
        return [record.replica_id for record in fleet.replicas] if fleet else []

    def _unknown(self, replica_id: str) -> RefusedError:
        names = self._names()
        shown = ", ".join(names[:NAMED_MAX]) + (", …" if len(names) > NAMED_MAX else "")
        words = f"there are {shown}" if names else "there is none"
        return RefusedError(404, "unknown_replica", f"no replica {replica_id!r}; {words}")
