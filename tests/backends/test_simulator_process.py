"""The command as a process: start, signals, death, and its flags."""

from __future__ import annotations

import asyncio
import signal

import aiohttp
import pytest

from backends.simulator.app import Process
from backends.simulator.flags import KEEP_ALIVE_VARIABLE, parse_flags
from backends.simulator.kv_events import Endpoint
from tests.fakes.simulator_process import ASK, PATIENCE_S, started


async def test_vllm_aborts_what_is_in_flight_on_sigterm() -> None:
    async with started() as engine:
        task = await engine.begin()
        engine.process.send_signal(signal.SIGTERM)
        status, body = await task
        assert (status, body["choices"][0]["finish_reason"]) == (200, "abort")
        assert await engine.process.wait() == 0


async def test_vllm_drains_for_its_timeout_and_aborts_what_is_new() -> None:
    async with started("--shutdown-timeout", "20", "--time-scale", "100") as engine:
        task = await engine.begin()
        engine.process.send_signal(signal.SIGTERM)
        finish = ""
        while finish != "abort":  # the signal takes a moment to arrive
            _, body = await engine.post("/v1/completions", {**ASK, "max_tokens": 1})
            finish = body["choices"][0]["finish_reason"]
        assert await engine.get("/health") == 200
        assert (await task)[1]["choices"][0]["finish_reason"] == "length"
        assert await engine.process.wait() == 0


async def test_sglang_drains_without_limit_and_still_accepts() -> None:
    flags = ("--dialect", "sglang", "--time-scale", "40", "--drain-poll-seconds", "1")
    async with started(*flags) as engine:
        task = await engine.begin()
        engine.process.send_signal(signal.SIGTERM)
        while await engine.get("/ready") != 503:
            await asyncio.sleep(0.01)
        assert await engine.get("/health") == 503
        status, body = await engine.post("/v1/completions", {**ASK, "max_tokens": 1})
        assert (status, body["choices"][0]["finish_reason"]) == (200, "length")
        assert (await task)[1]["choices"][0]["finish_reason"] == "length"
        assert await engine.process.wait() == 0


async def test_sglang_listens_before_it_is_ready() -> None:
    async with started("--dialect", "sglang", "--startup-seconds", "1") as engine:
        assert await engine.get("/health") == 503
        status, body = await engine.post("/v1/completions", ASK)
        assert (status, body["object"]) == (503, "error")
        while await engine.get("/health") != 200:
            await asyncio.sleep(0.01)
        assert await engine.get("/ready") == 200


async def test_vllm_listens_when_it_is_ready() -> None:
    async with started("--startup-seconds", "0.2") as engine:
        assert (await engine.post("/v1/completions", {**ASK, "max_tokens": 1}))[0] == 200


@pytest.mark.parametrize("how", ["memory", "fault"])
async def test_a_killed_engine_exits_with_a_code_and_drops_its_clients(how: str) -> None:
    async with started("--dialect", "sglang") as engine:
        task = await engine.begin()
        if how == "memory":
            fatal = engine.post("/release_memory_occupation", {})
        else:
            await engine.post("/simulator/faults", {"faults": ["exit:0"]})
            fatal = engine.post("/v1/completions", ASK)
        with pytest.raises(aiohttp.ClientError):
            await fatal
        with pytest.raises(aiohttp.ClientError):
            await task
        assert await engine.process.wait() == 1
        assert engine.process.stderr is not None
        assert b"fatal: " in await engine.process.stderr.read()


async def test_an_error_in_its_loop_is_the_death_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = Process(parse_flags(["--port", "0", "--profile", "fast"]))

    def fail() -> None:
        raise ValueError("unexpected")

    monkeypatch.setattr(process.ranks.first.clockwork, "reap", fail)
    try:
        await process.start()
        async with asyncio.timeout(PATIENCE_S):
            assert await process.run_until(asyncio.Event()) == 1
    finally:
        await process.close()
    said = capsys.readouterr().err
    assert "fatal: ValueError: unexpected" in said
    assert '"task":"engine"' in said, "and where it happened"


def test_flags_understand_both_engines() -> None:
    vllm = parse_flags(
        ["--model", "m", "--block-size", "32", "--max-num-seqs", "9", "--max-model-len", "100"]
    )
    words = ["--model-path", "m", "--page-size", "32", "--max-running-requests", "9"]
    assert parse_flags([*words, "--context-length", "100", "--enable-metrics"]) == vllm
    assert (vllm.models, vllm.block_tokens, vllm.sequences_max) == (("m",), 32, 9)
    assert vllm.context_tokens_max == 100
    named = parse_flags(["--served-model-name", "a", "b", "--lora-modules", "l=/x", "k"])
    assert (named.models, named.adapters) == (("a", "b"), ("l", "k"))


def test_event_endpoints() -> None:
    assert parse_flags([]).kv_events is None
    ports = parse_flags(["--kv-events-port", "0", "--kv-events-replay-port", "7"])
    assert ports.kv_events == Endpoint(port=0, replay_port=7)
    config = '{"publisher":"zmq","endpoint":"tcp://*:5600","topic":"kv"}'
    assert parse_flags(["--kv-events-config", config]).kv_events == Endpoint(
        host="127.0.0.1", port=5600, topic="kv"
    )
    assert parse_flags(["--kv-events-config", '{"publisher":null}']).kv_events is None


def test_the_keep_alive_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_flags([]).keep_alive_timeout_s == 5
    monkeypatch.setenv(KEEP_ALIVE_VARIABLE, "75")
    assert parse_flags([]).keep_alive_timeout_s == 75
    assert parse_flags(["--keep-alive-timeout", "1.5"]).keep_alive_timeout_s == 1.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "70000"], "use 0 to 65535"),
        (["--block-size", "0"], "from 1 on"),
        (["--time-scale", "0"], "not between"),
        (["--profile", "abacus"], "no profile 'abacus'; there are"),
        (["--profile", "abacus.json"], "abacus.json: No such file"),
        (["--fault", "boom"], "use one of refuse"),
        (["--kv-cache-tokens", "8"], "at least one block"),
        (["--kv-events-config", "{"], "--kv-events-config"),
        (["--kv-events-config", '{"endpoint":"udp://x"}'], "tcp://*:5557"),
    ],
)
def test_senseless_flags_are_refused_with_a_reason(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_flags(flags)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


async def test_a_start_by_real_work_decides_the_answers() -> None:
    answers = []
    for flags in (("--start-tables-mib", "1"), ("--start-tables-mib", "1"), ()):
        async with started(*flags) as simulator:
            body = {"model": "demo", "prompt": "words", "max_tokens": 8}
            _, value = await simulator.post("/v1/completions", body)
            answers.append(value["choices"][0]["text"])
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]
