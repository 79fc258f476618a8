"""What was read once is known by its octets, and only by them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors
from proxy.core import limits
from proxy.core.head import read_answer_head
from proxy.core.head_memory import HeadMemory
from proxy.core.http1 import BadResponse, ResponseHead, parse_request_head
from proxy.core.preamble import Preamble, read_preamble
from tests.conformance.vectors import REQUESTS

_POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


def _requests() -> HeadMemory[Preamble]:
    return HeadMemory(read_preamble)


def _answers() -> HeadMemory[ResponseHead]:
    return HeadMemory(read_answer_head)


def test_a_head_that_differs_in_its_length_alone_is_read_once() -> None:
    memory = _requests()
    first, one = memory.read(_POST + b"Content-Length: 1\r\nAccept: */*")
    second, two = memory.read(_POST + b"Content-Length: 23456\r\nAccept: */*")
    assert second is first
    assert (one, two) == (1, 23456)
    other, _ = memory.read(_POST + b"Content-Length: 1\r\nAccept: text/plain")
    assert other is not first
    assert len(memory) == 2


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: ",
        b"Content-Length:",
        b"Content-Length: 1, 1",
        b"Content-Length: 1 ",
        b"Content-Length: +1",
        b"Content-Length: 1\r\nContent-Length: 1",
        b"Content-Length: 1\r\nTransfer-Encoding: chunked",
        b"Content-Length: \0",
        b"X: a\r\nContent-Length: 1\r\n2",
    ],
)
def test_what_looks_like_a_head_that_is_known_is_judged_itself(fields: bytes) -> None:
    memory = _requests()
    memory.read(_POST + b"Content-Length: 7")
    memory.read(_POST + b"X: a\r\nContent-Length: 7")
    try:
        expected = parse_request_head(_POST + fields).content_length
    except errors.ProxyError as error:
        with pytest.raises(type(error)):
            memory.read(_POST + fields)
    else:
        assert memory.read(_POST + fields)[1] == expected


def test_equal_double_lengths_of_an_answer_are_never_remembered() -> None:
    memory = _answers()
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %b\r\ncontent-length: 5"
    assert memory.read(head % b"5")[1] == 5
    assert len(memory) == 0
    with pytest.raises(BadResponse):
        memory.read(head % b"7")


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_has_no_body_has_none_whatever_it_says(status: int) -> None:
    memory = _answers()
    head = b"HTTP/1.1 %d Fine\r\ncontent-length: %d"
    assert [memory.read(head % (status, n))[1] for n in (0, 9, 9)] == [0, 0, 0]


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    head, length = _answers().read(b"HTTP/1.1 200 OK\r\nserver: a")
    assert (head.counted, head.chunked, length) == (False, False, -1)


def test_the_memory_is_bounded() -> None:
    memory = _requests()
    for number in range(limits.HEADS_REMEMBERED_MAX + 10):
        memory.read(_POST + b"X: %d\r\nContent-Length: 1" % number)
        assert len(memory) <= limits.HEADS_REMEMBERED_MAX
    empty = _requests()
    empty.read(_POST + b"X: " + b"x" * limits.REMEMBERED_HEAD_BYTES_MAX)
    assert len(empty) == 0


_HEADS = [
    vector.octets.partition(b"\r\n\r\n")[0]
    for vector in REQUESTS
    if len(vector.octets) < 2000 and b"\r\n\r\n" in vector.octets
]


@given(st.lists(st.sampled_from(_HEADS), max_size=12))
def test_a_memory_never_changes_a_verdict(blocks: list[bytes]) -> None:
    memory = _requests()
    for block in blocks:
        try:
            expected: object = parse_request_head(block).content_length
        except errors.ProxyError as error:
            expected = type(error)
        try:
            got: object = memory.read(block)[1]
        except errors.ProxyError as error:
            got = type(error)
        assert got == expected
