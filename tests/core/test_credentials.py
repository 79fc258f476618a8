"""Which octets are a credential, and which are none: judged once, in words that repeat nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors
from proxy.core import claim_limits
from proxy.core.credentials import read_credential, without_keys
from proxy.core.http1 import parse_request_head


def credential(*fields: bytes, target: bytes = b"/v1/models") -> tuple[bytes, str]:
    line = b"GET %b HTTP/1.1" % target
    return read_credential(parse_request_head(b"\r\n".join((line, b"Host: a", *fields))))


LARGEST = b"k" * claim_limits.CREDENTIAL_BYTES_MAX


@pytest.mark.parametrize(
    ("fields", "token"),
    [
        ((), b""),
        ((b"Authorization: Bearer k",), b"k"),
        ((b"authorization: bEARER   k ",), b"k"),
        ((b"X-Api-Key: k",), b"k"),
        ((b"X-Api-Key: k", b"Authorization: Bearer k"), b"k"),
        ((b"Authorization: Bearer a.b-c_d~e+f/g==",), b"a.b-c_d~e+f/g=="),
        ((b"Authorization: Bearer " + LARGEST,), LARGEST),
        ((b"X-Api-Keys: k", b"Cookie: api_key=k", b"Proxy-Authorization: Bearer k"), b""),
    ],
)
def test_a_key_is_one_token(fields: tuple[bytes, ...], token: bytes) -> None:
    assert credential(*fields) == (token, "")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ((b"X-Api-Key: s3cret", b"Authorization: Bearer other-s3cret"), "different keys"),
        ((b"X-Api-Key:", b"Authorization: Bearer s3cret"), "different keys"),
        ((b"X-Api-Key: s3cret", b"Authorization: Bearer"), "empty"),
        ((b"X-Api-Key: s3cret", b"Authorization: Basic s3cret"), "not Bearer"),
        ((b"Authorization: Basic s3cret",), "not Bearer"),
        ((b"Authorization: Token s3cret",), "not Bearer"),
        ((b"Authorization: s3cret",), "not Bearer"),
        ((b"Authorization: Bearer, s3cret",), "not Bearer"),
        ((b"Authorization: Bearer\ts3cret",), "not Bearer"),
        ((b"Authorization:",), "is empty"),
        ((b"Authorization: Bearer",), "is empty"),
        ((b"X-Api-Key:",), "is empty"),
        ((b"Authorization: Bearer s3cret, Bearer s3cret",), "one word"),
        ((b"Authorization: Bearer s3cret Basic s3cret",), "one word"),
        ((b"X-Api-Key: s3cret, s3cret",), "one word"),
        ((b"X-Api-Key: s3cret\ts3cret",), "one word"),
        ((b"Authorization: Bearer s3cret\xc3\xa9",), "one word"),
        ((b"Authorization: Bearer \x80s3cret",), "one word"),
        ((b"Authorization: Bearer s3cret" + LARGEST,), "over 8192 octets"),
        ((b"X-Api-Key: s3cret" + LARGEST,), "over 8192 octets"),
    ],
)
def test_what_could_be_read_in_two_ways_is_none(fields: tuple[bytes, ...], words: str) -> None:
    token, problem = credential(*fields)
    assert token == b""
    assert words in problem
    assert "s3cret" not in problem


@pytest.mark.parametrize(
    "fields",
    [
        (b"Authorization: Bearer s3cret", b"Authorization: Bearer s3cret"),
        (b"X-Api-Key: s3cret", b"x-api-key: s3cret"),
        (b"X-Api-Key: s3cret", b"X-API-KEY: other"),
        (b"Authorization: Bearer", b" s3cret"),  # obs-fold
        (b"Authorization: Bearer", b"\ts3cret"),
        (b"Authorization : Bearer s3cret",),
        (b"Authorization: Bearer s3cret\x00",),
        (b"Authorization: Bearer s3\x7fcret",),
        (b"Authorization: Bearer s3cret\n",),
        (b"Connection: x-api-key", b"X-Api-Key: s3cret"),
        (b"Connection: authorization", b"Authorization: Bearer s3cret"),
    ],
)
def test_a_field_that_is_doubled_folded_or_broken_ends_the_request(
    fields: tuple[bytes, ...],
) -> None:
    with pytest.raises(errors.BadHeadError) as refused:
        credential(*fields)
    assert "s3cret" not in refused.value.message


def test_an_address_holds_no_credential() -> None:
    for name in (b"api_key", b"key", b"access_token", b"authorization", b"x-api-key"):
        assert credential(target=b"/v1/models?%b=k" % name) == (b"", "")


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        (b"", b""),
        (b"?", b"?"),
        (b"?beta=true", b"?beta=true"),
        (b"?beta=true&&x", b"?beta=true&&x"),
        (b"?api_key=k", b""),
        (b"?a=1&api_key=k&b=2", b"?a=1&b=2"),
        (b"?KEY=k&Api-Key=k&access_token=k&monkey=1", b"?monkey=1"),
        (b"?api%5fkey=k&a%70i_key=k&x=key=k", b"?x=key=k"),
    ],
)
def test_what_looks_like_a_key_in_an_address_goes_no_further(query: bytes, kept: bytes) -> None:
    assert without_keys(query) == kept


@given(st.lists(st.binary(max_size=8), max_size=3), st.booleans())
def test_whatever_comes_is_one_visible_token_or_nothing(values: list[bytes], twice: bool) -> None:
    names = [b"Authorization", b"X-Api-Key", b"Authorization" if twice else b"Other"]
    fields = [b"%b: %b" % pair for pair in zip(names, values, strict=False)]
    try:
        token, problem = credential(*fields)
    except errors.BadHeadError:
        return
    assert not token or not problem
    assert all(0x20 < octet < 0x7F for octet in token)
