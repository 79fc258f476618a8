"""What is added to a body: it counts, whatever the client said, and all else stays as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core.additions import fields_for, names_priority, salt_of_key, with_fields
from proxy.core.scan import Scanned, scan_body

_SALT = "a" * 64
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.text()))


@settings(max_examples=50)
@given(
    st.dictionaries(st.text(), _VALUES),
    st.sampled_from(["", " ", "\r\n", " \t\n  "]),
    st.sampled_from([None, 1, 2]),
)
def test_what_is_added_is_the_last_word_and_the_rest_is_untouched(
    members: dict[str, Any], space: str, indent: int | None
) -> None:
    members |= {"model": "m", "cache_salt": "theirs"}
    body = f"{space}{json.dumps(members, indent=indent)}{space}".encode()
    sent = with_fields(body, fields_for("chat", _SALT, None, "fast"))
    assert json.loads(sent) == members | {"cache_salt": _SALT, "service_tier": "priority"}
    assert sent.startswith(body.rstrip()[:-1])
    scanned = scan_body(sent)
    assert (scanned.cache_salt, scanned.service_tier) == (_SALT, "priority")


def _salt(salt: str, own: str | None, route: str = "chat") -> str:
    fields = fields_for(route, salt, own, None)
    value = json.loads(b"{%b}" % fields)["cache_salt"]
    assert isinstance(value, str)
    return value


def test_salts_set_tenants_apart_and_a_clients_own_one_within_its_tenant() -> None:
    assert _salt(_SALT, None) == _salt(_SALT, None) == _SALT
    owns = ["a", "b", "a" * 5000, "ü", "\ud800", '"}', "b" * 64]
    salts = {_salt(tenant, own) for tenant in (_SALT, "b" * 64) for own in (None, *owns)}
    assert len(salts) == 2 * (1 + len(owns))
    # One length for all: SGLang writes it in front of a client's `extra_key`, so none may be
    # another's beginning. At most 1024 characters: more is 400 at vLLM.
    assert {len(salt) for salt in salts} == {64}


def test_a_client_cannot_come_to_another_tenants_salt_by_its_own() -> None:
    assert _salt("b" * 64, _SALT) != _SALT


@pytest.mark.parametrize(
    ("route", "salt", "tier", "due"),
    [
        ("chat", "", None, b""),
        ("chat", "", "flex", b""),
        ("responses", "", "priority", b""),
        ("responses", "", "fast", b'"service_tier":"priority"'),
        ("responses", "", "ultrafast", b'"service_tier":"priority"'),
        ("embeddings", _SALT, None, b'"cache_salt":"%b"' % _SALT.encode()),
        ("tokenize", _SALT, None, b""),
        ("count_tokens", _SALT, None, b""),
    ],
)
def test_nothing_is_added_without_need(route: str, salt: str, tier: str | None, due: bytes) -> None:
    assert fields_for(route, salt, None, tier) == due


def test_a_priority_is_levelled_where_a_body_may_name_one() -> None:
    assert names_priority(b'{"priority":5}')
    assert names_priority(b'{"pri\\u006frity":5}')
    assert not names_priority(b'{"messages":"a priority"}')
    assert not names_priority(b'{"m":"\\u4e2d"}')  # no letter of the name is one of these


@pytest.mark.parametrize("name", [b'"priority"', b'"pri\\u006frity"'])
def test_a_priority_is_looked_for_around_the_prompt_and_not_in_it(name: bytes) -> None:
    words = b'"messages":"%b"' % (b"say \\u0022priority\\u0022 " * 200)
    for body, named in (
        (b'{"model":"m",%b:5,%b}' % (name, words), True),
        (b'{"model":"m",%b,%b:5}' % (words, name), True),
        (b'{"model":"m",%b}' % words, False),
    ):
        start = body.index(words) + len(b'"messages":')
        spans = (0, 0, start, start + len(words) - len(b'"messages":'))
        fields = ("m", None, None, None, None, None, None, None, spans, (), (), (), 0)
        assert names_priority(body, Scanned(fields, body)) is named
        assert names_priority(body, Scanned(fields, b"parts without names"))  # nobody knows where


def test_levels_are_a_field_of_the_body() -> None:
    assert fields_for("chat", "", None, None, levels=True) == b'"priority":0'


def test_a_keys_salt_is_not_the_digest_that_is_kept_of_it() -> None:
    assert salt_of_key(b"d" * 32) != salt_of_key(b"e" * 32)
    assert (b"d" * 32).hex() not in salt_of_key(b"d" * 32)
