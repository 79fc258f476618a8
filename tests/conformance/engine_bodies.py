"""Engine vectors: how an answer's body ends, and what comes after its end.

A bad answer is never the client's fault and never the next client's answer: it fails, or what
follows its end condemns the connection.
"""

from __future__ import annotations

from proxy.core import limits
from tests.conformance.vector import HIDDEN, LAST, EngineVector

OK = b"HTTP/1.1 200 OK\r\n"
COUNTED = OK + b"Content-Length: 5\r\n\r\n"
STREAM = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SECOND = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON"


def _whole(name: str, octets: bytes, rule: str, payload: bytes = b"", status: int = 200) -> (
    EngineVector
):  # fmt: skip
    return EngineVector("r_" + name, octets, rule, status, payload, ended=True)


def _more(name: str, octets: bytes, surplus: bytes, payload: bytes = b"hello", status: int = 200,
          rule: str = "9112 §6.3") -> EngineVector:  # fmt: skip
    return EngineVector("r_" + name, octets + surplus, rule, status, payload, True, surplus)


def _cut(name: str, octets: bytes, payload: bytes = b"", status: int = 200) -> EngineVector:
    return EngineVector("r_cut_" + name, octets, "9112 §8", status, payload)


def _bad(name: str, body: bytes, rule: str = "9112 §7.1", payload: bytes = b"") -> EngineVector:
    return EngineVector("r_chunk_" + name, STREAM + body, rule, payload=payload, failed=True)


def _chunks(name: str, body: bytes, payload: bytes = b"hello", rule: str = "9112 §7.1") -> (
    EngineVector
):  # fmt: skip
    return _whole("chunk_" + name, STREAM + body, rule, payload)


RIGHT = [
    _whole("counted", COUNTED + b"hello", "9112 §6.2", b"hello"),
    _whole("counted_zero", OK + b"Content-Length: 0\r\n\r\n", "9112 §6.2"),
    _whole("counted_holds_an_answer", OK + b"Content-Length: %d\r\n\r\n" % len(SECOND) + SECOND,
           "9112 §6.2", SECOND),
    _whole("counted_nuls", OK + b"Content-Length: 5\r\n\r\n\x00\r\n\r\n", "9112 §6.2",
           b"\x00\r\n\r\n"),
    _whole("chunked", STREAM + b"5\r\nhello\r\n" + LAST, "9112 §7.1", b"hello"),
    _whole("chunked_case", OK + b"transfer-encoding: CHUNKED\r\n\r\n5\r\nhello\r\n" + LAST,
           "9112 §7", b"hello"),
    _whole("chunked_nothing", STREAM + LAST, "9112 §7.1"),
    EngineVector("r_until_close", OK + b"\r\nhello", "9112 §6.3", payload=b"hello"),
    EngineVector("r_until_close_http10", b"HTTP/1.0 200 OK\r\n\r\nhello", "9112 §6.3",
                 payload=b"hello"),
    EngineVector("r_until_close_named", OK + b"Connection: close\r\n\r\nhello" + HIDDEN,
                 "9112 §6.3", payload=b"hello" + HIDDEN),
    _whole("http10_counted", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", "9112 §9.3",
           b"hello"),
    _whole("closes_after", OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
           "9112 §9.6", b"hello"),
    _whole("without_reason", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", "9112 §4"),
    _whole("reason_empty", b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", "9112 §4"),
    _whole("reason_high_octets", b"HTTP/1.1 200 \xc3\xa9\tb\r\nContent-Length: 0\r\n\r\n",
           "9112 §4"),
    _whole("continue_first", b"HTTP/1.1 100 Continue\r\n\r\n" + COUNTED + b"hello", "9110 §15.2",
           b"hello"),
    _whole("hints_first", b"HTTP/1.1 103 Hints\r\nLink: POISON\r\n\r\n" + COUNTED + b"hello",
           "9110 §15.2", b"hello"),
    _whole("informational_of_all_kinds", b"HTTP/1.1 100 C\r\n\r\n"
           b"HTTP/1.1 102 P\r\nX: POISON\r\n\r\nHTTP/1.1 199 Q\r\n\r\n" + COUNTED + b"hello",
           "9110 §15.2", b"hello"),
    _whole("informational_just_few",
           b"HTTP/1.1 100 C\r\n\r\n" * limits.INFORMATIONAL_RESPONSES_MAX + COUNTED + b"hello",
           "limit INFORMATIONAL_RESPONSES_MAX", b"hello"),
    _whole("length_twice_equal", OK + b"Content-Length: 5\r\n" * 2 + b"\r\nhello", "9110 §8.6",
           b"hello"),
    _whole("length_leading_zeros", OK + b"Content-Length: 0005\r\n\r\nhello", "9110 §8.6",
           b"hello"),
    _whole("no_content_with_length", b"HTTP/1.1 204 N\r\nContent-Length: 5\r\n\r\n",
           "9110 §15.3.5", status=204),
    _whole("no_content_chunked", b"HTTP/1.1 204 N\r\nTransfer-Encoding: chunked\r\n\r\n",
           "9112 §6.3", status=204),
    _chunks("extension", b"5;x=POISON\r\nhello\r\n0;z\r\n\r\n", rule="9112 §7.1.1"),
    _chunks("trailer", b"5\r\nhello\r\n0\r\nX: POISON\r\n\r\n", rule="9112 §7.1.2"),
    _chunks("trailer_framing", b"5\r\nhello\r\n0\r\nContent-Length: 99\r\n\r\n",
            rule="9112 §7.1.2"),
    _chunks("trailer_cookie", b"5\r\nhello\r\n0\r\nSet-Cookie: POISON\r\n\r\n",
            rule="9110 §6.5.1"),
    _chunks("leading_zeros", b"0000000000000005\r\nhello\r\n0000\r\n\r\n"),
    _chunks("looks_like_the_last", b"5\r\n0\r\n\r\n\r\n" + LAST, b"0\r\n\r\n"),
    _chunks("of_one_octet", b"1\r\nx\r\n" * 30 + LAST, b"x" * 30),
    _chunks("holds_an_answer", b"%x\r\n%b\r\n" % (len(SECOND), SECOND) + LAST, SECOND),
]  # fmt: skip

# What comes after the end would be the next client's answer.
SURPLUS = [
    _more("extra", COUNTED + b"hello", SECOND),
    _more("extra_half_an_answer", COUNTED + b"hello", b"HTTP/1.1 200 OK\r\nX: POISON"),
    _more("extra_line_end", COUNTED + b"hello", b"\r\n"),
    _more("extra_octet", COUNTED + b"hello", b"P"),
    _more("extra_nul", COUNTED + b"hello", b"\x00"),
    _more("extra_informational", COUNTED + b"hello", b"HTTP/1.1 100 C\r\nX: POISON\r\n\r\n"),
    _more("extra_after_nothing", OK + b"Content-Length: 0\r\n\r\n", b"POISON", b""),
    _more("extra_after_chunks", STREAM + b"1\r\nx\r\n" + LAST, b"POISON", b"x"),
    _more("extra_answer_after_chunks", STREAM + b"1\r\nx\r\n" + LAST, SECOND, b"x"),
    _more("extra_last_chunk", STREAM + b"1\r\nx\r\n" + LAST, LAST, b"x"),
    _more("extra_after_trailers", STREAM + b"1\r\nx\r\n0\r\nX: y\r\n\r\n", SECOND, b"x"),
    _more("no_content_with_body", b"HTTP/1.1 204 N\r\nContent-Length: 6\r\n\r\n", b"POISON",
          b"", 204, "9110 §15.3.5"),
    _more("no_content_with_chunks", b"HTTP/1.1 204 N\r\nTransfer-Encoding: chunked\r\n\r\n",
          b"6\r\nPOISON\r\n" + LAST, b"", 204, "9110 §15.3.5"),
    _more("no_content_then_an_answer", b"HTTP/1.1 204 N\r\n\r\n", SECOND, b"", 204,
          "9110 §15.3.5"),
    _more("not_modified_with_body", b"HTTP/1.1 304 N\r\nTransfer-Encoding: chunked\r\n\r\n", LAST,
          b"", 304, "9110 §15.4.5"),
    _more("not_modified_with_counted_body", b"HTTP/1.1 304 N\r\nContent-Length: 6\r\n\r\n",
          b"POISON", b"", 304, "9110 §15.4.5"),
    _more("extra_after_a_longer_body", OK + b"Content-Length: 3\r\n\r\nhel", b"loPOISON", b"hel"),
]  # fmt: skip

# A cut must look cut: no end is written that the engine did not send.
CUTS = [
    _cut("counted", COUNTED + b"hell", b"hell"),
    _cut("counted_before_any", COUNTED),
    _cut("counted_huge", OK + b"Content-Length: 9999999999999999999\r\n\r\nhello", b"hello"),
    _cut("http10_counted", b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nhello", b"hello"),
    _cut("before_any_chunk", STREAM),
    _cut("in_chunk", STREAM + b"5\r\nhel", b"hel"),
    _cut("in_size_line", STREAM + b"5\r\nhello\r\n5", b"hello"),
    _cut("in_size_line_end", STREAM + b"5\r\nhello\r\n5\r", b"hello"),
    _cut("in_extension", STREAM + b"5\r\nhello\r\n5;a", b"hello"),
    _cut("in_data_line_end", STREAM + b"5\r\nhello\r", b"hello"),
    _cut("between_chunks", STREAM + b"5\r\nhello\r\n", b"hello"),
    _cut("before_last_line_end", STREAM + b"5\r\nhello\r\n0\r\n", b"hello"),
    _cut("in_last_line_end", STREAM + b"5\r\nhello\r\n0\r\n\r", b"hello"),
    _cut("in_trailer", STREAM + b"5\r\nhello\r\n0\r\nX: POISON", b"hello"),
    _cut("after_trailer", STREAM + b"5\r\nhello\r\n0\r\nX: POISON\r\n", b"hello"),
    _cut("chunk_huge", STREAM + b"ffffffffffffffff\r\nhello", b"hello"),
    _cut("in_head", b"HTTP/1.1 200 OK\r\nContent-Le", status=0),
    _cut("in_status_line", b"HTTP/1.1 2", status=0),
    _cut("before_head_end", OK + b"Content-Length: 6\r\nX: POISON\r\n", status=0),
    _cut("after_informational", b"HTTP/1.1 100 C\r\n\r\n", status=0),
    EngineVector("r_nothing", b"", "9112 §8", status=0),
]

BAD = [
    _bad("size_bad", b"zz\r\nhello\r\n"),
    _bad("size_empty", b"\r\nhello\r\n"),
    _bad("size_signed", b"+5\r\nhello\r\n"),
    _bad("size_minus", b"-5\r\nhello\r\n"),
    _bad("size_prefix_0x", b"0x5\r\nhello\r\n"),
    _bad("size_space_before", b" 5\r\nhello\r\n"),
    _bad("size_space_after", b"5 \r\nhello\r\n"),
    _bad("size_overflow", b"10000000000000005\r\nhello\r\n"),
    _bad("size_line_bare_feed", b"5\nhello\r\n", "9112 §2.2"),
    _bad("size_line_bare_return", b"5\rhello\r\n", "9112 §2.2"),
    _bad("longer", b"5\r\nhello!\r\n" + LAST, payload=b"hello"),
    _bad("shorter", b"6\r\nhello\r\n" + LAST, payload=b"hello\r"),
    _bad("end_bare_feed", b"5\r\nhello\n" + LAST, payload=b"hello"),
    _bad("end_bare_return", b"5\r\nhello\r" + LAST, payload=b"hello"),
    _bad("end_swapped", b"5\r\nhello\n\r" + LAST, payload=b"hello"),
    _bad("end_two_octets", b"5\r\nhelloXX" + LAST, payload=b"hello"),
    _bad("end_missing", b"5\r\nhello" + LAST, payload=b"hello"),
    _bad("second_bad", b"5\r\nhello\r\nxyz\r\n", payload=b"hello"),
    _bad("last_minus_zero", b"5\r\nhello\r\n-0\r\n\r\n", payload=b"hello"),
    _bad("last_bare_feeds", b"5\r\nhello\r\n0\n\n", "9112 §2.2", b"hello"),
    _bad("an_answer_instead", b"5\r\nhello\r\n" + SECOND, payload=b"hello"),
    _bad("event_instead", b'data: {"POISON":1}\n\n'),
    _bad("extension_nul", b"5;\x00\r\nhello\r\n", "9112 §7.1.1"),
    _bad("extension_bare_feed", b"5;a\nhello\r\n" + LAST, "9112 §7.1.1"),
    _bad("extension_bare_return", b"5;a\rb\r\nhello\r\n" + LAST, "9112 §7.1.1"),
    _bad("extension_too_long",
         b"5;" + b"x" * (limits.TRAILER_BYTES_MAX + 1) + b"\r\nhello\r\n" + LAST,
         "limit TRAILER_BYTES_MAX"),
    _bad("trailer_bare_feed", b"1\r\nx\r\n0\r\nX: a\nb\r\n\r\n", "9112 §2.2", b"x"),
    _bad("trailers_without_end", b"1\r\nx\r\n0\r\n" + b"X: y\r\n" * 2000,
         "limit TRAILER_BYTES_MAX", b"x"),
    _bad("trailer_without_colon", b"1\r\nx\r\n0\r\nnothing\r\n\r\n", "9112 §5", b"x"),
    _bad("trailer_is_a_chunk", b"1\r\nx\r\n0\r\n5\r\nhello\r\n" + LAST, "9112 §7.1.2", b"x"),
    _bad("trailer_space_in_name", b"1\r\nx\r\n0\r\nX Y: v\r\n\r\n", "9112 §5.1", b"x"),
    _bad("trailer_folded", b"1\r\nx\r\n0\r\nX: v\r\n w\r\n\r\n", "9112 §5.2", b"x"),
    _bad("trailer_nul", b"1\r\nx\r\n0\r\nX: a\x00\r\n\r\n", "9110 §5.5", b"x"),
    _bad("trailer_too_long", b"1\r\nx\r\n0\r\nX: " + b"y" * limits.TRAILER_BYTES_MAX + b"\r\n\r\n",
         "limit TRAILER_BYTES_MAX", b"x"),
]  # fmt: skip
