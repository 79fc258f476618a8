"""The failures: each complete, each named once, each of OpenAI's shape."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors

_KINDS = {
    "invalid_request_error", "authentication_error", "permission_error",
    "rate_limit_error", "server_error",
}  # fmt: skip


def _descendants(kind: type[errors.ProxyError]) -> set[type[errors.ProxyError]]:
    children = {c for c in kind.__subclasses__() if c.__module__ == errors.__name__}
    return children.union(*map(_descendants, children)) if children else children


def test_every_failure_is_listed_once() -> None:
    assert set(errors.ALL_ERRORS) == _descendants(errors.ProxyError)
    assert len(set(errors.ALL_ERRORS)) == len(errors.ALL_ERRORS)


def test_the_guide_lists_every_code_with_its_status() -> None:
    guide = (Path(__file__).parents[2] / "deploy/guides/failures.md").read_text()
    rows = dict(re.findall(r"^\| (\d{3}) \| (`.+`) \|", guide, re.MULTILINE))
    listed = {
        (int(status), code)
        for status, cell in rows.items()
        for code in re.findall(r"`(\w+)`", cell)
    }
    assert listed == {(kind.status, kind.code) for kind in errors.ALL_ERRORS}


def test_codes_are_unique_and_log_words_are_no_codes() -> None:
    codes = [kind.code for kind in errors.ALL_ERRORS]
    assert len(set(codes)) == len(codes)
    assert not {errors.OK, errors.CLIENT_GONE, errors.STREAM_CUT} & set(codes)


@pytest.mark.parametrize("kind", errors.ALL_ERRORS, ids=lambda kind: kind.code)
def test_each_is_complete(kind: type[errors.ProxyError]) -> None:
    assert 400 <= kind.status <= 599
    assert kind.kind in _KINDS
    assert kind.code.replace("_", "").isalpha()
    assert kind.code == kind.code.lower()
    assert kind.__name__.endswith("Error")
    assert 0 <= kind.retry_after_s <= errors.RETRY_AFTER_S_MAX
    if kind.status < 500 and kind.status not in (408, 429):
        assert not kind.should_retry  # the same request would fail again
    if kind.retry_after_s:
        assert kind.should_retry
    assert (kind.kind == "invalid_request_error") is issubclass(kind, errors.InvalidRequestError)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.none() | st.sampled_from(["model"]))
def test_the_body_is_openais(message: str, param: str | None) -> None:
    error = errors.ModelNotFoundError(message, param)
    assert str(error) == message
    assert json.loads(error.body()) == {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": param,
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize("kind", errors.ALL_ERRORS, ids=lambda kind: kind.code)
def test_anthropics_clients_get_their_shape_and_our_code(kind: type[errors.ProxyError]) -> None:
    told = json.loads(kind("why", "model").body(errors.Dialect.ANTHROPIC))
    error = told.pop("error")
    assert told == {"type": "error"}
    assert error.pop("type") in errors.ANTHROPIC_TYPES
    assert error == {"message": "why", "param": "model", "code": kind.code}


def test_the_last_event_is_named_where_nameless_ones_are_skipped() -> None:
    error = errors.ReplicaLostError("gone")
    for dialect, name in ((errors.Dialect.OPENAI, b""), (errors.Dialect.ANTHROPIC, b"error")):
        *lines, empty, end = error.event(dialect).split(b"\n")
        assert lines[:-1] == ([b"event: " + name] if name else [])
        assert json.loads(lines[-1].removeprefix(b"data: ")) == json.loads(error.body(dialect))
        assert empty == end == b""
