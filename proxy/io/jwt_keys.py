"""The public keys of an identity provider, fetched and kept for the workers.

One fetch for all of them, by the supervisor: at the start, every few minutes, and when a token
names a key that nobody knows, which is how a rotation shows; that at most once in a while, or
strangers could have the provider asked as often as they like. What cannot be fetched or used
changes nothing: the last good set is in force. A file in place of a URL is read when it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import msgspec

from proxy.config import JwtConfig
from proxy.core import claim_limits, limits
from proxy.io.jwt_tokens import Jwks
from proxy.io.tasks import Tasks
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.jwt")

REFRESH_S = 300.0
ASK_AGAIN_S = 10.0  # for a key that nobody knows
RETRY_FIRST_S = 1.0
RETRY_MAX_S = 60.0
FETCH_TIMEOUT_S = 10.0
LOOK_INTERVAL_S = 0.5  # whether a file has changed
DISCOVERY = "/.well-known/openid-configuration"  # OpenID Connect Discovery 1.0 §4


class JwtKeys:
    """The keeper of one set: `tell` gets each new one that can be used, or empty for none."""

    def __init__(self, tasks: Tasks, tell: Callable[[bytes], None]) -> None:
        self._tasks = tasks
        self._tell = tell
        self._config: JwtConfig | None = None
        self._task: asyncio.Task[None] | None = None
        self._document = b""
        self._wanted = asyncio.Event()
        self._asked_again_s = -ASK_AGAIN_S  # when somebody last wanted it
        self._good_s = 0.0  # when the set in force was last seen to be the provider's
        self._failures = 0

    def look(self, config: JwtConfig | None) -> None:
        """Get the keys that this names, from now on. The same again changes nothing."""
        if config == self._config:
            return
        self._config = config
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._document:
            self._document = b""
            self._tell(b"")  # or a worker that starts now would trust the provider of before
        if config is not None:
            self._task = self._tasks.spawn("jwt keys", self._keep(config))

    def want(self) -> None:
        """Some token names a key that is not among them."""
        self._wanted.set()

    def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges."""
        if self._config is None:
            return [], []
        gauges = []
        if self._document:
            gauges.append(Sample("jwt_keys_age_seconds", (), time.monotonic() - self._good_s))
        return [Sample("jwt_keys_failures_total", (), self._failures)], gauges

    async def _keep(self, config: JwtConfig) -> None:
        stamp: object = None
        retry_s = RETRY_FIRST_S
        while True:
            self._wanted.clear()
            try:
                if config.jwks_path is None:
                    self._take(config, await _fetch(config))
                else:
                    stamp = await asyncio.to_thread(_stamp, config.jwks_path)
                    self._take(config, await asyncio.to_thread(_read, config.jwks_path))
                retry_s, pause_s = RETRY_FIRST_S, REFRESH_S
            except (OSError, ValueError, TimeoutError, aiohttp.ClientError) as error:
                self._failures += 1
                kept = "going on with those of before" if self._document else "no token is taken"
                _log.error("keys of %s: %s; %s", config.issuer, _words(error), kept)
                pause_s, retry_s = retry_s, min(RETRY_MAX_S, retry_s * 2)
            if config.jwks_path is not None:
                await _until_changed(config.jwks_path, stamp)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wanted.wait()
                    await asyncio.sleep(self._asked_again_s + ASK_AGAIN_S - time.monotonic())
                    self._asked_again_s = time.monotonic()

    def _take(self, config: JwtConfig, document: bytes) -> None:
        Jwks(config, document)
        self._good_s = time.monotonic()
        if document != self._document:
            self._document = document
            _log.info("keys of %s: %d octets", config.issuer, len(document))
            self._tell(document)


async def _fetch(config: JwtConfig) -> bytes:
    """Return the provider's set. Raises `OSError`, `ValueError` or `aiohttp.ClientError`."""
    timeout = aiohttp.ClientTimeout(total=FETCH_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        url = config.jwks_url
        if url is None:
            url = _jwks_uri(config, await _get(session, config.issuer.rstrip("/") + DISCOVERY))
        return await _get(session, url)


def _jwks_uri(config: JwtConfig, octets: bytes) -> str:
    """OpenID Connect Discovery 1.0 §4.3: who answers must be whom we asked for."""
    try:
        document = msgspec.json.decode(octets, type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("its openid-configuration is no JSON object") from None
    if document.get("issuer") != config.issuer:
        raise ValueError("its openid-configuration is of another issuer")
    url = str(document.get("jwks_uri"))
    JwtConfig(issuer=config.issuer, audience=config.audience, jwks_url=url)  # by the same rules
    return url


async def _get(session: aiohttp.ClientSession, url: str) -> bytes:
    # What redirects would lead away from what the operator named.
    async with session.get(url, allow_redirects=False) as answer:
        if answer.status != 200:
            raise ValueError(f"{url} answers {answer.status}")
        octets = b""
        async for piece in answer.content.iter_chunked(64 * limits.KIB):
            octets += piece
            if len(octets) > claim_limits.JWKS_BYTES_MAX:
                raise ValueError(f"{url} answers with over {claim_limits.JWKS_BYTES_MAX} octets")
        return octets


def _read(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(claim_limits.JWKS_BYTES_MAX + 1)


def _stamp(path: str) -> object:
    try:
        found = Path(path).stat()
    except OSError as error:
        return error.errno
    return (found.st_mtime_ns, found.st_size, found.st_ino)


async def _until_changed(path: str, stamp: object) -> None:
    while True:
        await asyncio.sleep(LOOK_INTERVAL_S)
        if await asyncio.to_thread(_stamp, path) != stamp:
            return


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {FETCH_TIMEOUT_S:g} s"
    return str(error) or type(error).__name__
