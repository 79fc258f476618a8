"""Data-parallel ranks of a simulated engine: each on its own, and all of them when told."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from prometheus_client.parser import text_string_to_metric_families

from backends.simulator.flags import parse_flags
from backends.simulator.kv_events import Endpoint
from proxy.contract import LoadSample
from proxy.contract.engines import SGLANG, VLLM
from tests.fakes.simulator import Simulated, simulator

PROMPT = {"model": "demo", "prompt": "x" * 400, "max_tokens": 1}
DIALECTS = ("vllm", "sglang")


async def cached_tokens(engine: Simulated, rank: int | None, body: object = PROMPT) -> int:
    """Send the prompt to a rank; return how much of it was there."""
    headers = {} if rank is None else {"X-Data-Parallel-Rank": str(rank)}
    status, answer = await engine.post("/v1/completions", body, headers)
    assert status == 200
    details: dict[str, Any] = answer["usage"].get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


async def load(engine: Simulated) -> LoadSample:
    reader = VLLM if engine.process.server.settings.dialect == "vllm" else SGLANG
    answers = []
    for path in reader.paths:
        async with engine.session.get(engine.url + path) as response:
            answers.append(await response.read())
    found = reader.read(answers, 1.0)
    assert found is not None
    return found


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_each_rank_has_its_own_cache(dialect: str) -> None:
    async with simulator(dialect=dialect, dp_size=2) as engine:
        assert await cached_tokens(engine, 1) == 0
        assert await cached_tokens(engine, 0) == 0
        assert await cached_tokens(engine, 1) == 96, "all whole blocks but the last token's"
        told = await load(engine)
        assert [rank.prefill_tokens_total for rank in told.ranks] == [100, 104]
        assert all(rank.prefill_busy_s_total > 0 for rank in told.ranks)
        assert (told.prefill_tokens_total, told.generation_tokens_total) == (204, 3)
        state = await engine.state()
        assert state["blocks_cached"] == 12
        assert state["requests"] == 3


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("rank", ["2", "-1"])
async def test_a_rank_that_is_none_is_refused(dialect: str, rank: str) -> None:
    async with simulator(dialect=dialect, dp_size=2) as engine:
        status, answer = await engine.post(
            "/v1/completions", PROMPT, {"X-Data-Parallel-Rank": rank}
        )
        assert status == 400
        assert "out of range [0, 2)" in str(answer)


async def test_who_names_no_rank_gets_one_as_the_engine_would_choose() -> None:
    async with simulator(dialect="sglang", dp_size=2) as engine:
        assert [await cached_tokens(engine, None) for _ in range(4)] == [0, 0, 96, 96]
    async with simulator(dialect="vllm", dp_size=2) as engine:
        assert [await cached_tokens(engine, None) for _ in range(2)] == [0, 96]
        odd = await engine.post("/v1/completions", PROMPT, {"X-Data-Parallel-Rank": "first"})
        assert odd[0] == 200


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_the_page_of_several_ranks_has_each_family_once(dialect: str) -> None:
    async with simulator(dialect=dialect, dp_size=3) as engine:
        await cached_tokens(engine, 2)
        _, page = await engine.get("/metrics")
        families = [family.name for family in text_string_to_metric_families(page)]
        assert len(families) == len(set(families))
        about = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
        assert len(about) == len(set(about))
        assert len((await load(engine)).ranks) == 3


@pytest.mark.parametrize(
    ("dialect", "path"), [("vllm", "/reset_prefix_cache"), ("sglang", "/flush_cache")]
)
async def test_a_cache_is_dropped_in_every_rank(dialect: str, path: str) -> None:
    async with simulator(dialect=dialect, dp_size=2) as engine:
        for rank in (0, 1):
            await cached_tokens(engine, rank)
        assert (await engine.post(path))[0] == 200
        assert [await cached_tokens(engine, rank) for rank in (0, 1)] == [0, 0]


async def test_all_ranks_sleep_and_wake() -> None:
    async with simulator(sleep_mode=True, dp_size=2) as engine:
        await cached_tokens(engine, 1)
        await engine.post("/sleep")
        assert (await load(engine)).asleep
        assert (await engine.post("/v1/completions", PROMPT))[0] == 503
        await engine.post("/wake_up")
        assert not (await load(engine)).asleep
        assert await cached_tokens(engine, 1) == 0


async def test_adapters_in_use_are_named() -> None:
    async with simulator(adapters=("fr", "sql")) as engine:
        assert (await load(engine)).busy_adapters == ()
        stream = {**PROMPT, "model": "sql", "max_tokens": 4000, "stream": True}
        data = msgspec.json.encode(stream)
        async with engine.session.post(engine.url + "/v1/completions", data=data) as response:
            await response.content.readany()
            assert (await load(engine)).busy_adapters == ("sql",)


def _two_free_ports() -> int:
    """Return the first of two neighbours, below those that the kernel gives to connections."""
    for port in range(random.randrange(20_000, 30_000, 2), 32_000, 2):
        with socket.socket() as one, socket.socket() as other, suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("no two ports side by side are free")


async def test_each_rank_has_its_own_events() -> None:
    port = _two_free_ports()
    context = zmq.asyncio.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.subscribe(b"")
    try:
        async with simulator(dp_size=2, kv_events=Endpoint(port=port)) as engine:
            _, sources = await engine.get("/kv_event_sources")
            assert [sources[rank]["endpoint"] for rank in ("0", "1")] == [
                f"tcp://127.0.0.1:{port}",
                f"tcp://127.0.0.1:{port + 1}",
            ]
            subscriber.connect(sources["1"]["endpoint"])
            while not await subscriber.poll(50):
                body = {**PROMPT, "cache_salt": str(len(await engine.state()))}
                await engine.post("/reset_prefix_cache")
                await cached_tokens(engine, 1, body)
            _, _, payload = await subscriber.recv_multipart()
            assert msgspec.msgpack.decode(payload)[2] == 1
    finally:
        subscriber.close(linger=0)
        context.term()


def test_events_of_several_ranks_need_a_first_port(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dp-size", "2", "--kv-events-port"]
    settings = parse_flags([*flags, "5600"])
    assert (settings.dp_size, settings.kv_events) == (2, Endpoint(port=5600))
    with pytest.raises(SystemExit):
        parse_flags([*flags, "0"])
    assert "consecutive ports" in capsys.readouterr().err
