"""The prefix chain: what it shares, what it keeps apart, and what it costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from proxy.core import limits, prefix
from proxy.core.prefix import (
    DEPTHS,
    PrefixChain,
    _opener_end,
    prefix_chain,
)
from proxy.core.routes import PromptKind
from proxy.core.scan import scan_body

CHAT_KINDS = (PromptKind.CHAT, PromptKind.ANTHROPIC, PromptKind.RESPONSES)
_TRAPS = st.sampled_from(
    ['{"role":"user"}', '"role": "user"', "\\", '\\"', '"', "}", "]", "[{", "é😀", "\n", ","]
)
_TEXT = st.lists(_TRAPS | st.text(max_size=8), max_size=5).map("".join)
_LONG = st.builds(lambda text, times: text * times, _TEXT, st.sampled_from([1, 1, 20, 200]))
_NESTED = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "role": st.just("user"), "text": _LONG}),
    max_size=2,
)
_ROLES = st.sampled_from(["user", "assistant", "system", "tool", "developer", "users"])


def _message(role: str, content: Any, *, role_last: bool) -> dict[str, Any]:
    if role_last:
        return {"content": content, "n": 1.5, "name": None, "role": role}
    return {"role": role, "content": content}


MESSAGES = st.builds(_message, _ROLES, _LONG | _NESTED, role_last=st.booleans())
_USER = st.builds(_message, st.just("user"), _LONG | _NESTED, role_last=st.booleans())


def chain_of(kind: PromptKind, body: dict[str, Any], key: bytes | None = None) -> PrefixChain:
    return prefix_chain(kind, scan_body(json.dumps(body).encode()), key)


def _conversation(kind: PromptKind, messages: list[Any], **more: Any) -> dict[str, Any]:
    field = "input" if kind is PromptKind.RESPONSES else "messages"
    return {"model": "m", field: messages, **more}


@pytest.mark.sweep
@given(
    kind=st.sampled_from(CHAT_KINDS),
    before=st.lists(MESSAGES, max_size=3),
    user=_USER,
    after=st.lists(MESSAGES, max_size=2),
    later=st.lists(MESSAGES, min_size=1, max_size=8),
    head=st.sampled_from([{}, {"tools": [{"a": "b"}]}, {"system": "be brief"}]),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_a_later_turn_begins_with_the_earlier(
    *,
    kind: PromptKind,
    before: list[Any],
    user: Any,
    after: list[Any],
    later: list[Any],
    head: dict[str, Any],
    indent: int | None,
    ascii_only: bool,
) -> None:
    def turn(messages: list[Any]) -> PrefixChain:
        body = _conversation(kind, messages, **head)
        octets = json.dumps(body, indent=indent, ensure_ascii=ascii_only).encode()
        return prefix_chain(kind, scan_body(octets), None)

    first = turn([*before, user, *after])
    second = turn([*before, user, *after, *later])
    assert first.home_key == second.home_key
    assert second.prompt_bytes > first.prompt_bytes
    common = dict(zip(second.ends, second.hashes, strict=True))
    assert common[first.ends[-1]] == first.hashes[-1]  # all of the earlier turn is in the later
    for end, name in zip(first.ends, first.hashes, strict=True):
        assert common.get(end, name) == name


@pytest.mark.parametrize("space", [0, 1, 7])
def test_space_before_the_end_is_no_part_of_a_prefix(space: int) -> None:
    """A depth that fell into it would name a prefix that no later turn has."""

    def turn(messages: bytes) -> PrefixChain:
        return prefix_chain(
            PromptKind.CHAT, scan_body(b'{"model":"m","messages":%b}' % messages), None
        )

    start = b'[{"role":"user","content":"'
    text = b"x" * (limits.CHAIN_FIRST_BYTES - len(start) - 2)  # the message ends at a depth
    first = turn(start + text[space // 2 :] + b'"}' + b"\n" * space + b"]")
    second = turn(start + text[space // 2 :] + b'"},' + b"\n" * space + b'{"role":"assistant"}]')
    assert first.ends == [limits.CHAIN_FIRST_BYTES - space // 2] == [first.prompt_bytes]
    assert first.hashes == second.hashes[:1]


@given(
    st.sampled_from(CHAT_KINDS),
    st.lists(MESSAGES, min_size=1, max_size=4),
    st.permutations(["model", "messages", "input", "tools", "stream", "temperature"]),
    st.sampled_from([(", ", ": "), (",", ":"), (" ,\n", "\t:  ")]),
)
def test_order_and_space_of_the_object_do_not_matter(
    kind: PromptKind, messages: list[Any], order: list[str], separators: tuple[str, str]
) -> None:
    body = _conversation(kind, messages, tools=[{"name": "t"}], stream=True, temperature=1)
    raw = {name: json.dumps(value) for name, value in body.items()}
    members = [f'"{name}"{separators[1]}{raw[name]}' for name in order if name in raw]
    octets = ("{" + separators[0].join(members) + "}").encode()
    other = prefix_chain(kind, scan_body(octets), None)
    chain = chain_of(kind, body)
    assert (chain.home_key, chain.hashes, chain.ends) == (other.home_key, other.hashes, other.ends)


_NAMES = st.text(st.sampled_from("ab\0,;1é"), min_size=1, max_size=4)


@example(PromptKind.CHAT, ("m", "ab", "c", ""), ("m", "a", "bc", ""), None)
@example(PromptKind.CHAT, ("m", "a\0b", "c", ""), ("m", "a", "b", "\0c"), None)
@example(PromptKind.CHAT, ("m", "1", "2,3;", "1"), ("m,1", "2", "3;", "1"), b"session")
@given(
    st.sampled_from([*CHAT_KINDS, PromptKind.COMPLETION, PromptKind.INPUT]),
    st.tuples(_NAMES, _NAMES, _NAMES, _NAMES),
    st.tuples(_NAMES, _NAMES, _NAMES, _NAMES),
    st.sampled_from([None, b"session"]),
)
def test_model_adapter_salt_and_tenant_share_nothing(
    kind: PromptKind,
    names: tuple[str, str, str, str],
    other_names: tuple[str, str, str, str],
    key: bytes | None,
) -> None:
    assume(names != other_names)

    def chain(model: str, lora: str, salt: str, tenant: str) -> PrefixChain:
        text = "x" * 3000
        body = {"model": model, "lora_path": lora, "cache_salt": salt, "tools": [1]}
        messages = [{"role": "user", "content": text}]
        body |= {"messages": messages, "input": messages, "prompt": text}
        return prefix_chain(kind, scan_body(json.dumps(body).encode()), key, tenant.encode())

    one, two = chain(*names), chain(*other_names)
    assert one.hashes
    assert not set(one.hashes) & set(two.hashes)
    assert one.home_key != two.home_key


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "{", '"']), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.sampled_from(PromptKind), st.sampled_from([None, 1]), _JSON, _JSON, _JSON, _JSON)
def test_any_json_makes_a_chain(
    kind: PromptKind, indent: int | None, messages: Any, prompt: Any, given_input: Any, head: Any
) -> None:
    body = {
        "model": "m", "messages": messages, "prompt": prompt, "input": given_input,
        "tools": head, "system": head, "instructions": head,
    }  # fmt: skip
    chain = prefix_chain(kind, scan_body(json.dumps(body, indent=indent).encode()), None)
    assert len(chain.hashes) == len(chain.ends)
    assert list(chain.ends) == sorted(chain.ends)
    assert not chain.ends or chain.ends[-1] == chain.prompt_bytes
    assert 0 <= chain.home_key < 1 << 64


_PLAIN = st.builds(_message, _ROLES, _LONG, role_last=st.booleans())


def _end(octets: bytes) -> int:
    bounds = limits.OPENER_SEARCH_BYTES_MAX, limits.OPENER_BYTES_MAX
    return _opener_end(octets, 0, len(octets), *bounds)


def _opener(octets: bytes) -> bytes:
    return octets[: _end(octets)]


@given(st.lists(_PLAIN | _TEXT | st.integers() | st.none(), max_size=5), st.booleans())
def test_the_opener_ends_with_the_first_user_message(elements: list[Any], spaced: bool) -> None:
    octets = json.dumps(elements, separators=(" , ", " : ") if spaced else (",", ":")).encode()
    expected = next((e for e in elements if isinstance(e, dict) and e.get("role") == "user"), None)
    end = _end(octets)
    if expected is None:
        assert end == limits.OPENER_BYTES_MAX
    elif len(json.dumps(expected)) < limits.OPENER_BYTES_MAX:
        assert json.loads(octets[:end] + b"]") == elements[: elements.index(expected) + 1]


@pytest.mark.parametrize(
    ("octets", "opener"),
    [
        (b'[{"role":"user","content":"a"},{"role":"user"}]', b'[{"role":"user","content":"a"}'),
        (b'[{"content":"\\\\","role":"user"},1]', b'[{"content":"\\\\","role":"user"}'),
        (b'[{"content":"\\\\\\"","role":"user"},1]', b'[{"content":"\\\\\\"","role":"user"}'),
        (b'[{"content":"\\",\\"role\\":\\"user\\""}]', None),
        (b'[{"content":[{"role":"user"}],"role":"system"}]', b'[{"content":[{"role":"user"}'),
        (b'[{"roles":"user"},{"role":"users"},{"role":["user"]}]', None),
        (b'["{\\"role\\":\\"user\\"}","{"]', None),
        (b'["role","user",{"role":"system","user":1}]', None),
        (b'["{",{"role":"user"},2]', b'["{",{"role":"user"}'),
        (b'[ { "role" : "user" } , 1]', b'[ { "role" : "user" }'),
        (b'[{},1,null,{"n":-1.5e3,"role":"user"},2]', b'[{},1,null,{"n":-1.5e3,"role":"user"}'),
        (b'[{"role":"user","a":{"b":[{}]},"c":"}"},2]', b'[{"role":"user","a":{"b":[{}]},"c":"}"}'),
        (b"[]", None),
        (b'"[{\\"role\\":\\"user\\"}]"', None),
        (b"", None),
    ],
)
def test_which_message_opens(octets: bytes, opener: bytes | None) -> None:
    assert _opener(octets) == (octets if opener is None else opener)


def test_the_search_for_the_opener_is_bounded() -> None:
    far = b'[{"role":"system","content":"%b"},{"role":"user"},1]'
    near = far % (b"x" * (limits.OPENER_SEARCH_BYTES_MAX - 100))
    assert _opener(near) == near[:-3]
    beyond = far % (b"x" * limits.OPENER_SEARCH_BYTES_MAX)
    assert len(_opener(beyond)) == limits.OPENER_BYTES_MAX
    # The role is known although the message reaches beyond what is searched.
    half = limits.OPENER_SEARCH_BYTES_MAX // 2
    for content in (b'"%b"' % (b"x" * 2 * half), b"[%b1]" % (b"1," * half)):
        long = b'[{"role":"user","content":%b}]' % content
        assert len(_opener(long)) == len(b'[{"role":"user"') + limits.OPENER_BYTES_MAX


def test_the_opener_is_what_places_a_conversation() -> None:
    def home(system: str, user: str, *more: str) -> int:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        messages += [{"role": "assistant", "content": text} for text in more]
        return chain_of(PromptKind.CHAT, {"model": "m", "messages": messages}).home_key

    assert home("s", "a") == home("s", "a", "b") == home("s", "a", "c", "d")
    assert home("s", "a") != home("s", "b")  # a head that all share never decides alone
    assert home("s", "a") != home("t", "a")
    far = limits.OPENER_BYTES_MAX
    assert home("s", "a" * far + "b") == home("s", "a" * far + "c")  # bounded
    assert home("s" * far, "a") != home("s" * far, "b")  # from where the user begins


def test_a_session_key_stands_in_for_the_opener() -> None:
    def keyed(text: str, key: bytes | None) -> PrefixChain:
        return chain_of(PromptKind.COMPLETION, {"model": "m", "prompt": text}, key)

    assert keyed("a", b"k").home_key == keyed("b", b"k").home_key
    assert keyed("a", b"k").home_key != keyed("a", b"l").home_key
    assert keyed("a", b"k").hashes == keyed("a", None).hashes


def test_a_prompt_without_messages_is_placed_by_its_beginning() -> None:
    def home(text: str) -> int:
        return chain_of(PromptKind.COMPLETION, {"model": "m", "prompt": text}).home_key

    far = limits.OPENER_BYTES_MAX
    assert home("a" * far + "b") == home("a" * far + "c")
    assert home("a") != home("b")


@pytest.mark.parametrize(
    ("kind", "fields", "prompt_bytes"),
    [
        (PromptKind.CHAT, {"tools": [1, 2], "messages": ["ab"], "prompt": "zzz"}, 6 + 5),
        (PromptKind.ANTHROPIC, {"tools": [1], "system": "ab", "messages": []}, 3 + 4 + 1),
        (PromptKind.RESPONSES, {"instructions": "ab", "input": "abcd"}, 4 + 5),
        (PromptKind.COMPLETION, {"prompt": "abc", "messages": [1]}, 4),
        (PromptKind.INPUT, {"query": "q", "documents": ["d"], "messages": "m"}, 3 + 5 + 2),
        (PromptKind.OPAQUE, {"prompt": "abc"}, 0),
        (PromptKind.CHAT, {}, 0),
    ],
)
def test_what_the_prompt_is(kind: PromptKind, fields: dict[str, Any], prompt_bytes: int) -> None:
    assert chain_of(kind, {"model": "m", **fields}).prompt_bytes == prompt_bytes


def test_depths_grow_by_half_and_reach_any_body() -> None:
    assert DEPTHS[0] == limits.CHAIN_FIRST_BYTES
    assert len(DEPTHS) == limits.CHAIN_DEPTHS_MAX
    for depth, deeper in pairwise(DEPTHS):
        assert depth < deeper <= depth * 1.5 + limits.CHAIN_FIRST_BYTES
    assert DEPTHS[-1] > 1 << 30


@given(st.integers(0, 20_000), st.integers(0, 20_000))
def test_a_shared_prefix_is_known_to_within_a_third(shared: int, own: int) -> None:
    one = chain_of(PromptKind.COMPLETION, {"model": "m", "prompt": "s" * shared + "a" * own})
    two = chain_of(PromptKind.COMPLETION, {"model": "m", "prompt": "s" * shared + "b" * own})
    common = [
        end
        for name, other, end in zip(one.hashes, two.hashes, one.ends, strict=True)
        if name == other
    ]
    known = max(common, default=0)
    assert known <= shared + 1 or own == 0
    assert known >= (shared - limits.CHAIN_FIRST_BYTES) * 2 / 3


# --- cost -----------------------------------------------------------------------------------

_SMALL, _LARGE = 1 << 16, 1 << 20

_SHAPES: dict[str, tuple[PromptKind, Callable[[int], bytes]]] = {
    "text": (PromptKind.CHAT, lambda n: b'[{"role":"system","content":"' + b"a" * n + b'"}]'),
    "quotes": (PromptKind.CHAT, lambda n: b'[{"a":"' + b'\\"' * (n // 2) + b'"}]'),
    "backslashes": (PromptKind.CHAT, lambda n: b'[{"a":"' + b"\\\\" * (n // 2) + b'"}]'),
    "messages": (PromptKind.CHAT, lambda n: b"[" + b'{"role":"tool"},' * (n // 16) + b"1]"),
    "members": (PromptKind.CHAT, lambda n: b"[{" + b'"a":1,' * (n // 6) + b'"b":2}]'),
    "nested": (PromptKind.CHAT, lambda n: b'[{"a":[' + b"[]," * (n // 3) + b"1]}]"),
    "strings": (PromptKind.RESPONSES, lambda n: b"[" + b'"{",' * (n // 4) + b'{"a":1}]'),
    "strings_alone": (PromptKind.RESPONSES, lambda n: b"[" + b'"a",' * (n // 4) + b"1]"),
    "numbers": (PromptKind.RESPONSES, lambda n: b"[" + b"1," * (n // 2) + b'{"a":1}]'),
    "spaces": (PromptKind.CHAT, lambda n: b'[{"a":' + b" " * n + b"1}" + b" " * n + b"]"),
    "prompt": (PromptKind.COMPLETION, lambda n: b'"' + b"a" * n + b'"'),
}


def _processor_s(kind: PromptKind, part: bytes) -> float:
    scanned = scan_body(b'{"model":"m","messages":%b,"input":%b,"prompt":%b}' % (part, part, part))
    best_s = float("inf")
    for _ in range(3):
        start_s = time.process_time()
        prefix_chain(kind, scanned, None)
        best_s = min(best_s, time.process_time() - start_s)
    return best_s


@pytest.mark.parametrize("shape", _SHAPES)
def test_the_cost_grows_with_the_prompt_and_no_faster(shape: str) -> None:
    """Sixteen times the prompt: linear is 16, quadratic 256. Processor time, the least of three."""
    kind, make = _SHAPES[shape]
    small_s = _processor_s(kind, make(_SMALL))
    large_s = _processor_s(kind, make(_LARGE))
    assert large_s <= 64 * max(small_s, 1e-4)


def test_only_short_names_are_remembered() -> None:
    """A salt is as long as a client likes, and what is remembered stays."""
    prefix._known_seed.cache_clear()
    for number in range(3):
        chain_of(PromptKind.CHAT, {"model": "m", "messages": [], "cache_salt": f"{number}" * 5000})
    assert prefix._known_seed.cache_info().currsize == 0
    one = chain_of(PromptKind.CHAT, {"model": "m", "messages": [], "cache_salt": "s"})
    assert prefix._known_seed.cache_info().currsize == 1
    assert one.home_key != chain_of(PromptKind.CHAT, {"model": "m", "messages": []}).home_key
