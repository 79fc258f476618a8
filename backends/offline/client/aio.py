"""Requests done offline, from asyncio: spawn them, and have their answers when they are there.

A job is a batch of the service, a call is one line of it; both are known by ids that can be printed
and given to another process. Nothing is kept here: whoever has the id and the key reads the
results, as long as the service keeps them.

Single calls cost a batch each, so those that begin within `GATHER_S` for the same model are sent as
one; a call may therefore share its job with others of this client.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import msgspec

from backends.log import Log
from backends.offline.client.errors import InputError, JobFailedError, OfflineError, RefusedError
from backends.offline.client.lines import CHAT, Lines, custom_id
from backends.offline.client.spool import Spool
from backends.offline.client.transport import Reply, Transport
from backends.offline.client.values import (
    ID_PART,
    LineResult,
    Progress,
    page_of,
    progress_of,
    results_of,
    split_call,
)
from backends.offline.records import ENDED, FAILED
from backends.tasks import cancel_all, spawn

DEFAULT_URL = "http://127.0.0.1:8000"
PATIENCE_S = 60.0  # a service that restarts is back in a few seconds
GATHER_S = 0.005
WAIT_S = 20.0  # of one long poll
PAGE_LINES = 200
YIELD_EVERY = 100  # requests, while a plain iterable is read
ALONE_MAX = 16  # calls of one job that are asked for one by one; more are picked from a stream
ASKED_MAX = 32  # at a time
SILENCE_S = 5.0  # that a timeout may be overrun by, where nobody answers
NAME_BYTES_MAX = 1024  # of an id in a path
POLL_S_MIN, POLL_S_MAX = 0.05, 2.0

Request = Mapping[str, Any]  # the body that would be posted to the endpoint


class AsyncClient:
    """One service under one key, used in one event loop. To be closed, as by `async with`."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.transport = Transport(base_url, api_key, patience_s)
        self._gathering: dict[tuple[str, str, str], _Gathering] = {}
        self._sending: set[asyncio.Task[None]] = set()

    async def spawn(
        self, request: Request, *, endpoint: str = CHAT, window: str = "24h"
    ) -> AsyncCall:
        """Have one request done; return as soon as it is kept by the service."""
        Lines(endpoint).of(request)  # or its neighbours would be refused with it
        key = (endpoint, window, str(request["model"]))
        gathering = self._gathering.get(key)
        if gathering is None:
            gathering = self._gathering[key] = _Gathering()
            task = spawn(self._send(key, gathering), "spawn calls", Log())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return await gathering.add(request)

    async def _send(self, key: tuple[str, str, str], gathering: _Gathering) -> None:
        try:
            await asyncio.sleep(GATHER_S)
            del self._gathering[key]
            endpoint, window, _ = key
            job = await self.spawn_map(gathering.requests, endpoint=endpoint, window=window)
        except (OfflineError, OSError, ValueError) as error:
            gathering.fail(error)
        else:
            gathering.kept(job)
        finally:
            self._gathering.pop(key, None)
            gathering.fail(OfflineError("the client was closed before the call was sent"))

    async def spawn_map(
        self,
        requests: Iterable[Request] | AsyncIterable[Request],
        *,
        endpoint: str = CHAT,
        window: str = "24h",
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncJob:
        """Have many requests for one model done; they may come from a generator.

        Returns as soon as all are kept by the service. Raises `InputError` for the first that
        could not be asked; then none is.
        """
        with Spool(endpoint) as spool:
            if isinstance(requests, AsyncIterable):
                async for request in requests:
                    spool.add(request)
            else:
                for number, request in enumerate(requests):
                    spool.add(request)
                    if number % YIELD_EVERY == 0:
                        await asyncio.sleep(0)
            return await self.submit(spool, window=window, metadata=metadata)

    async def submit(
        self,
        spool: Spool,
        *,
        window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        name: str = "requests.jsonl",
    ) -> AsyncJob:
        """Upload what is in the spool and make a job of it."""
        if not spool.lines.count:
            raise InputError(1, "there is no request")
        spool.ready()
        reply = await self.transport.upload("/v1/files", name, spool.file, spool.size)
        wish = {
            "input_file_id": _id_in(reply),
            "endpoint": spool.lines.endpoint,
            "completion_window": window,
            "metadata": dict(metadata) if metadata else None,
        }
        made = await self.transport.make("/v1/batches", wish)
        return AsyncJob(self, _id_in(made), spool.lines.count)

    def job(self, job_id: str) -> AsyncJob:
        """Return a job by its id; nothing is asked yet."""
        return AsyncJob(self, job_id)

    def call(self, call_id: str) -> AsyncCall:
        """Return a call by its id; nothing is asked yet. Raises `ValueError`."""
        return AsyncCall(self, *split_call(call_id))

    async def jobs(self) -> AsyncIterator[Progress]:
        """Yield all jobs of this key, the latest first."""
        after = ""
        while True:
            reply = await self.transport.get(f"/v1/batches?limit=100{after}")
            page, more = page_of(reply.body)
            for progress in page:
                yield progress
            if not more or not page:
                return
            after = f"&after={quote(page[-1].job_id, safe='')}"

    async def close(self) -> None:
        """Give up what is being sent, and the connections. What the service has, it does."""
        await cancel_all(self._sending)
        await self.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class _Gathering:
    """Calls that become one job."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._calls: list[asyncio.Future[AsyncCall]] = []

    async def add(self, request: Request) -> AsyncCall:
        self.requests.append(request)
        call: asyncio.Future[AsyncCall] = asyncio.get_running_loop().create_future()
        self._calls.append(call)
        return await call

    def kept(self, job: AsyncJob) -> None:
        for number, call in enumerate(self._calls):
            if not call.done():  # its caller has given up
                call.set_result(job.call(number))

    def fail(self, error: Exception) -> None:
        for call in self._calls:
            if not call.done():
                call.set_exception(error)


class AsyncJob:
    """Many requests that are done together. `lines` is known to whoever made it."""

    def __init__(self, client: AsyncClient, job_id: str, lines: int | None = None) -> None:
        self._transport = client.transport
        self._client = client
        self.id = job_id
        self.lines = lines
        self._path = f"/v1/batches/{quote(job_id, safe='')}"

    def call(self, which: int | str) -> AsyncCall:
        """Return the call of request number `which` (from 0), or with this custom id."""
        name = custom_id(which) if isinstance(which, int) else which
        return AsyncCall(self._client, self.id, name)

    def calls(self) -> list[AsyncCall]:
        """Return the calls of a job that this process made, in the order of its requests."""
        if self.lines is None:
            raise ValueError(f"how many calls {self.id} has is known to whoever made it")
        return [self.call(number) for number in range(self.lines)]

    async def progress(self) -> Progress:
        """Say how far it is."""
        return progress_of((await self._transport.get(self._path)).body)

    async def cancel(self) -> Progress:
        """Have no more lines done; those that are done stay."""
        return progress_of((await self._transport.make(self._path + "/cancel")).body)

    async def wait(self, timeout: float | None = None) -> Progress:  # noqa: ASYNC109 - as below
        """Wait for its end, however it ends. `TimeoutError` leaves it running."""
        pause_s = POLL_S_MIN
        async with asyncio.timeout(timeout):
            while not (progress := await self.progress()).ended:
                await asyncio.sleep(pause_s)
                pause_s = min(POLL_S_MAX, pause_s * 1.5)
            return progress

    async def results(
        self, *, ordered: bool = False, follow: bool = True
    ) -> AsyncIterator[LineResult]:
        """Yield results as they come, or `ordered` as the requests were; a page is held at a time.

        Not `follow`: those that there are, without waiting for more. Raises `JobFailedError`.
        """
        async for page in self.pages(ordered=ordered, follow=follow):
            for result in page:
                yield result

    async def pages(
        self, *, ordered: bool = False, follow: bool = True
    ) -> AsyncIterator[list[LineResult]]:
        """Yield the same in lists."""
        after, wait_s = -1 if ordered else 0, WAIT_S if follow else 0.0
        order = "line" if ordered else "completed"
        while True:
            query = f"?order={order}&after={after}&limit={PAGE_LINES}&wait={wait_s:g}"
            reply = await self._transport.get(f"{self._path}/results{query}", wait_s)
            page = list(results_of(self.id, reply.body))
            state = reply.headers.get("doherty-batch-status")
            if page:
                after = page[-1].number if ordered else page[-1].sequence
                yield page
            elif state in ENDED or not follow:
                if state == FAILED:
                    raise JobFailedError(self.id, (await self.progress()).problems)
                return
            else:
                await asyncio.sleep(POLL_S_MIN)  # where it was cut by the end of the service


class AsyncCall:
    """One request."""

    def __init__(self, client: AsyncClient, job_id: str, name: str) -> None:
        self._client = client
        self.job_id = job_id
        self.custom_id = name

    @property
    def job(self) -> AsyncJob:
        """Return the job that it is of."""
        return self._client.job(self.job_id)

    @property
    def id(self) -> str:
        """Return what `client.call` takes, in any process."""
        return f"{self.job_id}{ID_PART}{self.custom_id}"

    async def get(self, timeout: float | None = None) -> Any:  # noqa: ASYNC109 - as everywhere
        """Return the answer's body. `LineFailedError`; `TimeoutError` leaves the call running."""
        return (await self.result(timeout)).value()

    async def result(self, timeout: float | None = None) -> LineResult:  # noqa: ASYNC109
        """Return what came of it, an error or not. Raises otherwise as `get`.

        With a timeout of 0 it is asked for once.
        """
        if timeout is None:
            return await self._result(None)
        end_s = asyncio.get_running_loop().time() + timeout
        async with asyncio.timeout(timeout + SILENCE_S):
            return await self._result(end_s)

    async def _result(self, end_s: float | None) -> LineResult:
        now_s, last = asyncio.get_running_loop().time, False
        if self.custom_id in {".", ".."} or len(self.custom_id.encode()) > NAME_BYTES_MAX:
            return await self._looked_for(end_s)
        path = f"/v1/batches/{quote(self.job_id, safe='')}/results/{quote(self.custom_id, safe='')}"
        while True:
            wait_s = WAIT_S if end_s is None else min(WAIT_S, max(0.0, end_s - now_s()))
            reply = await self._client.transport.find(f"{path}?wait={wait_s:.3f}", wait_s)
            if reply is not None:
                return next(results_of(self.job_id, reply.body))
            if last:
                raise RefusedError(404, f"{self.job_id} has no request '{self.custom_id}'")
            progress = await self.job.progress()
            if progress.refused:
                raise JobFailedError(self.job_id, progress.problems)
            last = progress.ended  # it may have ended in between: once more
            if not last and end_s is not None and now_s() >= end_s:
                raise TimeoutError(f"{self.id} is not done yet")

    async def _looked_for(self, end_s: float | None) -> LineResult:
        """Find an id that no path may have: a step in the tree, or too long for one."""
        left_s = None if end_s is None else end_s - asyncio.get_running_loop().time()
        async with asyncio.timeout(left_s):
            async for result in self.job.results():
                if result.custom_id == self.custom_id:
                    return result
        raise RefusedError(404, f"{self.job_id} has no request '{self.custom_id}'")


async def gather(
    calls: Iterable[AsyncCall],
    *,
    timeout: float | None = None,  # noqa: ASYNC109 - as everywhere
    return_errors: bool = False,
) -> list[Any]:
    """Return the answers' bodies in the order of `calls`.

    The first call that failed raises, or with `return_errors` its error stands in its place.
    """
    wanted = list(calls)
    async with asyncio.timeout(timeout):
        found = await _results(wanted)
    answers: list[Any] = []
    for result in found:
        try:
            answers.append(result.value() if isinstance(result, LineResult) else _raised(result))
        except OfflineError as error:
            if not return_errors:
                raise
            answers.append(error)
    return answers


def _raised(error: OfflineError) -> Any:
    raise error


async def _results(calls: Sequence[AsyncCall]) -> list[LineResult | OfflineError]:
    of_job: dict[str, list[AsyncCall]] = defaultdict(list)
    for call in calls:
        of_job[call.job_id].append(call)
    room = asyncio.Semaphore(ASKED_MAX)
    asking = [_of_one_job(group, room) for group in of_job.values()]
    found: dict[str, LineResult | OfflineError] = {}
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in asking]
    for task in tasks:
        found.update(task.result())
    return [found[call.id] for call in calls]


async def _of_one_job(
    calls: Sequence[AsyncCall], room: asyncio.Semaphore
) -> dict[str, LineResult | OfflineError]:
    found: dict[str, LineResult | OfflineError] = {}
    missing = {call.custom_id: call for call in calls}
    async with room:
        try:
            if len(missing) > ALONE_MAX:
                job = calls[0].job
                async for result in job.results():
                    if (call := missing.pop(result.custom_id, None)) is not None:
                        found[call.id] = result
                    if not missing:
                        break
            for call in missing.values():
                found[call.id] = await call.result()
        except OfflineError as error:
            found |= {call.id: error for call in calls if call.id not in found}
    return found


def _id_in(reply: Reply) -> str:
    return msgspec.json.decode(reply.body, type=_Made).id


class _Made(msgspec.Struct, frozen=True):
    id: str
