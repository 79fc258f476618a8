"""Engine vectors: heads that cannot be understood, and what heads may not pass on."""

from __future__ import annotations

from proxy.core import limits
from tests.conformance.engine_bodies import COUNTED, OK, SECOND
from tests.conformance.vector import LAST, EngineVector


def _bad(name: str, octets: bytes, rule: str) -> EngineVector:
    return EngineVector("r_" + name, octets, rule, status=0, failed=True)


def _framed(name: str, *fields: bytes, rule: str = "9110 §8.6") -> EngineVector:
    lines = b"".join(field + b"\r\n" for field in fields)
    return _bad(name, OK + lines + b"\r\nPOISON", rule)


def _line(name: str, line: bytes, rule: str = "9112 §4") -> EngineVector:
    return _bad(name, line + b"\r\nContent-Length: 6\r\n\r\nPOISON", rule)


def _field(name: str, field: bytes, rule: str) -> EngineVector:
    return _bad(name, OK + field + b"\r\nContent-Length: 6\r\n\r\nPOISON", rule)


def _hop(name: str, *fields: bytes) -> EngineVector:
    lines = b"".join(field + b"\r\n" for field in fields)
    return EngineVector("r_hop_" + name, OK + lines + b"Content-Length: 5\r\n\r\nhello",
                        "9110 §7.6.1", payload=b"hello", ended=True)  # fmt: skip


FRAMING = [
    _framed("length_and_coding", b"Content-Length: 5", b"Transfer-Encoding: chunked",
            rule="9112 §6.3"),
    _framed("coding_and_length", b"Transfer-Encoding: chunked", b"Content-Length: 5",
            rule="9112 §6.3"),
    _framed("length_differing", b"Content-Length: 5", b"Content-Length: 6"),
    _framed("length_thrice", b"Content-Length: 5", b"Content-Length: 5", b"Content-Length: 6"),
    _framed("length_list", b"Content-Length: 5, 5"),
    _framed("length_list_differing", b"Content-Length: 5, 6"),
    _framed("length_bad", b"Content-Length: 5x"),
    _framed("length_negative", b"Content-Length: -5"),
    _framed("length_plus", b"Content-Length: +5"),
    _framed("length_hexadecimal", b"Content-Length: 0x5"),
    _framed("length_empty", b"Content-Length:"),
    _framed("length_twenty_digits", b"Content-Length: 18446744073709551621"),
    _framed("length_other_digits", b"Content-Length: \xd9\xa5"),
    _framed("coding_unknown", b"Transfer-Encoding: gzip", rule="9112 §6.1"),
    _framed("coding_empty", b"Transfer-Encoding:", rule="9112 §6.1"),
    _framed("coding_identity", b"Transfer-Encoding: identity", rule="9112 §6.1"),
    _framed("coding_listed_twice", b"Transfer-Encoding: chunked, chunked", rule="9112 §6.1"),
    _framed("coding_gzip_chunked", b"Transfer-Encoding: gzip, chunked", rule="9112 §6.1"),
    _framed("coding_quoted", b'Transfer-Encoding: "chunked"', rule="9112 §6.1"),
    _framed("coding_vertical_tab", b"Transfer-Encoding: \x0bchunked", rule="9110 §5.5"),
    _bad("coding_twice", OK + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n" + LAST,
         "9112 §6.1"),
]  # fmt: skip

LINES = [
    _bad("garbage", b"garbage\r\n\r\n", "9112 §4"),
    _bad("garbage_octets", b"\x00\x01\xff\r\n\r\n", "9112 §4"),
    _bad("version_0_9", b"<html>POISON</html>\r\n\r\n", "9112 §2.3"),
    _bad("only_a_body", b'{"POISON":1}\r\n\r\n', "9112 §2.3"),
    _bad("a_request", b"GET /v1/models?POISON HTTP/1.1\r\nHost: a\r\n\r\n", "9112 §4"),
    _bad("empty_line_first", b"\r\n" + SECOND, "9112 §4"),
    _bad("body_without_head", b"5\r\nhello\r\n0\r\n\r\n", "9112 §4"),
    _line("version_2", b"HTTP/2.0 200 OK", "9112 §2.3"),
    _line("version_3", b"HTTP/3 200 OK", "9112 §2.3"),
    _line("version_1_2", b"HTTP/1.2 200 OK", "9112 §2.3"),
    _line("version_lower", b"http/1.1 200 OK", "9112 §2.3"),
    _line("protocol_other", b"ICY 200 OK", "9112 §2.3"),
    _line("status_missing", b"HTTP/1.1"),
    _line("status_words", b"HTTP/1.1 OK"),
    _line("status_two_digits", b"HTTP/1.1 20 OK"),
    _line("status_four_digits", b"HTTP/1.1 2000 OK"),
    _line("status_600", b"HTTP/1.1 600 OK", "9110 §15"),
    _line("status_099", b"HTTP/1.1 099 OK", "9110 §15"),
    _line("status_minus", b"HTTP/1.1 -200 OK"),
    _line("status_other_digits", b"HTTP/1.1 20\xb2 OK"),
    _line("status_joined", b"HTTP/1.1 200OK"),
    _line("status_two_spaces", b"HTTP/1.1  200 OK"),
    _line("status_after_tab", b"HTTP/1.1\t200\tOK"),
    _line("space_before_line", b" HTTP/1.1 200 OK"),
    _line("nul_in_reason", b"HTTP/1.1 200 O\x00K"),
    _line("return_in_reason", b"HTTP/1.1 200 O\rX: POISON", "9112 §2.2"),
    _line("feed_in_reason", b"HTTP/1.1 200 O\nX: POISON", "9112 §2.2"),
    EngineVector("r_feeds_only", SECOND.replace(b"\r\n", b"\n"), "9112 §2.2", status=0),
    _bad("switching_protocols", b"HTTP/1.1 101 Up\r\nUpgrade: h2c\r\n\r\nPOISON", "9110 §15.2.2"),
    _bad("switching_after_continue",
         b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 101 Up\r\nUpgrade: websocket\r\n\r\n", "9110 §15.2.2"),
    _bad("informational_with_body", b"HTTP/1.1 100 C\r\nContent-Length: 6\r\n\r\nPOISON\r\n\r\n",
         "9110 §15.2"),
    _bad("informational_without_end",
         b"HTTP/1.1 100 C\r\n\r\n" * (limits.INFORMATIONAL_RESPONSES_MAX + 1),
         "limit INFORMATIONAL_RESPONSES_MAX"),
    _bad("informational_flood", b"HTTP/1.1 103 C\r\nX: POISON\r\n\r\n" * 200 + SECOND,
         "limit INFORMATIONAL_RESPONSES_MAX"),
]  # fmt: skip

FIELDS = [
    _field("nul_in_value", b"X: a\x00POISON", "9110 §5.5"),
    _field("return_in_value", b"X: a\rSet-Cookie: POISON", "9112 §2.2"),
    _field("feed_in_value", b"X: a\nSet-Cookie: POISON", "9112 §2.2"),
    _field("two_returns", b"X: a\r", "9112 §2.2"),
    _field("escape_in_value", b"X: \x1b[2J", "9110 §5.5"),
    _field("delete_in_value", b"X: \x7f", "9110 §5.5"),
    _field("folded", b"X: a\r\n POISON", "9112 §5.2"),
    _field("folded_by_tab", b"X: a\r\n\tPOISON", "9112 §5.2"),
    _field("folded_first", b" X: POISON", "9112 §5.2"),
    _field("space_before_colon", b"Content-Type : POISON", "9112 §5.1"),
    _field("space_in_name", b"X Y: POISON", "9112 §5.1"),
    _field("nul_in_name", b"X\x00: POISON", "9110 §5.1"),
    _field("high_octet_in_name", b"X\xe9: POISON", "9110 §5.1"),
    _field("without_name", b": POISON", "9112 §5"),
    _field("without_colon", b"POISON", "9112 §5"),
    _field("content_type_twice", b"Content-Type: a/b\r\nContent-Type: c/d", "9110 §8.3"),
    _bad("fields_too_many", OK + b"X: y\r\n" * (limits.FIELDS_MAX + 1) + b"\r\n",
         "limit FIELDS_MAX"),
    _bad("head_too_large", OK + b"X: " + b"y" * limits.RESPONSE_HEAD_BYTES_MAX + b"\r\n\r\n",
         "limit RESPONSE_HEAD_BYTES_MAX"),
    _bad("head_without_end", OK + b"X: " + b"y" * limits.RESPONSE_HEAD_BYTES_MAX,
         "limit RESPONSE_HEAD_BYTES_MAX"),
    EngineVector("r_fields_just_few", OK + b"X: y\r\n" * (limits.FIELDS_MAX - 1)
                 + b"Content-Length: 5\r\n\r\nhello", "limit FIELDS_MAX", payload=b"hello",
                 ended=True),
    EngineVector("r_cookies", OK + b"Set-Cookie: a\r\nSet-Cookie: b\r\n" + COUNTED[len(OK):]
                 + b"hello", "9110 §5.3", payload=b"hello", ended=True),
]  # fmt: skip

HOPS = [
    _hop("named", b"Connection: X-Mine", b"X-Mine: HOPVALUE"),
    _hop("named_later", b"X-Mine: HOPVALUE", b"Connection: keep-alive, x-MINE"),
    _hop("named_on_two_lines", b"Connection: X-A", b"Connection: X-B", b"X-A: HOPVALUE",
         b"X-B: HOPVALUE"),
    _hop("standard_ones", b"Keep-Alive: HOPVALUE", b"Proxy-Connection: HOPVALUE",
         b"Proxy-Authenticate: HOPVALUE", b"TE: HOPVALUE", b"Trailer: HOPVALUE",
         b"Upgrade: HOPVALUE"),
    _hop("names_the_length", b"Connection: Content-Length"),
    _hop("names_the_coding", b"Connection: Transfer-Encoding"),
]  # fmt: skip
