"""Client vectors: request lines, targets that aim elsewhere, other protocols, limits."""

from __future__ import annotations

from proxy.core import limits
from tests.conformance.reader import Taken
from tests.conformance.vector import (
    GET,
    GOT,
    HOST,
    LINE,
    PATH,
    Vector,
    head,
    no,
    posted,
    yes,
)


def _line(name: str, line: bytes, rule: str = "9112 §3", status: int = 400) -> Vector:
    return no("rl_" + name, line + b"\r\n" + HOST + b"\r\n", rule, status)


def _target(name: str, target: bytes, understood: bytes, rule: str = "9112 §3.2") -> Vector:
    line = b"GET " + target + b" HTTP/1.1\r\n"
    return yes("rl_" + name, head(line=line), rule, Taken(b"GET", understood, b""))


LINES = [
    _target("query", b"/v1/models?a=b&c=?/", b"/v1/models?a=b&c=?/"),
    _target("query_empty", b"/?", b"/?"),
    _target("as_it_came", b"/%2e%2e/A;x=1//./..", b"/%2e%2e/A;x=1//./..", "9110 §7.1"),
    _target("absolute", b"http://other.example/v1/models?x", b"/v1/models?x", "9112 §3.2.2"),
    _target("absolute_port", b"HTTPS://other.example:1/x", b"/x", "9112 §3.2.2"),
    _target("absolute_ipv6", b"http://[::1]:80/x", b"/x", "9112 §3.2.2"),
    _target("absolute_without_path", b"http://other.example", b"/", "9112 §3.2.2"),
    _target("absolute_query_only", b"http://other.example?x", b"/?x", "9112 §3.2.2"),
    yes("rl_asterisk", head(line=b"OPTIONS * HTTP/1.1\r\n"), "9112 §3.2.4",
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
    no("rl_empty_lines_before", b"\r\n\r\n" + GET, "9112 §2.2"),
    no("rl_feed_before", b"\n" + GET, "9112 §2.2"),
    no("rl_http2_preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "9113 §3.4", 505),
    no("rl_tls_hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "9112 §3"),
    no("rl_garbage", b"\x00\xff\r\n\r\n", "9112 §3"),
    Vector("rl_second_is_garbage", GET + b"garbage\r\n\r\n", "9112 §3", taken=(GOT,),
           refused=400),
    Vector("rl_surplus_after_body", head(b"Content-Length: 2") + b"ok!!" + GET, "9112 §6.3",
           taken=(posted(b"ok"),), refused=400),
    _line("form_feed", b"GET\x0c/\x0cHTTP/1.1"),
    _line("vertical_tab", b"GET /\x0bHTTP/1.1"),
    _line("no_break_space", b"GET\xa0/\xa0HTTP/1.1"),
    _line("bare_return_in_target", b"GET /\r HTTP/1.1", "9112 §2.2"),
    _line("bare_feed_in_target", b"GET /\nX: HTTP/1.1", "9112 §2.2"),
    _line("delete_in_target", b"GET /\x7f HTTP/1.1"),
    _line("without_method", b"/livez HTTP/1.1"),
    _line("nul_in_method", b"GE\x00T / HTTP/1.1"),
    _line("method_digit", b"G3T / HTTP/1.1", "9110 §9.1"),
    _line("connect_path", b"CONNECT /v1/models HTTP/1.1", "9110 §9.3.6", 501),
    _line("connect_http10", b"CONNECT a:443 HTTP/1.0", "9110 §9.3.6", 501),
    _line("connect_lower", b"connect a:443 HTTP/1.1", "9110 §9.1"),
    _line("trace_path", b"TRACE /v1/models HTTP/1.1", "9110 §9.3.8", 501),
    _line("authority_of_get", b"GET 127.0.0.1:30000 HTTP/1.1", "9112 §3.2.3"),
    _line("version_minor_missing", b"GET / HTTP/1.", "9112 §2.3"),
    _line("version_three_numbers", b"GET / HTTP/1.1.1", "9112 §2.3"),
    _line("version_plus", b"GET / HTTP/+1.1", "9112 §2.3"),
    _line("version_space", b"GET / HTTP/ 1.1", "9112 §2.3"),
    _line("version_zeros", b"GET / HTTP/01.1", "9112 §2.3"),
    _line("version_other_digits", b"GET / HTTP/1.\xb9", "9112 §2.3"),
    _line("version_3_0", b"GET / HTTP/3.0", "9110 §15.6.6", 505),
    _line("protocol_https", b"GET / HTTPS/1.1", "9112 §2.3"),
    _line("protocol_other", b"GET / ICY/1.1", "9112 §2.3"),
    no("rl_simple_request", b"GET /livez\r\n", "9112 §2.3"),
    _target("encoded_line_end", b"/v1/models%0d%0aX:%20y", b"/v1/models%0d%0aX:%20y"),
    _target("unusual_characters", b'/"<>\\^`{|}', b'/"<>\\^`{|}', "9110 §7.1"),
    yes("rl_method_unknown", head(line=b"BREW /livez HTTP/1.1\r\n"), "9110 §15.5.6",
        Taken(b"BREW", b"/livez", b"")),
    yes("rl_method_of_twenty", head(line=b"A" * 20 + b" /livez HTTP/1.1\r\n"), "9110 §9.1",
        Taken(b"A" * 20, b"/livez", b"")),
]  # fmt: skip

LIMITS = [
    no("lim_target", head(line=b"GET /" + b"x" * limits.TARGET_BYTES_MAX + b" HTTP/1.1\r\n"),
        "limit TARGET_BYTES_MAX", 414),
    no("lim_target_without_end", b"GET /" + b"x" * (limits.TARGET_BYTES_MAX + 100),
        "limit TARGET_BYTES_MAX", 414),
    yes("lim_target_just_fits",
         head(line=b"GET /" + b"x" * (limits.TARGET_BYTES_MAX - 1) + b" HTTP/1.1\r\n"),
         "limit TARGET_BYTES_MAX",
         Taken(b"GET", b"/" + b"x" * (limits.TARGET_BYTES_MAX - 1), b"")),
    no("lim_fields", head(*[b"X: y"] * limits.FIELDS_MAX), "limit FIELDS_MAX", 431),
    yes("lim_fields_just_fit", head(*[b"X: y"] * (limits.FIELDS_MAX - 1)), "limit FIELDS_MAX",
         posted(b"")),
    no("lim_field", head(b"X: " + b"y" * limits.HEAD_BYTES_MAX), "limit HEAD_BYTES_MAX", 431),
    no("lim_head_without_end", LINE + b"X: " + b"y" * limits.HEAD_BYTES_MAX,
        "limit HEAD_BYTES_MAX", 431),
    yes("lim_head_just_fits",
         head(b"X: " + b"y" * (limits.HEAD_BYTES_MAX - len(LINE) - len(HOST) - 3)),
         "limit HEAD_BYTES_MAX", posted(b"")),
    no("lim_field_name", head(b"X" * limits.HEAD_BYTES_MAX + b": y"), "limit HEAD_BYTES_MAX", 431),
    no("lim_fields_of_nothing", LINE + HOST + b"X:\r\n" * 20_000 + b"\r\n", "limit HEAD_BYTES_MAX",
       431),
    no("lim_head_one_over",
       head(b"X: " + b"y" * (limits.HEAD_BYTES_MAX - len(LINE) - len(HOST) - 2)),
       "limit HEAD_BYTES_MAX", 431),
    no("lim_target_absolute",
       head(line=b"GET http://a/" + b"x" * limits.TARGET_BYTES_MAX + b" HTTP/1.1\r\n"),
       "limit TARGET_BYTES_MAX", 414),
    no("lim_method_without_end", b"A" * 5_000, "9110 §9.1"),
    Vector("lim_second_head", GET + LINE + b"X: " + b"y" * limits.HEAD_BYTES_MAX,
           "limit HEAD_BYTES_MAX", (GOT,), 431),
]  # fmt: skip


def _path(name: str, path: bytes) -> Vector:
    octets = head(line=b"POST " + path + b" HTTP/1.1\r\n") + GET
    return yes("path_" + name, octets, "9110 §7.1", Taken(b"POST", path, b""), GOT)


# Well-formed, and nobody's: the path is compared as it came, so none of them names anything here.
PATHS = [
    _path("control", b"/sleep"),
    _path("double_slash", b"//sleep"),
    _path("other_host", b"//169.254.169.254/latest"),
    _path("dot_segment", b"/./sleep"),
    _path("dots", b"/v1/models/../../sleep"),
    _path("dots_encoded", b"/v1/models/%2e%2e/%2e%2e/sleep"),
    _path("slash_encoded", b"/v1/responses/..%2f..%2fsleep"),
    _path("encoded_twice", b"/v1/models/%252e%252e/sleep"),
    _path("letter_encoded", b"/%73leep"),
    _path("case", b"/V1/Audio/Transcriptions"),
    _path("slash_after", PATH + b"/"),
    _path("parameter", PATH + b";x=1"),
    _path("nul_encoded", PATH + b"%00"),
    _path("backslash", b"/v1\\audio\\transcriptions"),
    _path("overlong_slash", b"/v1%c0%afsleep"),
    # Its body is not read, so nothing after it is, either.
    Vector("path_with_body",
           head(b"Content-Length: 2", line=b"POST /sleep HTTP/1.1\r\n") + b"{}" + GET,
           "9112 §9.6", (Taken(b"POST", b"/sleep", b"{}"), GOT), answered=404),
]  # fmt: skip


def _aimed(name: str, target: bytes, rule: str = "9112 §3.2.2") -> Vector:
    return _line("ssrf_" + name, b"GET " + target + b" HTTP/1.1", rule)


# A target never chooses where a request goes.
AIMED = [
    _target("ssrf_metadata", b"http://169.254.169.254/latest/meta-data", b"/latest/meta-data",
            "9112 §3.2.2"),
    _target("ssrf_control", b"http://127.0.0.1:30000/sleep", b"/sleep", "9112 §3.2.2"),
    _target("ssrf_served_path", b"http://169.254.169.254/livez", b"/livez", "9112 §3.2.2"),
    _target("ssrf_two_urls", b"http://a/http://b/livez", b"/http://b/livez", "9112 §3.2.2"),
    _target("ssrf_number_for_a_host", b"http://2130706433/livez", b"/livez", "9112 §3.2.2"),
    _aimed("user", b"http://a:b@169.254.169.254/", "9110 §4.2.4"),
    _aimed("backslashes", b"http:\\\\a\\livez"),
    _aimed("one_slash", b"http:/a/livez"),
    _aimed("no_slash", b"http:livez"),
    _aimed("fragment", b"http://a#@b/livez", "9112 §3.2"),
    _aimed("port_words", b"http://a:x/livez"),
    _aimed("websocket", b"ws://a/livez"),
    _aimed("gopher", b"gopher://a:25/_HELO"),
    _aimed("unix_socket", b"http+unix://%2fvar%2frun/livez"),
    _aimed("data_url", b"data:,x"),
    _aimed("relative", b"livez"),
    _aimed("dots_first", b"../livez"),
    _aimed("space_encoded_host", b"http://a%20b@c/", "9110 §4.2.4"),
]  # fmt: skip


def _foreign(name: str, octets: bytes, rule: str = "9112 §3", status: int = 400) -> Vector:
    return no("foreign_" + name, octets, rule, status)


FOREIGN = [
    _foreign("http2_preface_of_1_1", b"PRI * HTTP/1.1\r\nHost: a\r\n\r\n", "9112 §3.2.4"),
    _foreign("http2_frames", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"),
    _foreign("ssh", b"SSH-2.0-OpenSSH_9.2\r\n"),
    _foreign("proxy_protocol_1", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + GET),
    _foreign("proxy_protocol_2", b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c"),
    _foreign("redis", b"*1\r\n$4\r\nPING\r\n"),
    _foreign("smtp", b"EHLO a.example\r\n"),
    _foreign("socks", b"\x05\x01\x00"),
    _foreign("an_answer", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    _foreign("fastcgi", b"\x01\x01\x00\x01\x00\x08\x00\x00"),
    Vector("foreign_after_a_request", GET + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "9113 §3.4",
           (GOT,), 505),
]  # fmt: skip
