"""What a request may claim: each word of it, and each policy of a key."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.claims import allowed_class, lay, may_ask, regions_of, tier_used
from proxy.core.classes import NAMES, OFFLINE, ONLINE, SEMI_ONLINE, UNSAID
from proxy.core.policy import Request
from proxy.core.prefix import NO_CHAIN
from proxy.core.principal import ALL_CLASSES, ANYBODY, Principal
from proxy.core.wishes import Wishes
from proxy.errors import InvalidRequestError


def _principal(
    classes: tuple[int, ...] = (), default: int = UNSAID, slo_ttft_s: float = 0.0
) -> Principal:
    principal = Principal("acme", "k1")
    principal.weight = 3.0
    principal.classes = sum(1 << one for one in classes) or ALL_CLASSES
    principal.default_class = default
    principal.slo_ttft_s = slo_ttft_s
    return principal


def _laid(
    asked: int = UNSAID,
    principal: Principal = ANYBODY,
    wishes: Wishes | None = None,
    pool_class: int = ONLINE,
) -> Request:
    request = Request(NO_CHAIN, has_session=False, work_class=asked)
    lay(request, wishes or Wishes(), principal, pool_class=pool_class, arrived_s=100.0)
    return request


def _wishes(ttft_s: float = 0.0, patience_s: float = 0.0) -> Wishes:
    wishes = Wishes()
    wishes.ttft_s, wishes.patience_s = ttft_s, patience_s
    return wishes


@pytest.mark.parametrize(
    ("asked", "classes", "default", "pool", "due"),
    [
        (UNSAID, (), UNSAID, ONLINE, ONLINE),
        (UNSAID, (), UNSAID, OFFLINE, OFFLINE),
        (UNSAID, (), SEMI_ONLINE, OFFLINE, SEMI_ONLINE),
        (OFFLINE, (), ONLINE, ONLINE, OFFLINE),
        (ONLINE, (SEMI_ONLINE, OFFLINE), UNSAID, ONLINE, SEMI_ONLINE),
        (ONLINE, (OFFLINE,), UNSAID, ONLINE, OFFLINE),
        (SEMI_ONLINE, (ONLINE, OFFLINE), UNSAID, ONLINE, OFFLINE),
        (UNSAID, (OFFLINE,), UNSAID, ONLINE, OFFLINE),
        (UNSAID, (SEMI_ONLINE,), SEMI_ONLINE, ONLINE, SEMI_ONLINE),
        (OFFLINE, (ONLINE,), UNSAID, ONLINE, OFFLINE),
        (SEMI_ONLINE, (ONLINE,), UNSAID, ONLINE, SEMI_ONLINE),
    ],
)
def test_a_class_is_the_requests_word_then_the_keys_then_the_pools_as_far_as_the_key_allows(
    asked: int, classes: tuple[int, ...], default: int, pool: int, due: int
) -> None:
    assert _laid(asked, _principal(classes, default), pool_class=pool).work_class == due


@settings(max_examples=50)
@given(st.integers(0, len(NAMES) - 1), st.integers(1, ALL_CLASSES))
def test_nobody_is_raised_and_nobody_goes_lower_than_the_key_makes_him(
    wanted: int, classes: int
) -> None:
    got = allowed_class(wanted, classes)
    allowed = {one for one in range(len(NAMES)) if classes >> one & 1}
    assert got >= wanted
    assert got in allowed or got == wanted > max(allowed)
    assert not allowed & set(range(wanted, got))


def test_offline_work_weighs_less_by_whichever_word_it_is_offline() -> None:
    assert limits.FLEX_WEIGHT < 1.0
    assert _laid(OFFLINE).weight == _laid(pool_class=OFFLINE).weight == limits.FLEX_WEIGHT
    assert _laid(ONLINE).weight == _laid(SEMI_ONLINE).weight == 1.0


def test_a_request_is_its_tenants() -> None:
    request = _laid(principal=_principal())
    assert (request.tenant, request.tenant_weight) == ("acme", 3.0)
    assert (_laid().tenant, _laid().tenant_weight) == ("", 1.0)


@pytest.mark.parametrize(
    ("asked", "ttft_s", "patience_s", "slo_ttft_s", "deadline_s"),
    [
        (ONLINE, 0.0, 0.0, 0.0, 0.0),
        (ONLINE, 0.5, 0.0, 0.0, 100.5),
        (OFFLINE, 0.5, 0.0, 0.0, 100.5),
        (ONLINE, 0.5, 0.0, 2.0, 100.5),
        (ONLINE, 0.0, 0.0, 2.0, 102.0),
        (SEMI_ONLINE, 0.0, 0.0, 2.0, 0.0),
        (ONLINE, 0.0, 7.0, 0.0, 107.0),
        (ONLINE, 9.0, 7.0, 0.0, 107.0),
        (ONLINE, 5.0, 7.0, 0.0, 105.0),
        (OFFLINE, 0.0, 7.0, 2.0, 107.0),
    ],
)
def test_a_deadline_counts_from_the_moment_in_which_the_head_came(
    asked: int, ttft_s: float, patience_s: float, slo_ttft_s: float, deadline_s: float
) -> None:
    request = _laid(asked, _principal(slo_ttft_s=slo_ttft_s), _wishes(ttft_s, patience_s))
    assert request.deadline_s == deadline_s
    assert request.listens_until_s == (100.0 + patience_s if patience_s else 0.0)


def test_patience_is_with_silence() -> None:
    request = Request(NO_CHAIN, has_session=False)
    wishes = _wishes(0.5, 0.2)
    lay(request, wishes, ANYBODY, pool_class=ONLINE, arrived_s=100.0, kept_alive=True)
    assert (request.deadline_s, request.listens_until_s) == (100.5, 0.0)


def test_a_time_that_could_not_be_read_is_told_when_the_request_is_whole() -> None:
    wishes = Wishes()
    wishes.error = InvalidRequestError("x-slo-ttft-ms must be a number", "x-slo-ttft-ms")
    with pytest.raises(InvalidRequestError):
        _laid(wishes=wishes)


def test_a_key_may_ask_for_its_models_and_for_no_adapter_beside_them() -> None:
    principal = _principal()
    assert may_ask(principal, "m", "any")
    principal.models = frozenset(("m", "sql"))
    assert may_ask(principal, "m", "")
    assert may_ask(principal, "m", "sql")
    assert not may_ask(principal, "m", "other")
    assert not may_ask(principal, "other", "")
    principal.models = frozenset()
    assert not may_ask(principal, "m", "")


def test_a_request_stays_where_its_key_and_its_model_both_may_be() -> None:
    of_models = {"m": frozenset(("eu", "us"))}
    principal = _principal()
    assert regions_of(principal, "other", of_models) is None
    assert regions_of(principal, "m", of_models) == {"eu", "us"}
    principal.regions = frozenset(("eu", "asia"))
    assert regions_of(principal, "other", of_models) == {"eu", "asia"}
    assert regions_of(principal, "m", of_models) == {"eu"}
    principal.regions = frozenset(("asia",))
    assert regions_of(principal, "m", of_models) == frozenset()


def test_the_tier_that_is_told_is_the_one_that_was_used() -> None:
    assert tier_used(ONLINE, ONLINE) == b"priority"
    assert tier_used(ONLINE, SEMI_ONLINE) == tier_used(UNSAID, ONLINE) == b"default"
    assert tier_used(UNSAID, OFFLINE) == tier_used(ONLINE, OFFLINE) == b"flex"
