"""Does lines of jobs with what replicas of other classes have to spare.

One dispatcher looks after all models of a region. Twice a second, as often as proxies tell what
they have, it looks at the fleet and at what others ask for, has the gate of each group of models
say how many lines may be there (`gate`), and has its sender keep to that (`sender`). It is a client
of the desk like any worker, and of the proxy like anybody: lines go where routing has them go, and
what others do is not delayed by a second opinion.

It cuts nobody's work but its own. That an engine computes others' requests first, and that a proxy
ends lines before it has a person wait, makes the first moments of a burst good; the gate sees to
the rest of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from urllib.parse import urlsplit

import aiohttp
import msgspec

from backends.clock import Clock
from backends.log import Log
from backends.offline.answers import Answered
from backends.offline.gate import Gate, Seen, Verdict
from backends.offline.region_watch import Asked, Group, RegionWatch, asked_of
from backends.offline.sender import SEMI_ONLINE, SPARE, Bytes, Counts, Sender, verdict_when_moved_up
from backends.offline.urgency import Speed, Urgency
from backends.offline.work import SPARE_PREFIX, Desk, JobNeed, JobNeeds, Line, spare_worker
from backends.tasks import cancel_all, spawn
from proxy.config import Config, ModelConfig
from proxy.contract.behalf import TENANT_FIELD, in_field
from proxy.contract.demand import DEMAND_INTERVAL_S

LOOK_S = DEMAND_INTERVAL_S
NEEDS_S = 5.0
CONNECT_S = 5.0
LINE_S_MAX = 3600.0  # a line that takes longer has failed
ANSWER_BYTES_MAX = 32 * 1024 * 1024
CLASS_FIELD = "x-doherty-class"

Needs = Callable[[float], Awaitable[JobNeeds]]


class GroupReport(msgspec.Struct, frozen=True, kw_only=True):
    """How it goes with one group, for metrics and for people."""

    names: tuple[str, ...]
    work_class: str  # by which lines are sent now
    reason: str  # the gate's
    lines_max: int
    in_flight: int
    in_hand: int
    tokens_per_s: float
    counts: Counts


class _Post:
    """Sends lines to the proxy."""

    def __init__(self, url: str, api_key: str | None, internal_key: str | None = None) -> None:
        """With an `internal_key` lines go on behalf of the tenants whose jobs they are of."""
        self._url = url.rstrip("/")
        self._is_here = (urlsplit(url).hostname or "") in {"127.0.0.1", "::1", "localhost"}
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        self._names_tenants = internal_key is not None
        if key := internal_key or api_key:
            self._headers["authorization"] = f"Bearer {key}"
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, line: Line, work_class: str) -> Answered:
        """Return what came back, whatever that was."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # The gate's word bounds them. A proxy on this machine shows a certificate for the
                # name that clients know it by.
                connector=aiohttp.TCPConnector(limit=0, ssl=not self._is_here),
                timeout=aiohttp.ClientTimeout(total=LINE_S_MAX, sock_connect=CONNECT_S),
                trust_env=False,  # the proxy is never behind the user's web proxy
            )
        headers = {**self._headers, CLASS_FIELD: work_class}
        if line.tenant and self._names_tenants:
            headers[TENANT_FIELD] = in_field(line.tenant)
        try:
            async with self._session.post(
                self._url + line.url, data=bytes(line.body), headers=headers, allow_redirects=False
            ) as answer:
                body = bytearray()
                async for piece in answer.content.iter_any():
                    body += piece
                    if len(body) > ANSWER_BYTES_MAX:
                        problem = f"an answer of more than {ANSWER_BYTES_MAX} bytes"
                        return Answered(status=502, problem=problem)
                return Answered(
                    status=answer.status,
                    body=bytes(body),
                    request_id=answer.headers.get("x-request-id", "")[:256],
                    retry_after=answer.headers.get("retry-after", ""),
                )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return Answered(status=0, problem=f"{type(error).__name__}: {error}")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class _Served:
    """One group: its gate, its sender, and how fast it goes."""

    def __init__(self, sender: Sender, gate: Gate, log: Log) -> None:
        self.sender = sender
        self.task = spawn(sender.run(), "sending lines of jobs", log)
        self.gate = gate
        self.urgency = Urgency()
        self.verdict = Verdict(lines=0, keep=0)
        self.before = Counts()
        self.speed = Speed()


class Dispatcher:
    """All of it; `start` and `close` are its life."""

    def __init__(
        self,
        desk: Desk,
        needs: Needs,
        config: Config,
        *,
        proxy_url: str,
        manager_url: str,
        api_key: str | None,
        internal_key: str | None = None,
        clock: Clock,
        log: Log,
    ) -> None:
        """`needs(unix_s)` returns what is left to do of all jobs."""
        self._desk, self._needs = desk, needs
        self._lines_each_max = config.offline.spare_inputs_max
        self._by_workers = names_of_workers(config.models)
        self._post = _Post(proxy_url, api_key, internal_key)
        self._watch = RegionWatch(manager_url, clock)
        self._clock, self._log = clock, log
        self._worker_id = f"{SPARE_PREFIX}{os.urandom(6).hex()}"
        self._bytes = Bytes()
        self._served: dict[str, _Served] = {}
        self._left: Mapping[str, tuple[JobNeed, ...]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None

    def start(self, place: str | None = None) -> None:
        """Begin to watch, to look, and to send; what the last life at this `place` held is ours."""
        if place is not None:
            name = hashlib.blake2b(place.encode(), digest_size=6).hexdigest()
            self._worker_id = f"{SPARE_PREFIX}{name}"
        session = self._session = aiohttp.ClientSession(trust_env=False)
        self._tasks = [
            spawn(self._watch.follow(session), "watching the fleet for spare room", self._log),
            spawn(self._look_on(session), "looking for spare room", self._log),
            spawn(self._count_needs(), "looking at what is due", self._log),
        ]

    async def close(self) -> None:
        """End all lines in flight, and give back what is in hand."""
        await cancel_all([*self._tasks, *(served.task for served in self._served.values())])
        self._served.clear()
        await self._post.close()
        if self._session is not None:
            await self._session.close()

    def configure(self, models: Iterable[ModelConfig]) -> None:
        """Go by these models from now on."""
        self._by_workers = names_of_workers(models)

    def reports(self) -> list[GroupReport]:
        """Return how it goes with each group."""
        return [
            GroupReport(
                names=served.sender.names,
                work_class=served.sender.work_class,
                reason=served.verdict.reason,
                lines_max=served.verdict.lines,
                in_flight=served.sender.in_flight,
                in_hand=served.sender.in_hand,
                tokens_per_s=served.speed.tokens_per_s,
                counts=served.sender.counts,
            )
            for served in self._served.values()
        ]

    def serves(self, model: str) -> bool:
        """Say whether there are replicas, up or not, that lines of a model may go to."""
        return any(model in served.sender.names for served in self._served.values())

    def moved_up(self, model: str) -> bool:
        """Say whether lines of a model go as semi-online work, because they would be late."""
        return any(
            model in served.sender.names and served.sender.work_class == SEMI_ONLINE
            for served in self._served.values()
        )

    # --- looks ------------------------------------------------------------------------------------

    async def _look_on(self, session: aiohttp.ClientSession) -> None:
        while True:
            await self._watch.ask(session)
            await self._look(self._clock.now_s())
            await asyncio.sleep(LOOK_S)

    async def _look(self, now_s: float) -> None:
        groups = self._watch.groups
        for gone in self._served.keys() - groups.keys():
            await cancel_all([self._served.pop(gone).task])
        for name, group in groups.items():
            if name not in self._served:
                worker_id = spare_worker(self._worker_id, name)
                sender = Sender(
                    worker_id, self._desk, self._post, self._bytes, self._clock, self._log
                )
                self._served[name] = _Served(sender, Gate(self._lines_each_max), self._log)
            self._turn(self._served[name], group, now_s)

    def _turn(self, served: _Served, group: Group, now_s: float) -> None:
        """Have one group's gate decide, and its sender do so."""
        sender = served.sender
        adapters = [name for name in self._left if name.partition(":")[0] in group.names]
        sender.names = tuple(dict.fromkeys((*group.names, *adapters)))
        counts = msgspec.structs.replace(sender.counts)
        served.speed.note(counts.tokens, now_s)
        seen = seen_of(group, self._asked(group), self._watch.age_s(), now_s)
        seen = msgspec.structs.replace(
            seen,
            lines=sender.in_flight,
            turned_back=counts.turned_back - served.before.turned_back,
            preempted=counts.preempted - served.before.preempted,
        )
        served.before = counts
        if self._is_late(served, group, now_s):
            lines_max = self._lines_each_max * max(1, len(group.replicas))
            verdict, work_class = verdict_when_moved_up(lines_max), SEMI_ONLINE
        else:
            verdict, work_class = served.gate.decide(seen), SPARE
        if verdict.reason != served.verdict.reason and (sender.in_hand or verdict.lines):
            self._log.tell(
                "spare_room",
                models=group.names,
                lines_max=verdict.lines,
                in_flight=sender.in_flight,
                reason=verdict.reason,
            )
        served.verdict = verdict
        sender.turn(verdict, work_class)

    def _asked(self, group: Group) -> Asked:
        return asked_of(self._watch.demand, group.names) if self._watch.demand else Asked()

    # --- deadlines --------------------------------------------------------------------------------

    async def _count_needs(self) -> None:
        while True:
            try:
                self._left = (await self._needs(self._clock.unix_s())).models
            except Exception as error:  # noqa: BLE001 - whatever a store may raise: asked again
                problem = f"{type(error).__name__}: {error}"
                self._log.caution("needs_unknown", problem=problem)
            await asyncio.sleep(NEEDS_S)

    def _is_late(self, served: _Served, group: Group, now_s: float) -> bool:
        """Say whether the lines of a group move up a class now."""
        if self._by_workers & set(group.names):
            return False
        needs = [need for name in served.sender.names for need in self._left.get(name, ())]
        was = served.urgency.due_s is not None
        best_tokens_per_s = served.speed.best_tokens_per_s
        late = served.urgency.look(needs, best_tokens_per_s, now_s, awake=bool(group.replicas))
        if late != was:
            event = "lines_moved_up" if late else "lines_moved_down"
            self._log.tell(event, models=group.names, tokens_per_s=round(best_tokens_per_s))
        if was and not late:
            served.gate = Gate(self._lines_each_max)  # what it saw meanwhile was ourselves
        return late


def seen_of(group: Group, asked: Asked, age_s: float, now_s: float) -> Seen:
    """Return what a gate goes by, but for our own lines."""
    return Seen(
        at_s=now_s,
        news_age_s=age_s,
        replicas=group.replicas,
        others_in_flight=asked.in_flight,
        others_queued=asked.queued,
        others_arrivals_total=asked.arrivals_total,
        panicking=asked.panicking,
        kv_target=asked.kv_target,
    )


def names_of_workers(models: Iterable[ModelConfig]) -> frozenset[str]:
    """Return the models that engine workers do the lines of: they keep to deadlines there."""
    return frozenset(
        model.name for model in models if any(pool.serves == "jobs" for pool in model.pools)
    )
