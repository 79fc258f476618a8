"""Which API keys there are: a file that is watched, or a manager that tells.

It runs in the supervisor. A set is told to the workers as a whole when it changes, so a key that is
revoked is refused within one look at the file (a fifth of a second), or one line of the manager's
watch. Nothing is taken back by silence: a file that cannot be read, or a manager that is away,
leaves the keys that were known, and a gauge says for how long.

Until it is known whether there are keys, nothing is let through that would have this proxy serve:
a fleet that came before them would be open to everybody. A manager that has none says so. One that
had some and tells none any more has lost them, and they stay in force.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import aiohttp
import msgspec

from proxy.config import AccessConfig, ProxyConfig
from proxy.config_policy import flaws_of, shared_key
from proxy.contract.key_file import WATCH_INTERVAL_S, KeyFile, KeyFileError
from proxy.contract.keys import (
    KEYS_BYTES_MAX,
    KEYS_WATCH_PATH,
    KeySet,
    decode_keys,
    follow_token,
)
from proxy.io.newest_lines import newest_lines
from proxy.io.registry import RETRY_FIRST_S, RETRY_MAX_S
from proxy.io.tasks import Tasks
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.keys")

FLAWS_TOLD_MAX = 10
# A manager of a former release knows no such path, and one without keys says that it has none.
_HAS_NONE = (404, 501)


class Keyring:
    """The source of keys, and what is known of them."""

    def __init__(
        self, tasks: Tasks, on_keys: Callable[[KeySet], None], on_known: Callable[[], None]
    ) -> None:
        """`on_known` is called each time that `known` may have become true."""
        self._tasks = tasks
        self._on_keys = on_keys
        self._on_known = on_known
        self._following: asyncio.Task[None] | None = None
        self._keys: KeySet | None = None
        self._access = AccessConfig()
        self._api_key: str | None = None
        self._shared = ""  # as it was last told that `api_key` is a tenant's
        self._flaws: list[str] = []  # of keys that can never be used, as they were last told
        self._source = ""  # file or manager; "": keys are none of this proxy's business
        self._heard_s = 0.0
        self._failed_total = 0
        self._broken = False  # the file, since its last change
        self.known = False  # the keys, or that there are none

    def look(self, config: ProxyConfig, session: aiohttp.ClientSession) -> None:
        """Begin, or go on as `config` says now."""
        if self._following is not None:
            self._following.cancel()
            self._following = None
        self._source = ""
        self._access, self._api_key = config.access, config.api_key
        self._heard_s = time.monotonic()
        if config.keys_path is not None:
            self._source = "file"
            file = KeyFile(config.keys_path)
            self._read(file)  # before any worker is told to serve
            self._following = self._tasks.spawn("keys", self._watch_file(file))
        elif config.manager_url is not None:
            url = config.manager_url.rstrip("/") + KEYS_WATCH_PATH
            watching = self._watch_manager(url, session, config.peer_key)
            self._following = self._tasks.spawn("keys", watching)
        else:
            self._settle()

    def _settle(self) -> None:
        self.known = True
        self._on_known()

    def _take(self, keys: KeySet) -> None:
        self._heard_s = time.monotonic()
        if keys != self._keys:
            self._keys = keys
            _log.info("%d API keys, version %d", len(keys.keys), keys.version)
            self._on_keys(keys)
        self._tell_flaws(keys)
        self._settle()

    def _tell_flaws(self, keys: KeySet) -> None:
        """Here, once for all workers: they can only refuse what comes with such a key."""
        shared = shared_key(keys.keys, self._api_key)
        if shared and shared != self._shared:
            _log.warning("%s", shared)
        self._shared = shared
        before, self._flaws = self._flaws, flaws_of(keys.keys, self._access)
        if self._flaws == before:
            return
        for flaw in self._flaws[:FLAWS_TOLD_MAX]:
            _log.warning("%s; it is refused", flaw)
        if len(self._flaws) > FLAWS_TOLD_MAX:
            _log.warning("so are %d more keys", len(self._flaws) - FLAWS_TOLD_MAX)

    # --- a file ------------------------------------------------------------------------------

    def _read(self, file: KeyFile) -> None:
        try:
            keys = file.look()
        except KeyFileError as error:
            self._failed_total += 1
            kept = "nobody is let in" if self._keys is None else "going on with the keys as before"
            _log.error("%s: %s", kept, error)
            self._broken = True
            self._settle()  # whoever demands keys and knows none lets nobody in
            return
        if keys is not None:
            self._broken = False
            if file.missing:
                _log.warning(
                    "%s: there is no such file yet, so nobody is let in; "
                    "`doherty keys create` makes it",
                    file.path,
                )
            self._take(keys)
        elif not self._broken:
            self._heard_s = time.monotonic()

    async def _watch_file(self, file: KeyFile) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self._read(file)

    # --- a manager ---------------------------------------------------------------------------

    async def _watch_manager(
        self, url: str, session: aiohttp.ClientSession, peer_key: str | None
    ) -> None:
        """Follow the watch and take it up again whenever it breaks, until cancelled."""
        token = f"Bearer {follow_token(peer_key)}" if peer_key is not None else ""
        pause_s, lost = RETRY_FIRST_S, ""
        while True:
            try:
                async for line in newest_lines(session, url, KEYS_BYTES_MAX, token):
                    self._source, pause_s, lost = "manager", RETRY_FIRST_S, ""
                    self._heard_s = time.monotonic()
                    if line:
                        self._take(decode_keys(line))
                reason = "the watch ended"
            except aiohttp.ClientResponseError as error:
                reason = f"the manager answers {error.status}"
                if error.status == 401:
                    reason += ": peer_key must be the same there"
                if error.status in _HAS_NONE and self._keys is None:
                    self._settle()
                    pause_s, reason = RETRY_MAX_S, ""
            except (aiohttp.ClientError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
                reason = str(error) or type(error).__name__
            if reason and not lost:
                kept = "nobody is served" if self._keys is None else "going on with those last told"
                _log.warning("no news of API keys, %s: %s", kept, reason)
            self._failed_total += reason != "" and not lost
            lost = reason
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_MAX_S, pause_s * 2)

    # --- what is reported --------------------------------------------------------------------

    def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges; nothing where this proxy has no keys to know."""
        if not self._source:
            return [], []
        keys = self._keys or KeySet()
        gauges = [
            Sample("keys", (), len(keys.keys)),
            Sample("keys_version", (), keys.version),
            Sample("keys_age_seconds", (), time.monotonic() - self._heard_s),
        ]
        return [Sample("keys_failures_total", (), self._failed_total)], gauges
