"""Token counts from the end of an answer, as engines really write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.usage import Usage, read_usage

_GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("usage-vllm-0.26.0-chat.json", Usage(17, 8, 0)),
        ("usage-vllm-0.26.0-completion-stream.txt", Usage(3, 8, 0)),
        ("usage-sglang-0.5.17-chat.json", Usage(17, 8, None)),
        ("usage-sglang-0.5.17-generate.json", None),  # its own API has no such object
    ],
)
def test_recorded_answers(name: str, usage: Usage | None) -> None:
    octets = (_GOLDEN / name).read_bytes()
    assert read_usage(octets) == usage
    assert read_usage(octets[-limits.USAGE_TAIL_BYTES :]) == usage


_TEXT = b'{"choices":[{"delta":{"content":"%b"}}]}'


@pytest.mark.parametrize(
    ("tail", "usage"),
    [
        (b'"usage":{"prompt_tokens":5,"completion_tokens":2}', Usage(5, 2, None)),
        (b'"usage" : {\n "prompt_tokens": 5 }', Usage(5, 0, None)),
        (b'"usage":{"prompt_tokens":5,"prompt_tokens_details":null}', Usage(5, 0, None)),
        (
            b'"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":4,"x":{}}}',
            Usage(5, 0, 4),
        ),
        (b'"usage":{"prompt_tokens":5,"prompt_tokens_details":{"audio":1}}', Usage(5, 0, None)),
        # Responses
        (
            b'"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":3},'
            b'"output_tokens":7,"output_tokens_details":{"reasoning_tokens":0}},"user":null}}',
            Usage(9, 7, 3),
        ),
        # Anthropic
        (
            b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"x"},'
            b'"usage":{"input_tokens":9,"output_tokens":7,"cache_read_input_tokens":2}}\n\n'
            b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
            Usage(9, 7, 2),
        ),
        # The last one counts.
        (
            b'"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
            b'data: {"usage":{"prompt_tokens":1,"completion_tokens":9}}\n\ndata: [DONE]\n\n',
            Usage(1, 9, None),
        ),
        (b'"usage":null}\n\ndata: [DONE]\n\n', None),
        (b'"usage":{"prompt_tokens":5', None),  # cut
        (b'"usage":{"prompt_tokens":5,"x":{}', None),
        (b'"usage":{"prompt_tokens":"5"}', None),
        (b'"usage":{"prompt_tokens":5,}', None),
        (b'"usage":{"output_tokens":5}', None),  # no prompt: the first half was elsewhere
        # What would spoil the sums that are exported, or the reader.
        (b'"usage":{"prompt_tokens":-5}', None),
        (b'"usage":{"prompt_tokens":5,"completion_tokens":1%b}' % (b"0" * 400), None),
        (b'"usage":{"prompt_tokens":5,"x":%b%b}' % (b"[" * 1000, b"]" * 1000), None),
        (b'"usage":{}', None),
        (b'"usage":[]', None),
        (b'"usage"', None),
        (b"usage", None),
        (b"", None),
    ],
)
def test_forms(tail: bytes, usage: Usage | None) -> None:
    assert read_usage(tail) == usage


def test_generated_text_is_not_read() -> None:
    """In a string every quote is escaped; what a model writes about usage is text."""
    for text in ('"usage":{"prompt_tokens":1}', '{"usage": {"prompt_tokens": 1}}', "usage", '"'):
        value = {"usage": {"prompt_tokens": 5}, "choices": [{"message": {"content": text}}]}
        assert read_usage(json.dumps(value).encode()) == Usage(5, 0, None)
        alone = {"choices": [{"message": {"content": text}}]}
        assert read_usage(json.dumps(alone).encode()) is None


_TEXTS = st.text(max_size=20) | st.sampled_from(
    ['"usage":{"prompt_tokens":1}', 'usage":{', "}", "{", "\\", '\\"usage":{}']
)


@given(
    st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.none() | st.integers(0, 1 << 40),
    st.lists(_TEXTS, max_size=4), st.booleans(), st.booleans(),
)  # fmt: skip
def test_whatever_was_generated_the_counts_are_read(
    prompt: int, output: int, cached: int | None, texts: list[str], spaced: bool, last: bool
) -> None:
    details = None if cached is None else {"cached_tokens": cached}
    usage: dict[str, Any] = {
        "prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details,
    }  # fmt: skip
    value: dict[str, Any] = {"choices": [{"message": {"content": text}} for text in texts]}
    value = {**value, "usage": usage} if last else {"usage": usage, **value}
    octets = json.dumps(value, indent=2 if spaced else None).encode()
    assert read_usage(octets) == Usage(prompt, output, cached)


@given(st.binary(max_size=80), st.booleans())
def test_any_octets_are_read_without_a_fault(octets: bytes, prefixed: bool) -> None:
    read_usage(b'"usage":{' * prefixed + octets)
