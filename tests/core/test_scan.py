"""The body scan: it reads a body as `json.loads` does, or refuses it."""

from __future__ import annotations

import codecs
import json
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors
from proxy.core import claim_limits, limits, scan
from proxy.core.scan import Scanned, scan_body

_OURS = (
    "model", "stream", "service_tier", "prompt_cache_key", "session_id", "cache_salt",
    "previous_response_id",
)  # fmt: skip
_PARTS = {
    "messages": scan.MESSAGES, "prompt": scan.PROMPT, "tools": scan.TOOLS, "system": scan.SYSTEM,
    "instructions": scan.INSTRUCTIONS, "input": scan.INPUT, "input_ids": scan.INPUT_IDS,
    "session_params": scan.SESSION_PARAMS,
}  # fmt: skip
_TRAPS = st.sampled_from(
    [
        '"model":"x"', '{"model": "x"}', "\\", '\\"', '"', "}", "]", "\x00", "\x1f", "\x7f", "é",
        "😀", "\ud800", "\udfff\ud800", "mod\\u0065l", "NaN", ",", "\u2028", "\ufeff",
    ]
)  # fmt: skip
_TEXT = st.lists(_TRAPS | st.text(max_size=5), max_size=4).map("".join)
_COUNTS = (
    "max_tokens", "max_completion_tokens", "max_output_tokens",
)  # fmt: skip
_NUMBERS = st.sampled_from(["0", "-0", "1e400", "-1.5E-7", "9" * 30, "9" * 5000, "0.1"])


class _Number(str):
    """A number in the JSON text that is written as it stands."""

    __slots__ = ()


_VALUES = st.recursive(
    st.none() | st.booleans() | _TEXT | _NUMBERS.map(_Number),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(_TEXT, inner), max_size=3),
    max_leaves=8,
)
_KEYS = st.sampled_from([*_OURS, *_PARTS, *_COUNTS, "n"]) | _TEXT
_COUNTED = st.integers(0, 10**10).map(lambda count: _Number(str(count)))
_MOSTLY_RIGHT = {
    "model": st.sampled_from(["m", "org/model", "é", "😀", "m" * 300, ""]),
    "stream": st.booleans() | st.none(),
    **dict.fromkeys((*_COUNTS, "n"), _COUNTED),
}


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Objects as clients write them and as nobody should: any order, doubles, escapes, codings."""
    members: list[tuple[str, Any]] = []
    for key in draw(st.lists(_KEYS, max_size=6)):
        usual = _MOSTLY_RIGHT.get(key)
        members.append((key, draw(usual | _VALUES if usual is not None else _VALUES)))
    if draw(st.integers(0, 3)):
        members.insert(draw(st.integers(0, len(members))), ("model", "m"))
    text = _write(draw, members)
    coding = draw(st.sampled_from(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"]))
    return text.encode(coding, "surrogatepass")


def _write(draw: st.DrawFn, value: Any) -> str:
    space = draw(st.sampled_from(["", "", " ", "\n\t "]))
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, str):
        return _quote(draw, value)
    if isinstance(value, list) and all(isinstance(item, tuple) for item in value):
        inner = f",{space}".join(
            f"{_quote(draw, key)}{space}:{space}{_write(draw, item)}" for key, item in value
        )
        return f"{space}{{{inner}{space}}}"
    if isinstance(value, list):
        return f"[{space}{f'{space},'.join(_write(draw, item) for item in value)}]"
    return json.dumps(value)


def _quote(draw: st.DrawFn, text: str) -> str:
    match draw(st.integers(0, 4)):
        case 0:  # every character escaped
            units = text.encode("utf-16-be", "surrogatepass")
            escaped = [f"\\u{units[i]:02x}{units[i + 1]:02X}" for i in range(0, len(units), 2)]
            return '"' + "".join(escaped) + '"'
        case 1 | 2:
            return json.dumps(text)
        case _:
            return json.dumps(text, ensure_ascii=False)


def _read(body: bytes) -> Any:
    # Numbers of any length are numbers; Python alone bounds their digits.
    return json.loads(body, parse_int=lambda digits: (digits,))


def _count(value: Any) -> int:
    """What a number says of how many; anything else says nothing."""
    if isinstance(value, tuple):  # an integer, as `_read` has it
        (digits,) = value
        value = int(digits) if len(digits) < 100 else math.copysign(math.inf, float(digits[:2]))
    if not isinstance(value, float | int) or isinstance(value, bool):
        return 0
    return max(0, int(min(value, claim_limits.OUTPUT_TOKENS_MAX)))


def _check(body: bytes) -> Scanned | None:
    """The law. Returns None when the body is refused."""
    try:
        scanned = scan_body(body)
    except errors.ProxyError:
        return None
    value = _read(body)
    assert isinstance(value, dict)
    assert scanned.model == value["model"]
    assert bool(scanned.stream) is bool(value.get("stream"))
    assert value.get("stream") in (None, True, False)
    for name in ("service_tier", "prompt_cache_key", "cache_salt"):
        assert getattr(scanned, name) == value.get(name)
    # Engines take other types here; those name no session and no adapter of ours.
    for name in ("session_id", "lora_path", "previous_response_id"):
        given_value = value.get(name)
        expected = given_value if isinstance(given_value, str) else None
        assert getattr(scanned, name) == expected
    most = max(_count(value.get(name)) for name in _COUNTS) * max(1, _count(value.get("n")))
    assert scanned.output_tokens == min(most, claim_limits.OUTPUT_TOKENS_MAX)
    for name, place in _PARTS.items():
        octets = scanned.part(place)
        assert bool(octets) is (name in value)
        if octets:
            assert _read(octets) == value[name]
    return scanned


@given(bodies())
def test_the_scan_agrees_with_json_loads_or_refuses(body: bytes) -> None:
    _check(body)


@given(bodies(), st.integers(0, 400), st.binary(max_size=3), st.integers(0, 2))
def test_it_agrees_on_damaged_bodies(body: bytes, at: int, octets: bytes, width: int) -> None:
    _check(body[:at] + octets + body[at + width :])


@given(st.binary(max_size=60))
def test_arbitrary_octets_are_refused_or_read(octets: bytes) -> None:
    _check(octets)


_CLEAN = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    st.booleans(),
    _CLEAN,
    st.permutations(["model", "stream", "session_id", "cache_salt", "messages", "temperature"]),
    st.booleans(),
)
def test_a_right_body_is_accepted(
    model: str, stream: bool, text: str, order: list[str], ascii_only: bool
) -> None:
    values = {
        "model": model,
        "stream": stream,
        "session_id": text,
        "cache_salt": text,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0.5,
    }
    body = json.dumps({name: values[name] for name in order}, ensure_ascii=ascii_only).encode()
    scanned = _check(body)
    assert scanned is not None
    assert (scanned.model, scanned.stream, scanned.session_id) == (model, stream, text)


def test_nothing_given_reads_as_nothing() -> None:
    scanned = scan_body(b'{"model":"m"}')
    assert not scanned.stream
    assert (scanned.service_tier, scanned.prompt_cache_key, scanned.cache_salt) == (None,) * 3
    assert not any(scanned.spans)


def test_parts_are_the_octets_that_came() -> None:
    scanned = scan_body(
        b'{"input" : [ 1,2 ] ,"model":"m","query":"q","documents":["d"],"text_1":{"a":1.50}}'
    )
    parts = (scan.QUERY, scan.INPUT, scan.DOCUMENTS, scan.TEXT_1)
    assert tuple(map(scanned.part, parts)) == (b'"q"', b"[ 1,2 ]", b'["d"]', b'{"a":1.50}')


@pytest.mark.parametrize(
    ("array", "ends"),
    [
        (b"[]", ()),
        (b"[ ]", ()),
        (b"[1]", (2,)),
        (b'[ {"a":[1,2]} , "]" ,[3\n] \n]', (13, 19, 25)),
        (b"[%b7]" % (b"7," * 30), tuple(range(46, 63, 2))),
        (b'"[1,2]"', ()),
        (b"{}", ()),
        (b"null", ()),
    ],
)
def test_where_the_last_elements_end(array: bytes, ends: tuple[int, ...]) -> None:
    # An escape in a name has any reader read it the long way.
    for model in (b'"model":"m"', b'"mod\\u0065l":"m"'):
        scanned = scan_body(b'{%b,"tools":[4,5],"messages":%b}' % (model, array))
        begin = scanned.spans[2 * scan.MESSAGES]
        assert tuple(end - begin for end in scanned.message_ends) == ends
        assert scanned.input_ends == ()


def test_very_many_elements_are_not_named() -> None:
    many = b"[%b7]" % (b"7," * limits.ELEMENTS_NAMED_MAX)
    assert len(scan.element_ends(many, 0, len(many))) == limits.CHAIN_BOUNDARIES_MAX
    many = b"[7,%b" % many[1:]
    assert scan.element_ends(many, 0, len(many)) == ()


@pytest.mark.parametrize(("count", "copies_max"), [(1, 1.1), (20, 2.1)])
def test_a_large_body_that_is_read_without_the_native_scan_is_not_held_many_times(
    count: int, copies_max: float
) -> None:
    text = b"x" * (4_000_000 // count)
    message = b'{"role":"user","content":"%b"}' % text
    body = b'{"model":"m","messages":[%b]}' % b",".join([message] * count)
    tracemalloc.start()
    try:
        scanned = scan.scan_with(None, body)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(scanned.message_ends) == min(count, limits.CHAIN_BOUNDARIES_MAX)
    assert peak_bytes < copies_max * len(body)


@pytest.mark.parametrize("inner", [b"7", b'{"role":"x"}', b'[{"role":"x"}]', b'"{\\"role\\":"'])
@pytest.mark.parametrize("count", [3, 8, 9, 10, 30])
def test_messages_of_the_usual_form_are_read_from_the_end(inner: bytes, count: int) -> None:
    for message in (b'{"role":"user","content":%b}', b'{"content":%b,"role":"user"}'):
        array = b"[" + b", ".join([b"7", *([message % inner] * count), b"7"]) + b" ]"
        ends = scan.element_ends(array, 0, len(array))
        read = [len(json.loads(array[:end] + b"]")) for end in ends]
        assert read == list(range(count + 3 - limits.CHAIN_BOUNDARIES_MAX, count + 3))[-count - 2 :]


@pytest.mark.parametrize(
    ("members", "tokens"),
    [
        (b'"max_tokens":7', 7),
        (b'"max_tokens":null', 0),
        (b'"max_tokens":7,"max_completion_tokens":9', 9),
        (b'"max_output_tokens":7,"n":3', 21),
        (b'"n":3', 0),
        (b'"max_tokens":7.5', 7),
        (b'"max_tokens":-7', 0),
        (b'"max_tokens":"7"', 0),
        (b'"max_tokens":true', 0),
        (b'"max_tokens":1e300', claim_limits.OUTPUT_TOKENS_MAX),
        (b'"max_tokens":999999999,"n":999999999', claim_limits.OUTPUT_TOKENS_MAX),
        (b'"x":{"max_tokens":7}', 0),
        (b'"max_tokens":7,"max_tokens":2', 2),
    ],
)
def test_how_many_tokens_may_be_generated(members: bytes, tokens: int) -> None:
    assert scan_body(b'{"model":"m",%b}' % members).output_tokens == tokens


@pytest.mark.parametrize(
    ("octets", "found"),
    [
        (b'{"id":"s"}', "s"),
        (b'{"rid":7,"id":"s"}', "s"),
        (b'{"id":7}', None),
        (b'{"id":null}', None),
        (b'["id"]', None),
        (b"null", None),
    ],
)
def test_a_session_of_the_engine_may_have_an_id(octets: bytes, found: str | None) -> None:
    scanned = scan_body(b'{"model":"m","session_params":%b}' % octets)
    assert scan.session_params_id(scanned) == found
    assert scan.session_params_id(scan_body(b'{"model":"m"}')) is None


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"messages":[{"content":"\\"model\\":\\"x\\""}],"model":"m"}', "m"),
        (b'{"a":{"model":"x"},"model":"m","b":[{"model":"y"}]}', "m"),
        (b'{"model":"x","model":"m"}', "m"),
        (b'{"model":"x","mod\\u0065l":"m"}', "m"),
        (b'\r\n\t {"model":"\\u006d"} \n', "m"),
        (b'{"model":"\\ud83d\\ude00"}', "\U0001f600"),
        (b'{"model":"m","max_tokens":' + b"9" * 5000 + b"}", "m"),
    ],
    ids=["in_prompt", "nested", "double", "double_escaped", "space", "pair", "long_number"],
)
def test_the_model_is_the_last_one_at_the_top(body: bytes, model: str) -> None:
    assert scan_body(body).model == model


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        (b"", errors.InvalidJSONError, None),
        (b"{", errors.InvalidJSONError, None),
        (b'{"model":"m"} {}', errors.InvalidJSONError, None),
        (b'{"model":"m",}', errors.InvalidJSONError, None),
        (b'{"model":"m","x":NaN}', errors.InvalidJSONError, None),
        (b'{"model":"m","x":Infinity}', errors.InvalidJSONError, None),
        (b'{"model":"m","x":01}', errors.InvalidJSONError, None),
        (b'{"model":"m","x":"\n"}', errors.InvalidJSONError, None),
        (b'{"model":"m","x":"\xff"}', errors.InvalidJSONError, None),
        (b'{"model":"m","\xff":1}', errors.InvalidJSONError, None),
        (b'{"model":"m","x":"\xed\xa0\x80"}', errors.InvalidJSONError, None),
        (b'{"model":"\\ud800"}', errors.InvalidJSONError, None),
        (codecs.BOM_UTF8 + b'{"model":"m"}', errors.InvalidJSONError, None),
        ('{"model":"m"}'.encode("utf-16"), errors.InvalidJSONError, None),
        (b'{"model":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", errors.InvalidJSONError,
         None),
        (b"[]", errors.InvalidRequestError, None),
        (b'"model"', errors.InvalidRequestError, None),
        (b"null", errors.InvalidRequestError, None),
        (b"{}", errors.MissingModelError, "model"),
        (b'{"model":null}', errors.MissingModelError, "model"),
        (b'{"model":""}', errors.MissingModelError, "model"),
        (b'{"model":"m","model":null}', errors.MissingModelError, "model"),
        (b'{"model":7}', errors.InvalidRequestError, "model"),
        (b'{"model":["m"]}', errors.InvalidRequestError, "model"),
        (b'{"model":"' + b"m" * (limits.MODEL_BYTES_MAX + 1) + b'"}', errors.InvalidRequestError,
         "model"),
        (b'{"model":"m","stream":1}', errors.InvalidRequestError, "stream"),
        (b'{"model":"m","stream":"true"}', errors.InvalidRequestError, "stream"),
        (b'{"model":"m","service_tier":1}', errors.InvalidRequestError, "service_tier"),
        (b'{"model":"m","prompt_cache_key":[]}', errors.InvalidRequestError, "prompt_cache_key"),
        (b'{"model":"m","cache_salt":{}}', errors.InvalidRequestError, "cache_salt"),
    ],
)  # fmt: skip
def test_refused(body: bytes, error: type[errors.ProxyError], param: str | None) -> None:
    with pytest.raises(errors.ProxyError) as caught:
        scan_body(body)
    assert type(caught.value) is error
    assert caught.value.param == param
    assert caught.value.body()


def test_null_is_nothing_given() -> None:
    scanned = scan_body(
        b'{"model":"m","stream":null,"service_tier":null,"session_id":7,"lora_path":["a"]}'
    )
    assert not scanned.stream
    assert scanned.service_tier is None
    assert scanned.session_id is None
    assert scanned.lora_path is None
