"""Engines' errors in the words of the client's library, and what may be sent again."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from email.utils import format_datetime, formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors
from proxy.core import limits
from proxy.core.engine_errors import (
    Field,
    client_body,
    client_fields,
    with_our_body,
)
from proxy.errors import Dialect, dialect_of

GOLDEN = Path(__file__).parents[1] / "golden"
JSON = b"application/json"
NOW_S = 1_700_001_000.0


def cases() -> list[Any]:
    """What the engines' own sources write, one case an answer."""
    return [
        pytest.param(case, id=f"{engine}: {case['why']}")
        for engine in ("vllm-0.33.0", "sglang-0.5.23")
        for case in json.loads((GOLDEN / f"errors-{engine}.json").read_text())
    ]


def octets(case: Any) -> bytes:
    body = case["body"]
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def openai(status: int, body: bytes, content_type: bytes = JSON) -> Any:
    """Return the `error` member, having checked that it is OpenAI's."""
    value = json.loads(client_body(status, content_type, body, Dialect.OPENAI))
    assert set(value) == {"error"}
    error = value["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["code"], str | None)
    assert isinstance(error["param"], str | None)
    return error


# --- what engines write ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases())
def test_every_error_of_the_engines_gets_the_clients_shape(case: Any) -> None:
    dialect = dialect_of(case["path"].encode())
    value = json.loads(
        client_body(case["status"], case["content_type"].encode(), octets(case), dialect)
    )
    error = value["error"]
    said = case["body"]
    if isinstance(said, dict) and not isinstance(said.get("detail"), list):
        inner = said.get("error", said)
        assert error["message"] == (inner if isinstance(inner, str) else inner["message"])
    if dialect is Dialect.ANTHROPIC:
        assert value["type"] == "error"
        assert error["type"] in errors.ANTHROPIC_TYPES
        assert set(error) == {"type", "message"}
    else:
        assert error["type"] in errors.OPENAI_TYPES
        assert isinstance(error["code"], str | None)
        assert set(error) == {"message", "type", "param", "code"}


def test_a_flat_error_of_sglang_is_nested() -> None:
    flat = {
        "object": "error",
        "message": "no",
        "type": "BadRequestError",
        "param": "n",
        "code": 400,
    }
    assert openai(400, json.dumps(flat).encode()) == {
        "message": "no",
        "type": "invalid_request_error",
        "param": "n",
        "code": "400",
    }


def test_a_number_for_a_code_becomes_openais_string() -> None:
    nested = {"error": {"message": "no", "type": "NotFoundError", "param": None, "code": 404}}
    assert openai(404, json.dumps(nested).encode()) == {
        "message": "no",
        "type": "not_found_error",
        "param": None,
        "code": "404",
    }


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message":"no","type":"invalid_request_error","param":"model","code":null}}',
        b'{"error":{"code":"model_not_found","message":"no","type":"x","param":null},"more":1}\n',
        b'{"error":{"message":"","type":"server_error"}}',
    ],
)
def test_what_is_openais_already_is_kept_octet_for_octet(body: bytes) -> None:
    assert client_body(400, JSON, body, Dialect.OPENAI) is body


def test_what_is_anthropics_already_is_kept_octet_for_octet() -> None:
    body = b'{ "type":"error","error":{"type":"overloaded_error","message":"busy"}, "request_id":1}'
    assert client_body(529, JSON, body, Dialect.ANTHROPIC) is body


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b'{"detail":"Not Found"}', "Not Found", None),
        (
            b'{"detail":[{"loc":["body","messages",0,"role"],"msg":"Field required"},'
            b'{"loc":["query","n"],"msg":"bad"},"and so on",7]}',
            "messages.0.role: Field required; query.n: bad; and so on",
            "messages.0.role",
        ),
        (b'{"detail":{"message":"m","param":"p"}}', "m", "p"),
        (b'{"detail":{"error":{"message":"deep"}}}', "deep", None),
        (b'{"error":"Unauthorized"}', "Unauthorized", None),
        (b'{"error":["one","two"]}', "one; two", None),
        (b'{"success":false,"message":"no"}', "no", None),
        (b'"just words"', "just words", None),
        (b'{"strange":1}', '{"strange":1}', None),
        (b"[1,2]", "[1,2]", None),
        (b'{"error":{"message":7,"type":7,"param":7,"code":true}}', None, None),
        (b'{"detail":[]}', '{"detail":[]}', None),
        (b'{"message":"cut', '{"message":"cut', None),
        (b"[" * 5000, "[" * 5000, None),
        (b'{"error":' * 2000, None, None),
    ],
)
def test_the_message_is_found(body: bytes, message: str | None, param: str | None) -> None:
    error = openai(422, body)
    if message is None:
        message = body.decode()[: limits.ENGINE_MESSAGE_CHARS_MAX]
        assert error["message"].startswith(message)
    else:
        assert error["message"] == message
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        (b"text/plain; charset=utf-8", b"Internal Server Error\n", "Internal Server Error"),
        (b"", b"upstream \xff went", "upstream \ufffd went"),
        (
            b"text/html",
            b"<html><head><TITLE>502 Bad\n Gateway</TITLE></head><body><h1>x</h1></body></html>",
            "502 Bad Gateway",
        ),
        (b"", b"<p>No <b>title</b>\r\nhere</p>", "No title here"),
        (JSON, b"", "the engine answered 500 Internal Server Error and said no more"),
        (JSON, b"{}", "the engine answered 500 Internal Server Error and said no more"),
        (b"text/plain", b" \r\n", "the engine answered 500 Internal Server Error and said no more"),
    ],
)
def test_text_and_pages_become_a_message(content_type: bytes, body: bytes, message: str) -> None:
    error = openai(500, body, content_type)
    assert error == {"message": message, "type": "server_error", "param": None, "code": None}


def test_a_status_without_a_name_has_words_too() -> None:
    assert openai(599, b"")["message"] == "the engine answered 599 and said no more"


def test_a_long_message_is_bounded() -> None:
    most = limits.ENGINE_MESSAGE_CHARS_MAX
    assert openai(500, b"x" * most)["message"] == "x" * most
    assert openai(500, b"x" * (most + 1))["message"] == "x" * most + "…"


@pytest.mark.parametrize(
    ("status", "of_openai", "of_anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (403, "permission_error", "permission_error"),
        (404, "not_found_error", "not_found_error"),
        (413, "invalid_request_error", "request_too_large"),
        (422, "invalid_request_error", "invalid_request_error"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "server_error", "api_error"),
        (503, "server_error", "overloaded_error"),
        (504, "server_error", "timeout_error"),
        (529, "server_error", "overloaded_error"),
    ],
)
def test_the_type_follows_the_status(status: int, of_openai: str, of_anthropic: str) -> None:
    assert openai(status, b"x")["type"] == of_openai
    value = json.loads(client_body(status, b"", b"x", Dialect.ANTHROPIC))
    assert value == {"type": "error", "error": {"type": of_anthropic, "message": "x"}}


def test_an_engines_type_is_kept_where_it_is_the_vendors_word() -> None:
    body = b'{"message":"m","type":"rate_limit_error"}'
    assert openai(503, body)["type"] == "rate_limit_error"
    told = json.loads(client_body(503, JSON, body, Dialect.ANTHROPIC))
    assert told["error"]["type"] == "rate_limit_error"
    assert openai(503, b'{"message":"m","type":"overloaded_error"}')["type"] == "server_error"


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        (b"/v1/messages", Dialect.ANTHROPIC),
        (b"/v1/messages/count_tokens", Dialect.ANTHROPIC),
        (b"/v1/chat/completions", Dialect.OPENAI),
        (b"/v1/models", Dialect.OPENAI),
    ],
)
def test_the_path_names_the_dialect(path: bytes, dialect: Dialect) -> None:
    assert dialect_of(path) is dialect


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "detail", "message", "type", "param", "code", "loc", "msg"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(_VALUES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200))
def test_any_octets_become_an_error_that_stays_as_it_is(body: bytes) -> None:
    for dialect in Dialect:
        told = client_body(500, JSON, body, dialect)
        error = json.loads(told)["error"]
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        assert client_body(500, JSON, told, dialect) is told


# --- what may be sent again, and when -------------------------------------------------------------


def fields(status: int, *given: Field) -> dict[bytes, bytes]:
    told = client_fields(status, list(given), NOW_S)
    assert len(told) == len(dict(told)), "each name once"
    assert client_fields(status, told, NOW_S) == told
    return dict(told)


@pytest.mark.parametrize(
    ("status", "again"),
    [
        *((status, None) for status in (400, 401, 403, 404, 407, 413)),
        *((status, b"true") for status in (408, 409, 429, 500, 502, 503, 504, 529, 599)),
        *((status, b"false") for status in (410, 414, 415, 422, 431, 451, 501, 505)),
    ],
)
def test_whether_to_repeat_is_said_aloud(status: int, again: bytes | None) -> None:
    assert fields(status).get(b"x-should-retry") == again


@pytest.mark.parametrize("said", [b"true", b"false"])
def test_what_the_engine_says_about_it_is_kept(said: bytes) -> None:
    for status in (400, 429, 500, 501):
        assert fields(status, (b"x-should-retry", said))[b"x-should-retry"] == said


def date(seconds: float) -> bytes:
    return formatdate(NOW_S + seconds, usegmt=True).encode()


@pytest.mark.parametrize(
    ("given", "wait"),
    [
        (b"7", b"7"),
        (b"120", b"120"),
        (b"121", b"120"),
        (b"99999999999999999999", b"120"),
        (b"0.2", b"1"),
        (b"1.5", b"2"),
        (date(30), b"30"),
        (date(3600), b"120"),
        (b"Tuesday, 14-Nov-23 22:30:01 GMT", b"1"),
        (b"Tue Nov 14 22:30:10 2023", b"10"),
        *(
            (junk, None)
            for junk in (
                *(
                    b"0",
                    b"0.0",
                    b"-5",
                    b"soon",
                    b"",
                    b"1e9",
                    b"inf",
                    b"nan",
                    b"+5",
                    b"5 s",
                    b"0x10",
                ),
                *(date(0), date(-60), b"Mon, 99 Foo 2023 99:99:99 GMT", b"Tue, 14 Nov 99999999999"),
                *(b"9" * 21, b"Mon, " + b"x" * 20),
            )
        ),
    ],
)
def test_retry_after_is_what_clients_obey(given: bytes, wait: bytes | None) -> None:
    assert fields(500, (b"retry-after", given)).get(b"retry-after") == wait
    # Where everybody is told to wait, nonsense is as good as nothing.
    assert fields(429, (b"retry-after", given))[b"retry-after"] == (wait or b"1")


def test_dates_of_the_test_are_what_they_seem() -> None:
    moment = datetime.fromtimestamp(NOW_S, UTC)
    assert format_datetime(moment, usegmt=True) == "Tue, 14 Nov 2023 22:30:00 GMT"


@pytest.mark.parametrize(
    ("given", "wait_ms", "wait"),
    [
        (b"250", b"250", b"1"),
        (b"1001", b"1001", b"2"),
        (b"120000", b"120000", b"120"),
        (b"120001", b"120000", b"120"),
        (b"0", None, None),
        (b"soon", None, None),
    ],
)
def test_milliseconds_are_kept_and_told_in_seconds_too(
    given: bytes, wait_ms: bytes | None, wait: bytes | None
) -> None:
    told = fields(500, (b"retry-after-ms", given))
    assert told.get(b"retry-after-ms") == wait_ms
    assert told.get(b"retry-after") == wait
    both = fields(500, (b"retry-after-ms", given), (b"retry-after", b"9"))
    assert both[b"retry-after"] == b"9"


@pytest.mark.parametrize("status", [429, 503, 529])
def test_overload_always_names_a_time(status: int) -> None:
    assert fields(status)[b"retry-after"] == b"1"
    assert b"retry-after" not in fields(status, (b"x-should-retry", b"false"))
    assert b"retry-after" not in fields(500)


@given(st.binary(max_size=60) | st.from_regex(rb"\A(Mon|Tuesday),? [ -~]{10,40}\Z"))
def test_no_retry_after_makes_a_client_give_up(value: bytes) -> None:
    told = fields(503, (b"retry-after", value), (b"retry-after-ms", value))
    assert 1 <= int(told[b"retry-after"]) <= errors.RETRY_AFTER_S_MAX
    assert 1 <= int(told.get(b"retry-after-ms", b"1")) <= errors.RETRY_AFTER_S_MAX * 1000


def test_the_first_of_two_counts() -> None:
    told = fields(429, (b"retry-after", b"7"), (b"retry-after", b"9"))
    assert told[b"retry-after"] == b"7"


def test_fields_about_the_octets_go_with_them() -> None:
    given = [(b"content-type", b"text/html"), (b"etag", b'"x"'), (b"server", b"uvicorn")]
    assert with_our_body(given) == [(b"server", b"uvicorn"), (b"content-type", JSON)]
    assert client_fields(400, given, NOW_S) == given


def test_a_401_names_the_scheme() -> None:
    assert fields(401)[b"www-authenticate"] == b"Bearer"
    assert fields(401, (b"www-authenticate", b"Basic"))[b"www-authenticate"] == b"Basic"


@pytest.mark.parametrize("text", [b"<", b"<title", b"<title>", b"<a "], ids=str)
def test_a_page_costs_its_length(text: bytes) -> None:
    """Sixteen times the page: linear is 16, quadratic 256. Processor time, the least of three."""

    def cost_s(size: int) -> float:
        page = text * (size // len(text))
        best_s = float("inf")
        for _ in range(3):
            start_s = time.process_time()
            client_body(400, b"text/html", page, Dialect.OPENAI)
            best_s = min(best_s, time.process_time() - start_s)
        return best_s

    assert cost_s(1 << 16) <= 64 * max(cost_s(1 << 12), 1e-4)
