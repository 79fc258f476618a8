"""A thousand requests at once: every one is answered, by the engine that its model names."""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI

from tests.contract.conftest import Site
from tests.fakes.engines import message
from tests.fakes.programs import until

COUNT = 1000


async def test_a_thousand_requests_at_once(site: Site, aclient: AsyncOpenAI) -> None:
    groups = [site.engines["vllm"], site.engines["sglang"]]
    before = [group.until_idle() for group in groups]

    async def ask(number: int) -> None:
        model = groups[number % 2].model
        messages = [message(f"Question {number}.")]
        if number % 4 < 2:
            answer = await aclient.chat.completions.create(
                model=model, messages=messages, max_tokens=3
            )
            assert answer.model == model
            assert answer.choices[0].finish_reason == "length"
            return
        stream = await aclient.chat.completions.create(
            model=model, messages=messages, max_tokens=3, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert {chunk.model for chunk in chunks} == {model}
        assert chunks[-1].choices[0].finish_reason == "length"

    async with asyncio.TaskGroup() as group:
        for number in range(COUNT):
            group.create_task(ask(number))

    for engines, was in zip(groups, before, strict=True):
        now = await asyncio.to_thread(engines.until_idle)
        assert now["finished"] - was["finished"] == COUNT // 2
        assert now["aborted"] == was["aborted"]
    await asyncio.to_thread(
        until, lambda: site.proxy.metric("doherty_requests_in_flight") == 0, "nothing in flight"
    )
