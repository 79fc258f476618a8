"""Who may wait: bounded in number and octets, by class; and when the others may come again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.classes import NAMES, OFFLINE, ONLINE, SEMI_ONLINE, SHARES
from proxy.core.fairness import Account
from proxy.core.held import Held
from proxy.core.policy import Request
from proxy.core.prefix import NO_CHAIN
from proxy.core.prospects import Prospect
from proxy.core.room import Pace, Room, retry_after_s, start_retry_s
from proxy.errors import RETRY_AFTER_S_MAX


def held(work_class: int, size: int = 1, since_s: float = 0.0) -> Held:
    request = Request(NO_CHAIN, has_session=False, work_class=work_class)
    made = Held(request, lambda: None, lambda _: None, since_s)
    made.held_bytes = size
    return made


def room(count_max: int, bytes_max: int = 10**9) -> Room:
    made = Room()
    made.resize(count_max, bytes_max)
    return made


def put(into: Room, one: Held) -> bool:
    """Let it in, and those out who have to leave for it; return whether it found room."""
    leaving = into.enter(one)
    for other in leaving or ():
        into.leave(other)
    return leaving is not None


def test_a_burst_of_offline_work_never_refuses_an_online_request() -> None:
    full = room(8)
    taken = [put(full, held(OFFLINE)) for _ in range(20)]
    assert taken.count(True) == 2  # a quarter
    assert all(put(full, held(ONLINE)) for _ in range(8))
    assert [full.count_of(n) for n in range(3)] == [8, 0, 0]
    assert not put(full, held(ONLINE))
    assert not put(full, held(OFFLINE))


def test_those_leave_first_who_are_least_urgent_and_came_last() -> None:
    full = room(4)
    offline, semi, later = held(OFFLINE), held(SEMI_ONLINE), held(SEMI_ONLINE, since_s=1.0)
    for one in (offline, semi, later, held(ONLINE)):
        assert put(full, one)
    assert full.enter(held(SEMI_ONLINE)) is None  # half of it is theirs already
    assert full.enter(held(ONLINE)) == [offline]
    full.leave(offline)
    assert full.enter(held(ONLINE)) == [later]


def test_octets_are_bounded_as_the_number_is() -> None:
    full = room(100, 100)
    assert put(full, held(OFFLINE, 25))
    assert not put(full, held(OFFLINE, 1))
    assert put(full, held(ONLINE, 75))
    assert full.bytes_of(OFFLINE) == 25
    assert put(full, held(ONLINE, 10))
    assert full.bytes_of(OFFLINE) == 0
    assert full.enter(held(ONLINE, 16)) is None  # and nobody left for one that finds no room
    assert (full.bytes_of(ONLINE), full.bytes, full.count) == (85, 85, 2)


def test_a_class_has_room_for_one_wherever_anybody_may_wait() -> None:
    assert [put(room(1), held(work_class)) for work_class in range(3)] == [True] * 3
    assert not put(room(0), held(ONLINE))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.booleans()), max_size=60))
def test_the_bounds_hold_whoever_comes_and_goes(
    steps: list[tuple[int, int, bool]],
) -> None:
    full = room(10, 100)
    inside: list[Held] = []
    for work_class, size, comes in steps:
        if comes:
            one = held(work_class, size)
            leaving = full.enter(one)
            if leaving is not None:
                assert all(other.request.work_class > work_class for other in leaving)
                for other in leaving:
                    full.leave(other)
                    inside.remove(other)
                inside.append(one)
        elif inside:
            full.leave(inside.pop(0))
        assert full.count == len(inside) <= 10
        for number in range(len(NAMES)):
            theirs = [one for one in inside if one.request.work_class == number]
            assert full.count_of(number) == len(theirs) <= -(-10 * SHARES[number] // 1)
            assert full.bytes_of(number) == sum(one.held_bytes for one in theirs)
        assert full.bytes == sum(one.held_bytes for one in inside) <= 100
        ages = [full.oldest_s(number, 1.0) for number in range(len(NAMES))]
        assert ages == [1.0 if full.count_of(number) else 0.0 for number in range(len(NAMES))]


# --- when to come again -------------------------------------------------------------------------

_COMING = Prospect("m", wakes=True, coming=1, ready_in_s=10.0, start_s=40.0)


def test_one_is_told_to_come_when_as_many_have_left_as_wait_now() -> None:
    nothing = Prospect("m")
    assert retry_after_s(30, 2.0, 1, nothing) == 15
    assert retry_after_s(0, 2.0, 1, nothing) == 1
    assert retry_after_s(10_000, 2.0, 1, nothing) == RETRY_AFTER_S_MAX
    assert retry_after_s(10, 0.0, 1, nothing) == RETRY_AFTER_S_MAX


def test_what_comes_up_shortens_the_wait() -> None:
    assert retry_after_s(100, 2.0, 1, _COMING) == 30  # ten seconds of one, then of two
    assert retry_after_s(10, 2.0, 1, _COMING) == 5  # it is over before
    assert retry_after_s(500, 0.0, 1, _COMING) == 10  # nobody has left yet
    assert retry_after_s(500, 0.0, 0, _COMING) == 10
    unknown = Prospect("m", wakes=True, start_s=40.0)
    assert retry_after_s(500, 0.0, 0, unknown) == 40
    assert (start_retry_s(_COMING), start_retry_s(unknown), start_retry_s(Prospect("m"))) == (
        *(10, 40, 0),
    )


@given(
    st.integers(0, 10_000),
    st.floats(0, 1e4),
    st.integers(0, 50),
    st.integers(0, 50),
    st.floats(0, 1e5),
)
def test_it_is_always_what_clients_obey(
    count: int, pace: float, awake: int, coming: int, ready_in_s: float
) -> None:
    prospect = Prospect("m", coming=coming, ready_in_s=ready_in_s, start_s=ready_in_s)
    assert 1 <= retry_after_s(count, pace, awake, prospect) <= RETRY_AFTER_S_MAX


def test_the_pace_is_that_of_the_last_seconds_in_which_any_waited() -> None:
    pace = Pace()
    pace.begin(0.0)
    for second in range(1, 11):
        pace.left(float(second))
    assert 0.9 <= pace.per_s(10.0) <= 1.1
    pace.begin(1000.0)
    assert 0.9 <= pace.per_s(1000.0) <= 1.1
    assert pace.per_s(1060.0) < 0.1


def of(account: Account, size: int = 1) -> Held:
    """Return one of a tenant's."""
    one = held(account.work_class, size)
    one.account = account
    return one


def test_a_newcomer_takes_the_place_of_the_latest_of_who_has_most_for_his_weight() -> None:
    full = room(8)
    flood, light, twice = (Account(ONLINE, name, weight) for name, weight in
                           (("flood", 1.0), ("light", 1.0), ("twice", 2.0)))  # fmt: skip
    ours = [of(flood) for _ in range(8)]
    assert all(put(full, one) for one in ours)
    assert not put(full, of(flood))
    taken = [full.enter(of(light)) for _ in range(1)]
    assert taken == [[ours[7]]]
    full.leave(ours[7])
    assert [put(full, of(light)) for _ in range(3)] == [True] * 3
    assert not put(full, of(light))  # both have four
    assert [put(full, of(twice)) for _ in range(5)] == [True] * 4 + [False]
    assert full.count == 8


def test_octets_count_as_places_do() -> None:
    full = room(100, 100)
    flood, light = (Account(ONLINE, name, 1.0) for name in ("flood", "light"))
    large = [of(flood, 10) for _ in range(9)]
    assert all(put(full, one) for one in large)
    assert put(full, of(light, 10))
    assert full.enter(of(light, 20)) == [large[8], large[7]]
    for one in large[7:]:
        full.leave(one)
    assert (full.bytes, full.count) == (100, 9)
    assert full.enter(of(light, 60)) is None  # that would be more than the other has then


def test_no_tenant_takes_a_place_of_another_class_that_is_as_urgent_or_more() -> None:
    full = room(4)
    online, offline = (Account(work_class, "a", 1.0) for work_class in (ONLINE, OFFLINE))
    assert all(put(full, of(online)) for _ in range(4))
    assert not put(full, of(offline))
    assert not put(full, of(Account(OFFLINE, "b", 100.0)))


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 40), st.booleans()),
        max_size=60,
    )
)
def test_the_bounds_hold_for_tenants_too(steps: list[tuple[int, int, int, bool]]) -> None:
    full = room(10, 100)
    accounts = {
        (work_class, name): Account(work_class, str(name), 1.0 + name)
        for work_class in range(3)
        for name in range(4)
    }
    inside: dict[Held, None] = {}
    for work_class, name, size, leaves in steps:
        if leaves and inside:
            one = next(iter(inside))
            del inside[one]
            full.leave(one)
        one = of(accounts[work_class, name], size)
        leaving = full.enter(one)
        for other in leaving or ():
            del inside[other]
            full.leave(other)
            assert other.account is not one.account
        if leaving is not None:
            inside[one] = None
        assert full.count == len(inside) <= 10
        assert full.bytes == sum(each.held_bytes for each in inside) <= 100
    for one in inside:
        full.leave(one)
    assert full._parts == {}
