"""Where a prompt is hashed, and that a turn knows the one before it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from proxy.core import limits, prefix
from proxy.core.prefix import PrefixChain, form_chain, prefix_chain
from proxy.core.routes import PromptKind
from proxy.core.scan import scan_body
from tests.core.test_prefix import CHAT_KINDS, MESSAGES, chain_of

_KINDS = (*CHAT_KINDS, PromptKind.COMPLETION, PromptKind.INPUT)


@given(st.sampled_from(_KINDS), st.lists(MESSAGES, max_size=12), st.sampled_from([None, 1]))
def test_a_hash_depends_on_the_octets_before_it_alone(
    kind: PromptKind, messages: list[Any], indent: int | None
) -> None:
    body = {"model": "m", "messages": messages, "input": messages, "prompt": str(messages)}
    scanned = scan_body(json.dumps(body, indent=indent).encode())
    chain = prefix_chain(kind, scanned, None)
    seed = prefix._seed("m", "", "", b"")
    _, octets, begin, _, _ = prefix._prompt_parts(kind, scanned)
    assert list(chain.hashes) == [
        xxh3_64_intdigest(octets[begin : begin + end], seed) for end in chain.ends
    ]
    assert list(chain.ends) == sorted(set(chain.ends))


@pytest.mark.parametrize("style", [{}, {"separators": (",", ":")}, {"indent": 2}])
def test_a_conversation_that_grows_is_known_to_its_end(style: dict[str, Any]) -> None:
    """An agent's: a call of some tools and what each returned at a time."""
    system = {"role": "system", "content": "s" * 5000}
    messages, before = [system, {"role": "user", "content": "go"}], None
    for turn in range(20):
        body = {"model": "m", "messages": messages, "tools": [{"name": "t"}]}
        chain = prefix_chain(PromptKind.CHAT, scan_body(json.dumps(body, **style).encode()), None)
        assert len(chain.ends) <= 24
        if before is not None:
            assert before.hashes[-1] in chain.hashes
            assert before.ends[-1] in chain.ends
        before = chain
        messages.append({"role": "assistant", "content": None, "tool_calls": [{"id": "é"}]})
        messages += [{"role": "tool", "content": "x" * 700 * (turn % 5)}] * (turn % 8)


@given(st.integers(1, 40_000), st.integers(0, 25), st.booleans())
def test_text_that_grows_is_known_to_within_a_step(size: int, percent: int, tokens: bool) -> None:
    def chain(octets: str) -> PrefixChain:
        prompt: Any = json.loads(f"[1{octets}]") if tokens else octets
        return chain_of(PromptKind.COMPLETION, {"model": "m", "prompt": prompt})

    first = chain(", 7" * (size // 3))
    second = chain(", 7" * (size // 3) + ", 8" * (size * percent // 300))
    known = max({*first.hashes} & {*second.hashes}, key=first.hashes.index, default=None)
    known_bytes = first.ends[first.hashes.index(known)] if known is not None else 0
    assert known_bytes > first.prompt_bytes - max(limits.CHAIN_FIRST_BYTES, size // 13) - 3


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (PromptKind.COMPLETION, "prompt"),
        (PromptKind.COMPLETION, "input_ids"),
        (PromptKind.CHAT, "input_ids"),
        (PromptKind.INPUT, "input"),
        (PromptKind.INPUT, "prompt"),
    ],
)
def test_tokens_and_lists_are_told_apart(kind: PromptKind, field: str) -> None:
    """Of equal lengths, and alike at the beginning."""
    tokens = [*range(1000, 1500)]
    prompts: list[Any] = [[*tokens, 1], [*tokens, 2], [[1, 2], [3]], [[1, 2], [4]], [[1], [2, 3]]]
    prompts += [["ab", "c"], ["ab", "d"], ["a", "bc"], "abc", "abd"]
    chains = [chain_of(kind, {"model": "m", field: prompt}) for prompt in prompts]
    assert len({chain.home_key for chain in chains}) == len(chains)
    assert len({chain.hashes[-1] for chain in chains}) == len(chains)


def test_images_count_by_their_octets() -> None:
    def chain(image: str) -> PrefixChain:
        url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
        message = {"role": "user", "content": [url, {"type": "text", "text": "what is this?"}]}
        return chain_of(PromptKind.CHAT, {"model": "m", "messages": [message]})

    one, two = chain("A" * 3000), chain("A" * 2999 + "B")
    assert one.home_key != two.home_key
    assert one.hashes[-1] != two.hashes[-1]


def test_what_a_stored_response_holds_comes_before_the_prompt() -> None:
    def chain(kind: PromptKind, **more: str) -> PrefixChain:
        return chain_of(kind, {"model": "m", "input": "go on", "prompt": "go on", **more})

    one, two = (chain(PromptKind.RESPONSES, previous_response_id=name) for name in ("a", "b"))
    for other in (two, chain(PromptKind.RESPONSES)):
        assert not {*one.hashes} & {*other.hashes}
        assert one.home_key != other.home_key
    elsewhere = chain(PromptKind.COMPLETION, previous_response_id="a")
    assert elsewhere.hashes == chain(PromptKind.COMPLETION).hashes


def test_a_form_is_known_by_its_file() -> None:
    def chain(file: bytes, key: bytes | None = None, model: str = "w") -> PrefixChain:
        return form_chain(model, b"--XX" + file + b"--XX--", 4, 4 + len(file), key)

    speech = b"RIFF" * 80_000
    assert chain(speech).hashes == chain(speech, b"k").hashes
    assert chain(speech).home_key not in (chain(speech, b"k").home_key, chain(speech[4:]).home_key)
    assert chain(speech, b"k").home_key == chain(b"x", b"k").home_key
    assert chain(speech).hashes != chain(speech, model="v").hashes
    tokens = 1 + 320_000 // limits.AUDIO_BYTES_PER_TOKEN
    assert chain(speech).prompt_bytes == tokens * limits.BYTES_PER_TOKEN
    assert chain(b"").prompt_bytes < limits.BYTES_PER_TOKEN
    assert not chain(b"").hashes
