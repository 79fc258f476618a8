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
from tests.fakes.hub import FakeChannel, FakeRing
from tests.fakes.plane import Bench, answer, records, until

USAGE = (
    b'{"usage":{"prompt_tokens":7,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}'
)
KEY = notes.replica_key("a")
ORIGIN = 5


class Told(FakeRing):
    """The ring of a bench's worker, and its channel."""

    def __init__(self, bench: Bench, *, hurry: bool = False, on: bool = True) -> None:
        super().__init__()
        self.channel = FakeChannel()
        bench.plane.noting.connect(self.channel, self.writer)
        if on:
            bench.plane.noting.listen(on=True, origin=ORIGIN, hurry=hurry)
            self.said()
            self.hurried()

    def said(self) -> list[notes.Note]:
        """Return the notes that were told since."""
        found = self.reader.take()
        assert {said.origin for said in found} <= {ORIGIN}
        return [note for said in found for note in note_wire.read_notes(said.batch)]

    def hurried(self) -> int:
        """Return how often the supervisor was told since that there are some."""
        return len(self.channel.heard(control.Noted))


async def request(bench: Bench, *, finished: bool = True) -> None:
    _, engine = await bench.begun()
    if finished:
        engine.send(answer(USAGE))
        await bench.settle()


@pytest.fixture(autouse=True)
def _quiet(bench: Bench) -> object:
    yield
    bench.plane.noting.close()


async def test_a_request_is_told_from_its_dispatch_to_its_end(bench: Bench) -> None:
    told = Told(bench)
    begin_s = bench.clock.now_s()
    _, engine = await bench.begun()
    bench.clock.advance(1.5)
    engine.send(answer(USAGE))
    await bench.settle()
    assert told.hurried() == 0  # nobody waits for it
    first, *_, last = told.reader.take()
    assert (first.at_s, last.at_s) == (begin_s, begin_s + 1.5)
    (dispatched,) = note_wire.read_notes(first.batch)
    (released,) = note_wire.read_notes(last.batch)
    assert isinstance(dispatched, Dispatched)
    assert isinstance(released, Released)
    assert dispatched.lease.replica_key == KEY
    assert dispatched.lease.lease_id == released.lease_id
    assert dispatched.lease.prompt_bytes > 0
    assert list(dispatched.hashes)
    assert released.usage == (7, 3, 4)


async def test_the_end_of_a_prefill_is_told_once(bench: Bench) -> None:
    told = Told(bench)
    await request(bench, finished=False)
    (lease,) = bench.plane._leases.values()
    for _ in range(2):
        bench.plane.prefill_ended(lease, bench.clock.now_s())
    bench.plane.noting.tell_all()
    said = told.said()
    assert [type(note) for note in said] == [Dispatched, PrefillEnded, OpenLeases]
    assert isinstance(said[-1], OpenLeases)
    assert [each.prefill_ended for each in said[-1].leases] == [True]


async def test_nothing_is_told_to_nobody_and_what_is_open_to_who_comes(bench: Bench) -> None:
    told = Told(bench, on=False)
    await request(bench)
    await request(bench, finished=False)
    assert told.said() == []
    bench.plane.noting.listen(on=True, origin=ORIGIN)
    (whole,) = told.said()
    assert isinstance(whole, OpenLeases)
    assert [lease.lease_id for lease in whole.leases] == list(bench.plane._leases)
    bench.plane.noting.listen(on=True, origin=ORIGIN)
    assert told.said() == []
    bench.plane.noting.listen(on=False)
    await request(bench)
    bench.plane.noting.tell_all()
    assert told.said() == []


async def test_what_comes_alone_is_hurried_at_once_and_what_follows_it_after_a_moment(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NOTES_FLUSH_S", 60.0)
    told = Told(bench, hurry=True)
    bench.clock.advance(61.0)
    bench.plane.noting.stored(1, "a")
    assert told.hurried() == 0
    await asyncio.sleep(0)
    assert told.hurried() == 1
    for _ in range(2):
        bench.plane.noting.stored(2, "a")
    await asyncio.sleep(0)
    assert told.hurried() == 0
    timer = bench.plane.noting._timer
    assert isinstance(timer, asyncio.TimerHandle)
    timer._run()
    assert told.hurried() == 1


async def test_who_decides_much_hurries_less_until_it_decides_little(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NOTES_FLUSH_BUSY_S", 0.03)
    told = Told(bench, hurry=True)
    loop = asyncio.get_running_loop()
    for count, slow in ((40, False), (2, True), (2, False)):
        begun_s = loop.time()
        for _ in range(count):
            bench.plane.noting.stored(1, "a")
        await until(lambda: told.channel.told)
        assert told.hurried() == 1
        if slow:
            assert loop.time() - begun_s >= 0.02
    assert not bench.plane.noting._busy


async def test_what_is_open_is_told_regularly_as_long_as_something_changes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NOTES_WHOLE_S", 0.01)
    told = Told(bench)
    await request(bench, finished=False)
    said: list[notes.Note] = []

    def more() -> bool:
        said.extend(told.said())
        return len(said) == 2

    await until(more)
    assert isinstance(said[1], OpenLeases)
    assert len(said[1].leases) == 1
    await asyncio.sleep(0.05)
    assert told.said() == []  # nothing has changed since


# --- what others say -----------------------------------------------------------------------------


class Others:
    """What siblings and the supervisor say to a bench's worker, each in a ring."""

    def __init__(self, bench: Bench) -> None:
        self.channel = FakeChannel()
        self.sibling, self.supervisor = FakeRing(), FakeRing()
        rings = [self.sibling.reader, self.supervisor.reader]
        bench.plane.sharing.connect(self.channel, rings)


async def test_a_worker_says_which_origin_it_cannot_read(bench: Bench) -> None:
    others = Others(bench)
    others.sibling.writer.write(3, 0.0, b"\xff")
    bench.plane.catch_up()
    (garbled,) = others.channel.heard(control.Garbled)
    assert garbled.origin == 3
    assert "kind 255" in garbled.reason
    counters = {(s.name, s.labels): s.value for s in bench.plane.sharing.counters()}
    assert counters["notes_lost_total", (("reason", "garbled"),)] == 1


def dispatched(lease_id: int, tokens: int) -> bytes:
    lease = notes.OpenLease(lease_id, KEY, tokens, 0, 4 * tokens, stream=True, weight=1.0)
    return note_wire.write_dispatched(lease, PrefixChain(0, (7,), (4 * tokens,), 4 * tokens))


async def test_a_choice_knows_all_that_was_said_before_it(make_bench: type[Bench]) -> None:
    bench = make_bench(records("ab"))
    others = Others(bench)
    others.sibling.writer.write(3, bench.clock.now_s(), dispatched(1, 100_000))
    _, engine = await bench.begun()
    assert engine.replica_id == "b"
    assert bench.plane.sharing.hearsay.leases() == 1
    bench.plane.sharing.obey(others.channel, control.Gone(3))


async def test_what_is_read_late_counts_from_when_it_was_said_in_the_order_of_all(
    bench: Bench,
) -> None:
    others, loads = Others(bench), bench.plane.picture.loads
    slot = bench.plane.picture.slots["a"]
    begin_s = bench.clock.now_s()
    others.supervisor.writer.write(4, begin_s + 0.2, dispatched(1, 1000))
    others.sibling.writer.write(3, begin_s + 0.1, dispatched(1, 2000))
    bench.clock.advance(0.5)
    bench.plane.catch_up()
    assert [lease.prefill_tokens for lease in loads.prefilling.line[slot]] == [2000, 1000]
    assert [lease.started_s for lease in loads.prefilling.line[slot]] == [
        begin_s + 0.1,
        begin_s + 0.2,
    ]
    others.sibling.writer.write(3, begin_s + 60.0, note_wire.write_prefill_ended(1))
    bench.plane.catch_up()  # nothing is of the future
    assert [lease.prefill_tokens for lease in loads.prefilling.line[slot]] == [1000]
    bench.plane.sharing.obey(others.channel, control.Gone(3))
    bench.plane.sharing.obey(others.channel, control.Gone(4))
    assert loads.inflight[slot] == 0


async def test_what_one_said_before_he_went_is_heard_before_he_is_forgotten(bench: Bench) -> None:
    others, hearsay = Others(bench), bench.plane.sharing.hearsay
    others.sibling.writer.write(3, bench.clock.now_s(), dispatched(1, 1000))
    bench.plane.sharing.obey(others.channel, control.Gone(3))
    bench.plane.catch_up()
    assert (hearsay.heard_total, hearsay.leases()) == (1, 0)


async def test_who_was_overtaken_has_all_told_again(bench: Bench) -> None:
    others = Others(bench)
    size = limits.PEER_FRAME_BYTES_MAX
    for _ in range(limits.NOTES_RING_BYTES // size + 1):
        others.sibling.writer.write(3, 0.0, bytes(size))
    for missed in (1, 0):
        bench.plane.catch_up()
        assert len(others.channel.heard(control.Missed)) == missed
    counters = {(s.name, s.labels): s.value for s in bench.plane.sharing.counters()}
    assert counters["notes_lost_total", (("reason", "overtaken"),)] == 5


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
