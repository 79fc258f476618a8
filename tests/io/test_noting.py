"""A worker tells what it decides while somebody listens, and falls behind without harm."""

from __future__ import annotations

import asyncio

import pytest

from proxy.core import limits, note_wire, notes
from proxy.core.hearsay import Hearsay
from proxy.core.notes import Dispatched, Holds, OpenLeases, PrefillEnded, Released, Response
from proxy.core.prefix import PrefixChain
from proxy.core.responses import Responses
from proxy.io import control
from proxy.io.plane import Plane
from proxy.io.sharing import recital_s
from tests.fakes.hub import FakeChannel
from tests.fakes.plane import Bench, answer, records, until

USAGE = (
    b'{"usage":{"prompt_tokens":7,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}'
)
KEY = notes.replica_key("a")


def listened_to(bench: Bench) -> FakeChannel:
    channel = FakeChannel()
    bench.plane.noting.connect(channel)
    bench.plane.noting.listen(on=True)
    channel.told.clear()
    return channel


def said(channel: FakeChannel) -> list[notes.Note]:
    """Return the notes that were sent, and forget them."""
    return [
        note for sent in channel.heard(control.Noted) for note in note_wire.read_notes(sent.batch)
    ]


async def request(bench: Bench, *, finished: bool = True) -> None:
    _, engine = await bench.begun()
    if finished:
        engine.send(answer(USAGE))
        await bench.settle()


@pytest.fixture(autouse=True)
def _quiet(bench: Bench) -> object:
    yield
    bench.plane.noting.close()


async def test_a_request_is_told_from_its_dispatch_to_its_end_in_one_batch(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NOTES_FLUSH_S", 60.0)  # however busy the machine is
    channel = listened_to(bench)
    await request(bench)
    assert channel.told == []
    timer = bench.plane.noting._timer
    assert isinstance(timer, asyncio.TimerHandle)
    timer._run()
    (sent,) = channel.told
    assert isinstance(sent, control.Noted)
    assert sent.at_s == bench.clock.now_s()
    dispatched, *_, released = note_wire.read_notes(sent.batch)
    assert isinstance(dispatched, Dispatched)
    assert isinstance(released, Released)
    assert dispatched.lease.replica_key == KEY
    assert dispatched.lease.lease_id == released.lease_id
    assert dispatched.lease.prompt_bytes > 0
    assert list(dispatched.hashes)
    assert released.usage == (7, 3, 4)


async def test_the_end_of_a_prefill_is_told_once(bench: Bench) -> None:
    channel = listened_to(bench)
    await request(bench, finished=False)
    (lease,) = bench.plane._leases.values()
    for _ in range(2):
        bench.plane.prefill_ended(lease, bench.clock.now_s())
    bench.plane.noting.tell_all()
    told = said(channel)
    assert [type(note) for note in told] == [Dispatched, PrefillEnded, OpenLeases]
    assert isinstance(told[-1], OpenLeases)
    assert [each.prefill_ended for each in told[-1].leases] == [True]


async def test_nothing_is_told_to_nobody_and_what_is_open_to_who_comes(bench: Bench) -> None:
    channel = FakeChannel()
    bench.plane.noting.connect(channel)
    await request(bench)
    await request(bench, finished=False)
    await asyncio.sleep(3 * limits.NOTES_FLUSH_S)
    assert channel.told == []
    bench.plane.noting.listen(on=True)
    (told,) = said(channel)
    assert isinstance(told, OpenLeases)
    assert [lease.lease_id for lease in told.leases] == list(bench.plane._leases)
    bench.plane.noting.listen(on=True)
    assert channel.told == []
    bench.plane.noting.listen(on=False)
    await request(bench)
    await asyncio.sleep(3 * limits.NOTES_FLUSH_S)
    bench.plane.noting.tell_all()
    assert channel.told == []


async def test_a_large_batch_goes_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NOTES_FLUSH_S", 60.0)
    monkeypatch.setattr(limits, "NOTES_BATCH_BYTES_MAX", 20)
    channel = listened_to(bench)
    bench.plane.noting.stored(1, "a")
    assert channel.told == []
    bench.plane.noting.stored(2, "a")
    assert len(said(channel)) == 2


async def test_what_comes_alone_goes_at_once_and_what_follows_it_is_collected(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NOTES_FLUSH_S", 60.0)
    channel = listened_to(bench)
    bench.clock.advance(61.0)
    bench.plane.noting.stored(1, "a")
    assert channel.told == []
    await asyncio.sleep(0)
    assert len(said(channel)) == 1
    bench.plane.noting.stored(2, "a")
    await asyncio.sleep(0)
    assert channel.told == []


async def test_who_decides_much_collects_for_longer_until_it_decides_little(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NOTES_FLUSH_BUSY_S", 0.03)
    channel = listened_to(bench)
    loop = asyncio.get_running_loop()
    for count, slow in ((40, False), (2, True), (2, False)):
        begun_s = loop.time()
        for _ in range(count):
            bench.plane.noting.stored(1, "a")
        await until(lambda: channel.told)
        assert len(said(channel)) == count
        if slow:
            assert loop.time() - begun_s >= 0.02
    assert not bench.plane.noting._busy


async def test_what_a_supervisor_that_is_behind_misses_is_told_as_a_whole(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NOTES_WHOLE_S", 0.01)
    channel = listened_to(bench)
    noting = bench.plane.noting
    channel.waiting = limits.NOTES_WAITING_BYTES_MAX + 1
    await request(bench, finished=False)
    await until(lambda: noting.dropped_total >= 2)  # the dispatch, and a list
    assert channel.told == []
    channel.waiting = 0
    await until(lambda: channel.told)
    (told,) = said(channel)
    assert isinstance(told, OpenLeases)
    assert len(told.leases) == 1
    await asyncio.sleep(0.05)
    assert channel.told == []  # nothing has changed since
    assert len(bench.plane.leases) == 1


# --- what others say -----------------------------------------------------------------------------


async def test_a_worker_says_which_origin_it_cannot_read(bench: Bench) -> None:
    channel = FakeChannel()
    bench.plane.sharing.obey(channel, control.Heard(3, 0.0, b"\xff"))
    (garbled,) = channel.heard(control.Garbled)
    assert garbled.origin == 3
    assert "kind 255" in garbled.reason
    counters = {(s.name, s.labels): s.value for s in bench.plane.sharing.counters()}
    assert counters["notes_lost_total", (("reason", "garbled"),)] == 1


def filled(plane: Plane, name: str, count: int) -> None:
    hashes = range(1, count + 1)
    for n in hashes:
        plane.picture.index.note(plane.picture.slots[name], PrefixChain(0, (n,), (64,), 64))


async def recited(
    plane: Plane, channel: FakeChannel, listener: Hearsay | None = None
) -> dict[int, list[int]]:
    """Have a plane tell what is cached where; return the hashes by replica."""
    plane.sharing.obey(channel, control.Recite(9))
    await until(lambda: channel.told and channel.told[-1] == control.Page(9, b"", last=True))
    found: dict[int, list[int]] = {}
    for page in channel.heard(control.Page):
        assert page.transfer == 9
        if listener is not None:
            assert listener.hear(1, page.batch, 0.0) is None
        for note in note_wire.read_notes(page.batch):
            if isinstance(note, Response):
                continue
            assert isinstance(note, Holds)
            assert set(note.sizes) == {64}
            found.setdefault(note.replica_key, []).extend(note.hashes)
    return found


async def test_what_is_cached_where_is_told_in_pages(make_bench: type[Bench]) -> None:
    plane = make_bench(records("abc")).plane
    filled(plane, "a", 2500)
    filled(plane, "b", 3)
    for n in range(1500):
        plane.remember_response(n, "a")
    responses = Responses()
    other = Hearsay(plane.picture, responses)
    other.know("abc")
    found = await recited(plane, FakeChannel(), other)
    assert list(responses.dump()) == [(n, "a") for n in range(1500)]
    assert found == {KEY: list(range(1, 2501)), notes.replica_key("b"): [1, 2, 3]}


async def test_of_more_than_a_digest_holds_the_most_recent_is_told(
    make_bench: type[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DIGEST_BYTES_MAX", 2 * 12 * 100)
    plane = make_bench(records("ab")).plane
    filled(plane, "a", 250)
    found = await recited(plane, FakeChannel())
    assert found == {KEY: list(range(151, 251))}


async def test_whoever_waits_for_a_recital_waits_for_all_of_it(
    make_bench: type[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DIGEST_BYTES_MAX", 12 * 3 * 2500)
    monkeypatch.setattr(limits, "RESPONSES_MAX", 1500)
    plane = make_bench(records("abc")).plane
    for name in "abc":
        filled(plane, name, 3000)
    for n in range(2000):
        plane.remember_response(n, "a")
    channel = FakeChannel()
    plane.sharing.obey(channel, control.Recite(9))
    await until(lambda: channel.told and channel.told[-1] == control.Page(9, b"", last=True))
    pages = len(channel.heard(control.Page)) - 1
    assert pages == 3 * 3 + 2
    assert recital_s(3) >= pages * (limits.DIGEST_PAUSE_S + limits.DIGEST_PAGE_S)


def test_a_recital_of_the_most_that_may_be_told_has_more_than_its_pauses() -> None:
    pages = limits.DIGEST_BYTES_MAX // 12 / limits.NOTE_HASHES_MAX
    assert pages * limits.DIGEST_PAUSE_S < recital_s(20) < 10


async def test_of_a_replica_that_goes_meanwhile_no_more_is_told(make_bench: type[Bench]) -> None:
    bench = make_bench(records("ab"))
    filled(bench.plane, "a", 5000)
    channel = FakeChannel()
    bench.plane.sharing.obey(channel, control.Recite(9))
    await until(lambda: channel.told)
    bench.publish(*records("ab")[1:])
    await until(lambda: channel.told[-1] == control.Page(9, b"", last=True))
    assert len(channel.heard(control.Page)) < 5
