"""Traffic of every kind over real sockets: one picture in all workers, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.simulator import Simulated, simulator
from tests.io.test_sharing import LINKED, until_metric

CONVERSATIONS, TURNS, AT_A_TIME = 36, 5, 6
AT_REST = (
    *("leases", "leases_of_others", "queue_depth", "requests_in_flight"),
    *("replica_inflight", "replica_queued_tokens", "replica_suspect"),
)
FAULTS = ("internal_errors_total", "notes_lost_total", "retries_total", "worker_restarts_total")
SAME_SHARE_MIN = 0.95


class Answer(msgspec.Struct, frozen=True):
    status: int
    replica: str
    decision: str
    body: bytes


class Site:
    """Proxies before the same engines, asked by clients that connect anew for each request."""

    def __init__(
        self, session: aiohttp.ClientSession, proxies: Sequence[ProxyProcess], draw: random.Random
    ) -> None:
        self.session = session
        self.proxies = proxies
        self.draw = draw

    def url(self, path: str, proxy: int) -> str:
        return f"http://127.0.0.1:{self.proxies[proxy].port}/v1/{path}"

    async def ask(self, path: str, body: dict[str, Any], proxy: int = 0) -> Answer:
        """Post; read the whole answer."""
        async with self.session.post(self.url(path, proxy), json=body) as response:
            data = await response.read()
            fields = response.headers
            replica, decision = fields["x-doherty-replica"], fields["x-doherty-decision"]
            return Answer(response.status, replica, decision, data)

    async def leave(self, path: str, body: dict[str, Any]) -> None:
        """Post; go within the answer when it is a stream, else before it."""
        if body.get("stream"):
            response = await self.session.post(self.url(path, 0), json=body)
            await response.content.readany()
            response.close()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await self.ask(path, body)

    def text(self) -> str:
        return " ".join(self.draw.choices(WORDS, k=300))


WORDS = [f"word{number}" for number in range(500)]


@contextlib.asynccontextmanager
async def site(
    *flags: str, proxies: Sequence[Sequence[str]] = (("--workers", "2"),)
) -> AsyncIterator[tuple[Site, list[Simulated]]]:
    """Three engines and one that embeds, and proxies before them."""
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(simulator()) for _ in range(3)]
        embedder = await stack.enter_async_context(simulator(task="embed", models=("vectors",)))
        urls = [engine.url for engine in (*engines, embedder)]
        more = ["--expose-routing", "--worker-urls", *urls, *flags]
        started = [await stack.enter_async_context(ProxyProcess(*more, *own)) for own in proxies]
        connector = aiohttp.TCPConnector(force_close=True)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        yield Site(session, started, random.Random(5)), engines


def chat(messages: list[dict[str, str]], *, stream: bool) -> dict[str, Any]:
    body = {"model": "demo", "messages": messages, "max_tokens": 24, "stream": stream}
    return body | ({"stream_options": {"include_usage": True}} if stream else {})


async def converse(place: Site, number: int) -> list[str]:
    """Hold a conversation; return the replica of each turn. Every fourth is left in its midst."""
    system = {"role": "system", "content": "You are a helpful assistant. " * 10}
    messages = [system, {"role": "user", "content": place.text()}]
    replicas = []
    for turn in range(TURNS):
        body = chat(messages, stream=number % 2 == 0)
        if number % 4 < 2 and turn == 2:
            await place.leave("chat/completions", body)
        answer = await place.ask("chat/completions", body)
        assert answer.status == 200, answer.body
        assert (b"[DONE]" in answer.body) == (number % 2 == 0)
        replicas.append(answer.replica)
        messages = [
            *messages,
            {"role": "assistant", "content": f"answer {turn}"},
            {"role": "user", "content": place.text()[:600]},
        ]
    return replicas


async def other_traffic(place: Site) -> None:
    """Requests that are no conversation: embeddings, and completions of token ids.

    A prompt that has grown follows what it has grown from; not where another worker is asked before
    it has been told.
    """
    followed = 0
    for number in range(10):
        embedded = await place.ask("embeddings", {"model": "vectors", "input": [f"a {number}"]})
        assert embedded.status == 200
        ids = [place.draw.randrange(30_000) for _ in range(800)]
        whole: list[tuple[str, str]] = []
        for prompt in (ids, [*ids, 1, 2, 3]):
            body = {"model": "demo", "prompt": prompt, "max_tokens": 4}
            answer = await place.ask("completions", body)
            assert answer.status == 200
            whole.append((answer.replica, answer.decision))
        followed += whole[1] == (whole[0][0], "prefix")
    assert followed >= 8


async def stored_answers(place: Site, proxy: int = 0) -> list[tuple[str, str]]:
    """Have ten answers stored; return their ids and replicas."""
    stored = []
    for number in range(10):
        body = {"model": "demo", "input": place.text(), "max_output_tokens": 4}
        answer = await place.ask("responses", body | {"stream": number % 2 == 0}, proxy)
        assert answer.status == 200
        begin = answer.body.index(b'"id":"resp_') + 6
        name = answer.body[begin : answer.body.index(b'"', begin)].decode()
        stored.append((name, answer.replica))
    return stored


async def until_kept(place: Site, stored: list[tuple[str, str]], proxy: int = 0) -> None:
    """Go on from stored answers until each is asked of its keeper, soon after it was told of.

    The simulator stores none and says 404; what matters is who was asked.
    """
    for name, keeper in stored:
        body = {"model": "demo", "input": "And then?", "previous_response_id": name}
        async with asyncio.timeout(20):
            while (answer := await place.ask("responses", body, proxy)).decision != "response":
                await asyncio.sleep(0.01)
        assert (answer.status, answer.replica) == (404, keeper)


async def all_conversations(place: Site) -> list[list[str]]:
    room = asyncio.Semaphore(AT_A_TIME)

    async def one(number: int) -> list[str]:
        async with room:
            return await converse(place, number)

    return list(await asyncio.gather(*map(one, range(CONVERSATIONS))))


async def hit_rate(proxy: ProxyProcess) -> float:
    cached = await proxy.metric("doherty_prefix_cached_tokens_total")
    return cached / await proxy.metric("doherty_prompt_tokens_total")


async def until_at_rest(proxies: Sequence[ProxyProcess], engines: list[Simulated]) -> None:
    """Nobody asks any more: then nothing is held, by the proxies or by the engines."""
    for proxy in proxies:
        for name in AT_REST:
            await until_metric(proxy, name, 0)
        for name in FAULTS:
            assert await proxy.metric(f"doherty_{name}") == 0, name
    for engine in engines:
        await engine.until(lambda state: not state["running"] and not state["waiting"])


def same_share(pairs: list[tuple[str, str]]) -> float:
    return sum(one == other for one, other in pairs) / len(pairs)


async def test_two_workers_serve_everything_and_hold_nothing_afterwards() -> None:
    async with site() as (place, engines):
        proxy = place.proxies[0]
        turns, stored, _ = await asyncio.gather(
            all_conversations(place), stored_answers(place), other_traffic(place)
        )
        follow_ups = [pair for replicas in turns for pair in itertools.pairwise(replicas)]
        assert same_share(follow_ups) >= SAME_SHARE_MIN
        assert len({replicas[0] for replicas in turns}) == 3
        await until_kept(place, stored)
        await until_at_rest(place.proxies, engines)
        assert await proxy.metric("doherty_notes_heard_total") > CONVERSATIONS
        ours = await hit_rate(proxy)
    async with site("--policy", "round_robin") as (place, engines):
        await all_conversations(place)
        await until_at_rest(place.proxies, engines)
        assert ours > 1.2 * await hit_rate(place.proxies[0])


async def test_a_conversation_goes_on_through_the_other_proxy(tmp_path: Path) -> None:
    peers = f"unix:{tmp_path / 'peers'}"
    own = (("--peer-listen", peers), ("--peers", peers))
    async with site("--workers", "1", proxies=own) as (place, engines):
        await asyncio.gather(*(proxy.until_said(LINKED) for proxy in place.proxies))
        pairs = []

        async def two_turns(number: int) -> None:
            messages = [{"role": "user", "content": place.text()}]
            first = await place.ask("chat/completions", chat(messages, stream=True), number % 2)
            messages += [
                {"role": "assistant", "content": "an answer"},
                {"role": "user", "content": place.text()},
            ]
            second = await place.ask(
                "chat/completions", chat(messages, stream=False), 1 - number % 2
            )
            assert (first.status, second.status) == (200, 200)
            pairs.append((first.replica, second.replica))

        for number in range(0, 40, 2):
            await asyncio.gather(two_turns(number), two_turns(number + 1))
        assert same_share(pairs) >= SAME_SHARE_MIN
        assert len({first for first, _ in pairs}) == 3
        await until_kept(place, await stored_answers(place, 0), 1)
        await until_at_rest(place.proxies, engines)
