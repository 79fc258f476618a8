"""Workers of several managers may have one name: the desk tells them apart, managers need not."""

from __future__ import annotations

import pytest

from backends.clock import SystemClock
from backends.log import Log
from backends.offline.abilities import Abilities
from backends.offline.needs_telling import NeedsTeller
from backends.offline.store import Store
from backends.offline.work import ID_LENGTH_MAX, Ask, name_of, spare_worker, worker_at
from tests.fakes.stored_jobs import CHAT, begun_job, given, numbers, report


def test_a_worker_has_an_id_for_each_place_and_its_name_in_all() -> None:
    ids = {worker_at("m-0", place) for place in ("here", "there")}
    assert len(ids) == 2
    assert {name_of(each) for each in ids} == {"m-0"}
    assert worker_at("m-0", "here") in ids, "it is the same whenever it begins there"
    assert len(worker_at("m" * 500, "here")) == ID_LENGTH_MAX
    assert name_of("worker") == "worker"
    spare = spare_worker("spare-1a2b", "m@v2")
    assert name_of(spare) == spare


async def test_a_namesake_that_begins_elsewhere_buries_nothing(store_url: str) -> None:
    store = await Store.open(store_url)
    await begun_job(store, 20)
    here, there = worker_at("m-0", "here"), worker_at("m-0", "there")
    held = await given(store, here, lines_max=8)
    first = Ask(worker_id=there, models=("m",), urls=(CHAT,), lines_max=20, first=True)
    chunk = await store.ask(first)
    assert chunk is not None
    assert set(numbers(chunk)).isdisjoint(numbers(held))
    assert (await report(store, held, held.lines, worker_id=here)).accepted == 8
    await report(store, chunk, chunk.lines, worker_id=there, done=True)
    teller = NeedsTeller(store, "s", Abilities(), lambda _: False, SystemClock(), Log())
    told = (await teller.needs()).rates
    assert told == {"m-0": pytest.approx(sum(store.rates().values()), rel=0.2)}
    await store.close()
