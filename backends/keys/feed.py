"""The keys that a manager tells: those of a file, or those that another region's manager tells.

What is told is a whole set at a time, under a number of this manager's own, because the versions of
a file begin anew when it is restored from a copy. What was told last is kept in the run folder, for
nobody else's eyes: a manager that is started while the other region cannot be reached, or after its
file has been lost, knows the keys that were last in force, and no region is locked out by another's
accident. Nothing is taken back by silence.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec

from backends.failure import StartError
from backends.keys.file import replace_file
from backends.log import Log
from proxy import tls
from proxy.config import Config
from proxy.contract import HEARTBEAT_INTERVAL_S
from proxy.contract.key_file import WATCH_INTERVAL_S, KeyFile, KeyFileError, read_key_file
from proxy.contract.keys import (
    KEYS_BYTES_MAX,
    KEYS_WATCH_PATH,
    KeySet,
    decode_keys,
    encode_keys,
    follow_token,
)

KEPT_NAME = "keys-last.json"
RETRY_FIRST_S, RETRY_S_MAX = 0.1, 2.0
CONNECT_S = 2.0


class KeyFeed:
    """One writer, any number of readers."""

    def __init__(self) -> None:
        self.keys: KeySet | None = None  # None: not known yet
        self.version = 0
        self.line = b""
        self._news = asyncio.Event()

    def publish(self, keys: KeySet) -> bool:
        """Tell of these from now on; say whether they are others than before."""
        if keys == self.keys:
            return False
        self.keys, self.line = keys, encode_keys(keys)
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()
        return True

    async def newer(self, version: int, wait_s: float) -> bool:
        """Wait until there is a set after `version`; say whether there is."""
        if self.version <= version:
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                return False
        return self.version > version


class KeySource:
    """Where the keys of a manager come from. `run` keeps `feed` up to date."""

    def __init__(self, config: Config, log: Log) -> None:
        """Raises `StartError` where there should be keys and they cannot be read."""
        settings = config.manager
        self._log = log
        self._url = settings.keys_follow
        self._kept = Path(settings.run_dir) / KEPT_NAME
        self._tls = tls.replica_context(config.proxy)
        self._headers = {}
        if config.proxy.peer_key is not None:
            self._headers["authorization"] = f"Bearer {follow_token(config.proxy.peer_key)}"
        path = settings.keys_path or config.proxy.keys_path
        self._file = KeyFile(path) if path and self._url is None else None
        self.feed: KeyFeed | None = None if self._file is None and self._url is None else KeyFeed()
        if self._file is not None:
            self._begin(self._file)
        elif self._url is not None:
            self._remember()

    def _begin(self, file: KeyFile) -> None:
        assert self.feed is not None
        try:
            keys = file.look()
        except KeyFileError as error:
            raise StartError(f"keys_path: {error}") from error
        if file.missing:
            self._remember()
            if self.feed.keys is not None:
                self._log.fault("keys_lost", path=file.path, kept=f"those in {self._kept}")
                return
            self._log.caution("no_keys_yet", path=file.path, advice="doherty keys create makes it")
        if keys is not None:
            self._publish(keys)

    def _remember(self) -> None:
        """Take the keys that were last in force, in a life before."""
        assert self.feed is not None
        try:
            self.feed.publish(read_key_file(str(self._kept)))
        except KeyFileError as error:
            if self._kept.exists():
                self._log.caution("keys_forgotten", reason=str(error))

    async def run(self) -> None:
        """Go on until cancelled."""
        if self._file is not None:
            await self._watch(self._file)
        elif self._url is not None:
            await self._follow(self._url.rstrip("/") + KEYS_WATCH_PATH)

    def _publish(self, keys: KeySet) -> None:
        assert self.feed is not None
        if not self.feed.publish(keys):
            return
        self._log.tell("keys_changed", keys=len(keys.keys), version=keys.version)
        if not keys.keys and not keys.version:
            return  # there is no file yet
        try:
            replace_file(os.fspath(self._kept), encode_keys(keys))
        except OSError as error:
            self._log.fault("keys_not_kept", path=str(self._kept), reason=str(error))

    async def _watch(self, file: KeyFile) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            try:
                keys = file.look()
            except KeyFileError as error:
                self._log.fault("keys_unreadable", reason=str(error), kept="the keys before")
                continue
            if keys is not None:
                self._publish(keys)

    async def _follow(self, url: str) -> None:
        pause_s, lost = RETRY_FIRST_S, False
        while True:
            try:
                async for keys in self._told(url):
                    pause_s = RETRY_FIRST_S
                    if lost:
                        self._log.tell("keys_followed_again")
                    lost = False
                    if keys is not None:
                        self._publish(keys)
                reason = "the watch ended"
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                reason = str(error) or type(error).__name__
            except msgspec.MsgspecError as error:
                reason = f"no keys: {error}"
            if not lost:
                self._log.caution("keys_not_followed", reason=reason, kept="the keys before")
            lost = True
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_S_MAX, pause_s * 2)

    async def _told(self, url: str) -> AsyncIterator[KeySet | None]:
        """Yield each set that a watch tells, and None for its heartbeats."""
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_S, sock_read=3 * HEARTBEAT_INTERVAL_S
        )
        connector = aiohttp.TCPConnector(ssl=self._tls)
        async with (
            aiohttp.ClientSession(
                connector=connector, timeout=timeout, read_bufsize=KEYS_BYTES_MAX
            ) as session,
            session.get(url, headers=self._headers, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise ValueError(f"it answers {response.status}")
            async for line in response.content:
                yield decode_keys(line) if line.strip() else None
