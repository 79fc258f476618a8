"""Raw HTTP/1.1 in the classes by which proxies fail, each with the verdict that is right and why.

`REQUESTS` are a client's octets: taken as the requests listed, refused with a status, or waited on.
The verdict is the same however the octets are cut. `rule` is the section that decides: RFC 9110
(semantics), RFC 9112 (HTTP/1.1), or a limit. What engines send is in `engine_vectors`.
"""

from __future__ import annotations

from typing import NamedTuple

from proxy.core import limits
from tests.conformance.reader import Taken


class Vector(NamedTuple):
    """`taken` are the requests before `refused`; `waiting`: the last one never becomes whole."""

    name: str
    octets: bytes
    rule: str
    taken: tuple[Taken, ...] = ()
    refused: int = 0
    waiting: bool = False


_PATH = b"/v1/completions"
_LINE = b"POST " + _PATH + b" HTTP/1.1\r\n"
_HOST = b"Host: a\r\n"
_GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
_GOT = Taken(b"GET", b"/livez", b"")
_TE = b"Transfer-Encoding: chunked"
_LAST = b"0\r\n\r\n"


def _posted(body: bytes) -> Taken:
    return Taken(b"POST", _PATH, body)


def _head(*fields: bytes, line: bytes = _LINE, host: bytes = _HOST) -> bytes:
    return line + host + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def _chunked(body: bytes) -> bytes:
    return _head(_TE) + body


def _no(name: str, octets: bytes, rule: str, status: int = 400) -> Vector:
    return Vector(name, octets, rule, refused=status)


def _yes(name: str, octets: bytes, rule: str, *taken: Taken) -> Vector:
    return Vector(name, octets, rule, taken=taken)


_BASE = [
    _yes("base_get", _GET, "9112 §3", _GOT),
    _yes("base_post", _head(b"Content-Length: 5") + b"hello", "9112 §6.2", _posted(b"hello")),
    _yes("base_post_without_body", _head(), "9112 §6.3", _posted(b"")),
    _yes("base_chunked", _chunked(b"5\r\nhello\r\n" + _LAST), "9112 §7.1", _posted(b"hello")),
    _yes("base_two_in_a_row", _GET + _GET, "9112 §9.3.2", _GOT, _GOT),
    _yes(
        "base_chunked_then_get",
        _chunked(b"2\r\nok\r\n" + _LAST) + _GET,
        "9112 §9.3.2",
        _posted(b"ok"),
        _GOT,
    ),
    _yes(
        "base_counted_then_get",
        _head(b"Content-Length: 2") + b"ok" + _GET,
        "9112 §9.3.2",
        _posted(b"ok"),
        _GOT,
    ),
    _yes("base_empty_line_before", b"\r\n" + _GET, "9112 §2.2", _GOT),
    _yes("base_http10_without_host", b"GET /livez HTTP/1.0\r\n\r\n", "9112 §3.2", _GOT),
    _yes(
        "base_names_without_case",
        b"POST " + _PATH + b" HTTP/1.1\r\nhOsT: a\r\nCONTENT-LENGTH: 1\r\n\r\nx",
        "9110 §5.1",
        _posted(b"x"),
    ),
    _yes(
        "base_space_around_value",
        _head(b"Content-Length: \t 2 \t") + b"ok",
        "9112 §5",
        _posted(b"ok"),
    ),
    _yes("base_empty_value", _head(b"X-Empty:"), "9110 §5.5", _posted(b"")),
    _yes("base_high_octets_in_value", _head(b"X-Name: \xc3\xa9\xff"), "9110 §5.5", _posted(b"")),
    _yes(
        "base_expect",
        _head(b"Expect: 100-continue", b"Content-Length: 2") + b"ok",
        "9110 §10.1.1",
        _posted(b"ok"),
    ),
    _yes(
        "base_expect_unknown",
        _head(b"Expect: 200-ok", b"Content-Length: 2") + b"ok",
        "9110 §10.1.1",
        _posted(b"ok"),
    ),
    Vector("base_body_incomplete", _head(b"Content-Length: 5") + b"hell", "9112 §8", waiting=True),
    Vector("base_head_incomplete", _LINE + b"Hos", "9112 §8", waiting=True),
]

_CONFLICT = [
    _no("clte_length_first", _head(b"Content-Length: 5", _TE) + _LAST, "9112 §6.1"),
    _no("clte_coding_first", _head(_TE, b"Content-Length: 5") + _LAST, "9112 §6.1"),
    _no("clte_length_zero", _head(b"Content-Length: 0", _TE) + _LAST, "9112 §6.1"),
    _no("clte_length_invalid", _head(b"Content-Length: x", _TE) + _LAST, "9112 §6.1"),
    _no(
        "clte_smuggled",
        _head(b"Content-Length: 40", _TE) + _LAST + b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n",
        "9112 §6.1",
    ),
    _no("clte_with_identity", _head(b"Content-Length: 1", b"Transfer-Encoding: identity") + b"x",
        "9112 §6.1"),
]  # fmt: skip


def _coding(name: str, *fields: bytes, rule: str = "9112 §6.1") -> Vector:
    return _no("te_" + name, _head(*fields) + _LAST, rule)


_CODING = [
    _yes(
        "te_case",
        _head(b"transfer-encoding: ChUnKeD") + b"1\r\nx\r\n" + _LAST,
        "9112 §7",
        _posted(b"x"),
    ),
    _yes(
        "te_space_around",
        _head(b"Transfer-Encoding: \t chunked \t") + b"1\r\nx\r\n" + _LAST,
        "9112 §5",
        _posted(b"x"),
    ),
    _coding("twice", _TE, _TE),
    _coding("twice_listed", b"Transfer-Encoding: chunked, chunked"),
    _coding("identity", b"Transfer-Encoding: identity"),
    _coding("gzip_chunked", b"Transfer-Encoding: gzip, chunked"),
    _coding("chunked_gzip", b"Transfer-Encoding: chunked, gzip"),
    _coding("gzip", b"Transfer-Encoding: gzip"),
    _coding("empty", b"Transfer-Encoding:"),
    _coding("comma_before", b"Transfer-Encoding: ,chunked"),
    _coding("comma_after", b"Transfer-Encoding: chunked,"),
    _coding("quoted", b'Transfer-Encoding: "chunked"'),
    _coding("parameter", b"Transfer-Encoding: chunked;q=1"),
    _coding("prefix", b"Transfer-Encoding: xchunked"),
    _coding("suffix", b"Transfer-Encoding: chunkedx"),
    _coding("two_words", b"Transfer-Encoding: chunked chunked"),
    _coding("vertical_tab", b"Transfer-Encoding: \x0bchunked", rule="9110 §5.5"),
    _coding("form_feed", b"Transfer-Encoding: chunked\x0c", rule="9110 §5.5"),
    _coding("nul", b"Transfer-Encoding: chunked\x00", rule="9110 §5.5"),
    _coding("no_break_space", b"Transfer-Encoding: \xa0chunked"),
    _coding("space_before_colon", b"Transfer-Encoding : chunked", rule="9112 §5.1"),
    _coding("space_before_name", b"X: y", b" Transfer-Encoding: chunked", rule="9112 §5.2"),
    _coding("folded", b"Transfer-Encoding:", b" chunked", rule="9112 §5.2"),
    _coding("bare_return", b"X: y\rTransfer-Encoding: chunked", rule="9112 §2.2"),
    _coding("bare_feed", b"X: y\nTransfer-Encoding: chunked", rule="9112 §2.2"),
    _coding("two_lines", _TE, b"Transfer-Encoding: identity"),
    _no(
        "te_http10",
        _head(_TE, line=b"POST " + _PATH + b" HTTP/1.0\r\n") + _LAST,
        "9112 §6.1",
    ),
    _yes(
        "te_underscore_is_another_field",
        _head(b"Transfer_Encoding: chunked", b"Content-Length: 2") + b"ok",
        "9110 §5.1",
        _posted(b"ok"),
    ),
]


def _length(name: str, *fields: bytes, rule: str = "9110 §8.6") -> Vector:
    return _no("cl_" + name, _head(*fields) + b"12345", rule)


_LENGTHS = [
    _yes("cl_zero", _head(b"Content-Length: 0") + _GET, "9110 §8.6", _posted(b""), _GOT),
    _yes("cl_leading_zeros", _head(b"Content-Length: 0005") + b"12345", "9110 §8.6",
         _posted(b"12345")),
    _length("plus", b"Content-Length: +5"),
    _length("minus", b"Content-Length: -5"),
    _length("minus_zero", b"Content-Length: -0"),
    _length("hexadecimal", b"Content-Length: 0x5"),
    _length("octal", b"Content-Length: 0o5"),
    _length("underscore", b"Content-Length: 1_0"),
    _length("exponent", b"Content-Length: 5e0"),
    _length("decimal_point", b"Content-Length: 5.0"),
    _length("empty", b"Content-Length:"),
    _length("words", b"Content-Length: five"),
    _length("inner_space", b"Content-Length: 5 5"),
    _length("list_equal", b"Content-Length: 5, 5"),
    _length("list_differing", b"Content-Length: 5, 6"),
    _length("twice_equal", b"Content-Length: 5", b"Content-Length: 5"),
    _length("twice_differing", b"Content-Length: 5", b"Content-Length: 6"),
    _length("twenty_digits", b"Content-Length: 18446744073709551621"),
    _length("superscript_five", b"Content-Length: \xb5"),
    _length("arabic_five", b"Content-Length: \xd9\xa5"),
    _length("quoted", b'Content-Length: "5"'),
    _length("nul", b"Content-Length: 5\x00", rule="9110 §5.5"),
    _length("space_before_colon", b"Content-Length : 5", rule="9112 §5.1"),
    _length("folded", b"Content-Length:", b" 5", rule="9112 §5.2"),
]  # fmt: skip


def _chunk(name: str, body: bytes, rule: str = "9112 §7.1") -> Vector:
    return _no("ch_" + name, _chunked(body), rule)


def _chunk_ok(name: str, body: bytes, payload: bytes, rule: str = "9112 §7.1") -> Vector:
    return _yes("ch_" + name, _chunked(body) + _GET, rule, _posted(payload), _GOT)


_CHUNKS = [
    _chunk_ok("empty", _LAST, b""),
    _chunk_ok("upper_and_lower_digits", b"a\r\n0123456789\r\nA\r\n0123456789\r\n" + _LAST,
              b"0123456789" * 2),
    _chunk_ok("leading_zeros", b"0000000000000005\r\nhello\r\n0000\r\n\r\n", b"hello"),
    _chunk_ok("looks_like_chunks", b"a\r\n0\r\n\r\n5\r\nabc\r\n".replace(b"abc", b"ab") + _LAST,
              b"0\r\n\r\n5\r\nab"),
    _chunk_ok("extension", b"5;name=value\r\nhello\r\n" + _LAST, b"hello", "9112 §7.1.1"),
    _chunk_ok("extension_quoted", b'5;n="a b;c"\r\nhello\r\n0;last\r\n\r\n', b"hello",
              "9112 §7.1.1"),
    _chunk_ok("extension_after_space", b"5 \t;n\r\nhello\r\n" + _LAST, b"hello", "9112 §7.1.1"),
    _chunk_ok("trailer", b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nY:\r\n\r\n", b"hello", "9112 §7.1.2"),
    _chunk_ok("trailer_is_no_framing", b"1\r\nx\r\n0\r\nContent-Length: 99\r\n\r\n", b"x",
              "9112 §7.1.2"),
    _chunk("size_empty", b"\r\nhello\r\n" + _LAST),
    _chunk("size_words", b"five\r\nhello\r\n" + _LAST),
    _chunk("size_minus", b"-5\r\nhello\r\n" + _LAST),
    _chunk("size_plus", b"+5\r\nhello\r\n" + _LAST),
    _chunk("size_prefix_0x", b"0x5\r\nhello\r\n" + _LAST),
    _chunk("size_underscore", b"1_0\r\n" + b"x" * 16 + b"\r\n" + _LAST),
    _chunk("size_space_before", b" 5\r\nhello\r\n" + _LAST),
    _chunk("size_space_after", b"5 \r\nhello\r\n" + _LAST),
    _chunk("size_seventeen_digits", b"00000000000000005\r\nhello\r\n" + _LAST),
    _chunk("size_overflow", b"10000000000000005\r\nhello\r\n" + _LAST),
    _chunk("size_line_bare_feed", b"5\nhello\r\n" + _LAST, "9112 §2.2"),
    _chunk("size_line_bare_return", b"5\rhello\r\n" + _LAST, "9112 §2.2"),
    _chunk("size_line_double_return", b"5\r\r\nhello\r\n" + _LAST, "9112 §2.2"),
    _chunk("data_longer", b"5\r\nhello!\r\n" + _LAST),
    _chunk("data_shorter", b"6\r\nhello\r\n" + _LAST),
    _chunk("data_end_two_octets", b"5\r\nhelloXX0\r\n\r\n"),
    _chunk("data_end_bare_feed", b"5\r\nhello\n" + _LAST, "9112 §2.2"),
    _chunk("data_end_bare_return", b"5\r\nhello\r0\r\n\r\n", "9112 §2.2"),
    _chunk("data_end_missing", b"5\r\nhello" + _LAST),
    _chunk("extension_bare_feed", b"5;a\nb\r\nhello\r\n" + _LAST, "9112 §7.1.1"),
    _chunk("extension_bare_return", b"5;a\rb\r\nhello\r\n" + _LAST, "9112 §7.1.1"),
    _chunk("extension_nul", b"5;a\x00\r\nhello\r\n" + _LAST, "9112 §7.1.1"),
    _chunk("extension_without_semicolon", b"5 n=v\r\nhello\r\n" + _LAST, "9112 §7.1.1"),
    _chunk("extension_too_long",
           b"5;" + b"x" * limits.CHUNK_EXTENSION_BYTES_MAX + b"\r\nhello\r\n" + _LAST,
           "limit CHUNK_EXTENSION_BYTES_MAX"),
    _chunk("last_bare_feeds", b"5\r\nhello\r\n0\n\n", "9112 §2.2"),
    _chunk("trailer_without_colon", b"0\r\nnothing\r\n\r\n", "9112 §7.1.2"),
    _chunk("trailer_without_name", b"0\r\n: v\r\n\r\n", "9112 §7.1.2"),
    _chunk("trailer_space_in_name", b"0\r\nX Y: v\r\n\r\n", "9112 §5.1"),
    _chunk("trailer_folded", b"0\r\nX: v\r\n w\r\n\r\n", "9112 §5.2"),
    _chunk("trailer_bare_feed", b"0\r\nX: v\nY: w\r\n\r\n", "9112 §2.2"),
    _chunk("trailer_nul", b"0\r\nX: \x00\r\n\r\n", "9110 §5.5"),
    _chunk("trailer_too_long", b"0\r\nX: " + b"x" * limits.TRAILER_BYTES_MAX + b"\r\n\r\n",
           "limit TRAILER_BYTES_MAX"),
    _chunk("trailers_too_many", b"0\r\n" + b"X: v\r\n" * 2000 + b"\r\n",
           "limit TRAILER_BYTES_MAX"),
    Vector("ch_last_missing", _chunked(b"5\r\nhello\r\n"), "9112 §8", waiting=True),
    Vector("ch_end_missing", _chunked(b"5\r\nhello\r\n0\r\n"), "9112 §8", waiting=True),
    Vector("ch_size_huge", _chunked(b"ffffffffffffffff\r\nhello"), "9112 §7.1", waiting=True),
]  # fmt: skip


def _field(name: str, field: bytes, rule: str) -> Vector:
    return _no("f_" + name, _head(field), rule)


_FIELDS = [
    _field("without_colon", b"nothing", "9112 §5"),
    _field("without_name", b": value", "9112 §5"),
    _field("space_in_name", b"X Y: value", "9112 §5.1"),
    _field("space_after_name", b"X : value", "9112 §5.1"),
    _field("tab_after_name", b"X\t: value", "9112 §5.1"),
    _field("folded", b"X: a\r\n b", "9112 §5.2"),
    _field("folded_by_tab", b"X: a\r\n\tb", "9112 §5.2"),
    _field("bare_return", b"X: a\rb", "9112 §2.2"),
    _field("bare_feed", b"X: a\nY: b", "9112 §2.2"),
    _field("two_returns", b"X: a\r", "9112 §2.2"),
    _field("nul_in_value", b"X: a\x00b", "9110 §5.5"),
    _field("nul_in_name", b"X\x00Y: a", "9110 §5.1"),
    _field("escape_in_value", b"X: \x1b[2J", "9110 §5.5"),
    _field("delete_in_value", b"X: \x7f", "9110 §5.5"),
    _field("high_octet_in_name", b"X\xe9: a", "9110 §5.1"),
    _field("delimiter_in_name", b"X(Y): a", "9110 §5.1"),
    _no("f_first_line_folded", _LINE + b" X: a\r\n" + _HOST + b"\r\n", "9112 §2.2"),
    _no("f_feeds_only", _LINE.replace(b"\r", b"") + b"Host: a\n\n", "9112 §2.2"),
    _field("authorization_twice", b"Authorization: Bearer a\r\nAuthorization: Bearer b",
           "9110 §11.6.2"),
    _field("content_type_twice", b"Content-Type: a/b\r\nContent-Type: c/d", "9110 §8.3"),
    _field("expect_twice", b"Expect: 100-continue\r\nExpect: 100-continue", "9110 §5.3"),
]  # fmt: skip


def _hosted(name: str, fields: bytes, rule: str = "9112 §3.2") -> Vector:
    return _no("host_" + name, _head(host=fields), rule)


_HOSTS = [
    _hosted("missing", b""),
    _hosted("twice", b"Host: a\r\nHost: b\r\n"),
    _hosted("twice_equal", b"Host: a\r\nHost: a\r\n"),
    _hosted("empty", b"Host:\r\n"),
    _hosted("userinfo", b"Host: user@a\r\n", "9110 §4.2.4"),
    _hosted("path", b"Host: a/b\r\n"),
    _hosted("two_words", b"Host: a b\r\n"),
    _hosted("list", b'Host: a, "b"\r\n'),
    _hosted("port_words", b"Host: a:http\r\n"),
    _hosted("two_ports", b"Host: a:1:2\r\n"),
    _hosted("bracket_open", b"Host: [::1\r\n"),
    _hosted("folded", b"Host:\r\n a\r\n", "9112 §5.2"),
    _no("host_twice_http10",
        _head(line=b"GET / HTTP/1.0\r\n", host=b"Host: a\r\nHost: b\r\n"), "9112 §3.2"),
    _yes("host_port", _head(host=b"Host: a.example:8000\r\n"), "9110 §7.2", _posted(b"")),
    _yes("host_ipv6", _head(host=b"Host: [::1]:8000\r\n"), "9110 §7.2", _posted(b"")),
]  # fmt: skip


def _hop(name: str, field: bytes) -> Vector:
    return _no("hop_" + name, _head(field), "9110 §7.6.1")


_HOPS = [
    _hop("names_host", b"Connection: host"),
    _hop("names_length", b"Connection: close, Content-Length"),
    _hop("names_coding", b"Connection: transfer-encoding"),
    _hop("names_authorization", b"Connection: X-A,Authorization"),
    _hop("names_type_on_second_line", b"Connection: x\r\nConnection: Content-Type"),
    _yes("hop_upgrade_ignored", _head(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c"),
         "9110 §7.8", _posted(b"")),
    _yes("hop_empty_list", _head(b"Connection: ,,"), "9110 §5.6.1", _posted(b"")),
    _yes("hop_te", _head(b"Connection: TE", b"TE: trailers"), "9110 §10.1.4", _posted(b"")),
]  # fmt: skip


def _line(name: str, line: bytes, rule: str = "9112 §3", status: int = 400) -> Vector:
    return _no("rl_" + name, line + b"\r\n" + _HOST + b"\r\n", rule, status)


def _target(name: str, target: bytes, understood: bytes, rule: str = "9112 §3.2") -> Vector:
    line = b"GET " + target + b" HTTP/1.1\r\n"
    return _yes("rl_" + name, _head(line=line), rule, Taken(b"GET", understood, b""))


_LINES = [
    _target("query", b"/v1/models?a=b&c=?/", b"/v1/models?a=b&c=?/"),
    _target("query_empty", b"/?", b"/?"),
    _target("as_it_came", b"/%2e%2e/A;x=1//./..", b"/%2e%2e/A;x=1//./..", "9110 §7.1"),
    _target("absolute", b"http://other.example/v1/models?x", b"/v1/models?x", "9112 §3.2.2"),
    _target("absolute_port", b"HTTPS://other.example:1/x", b"/x", "9112 §3.2.2"),
    _target("absolute_ipv6", b"http://[::1]:80/x", b"/x", "9112 §3.2.2"),
    _target("absolute_without_path", b"http://other.example", b"/", "9112 §3.2.2"),
    _target("absolute_query_only", b"http://other.example?x", b"/?x", "9112 §3.2.2"),
    _yes("rl_asterisk", _head(line=b"OPTIONS * HTTP/1.1\r\n"), "9112 §3.2.4",
         Taken(b"OPTIONS", b"*", b"")),
    _line("asterisk_of_get", b"GET * HTTP/1.1", "9112 §3.2.4"),
    _line("absolute_userinfo", b"GET http://a@b/ HTTP/1.1", "9110 §4.2.4"),
    _line("absolute_without_host", b"GET http:///x HTTP/1.1", "9110 §4.2.1"),
    _line("absolute_other_scheme", b"GET ftp://a/x HTTP/1.1", "9112 §3.2.2"),
    _line("absolute_file", b"GET file:///etc/passwd HTTP/1.1", "9112 §3.2.2"),
    _line("authority", b"GET a:80 HTTP/1.1", "9112 §3.2.3"),
    _line("at_host", b"GET @a/x HTTP/1.1", "9112 §3.2"),
    _line("fragment", b"GET /x#y HTTP/1.1", "9112 §3.2"),
    _line("connect", b"CONNECT a:443 HTTP/1.1", "9110 §9.3.6", 501),
    _line("trace", b"TRACE / HTTP/1.1", "9110 §9.3.8", 501),
    _line("two_spaces", b"GET  / HTTP/1.1"),
    _line("two_spaces_before_version", b"GET /  HTTP/1.1"),
    _line("tab", b"GET\t/\tHTTP/1.1"),
    _line("space_before", b" GET / HTTP/1.1"),
    _line("space_after", b"GET / HTTP/1.1 "),
    _line("space_in_target", b"GET /a b HTTP/1.1"),
    _line("high_octet_in_target", b"GET /\xc3\xa9 HTTP/1.1"),
    _line("nul_in_target", b"GET /\x00 HTTP/1.1"),
    _line("without_target", b"GET HTTP/1.1"),
    _line("without_version", b"GET /"),
    _line("version_lower", b"GET / http/1.1", "9112 §2.3"),
    _line("version_one_number", b"GET / HTTP/1", "9112 §2.3"),
    _line("version_two_digits", b"GET / HTTP/1.10", "9112 §2.3"),
    _line("version_0_9", b"GET / HTTP/0.9", "9110 §15.6.6", 505),
    _line("version_1_2", b"GET / HTTP/1.2", "9110 §15.6.6", 505),
    _line("version_2_0", b"GET / HTTP/2.0", "9110 §15.6.6", 505),
    _line("method_lower", b"get / HTTP/1.1", "9110 §9.1"),
    _line("method_long", b"A" * 21 + b" / HTTP/1.1", "9110 §9.1"),
    _line("method_delimiter", b"G(T / HTTP/1.1", "9110 §9.1"),
    _no("rl_empty_lines_before", b"\r\n\r\n" + _GET, "9112 §2.2"),
    _no("rl_feed_before", b"\n" + _GET, "9112 §2.2"),
    _no("rl_http2_preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "9113 §3.4", 505),
    _no("rl_tls_hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "9112 §3"),
    _no("rl_garbage", b"\x00\xff\r\n\r\n", "9112 §3"),
    Vector("rl_second_is_garbage", _GET + b"garbage\r\n\r\n", "9112 §3", taken=(_GOT,),
           refused=400),
    Vector("rl_surplus_after_body", _head(b"Content-Length: 2") + b"ok!!" + _GET, "9112 §6.3",
           taken=(_posted(b"ok"),), refused=400),
]  # fmt: skip

_LIMITS = [
    _no("lim_target", _head(line=b"GET /" + b"x" * limits.TARGET_BYTES_MAX + b" HTTP/1.1\r\n"),
        "limit TARGET_BYTES_MAX", 414),
    _no("lim_target_without_end", b"GET /" + b"x" * (limits.TARGET_BYTES_MAX + 100),
        "limit TARGET_BYTES_MAX", 414),
    _yes("lim_target_just_fits",
         _head(line=b"GET /" + b"x" * (limits.TARGET_BYTES_MAX - 1) + b" HTTP/1.1\r\n"),
         "limit TARGET_BYTES_MAX",
         Taken(b"GET", b"/" + b"x" * (limits.TARGET_BYTES_MAX - 1), b"")),
    _no("lim_fields", _head(*[b"X: y"] * limits.FIELDS_MAX), "limit FIELDS_MAX", 431),
    _yes("lim_fields_just_fit", _head(*[b"X: y"] * (limits.FIELDS_MAX - 1)), "limit FIELDS_MAX",
         _posted(b"")),
    _no("lim_field", _head(b"X: " + b"y" * limits.HEAD_BYTES_MAX), "limit HEAD_BYTES_MAX", 431),
    _no("lim_head_without_end", _LINE + b"X: " + b"y" * limits.HEAD_BYTES_MAX,
        "limit HEAD_BYTES_MAX", 431),
    _yes("lim_head_just_fits",
         _head(b"X: " + b"y" * (limits.HEAD_BYTES_MAX - len(_LINE) - len(_HOST) - 3)),
         "limit HEAD_BYTES_MAX", _posted(b"")),
]  # fmt: skip

REQUESTS: tuple[Vector, ...] = (
    *_BASE, *_CONFLICT, *_CODING, *_LENGTHS, *_CHUNKS, *_FIELDS, *_HOSTS, *_HOPS, *_LINES, *_LIMITS,
)  # fmt: skip
