"""The body scan in C: the same verdicts and values as the scan through msgspec, on any body."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy import errors
from proxy.core import limits, prefix, scan
from proxy.core.usage import Usage, read_any_usage
from tests.core.test_media import prompts_with_media
from tests.core.test_scan import bodies

_SOURCE = Path(scan.__file__).with_name("_scan.c")
_COMPILER = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]
_PLACES = range(11)
# What a portable build reads with, and what this machine's does.
_BUILDS = {"wide": (), "portable": ("-DSCAN_PORTABLE",)}


@pytest.fixture(scope="session", params=_BUILDS)
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    include = Path(sysconfig.get_path("include"))
    if shutil.which(_COMPILER) is None or not (include / "Python.h").is_file():
        pytest.skip("no C compiler, or no headers of this Python")
    built = tmp_path_factory.mktemp(request.param) / "_scan.so"
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", *_BUILDS[request.param]]
    subprocess.run(
        [_COMPILER, *options, f"-I{include}", str(_SOURCE), "-o", str(built)], check=True
    )
    spec = importlib.util.spec_from_file_location("_scan", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _seen(read: Any, body: bytes) -> object:
    """What one reader makes of a body: fields and parts, or the kind of the refusal."""
    try:
        scanned = scan.scan_with(read, body)
    except errors.ProxyError as error:
        return type(error), error.param
    fields = (
        scanned.model, scanned.stream, scanned.service_tier, scanned.prompt_cache_key,
        scanned.session_id, scanned.cache_salt, scanned.lora_path, scanned.previous_response_id,
        scanned.output_tokens,
    )  # fmt: skip
    ends = [
        [end - scanned.spans[2 * part] for end in there]
        for part, there in ((scan.MESSAGES, scanned.message_ends), (scan.INPUT, scanned.input_ends))
    ]
    media = []
    for at in range(0, len(scanned.media), 4):
        start, end, *sizes = scanned.media[at : at + 4]
        (place,) = [p for p in _PLACES if scanned.spans[2 * p] <= start < scanned.spans[2 * p + 1]]
        media.append((place, start - scanned.spans[2 * place], end - start, sizes))
    return fields, [scanned.part(place) for place in _PLACES], ends, media


def _check(native: ModuleType, body: bytes) -> None:
    assert _seen(native.scan, body) == _seen(None, body)


_SAME = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@_SAME
@given(bodies())
def test_both_read_the_same(native: ModuleType, body: bytes) -> None:
    _check(native, body)


@pytest.mark.sweep
@_SAME
@given(bodies(), st.integers(0, 400), st.binary(max_size=3), st.integers(0, 2))
def test_both_read_damaged_bodies_the_same(
    native: ModuleType, body: bytes, at: int, octets: bytes, width: int
) -> None:
    _check(native, body[:at] + octets + body[at + width :])


_FRAGMENTS = st.sampled_from(
    [b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b" ", b"\n", b"1", b"-", b"0", b".", b"e",
     b"true", b"false", b"null", b'"model":', b'"stream":', b'"m"', b"\\u00e9", b"\\ud800",
     b"\\uDc00", b"\xc3", b"\xa9", b"\xe4\xbd\xa0", b"\xed\xa0", b"\xf0\x9f\x98\x80",
     b"\xf4\x90", b"\x7f", b"\x1f", b"\0", b"x" * 15, b"y" * 64]
)  # fmt: skip


@_SAME
@given(st.lists(_FRAGMENTS, max_size=14).map(b"".join))
def test_both_read_arbitrary_octets_the_same(native: ModuleType, octets: bytes) -> None:
    _check(native, octets)
    _check(native, b'{"model":"m","x":' + octets + b"}")
    _check(native, b'{"model":"m","messages":"' + octets + b'"}')


@pytest.mark.sweep
@pytest.mark.parametrize("octet", range(256))
def test_every_octet_at_every_place_of_a_string(native: ModuleType, octet: int) -> None:
    """Strings are read many octets at a time; no place among them is special."""
    for place in [*range(70), 127, 128, 129]:
        text = b"a" * place + bytes((octet,)) + b"b" * (140 - place)
        _check(native, b'{"model":"m","prompt":"%b"}' % text)
        _check(native, b'{"model":"m","prompt":"%b"}' % text.replace(b"b", b"\\n"))


def test_every_run_of_backslashes_at_every_place(native: ModuleType) -> None:
    """Which octet is escaped is worked out for 64 at once; a run may reach into the next 64."""
    for place in range(140):
        for run in (1, 2, 3, 4, 63, 64, 65):
            for then in (b"n", b'"', b"u0041", b"x", b"\x01", b"\xc3\xa9", b'","a":"'):
                text = b"a" * place + b"\\" * run + then + b"c" * (place % 80)
                _check(native, b'{"model":"m","prompt":"%b"}' % text)


@pytest.mark.parametrize("places", [1, 15, 16, 17, 31, 32, 400])
def test_numbers_of_any_length(native: ModuleType, places: int) -> None:
    digits = b"7" * places
    for number in (digits, b"-%b.%b" % (digits, digits), b"1E-%b" % digits, b"0." + digits):
        for then in (b"", b" ", b".", b"e", b"-", b"a", b"\xb7", b"/", b":", b"\0"):
            _check(native, b'{"model":"m","prompt":[%b%b]}' % (number, then))
            _check(native, b'{"model":"m","prompt":%b%b,"x":"%b"}' % (number, then, b"y" * 40))


@pytest.mark.sweep
def test_every_start_of_a_character(native: ModuleType) -> None:
    """Of all first and second octets, with right and wrong ends: what RFC 3629 allows."""
    for first in range(0x80, 0x100):
        for second in range(0x70, 0xD0):
            for rest in (b"", b"\x80", b"\x80\xbf", b"\x80\x7f", b"\xc0\x80"):
                text = bytes((first, second)) + rest
                _check(native, b'{"model":"m","prompt":"%b"}' % text)


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_body_that_ends_anywhere_is_refused(native: ModuleType, cut: int) -> None:
    body = '{"model":"m","stream":false,"messages":[{"é":"\\u00e9你"},-1.5e7]}'.encode()
    with pytest.raises(errors.InvalidJSONError, match=r"byte \d+"):
        scan.scan_with(native.scan, body[:-cut])
    assert scan.scan_with(native.scan, body).part(scan.MESSAGES) == body[39:-1]


@pytest.mark.parametrize("opened", [b"[", b'{"a":'])
def test_depth_is_bounded(native: ModuleType, opened: bytes) -> None:
    closed = b"]" if opened == b"[" else b"}"
    for depth in (1, 63, 64, 65, 127, 128, 129, 512):
        body = b'{"model":"m","messages":' + opened * depth + b"1" + closed * depth + b"}"
        _check(native, body)
        assert json.loads(body)["model"] == scan.scan_with(native.scan, body).model
        with pytest.raises(errors.InvalidJSONError):
            scan.scan_with(native.scan, body[:-1] + closed + b"}")
    for depth in (513, 1_000_000):
        body = b'{"model":"m","messages":' + opened * depth + b"1" + closed * depth + b"}"
        with pytest.raises(errors.InvalidJSONError, match="too deep"):
            scan.scan_with(native.scan, body)


def test_the_usual_form_needs_no_second_reader(native: ModuleType) -> None:
    usual = native.scan(
        b'{"stream":null,"session_id":"s","model":"m","x":"\\n","lora_path":null,'
        b'"max_tokens":7,"n":2,"max_output_tokens":null}'
    )
    assert usual == ("m", None, None, "s", None, None, None, None, (0,) * 22, (), (), (), 14)
    # An escape beyond the end of a name, and read along with it, is none of the name.
    for size in range(1, 80):
        name = b"m" * size
        body = b'{"%b":1,"model":"%b","p":"%b"}' % (name, name, b"\\n" * 60)
        assert native.scan(body)[0] == name.decode()
    for unusual in (b'{"mod\\u0065l":"m"}', b'{"model":7}', b"[1]", b'{"model":"\\u006d"}'):
        assert native.scan(unusual) is None


@_SAME
@given(
    st.lists(st.sampled_from([b"1", b"{}", b'"],["', b"[]", b'{"a":[1,{}]}', b"null", b"[[2], 3]"]),
             max_size=25),
    st.sampled_from([b"", b" ", b"\n\t  ", b" " * 70]),
    st.sampled_from([b"", b'"input":[1,2,3],', b'"messages":[{},[]],', b'"mod\\u0065l":"m",']),
)  # fmt: skip
def test_both_find_the_ends_of_the_last_elements(
    native: ModuleType, elements: list[bytes], space: bytes, before: bytes
) -> None:
    array = b"[" + space + (space + b"," + space).join(elements) + space + b"]"
    for name in (b"messages", b"input", b"prompt"):
        body = b'{%b"model":"m","%b": %b }' % (before, name, array)
        _check(native, body)
        scanned = scan.scan_with(native.scan, body)
        if name == b"messages":
            octets, begin = scanned.octets, scanned.spans[2 * scan.MESSAGES]
            read = [json.loads(octets[begin:end] + b"]") for end in scanned.message_ends]
            whole = json.loads(array)
            kept = min(len(whole), limits.CHAIN_BOUNDARIES_MAX)
            assert read == [whole[: len(whole) - kept + place + 1] for place in range(kept)]


@pytest.mark.sweep
@_SAME
@given(prompts_with_media(), st.sampled_from([b"", b'"mod\\u0065l":"m",', b'"messages":[{}],']))
def test_both_find_the_same_media(native: ModuleType, array: bytes, before: bytes) -> None:
    for name in (b"messages", b"input", b"prompt", b"documents", b"x"):
        _check(native, b'{%b"model":"m","tools":%b,"%b":%b}' % (before, array, name, array))


@pytest.mark.parametrize("spaces", [0, 1, 39, 40, 41])
@pytest.mark.parametrize("size", [4094, 4095, 4096, 4097])
def test_both_draw_the_line_at_the_same_octet(native: ModuleType, spaces: int, size: int) -> None:
    for lead in (b"", b"data:,", b"data:%b," % (b"x" * 122), b"data:%b," % (b"x" * 123), b"data:"):
        for run in (b"A" * size, b"A" * 2047 + b"!" + b"A" * size, b"A" * 2048 + b"!" * size):
            text = (lead + run)[:size]
            for gap in (b" " * spaces + b":", b":" + b"\t" * spaces):
                _check(native, b'{"model":"m","input":{"data"%b"%b"}}' % (gap, text))


_RUN = b"A" * 5000


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (b'"messages":[{"data":"%b"}],"messages":[{"url":"%b"}]' % (_RUN, _RUN), 1),
        (b'"messages":[{"data":"%b"}],"messages":[]' % _RUN, 0),
        (b'"messages":[%b{}]' % (b'{"data":"%b"},' % _RUN * 70), 70),
        (b'"input":[{"x\\"data":"%b"}]' % _RUN, 0),
        (b'"input":[{"data":"data:\\",%b"}]' % _RUN, 0),
        (b'"image_data":"%b","data":{"data":"%b"}' % (_RUN, _RUN), 0),
    ],
)
def test_both_count_media_in_odd_bodies(native: ModuleType, body: bytes, parts: int) -> None:
    whole = b'{"model":"m",%b}' % body
    _check(native, whole)
    scanned = scan.scan_with(native.scan, whole)
    assert (scanned.media_parts, scanned.media_bytes) == (parts, parts * len(_RUN))


def test_only_bytes_are_read(native: ModuleType) -> None:
    """They end with an octet 0 that belongs to them; the C code counts on it."""
    for other in (bytearray(b"{}"), memoryview(b"{}"), "{}", None):
        with pytest.raises(TypeError):
            native.scan(other)


_PIECES = st.sampled_from(
    [b'"user"', b'"role"', b":", b" ", b"\n\t", b" " * 33, b'\\"role"', b'"', b"\\", b"\\\\",
     b'\\"', b"{", b"}", b"[", b"]", b",", b'"content":"', b'"u', b"x", b"x" * 15, b"x" * 90]
)  # fmt: skip
_MESSAGES = st.one_of(
    st.lists(_PIECES, max_size=30).map(b"".join),
    st.lists(_PIECES, max_size=12).map(lambda rest: b'[{"role":"user"' + b"".join(rest)),
)


@_SAME
@given(_MESSAGES, st.integers(0, 40), st.integers(0, 40), st.sampled_from([0, 5, 60, 9000]),
       st.sampled_from([0, 7, 64, 4096]))  # fmt: skip
def test_both_find_the_same_opener(
    native: ModuleType, octets: bytes, begin: int, after: int, search_max: int, opener_max: int
) -> None:
    """Of messages and of what is none, wherever they lie in a body, under any bounds."""
    begin = min(begin, len(octets))
    end = max(begin, len(octets) - after)
    given_there = (octets, begin, end, search_max, opener_max)
    assert native.opener_end(*given_there) == prefix._opener_end(*given_there)


@pytest.mark.parametrize(
    ("begin", "end", "bound"), [(-1, 2, 9), (2, 1, 9), (0, 4, 9), (0, 1 << 80, 9), (0, 3, -1)]
)
def test_an_opener_is_sought_within_the_octets_alone(
    native: ModuleType, begin: int, end: int, bound: int
) -> None:
    with pytest.raises((ValueError, OverflowError)):
        native.opener_end(b"[1]", begin, end, bound, 9)
    with pytest.raises(TypeError):
        native.opener_end(bytearray(b"[1]"), 0, 3, 9, 9)


# --- usage ----------------------------------------------------------------------------------

_COUNT = st.sampled_from(["0", "7", "null", "-1", "1.5", '"5"', "9" * 12, "9" * 13, "9" * 400])
_DETAILS = st.sampled_from(
    ["null", "{}", '{"cached_tokens":4}', '{"cached_tokens":null}', '{"a":[{}],"cached_tokens":3}',
     '{"cached_tokens":1,"cached_tokens":2}', '{"cached_tokens":-2}', "[]", '{"cached_tokens":1']
)  # fmt: skip
_USAGE_KEYS = {
    "prompt_tokens": _COUNT, "completion_tokens": _COUNT, "input_tokens": _COUNT,
    "output_tokens": _COUNT, "cache_read_input_tokens": _COUNT, "prompt_tokens_details": _DETAILS,
    "input_tokens_details": _DETAILS, "other": st.sampled_from(["{}", '"}"', "[[1]]", "1e3", ""]),
    "prompt_\\u0074okens": _COUNT,
}  # fmt: skip


@st.composite
def _usages(draw: st.DrawFn) -> bytes:
    space = draw(st.sampled_from(["", " ", "\n\t"]))
    keys = draw(st.lists(st.sampled_from(sorted(_USAGE_KEYS)), max_size=6))
    members = [f'"{key}"{space}:{space}{draw(_USAGE_KEYS[key])}' for key in keys]
    text = f'"usage"{space}:{space}{{' + f"{space},{space}".join(members) + "}"
    before = draw(
        st.sampled_from(["", '{"usage":{"prompt_tokens":1}},', '"usage",', '"usage":null,'])
    )
    after = draw(
        st.sampled_from(["}", "}\n\ndata: [DONE]\n\n", ',"usage":null', ',"a":"usage"', ""])
    )
    return (before + text + after).encode()[draw(st.sampled_from([0, 0, 0, 3])) :]


@_SAME
@given(_usages(), st.integers(0, 200), st.binary(max_size=2))
def test_both_read_the_same_usage(native: ModuleType, tail: bytes, at: int, octets: bytes) -> None:
    for each in (tail, tail[:at], tail[:at] + octets + tail[at:]):
        counts = native.usage(each)
        if counts is not None:
            prompt, completion, cached = counts
            expected = read_any_usage(each)
            assert expected == Usage(prompt, completion, cached if cached >= 0 else None), each


def test_the_usual_usage_is_read_in_c(native: ModuleType) -> None:
    usage = b'"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":4},'
    assert native.usage(usage + b'"completion_tokens":2}}') == (5, 2, 4)
    assert native.usage(b'"usage": {"input_tokens": 9, "output_tokens": 7}}') == (9, 7, -1)
    assert native.usage(b'{"usage":{"prompt_tokens":5') is None
    with pytest.raises(TypeError):
        native.usage("text")
