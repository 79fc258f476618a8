"""A provider, a clock and answers that a test holds in its hand: no process, no socket."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from backends.engines.base import Engine
from backends.engines.probe import Program, program_of
from backends.fetch import Answer, Silence
from backends.journal import Launch
from backends.spec import ReplicaSpec

METRICS = """\
vllm:num_requests_running{{engine="0"}} {running}
vllm:num_requests_waiting{{engine="0"}} {waiting}
vllm:kv_cache_usage_perc{{engine="0"}} 0.5
"""


class ManualTimer:
    """A timer of `ManualClock`."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class ManualClock:
    """Time that passes only by `advance`."""

    def __init__(self) -> None:
        self._now_s = 1000.0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, ManualTimer]] = []

    def now_s(self) -> float:
        return self._now_s

    def unix_s(self) -> float:
        return 1_700_000_000.0 + self._now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(call)
        heapq.heappush(self._timers, (self._now_s + delay_s, next(self._order), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Let time pass; what falls due on the way happens in order, and what follows from it."""
        until_s = self._now_s + seconds
        await settle()
        while self._timers and self._timers[0][0] <= until_s:
            self._now_s, _, timer = heapq.heappop(self._timers)
            if timer.call is not None:
                timer.call()
                await settle()
        self._now_s = until_s
        await settle()


async def settle() -> None:
    """Let every task run until it waits for time or for somebody outside."""
    for _ in range(30):
        await asyncio.sleep(0)


class FakeProcess:
    """A process that does what the test says."""

    def __init__(self, pid: int, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.pid = pid
        self.start_ticks = pid * 10
        self.placed: asyncio.Future[str] | None = None
        self.waits = ""
        self.argv = tuple(argv)
        self.env = dict(env)
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.signals: list[int] = []
        self.released = False

    @property
    def port(self) -> int:
        return int(self.argv[self.argv.index("--port") + 1])

    def signal_group(self, number: int) -> None:
        if not self.exited.done():
            self.signals.append(number)

    def release(self) -> None:
        self.released = True

    def exit(self, how: str = "exited with status 1") -> None:
        self.exited.set_result(how)


class FakeProvider:
    """Remembers what it was asked to start."""

    boot_id = "boot-1"

    def __init__(self) -> None:
        self.spawned: list[FakeProcess] = []
        self.left_behind: dict[str, FakeProcess] = {}
        self.failure: OSError | None = None
        self.waits: str | None = None  # of what it starts; None: that runs at once, here

    def program(self, engine: Engine, spec: ReplicaSpec) -> Program:
        return program_of(engine, spec, os.environ)

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], launch_id: str, log_path: Path
    ) -> FakeProcess:
        if self.failure is not None:
            raise self.failure
        process = FakeProcess(4000 + len(self.spawned), argv, env)
        if self.waits is not None:
            process.placed = asyncio.get_running_loop().create_future()
            process.waits = self.waits
        self.spawned.append(process)
        return process

    def recover(self, launches: Iterable[Launch]) -> dict[str, FakeProcess]:
        known = {launch.launch_id for launch in launches}
        return {k: v for k, v in self.left_behind.items() if k in known}


class FakeFetch:
    """Answers for every engine: `answers` by path, or `silence` instead of all of them.

    A POST is answered by `POST /path`, and 200 where there is no such answer.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {
            "/health": Answer(200),
            "/v1/models": Answer(200, b'{"data":[{"id":"m"},{"id":"m-lora"}]}'),
        }
        self.silence: Silence | None = None
        self.posted: list[str] = []
        self.dropped: list[str] = []
        self.bodies: list[bytes] = []  # of the same
        self.answering = asyncio.Event()  # cleared: a POST waits
        self.answering.set()
        self.asked: list[str] = []  # paths of GET
        self.busy(0, 0)

    def busy(self, running: int, waiting: int) -> None:
        text = METRICS.format(running=running, waiting=waiting)
        self.answers["/metrics"] = Answer(200, text.encode())

    async def get(self, url: str, timeout_s: float) -> Answer:
        await asyncio.sleep(0)
        if self.silence is not None:
            return Answer(0, silence=self.silence)
        path = "/" + url.split("/", 3)[3]
        self.asked.append(path)
        return self.answers.get(path, Answer(404))

    async def drop(self, url: str) -> None:
        self.dropped.append(url)

    async def post(self, url: str, body: bytes, timeout_s: float) -> Answer:
        self.posted.append(url)
        self.bodies.append(body)
        await self.answering.wait()
        return self.answers.get("POST /" + url.split("/", 3)[3], Answer(200))
