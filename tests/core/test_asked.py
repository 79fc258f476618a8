"""What a request asks for, from its head and its body."""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Any

from proxy.core.asked import Asked, read_body
from proxy.core.preamble import read_preamble
from proxy.core.session import response_key


def _asked(path: str, body: bytes, *fields: str, **options: Any) -> Asked:
    method = "POST" if body else "GET"
    head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *fields])
    preamble = read_preamble(head.encode())
    assert preamble.route is not None
    return read_body(preamble.route, preamble, body, **options)


def _chat(
    *fields: str,
    strict: bool = False,
    tenant: bytes = b"",
    adapters: Container[str] = (),
    **more: Any,
) -> Asked:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}
    octets = json.dumps(body).encode()
    options = {"strict": strict, "tenant": tenant, "adapters": adapters}
    return _asked("/v1/chat/completions", octets, *fields, **options)


def test_a_plain_request() -> None:
    asked = _chat()
    request = asked.request
    assert (asked.model, asked.stream, request.stream) == ("m", False, False)
    assert (request.has_session, request.pinned, request.weight) == (False, False, 1.0)
    assert (request.adapter, request.response_key, request.tried) == ("", 0, set())
    assert request.chain.hashes


def test_what_a_body_says_of_itself() -> None:
    asked = _chat(stream=True, lora_path="sql")
    assert asked.stream
    assert asked.request.stream
    assert asked.request.adapter == "sql"


def test_a_model_that_is_a_loaded_adapter_asks_for_it() -> None:
    assert _chat(adapters={"m"}).request.adapter == "m"
    assert _chat(adapters={"other"}).request.adapter == ""
    assert _chat(adapters={"m"}, lora_path="sql").request.adapter == "sql"


def test_only_a_session_is_pinned_and_only_when_told() -> None:
    assert not _chat("X-Session-ID: s").request.pinned
    assert not _chat(strict=True).request.pinned
    assert not _chat("X-Request-ID: r", strict=True).request.pinned
    assert _chat("X-Session-ID: s", strict=True).request.pinned
    assert _chat(prompt_cache_key="k", strict=True).request.pinned


def test_the_head_names_the_session_before_the_body() -> None:
    one, two = _chat("X-Session-ID: s"), _chat("x_session_id: s", prompt_cache_key="k")
    assert one.request.chain.home_key == two.request.chain.home_key
    assert two.request.has_session


def test_tenants_share_nothing() -> None:
    one, two = _chat(tenant=b"a").request.chain, _chat(tenant=b"b").request.chain
    assert one.home_key != two.home_key
    assert not {*one.hashes} & {*two.hashes}


def test_a_stored_response_is_known_however_it_is_asked_for() -> None:
    body = b'{"model":"m","input":"on","previous_response_id":"resp_1"}'
    expected = response_key(b"resp_1")
    assert _asked("/v1/responses", body).request.response_key == expected
    assert _asked("/v1/responses/resp_1", b"").request.response_key == expected
    assert _asked("/v1/responses/resp_1/cancel", b"{}").request.response_key == expected
    assert _chat(previous_response_id="resp_1").request.response_key == 0


def test_a_form_of_sound() -> None:
    def form(file: bytes, *fields: str) -> Asked:
        parts = [(b"model", b"whisper"), (b"file", file)]
        octets = b"".join(
            b'--XX\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % part
            for part in parts
        )
        kind = "Content-Type: multipart/form-data; boundary=XX"
        path = "/v1/audio/transcriptions"
        return _asked(path, octets + b"--XX--\r\n", kind, *fields, strict=True)

    one, two = form(b"a" * 999), form(b"b" * 999)
    assert one.model == "whisper"
    assert one.request.chain.home_key != two.request.chain.home_key
    assert one.request.chain.home_key == form(b"a" * 999).request.chain.home_key
    assert form(b"a", "X-Session-ID: s").request.pinned
