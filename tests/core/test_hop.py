"""A hop is believed when it was signed for this proxy, this request and now, and only once."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import claim_limits
from proxy.core.hop import (
    Claims,
    HopError,
    body_digest,
    check_body,
    check_hop,
    has_passed,
    read_hop,
    via_of,
    write_hop,
)
from proxy.core.nonces import CELL_BYTES, ENTRIES, Nonces, memory_bytes

BODY = b'{"model":"m"}'
NOW_S = 1.8e9
CLAIMS = Claims(
    request_id="r",
    origin="eu",
    origin_id=b"e" * 16,
    region="us",
    proxy_id=b"u" * 16,
    unix_s=NOW_S,
    nonce=b"n" * 16,
    body_digest=body_digest(BODY),
    tenant="acme",
    key_id="k1",
    work_class=0,
    regions=["eu", "us"],
    deadline_s=0.4,
    salt="s",
)
POST = (b"POST", b"/v1/chat/completions?a=b")


def check(claims: Claims, **other: object) -> None:
    here: dict[str, object] = {
        "region": "us", "proxy_id": b"u" * 16, "request_id": b"r", "unix_s": NOW_S
    }  # fmt: skip
    check_hop(claims, **{**here, **other})  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["secret", None])
def test_what_is_claimed_arrives_as_it_was_written(key: str | None) -> None:
    value = write_hop(CLAIMS, key, *POST)
    assert value.startswith(b"v1;")
    assert value.isascii()
    assert read_hop(value, key, *POST) == CLAIMS
    check(CLAIMS)
    check_body(CLAIMS, BODY)


@pytest.mark.parametrize(
    ("key", "request_"),
    [
        ("other", POST),
        (None, POST),
        ("secret", (b"GET", POST[1])),
        ("secret", (b"POST", b"/v1/chat/completions?a=c")),
        ("secret", (b"POST", b"/v1/completions")),
    ],
)
def test_a_signature_fits_no_other_key_method_or_target(
    key: str | None, request_: tuple[bytes, bytes]
) -> None:
    value = write_hop(CLAIMS, "secret", *POST)
    with pytest.raises(HopError, match="not signed") as caught:
        read_hop(value, key, *request_)
    assert caught.value.kind == "forged"


def test_an_unsigned_one_is_forged_where_there_is_a_key() -> None:
    with pytest.raises(HopError, match="not signed"):
        read_hop(write_hop(CLAIMS, None, *POST), "secret", *POST)


def test_no_octet_of_it_can_be_changed() -> None:
    value = write_hop(CLAIMS, "secret", *POST)
    for at in range(len(value)):
        for octet in (b"A", b"B"):
            changed = value[:at] + octet + value[at + 1 :]
            if changed == value:
                continue
            try:
                claims = read_hop(changed, "secret", *POST)
            except HopError:
                continue
            assert claims == CLAIMS  # base64 has bits at its end that mean nothing


@given(st.binary(max_size=200))
def test_any_octets_are_refused_in_one_way(octets: bytes) -> None:
    for value in (octets, b"v1;" + octets, b"v1;AAAA;" + octets):
        with pytest.raises(HopError) as caught:
            read_hop(value, "secret", *POST)
        assert caught.value.kind in ("malformed", "forged")
        assert not octets or octets.hex() not in str(caught.value)


@given(st.binary(max_size=100))
def test_claims_of_one_who_has_the_key_are_read_totally(octets: bytes) -> None:
    for key in ("secret", None):
        value = write_hop(msgspec.Raw(octets), key, *POST)  # type: ignore[arg-type]
        with pytest.raises(HopError, match=r"form|cannot be read"):
            read_hop(value, key, *POST)


def test_one_that_is_too_long_is_not_even_decoded() -> None:
    with pytest.raises(HopError, match="form"):
        read_hop(b"v1;" + b"A" * claim_limits.HOP_BYTES_MAX + b";A", "secret", *POST)


@pytest.mark.parametrize(
    ("here", "kind"),
    [
        ({"region": "ap"}, "misdirected"),
        ({"proxy_id": b"v" * 16}, "moved"),
        ({"proxy_id": b""}, "moved"),
        ({"request_id": b"other"}, "altered"),
        ({"request_id": None}, "altered"),
        ({"unix_s": NOW_S + claim_limits.HOP_SKEW_S + 1}, "expired"),
        ({"unix_s": NOW_S - claim_limits.HOP_SKEW_S - 1}, "expired"),
    ],
)
def test_it_is_for_one_proxy_one_request_and_now(here: dict[str, object], kind: str) -> None:
    with pytest.raises(HopError) as caught:
        check(CLAIMS, **here)
    assert caught.value.kind == kind


def test_nobody_hops_to_himself() -> None:
    with pytest.raises(HopError, match="very region"):
        check(msgspec.structs.replace(CLAIMS, origin="us"))


def test_another_body_is_not_what_was_signed() -> None:
    with pytest.raises(HopError, match="body"):
        check_body(CLAIMS, BODY + b" ")


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e-300, float("nan"), float("inf")])
def test_a_weight_by_which_nothing_can_be_shared_is_no_claim(weight: float) -> None:
    claims = msgspec.structs.replace(CLAIMS, weight=weight)
    with pytest.raises(HopError) as refused:
        read_hop(write_hop(claims, "secret", *POST), "secret", *POST)
    assert refused.value.kind == "malformed"


def test_a_later_version_may_add_to_the_claims() -> None:
    class Later(Claims, frozen=True, array_like=True):
        more: str = "news"

    fields = {name: getattr(CLAIMS, name) for name in Claims.__struct_fields__}
    assert read_hop(write_hop(Later(**fields), "k", *POST), "k", *POST) == CLAIMS


@pytest.mark.parametrize(
    ("via", "passed"),
    [
        (b"1.1 doherty-eu", True),
        (b"1.1 nginx, 1.1 doherty-eu (comment)", True),
        (b"HTTP/1.1 doherty-eu,1.0 x", True),
        (b"1.1 doherty-us", False),
        (b"1.1 doherty-eu-west", False),
        (b"doherty-eu", False),
        (b"", False),
        (b",, ,", False),
    ],
)
def test_a_region_knows_its_own_name_in_via(via: bytes, *, passed: bool) -> None:
    assert has_passed(via, "eu") is passed


def test_names_of_regions_become_tokens() -> None:
    assert via_of("eu") == b"1.1 doherty-eu"
    for region in ("eu west", "eu,us", "\xfc"):
        assert has_passed(via_of(region), region)
        assert via_of(region).count(b",") == 0


# --- numbers that are used once ------------------------------------------------------------------


def shared(workers: int) -> list[Nonces]:
    cells = memoryview(bytearray(memory_bytes(workers))).cast("Q")
    return [Nonces(cells, place, workers) for place in range(workers)]


def test_a_number_is_good_once_in_all_workers() -> None:
    one, two, three = shared(3)
    assert two.use(b"n" * 16, NOW_S)
    for worker in (one, two, three):
        assert not worker.use(b"n" * 16, NOW_S)
    assert three.use(b"m" * 16, NOW_S)


def number(step: int) -> bytes:
    return (2 * step).to_bytes(CELL_BYTES, "little") + step.to_bytes(CELL_BYTES, "little")


def test_it_is_remembered_for_as_long_as_its_signature_holds() -> None:
    one, two = shared(2)
    for step in range(200):
        signed_s = NOW_S + step
        assert one.use(number(step), signed_s)
        for before in range(max(0, step - 2 * int(claim_limits.HOP_SKEW_S)), step + 1):
            for worker in (one, two):
                assert not worker.use(number(before), NOW_S + before)


def test_a_full_place_refuses_and_is_free_again_when_its_time_is_over() -> None:
    (one,) = shared(1)
    numbers = [number.to_bytes(CELL_BYTES, "little") + b"\0" * CELL_BYTES for number in range(99)]
    taken = [one.use(number, NOW_S) for number in numbers[1::2]]
    assert taken == [True] * (ENTRIES - 1) + [False] * (len(taken) - ENTRIES + 1)
    later_s = NOW_S + 3 * 2 * claim_limits.HOP_SKEW_S  # the same place in the memory
    assert [one.use(number, later_s) for number in numbers[1:9:2]] == [True] * 4


def test_a_worker_that_follows_another_in_its_place_knows_its_numbers() -> None:
    cells = memoryview(bytearray(memory_bytes(1))).cast("Q")
    assert Nonces(cells, 0, 1).use(b"n" * 16, NOW_S)
    assert not Nonces(cells, 0, 1).use(b"n" * 16, NOW_S)
