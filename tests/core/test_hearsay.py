"""What others say becomes part of the picture, whatever of it is lost, and leaves it with them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits, note_wire, notes
from proxy.core.hearsay import Hearsay
from proxy.core.notes import OpenLease
from proxy.core.picture import Picture
from proxy.core.prefix import PrefixChain
from proxy.core.responses import Responses
from proxy.core.usage import Usage
from tests.core.builders import replica

A, B = notes.replica_key("a"), notes.replica_key("b")
CHAIN = PrefixChain(0, (11, 12, 13), (400, 800, 1200), 1200)


class Listener:
    """A picture of the replicas `a` and `b`, and what is heard of them."""

    def __init__(self) -> None:
        self.picture = Picture()
        self.picture.know([replica("a"), replica("b")])
        self.responses = Responses()
        self.hearsay = Hearsay(self.picture, self.responses)
        self.hearsay.know(self.picture.slots)

    def hear(self, *batch: bytes, origin: int = 1, now_s: float = 0.0) -> str | None:
        return self.hearsay.hear(origin, b"".join(batch), now_s)

    def inflight(self, name: str = "a") -> int:
        return self.picture.loads.inflight[self.picture.slots[name]]

    def queued_tokens(self, name: str = "a") -> int:
        return self.picture.loads.prefilling.queued_tokens(self.picture.slots[name])

    def cached(self, name: str = "a", chain: PrefixChain = CHAIN) -> int:
        return self.picture.index.held_of(self.picture.slots[name], chain)


def opened(lease_id: int, key: int = A, *, ended: bool = False) -> OpenLease:
    return OpenLease(lease_id, key, 300, 100, 1200, stream=True, weight=1.0, prefill_ended=ended)


def sent(lease_id: int, key: int = A) -> bytes:
    return note_wire.write_dispatched(opened(lease_id, key), CHAIN)


def whole(*leases: OpenLease, next_id: int = 100) -> bytes:
    return b"".join(note_wire.write_open_leases(leases, next_id))


def test_what_yields_is_known_from_its_dispatch_or_a_list_to_its_first_octet_or_end() -> None:
    def yielding(lease_id: int, *, ended: bool = False) -> OpenLease:
        return OpenLease(
            *(lease_id, A, 300, 100, 1200),
            stream=True,
            weight=1.0,
            prefill_ended=ended,
            yields=True,
        )

    def known() -> list[tuple[int, int]]:
        return [(lease.lease_id, origin) for lease, origin in listener.hearsay.yielding.items()]

    listener = Listener()
    for ours in (False, True):
        told = note_wire.write_dispatched(yielding(5), CHAIN) + whole(
            *(yielding(5), yielding(6), yielding(7), yielding(8, ended=True), opened(9))
        )
        assert listener.hearsay.hear(1 + ours, told, 0.0, ours=ours) is None
    assert known() == [(5, 2), (6, 2), (7, 2)]
    listener.hear(note_wire.write_prefill_ended(5), origin=2)
    assert known() == [(6, 2), (7, 2)]
    listener.hear(note_wire.write_released(6, None), origin=2)
    assert known() == [(7, 2)]
    listener.hear(whole(yielding(7, ended=True)), origin=2)
    assert known() == []
    told = note_wire.write_dispatched(yielding(10), CHAIN)
    assert listener.hearsay.hear(2, told, 0.0, ours=True) is None
    assert known() == [(10, 2)]
    listener.hearsay.forget(2, 0.0)
    assert known() == []


def test_a_request_of_another_weighs_as_one_of_ours_from_its_dispatch_to_its_end() -> None:
    listener = Listener()
    assert listener.hear(sent(5)) is None
    assert (listener.inflight(), listener.queued_tokens(), listener.cached()) == (1, 300, 1200)
    assert listener.hearsay.inflight == {"a": 1}
    listener.hear(note_wire.write_prefill_ended(5), now_s=0.1)
    assert (listener.inflight(), listener.queued_tokens()) == (1, 0)
    listener.hear(note_wire.write_released(5, Usage(400, 20, 100)), now_s=0.3)
    assert (listener.inflight(), listener.hearsay.leases()) == (0, 0)
    assert listener.picture.tokens_of(1200, 0) != 300  # its counts have taught us, too
    assert listener.cached() == 1200


def test_what_a_list_of_open_leases_does_not_name_is_over_and_what_it_names_is_taken_on() -> None:
    listener = Listener()
    listener.hear(sent(5), sent(6), sent(8))
    listener.hear(whole(opened(6), opened(7), opened(8, ended=True), opened(9, B, ended=True)))
    assert listener.inflight() == 3
    assert listener.queued_tokens() == 600
    assert (listener.inflight("b"), listener.queued_tokens("b")) == (1, 0)
    listener.hear(whole())
    assert listener.inflight() == listener.inflight("b") == listener.hearsay.leases() == 0
    assert listener.queued_tokens() == 0


def test_a_lease_is_told_twice_and_counts_once() -> None:
    listener = Listener()
    listener.hear(sent(5), sent(5), whole(opened(5)), note_wire.write_prefill_ended(5))
    listener.hear(note_wire.write_prefill_ended(5))
    assert (listener.inflight(), listener.queued_tokens()) == (1, 0)
    listener.hear(note_wire.write_released(5, None), note_wire.write_released(5, None))
    assert listener.inflight() == 0


def test_with_an_origin_goes_what_it_held_and_nothing_else() -> None:
    listener = Listener()
    listener.hear(sent(5), origin=1)
    listener.hear(sent(5), sent(6, B), origin=2)
    listener.hearsay.forget(2, 1.0)
    listener.hearsay.forget(3, 1.0)
    assert (listener.inflight("a"), listener.inflight("b")) == (1, 0)
    assert listener.hearsay.inflight == {"a": 1}
    assert listener.cached("b") == 1200


def test_of_a_broken_batch_the_beginning_counts_and_then_the_origin_starts_anew() -> None:
    listener = Listener()
    listener.hear(sent(4))
    fault = listener.hear(sent(5), note_wire.write_cleared(B), b"\xff", sent(6))
    assert fault is not None
    assert "kind 255" in fault
    assert listener.inflight() == listener.hearsay.leases() == 0
    assert listener.cached() == 1200
    assert listener.hear(whole(opened(5))) is None
    assert listener.inflight() == 1


def test_replicas_that_we_do_not_know_are_passed_over() -> None:
    listener = Listener()
    far = notes.replica_key("far")
    listener.hear(sent(5, far), whole(opened(6, far)), note_wire.write_released(5, None))
    listener.hear(note_wire.write_evicted(far, [11]), note_wire.write_cleared(far))
    listener.hear(note_wire.write_holds(far, [1], [1]))
    listener.hear(note_wire.write_state(notes.State(far, True, 1, 1, 0.5)))
    assert listener.hearsay.leases() == 0
    assert listener.hearsay.states == {}
    listener.hear(note_wire.write_response(1, far))
    assert listener.responses.place_of(1) is None
    assert listener.hearsay.unknown_total == 7


def test_leases_on_a_replica_that_goes_are_ended_in_vain() -> None:
    listener = Listener()
    listener.hear(sent(5), sent(6, B))
    listener.picture.know([replica("b")])
    listener.hearsay.know(listener.picture.slots)
    listener.hear(note_wire.write_prefill_ended(5), note_wire.write_released(5, None), sent(7))
    assert listener.inflight("b") == listener.hearsay.leases() == 1


def test_engines_events_and_digests_change_what_is_cached_where() -> None:
    listener = Listener()
    listener.hear(note_wire.write_holds(B, CHAIN.hashes, (400, 400, 400)))
    assert listener.cached("b") == 1200
    listener.hear(note_wire.write_evicted(B, [13]))
    assert listener.cached("b") == 800
    listener.hear(note_wire.write_cleared(B))
    assert listener.cached("b") == 0
    listener.hear(note_wire.write_state(notes.State(B, True, 5000, -1, -1.0)))
    assert listener.hearsay.states["b"].resident_tokens == 5000
    listener.hearsay.know(["a"])
    assert listener.hearsay.states == {}


def test_who_keeps_a_stored_answer_is_known_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "RESPONSES_MAX", 2)
    listener = Listener()
    listener.hear(
        *(note_wire.write_response(n, key) for n, key in ((1, A), (2, A), (1, B), (3, A)))
    )
    assert list(listener.responses.dump()) == [(1, "b"), (3, "a")]
    assert listener.responses.place_of(1) == "b"
    assert listener.responses.place_of(2) is None


def test_the_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FOREIGN_LEASES_MAX", 2)
    monkeypatch.setattr(limits, "ORIGINS_MAX", 2)
    listener = Listener()
    listener.hear(sent(1, B), sent(2, B), sent(3))
    assert (listener.inflight("a"), listener.inflight("b")) == (0, 2)
    assert listener.cached() == 1200  # that much is heard
    listener.hear(whole(opened(1), opened(2), opened(3)))
    assert listener.hearsay.leases() == 2
    listener.hear(sent(1), origin=2)
    listener.hear(sent(1), origin=3)
    assert listener.hearsay.leases() == 3
    assert listener.hearsay.full_total == 3


EVENTS = st.lists(st.tuples(st.sampled_from("adddpr"), st.integers(0, 9), st.booleans()))


@given(EVENTS, st.integers(0, notes.IDS - 1))
def test_whatever_is_lost_one_list_puts_right(
    events: list[tuple[str, int, bool]], first_id: int
) -> None:
    """`d`ispatch, `p`refill ended, `r`elease and list `a`ll, each of them lost or heard."""
    listener, next_id = Listener(), first_id
    held: dict[int, OpenLease] = {}
    for step, (what, which, is_heard) in enumerate(events):
        batch = b""
        if what == "d":
            held[next_id] = opened(next_id, A if which % 2 else B)
            batch = note_wire.write_dispatched(held[next_id], CHAIN)
            next_id = (next_id + 1) % notes.IDS
        elif what == "a":
            batch = whole(*held.values(), next_id=next_id)
        elif held:
            lease = held[list(held)[which % len(held)]]
            if what == "p":
                lease.prefill_ended = True
                batch = note_wire.write_prefill_ended(lease.lease_id)
            else:
                del held[lease.lease_id]
                batch = note_wire.write_released(lease.lease_id, None)
        if is_heard:
            assert listener.hear(batch, now_s=float(step)) is None
    listener.hear(whole(*held.values(), next_id=next_id), now_s=float(len(events)))
    for name, key in (("a", A), ("b", B)):
        mine = [lease for lease in held.values() if lease.replica_key == key]
        assert listener.inflight(name) == len(mine)
        queued = [lease for lease in mine if not lease.prefill_ended]
        assert listener.queued_tokens(name) == 300 * len(queued)
    listener.hearsay.forget(1, 1e6)
    assert listener.inflight("a") == listener.inflight("b") == 0
    assert listener.picture.loads.present[:2] == [0.0, 0.0]


def _turns(session: int, turns: int) -> PrefixChain:
    """All sessions begin alike; each turn repeats what was before it."""
    ends = [(turn + 1) * 1024 for turn in range(turns)]
    names = [turn if turn < 2 else session * 1000 + turn for turn in range(turns)]
    return PrefixChain(session, names, ends, ends[-1])


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 6), st.integers(1, 8)), max_size=60),
    st.integers(0, 60),
)
def test_telling_only_what_was_not_in_use_just_now_makes_the_same_picture(
    requests: list[tuple[bool, int, int]], lost_until: int
) -> None:
    teller, listener = Listener(), Listener()
    for number, (at_a, session, turns) in enumerate(requests):
        chain, name = _turns(session, turns), "a" if at_a else "b"
        slot = teller.picture.slots[name]
        lease = teller.picture.lease(name, slot, chain, cached_octets=0, streamed=True, weight=1.0)
        teller.picture.dispatched(lease, chain, 0.0)
        if number == lost_until:
            teller.picture.index.renew()
        if number >= lost_until:
            listener.hear(
                note_wire.write_dispatched(
                    opened(number, notes.replica_key(name)), chain, lease.first_noted
                )
            )
    for at_a, session, turns in requests[lost_until + 1 :]:
        chain, name = _turns(session, turns), "a" if at_a else "b"
        assert listener.cached(name, chain) == teller.cached(name, chain) == turns * 1024
        head = _turns(session, 1)  # as good for those that have only the beginning in common
        assert listener.cached(name, head) == 1024


def test_of_a_prompt_that_goes_on_only_the_new_end_is_told() -> None:
    picture = Listener().picture
    sizes = []
    for turns in (6, 7, 8, 8):
        chain = _turns(1, turns)
        lease = picture.lease("a", 0, chain, cached_octets=0, streamed=True, weight=1.0)
        picture.dispatched(lease, chain, 0.0)
        sizes.append(len(chain.hashes) - lease.first_noted)
    assert sizes == [6, 2, 2, 1]
    picture.index.renew()
    picture.dispatched(lease, _turns(1, 8), 0.0)
    assert lease.first_noted == 0
