"""What the official client gets when all is well: every shape that it can ask for, typed."""

from __future__ import annotations

import base64
import json
import struct

import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAI
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from tests.contract.conftest import MODELS, Site
from tests.fakes.engines import Engines, message
from tests.fakes.programs import fetch

HELLO = [message("Say hello.")]
HOSTILE_TEXTS = {
    "unicode": "Grüße, 世界! 🦜 \u202e\u0000\u2028 \U0001f469\u200d\U0001f680",
    "looks like a body": '{"model": "other", "stream": true} "model":"x"\\',
    "looks like a stream": "data: [DONE]\n\ndata: {}\r\n\r\n0\r\n\r\n",
    "a megabyte": "0123456789abcdef" * 65_536,
    "a megabyte of unicode": "ß世🦜" * 116_509,
}


def test_chat(client: OpenAI, engines: Engines) -> None:
    answer = client.chat.completions.create(model=engines.model, messages=HELLO, max_tokens=7)
    assert answer.object == "chat.completion"
    assert answer.model == engines.model
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7


def test_chat_streams_the_same_words(client: OpenAI, engines: Engines) -> None:
    whole = client.chat.completions.create(model=engines.model, messages=HELLO, max_tokens=9)
    with client.chat.completions.create(
        model=engines.model,
        messages=HELLO,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len({c.id for c in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert not chunks[-1].choices


def test_chat_stream_without_usage_has_none(client: OpenAI, engines: Engines) -> None:
    with client.chat.completions.create(
        model=engines.model, messages=HELLO, max_tokens=3, stream=True
    ) as stream:
        chunks = list(stream)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_chat_by_the_async_client(aclient: AsyncOpenAI, engines: Engines) -> None:
    whole = await aclient.chat.completions.create(model=engines.model, messages=HELLO, max_tokens=9)
    stream = await aclient.chat.completions.create(
        model=engines.model, messages=HELLO, max_tokens=9, stream=True
    )
    async with stream:
        parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
    assert "".join(parts) == whole.choices[0].message.content


def test_several_choices(client: OpenAI, engines: Engines) -> None:
    whole = client.chat.completions.create(
        model=engines.model, messages=HELLO, max_tokens=5, n=2, logprobs=False
    )
    assert [choice.index for choice in whole.choices] == [0, 1]
    texts = {0: "", 1: ""}
    with client.chat.completions.create(
        model=engines.model, messages=HELLO, max_tokens=5, n=2, stream=True
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


def test_stop_text_ends_the_answer(client: OpenAI, engines: Engines) -> None:
    whole = client.chat.completions.create(model=engines.model, messages=HELLO, max_tokens=30)
    text = whole.choices[0].message.content
    assert text
    stop = text.split()[5]
    short = client.chat.completions.create(
        model=engines.model, messages=HELLO, max_tokens=30, stop=[stop]
    )
    assert short.choices[0].finish_reason == "stop"
    assert short.choices[0].message.content == text[: text.index(stop)]


def test_stream_helper_accumulates(client: OpenAI, engines: Engines) -> None:
    # It refuses an answer that was cut short by its length, so this one ends by a stop text.
    whole = client.chat.completions.create(
        model=engines.model, messages=HELLO, max_tokens=30, stop="  "
    )
    stop = (whole.choices[0].message.content or "").split()[3]
    with client.chat.completions.stream(
        model=engines.model, messages=HELLO, max_tokens=30, stop=stop
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == "".join(deltas) != ""


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("Once upon", 1), (["Once", "Twice", "Thrice"], 3), ([1, 2, 3], 1), ([[1, 2], [3]], 2)],
    ids=["text", "texts", "token ids", "lists of token ids"],
)
def test_completions(client: OpenAI, engines: Engines, prompt: str | list[str], count: int) -> None:
    whole = client.completions.create(model=engines.model, prompt=prompt, max_tokens=4)
    assert [choice.index for choice in whole.choices] == list(range(count))
    assert {choice.finish_reason for choice in whole.choices} == {"length"}
    texts = dict.fromkeys(range(count), "")
    with client.completions.create(
        model=engines.model, prompt=prompt, max_tokens=4, stream=True
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}


def test_responses(client: OpenAI, engines: Engines) -> None:
    answer = client.responses.create(
        model=engines.model, input="Say hello.", instructions="Be brief.", max_output_tokens=6
    )
    assert answer.object == "response"
    assert answer.output_text
    assert answer.status == "incomplete"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 6


def test_responses_stream_in_order(client: OpenAI, engines: Engines) -> None:
    with client.responses.create(
        model=engines.model, input=[message("Say hello.")], max_output_tokens=4, stream=True
    ) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    numbers = [getattr(event, "sequence_number", None) for event in events]
    assert numbers == list(range(len(events)))


def test_unknown_response_is_not_found(client: OpenAI, engines: Engines) -> None:
    # Engines that keep no responses do not even have the path; every replica is asked, then 404.
    assert engines.model
    with pytest.raises(NotFoundError) as caught:
        client.responses.retrieve("resp_of_nobody")
    assert caught.value.status_code == 404


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == sorted(MODELS.values())
    for name in MODELS.values():
        assert client.models.retrieve(name).id == name


def test_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"
    assert "demo-vllm" in caught.value.message


def test_embeddings(client: OpenAI) -> None:
    floats = client.embeddings.create(
        model=MODELS["embed"], input=["one", "two", "one"], encoding_format="float"
    )
    vectors = [row.embedding for row in floats.data]
    assert [row.index for row in floats.data] == [0, 1, 2]
    assert vectors[0] == vectors[2] != vectors[1]
    # Without a wish the client asks for base64 and decodes it itself, to single precision.
    decoded = client.embeddings.create(model=MODELS["embed"], input="one")
    assert decoded.data[0].embedding == pytest.approx(vectors[0], abs=1e-6)


def test_embeddings_as_base64_reach_the_wire(client: OpenAI) -> None:
    raw = client.embeddings.with_raw_response.create(
        model=MODELS["embed"], input="one", encoding_format="base64"
    )
    row = json.loads(raw.content)["data"][0]["embedding"]
    vector = struct.unpack("<256f", base64.b64decode(row))
    assert sum(x * x for x in vector) == pytest.approx(1.0, abs=1e-4)
    assert isinstance(raw.parse(), CreateEmbeddingResponse)


def test_embeddings_of_a_generating_model_are_the_engines_404(
    client: OpenAI, engines: Engines
) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.embeddings.create(model=engines.model, input="one")
    assert caught.value.type == "not_found_error"
    assert "Not Found" in caught.value.message


def test_raw_response(client: OpenAI, engines: Engines) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=engines.model, messages=HELLO, max_tokens=2, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.status_code == 200
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["content-type"] == "application/json"
    assert raw.retries_taken == 0
    answer = raw.parse()
    assert isinstance(answer, ChatCompletion)
    assert answer._request_id == "mine-1"


def test_streaming_response(client: OpenAI, engines: Engines) -> None:
    with client.chat.completions.with_streaming_response.create(
        model=engines.model, messages=HELLO, max_tokens=3, stream=True
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


async def test_streaming_response_by_the_async_client(
    aclient: AsyncOpenAI, engines: Engines
) -> None:
    async with aclient.chat.completions.with_streaming_response.create(
        model=engines.model, messages=HELLO, max_tokens=3
    ) as response:
        answer = await response.parse()
    assert answer.choices[0].finish_reason == "length"


def test_request_ids_are_minted_and_differ(client: OpenAI, engines: Engines) -> None:
    answers = [
        client.chat.completions.create(model=engines.model, messages=HELLO, max_tokens=1)
        for _ in range(3)
    ]
    ids = {answer._request_id for answer in answers}
    assert len(ids) == 3
    assert None not in ids


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_every_octet_of_a_prompt_arrives(
    site: Site, client: OpenAI, engines: Engines, name: str
) -> None:
    """The engine counts the tokens of the prompt; asked directly it must count the same."""
    body = {
        "model": engines.model,
        "messages": [message(HOSTILE_TEXTS[name])],
        "max_tokens": 1,
        "seed": 1,
    }
    answer = client.post("/chat/completions", body=body, cast_to=ChatCompletion)
    direct = fetch(engines.urls[0] + "/v1/chat/completions", json.dumps(body).encode())
    expected = ChatCompletion.model_validate(direct.value)
    assert answer.choices == expected.choices
    assert answer.usage is not None
    assert expected.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
