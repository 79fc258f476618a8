"""Equal ids are equal text, at the place where they stand; and a prompt is as long as it says."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.prompts import Api, PromptWriter, Style, message_sizes
from loadtest.traces import Arrival, join_runs
from tests.fakes.sse_engine import prompt_text

BLOCK_TOKENS = 16
WRITER = PromptWriter(Style(model="m"), BLOCK_TOKENS)


def arrival(ids: list[int], cut_tokens: int = 0, system_blocks: int = 1) -> Arrival:
    return Arrival(
        input_tokens=BLOCK_TOKENS * len(ids) - cut_tokens,
        output_tokens=5,
        block_tokens=BLOCK_TOKENS,
        runs=join_runs((block_id, 1) for block_id in ids),
        system_blocks=system_blocks,
    )


def body(request: Arrival, writer: PromptWriter = WRITER) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(writer.body(request))
    return value


def messages(request: Arrival) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in body(request)["messages"]]


ids = st.lists(st.integers(0, 1 << 63), min_size=1, max_size=6)
cuts = st.integers(0, BLOCK_TOKENS - 1)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(ids, ids, ids, cuts, cuts)
def test_shared_ids_are_shared_messages(
    head: list[int], left: list[int], right: list[int], left_cut: int, right_cut: int
) -> None:
    one, other = (
        messages(arrival(head + left, left_cut)),
        messages(arrival(head + right, right_cut)),
    )
    # Whatever is neither last nor beyond the head is the same message, role and text.
    whole = min(len(head), len(one) - 1, len(other) - 1)
    assert one[:whole] == other[:whole]
    shared_bytes = 4 * BLOCK_TOKENS * len(head)
    text, other_text = (
        prompt_text(body(arrival(head + left))),
        prompt_text(body(arrival(head + right))),
    )
    assert text[:shared_bytes] == other_text[:shared_bytes]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(ids, cuts, st.integers(0, 3), st.sampled_from(["chat", "completions"]), st.integers(1, 6))
def test_a_prompt_has_the_length_that_the_trace_says(
    block_ids: list[int], cut: int, system_blocks: int, api: Api, bytes_per_token: int
) -> None:
    writer = PromptWriter(Style(model="m", api=api, bytes_per_token=bytes_per_token), BLOCK_TOKENS)
    request = arrival(block_ids, cut, system_blocks)
    text = prompt_text(body(request, writer))
    assert len(text.encode()) == request.input_tokens * bytes_per_token


@settings(derandomize=True, max_examples=100, deadline=None)
@given(ids, st.integers(0, 9))
def test_the_user_speaks_first_and_last(block_ids: list[int], system_blocks: int) -> None:
    request = arrival(block_ids, 0, system_blocks)
    roles = [role for role, _ in messages(request)]
    assert len(roles) == len(message_sizes(request))
    assert sum(message_sizes(request)) == len(block_ids)
    has_system = system_blocks > 0 and len(block_ids) > 1
    assert (roles[0] == "system") == has_system
    assert "system" not in roles[1:]
    assert roles[int(has_system)] == roles[-1] == "user"


def test_different_ids_seeds_and_nothing_else_make_different_text() -> None:
    first, second = prompt_text(body(arrival([1]))), prompt_text(body(arrival([2])))
    assert first != second
    seeded = PromptWriter(Style(model="m", seed=1), BLOCK_TOKENS)
    assert prompt_text(body(arrival([1]), seeded)) != first
    fresh = PromptWriter(Style(model="m"), BLOCK_TOKENS, cache_bytes_max=0)  # keeps one block
    assert [fresh.body(arrival([i])) for i in (1, 2, 1)] == [
        WRITER.body(arrival([i])) for i in (1, 2, 1)
    ]


def test_given_message_sizes_are_kept() -> None:
    request = Arrival(
        input_tokens=6 * BLOCK_TOKENS,
        output_tokens=1,
        block_tokens=BLOCK_TOKENS,
        runs=((10, 6),),
        system_blocks=2,
        message_blocks=(2, 1, 1),
    )
    sizes = [(role, len(text) // (4 * BLOCK_TOKENS)) for role, text in messages(request)]
    assert sizes == [("system", 2), ("user", 2), ("assistant", 1), ("user", 1)]


def test_real_text_is_escaped_and_alternates() -> None:
    texts = ('say "hi"\n', "\\ok\u2028", "and\x00\ud800?")
    request = Arrival(input_tokens=5, output_tokens=3, texts=texts)
    assert messages(request) == [("user", texts[0]), ("assistant", texts[1]), ("user", "and\x00??")]


@pytest.mark.parametrize(("ignore_eos", "expected"), [(True, {"ignore_eos": True}), (False, {})])
def test_the_rest_of_the_body(ignore_eos: bool, expected: dict[str, bool]) -> None:
    writer = PromptWriter(Style(model='a"b', ignore_eos=ignore_eos), BLOCK_TOKENS)
    value = body(arrival([1]), writer)
    del value["messages"]
    assert value == {
        "model": 'a"b',
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
        **expected,
    }
