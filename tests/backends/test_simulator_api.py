"""The serving endpoints: recorded shapes, faulty input, cancellation."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fakes.simulator import Simulated, simulator

GOLDEN = Path(__file__).parents[1] / "golden"
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 8}
LONG = {"model": "demo", "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 4}


def golden(name: str) -> Any:
    """Return a recorded answer."""
    return msgspec.json.decode((GOLDEN / name).read_bytes())


def shape(value: Any) -> Any:
    """Return keys in order and types, without values."""
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


def chunks_of(data: list[str]) -> list[Any]:
    """Return the chunks of a stream, which ends as streams do."""
    assert data[-1] == "[DONE]"
    return [msgspec.json.decode(text) for text in data[:-1]]


@pytest.mark.parametrize(
    ("dialect", "name"), [("vllm", "vllm-0.26.0-"), ("sglang", "sglang-0.5.17-")]
)
async def test_answers_have_the_recorded_shape(dialect: str, name: str) -> None:
    async with simulator(dialect=dialect, models=("m",)) as engine:
        status, body = await engine.post("/v1/chat/completions", {**CHAT, "model": "m"})
        assert status == 200
        assert shape(body) == shape(golden(name + "chat.json"))
        assert len(body["choices"][0]["message"]["content"]) == 8 * 4
        assert body["usage"]["completion_tokens"] == 8
        _, models = await engine.get("/v1/models")
        assert shape(models) == shape(golden(name + "models.json"))

        ask = {**CHAT, "model": "m", "stream": True, "stream_options": {"include_usage": True}}
        ask["messages"] = LONG["messages"]
        await engine.post("/v1/chat/completions", {**LONG, "model": "m"})
        chunks = chunks_of(await engine.stream("/v1/chat/completions", ask))
        recorded = golden(name + "chat-stream.json")
        assert [shape(c) for c in chunks[:3]] == [shape(c) for c in recorded["chunks"][:3]]
        assert shape(chunks[-1]["usage"]) == shape(recorded["usage"])
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
        reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
        texts = [c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]]
        assert [len(text) for text in texts if text] == [4] * 8
        assert len({c["id"] for c in chunks}) == 1


async def test_completion_streams_have_the_recorded_shape() -> None:
    async with simulator() as engine:
        ask = {"model": "demo", "prompt": [[1, 2, 3]], "max_tokens": 2, "stream": True}
        ask["stream_options"] = {"include_usage": True}
        chunks = chunks_of(await engine.stream("/v1/completions", ask))
        recorded = golden("vllm-0.26.0-completion-stream.json")["chunks"]
        recorded[-1]["usage"]["prompt_tokens_details"]["created_cache_tokens"] = 0  # as in chat
        assert [shape(c) for c in chunks] == [shape(c) for c in recorded]
        assert chunks[-1]["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_streamed_and_whole_texts_agree(dialect: str) -> None:
    async with simulator(dialect=dialect) as engine:
        ask = {"model": "demo", "prompt": ["one", "other"], "n": 2, "max_tokens": 6}
        _, body = await engine.post("/v1/completions", ask)
        whole = [choice["text"] for choice in body["choices"]]
        assert len(set(whole)) == 4
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        texts = ["", "", "", ""]
        for chunk in chunks_of(await engine.stream("/v1/completions", {**ask, "stream": True})):
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == whole
        assert body["usage"]["prompt_tokens"] == 3
        assert body["usage"]["completion_tokens"] == 24
        # A stop in the second word ends the answer before it.
        stop = whole[0][5:8]
        _, body = await engine.post("/v1/completions", {**ask, "n": 1, "stop": [stop, "ZZ"]})
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (whole[0].partition(stop)[0], "stop")
        assert choice["stop_reason" if dialect == "vllm" else "matched_stop"] == stop


async def test_turns_of_a_conversation_hit_the_cache() -> None:
    async with simulator() as engine:
        messages = [{"role": "user", "content": "tell me " * 40}]
        cached = []
        before = 0
        for turn in range(3):
            ask = {"model": "demo", "messages": messages, "max_tokens": 40}
            _, body = await engine.post("/v1/chat/completions", ask)
            usage = body["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
            if turn:
                # All of the last turn but its unfinished block and the token never computed.
                assert before - 16 <= cached[-1] <= before
            before = usage["total_tokens"]
            messages.append(body["choices"][0]["message"])
            messages.append({"role": "user", "content": f"and then? {turn}"})
        assert cached[0] == 0
        salted = {"model": "demo", "messages": messages, "max_tokens": 1, "cache_salt": "s"}
        _, body = await engine.post("/v1/chat/completions", salted)
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


FAULTY = {
    "no model": {"messages": CHAT["messages"]},
    "no messages": {"model": "demo"},
    "empty messages": {"model": "demo", "messages": []},
    "message without role": {"model": "demo", "messages": [{"content": "x"}]},
    "messages of a wrong type": {"model": "demo", "messages": "hi"},
    "tokens as text": {**CHAT, "max_tokens": "8"},
    "no tokens": {**CHAT, "max_tokens": 0},
    "cold beyond zero": {**CHAT, "temperature": -1},
    "stream options without stream": {**CHAT, "stream_options": {"include_usage": True}},
    "too long an answer": {**CHAT, "max_tokens": 10**6},
    "too long a prompt": {"model": "demo", "messages": [{"role": "u", "content": "x" * 400_000}]},
    "not JSON": b'{"model": "demo", ',
    "not an object": b"[1]",
    "not UTF-8": b'{"model": "\xff"}',
    "empty stop": {**CHAT, "stop": [""]},
}


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_faulty_input_is_answered_400_in_the_dialects_shape(dialect: str) -> None:
    async with simulator(dialect=dialect) as engine:
        for name, body in FAULTY.items():
            status, answer = await engine.post("/v1/chat/completions", body)
            assert status == 400, name
            if dialect == "vllm":
                assert list(answer) == ["error"], name
                assert list(answer["error"]) == ["message", "type", "param", "code"], name
                assert answer["error"]["code"] == 400
                assert answer["error"]["message"], name
            else:
                assert list(answer) == ["object", "message", "type", "param", "code"], name
                assert (answer["object"], answer["code"]) == ("error", 400)
        status, answer = await engine.post("/v1/chat/completions", {**CHAT, "model": "nope"})
        assert status == 404
        assert "nope" in str(answer)
        assert (await engine.get("/v1/chat/completions"))[0] == 405
        assert (await engine.post("/v1/embeddings", {"model": "demo", "input": "x"}))[0] == 404
        assert (await engine.state())["requests"] == 0


@pytest.mark.parametrize("prompt", [[], [1, "a"], [-1], [2**32], [[1], 2], [True], {"a": 1}, ""])
async def test_faulty_prompts_are_answered_400(prompt: object) -> None:
    async with simulator() as engine:
        status, answer = await engine.post("/v1/completions", {"model": "demo", "prompt": prompt})
        assert status == 400
        assert answer["error"]["message"]


async def test_what_the_pool_could_never_hold_is_refused() -> None:
    async with simulator(kv_cache_tokens=64) as engine:
        fits = {"model": "demo", "prompt": [1] * 60, "max_tokens": 5}
        assert (await engine.post("/v1/completions", fits))[0] == 200
        status, answer = await engine.post("/v1/completions", {**fits, "max_tokens": 6})
        assert status == 400
        assert "KV cache" in answer["error"]["message"]


async def test_a_body_beyond_the_limit_is_answered_413() -> None:
    async with simulator() as engine:
        body = io.BytesIO(b'{"model":"demo","prompt":"%b"}' % (b"x" * (32 * 1024 * 1024)))
        async with engine.session.post(engine.url + "/v1/completions", data=body) as response:
            assert response.status == 413
            assert (await response.json())["error"]["code"] == 413


async def test_keys_are_checked_where_the_engine_checks_them() -> None:
    good, bad = {"Authorization": "Bearer k2"}, {"Authorization": "Bearer k"}
    for dialect, guarded, unguarded in (
        ("vllm", "/v1/models", "/version"),
        ("sglang", "/server_info", "/health"),
    ):
        async with simulator(dialect=dialect, api_keys=("k1", "k2")) as engine:
            assert (await engine.post("/v1/chat/completions", CHAT))[0] == 401
            assert (await engine.post("/v1/chat/completions", CHAT, bad))[0] == 401
            assert (await engine.post("/v1/chat/completions", CHAT, good))[0] == 200
            assert await engine.get(guarded) == (401, {"error": "Unauthorized"})
            assert (await engine.get(unguarded))[0] == 200
            assert (await engine.get("/metrics"))[0] == 200


async def test_ids_come_from_the_header_in_vllm_and_from_rid_in_sglang() -> None:
    header = {"X-Request-Id": "abc-1"}
    async with simulator(echo_request_id=True) as engine:
        _, body = await engine.post("/v1/chat/completions", CHAT, header)
        assert body["id"] == "chatcmpl-abc-1"
        _, body = await engine.post(
            "/v1/completions", {"model": "demo", "prompt": "p"}, {"X-Request-Id": "a b"}
        )
        assert body["id"].startswith("cmpl-")
        assert " " not in body["id"]
        url = engine.url + "/v1/chat/completions"
        for stream in (True, False):
            ask = msgspec.json.encode({**CHAT, "stream": stream})
            async with engine.session.post(url, data=ask, headers=header) as response:
                assert response.headers["X-Request-Id"] == "abc-1"
                await response.read()
        async with engine.session.get(engine.url + "/health") as response:
            assert len(response.headers["X-Request-Id"]) == 32
    async with simulator(dialect="sglang") as engine:
        _, body = await engine.post("/v1/chat/completions", {**CHAT, "rid": "r1"}, header)
        assert body["id"] == "r1"


async def test_tokenize_and_back() -> None:
    async with simulator() as engine:
        _, value = await engine.post("/tokenize", {"model": "demo", "prompt": "grüße, world"})
        assert shape({**value, "tokens": [1, 2]}) == shape(golden("vllm-0.26.0-tokenize.json"))
        assert value["count"] == len(value["tokens"]) == 4
        _, back = await engine.post("/detokenize", {"model": "demo", "tokens": value["tokens"]})
        assert back == {"prompt": "grüße, world"}
        _, chat = await engine.post("/tokenize", {"messages": CHAT["messages"]})
        _, body = await engine.post("/v1/chat/completions", CHAT)
        assert chat["count"] == body["usage"]["prompt_tokens"]
        assert (await engine.post("/tokenize", {"model": "demo"}))[0] == 400
        assert (await engine.post("/detokenize", {"tokens": [-1]}))[0] == 400


async def test_embeddings_are_unit_vectors_of_their_prompts() -> None:
    async with simulator(task="embed") as engine:
        ask = {"model": "demo", "input": ["one", "two", "one"], "dimensions": 10}
        _, body = await engine.post("/v1/embeddings", ask)
        one, two, again = (row["embedding"] for row in body["data"])
        assert one == again != two
        assert math.hypot(*one) == pytest.approx(1)
        assert len(one) == 10
        _, body = await engine.post("/v1/embeddings", {**ask, "encoding_format": "base64"})
        packed = base64.b64decode(body["data"][1]["embedding"])
        assert list(struct.unpack("<10f", packed)) == pytest.approx(two)
        assert (await engine.post("/v1/chat/completions", CHAT))[0] == 404


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def post_bare(
    engine: Simulated, body: dict[str, Any], path: bytes = b"/v1/completions"
) -> Connection:
    """Post over a bare socket and leave the answer unread."""
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    data = msgspec.json.encode(body)
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (path, len(data))
    writer.write(head + data)
    return reader, writer


async def leave(connection: Connection) -> None:
    """Close the client's side."""
    connection[1].close()
    await connection[1].wait_closed()


ENDLESS = {"model": "demo", "prompt": "p" * 400, "max_tokens": 30_000}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_frees_its_blocks(stream: bool) -> None:
    async with simulator(time_scale=0.5) as engine:
        connection = await post_bare(engine, {**ENDLESS, "stream": stream})
        if stream:
            await connection[0].readuntil(b"data: ")
        await engine.until(lambda state: state["running"] == 1)
        await leave(connection)
        state = await engine.until(lambda state: state["aborted"] == 1)
        assert state["running"] == state["blocks_used"] == state["finished"] == 0
        assert state["generation_tokens"] < 30_000


async def test_a_client_that_goes_while_waiting_is_forgotten() -> None:
    async with simulator(time_scale=0.5, sequences_max=1) as engine:
        first = await post_bare(engine, {**ENDLESS, "stream": True})
        await engine.until(lambda state: state["running"] == 1)
        second = await post_bare(engine, ENDLESS)
        await engine.until(lambda state: state["waiting"] == 1)
        await leave(second)
        state = await engine.until(lambda state: state["aborted"] == 1)
        assert (state["running"], state["waiting"]) == (1, 0)
        await leave(first)
        await engine.until(lambda state: state["aborted"] == 2 and not state["running"])


async def test_a_response_is_opened_while_it_waits_as_by_vllm() -> None:
    async with simulator(time_scale=0.5, sequences_max=1) as engine, asyncio.timeout(20):
        first = await post_bare(engine, {**ENDLESS, "stream": True})
        await engine.until(lambda state: state["running"] == 1)
        ask = {"model": "demo", "input": "hello", "max_output_tokens": 2, "stream": True}
        second = await post_bare(engine, ask, b"/v1/responses")
        await second[0].readuntil(b"event: response.in_progress\n")
        await engine.until(lambda state: state["waiting"] == 1)
        await leave(first)
        rest = await second[0].readuntil(b"event: response.incomplete\n")
        assert b"response.created" not in rest
        assert b'"sequence_number":2' in rest
        await leave(second)


async def test_an_idle_connection_is_closed_after_its_time() -> None:
    async with simulator(keep_alive_timeout_s=0.05) as engine, asyncio.timeout(20):
        connection = await post_bare(engine, {**ENDLESS, "max_tokens": 1})
        answer = await connection[0].read()  # until the server closes
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"onnection: close" not in answer
        await leave(connection)


async def test_priorities_go_in_the_dialects_direction() -> None:
    for dialect, low_first, expected in (
        ("vllm", False, ["-5", "5"]),
        ("sglang", False, ["5", "-5"]),
        ("sglang", True, ["-5", "5"]),
    ):
        async with simulator(
            dialect=dialect, priorities=True, low_priority_first=low_first, sequences_max=1
        ) as engine:
            order: list[str] = []

            async def ask(priority: int, tokens: int, order: list[str], to: Simulated) -> None:
                body = {"model": "demo", "prompt": str(priority), "max_tokens": tokens}
                await to.post("/v1/completions", {**body, "priority": priority})
                order.append(str(priority))

            async with asyncio.TaskGroup() as group:
                group.create_task(ask(0, 400, order, engine))
                await engine.until(lambda state: state["running"] == 1)
                for priority in (-5, 5):
                    group.create_task(ask(priority, 20, order, engine))
                await engine.until(lambda state: state["waiting"] == 2)
            assert order == ["0", *expected]


async def test_adapters_are_models_with_a_cache_of_their_own() -> None:
    async with simulator(models=("demo", "alias"), adapters=("lora",)) as engine:
        cached = []
        for model in ("demo", "alias", "lora", "lora"):
            _, body = await engine.post("/v1/chat/completions", {**LONG, "model": model})
            cached.append(body["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached == [0, 96, 0, 96]
        _, models = await engine.get("/v1/models")
        parents = {row["id"]: row["parent"] for row in models["data"]}
        assert parents == {"demo": None, "alias": None, "lora": "demo"}


async def test_answers_may_end_by_themselves() -> None:
    async with simulator(mean_output_tokens=10.0) as engine:
        lengths = []
        ask = {"model": "demo", "prompt": "p", "max_tokens": 500}
        for number in range(30):
            _, body = await engine.post("/v1/completions", {**ask, "prompt": f"p{number}"})
            assert body["choices"][0]["finish_reason"] == "stop"
            lengths.append(body["usage"]["completion_tokens"])
        assert 5 < sum(lengths) / 30 < 20
        for extra in ({"ignore_eos": True}, {"min_tokens": 500}):
            _, body = await engine.post("/v1/completions", {**ask, **extra})
            assert body["usage"]["completion_tokens"] == 500
