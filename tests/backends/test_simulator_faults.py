"""The grammar of faults, and what each does to an answer."""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec
import pytest

from backends.simulator.faults import Fault, FaultError, FaultPlan, parse_fault
from tests.fakes.simulator import simulator

STREAM = {"model": "demo", "prompt": "p", "max_tokens": 8, "stream": True}
WHOLE = {**STREAM, "stream": False}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("refuse", Fault("refuse")),
        ("stall:3", Fault("stall", 3)),
        ("cut:0:p=0.25", Fault("cut", 0, 0.25)),
        ("garbage:p=0.1:times=2", Fault("garbage", 0, 0.1, 2)),
        ("status:503", Fault("status", 503)),
        ("delay:0.5", Fault("delay", 0.5)),
        ("slow:2.5", Fault("slow", 2.5)),
        ("sick", Fault("sick")),
    ],
)
def test_faults_are_understood(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    "text",
    [
        *("", "boom", "stall:x", "stall:1:2", "cut:p=2", "cut:q=1", "cut:-1", "cut:nan", "delay"),
        *("status:200", "slow:0", "cut:times=1.5", "stall:1e3"),
    ],
)
def test_other_texts_are_refused_with_a_reason(text: str) -> None:
    with pytest.raises(FaultError, match=r"fault"):
        parse_fault(text)


def strikes(plan: FaultPlan) -> list[str]:
    """Return what 400 requests meet."""
    return [fault.kind if fault else "" for fault in (plan.strike() for _ in range(400))]


def test_chances_and_counts() -> None:
    plan = FaultPlan(("cut:1:times=2", "stall:p=0.5", "slow:3", "sick"), seed=1)
    kinds = strikes(plan)
    assert kinds[:2] == ["cut", "cut"]
    assert set(kinds[2:]) == {"stall", ""}
    assert 150 < kinds.count("stall") < 250
    assert (plan.slowdown, plan.sick) == (3, True)
    assert strikes(FaultPlan(plan.texts, seed=1)) == kinds


async def test_refused_and_cut_answers_fail_at_the_client() -> None:
    async with simulator() as engine:
        for fault in ("refuse", "cut:0", "cut:2"):
            for body in (STREAM, WHOLE):
                assert (await engine.post("/simulator/faults", {"faults": [fault]}))[0] == 200
                with pytest.raises(aiohttp.ClientError):
                    await engine.post("/v1/completions", body)
                state = await engine.until(lambda state: not state["in_flight"])
                assert state["blocks_used"] == 0
        assert (await engine.post("/simulator/faults", {"faults": []}))[0] == 200
        assert (await engine.post("/v1/completions", WHOLE))[0] == 200


@pytest.mark.parametrize(("chunks", "body"), [(0, STREAM), (2, STREAM), (0, WHOLE), (1, WHOLE)])
async def test_garbage_goes_out_and_the_connection_is_closed(
    chunks: int, body: dict[str, object]
) -> None:
    async with simulator(faults=(f"garbage:{chunks}",)) as engine, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
        data = msgspec.json.encode(body)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % len(data) + data)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert answer.endswith(b"this is not HTTP\r\n")
        assert answer.startswith(b"HTTP/1.1 200" if chunks else b"\0")
        assert answer.count(b"data: ") == (chunks if body["stream"] else 0)
        await engine.until(lambda state: not state["in_flight"])


async def test_a_cut_comes_after_its_chunks() -> None:
    async with (
        simulator(faults=("cut:3",)) as engine,
        engine.session.post(engine.url + "/v1/completions", json=STREAM) as response,
    ):
        for _ in range(3):
            assert (await response.content.readuntil(b"\n\n")).startswith(b"data: ")
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.readuntil(b"\n\n")


async def test_a_stalled_answer_keeps_the_connection_and_its_end_frees_it() -> None:
    async with simulator(faults=("stall:2",)) as engine:
        response = await engine.session.post(engine.url + "/v1/completions", json=STREAM)
        assert (await response.content.readuntil(b"\n\n")).startswith(b"data: ")
        assert (await response.content.readuntil(b"\n\n")).startswith(b"data: ")
        await engine.until(lambda state: state["finished"] == 1)
        assert (await engine.state())["in_flight"] == 1
        response.close()
        await engine.until(lambda state: state["in_flight"] == 0)


async def test_errors_in_and_instead_of_an_answer() -> None:
    async with simulator(faults=("error:2:times=1", "status:503")) as engine:
        chunks = await engine.stream("/v1/completions", STREAM)
        assert len(chunks) == 4
        assert '"error"' in chunks[2]
        assert chunks[3] == "[DONE]"
        status, body = await engine.post("/v1/completions", WHOLE)
        assert (status, body["error"]["code"]) == (503, 503)
        assert (await engine.get("/health"))[0] == 200
        await engine.post("/simulator/faults", {"faults": ["sick"]})
        assert (await engine.get("/health"))[0] == 503


async def test_a_bad_fault_changes_nothing() -> None:
    async with simulator(faults=("sick",)) as engine:
        status, body = await engine.post("/simulator/faults", {"faults": ["boom"]})
        assert status == 400
        assert "use one of" in body["error"]["message"]
        assert (await engine.get("/simulator/faults"))[1] == {"faults": ["sick"]}
