"""What is wrong with an input file, line by line, however it is cut into pieces."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.offline.records import JobError
from backends.offline.validation import (
    DEPTH_MAX,
    ERRORS_MAX,
    FileCheck,
    Good,
    LineReader,
    check_line,
    duplicate,
)

_CHAT = "/v1/chat/completions"
_BYTES_MAX = 10_000


def _line(n: int = 0, **changes: object) -> dict[str, object]:
    body = {"model": "m", "messages": [{"role": "user", "content": f"question {n}"}]}
    return {"custom_id": f"id-{n}", "method": "POST", "url": _CHAT, "body": body} | changes


def _octets(n: int = 0, **changes: object) -> bytes:
    return json.dumps(_line(n, **changes), ensure_ascii=False).encode()


def _checked(octets: bytes, endpoint: str = _CHAT, cuts: int = 0) -> list[Good | JobError]:
    reader, rng = LineReader(_BYTES_MAX), random.Random(cuts)
    at = sorted(rng.choices(range(len(octets) + 1), k=cuts))
    pieces = []
    for begin, end in zip([0, *at], [*at, len(octets)], strict=True):
        pieces += reader.feed(octets[begin:end])
    pieces += reader.end()
    return [check_line(piece, endpoint, _BYTES_MAX) for piece in pieces]


def _problem(octets: bytes, endpoint: str = _CHAT) -> tuple[str, str | None]:
    (problem,) = _checked(octets, endpoint)
    assert isinstance(problem, JobError)
    assert problem.line == 1
    return problem.code, problem.param


@pytest.mark.parametrize("cuts", [0, 1, 7, 300])
def test_a_good_file_in_any_pieces(cuts: int) -> None:
    lines = [_octets(n, body={"model": "m", "prompt": "ä€😀" * n}) for n in range(50)]
    octets = b"\xef\xbb\xbf" + b"\n\r\n  \n".join(lines)
    found = _checked(octets, cuts=cuts)
    assert [good.line for good in found] == [1 + 3 * n for n in range(50)]
    for n, good in enumerate(found):
        assert isinstance(good, Good)
        assert (good.custom_id, good.model) == (f"id-{n}", "m")
        body = json.loads(octets[good.offset : good.offset + good.length])
        assert body == {"model": "m", "prompt": "ä€😀" * n}


def test_line_ends_may_be_crlf_and_the_last_may_be_missing() -> None:
    assert len(_checked(_octets(0) + b"\r\n" + _octets(1) + b"\r\n")) == 2
    assert len(_checked(_octets(0) + b"\r\n" + _octets(1))) == 2
    assert _checked(b"") == _checked(b"\n\r\n \t\n") == _checked(b"\xef\xbb\xbf") == []


def test_a_body_that_stands_in_the_line_before_is_found_with_the_same_octets() -> None:
    octets = b'{"custom_id":"{\\"model\\":\\"m\\"}","x":{"model":"m"},"method":"POST",'
    octets += b'"url":"/v1/chat/completions","body": {"model":"m"} }'
    (good,) = _checked(octets)
    assert isinstance(good, Good)
    assert octets[good.offset : good.offset + good.length] == b'{"model":"m"}'


@pytest.mark.parametrize(
    "octets",
    [
        b"{",
        b"hello",
        b"[1]",
        b"null",
        _octets() + b"}",
        _octets().replace(b"question", b"quest\xffion"),
        _octets().replace(b"question", b"quest\x00ion"),
        _octets().replace(b"question", b"\\ud800"),
        _octets().replace(b'"POST"', b"POST"),
        _octets(body=1).replace(b": 1}", b": NaN}"),
        b'{"body":' + b"[" * 4_000 + b"]" * 4_000 + b"}",
    ],
)
def test_what_is_no_json_object(octets: bytes) -> None:
    assert _problem(octets) == ("invalid_json_line", None)


@pytest.mark.parametrize("name", ["custom_id", "method", "url", "body"])
def test_what_is_missing(name: str) -> None:
    line = _line()
    del line[name]
    assert _problem(json.dumps(line).encode()) == ("missing_required_parameter", name)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"custom_id": 7}, "invalid_request", "custom_id"),
        ({"custom_id": ""}, "invalid_request", "custom_id"),
        ({"custom_id": "a\0b"}, "invalid_request", "custom_id"),
        ({"custom_id": "a" * 513}, "invalid_request", "custom_id"),
        ({"method": "GET"}, "invalid_method", "method"),
        ({"method": None}, "invalid_method", "method"),
        ({"url": "/v1/embeddings"}, "invalid_url", "url"),
        ({"body": "text"}, "invalid_request", "body"),
        ({"body": {}}, "missing_required_parameter", "body.model"),
        ({"body": {"model": 7}}, "invalid_request", "body.model"),
        ({"body": {"model": ""}}, "invalid_request", "body.model"),
        ({"body": {"model": "m", "stream": True}}, "invalid_request", "body.stream"),
    ],
)
def test_what_is_wrong(changes: dict[str, object], code: str, param: str) -> None:
    assert _problem(_octets(**changes)) == (code, param)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_what_others_could_not_read_is_refused_here(opening: str) -> None:
    closing = "]" if opening == "[" else "}"

    def line(levels: int) -> bytes:
        deep = opening * levels + "1" + closing * levels
        wide = ",".join(["[]"] * 300)
        body = f'{{"model":"m","s":"\\"[{{[{{","wide":[{wide}],"deep":{deep}}}'
        return b'{"custom_id":"1","method":"POST","url":"%b","body":%b}' % (
            _CHAT.encode(),
            body.encode(),
        )

    assert isinstance(_checked(line(DEPTH_MAX - 2))[0], Good)  # the line and its body are two
    assert _problem(line(DEPTH_MAX - 1))[0] == "invalid_json_line"
    assert _problem(line(3 * DEPTH_MAX))[0] == "invalid_json_line"


def test_what_is_not_streamed_may_say_so() -> None:
    for stream in (False, None):
        (good,) = _checked(_octets(body={"model": "m", "stream": stream}))
        assert isinstance(good, Good)


def test_a_line_over_the_limit_is_told_and_the_next_one_read() -> None:
    octets = _octets(0, custom_id="x" * 2 * _BYTES_MAX) + b"\n" + _octets(1)
    for cuts in (0, 50):
        long, good = _checked(octets, cuts=cuts)
        assert isinstance(long, JobError)
        assert (long.code, long.line) == ("invalid_request", 1)
        assert isinstance(good, Good)
        assert octets[good.offset :].startswith(b'{"model"')


def _whole(lines: list[bytes], lines_max: int = 1_000, *, known: bool = True) -> list[str]:
    check = FileCheck(lines_max)
    for checked in _checked(b"\n".join(lines), "/v1/embeddings"):
        check.add(checked)
    return [problem.code for problem in check.end(model_known=known)]


def _embed(n: int, model: str = "m", text: object = "t") -> bytes:
    return _octets(n, url="/v1/embeddings", body={"model": model, "input": text})


def test_a_batch_is_for_one_model_and_has_lines() -> None:
    assert _whole([_embed(0), _embed(1)]) == []
    assert _whole([]) == ["empty_file"]
    assert _whole([_embed(0), _embed(1, "other"), _embed(2)]) == ["mismatched_model"]
    assert _whole([_embed(0), b"{", _embed(2)]) == ["invalid_json_line"]
    assert _whole([_embed(0), _embed(1)], known=False) == ["model_not_found"]


def test_lines_and_embedding_inputs_are_limited() -> None:
    assert _whole([_embed(n) for n in range(10)], lines_max=10) == []
    assert _whole([_embed(n) for n in range(11)], lines_max=10) == ["too_many_requests"]
    assert _whole([_embed(n, text=["a", "b"]) for n in range(5)], lines_max=10) == []
    assert _whole([_embed(n, text=["a", "b"]) for n in range(6)], lines_max=10) == [
        "too_many_requests"
    ]
    assert _whole([_embed(n, text=[1, 2, 3]) for n in range(9)], lines_max=10) == []


_WORDS = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\n", b"\r\n", b" ", b"\x00", b"\xff"),
        *(b'"custom_id"', b'"method"', b'"url"', b'"body"', b'"model"', b'"stream"', b'"input"'),
        *(
            b'"POST"',
            b'"/v1/chat/completions"',
            b"true",
            b"null",
            b"1e5",
            b"\xef\xbb\xbf",
            b"\\ud800",
        ),
        _octets(),
        _octets(1, custom_id="é"),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_WORDS | st.binary(max_size=8), max_size=30), st.integers(1, 20))
def test_any_octets_are_lines_or_problems_however_they_are_cut(
    words: list[bytes], cuts: int
) -> None:
    octets = b"".join(words)
    whole = _checked(octets)
    assert _checked(octets, cuts=cuts) == whole
    lines = octets.split(b"\n")
    assert len(whole) <= len(lines)
    for found in whole:
        assert found.line is not None
        assert lines[found.line - 1].strip()
        if isinstance(found, Good):
            body = octets[found.offset : found.offset + found.length]
            assert json.loads(body)["model"] == found.model


def test_the_list_of_errors_is_bounded_and_says_how_many_more() -> None:
    check = FileCheck(10_000)
    for n in range(ERRORS_MAX + 23):
        check.add(duplicate(n + 1, "same"))
    problems = check.end(model_known=True)
    assert len(problems) == ERRORS_MAX + 1
    assert problems[-1].code == "too_many_errors"
    assert problems[-1].message.startswith("23 ")
