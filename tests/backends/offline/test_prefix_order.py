"""The order of lines: neighbours share the longest beginnings; estimates are of the right size."""

from __future__ import annotations

import itertools
import random

import msgspec

from backends.offline.prefix_order import (
    ANSWER_TOKENS,
    COMPLETION_TOKENS,
    DEPTHS_BYTES,
    IMAGE_TOKENS,
    SORT_KEY_BYTES_MAX,
    Prompt,
    sort_key,
    tokens_of,
)

_CHAT = "/v1/chat/completions"


def _prompt(**body: object) -> Prompt:
    return msgspec.json.decode(msgspec.json.encode(body), type=Prompt)


def _shared(one: bytes, other: bytes) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def test_prompts_share_their_keys_up_to_the_last_depth_within_what_they_share() -> None:
    rng = random.Random(5)
    for _ in range(200):
        common = rng.randbytes(rng.randrange(1, 40_000))
        keys = [sort_key([common + mark + rng.randbytes(300)]) for mark in (b"a", b"b")]
        depths = sum(1 for depth in DEPTHS_BYTES if depth <= len(common))
        assert _shared(*keys) // 8 == depths
        assert max(map(len, keys)) <= SORT_KEY_BYTES_MAX


def test_a_key_depends_on_the_octets_and_not_on_how_they_are_cut() -> None:
    rng = random.Random(6)
    octets = rng.randbytes(9_000)
    for _ in range(100):
        cuts = sorted(rng.choices(range(9_001), k=4))
        pieces = [octets[a:b] for a, b in zip([0, *cuts], [*cuts, 9_000], strict=True)]
        assert sort_key(pieces) == sort_key([octets])


def test_sorted_by_key_families_lie_together() -> None:
    rng = random.Random(7)
    families = [rng.randbytes(700) for _ in range(12)]
    lines = [(n % 12, sort_key([families[n % 12] + rng.randbytes(50)])) for n in range(240)]
    rng.shuffle(lines)
    order = [family for family, _ in sorted(lines, key=lambda line: line[1])]
    changes = sum(1 for a, b in itertools.pairwise(order) if a != b)
    assert changes == 11


def test_equal_prompts_have_equal_keys_whatever_else_the_body_holds() -> None:
    ask = [{"role": "user", "content": "hello"}]
    one, other = _prompt(messages=ask, seed=1, temperature=0), _prompt(seed=2, messages=ask)
    assert sort_key(one.parts) == sort_key(other.parts)
    assert sort_key(_prompt(messages=ask, lora_path="a").parts) != sort_key(one.parts)
    assert sort_key(_prompt(messages=ask, tools=[{}]).parts) != sort_key(one.parts)


def test_tokens_are_those_of_the_prompt_and_of_what_may_be_answered() -> None:
    text = "x" * 4_000
    assert 1_000 <= tokens_of(_CHAT, _prompt(prompt=text, max_tokens=0)) <= 1_001
    assert tokens_of(_CHAT, _prompt(prompt="", max_tokens=50, n=3)) == 150
    assert tokens_of(_CHAT, _prompt(prompt="", max_completion_tokens=7, max_tokens=9)) == 7
    assert tokens_of(_CHAT, _prompt(prompt="")) == ANSWER_TOKENS
    assert tokens_of("/v1/completions", _prompt(prompt="")) == COMPLETION_TOKENS
    assert tokens_of("/v1/embeddings", _prompt(input=text)) in {1_000, 1_001}
    assert tokens_of("/v1/responses", _prompt(input="", max_output_tokens=12)) == 12


def test_a_picture_counts_as_a_picture_and_not_as_its_octets() -> None:
    url = "data:image/png;base64," + "A" * 1_000_000
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    tokens = tokens_of(_CHAT, _prompt(messages=[message], max_tokens=1))
    assert IMAGE_TOKENS < tokens < IMAGE_TOKENS + 100


def test_limits_that_no_engine_would_take_are_bounded() -> None:
    assert tokens_of(_CHAT, _prompt(prompt="", max_tokens=10**12, n=10**9)) <= 128 * 10**6
    assert tokens_of(_CHAT, _prompt(prompt="", max_tokens="many", n=None)) == ANSWER_TOKENS
