"""How many engine workers jobs need: as few as their deadlines allow, the cheapest, and no more."""

from __future__ import annotations

import math

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.offline.sizing import (
    DEADLINE_SHARE,
    PRESSES,
    PRESSES_NO_MORE,
    Crew,
    Hand,
    Size,
    Work,
    presses,
    pressure,
    size,
    size_all,
)
from backends.offline.work import JobNeed

RATE = 1000.0
DAY_S = 86_400.0


def need(tokens: int, due_in_s: float = DAY_S, lines: int = 10_000) -> JobNeed:
    return JobNeed(due_in_s=due_in_s, lines=lines, tokens=tokens)


def crew(pool: str = "p", **fields: object) -> Crew:
    base = Crew(pool=pool, rate=RATE, most=8, start_s=60.0)
    return msgspec.structs.replace(base, **fields)


def one(*needs: JobNeed, budget: float | None = None, **fields: object) -> Size:
    kept = {
        name: fields.pop(name) for name in ("spare_rate", "waited_s", "pressed") if name in fields
    }
    work = msgspec.structs.replace(Work(needs=needs, crews=(crew(**fields),)), **kept)
    return size(work, budget)["p"]


def several(*crews: Crew, tokens: int, due_in_s: float = DAY_S) -> dict[str, int]:
    work = Work(needs=(need(tokens, due_in_s),), crews=crews)
    return {pool: found.workers for pool, found in size(work).items()}


def test_no_work_no_worker_and_some_work_one() -> None:
    assert one().workers == 0
    assert one(need(10_000_000)).workers == 1
    assert one(need(10, lines=1)).workers == 1, "nobody else would do it"
    assert one(min=2).workers == 2


def test_as_many_as_the_deadline_asks_for_and_no_more() -> None:
    # 80 % of 3,600 s less the start: 2,820 s, in which a worker does 2.82 million tokens.
    assert one(need(2_800_000, 3600)).workers == 1
    assert one(need(2_900_000, 3600)).workers == 2
    assert one(need(11_000_000, 3600)).workers == 4
    assert one(need(99_000_000, 3600)).workers == 8, "all there may be, though it is too late"
    assert "too late" in one(need(99_000_000, 3600)).reason
    early = need(2_900_000, 3600), need(100_000_000, DAY_S)
    assert one(*early).workers == 2, "the later deadline asks for no more"


def test_no_start_that_comes_too_late_or_finds_no_lines() -> None:
    assert one(need(1_000_000, 50.0)).workers == 0, "it would be over before one is up"
    assert "due before" in one(need(1_000_000, 50.0)).reason
    assert one(need(1_000_000, 50.0), there=(Hand(),)).workers == 1, "this does what it can"
    assert one(need(1_000_000, 70.0)).workers == 1, "late, but a second one would be later still"
    assert "no GPU" in one(need(1_000_000), most=0).reason
    assert one(need(9_000_000, 3600, lines=200)).workers == 2, "200 lines keep two busy, not four"


def test_spare_capacity_that_is_quick_enough_needs_no_worker() -> None:
    assert one(need(1_000_000, 3600), spare_rate=1000.0).workers == 0
    assert one(need(1_000_000, 3600), spare_rate=300.0).workers == 1, "half of it is believed"
    up = {"there": (Hand(busy=True),)}
    assert one(need(1_000_000, 3600), spare_rate=1000.0, **up).workers == 1, "not to and fro"
    assert one(need(1_000_000, 3600), spare_rate=3000.0, **up).workers == 0


def test_spare_capacity_may_show_first_what_it_does_where_there_is_time() -> None:
    work = need(500_000)
    assert one(work, spare_rate=0.0).workers == 0
    assert one(work, spare_rate=0.0, waited_s=30.0).workers == 1, "it did nothing"
    assert one(work, spare_rate=None).workers == 1, "there is none"
    assert one(work, spare_rate=1.0).workers == 1, "it is too slow"
    assert one(work, spare_rate=0.0, there=(Hand(60.0),)).workers == 1, "one comes already"
    assert one(need(5000, 90.0), spare_rate=0.0).workers == 1, "it is due too soon to wait"
    assert one(need(5000, 130.0), spare_rate=0.0).workers == 0


def test_the_cheapest_for_what_is_left_its_start_included() -> None:
    dear = crew("dear", rate=4000.0, price_per_hour=10.0, start_s=0.0)
    cheap = crew("cheap", rate=1000.0, price_per_hour=2.0, start_s=600.0)
    assert several(dear, cheap, tokens=50_000_000) == {"dear": 0, "cheap": 1}
    assert several(dear, cheap, tokens=100_000) == {"dear": 1, "cheap": 0}, "a start has to pay"
    assert several(dear, cheap, tokens=20_000_000, due_in_s=7200) == {"dear": 0, "cheap": 4}
    assert several(dear, cheap, tokens=20_000_000, due_in_s=3600) == {"dear": 1, "cheap": 8}
    free = crew("unpriced", rate=9000.0)
    assert several(free, cheap, tokens=50_000_000)["unpriced"] == 0, "what it costs nobody knows"
    broken = msgspec.structs.replace(cheap, failing=True)
    assert several(dear, broken, tokens=50_000_000) == {"dear": 1, "cheap": 0}
    two = crew("two", gpus=2, rate=1500.0), crew("one")
    assert several(*two, tokens=50_000_000) == {"two": 0, "one": 1}, "a GPU-hour is the price"


def test_what_is_up_stays_while_it_is_busy_and_no_dearer() -> None:
    busy = (Hand(busy=True),) * 3
    assert one(need(1_000_000), there=busy).workers == 3
    assert one(need(1000, lines=40), there=busy).workers == 3, "they end what they have"
    assert one(need(1000, lines=40), there=(Hand(), *busy)).workers == 3
    assert one(need(1_000_000, lines=900), there=(Hand(),) * 9, most=9).workers == 7
    dear = crew("dear", price_per_hour=9.0, there=busy)
    cheap = crew("cheap", price_per_hour=2.0, there=(Hand(),))
    assert several(dear, cheap, tokens=1_000_000) == {"dear": 0, "cheap": 1}


def test_the_budget_is_kept_and_each_model_gets_its_first_worker_of_it() -> None:
    hurry = Work(needs=(need(20_000_000, 3600),), crews=(crew("a", price_per_hour=2.0),))
    later = Work(needs=(need(20_000_000),), crews=(crew("b", price_per_hour=3.0),))
    sizes = size_all({"later": later, "hurry": hurry}, 9.0)
    assert sizes["hurry"]["a"].workers == 3, "what is due first, but for the other's first one"
    assert sizes["later"]["b"].workers == 1
    assert "budget" in sizes["hurry"]["a"].reason
    assert "budget" not in sizes["later"]["b"].reason
    assert size(hurry, 1.0)["a"].workers == 0
    assert "would cost too much; the budget" in size(hurry, 1.0)["a"].reason
    assert size(hurry)["a"].workers == 8


def test_deadlines_that_need_most_of_what_there_could_be_press_until_there_is_slack() -> None:
    near = need(int(8 * RATE * 3540 * 0.75), 3600)
    assert one(near).presses
    assert "goes before offline work" in one(near).reason
    slack = need(int(8 * RATE * 3540 * 0.6), 3600)
    assert not one(slack).presses
    assert one(slack, pressed=True).presses, "not to and fro"
    assert not one(need(int(8 * RATE * 3540 * 0.4), 3600), pressed=True).presses
    assert not one(need(1000, 3600), most=0).presses, "nobody could take what it would get"
    assert not one().presses


def test_pressure_is_that_of_the_tightest_deadline() -> None:
    needs = need(100, 10.0), need(100, 100.0)
    assert pressure(needs, [(10.0, 0.0)]) == 1.0
    assert pressure(needs, [(10.0, 5.0)]) == 2.0
    assert pressure(needs, []) == math.inf
    assert pressure((), []) == 0.0
    assert presses(PRESSES, pressed=False)
    assert not presses(PRESSES_NO_MORE - 0.01, pressed=True)


NEEDS = st.lists(
    st.builds(
        need,
        st.integers(1, 10**9),
        st.floats(0.0, 2 * DAY_S),
        st.integers(1, 50_000),
    ),
    max_size=5,
).map(lambda needs: tuple(sorted(needs, key=lambda each: each.due_in_s)))
CREWS = st.lists(
    st.builds(
        Crew,
        pool=st.sampled_from(["a", "b", "c"]),
        rate=st.floats(1.0, 1e5),
        start_s=st.floats(0.0, 600.0),
        price_per_hour=st.none() | st.floats(0.0, 100.0),
        gpus=st.integers(0, 8),
        most=st.integers(0, 6),
        there=st.lists(st.builds(Hand, st.floats(0, 60), st.booleans()), max_size=4).map(tuple),
        failing=st.booleans(),
    ),
    max_size=3,
    unique_by=lambda crew: crew.pool,
).map(tuple)


@settings(max_examples=200, deadline=None)
@given(NEEDS, CREWS, st.none() | st.floats(0, 200), st.none() | st.floats(0, 1e5))
def test_never_more_than_may_be_nor_fewer_than_deadlines_ask(
    needs: tuple[JobNeed, ...],
    crews: tuple[Crew, ...],
    budget: float | None,
    spare_rate: float | None,
) -> None:
    work = Work(needs=needs, crews=crews, spare_rate=spare_rate, waited_s=60.0)
    sizes = size(work, budget)
    assert set(sizes) == {each.pool for each in crews}
    spent = 0.0
    for each in crews:
        found = sizes[each.pool]
        assert 0 <= found.workers <= max(each.most, len(each.there))
        assert needs or not found.workers
        assert all(math.isfinite(value) for value in found.terms.values())
        spent += found.workers * (each.price_per_hour or 0.0)
    assert budget is None or spent <= budget + 1e-6
    able = any(
        (each.there and min(hand.ready_in_s for hand in each.there) < needs[-1].due_in_s)
        or (each.most > len(each.there) and each.start_s < needs[-1].due_in_s)
        for each in crews
        if needs
    )
    if needs and able and not spare_rate and budget is None:
        assert sum(found.workers for found in sizes.values()) >= 1
    more = size(msgspec.structs.replace(work, needs=needs[:1]), budget)
    if budget is None and needs and not any(each.there for each in crews):
        fewer = sum(found.workers for found in more.values())
        assert fewer <= sum(found.workers for found in sizes.values()) + 1, "the first due alone"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**8), st.floats(100.0, DAY_S))
def test_it_is_the_least_number_that_is_in_time(tokens: int, due_in_s: float) -> None:
    found = one(need(tokens, due_in_s, lines=50_000), most=50, start_s=10.0)
    each = RATE * (due_in_s * DEADLINE_SHARE - 10.0)
    if found.workers < 50:
        assert found.workers * each >= tokens
    assert found.workers == 1 or (found.workers - 1) * each < tokens
