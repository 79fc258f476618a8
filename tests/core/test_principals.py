"""Keys and policy become principals: who may ask, for what, and what others learn of that."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from types import FrameType

import pytest

from proxy.config_access import AccessConfig, JwtConfig, TenantConfig
from proxy.config_policy import flaws_of, is_limited, policy_of
from proxy.contract.keys import KeyRecord, KeySet
from proxy.core.classes import OFFLINE, ONLINE, SEMI_ONLINE, UNSAID
from proxy.core.credentials import read_credential
from proxy.core.http1 import parse_request_head
from proxy.core.principal import ALL_CLASSES, ANYBODY
from proxy.core.principals import Principals, class_bits
from proxy.errors import KeysUnknownError, UnauthorizedError

ACME = TenantConfig(
    name="acme",
    weight=3.0,
    work_class="semi-online",
    models=("llama", "qwen"),
    regions=("eu", "us"),
    tokens_per_min=1000,
    cache_isolation=True,
    slo_ttft_ms=400,
)
BETA = TenantConfig(name="beta")
ACCESS = AccessConfig(tenants=(BETA, ACME))


def digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def record(key: str, tenant: str = "acme", **more: object) -> KeyRecord:
    return KeyRecord(key_id=f"id-{key}", tenant=tenant, digest=digest(key).hex(), **more)  # type: ignore[arg-type]


def table(*records: KeyRecord, api_key: str | None = None, salt: str = "s") -> Principals:
    return Principals(ACCESS, KeySet(keys=records, salt=salt), api_key)


def refusal(principals: Principals, key: str) -> str:
    error = principals.refusal(digest(key))
    assert isinstance(error, UnauthorizedError)
    return error.message


def test_a_key_has_what_its_tenant_may() -> None:
    who = table(record("k")).find(digest("k"), 0.0)
    assert who is not None
    assert (who.tenant, who.owner, who.key_id, who.weight) == ("acme", "acme", "id-k", 3.0)
    assert (who.models, who.regions) == ({"llama", "qwen"}, {"eu", "us"})
    assert (who.classes, who.default_class) == (ALL_CLASSES, SEMI_ONLINE)
    assert (who.isolated, who.slo_ttft_s, who.limited) == (True, 0.4, True)


def test_a_tenant_without_policy_may_everything_and_has_no_limit() -> None:
    who = table(record("k", "beta")).find(digest("k"), 0.0)
    assert who is not None
    assert (who.models, who.regions, who.limited, who.salt) == (None, None, False, "")
    assert (who.classes, who.default_class, who.weight) == (ALL_CLASSES, UNSAID, 1.0)


def test_a_key_narrows_its_tenant_and_widens_nothing() -> None:
    key = record("k", models=("qwen", "gpt"), classes=("offline", "online"), regions=("eu", "asia"))
    who = table(key).find(digest("k"), 0.0)
    assert who is not None
    assert (who.models, who.regions) == ({"qwen"}, {"eu"})
    assert who.classes == 1 << OFFLINE | 1 << ONLINE


@pytest.mark.parametrize("field", ["models", "classes", "regions"])
def test_a_key_that_may_nothing_is_refused_and_reported(field: str) -> None:
    key = record("k", **{field: ("other",)})
    principals = table(key)
    assert principals.find(digest("k"), 0.0) is None
    assert "may not be used" in refusal(principals, "k")
    assert flaws_of([key], ACCESS) == [
        f"key id-k: none of its {field} is one that its tenant acme may use"
    ]


def test_a_key_of_no_tenant_is_refused_and_reported() -> None:
    key = record("k", "gone")
    assert table(key).find(digest("k"), 0.0) is None
    assert "not configured" in refusal(table(key), "k")
    assert flaws_of([key], ACCESS) == ["key id-k: its tenant 'gone' is not configured"]
    assert flaws_of([record("k", "gone", revoked_at=1.0), record("l")], ACCESS) == []


def test_expiry_asks_the_clock_and_revocation_does_not() -> None:
    principals = table(record("k", expires_at=100.0), record("r", revoked_at=1e9))
    assert principals.find(digest("k"), 99.9) is not None
    assert principals.find(digest("k"), 100.0) is None
    assert "expired" in refusal(principals, "k")
    assert principals.find(digest("r"), 0.0) is None  # a clock that runs behind
    assert "revoked" in refusal(principals, "r")


def test_who_has_no_key_learns_nothing_of_keys() -> None:
    principals = table(record("k"), record("r", revoked_at=1.0))
    assert refusal(principals, "x") == refusal(principals, "y")
    assert refusal(principals, "").startswith("no API key came")


def test_the_proxys_own_key_is_nobodys_in_particular() -> None:
    alone = Principals(AccessConfig(), None, "master")
    assert (alone.demanded, alone.named, alone.complete) == (True, False, True)
    assert alone.find(digest("master"), 0.0) is ANYBODY
    assert alone.find(digest(""), 0.0) is None
    beside = table(record("k"), api_key="master")
    assert beside.find(digest("master"), 0.0) is ANYBODY
    assert (beside.named, beside.own_key) == (True, "master")


def test_a_tenants_key_is_no_key_for_everything_where_it_is_the_proxys_as_well() -> None:
    principals = table(record("k"), api_key="k")
    who = principals.find(digest("k"), 0.0)
    assert who is not None
    assert (who.tenant, principals.own_key) == ("acme", None)
    revoked = table(record("k", revoked_at=1.0), api_key="k")
    assert revoked.find(digest("k"), 0.0) is None
    assert (refusal(revoked, "k"), revoked.own_key) == ("the API key has been revoked", None)


def test_without_keys_anybody_may_ask() -> None:
    principals = Principals(AccessConfig())
    assert not principals.demanded
    assert not principals.named


def test_keys_that_have_not_been_told_let_nobody_in() -> None:
    principals = Principals(ACCESS, None, "master", awaited=True)
    assert principals.demanded
    assert not principals.complete
    assert principals.find(digest("master"), 0.0) is ANYBODY
    assert isinstance(principals.refusal(digest("k")), KeysUnknownError)
    assert isinstance(principals.refusal(digest("")), UnauthorizedError)  # whatever they are
    told = Principals(ACCESS, KeySet(), None, awaited=True)
    assert isinstance(told.refusal(digest("k")), UnauthorizedError)


def test_an_empty_set_of_keys_is_no_open_door() -> None:
    assert Principals(AccessConfig(), KeySet()).demanded
    assert Principals(AccessConfig(tenants=(BETA,))).demanded
    jwt = JwtConfig(issuer="https://i", audience="a")
    assert Principals(AccessConfig(jwt=jwt)).demanded


def test_salts_are_stable_apart_and_not_to_be_guessed() -> None:
    access = AccessConfig(tenants=(ACME, TenantConfig(name="other", cache_isolation=True)))

    def salt(secret: str, tenant: str) -> str:
        keys = KeySet(keys=(record("k", tenant),), salt=secret)
        who = Principals(access, keys).find(digest("k"), 0.0)
        assert who is not None
        return who.salt

    assert salt("s", "acme") == salt("s", "acme")
    assert len({salt("s", "acme"), salt("s", "other"), salt("t", "acme")}) == 3
    tokens = [Principals(access, secret=secret).derived("cache", "acme") for secret in ("", "p")]
    assert salt("p", "acme") == tokens[1] != tokens[0]


def test_a_tenant_that_a_token_names() -> None:
    access = AccessConfig(tenants=(ACME, TenantConfig(name="default", max_concurrent=4)))
    principals = Principals(access, KeySet(salt="s"))
    who = principals.of_tenant("acme", "jwt-1")
    assert who is not None
    assert (who.tenant, who.owner, who.key_id, who.models) == (
        "acme", "acme", "jwt-1", {"llama", "qwen"},
    )  # fmt: skip
    assert principals.of_tenant("stranger", "jwt-2") is None
    stranger = principals.of_tenant("stranger", "jwt-2", unknown=True)
    assert stranger is not None
    assert (stranger.tenant, stranger.limited) == ("default", True)
    assert stranger.owner not in ("default", "acme", "stranger")  # its files are its own
    assert Principals(ACCESS).of_tenant("stranger", "", unknown=True) is None


@pytest.mark.parametrize(
    ("tenant", "limited"),
    [
        (BETA, False),
        (TenantConfig(name="t", requests_per_min=1), True),
        (TenantConfig(name="t", tokens_per_min=1), True),
        (TenantConfig(name="t", max_concurrent=1), True),
        (TenantConfig(name="t", tokens_per_day=1), True),
        (TenantConfig(name="t", budget_per_day=0.0), True),
    ],
)
def test_what_has_to_be_counted(tenant: TenantConfig, limited: bool) -> None:
    assert is_limited(tenant) is limited


def test_a_policy_says_what_is_left() -> None:
    policy = policy_of(ACME, record("k", models=("qwen",), classes=("offline",)))
    assert (policy.models, policy.classes, policy.regions) == (
        {"qwen"}, ("offline",), {"eu", "us"},
    )  # fmt: skip
    assert class_bits(policy.classes) == 1 << OFFLINE


def work_of(call: Callable[[], object]) -> int:
    """Return how many operations of the interpreter a call takes in the proxy's own code."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        nonlocal count
        if not frame.f_globals["__name__"].startswith("proxy."):
            return None  # such as what a collection of garbage runs
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def judge(principals: Principals, key: str) -> None:
    line = b"GET /x HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b"
    token, problem = read_credential(parse_request_head(line % key.encode()))
    assert not problem
    found = sha256(token).digest()
    if principals.find(found, 0.0) is None:
        principals.refusal(found)


def test_the_work_for_a_wrong_key_says_nothing_of_the_right_one() -> None:
    right = "doh_abcdefgh_0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"
    principals = table(record(right), record("other-key"), *(record(f"k{n}") for n in range(50)))
    wrong = [right[:n] + "#" * (len(right) - n) for n in range(len(right))]
    work_of(partial(judge, principals, wrong[0]))  # what is worked out once is now
    assert len({work_of(partial(judge, principals, key)) for key in wrong}) == 1
    # As near to a stored digest as it gets: all octets but the last.
    stored = digest(right)
    near = [stored[:n] + bytes(32 - n) for n in range(32)]
    assert len({work_of(partial(principals.find, found, 0.0)) for found in near}) == 1


def test_equality_is_settled_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        asked.append((one, other))
        return False

    principals = table(record("k"))
    monkeypatch.setattr("proxy.core.principals.hmac.compare_digest", compare)
    assert principals.find(digest("k"), 0.0) is None  # and on nothing but that
    assert asked == [(digest("k"), digest("k"))]
