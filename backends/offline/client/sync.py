"""The same for programs without an event loop: one thread of the client's own runs it.

The thread begins with the client and is joined when that is closed. Requests that come from a
generator are made in the caller's thread, which is the only one that may know that generator.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from backends.offline.client import aio
from backends.offline.client.aio import DEFAULT_URL, PATIENCE_S, AsyncCall, AsyncJob, Request
from backends.offline.client.lines import CHAT
from backends.offline.client.spool import Spool
from backends.offline.client.values import LineResult, Progress

T = TypeVar("T")


class _Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="doherty-offline-client", daemon=True
        )
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns; an interrupt cancels it."""
        if not self.alive:
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def drop(self, items: Any) -> None:
        """End an asynchronous generator, unless it ended with the client."""
        if self.alive:
            self.run(_closed(items))

    def close(self) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Client:
    """One service under one key; any thread may use it. To be closed, as by `with`."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._client = aio.AsyncClient(base_url, api_key, patience_s=patience_s)
        self._loop = _Loop()

    def spawn(self, request: Request, *, endpoint: str = CHAT, window: str = "24h") -> Call:
        """Have one request done; return as soon as it is kept by the service."""
        spawning = self._client.spawn(request, endpoint=endpoint, window=window)
        return Call(self._loop, self._loop.run(spawning))

    def spawn_map(
        self,
        requests: Iterable[Request],
        *,
        endpoint: str = CHAT,
        window: str = "24h",
        metadata: Mapping[str, str] | None = None,
    ) -> Job:
        """Have many requests for one model done; see `AsyncClient.spawn_map`."""
        with Spool(endpoint) as spool:
            for request in requests:
                spool.add(request)
            return self.submit(spool, window=window, metadata=metadata)

    def submit(
        self,
        spool: Spool,
        *,
        window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        name: str = "requests.jsonl",
    ) -> Job:
        """Upload what is in the spool and make a job of it."""
        submitting = self._client.submit(spool, window=window, metadata=metadata, name=name)
        return Job(self._loop, self._loop.run(submitting))

    def job(self, job_id: str) -> Job:
        """Return a job by its id; nothing is asked yet."""
        return Job(self._loop, self._client.job(job_id))

    def call(self, call_id: str) -> Call:
        """Return a call by its id; nothing is asked yet. Raises `ValueError`."""
        return Call(self._loop, self._client.call(call_id))

    def jobs(self) -> Iterator[Progress]:
        """Yield all jobs of this key, the latest first."""
        jobs = self._client.jobs()
        try:
            while (progress := self._loop.run(anext_or_none(jobs))) is not None:
                yield progress
        finally:
            self._loop.drop(jobs)

    def close(self) -> None:
        """Let go of the connections and end the thread. What the service has, it does."""
        if self._loop.alive:
            self._loop.run(self._client.close())
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Job:
    """Many requests that are done together; see `AsyncJob`."""

    def __init__(self, loop: _Loop, job: AsyncJob) -> None:
        self._loop, self._job = loop, job
        self.id, self.lines = job.id, job.lines

    def call(self, which: int | str) -> Call:
        """Return the call of request number `which` (from 0), or with this custom id."""
        return Call(self._loop, self._job.call(which))

    def calls(self) -> list[Call]:
        """Return the calls of a job that this process made, in the order of its requests."""
        return [Call(self._loop, call) for call in self._job.calls()]

    def progress(self) -> Progress:
        """Say how far it is."""
        return self._loop.run(self._job.progress())

    def cancel(self) -> Progress:
        """Have no more lines done; those that are done stay."""
        return self._loop.run(self._job.cancel())

    def wait(self, timeout: float | None = None) -> Progress:
        """Wait for its end, however it ends. `TimeoutError` leaves it running."""
        return self._loop.run(self._job.wait(timeout))

    def results(self, *, ordered: bool = False, follow: bool = True) -> Iterator[LineResult]:
        """Yield results as they come, or `ordered` as the requests were; see `AsyncJob`."""
        pages = self._job.pages(ordered=ordered, follow=follow)
        try:
            while (page := self._loop.run(anext_or_none(pages))) is not None:
                yield from page
        finally:
            self._loop.drop(pages)


class Call:
    """One request."""

    def __init__(self, loop: _Loop, call: AsyncCall) -> None:
        self.loop, self.waiting = loop, call
        self.id, self.job_id, self.custom_id = call.id, call.job_id, call.custom_id

    def get(self, timeout: float | None = None) -> Any:
        """Return the answer's body. `LineFailedError`; `TimeoutError` leaves the call running."""
        return self.loop.run(self.waiting.get(timeout))

    def result(self, timeout: float | None = None) -> LineResult:
        """Return what came of it, an error or not."""
        return self.loop.run(self.waiting.result(timeout))


def gather(
    calls: Iterable[Call], *, timeout: float | None = None, return_errors: bool = False
) -> list[Any]:
    """Return the answers' bodies in the order of `calls`, all of one client; see `aio.gather`."""
    wanted = list(calls)
    if not wanted:
        return []
    waiting = [call.waiting for call in wanted]
    return wanted[0].loop.run(aio.gather(waiting, timeout=timeout, return_errors=return_errors))


async def anext_or_none(items: Any) -> Any:
    """Return the next of an asynchronous iterator, None at its end."""
    return await anext(items, None)


async def _closed(items: Any) -> None:
    await items.aclose()
