"""An engine's octets in answer to one request, right and wrong, each with its verdict and why.

A bad answer is never the client's fault and never the next client's answer: it fails, or what
follows its end condemns the connection. The verdict is the same however the octets are cut.
"""

from __future__ import annotations

from typing import NamedTuple

from proxy.core import limits


class EngineVector(NamedTuple):
    """`status` 0: no head may be understood. `payload` is the body without its framing."""

    name: str
    octets: bytes
    rule: str
    status: int = 200
    payload: bytes = b""
    ended: bool = False
    surplus: bytes = b""
    failed: bool = False


_LAST = b"0\r\n\r\n"
_OK = b"HTTP/1.1 200 OK\r\n"
_COUNTED = _OK + b"Content-Length: 5\r\n\r\n"
_STREAM = _OK + b"Transfer-Encoding: chunked\r\n\r\n"


def _bad_head(name: str, octets: bytes, rule: str) -> EngineVector:
    return EngineVector("r_" + name, octets, rule, status=0, failed=True)


def _bad_chunks(name: str, body: bytes, rule: str = "9112 §7.1", payload: bytes = b"") -> (
    EngineVector
):  # fmt: skip
    return EngineVector("r_chunk_" + name, _STREAM + body, rule, payload=payload, failed=True)


ENGINE: tuple[EngineVector, ...] = (
    EngineVector("r_counted", _COUNTED + b"hello", "9112 §6.2", payload=b"hello", ended=True),
    EngineVector("r_chunked", _STREAM + b"5\r\nhello\r\n" + _LAST, "9112 §7.1", payload=b"hello",
                 ended=True),
    EngineVector("r_until_close", _OK + b"\r\nhello", "9112 §6.3", payload=b"hello"),
    EngineVector("r_without_reason", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", "9112 §4",
                 ended=True),
    EngineVector("r_continue_first", b"HTTP/1.1 100 Continue\r\n\r\n" + _COUNTED + b"hello",
                 "9110 §15.2", payload=b"hello", ended=True),
    EngineVector("r_hints_first", b"HTTP/1.1 103 Hints\r\nLink: a\r\n\r\n" + _COUNTED + b"hello",
                 "9110 §15.2", payload=b"hello", ended=True),
    EngineVector("r_length_twice_equal", _OK + b"Content-Length: 5\r\n" * 2 + b"\r\nhello",
                 "9110 §8.6", payload=b"hello", ended=True),
    EngineVector("r_chunk_extension", _STREAM + b"5;x=y\r\nhello\r\n0;z\r\n\r\n", "9112 §7.1.1",
                 payload=b"hello", ended=True),
    EngineVector("r_chunk_trailer", _STREAM + b"5\r\nhello\r\n0\r\nX: y\r\n\r\n", "9112 §7.1.2",
                 payload=b"hello", ended=True),
    EngineVector("r_no_content_with_length", b"HTTP/1.1 204 N\r\nContent-Length: 5\r\n\r\n",
                 "9110 §15.3.5", status=204, ended=True),
    # What comes after the end would be the next client's answer.
    EngineVector("r_extra", _COUNTED + b"helloHTTP/1.1 200 OK\r\n\r\n", "9112 §6.3",
                 payload=b"hello", ended=True, surplus=b"HTTP/1.1 200 OK\r\n\r\n"),
    EngineVector("r_extra_after_chunks", _STREAM + b"1\r\nx\r\n" + _LAST + b"poison", "9112 §6.3",
                 payload=b"x", ended=True, surplus=b"poison"),
    EngineVector("r_no_content_with_body", b"HTTP/1.1 204 N\r\nContent-Length: 5\r\n\r\nhello",
                 "9110 §15.3.5", status=204, ended=True, surplus=b"hello"),
    EngineVector("r_not_modified_with_body",
                 b"HTTP/1.1 304 N\r\nTransfer-Encoding: chunked\r\n\r\n" + _LAST,
                 "9110 §15.4.5", status=304, ended=True, surplus=_LAST),
    # A cut must look cut.
    EngineVector("r_cut_counted", _COUNTED + b"hell", "9112 §8", payload=b"hell"),
    EngineVector("r_cut_in_chunk", _STREAM + b"5\r\nhel", "9112 §8", payload=b"hel"),
    EngineVector("r_cut_between_chunks", _STREAM + b"5\r\nhello\r\n", "9112 §8", payload=b"hello"),
    EngineVector("r_cut_before_last_line_end", _STREAM + b"5\r\nhello\r\n0\r\n", "9112 §8",
                 payload=b"hello"),
    EngineVector("r_cut_in_head", b"HTTP/1.1 200 OK\r\nContent-Le", "9112 §8", status=0),
    EngineVector("r_nothing", b"", "9112 §8", status=0),
    _bad_head("length_and_coding",
              _OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + _LAST,
              "9112 §6.3"),
    _bad_head("length_differing", _OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
              "9110 §8.6"),
    _bad_head("length_list", _OK + b"Content-Length: 5, 5\r\n\r\nhello", "9110 §8.6"),
    _bad_head("length_bad", _OK + b"Content-Length: 5x\r\n\r\nhello", "9110 §8.6"),
    _bad_head("length_negative", _OK + b"Content-Length: -5\r\n\r\nhello", "9110 §8.6"),
    _bad_head("coding_unknown", _OK + b"Transfer-Encoding: gzip\r\n\r\n", "9112 §6.1"),
    _bad_head("coding_twice", _OK + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n" + _LAST,
              "9112 §6.1"),
    _bad_head("garbage", b"garbage\r\n\r\n", "9112 §4"),
    _bad_head("version_2", b"HTTP/2.0 200 OK\r\n\r\n", "9112 §2.3"),
    _bad_head("version_0_9", b"<html>hello</html>\r\n\r\n", "9112 §2.3"),
    _bad_head("status_two_digits", b"HTTP/1.1 20 OK\r\n\r\n", "9112 §4"),
    _bad_head("status_four_digits", b"HTTP/1.1 2000 OK\r\n\r\n", "9112 §4"),
    _bad_head("status_600", b"HTTP/1.1 600 OK\r\n\r\n", "9110 §15"),
    _bad_head("nul_in_value", _OK + b"X: a\x00b\r\n\r\n", "9110 §5.5"),
    _bad_head("bare_return_in_value", _OK + b"X: a\rSet-Cookie: b\r\n\r\n", "9112 §2.2"),
    _bad_head("bare_feed_in_value", _OK + b"X: a\nSet-Cookie: b\r\n\r\n", "9112 §2.2"),
    _bad_head("nul_in_reason", b"HTTP/1.1 200 O\x00K\r\n\r\n", "9112 §4"),
    _bad_head("folded", _OK + b"X: a\r\n b\r\n\r\n", "9112 §5.2"),
    _bad_head("space_before_colon", _OK + b"Content-Length : 5\r\n\r\nhello", "9112 §5.1"),
    _bad_head("without_colon", _OK + b"nothing\r\n\r\n", "9112 §5"),
    _bad_head("fields_too_many", _OK + b"X: y\r\n" * (limits.FIELDS_MAX + 1) + b"\r\n",
              "limit FIELDS_MAX"),
    _bad_head("head_too_large", _OK + b"X: " + b"y" * limits.RESPONSE_HEAD_BYTES_MAX + b"\r\n\r\n",
              "limit RESPONSE_HEAD_BYTES_MAX"),
    _bad_head("head_without_end", _OK + b"X: " + b"y" * limits.RESPONSE_HEAD_BYTES_MAX,
              "limit RESPONSE_HEAD_BYTES_MAX"),
    _bad_head("switching_protocols", b"HTTP/1.1 101 Up\r\nUpgrade: h2c\r\n\r\n", "9110 §15.2.2"),
    _bad_head("informational_without_end",
              b"HTTP/1.1 100 C\r\n\r\n" * (limits.INFORMATIONAL_RESPONSES_MAX + 1),
              "limit INFORMATIONAL_RESPONSES_MAX"),
    _bad_chunks("size_bad", b"zz\r\nhello\r\n"),
    _bad_chunks("size_signed", b"+5\r\nhello\r\n"),
    _bad_chunks("size_overflow", b"10000000000000005\r\nhello\r\n"),
    _bad_chunks("size_line_bare_feed", b"5\nhello\r\n", "9112 §2.2"),
    _bad_chunks("longer", b"5\r\nhello!\r\n" + _LAST, payload=b"hello"),
    _bad_chunks("end_bare_feed", b"5\r\nhello\n" + _LAST, payload=b"hello"),
    _bad_chunks("second_bad", b"5\r\nhello\r\nxyz\r\n", payload=b"hello"),
    _bad_chunks("extension_nul", b"5;\x00\r\nhello\r\n", "9112 §7.1.1"),
    _bad_chunks("extension_too_long",
                b"5;" + b"x" * (limits.TRAILER_BYTES_MAX + 1) + b"\r\nhello\r\n" + _LAST,
                "limit TRAILER_BYTES_MAX"),
    _bad_chunks("trailer_bare_feed", b"1\r\nx\r\n0\r\nX: a\nb\r\n\r\n", "9112 §2.2", b"x"),
    _bad_chunks("trailer_too_long",
                b"1\r\nx\r\n0\r\nX: " + b"y" * limits.TRAILER_BYTES_MAX + b"\r\n\r\n",
                "limit TRAILER_BYTES_MAX", b"x"),
)  # fmt: skip
