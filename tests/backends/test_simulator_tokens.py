"""The tokenizer stand-in, the chat template and the words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.simulator.tokens import (
    TOKEN_BYTES,
    WORDS,
    StopFinder,
    WordSource,
    count_tokens,
    decode_tokens,
    encode_text,
    pack_ids,
    render_chat,
    unpack_ids,
)

LAWS = settings(derandomize=True, max_examples=60, deadline=None)
TEXT = st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": TEXT}),
    min_size=1,
    max_size=5,
)


@LAWS
@given(TEXT)
def test_text_comes_back(text: str) -> None:
    tokens = encode_text(text)
    assert decode_tokens(tokens) == text
    assert len(tokens) % TOKEN_BYTES == 0
    assert count_tokens(tokens) == -(-len(text.encode()) // TOKEN_BYTES)


@LAWS
@given(st.lists(st.integers(0, 2**32 - 1)))
def test_ids_come_back(ids: list[int]) -> None:
    assert unpack_ids(pack_ids(ids)) == ids


def test_an_id_is_the_little_endian_number_of_its_bytes() -> None:
    assert unpack_ids(b"\x01\x00\x00\x00\xff\xff\xff\xff") == [1, 2**32 - 1]
    with pytest.raises(OverflowError):
        pack_ids([2**32])


@LAWS
@given(MESSAGES, st.integers(0, 20), TEXT)
def test_a_turn_and_its_answer_are_a_prefix_of_the_next_turn(
    messages: list[dict[str, str]], answer_tokens: int, following: str
) -> None:
    prompt = render_chat(messages)
    words = WordSource(prompt, 0)
    answer = "".join(WORDS[words.next_word()] for _ in range(answer_tokens))
    messages_next = [
        *messages,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": following},
    ]
    assert render_chat(messages_next).startswith(prompt + encode_text(answer))
    assert count_tokens(encode_text(answer)) == answer_tokens


@LAWS
@given(MESSAGES, MESSAGES)
def test_different_conversations_render_differently(
    one: list[dict[str, str]], other: list[dict[str, str]]
) -> None:
    assert (render_chat(one) == render_chat(other)) == (one == other)


def test_parts_and_tools_are_rendered() -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "u1"}}]
    tokens = render_chat([{"role": "user", "content": parts}], [{"type": "function"}])
    assert b"look" in tokens
    assert b"u1" in tokens
    assert tokens.startswith(encode_text("<|tools|>"))


def test_answers_depend_on_prompt_and_seed_alone() -> None:
    def draw(prompt: bytes, seed: int) -> list[int]:
        words = WordSource(prompt, seed)
        return [words.next_word() for _ in range(8)]

    assert draw(b"abcd", 1) == draw(b"abcd", 1)
    assert draw(b"abcd", 1) != draw(b"abcd", 2)
    assert draw(b"abcd", 1) != draw(b"abce", 1)


def test_natural_lengths_have_the_mean() -> None:
    lengths = [WordSource(b"p", seed).draw_length(50) for seed in range(4000)]
    assert min(lengths) >= 1
    assert 45 < sum(lengths) / len(lengths) < 55


@LAWS
@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stops_are_found_wherever_the_pieces_are_cut(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    sent, found = "", None
    for piece in pieces:
        text, found = finder.feed(piece)
        sent += text
        if found is not None:
            break
    else:
        sent += finder.flush()
    whole = "".join(pieces)
    if found is None:
        assert sent == whole
        assert not any(stop in whole for stop in stops)
    else:
        assert found in stops
        assert whole.startswith(sent + found)
        assert not any(stop in sent for stop in stops)
