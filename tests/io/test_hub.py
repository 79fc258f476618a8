"""The hub tells everybody what the others say, once, and waits for nobody."""

from __future__ import annotations

import pytest

from proxy.core import limits, peer_wire
from proxy.core.peer_wire import Frame, WireError
from proxy.io import control
from proxy.io.hub import Hub
from proxy.io.sharing import NOBODY
from tests.fakes.hub import WORKERS, FakeWorker, value


class FakePeer:
    """A link whose other end the test plays."""

    name = "peer"

    def __init__(self) -> None:
        self.waiting_bytes = 0
        self.frames: list[Frame] = []
        self.failure = ""

    def send(self, frame: bytes) -> None:
        self.frames.append(peer_wire.read_frame(frame))

    def fail(self, reason: str) -> None:
        self.failure = reason

    def sent(self, kind: int) -> list[Frame]:
        """Return the frames of one kind, and forget them."""
        found = [frame for frame in self.frames if frame.kind == kind]
        self.frames = [frame for frame in self.frames if frame.kind != kind]
        return found


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Scene:
    """A hub, two workers, and two peers."""

    def __init__(self, workers: int = 2, peers: int = 2) -> None:
        self.clock = Clock()
        self.hub = Hub(WORKERS, self.clock)
        self.hub.know_fleet()
        self.workers = [FakeWorker(self.hub) for _ in range(workers)]
        self.peers = [FakePeer() for _ in range(peers)]
        for peer in self.peers:
            self.hub.link(peer)

    def from_peer(self, frame: bytes, peer: int = 0, delay_s: float = 0.0) -> None:
        self.hub.hear_peer(self.peers[peer], peer_wire.read_frame(frame), delay_s)


def test_what_a_worker_says_reaches_its_siblings_and_all_peers() -> None:
    scene = Scene()
    one, other = scene.workers
    one.note(b"abc", at_s=99.5)
    assert one.batches() == []
    assert other.said() == [(one.origin, 99.5, b"abc")]
    for peer in scene.peers:
        assert peer.sent(peer_wire.NOTES) == [Frame(peer_wire.NOTES, one.origin, 0.5, b"abc")]


def test_who_is_to_give_way_is_told_which_leases_and_the_others_that_somebody_waits() -> None:
    scene = Scene(workers=3)
    asker, owner, third = scene.workers
    scene.hub.hear(asker.origin, control.GiveWay(owner.origin, "a", [5, 7]))
    assert owner.channel.heard(control.GiveWay) == [control.GiveWay(owner.origin, "a", [5, 7])]
    assert third.channel.heard(control.GiveWay) == [control.GiveWay(owner.origin, "a", [])]
    assert asker.channel.heard(control.GiveWay) == []
    assert [peer.sent(peer_wire.NOTES) for peer in scene.peers] == [[] for _ in scene.peers]
    owner.leave()
    scene.hub.hear(asker.origin, control.GiveWay(owner.origin, "a", [5]))
    assert third.channel.heard(control.GiveWay) == []  # there is nobody to wait for


def test_what_a_peer_says_reaches_our_workers_and_no_peer() -> None:
    scene = Scene()
    scene.from_peer(peer_wire.write_notes(7, 0.25, b"abc"), delay_s=0.5)
    scene.from_peer(peer_wire.write_notes(7, 0.0, b"def"), peer=1)
    (first, at_s, batch), (second, _, later) = scene.workers[0].said()
    assert (batch, at_s) == (b"abc", 99.25)
    assert later == b"def"
    assert first != second  # each peer has a 7 of its own
    assert scene.workers[1].batches() == [b"abc", b"def"]
    assert not any(peer.sent(peer_wire.NOTES) for peer in scene.peers)


def test_an_origin_that_is_gone_is_told_of_and_its_number_never_comes_again() -> None:
    scene = Scene()
    one, other = scene.workers
    scene.from_peer(peer_wire.write_notes(7, 0.0, b"abc"))
    scene.from_peer(peer_wire.write_notes(8, 0.0, b"abc"))
    seven, eight = (origin for origin, _, _ in other.said())
    one.leave()
    scene.from_peer(peer_wire.write_gone(7))
    scene.from_peer(peer_wire.write_gone(7))
    scene.hub.unlink(scene.peers[0])
    gone = [message.origin for message in other.channel.heard(control.Gone)]
    assert gone == [one.origin, seven, eight]
    assert scene.peers[1].sent(peer_wire.GONE) == [Frame(peer_wire.GONE, one.origin)]
    successor = FakeWorker(scene.hub)
    assert successor.origin not in (one.origin, seven, eight)


@pytest.mark.parametrize(("workers", "peers", "on"), [(1, 0, False), (2, 0, True), (1, 1, True)])
def test_workers_speak_while_somebody_listens(workers: int, peers: int, *, on: bool) -> None:
    scene = Scene(workers, peers)
    for worker in scene.workers:
        told = worker.channel.heard(control.Listen)[-1]
        assert told == control.Listen(on, worker.origin, hurry=peers > 0)
    for worker in scene.workers[1:]:
        worker.leave()
    for peer in scene.peers:
        scene.hub.unlink(peer)
    last = scene.workers[0].channel.heard(control.Listen)
    assert not last or not (last[-1].on or last[-1].hurry)


class Ear:
    """One who overhears."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, float, bytes]] = []
        self.left: list[int] = []

    def heard(self, origin: int, at_s: float, batch: bytes) -> None:
        self.batches.append((origin, at_s, batch))

    def gone(self, origin: int) -> None:
        self.left.append(origin)


def test_the_supervisor_overhears_and_speaks_to_its_workers_alone() -> None:
    ear = Ear()
    hub = Hub(WORKERS, Clock())
    worker, peer = FakeWorker(hub), FakePeer()
    assert not worker.channel.heard(control.Listen)[-1].on
    hub.overhear(ear)
    assert worker.channel.heard(control.Listen)[-1] == control.Listen(True, worker.origin)
    hub.link(peer)
    worker.note(b"abc", 1.0)
    hub.hear_peer(peer, peer_wire.read_frame(peer_wire.write_notes(7, 0.0, b"def")), 0.0)
    hub.say(b"ghi")
    assert [(at_s, batch) for _, at_s, batch in ear.batches] == [(1.0, b"abc"), (100.0, b"def")]
    assert worker.said()[-1] == (NOBODY, 100.0, b"ghi")
    assert [frame.batch for frame in peer.sent(peer_wire.NOTES)] == [b"abc"]
    hub.unlink(peer)
    worker.leave()
    assert ear.left == [ear.batches[1][0], ear.batches[0][0]]
    hub.overhear(None)
    assert not FakeWorker(hub).channel.heard(control.Listen)[-1].on


def test_a_peer_that_is_behind_misses_notes_and_is_told_all_once_it_has_caught_up() -> None:
    scene = Scene(workers=2, peers=1)
    one, other = scene.workers
    (peer,) = scene.peers
    scene.hub.tick()
    one.channel.told.clear()
    peer.waiting_bytes = limits.NOTES_WAITING_BYTES_MAX + 1
    one.note(b"lost on the peer")
    peer.waiting_bytes = limits.NOTES_WAITING_BYTES_MAX // 2 + 1
    one.note(b"lost, too")
    scene.hub.tick()
    assert one.channel.told == []
    assert other.batches() == [b"lost on the peer", b"lost, too"]
    peer.frames.clear()
    peer.waiting_bytes = 0
    scene.hub.tick()
    assert one.channel.heard(control.Whole)
    one.note(b"all")
    assert [frame.batch for frame in peer.sent(peer_wire.NOTES)] == [b"all"]
    assert not peer.sent(peer_wire.WHOLE)  # it has lost nothing that peers say
    assert value(scene.hub.samples()[0], "note_batches_dropped_total") == 2


def test_a_worker_that_is_behind_misses_what_it_is_sent_and_is_told_all_afterwards() -> None:
    scene = Scene(workers=3, peers=1)
    asker, slow, third = scene.workers
    scene.hub.tick()
    for worker in scene.workers:
        worker.channel.told.clear()
    scene.peers[0].frames.clear()
    slow.channel.waiting = limits.NOTES_WAITING_BYTES_MAX + 1
    scene.hub.hear(asker.origin, control.GiveWay(third.origin, "a", [5]))
    scene.hub.tick()
    assert slow.channel.told == []
    slow.channel.waiting = 0
    scene.hub.tick()
    assert all(worker.channel.heard(control.Whole) for worker in scene.workers)
    assert scene.peers[0].sent(peer_wire.WHOLE)


def test_what_a_reader_was_overtaken_by_is_told_as_a_whole() -> None:
    scene = Scene(workers=2, peers=1)
    one, other = scene.workers
    (peer,) = scene.peers
    scene.hub.tick()
    for _ in range(2):
        one.channel.told.clear()
        peer.frames.clear()
        scene.hub.hear(other.origin, control.Missed())
        scene.hub.tick()
        assert one.channel.heard(control.Whole)
        assert peer.sent(peer_wire.WHOLE)
    size = limits.PEER_FRAME_BYTES_MAX
    for _ in range(limits.NOTES_RING_BYTES // size + 1):
        one.ring.write(one.origin, 0.0, bytes(size))
    scene.hub.tick()
    assert one.channel.heard(control.Whole)
    assert not peer.sent(peer_wire.NOTES)
    assert value(scene.hub.samples()[0], "note_batches_dropped_total") == 5


def test_what_was_said_by_one_in_a_moment_goes_to_peers_in_batches() -> None:
    scene = Scene(workers=2, peers=1)
    one, other = scene.workers
    at_once = [bytes([number]) * (limits.NOTES_BATCH_BYTES_MAX // 2) for number in range(5)]
    for number, batch in enumerate(at_once):
        one.ring.write(one.origin, 99.0 + number / 8, batch)
    other.note(b"other", 99.9)
    found = scene.peers[0].sent(peer_wire.NOTES)
    assert [(frame.number, frame.figure) for frame in found] == [
        (one.origin, 1.0), (one.origin, 0.75), (one.origin, 0.5), (other.origin, pytest.approx(0.1))
    ]  # fmt: skip
    assert b"".join(frame.batch for frame in found) == b"".join(at_once) + b"other"


def test_a_newcomer_of_either_kind_is_told_all_that_is_open() -> None:
    scene = Scene(workers=1, peers=0)
    scene.hub.tick()
    scene.workers[0].channel.told.clear()
    FakeWorker(scene.hub)
    scene.hub.tick()
    assert scene.workers[0].channel.heard(control.Whole)
    peer = FakePeer()
    scene.hub.link(peer)
    assert peer.sent(peer_wire.WHOLE)
    scene.hub.tick()
    assert scene.workers[0].channel.heard(control.Whole)
    for is_heard in (True, False):  # too soon after the first
        scene.hub.hear_peer(peer, Frame(peer_wire.WHOLE), 0.0)
        scene.hub.tick()
        assert bool(scene.workers[0].channel.heard(control.Whole)) is is_heard


def test_what_one_said_before_he_went_reaches_peers_before_his_end() -> None:
    scene = Scene(workers=1, peers=1)
    (worker,), (peer,) = scene.workers, scene.peers
    worker.ring.write(worker.origin, 99.0, b"last")
    worker.leave()
    worker.ring.write(worker.origin, 99.0, b"of a dead one")
    scene.hub.tick()
    assert [frame.batch for frame in peer.frames if frame.kind == peer_wire.NOTES] == [b"last"]
    kinds = [frame.kind for frame in peer.frames]
    assert kinds.index(peer_wire.NOTES) < kinds.index(peer_wire.GONE)


# --- digests -------------------------------------------------------------------------------------


def test_a_new_worker_is_told_by_the_eldest_what_is_cached_where() -> None:
    scene = Scene(workers=2, peers=1)
    one, other = scene.workers
    one.recite()
    newcomer = FakeWorker(scene.hub)
    assert one.recite(b"page 1", b"page 2")
    assert newcomer.batches() == [b"page 1", b"page 2"]
    assert other.batches() == []
    assert not other.recite()


def test_a_new_worker_whose_teller_dies_is_told_by_the_next_or_else_by_a_peer() -> None:
    scene = Scene(workers=2, peers=1)
    one, other = scene.workers
    assert one.recite()
    scene.peers[0].frames.clear()
    newcomer = FakeWorker(scene.hub)
    one.leave()
    assert other.recite(b"page")
    assert newcomer.batches() == [b"page"]
    last = FakeWorker(scene.hub)
    newcomer.leave()  # which tells nobody anything
    other.leave()
    (ask,) = scene.peers[0].sent(peer_wire.ASK)
    scene.from_peer(peer_wire.write_page(ask.number, b"its page", last=True))
    assert last.batches() == [b"its page"]


def test_workers_of_a_new_proxy_are_told_by_a_peer() -> None:
    scene = Scene(workers=2, peers=0)
    scene.workers[0].recite()
    peer, second = FakePeer(), FakePeer()
    scene.hub.link(peer)
    scene.hub.link(second)
    assert not second.sent(peer_wire.ASK)  # they have one picture
    (ask,) = peer.sent(peer_wire.ASK)
    for batch, last in ((b"page 1", False), (b"page 2", True)):
        page = peer_wire.write_page(ask.number, batch, last=last)
        scene.hub.hear_peer(second, peer_wire.read_frame(page), 0.0)  # nobody asked it
        scene.hub.hear_peer(peer, peer_wire.read_frame(page), 0.0)
    late = peer_wire.write_page(ask.number, b"page 3", last=True)
    scene.hub.hear_peer(peer, peer_wire.read_frame(late), 0.0)
    for worker in scene.workers:
        assert worker.batches() == [b"page 1", b"page 2"]


def test_nobody_is_asked_before_the_fleet_is_known() -> None:
    hub = Hub(WORKERS, Clock())
    FakeWorker(hub)
    peer = FakePeer()
    hub.link(peer)
    assert not peer.sent(peer_wire.ASK)
    hub.know_fleet()
    assert len(peer.sent(peer_wire.ASK)) == 1
    hub.know_fleet()
    assert not peer.sent(peer_wire.ASK)


def test_the_only_worker_of_a_proxy_is_told_by_a_peer_when_it_is_started_again() -> None:
    scene = Scene(workers=1, peers=1)
    (peer,) = scene.peers
    assert len(peer.sent(peer_wire.ASK)) == 1
    scene.workers[0].leave()
    FakeWorker(scene.hub)
    assert len(peer.sent(peer_wire.ASK)) == 1


def test_a_peer_that_asks_is_answered_page_by_page_once_at_a_time() -> None:
    scene = Scene(workers=2, peers=1)
    (peer,) = scene.peers
    one, other = scene.workers
    one.recite()
    scene.from_peer(peer_wire.write_ask(5))
    scene.from_peer(peer_wire.write_ask(6))
    assert peer.sent(peer_wire.PAGE) == [Frame(peer_wire.PAGE, 6, 1.0)]
    assert one.recite(b"page 1")
    pages = [Frame(peer_wire.PAGE, 5, 0.0, b"page 1"), Frame(peer_wire.PAGE, 5, 1.0)]
    assert peer.sent(peer_wire.PAGE) == pages
    assert other.batches() == []
    scene.from_peer(peer_wire.write_ask(7))
    peer.waiting_bytes = limits.NOTES_WAITING_BYTES_MAX + 1
    assert one.recite(b"page 1")  # finds no room, but the end must be heard
    assert peer.sent(peer_wire.PAGE) == [Frame(peer_wire.PAGE, 7, 1.0)]


def test_a_digest_ends_with_whoever_tells_it_or_wants_it() -> None:
    scene = Scene(workers=2, peers=1)
    (peer,) = scene.peers
    one, other = scene.workers
    one.recite()
    scene.from_peer(peer_wire.write_ask(5))
    (recite,) = one.channel.heard(control.Recite)
    one.leave()
    assert peer.sent(peer_wire.PAGE) == [Frame(peer_wire.PAGE, 5, 1.0)]
    scene.hub.hear(one.origin, control.Page(recite.transfer, b"late", last=True))
    scene.from_peer(peer_wire.write_ask(6))
    scene.hub.unlink(peer)
    peer.frames.clear()
    assert other.recite(b"in vain")
    assert peer.frames == []
    lonely = Scene(workers=0, peers=1)
    lonely.from_peer(peer_wire.write_ask(5))
    assert lonely.peers[0].sent(peer_wire.PAGE) == [Frame(peer_wire.PAGE, 5, 1.0)]


# --- bad peers -----------------------------------------------------------------------------------


def test_a_peer_whose_notes_cannot_be_read_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    worker = scene.workers[0]
    scene.from_peer(peer_wire.write_notes(7, 0.0, b"abc"), peer=1)
    ((origin, _, _),) = worker.said()
    scene.hub.hear(worker.origin, control.Garbled(origin, "no such kind"))
    assert scene.peers[1].failure == "its notes cannot be read: no such kind"
    assert not scene.peers[0].failure
    assert "cannot be read" in caplog.text


def test_a_peer_that_invents_workers_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ORIGINS_MAX", 3)
    scene = Scene()
    for origin in range(3):
        scene.from_peer(peer_wire.write_notes(origin, 0.0, b""), peer=origin % 2)
    scene.from_peer(peer_wire.write_notes(0, 0.0, b""))
    with pytest.raises(WireError, match="more workers speak"):
        scene.from_peer(peer_wire.write_notes(3, 0.0, b""))
