"""What others decided is known wherever it counts, not only where a replica is chosen."""

from __future__ import annotations

import pytest

from proxy.contract import LoadSample, ReplicaRecord
from proxy.core import limits, note_wire, notes
from proxy.core.note_ring import Said
from proxy.core.prefix import PrefixChain
from proxy.io import control
from proxy.io.sharing import next_pause_s
from proxy.io.tally import summary_of
from tests.fakes.plane import Bench, answer, chat_request, inflight, records, until
from tests.io.test_noting import Others, dispatched

SIBLING = 3
(A,) = records("a")
STREAMED = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hello"}]}'


def dispatched_to(name: str, lease_id: int, tokens: int) -> bytes:
    lease = notes.OpenLease(
        lease_id, notes.replica_key(name), tokens, 0, 4 * tokens, stream=True, weight=1.0
    )
    return note_wire.write_dispatched(lease, PrefixChain(0, (7,), (4 * tokens,), 4 * tokens))


class Sibling(Others):
    """Another worker of the proxy."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.bench = bench

    def say(self, note: bytes, ago_s: float = 0.0) -> None:
        self.sibling.writer.write(SIBLING, self.bench.clock.now_s() - ago_s, note)

    def leave(self) -> None:
        self.bench.plane.sharing.obey(self.channel, control.Gone(SIBLING))


async def test_a_first_octet_behind_anothers_is_not_taken_for_one_that_took_no_time(
    bench: Bench,
) -> None:
    sibling = Sibling(bench)
    sibling.say(dispatched(1, 1000))
    _, engine = await bench.begun(chat_request(STREAMED))
    (lease,) = bench.plane.leases
    bench.clock.advance(0.1)
    sibling.say(note_wire.write_prefill_ended(1))
    bench.clock.advance(0.25)
    bench.plane.prefill_ended(lease, bench.clock.now_s())
    assert lease.head_s == 0.25
    engine.send(answer())
    await bench.settle()
    sibling.leave()


async def test_what_siblings_have_just_sent_there_is_no_work_of_other_routers(
    bench: Bench,
) -> None:
    sibling, loads = Sibling(bench), bench.plane.picture.loads
    slot = bench.plane.picture.slots["a"]
    for lease_id in range(4):
        sibling.say(dispatched(lease_id, 1000), ago_s=0.1)
    bench.publish(loaded(A, running=4))
    assert loads.foreign_share([slot]) == 0.0
    bench.publish(loaded(A, running=5))
    assert loads.foreign_share([slot]) == 0.2
    sibling.leave()


def loaded(record: ReplicaRecord, running: int) -> ReplicaRecord:
    return ReplicaRecord(
        replica_id=record.replica_id,
        url=record.url,
        models=record.models,
        load=LoadSample(at_s=float(running), running=running),
    )


async def test_other_regions_are_told_of_a_replica_with_what_siblings_have_sent_there(
    bench: Bench,
) -> None:
    sibling = Sibling(bench)
    before = summary_of(bench.plane)["m"]
    sibling.say(dispatched(1, 100_000))
    after = summary_of(bench.plane)["m"]
    assert (before.free > 0, before.wait_s) == (True, 0.0)
    assert (after.free, after.wait_s > 1.0) == (0, True)
    sibling.leave()


async def test_who_needs_nothing_reads_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SWEEP_INTERVAL_S", 0.01)
    sibling, sharing = Sibling(bench), bench.plane.sharing
    bench.tasks.start("notes", sharing.read_regularly())
    for lease_id in range(3):
        sibling.say(dispatched(lease_id, 1000))
        await until(lambda count=lease_id + 1: sharing.hearsay.leases() == count)
    sibling.leave()


@pytest.mark.parametrize("per_s", [0, 50, 1000, 4000, 1_000_000])
def test_the_more_is_said_the_more_often_it_is_read_and_never_much_at_once(per_s: int) -> None:
    pause_s = limits.SWEEP_INTERVAL_S
    for _ in range(8):
        pause_s = next_pause_s(pause_s, int(per_s * pause_s))
    fitting_s = limits.NOTES_TURN_MAX / max(1, per_s)
    wanted_s = min(max(fitting_s, limits.NOTES_READ_S_MIN), limits.SWEEP_INTERVAL_S)
    assert pause_s == pytest.approx(wanted_s, rel=0.02)
    for _ in range(8):  # and seldom again
        pause_s = next_pause_s(pause_s, 0)
    assert pause_s == limits.SWEEP_INTERVAL_S


async def test_what_fails_when_it_is_heard_fails_no_request_and_hides_nothing_that_follows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sibling, plane = Sibling(bench), bench.plane
    hear = plane.sharing.hear

    def heard(said: Said, now_s: float) -> None:
        assert said.batch != b"bad"
        hear(said, now_s)

    monkeypatch.setattr(plane.sharing, "hear", heard)
    sibling.say(b"bad")
    sibling.say(dispatched(1, 1000))
    client, engine = await bench.begun()
    engine.send(answer())
    await bench.settle()
    assert client.answer().status == 200
    assert plane.sharing.hearsay.leases() == 1
    assert plane.telemetry.internal_errors_total == 1
    plane.telemetry.internal_errors_total = 0
    sibling.leave()


async def test_what_was_said_of_a_replica_before_we_knew_it_is_asked_for_again(
    bench: Bench,
) -> None:
    sibling = Sibling(bench)
    sibling.say(dispatched_to("b", 1, 1000))
    bench.plane.catch_up()  # a request comes before the fleet that its siblings know already
    bench.publish(A)
    assert not sibling.channel.heard(control.Missed)
    sibling.say(dispatched_to("b", 2, 1000))
    bench.publish(*records("ab"))
    assert len(sibling.channel.heard(control.Missed)) == 1
    bench.publish(*records("ab"))
    assert not sibling.channel.heard(control.Missed)
    lease = notes.OpenLease(2, notes.replica_key("b"), 1000, 0, 4000, stream=True, weight=1.0)
    for note in note_wire.write_open_leases([lease], 3):
        sibling.say(note)
    bench.plane.catch_up()
    assert inflight(bench.plane, "b") == 1
    sibling.leave()
