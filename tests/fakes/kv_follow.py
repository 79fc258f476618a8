"""A follower of simulated engines, and requests told to it as the supervisor would tell them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from proxy.core import limits
from proxy.core.prefix import PrefixChain, prefix_chain
from proxy.core.routes import PromptKind
from proxy.core.scan import scan_body
from proxy.core.usage import read_usage
from proxy.io.kv_events import KvFollower
from proxy.io.kv_reach import Followed
from proxy.io.tasks import Tasks

PATIENCE_S = 20.0


class Following:
    """A follower and what it has said."""

    def __init__(self, session: aiohttp.ClientSession, **options: Any) -> None:
        self.tasks = Tasks()
        self.session = session
        self.evicted: list[tuple[str, int]] = []
        self.cleared: list[str] = []
        self.held: list[tuple[str, PrefixChain]] = []
        self.states: list[tuple[str, bool, int]] = []
        self.keys = 0
        self.follower = KvFollower(
            self.tasks,
            session,
            on_evicted=lambda name, hashes: self.evicted.extend((name, one) for one in hashes),
            on_cleared=self.cleared.append,
            on_held=lambda *held: self.held.append(held),
            on_state=lambda *state: self.states.append(state),
            **options,
        )

    async def until(self, claim: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not claim():
                await asyncio.sleep(0.005)

    async def follow(self, url: str, name: str = "a", **fields: Any) -> None:
        """Follow one replica and wait until its events are there."""
        self.follower.follow([Followed(name, url, **fields)])
        await self.until(lambda: self.fresh(name))
        await asyncio.sleep(limits.KV_EARLY_S)  # what is sent sooner may be of before

    def fresh(self, name: str = "a") -> bool:
        return any(state.name == name and state.fresh for state in self.follower.states())

    def state(self, name: str = "a") -> Any:
        return next(state for state in self.follower.states() if state.name == name)

    def resident(self, name: str = "a") -> int:
        binding = self.follower.binding(name)
        assert binding is not None
        return binding.resident_tokens

    def bound(self, name: str = "a") -> int:
        binding = self.follower.binding(name)
        assert binding is not None
        return binding.bound

    async def ask(self, url: str, prompt: str, name: str = "a") -> PrefixChain:
        """Send one request through, as a proxy does; return its chain."""
        body = msgspec.json.encode({"model": "demo", "prompt": prompt, "max_tokens": 2})
        chain = prefix_chain(PromptKind.COMPLETION, scan_body(body), None)
        self.keys += 1
        now_s = asyncio.get_running_loop().time
        self.follower.dispatched(self.keys, name, chain, now_s())
        async with self.session.post(url + "/v1/completions", data=body) as answer:
            assert answer.status == 200
            self.follower.prefill_ended(self.keys, now_s())
            usage = read_usage(await answer.read())
        self.follower.released(self.keys, usage, now_s())
        return chain


@asynccontextmanager
async def following(**options: Any) -> AsyncIterator[Following]:
    async with aiohttp.ClientSession() as session:
        made = Following(session, **options)
        try:
            yield made
        finally:
            await made.follower.close()
            await made.tasks.close()
