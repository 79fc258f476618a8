"""What other proxies have used: while they are linked, a minute after, and for the day."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import quota_sums
from proxy.core.peer_wire import WireError
from proxy.core.quota_sums import COUNT_MAX, Elsewhere, Sums, Telling, read_telling, write_tellings

A, B, C = (bytes((n,)) * 16 for n in (1, 2, 3))
DAY = 20_000
ONE = Sums("t", 1, 10, 2, 20, 30, DAY, 100, 1000)


def telling(*sums: Sums, lives: tuple[bytes, ...] = ()) -> Telling:
    (message,) = write_tellings(lives, list(sums))
    return read_telling(message)


def test_all_that_are_linked_count_and_each_as_it_said_last() -> None:
    elsewhere = Elsewhere()
    elsewhere.hear(A, telling(Sums("t", 9, 99, 9, 9, 9, DAY, 9, 9)))
    elsewhere.hear(A, telling(ONE, Sums("other", 5)))
    elsewhere.hear(B, telling(ONE))
    assert elsewhere.total("t", 0.0, DAY) == Sums("t", 2, 20, 4, 40, 60, DAY, 200, 2000)
    assert elsewhere.total("t", 0.0, DAY + 1).day_tokens == 0
    assert elsewhere.total("nobody", 0.0, DAY) == Sums("nobody", day=DAY)


def test_one_that_is_gone_counts_for_its_minute_and_its_day() -> None:
    elsewhere = Elsewhere()
    elsewhere.hear(A, telling(ONE))
    elsewhere.take_touched()
    elsewhere.gone(A, 100.0)
    assert elsewhere.take_touched() == {"t"}
    assert elsewhere.total("t", 160.0, DAY) == Sums("t", 1, 10, 0, 0, 0, DAY, 100, 1000)
    elsewhere.sweep(161.0, DAY)
    assert elsewhere.take_touched() == {"t"}
    assert elsewhere.total("t", 161.0, DAY) == Sums("t", 0, 0, 0, 0, 0, DAY, 100, 1000)
    elsewhere.sweep(162.0, DAY + 1)
    assert elsewhere.told_by(A) == {}


@pytest.mark.parametrize("early", [True, False])
def test_a_day_that_another_goes_on_with_counts_once(early: bool) -> None:
    elsewhere = Elsewhere()
    heir = telling(Sums("t", 0, 0, 0, 0, 0, DAY, 150, 1500), lives=(A,))
    if early:
        elsewhere.hear(B, heir)
    elsewhere.hear(A, telling(ONE))
    elsewhere.gone(A, 0.0)
    elsewhere.hear(B, heir)
    total = elsewhere.total("t", 1.0, DAY)
    assert (total.tokens, total.day_tokens, total.day_cost) == (10, 150, 1500)


def test_they_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota_sums, "PROXIES_MAX", 2)
    elsewhere = Elsewhere()
    elsewhere.hear(A, telling(ONE))
    elsewhere.hear(B, telling(ONE))
    with pytest.raises(WireError, match="more proxies"):
        elsewhere.hear(C, telling(ONE))
    elsewhere.gone(A, 0.0)
    elsewhere.hear(C, telling(ONE))
    assert elsewhere.told_by(A) == {}
    assert elsewhere.total("t", 0.0, DAY).tokens == 20


def test_no_proxy_tells_of_more_tenants_than_it_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota_sums, "TENANTS_MAX", 2)
    elsewhere = Elsewhere()
    elsewhere.hear(A, telling(ONE, Sums("u")))
    elsewhere.hear(A, telling(ONE))
    with pytest.raises(WireError, match="more tenants"):
        elsewhere.hear(A, telling(Sums("v")))
    assert elsewhere.told_by(A).keys() == {"t", "u"}


def test_whatever_all_of_them_tell_fits_where_it_is_counted() -> None:
    most = Sums("t", *[COUNT_MAX] * 5, DAY, COUNT_MAX, COUNT_MAX)
    elsewhere = Elsewhere()
    for life in (A, B, C):
        elsewhere.hear(life, telling(most))
    total = elsewhere.total("t", 0.0, DAY)
    assert max(total.tokens, total.held_cost, total.day_cost) + COUNT_MAX < 2**63
    with pytest.raises(WireError):
        telling(Sums("t", tokens=COUNT_MAX + 1))


def test_many_tenants_are_told_in_several_messages() -> None:
    many = [Sums(str(number), number) for number in range(2500)]
    messages = write_tellings([A] * 40, many)
    read = [read_telling(message) for message in messages]
    assert [each for one in read for each in one.sums] == many
    assert {len(one.lives) for one in read} == {quota_sums.LIVES_MAX}
    assert read_telling(write_tellings([A], [])[0]) == Telling([A], [])


@given(st.binary(max_size=80))
def test_whatever_comes_is_read_or_refused(octets: bytes) -> None:
    for tried in (octets, write_tellings([A], [ONE])[0][: len(octets)] + octets):
        with contextlib.suppress(WireError):
            assert len(read_telling(tried).lives) <= quota_sums.LIVES_MAX
