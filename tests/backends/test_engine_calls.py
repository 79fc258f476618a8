"""Sleep, wake and adapters: the calls, and what comes of them at simulators started by our lines.

The simulator dies of a wrong call in SGLang's dialect, as the engine does.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest

from backends.clock import SystemClock
from backends.engines import ENGINES
from backends.engines.base import Call, FlagError, Ports
from backends.engines.release import UNKNOWN_RELEASE
from backends.fetch import HttpFetch
from backends.questions import Questions
from backends.spec import ReplicaSpec
from tests.fakes.simulator_process import Started, started

SPEC = ReplicaSpec(
    replica_id="m-0",
    model="m",
    pool="m",
    engine="vllm",
    model_path="/models/m",
    adapters={"l": "/adapters/l"},
    sleep=True,
)
ASK = {"model": "m", "prompt": "p" * 40, "max_tokens": 4, "temperature": 0}
LONG_ASK = {**ASK, "max_tokens": 20_000}
ENGINES_SLEPT = [("vllm", 1), ("vllm", 2), ("sglang", 1)]


def spec_of(engine: str, *args: str, sleep: bool = True) -> ReplicaSpec:
    return msgspec.structs.replace(SPEC, engine=engine, args=args, sleep=sleep)


def free_ports() -> Ports:
    """Return ports that nobody has, two for events."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return Ports(0, one.getsockname()[1], two.getsockname()[1], 1)


@asynccontextmanager
async def replica(engine: str, spec: ReplicaSpec | None = None) -> AsyncIterator[Started]:
    """Start the simulator with the very arguments that the engine would get."""
    wanted = spec or spec_of(engine)
    argv = list(ENGINES[engine].command(wanted, free_ports(), UNKNOWN_RELEASE).argv)
    model = argv.index(wanted.model_path or "")
    words = ["--model-path", argv[model], *argv[model + 1 :]]
    async with started("--dialect", engine, *words) as running:
        yield running


async def perform(running: Started, calls: Sequence[Call]) -> str:
    """Make the calls in order; return what went wrong with the first that failed."""
    for call in calls:
        timeout = aiohttp.ClientTimeout(total=call.timeout_s)
        request = running.session.request(
            call.method, running.url + call.path, data=call.body, timeout=timeout
        )
        async with request as answer:
            body = (await answer.read()).replace(b" ", b"")
            if answer.status not in call.statuses:
                return f"{call.path}: {answer.status}"
            if call.expect not in body:
                return f"{call.path}: {body.decode()}"
    return ""


async def state(running: Started) -> dict[str, object]:
    async with running.session.get(running.url + "/simulator/state") as answer:
        return dict(await answer.json())


async def text_of(running: Started) -> str:
    status, body = await running.post("/v1/completions", ASK)
    assert status == 200, body
    return str(body["choices"][0]["text"])


@pytest.mark.parametrize(("engine", "level"), ENGINES_SLEPT)
async def test_sleep_and_wake_twice(engine: str, level: int) -> None:
    adapter, wanted = ENGINES[engine], spec_of(engine)
    async with replica(engine) as running:
        before = await text_of(running)
        for _ in range(2):
            assert await perform(running, adapter.sleep_calls(wanted, level)) == ""
            asleep = await state(running)
            assert {"weights", "kv_cache"} <= set(asleep["released"])  # type: ignore[call-overload]
            assert await perform(running, adapter.wake_calls(wanted, level)) == ""
            awake = await state(running)
            assert (awake["released"], awake["blank"], awake["gate"]) == ([], False, "open")
            assert await text_of(running) == before
        assert running.process.returncode is None


@pytest.mark.parametrize(("engine", "finish"), [("vllm", "length"), ("sglang", "abort")])
async def test_sleep_comes_after_what_runs(engine: str, finish: str) -> None:
    """vLLM lets it end. SGLang has no such mode: a manager drains it before."""
    tokens = 500 if engine == "vllm" else 20_000
    async with replica(engine) as running:
        ask = running.post("/v1/completions", {**ASK, "max_tokens": tokens})
        task = asyncio.ensure_future(ask)
        while not (await state(running))["requests"]:
            await asyncio.sleep(0.01)
        assert await perform(running, ENGINES[engine].sleep_calls(spec_of(engine), 1)) == ""
        assert (await task)[1]["choices"][0]["finish_reason"] == finish


# Names of what is done, one after another, until the last of them kills the server.
DEADLY = [
    ["resume"],
    ["sleep", "wake", "wake"],
    ["busy", "release"],
    ["release", "busy"],
]


@pytest.mark.parametrize("steps", DEADLY, ids=" ".join)
async def test_another_order_kills_sglang(steps: list[str]) -> None:
    adapter, wanted = ENGINES["sglang"], spec_of("sglang")
    sleep, wake = adapter.sleep_calls(wanted, 1), adapter.wake_calls(wanted, 1)
    sequences = {"sleep": sleep, "wake": wake, "release": sleep[-1:], "resume": wake[:1]}
    async with replica("sglang") as running:
        busy = None
        for step in steps[:-1]:
            if step == "busy":
                busy = asyncio.ensure_future(running.post("/v1/completions", LONG_ASK))
                await running.until_running(1)
            else:
                assert await perform(running, sequences[step]) == ""
        if steps[-1] == "busy":
            fatal = asyncio.ensure_future(text_of(running))
        else:
            fatal = asyncio.ensure_future(perform(running, sequences[steps[-1]]))
        with pytest.raises(aiohttp.ClientError):
            await fatal
        assert await running.process.wait() == 1
        if busy is not None:
            with pytest.raises(aiohttp.ClientError):
                await busy


async def test_a_busy_sglang_refuses_to_flush_and_lives() -> None:
    """So the call before the release is the one that fails, where something runs after all."""
    pause, flush, release = ENGINES["sglang"].sleep_calls(spec_of("sglang"), 1)
    assert (pause.path, release.path) == ("/pause_generation", "/release_memory_occupation")
    at_once = msgspec.structs.replace(flush, path=flush.path.partition("?")[0])
    async with replica("sglang") as running:
        task = asyncio.ensure_future(running.post("/v1/completions", LONG_ASK))
        await running.until_running(1)
        assert await perform(running, (at_once, release)) == "/flush_cache: 400"
        assert running.process.returncode is None
        assert await perform(running, ENGINES["sglang"].sleep_calls(spec_of("sglang"), 1)) == ""
        await task


async def test_vllm_forgives() -> None:
    adapter, wanted = ENGINES["vllm"], spec_of("vllm")
    async with replica("vllm") as running:
        assert await perform(running, adapter.wake_calls(wanted, 1)) == ""
        for _ in range(2):
            assert await perform(running, adapter.sleep_calls(wanted, 1)) == ""
        assert await running.get("/health") == 200, "which says nothing of sleep"
        assert (await running.post("/v1/completions", ASK))[0] == 503
        assert await perform(running, adapter.wake_calls(wanted, 1)) == ""
        assert await text_of(running)


async def test_level_2_needs_its_reload() -> None:
    adapter, wanted = ENGINES["vllm"], spec_of("vllm")
    async with replica("vllm") as running:
        assert await perform(running, adapter.sleep_calls(wanted, 2)) == ""
        assert await perform(running, adapter.wake_calls(wanted, 1)) == ""
        assert (await state(running))["blank"] is True, "level 1's way leaves the weights out"
        assert await perform(running, adapter.wake_calls(wanted, 2)) == ""
        assert (await state(running))["blank"] is False


async def test_sglang_keeps_its_name_though_it_lists_another() -> None:
    """It lists the path once its weights were read anew, and takes requests by any name."""
    adapter = ENGINES["sglang"]
    wanted = msgspec.structs.replace(spec_of("sglang"), adapters={}, snapshot=True)
    async with replica("sglang", wanted) as running:
        assert await perform(running, adapter.sleep_calls(wanted, 2)) == ""
        assert await perform(running, adapter.wake_calls(wanted, 2)) == ""
        async with running.session.get(running.url + "/v1/models") as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == ["/models/m"]
        fetch = HttpFetch()
        questions = Questions(wanted, adapter, fetch, SystemClock())
        questions.begin(running.url)
        await questions.list()
        await fetch.close()
        assert questions.models == ("m",)
        assert await text_of(running)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
async def test_the_line_of_an_engine_starts_a_simulator(engine: str) -> None:
    """It answers to the model's name, has the adapter, and publishes its events on loopback."""
    async with replica(engine) as running:
        async with running.session.get(running.url + "/v1/models") as answer:
            names = [model["id"] for model in (await answer.json())["data"]]
        assert names == ["m", "l"]
        path = "/kv_event_sources" if engine == "vllm" else "/server_info"
        async with running.session.get(running.url + path) as answer:
            told = await answer.json()
        if engine == "vllm":
            assert told["0"]["endpoint"].startswith("tcp://127.0.0.1:")
            assert told["0"]["replay_endpoint"].startswith("tcp://127.0.0.1:")
            assert told["0"]["topic"] == "kv"
        else:
            assert told["kv_events"]["endpoint_host"] == "127.0.0.1"
            assert told["kv_events"]["topic"] == "kv"


REFUSALS = [
    ("vllm", (), False, 1, "`sleep: true`"),
    ("sglang", (), False, 1, "`sleep: true`"),
    ("vllm", (), True, 0, "take 1 or 2"),
    ("vllm", (), True, 3, "take 1 or 2"),
    ("sglang", (), True, 2, "take 1"),
    ("vllm", ("--speculative-config", "{}"), True, 2, "draft model"),
]


@pytest.mark.parametrize(("engine", "args", "sleep", "level", "why"), REFUSALS)
def test_sleep_that_cannot_be(
    engine: str, args: tuple[str, ...], sleep: bool, level: int, why: str
) -> None:
    with pytest.raises(FlagError, match=why):
        ENGINES[engine].sleep_calls(spec_of(engine, *args, sleep=sleep), level)


@pytest.mark.parametrize(("engine", "level"), ENGINES_SLEPT)
def test_every_call_has_a_reason_and_a_deadline(engine: str, level: int) -> None:
    adapter, wanted = ENGINES[engine], spec_of(engine)
    calls = adapter.sleep_calls(wanted, level) + adapter.wake_calls(wanted, level)
    calls += adapter.adapter_calls(wanted, {"a": "/a"}, {"b": "/b"})
    for call in calls:
        assert call.why
        assert 0 < call.timeout_s < 1000
        assert set(call.statuses) <= {200, 404}
        assert call.method == "GET" or not call.expect


@pytest.mark.parametrize("done", [0, 1, 2])
def test_sglang_takes_a_sleep_back_only_before_the_release(done: int) -> None:
    """What a failed release has let go of is not known, and to resume it wrongly is fatal."""
    calls = ENGINES["sglang"].balk_calls(spec_of("sglang"), 1, done)
    paths = [call.path for call in calls] if calls is not None else None
    assert paths == (["/continue_generation", "/ready", "/health"] if done < 2 else None)
    assert ENGINES["vllm"].balk_calls(spec_of("vllm"), 1, done)


LOADS = [
    ({}, {}, []),
    ({"a": "/a"}, {"a": "/a"}, []),
    ({}, {"a": "/a"}, [("load", "a", "/a")]),
    ({"a": "/a"}, {}, [("unload", "a", None)]),
    ({"a": "/a"}, {"a": "/new"}, [("unload", "a", None), ("load", "a", "/new")]),
    (
        {"a": "/a", "b": "/b"},
        {"b": "/b", "c": "/c"},
        [("unload", "a", None), ("load", "c", "/c")],
    ),
]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(("loaded", "wanted", "steps"), LOADS)
def test_adapters(
    engine: str,
    loaded: dict[str, str],
    wanted: dict[str, str],
    steps: list[tuple[str, str, str | None]],
) -> None:
    calls = ENGINES[engine].adapter_calls(spec_of(engine), loaded, wanted)
    prefix = "/v1" if engine == "vllm" else ""
    found = []
    for call in calls:
        body = msgspec.json.decode(call.body)
        found.append((call.path, body.pop("lora_name"), body.pop("lora_path", None)))
        assert body == {}
    assert found == [(f"{prefix}/{what}_lora_adapter", name, path) for what, name, path in steps]
