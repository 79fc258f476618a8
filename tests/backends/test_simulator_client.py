"""The official client, and Anthropic's events, as judges."""

from __future__ import annotations

import msgspec
import openai
import pytest

from tests.fakes.simulator import Simulated, simulator


def client(engine: Simulated) -> openai.AsyncOpenAI:
    """Return the official client."""
    return openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="k", max_retries=0)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_chat_and_completions(dialect: str) -> None:
    async with simulator(dialect=dialect) as engine, client(engine) as api:
        assert [model.id async for model in api.models.list()] == ["demo"]
        answer = await api.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=5
        )
        assert answer.choices[0].finish_reason == "length"
        stream = await api.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == answer.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 5
        completion = await api.completions.create(model="demo", prompt=[1, 2, 3])
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 16
        with pytest.raises(openai.NotFoundError, match="nope"):
            await api.completions.create(model="nope", prompt="p")
        with pytest.raises(openai.BadRequestError):
            await api.completions.create(model="demo", prompt="p", max_tokens=10**7)


async def test_an_error_in_a_stream_is_an_error() -> None:
    async with simulator(faults=("error:2",)) as engine, client(engine) as api:
        stream = await api.completions.create(model="demo", prompt="p", stream=True)
        seen = 0
        with pytest.raises(openai.APIError, match="failed"):  # noqa: PT012  # it is the loop
            async for _ in stream:
                seen += 1
        assert seen == 2


async def test_responses() -> None:
    async with simulator(mean_output_tokens=8.0) as engine, client(engine) as api:
        answer = await api.responses.create(model="demo", input="hello", instructions="be brief")
        assert answer.status == "completed"
        assert answer.usage is not None
        assert answer.usage.output_tokens * 4 == len(answer.output_text)
        stream = await api.responses.create(
            model="demo", input="hello", instructions="be brief", stream=True
        )
        events = [event async for event in stream]
        numbers = [event.sequence_number for event in events]
        assert numbers == list(range(len(events)))
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert "".join(deltas) == answer.output_text
        last = events[-1]
        assert last.type == "response.completed"
        assert last.response.output_text == answer.output_text
        cut = await api.responses.create(model="demo", input="hi", max_output_tokens=1)
        assert cut.status == "incomplete"
        assert cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"
        with pytest.raises(openai.NotFoundError):
            await api.responses.create(model="demo", input="x", previous_response_id="resp_1")
        turns = await api.responses.create(
            model="demo",
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "function_call_output", "call_id": "c", "output": "4"},
            ],
        )
        assert turns.output_text


async def test_embeddings() -> None:
    async with simulator(task="embed") as engine, client(engine) as api:
        answer = await api.embeddings.create(model="demo", input=["a", "b"])  # base64 on the wire
        assert len(answer.data[0].embedding) == 256
        assert sum(x * x for x in answer.data[0].embedding) == pytest.approx(1, abs=1e-5)


MESSAGES = {
    "model": "demo",
    "max_tokens": 3,
    "system": [{"type": "text", "text": "be kind"}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
}


async def test_messages() -> None:
    async with simulator() as engine:
        status, whole = await engine.post("/v1/messages", MESSAGES)
        assert status == 200
        assert (whole["type"], whole["role"], whole["stop_reason"]) == (
            "message",
            "assistant",
            "max_tokens",
        )
        _, counted = await engine.post("/v1/messages/count_tokens", MESSAGES)
        assert counted == {"input_tokens": whole["usage"]["input_tokens"]}
        data = await engine.stream("/v1/messages", {**MESSAGES, "stream": True})
        events = [msgspec.json.decode(text) for text in data]
        assert [event["type"] for event in events] == [
            "message_start",
            "content_block_start",
            *["content_block_delta"] * 3,
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        text = "".join(event["delta"]["text"] for event in events[2:5])
        assert text == whole["content"][0]["text"]
        assert events[-2]["delta"]["stop_reason"] == "max_tokens"
        assert events[-2]["usage"]["output_tokens"] == 3
        stop = {**MESSAGES, "stop_sequences": [text[5:8]]}
        _, stopped = await engine.post("/v1/messages", stop)
        assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", text[5:8])
        status, error = await engine.post("/v1/messages", {**MESSAGES, "max_tokens": None})
        assert (status, error["type"]) == (400, "error")
        assert error["error"]["type"] == "invalid_request_error"
