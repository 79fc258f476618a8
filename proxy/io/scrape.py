"""Asks engines how busy they are, where no manager does. Runs in the supervisor, once for all.

What is asked and how it is read is `proxy.contract.engines`, the manager's own way. An engine that
tells nothing is a case like any other: it is said once, and choices go by what passes through here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import aiohttp

from proxy.contract import LoadSample
from proxy.contract.bodies import TooLongError, whole_body
from proxy.contract.engines import SGLANG, VLLM, read_any

_log = logging.getLogger("doherty.scrape")

ANSWER_BYTES_MAX = 8 * 1024 * 1024  # the metrics of an engine with a hundred ranks are a fifth
TIMEOUT = aiohttp.ClientTimeout(total=3.0)
# To compress a page of 50 KB costs an engine 1.6 ms each time, and us half a millisecond to undo.
_IN_THE_CLEAR = {"Accept-Encoding": "identity"}


async def ask(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], bytes_max: int
) -> tuple[int, bytes]:
    """Return status and body. Raises `TooLongError`, `TimeoutError` and aiohttp's errors."""
    async with session.get(url, timeout=TIMEOUT, headers={**headers, **_IN_THE_CLEAR}) as answer:
        return answer.status, await whole_body(answer, bytes_max)


class Scraper:
    """Reads one engine. `silent`: it answers, and tells nothing."""

    def __init__(
        self,
        replica_id: str,
        url: str,
        session: aiohttp.ClientSession,
        headers: Mapping[str, str],
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self.replica_id = replica_id
        self.silent = False
        self.was_down = False  # nobody listened, since the last reading
        self._url = url.rstrip("/")
        self._session = session
        self._headers = headers
        self._unix_s = unix_s

    async def read(self, kind: str) -> tuple[str, LoadSample] | None:
        """Return the kind of engine and its load; None when it does not tell.

        `kind` is what it is believed to be. A page that did not come in time makes no reading: with
        half of the figures gone its counters would seem to have begun anew.
        """
        try:
            pages = [await self._page(VLLM.paths[0])]
            at_s = self._unix_s()
            # SGLang's is not read before all of it is there.
            found = read_any(pages, at_s, kind) if kind != SGLANG.kind else None
            if kind != VLLM.kind and (found is None or found[0] == SGLANG.kind):
                pages += [await self._page(path) for path in SGLANG.paths[1:]]
                found = read_any(pages, at_s, SGLANG.kind)
        except aiohttp.ClientConnectorError:
            self.was_down = True
            return None
        except (aiohttp.ClientError, TimeoutError, TooLongError, OSError):
            return None
        self._tell(silent=found is None)
        return found

    async def _page(self, path: str) -> bytes:
        status, body = await ask(self._session, self._url + path, self._headers, ANSWER_BYTES_MAX)
        return body if status == 200 else b""

    def _tell(self, *, silent: bool) -> None:
        if silent and not self.silent:
            _log.warning(
                "replica %s does not tell its load (SGLang: --enable-metrics); "
                "choices go by what passes through here",
                self.replica_id,
            )
        elif self.silent and not silent:
            _log.info("replica %s tells its load", self.replica_id)
        self.silent = silent


def begun_anew(before: LoadSample, load: LoadSample) -> bool:
    """Whether the engine was restarted between two readings: a counter has fallen."""
    return (
        load.prompt_tokens_total < before.prompt_tokens_total
        or load.generation_tokens_total < before.generation_tokens_total
        or load.prefill_tokens_total < before.prefill_tokens_total
    )
