"""Whether a dry run tells the truth: each request is explained, then sent, and both are compared.

A whole Doherty runs with simulated replicas that have streams to compute all the while. Requests
come from a trace, one after the other: POST /debug/route first, then at once the same request, and
what its answer's head says of the choice (`x-doherty-replica`, `-decision`, `-cached-tokens`,
`-uncached-tokens`) is laid beside what was foretold. One in four names a session. The fleet has one
worker, because a dry run speaks for the worker that it is asked of; and nobody else sends anything
between the two, because a choice that follows from a moment is another in another moment. The
streams are begun anew from time to time, so that the load lies differently.

What is let differ is the price in seconds, which falls as work is done; by how much is told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
import orjson
import uvloop

from loadtest.client import Client, RequestError
from loadtest.fleet import MODEL, Fleet, FleetOptions, fleet, local
from loadtest.formats import read_trace
from loadtest.measure import quantile
from loadtest.prompts import PromptWriter, Style
from loadtest.replay import WallClock
from loadtest.run import RunError
from loadtest.traces import Arrival, Selection, TraceError, select
from loadtest.wire import AnswerReader

SUMMARY = "compare a dry run of each request (POST /debug/route) with what then becomes of it"
PATH = "/v1/chat/completions"
SESSION_EVERY = 4
STREAM_TOKENS = 20_000  # longer than anybody waits: they are cut
TOKENS_A_CHUNK = 200  # so that reading them costs this machine little
POLL_S = 0.005
ANSWER_S_MAX = 60.0
SHOWN_MAX = 10


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent, and what runs beside it."""

    trace: str = "conversation"
    requests: int = 1000
    input_tokens_max: int = 16_384
    replicas: int = 4
    streams: int = 12
    renew_every: int = 50  # requests after which other streams are begun
    settle_s: float = 0.03  # for what engines tell of their caches after an answer
    profile: str = "h200-8b"
    time_scale: float = 10.0
    doherty: str = ""


class Choice(msgspec.Struct, frozen=True):
    """Where a request goes, and why; of one that waits, only that."""

    replica: str = ""
    reason: str = ""
    cached_tokens: int = 0
    uncached_tokens: int = 0
    waits: bool = False


class Pair(msgspec.Struct, frozen=True):
    """What was foretold of one request, and what became of it."""

    foretold: Choice
    real: Choice
    between_s: float  # from the answer of the dry run to the head of the other
    price_s: float = 0.0  # as foretold, and its difference to the real one
    off_s: float = 0.0

    @property
    def equal(self) -> bool:
        return self.foretold == self.real


def foretold(answer: AnswerReader) -> tuple[Choice, float]:
    """Return what a dry run says, and the price. Raises `RunError`."""
    if answer.status != 200:
        raise RunError(f"/debug/route answers {answer.status}: {answer.body[:200]!r}")
    shown = orjson.loads(answer.body)
    if shown["held"]:
        return Choice(waits=True), 0.0
    decision = shown["decision"]
    if decision is None:
        raise RunError(f"/debug/route: nobody takes it: {answer.body[:200]!r}")
    choice = Choice(
        decision["replica"],
        decision["reason"],
        decision["cached_tokens"],
        decision["uncached_tokens"],
    )
    return choice, decision["price_s"]


def came(answer: AnswerReader) -> tuple[Choice, float]:
    """Return what an answer's head says of its choice, and the price. Raises `RunError`."""
    told = answer.headers
    if answer.status != 200 or "x-doherty-replica" not in told:
        raise RunError(f"{PATH} answers {answer.status}, and does not say who: {told}")
    if "x-doherty-queue-reason" in told:
        return Choice(waits=True), 0.0
    choice = Choice(
        told["x-doherty-replica"],
        told["x-doherty-decision"],
        int(told["x-doherty-cached-tokens"]),
        int(told["x-doherty-uncached-tokens"]),
    )
    return choice, float(told["x-doherty-price-s"])


class Comparison:
    """One run against a fleet."""

    def __init__(self, options: Options, running: Fleet, clock: WallClock) -> None:
        self._options = options
        self._clock = clock
        self._proxy = Client(local(running.ports.proxy), clock.now_s)
        self._admin = Client(local(running.ports.admin), clock.now_s)
        self._streams: list[asyncio.Task[None]] = []

    async def run(
        self, arrivals: Sequence[Arrival], say: Callable[[str], None], block_tokens: int
    ) -> list[Pair]:
        """Compare all. Raises `RunError`."""
        writer = PromptWriter(Style(model=MODEL), block_tokens)
        pairs: list[Pair] = []
        for number, arrival in enumerate(arrivals):
            if number % self._options.renew_every == 0:
                await self._renew(number)
                say(f"{number} of {len(arrivals)}")
            fields = ""
            if number % SESSION_EVERY == 0:
                fields = f"x-session-id: {arrival.session or number % 20}\r\n"
            pairs.append(await self._pair(writer.body(arrival), fields))
            await asyncio.sleep(self._options.settle_s)
        return pairs

    async def _pair(self, body: bytes, fields: str) -> Pair:
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                explained = await self._admin.post("/debug/route", body, fields)
                said_s = self._clock.now_s()
                answer = await self._proxy.post(PATH, body, fields)
        except (RequestError, TimeoutError) as error:
            raise RunError(f"no answer: {error}") from error
        first, price_s = foretold(explained)
        real, real_price_s = came(answer)
        first_s = answer.first_content_s or self._clock.now_s()
        off_s = abs(real_price_s - price_s)
        return Pair(first, real, first_s - said_s, price_s, off_s)

    async def _renew(self, number: int) -> None:
        """Cut the streams that run, and begin others."""
        await self._cut()
        readers = [AnswerReader() for _ in range(self._options.streams)]
        for index, reader in enumerate(readers):
            said = f"{number} {index} " + "a word or two " * (50 * (index % 5))
            body = orjson.dumps(
                {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": said}],
                    "stream": True,
                    "max_tokens": STREAM_TOKENS,
                    "ignore_eos": True,
                }
            )
            self._streams.append(asyncio.ensure_future(self._stream(body, reader)))
        for _ in range(int(ANSWER_S_MAX / POLL_S)):
            if all(reader.content_events for reader in readers):
                return
            await asyncio.sleep(POLL_S)
        raise RunError("the streams beside do not begin")

    async def _stream(self, body: bytes, reader: AnswerReader) -> None:
        with contextlib.suppress(RequestError):
            await self._proxy.post(PATH, body, reader=reader)

    async def _cut(self) -> None:
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)
        self._streams.clear()
        await asyncio.sleep(5 * self._options.settle_s)

    async def close(self) -> None:
        await self._cut()
        self._proxy.close()
        self._admin.close()


@contextlib.asynccontextmanager
async def _comparing(options: Options, running: Fleet) -> AsyncIterator[Comparison]:
    comparison = Comparison(options, running, WallClock())
    try:
        yield comparison
    finally:
        await comparison.close()


async def compare(options: Options, say: Callable[[str], None]) -> list[Pair]:
    """Run all of it. Raises `RunError` or `TraceError`."""
    selection = Selection(limit=options.requests, input_tokens_max=options.input_tokens_max)
    trace = select(read_trace(options.trace), selection)
    arrivals = trace.arrivals or tuple(turn for turns in trace.sessions for turn in turns)
    short = [msgspec.structs.replace(arrival, output_tokens=2) for arrival in arrivals]
    fleet_options = FleetOptions(
        replicas=options.replicas,
        profile=options.profile,
        time_scale=options.time_scale,
        stream_interval=TOKENS_A_CHUNK,
        doherty=options.doherty,
    )
    async with (
        fleet("prefix", fleet_options) as running,
        _comparing(options, running) as comparison,
    ):
        return await comparison.run(short[: options.requests], say, trace.block_tokens)


def table(pairs: Sequence[Pair], options: Options) -> str:
    """Return the findings as text."""
    equal = sum(pair.equal for pair in pairs)
    lines = [
        f"{equal} of {len(pairs)} requests went where the dry run had said, for the reason that it "
        "had said,",
        "to a cache of the size that it had said",
        f"trace {options.trace}, {options.replicas} replicas {options.profile}, one worker, "
        f"{options.streams} streams beside",
        "",
        "decision    requests  equal",
    ]
    all_of = Counter(_word(pair.foretold) for pair in pairs)
    alike = Counter(_word(pair.foretold) for pair in pairs if pair.equal)
    lines += [f"{name:10s}  {count:8d}  {alike[name]:5d}" for name, count in all_of.most_common()]
    replicas = Counter(pair.real.replica for pair in pairs if pair.real.replica)
    lines.append("by replica: " + ", ".join(f"{n} {c}" for n, c in sorted(replicas.items())))
    off = [pair.off_s for pair in pairs if pair.equal and not pair.real.waits]
    exact = sum(off_s <= 1e-6 for off_s in off)
    between = [pair.between_s for pair in pairs]
    lines.append(
        f"price: equal to the microsecond {exact} of {len(off)}, at most "
        f"{1e3 * max(off, default=0.0):.3f} ms off; from dry run to first token "
        f"{1e3 * (quantile(between, 0.5) or 0.0):.1f} ms (median)"
    )
    wrong = [pair for pair in pairs if not pair.equal]
    lines += [f"  said {pair.foretold}, came {pair.real}" for pair in wrong[:SHOWN_MAX]]
    return "\n".join(lines)


def _word(choice: Choice) -> str:
    return "waits" if choice.waits else choice.reason


def add_arguments(command: argparse.ArgumentParser) -> None:
    usual = Options()
    command.add_argument(
        "--trace", default=usual.trace, help="as of `replay` (default: %(default)s)"
    )
    command.add_argument("--requests", type=int, default=usual.requests)
    command.add_argument("--replicas", type=int, default=usual.replicas)
    command.add_argument("--streams", type=int, default=usual.streams, help="that run beside")
    command.add_argument("--profile", default=usual.profile, help="of the simulated engines")
    command.add_argument("--doherty", default="", help="the command (default: beside this Python)")


def run(args: argparse.Namespace) -> int:
    """Return 0 where every dry run told the truth."""
    fields = ("trace", "requests", "replicas", "streams", "profile", "doherty")
    options = Options(**{name: getattr(args, name) for name in fields})
    if min(options.requests, options.replicas) < 1 or options.streams < 0:
        print("loadtest: --requests and --replicas are from 1 on", file=sys.stderr)
        return 2
    try:
        pairs = uvloop.run(compare(options, lambda text: print(text, file=sys.stderr)))
    except TraceError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    print(table(pairs, options))
    return 0 if all(pair.equal for pair in pairs) else 1
