"""/v1/batches: create, get, list, cancel as OpenAI has them; and results as they come.

Creating a batch twice costs money, and the official client asks again when an answer was lost. So
a request with an `Idempotency-Key` is answered with the batch that the first one with that key
made; the id of a batch is derived from the key, so that the database itself keeps it single. The
official client sends no such key but says that it tries again (`x-stainless-retry-count`): then a
batch of the same file with the same settings, made while the first attempt could have been under
way, is that attempt's.

Results can be read before the end, each with its sequence number in the order of completion. A
page that would be empty may wait (`wait`), so that a client hears of a result as soon as there is
one without asking all the time. Large results make short pages: who reads goes on after the last
sequence, and has all when a page is empty and the batch's state, in its header, is a final one.
`order=line` has them in the order of the input instead, as far as all lines before are done, with
the numbers of lines in place of sequences.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

import orjson
from aiohttp import web

from backends.clock import Clock
from backends.offline.abilities import problem_of
from backends.offline.api_errors import ApiError
from backends.offline.counted_desk import CountedDesk
from backends.offline.objects import batch_object, page_object, window_of
from backends.offline.queries import (
    BatchWish,
    after_of,
    batch_wish,
    id_of,
    idempotency_key,
    limit_of,
    number_of,
)
from backends.offline.records import IN_PROGRESS, JobRecord, ResultRecord
from backends.offline.store import Store
from backends.offline.tenants import Door
from backends.offline.until import until
from backends.offline.validation import ENDPOINTS

PATH = "/v1/batches"
LIMIT, LIMIT_MAX = 20, 100  # OpenAI's
RESULTS, RESULTS_MAX = 100, 1_000
RESULTS_AT_ONCE = 50  # in memory
PAGE_BYTES_MAX = 8 * 1024 * 1024  # after which a page ends, however few results it has
RESULTS_WAIT_S_MAX = 30.0
RETRY_S_MAX = 900.0  # the official client waits 600 s for an answer, and a little between attempts
RECENT_MAX = 100
NDJSON = "application/x-ndjson"
STATUS_HEADER = "doherty-batch-status"
WRITE_TIMEOUT_S = 60.0


class BatchesApi:
    """The handlers. `prices` are of one GPU-hour, by model."""

    def __init__(
        self,
        store: Store,
        desk: CountedDesk,
        clock: Clock,
        *,
        door: Door,
        prices: Mapping[str, float],
        ending: asyncio.Event,
        cancelled: asyncio.Event,
        moved_up: Callable[[str], bool],
        nobody: Callable[[str, str], bool],
    ) -> None:
        """`moved_up(model)` says whether its lines go as more urgent work at the moment,
        `nobody(model, url)` that none is known who understands such requests."""
        self._store, self._desk, self._clock = store, desk, clock
        self._door, self._prices = door, prices
        self._ending, self._moved_up, self._nobody = ending, moved_up, nobody
        self._cancelled = cancelled  # set when there is a batch to finish

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(PATH, self._create),
            web.get(PATH, self._list),
            web.get(PATH + "/{batch_id}", self._get),
            web.post(PATH + "/{batch_id}/cancel", self._cancel),
            web.get(PATH + "/{batch_id}/results", self._results),
            web.get(PATH + "/{batch_id}/results/{custom_id:.+}", self._result),
        ]

    def _owner(self, request: web.Request) -> str:
        return self._door.asker(request.headers).owner

    def _shown(self, job: JobRecord) -> dict[str, object]:
        tokens_per_s = self._desk.tokens_per_s().get(job.id, 0.0)
        price = self._prices.get(job.model)
        cost = None if price is None else job.busy_s / 3600 * price
        in_vain = job.state == IN_PROGRESS and self._nobody(job.model, job.endpoint)
        return batch_object(
            job,
            tokens_per_s,
            cost,
            moved_up=self._moved_up(job.model),
            problem=problem_of(job.model, job.endpoint) if in_vain else None,
        )

    async def _create(self, request: web.Request) -> web.Response:
        asker = self._door.asker(request.headers)
        owner = asker.owner
        wish = await batch_wish(request)
        if wish.endpoint not in ENDPOINTS:
            message = f"'{wish.endpoint[:100]}' is none of {', '.join(ENDPOINTS)}."
            raise ApiError(400, message, param="endpoint", code="invalid_endpoint")
        window_s = window_of(wish.completion_window)
        if window_s is None:
            message = "completion_window is a time such as '24h' (s, m, h or d), up to 30 days."
            raise ApiError(400, message, param="completion_window")
        key = idempotency_key(request)
        expiry = wish.output_expires_after
        job = await self._earlier(request, owner, wish, window_s) if not key else None
        if job is None:
            job = await self._store.create_job(
                owner,
                wish.input_file_id,
                wish.endpoint,
                window_s=window_s,
                metadata=wish.metadata,
                output_expires_after_s=expiry.seconds if expiry else None,
                job_id=id_of("batch_", owner, key) if key else None,
                tenant=asker.tenant,
            )
        return web.json_response(self._shown(job))

    async def _earlier(
        self, request: web.Request, owner: str, wish: BatchWish, window_s: int
    ) -> JobRecord | None:
        """Return the batch that an earlier attempt of this request made, if it says it is one."""
        if request.headers.get("x-stainless-retry-count", "0") == "0":
            return None
        since_s = self._clock.unix_s() - RETRY_S_MAX
        wished = (wish.input_file_id, wish.endpoint, float(window_s), wish.metadata or {})
        for job in (await self._store.jobs(owner, limit=RECENT_MAX)).items:
            made = (job.input_file_id, job.endpoint, job.window_s, job.metadata)
            if made == wished and job.created_s >= since_s:
                return job
        return None

    async def _list(self, request: web.Request) -> web.Response:
        page = await self._store.jobs(
            self._owner(request),
            after=after_of(request),
            limit=limit_of(request, LIMIT, LIMIT_MAX),
        )
        shown = [self._shown(job) for job in page.items]
        return web.json_response(page_object(shown, more=page.more))

    async def _get(self, request: web.Request) -> web.Response:
        job = await self._store.job(self._owner(request), request.match_info["batch_id"])
        return web.json_response(self._shown(job))

    async def _cancel(self, request: web.Request) -> web.Response:
        owner, batch_id = self._owner(request), request.match_info["batch_id"]
        job = await self._store.cancel_job(owner, batch_id)
        self._cancelled.set()
        return web.json_response(self._shown(job))

    async def _results(self, request: web.Request) -> web.StreamResponse:
        owner, batch_id = self._owner(request), request.match_info["batch_id"]
        in_order = _in_order(request)
        first = -1 if in_order else 0
        after = int(number_of(request, "after", first, first, 2**53))
        limit = limit_of(request, RESULTS, RESULTS_MAX)
        # The state first: what had ended by then has all its results among these.
        job = await self._store.job(owner, batch_id)
        page = partial(self._store.results, owner, batch_id, in_order=in_order)
        some = min(limit, RESULTS_AT_ONCE)
        waiting = page(after=after, limit=some, wait_s=_wait_s(request))
        found = await until(self._ending, waiting) or ()
        response = web.StreamResponse(headers={STATUS_HEADER: job.state})
        response.content_type = NDJSON
        await response.prepare(request)
        written = 0
        while found:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await response.write(b"".join(map(_numbered, found)))
            limit -= len(found)
            written += sum(len(result.content) for result in found)
            if limit <= 0 or written > PAGE_BYTES_MAX:
                break
            after = found[-1].number if in_order else found[-1].sequence
            found = await page(after=after, limit=min(limit, RESULTS_AT_ONCE))
        return response

    async def _result(self, request: web.Request) -> web.Response:
        owner, batch_id = self._owner(request), request.match_info["batch_id"]
        custom_id = request.match_info["custom_id"]
        waiting = self._store.result(owner, batch_id, custom_id, wait_s=_wait_s(request))
        result = await until(self._ending, waiting)
        if result is None:
            raise ApiError(503, "The service ends: ask again.", code="ending")
        return web.Response(body=_numbered(result), content_type="application/json")


def _in_order(request: web.Request) -> bool:
    order = request.query.get("order", "completed")
    if order not in {"completed", "line"}:
        raise ApiError(400, "order is 'completed' or 'line'.", param="order")
    return order == "line"


def _wait_s(request: web.Request) -> float:
    return number_of(request, "wait", 0.0, 0.0, RESULTS_WAIT_S_MAX)


def _numbered(result: ResultRecord) -> bytes:
    """Put number and sequence in front of a line, which is a JSON object, without reading it."""
    head = orjson.dumps({"number": result.number, "sequence": result.sequence})
    return head[:-1] + b"," + result.content[1:]
