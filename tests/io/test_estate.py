"""What a proxy that leaves has counted, as it is told and as it is taken."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from proxy.core import peer_wire
from proxy.core.peer_wire import WireError
from proxy.io import estate
from proxy.io.estate import Estate, Part, parts_of
from proxy.io.families import FAMILIES
from proxy.io.peers import PREDECESSOR, SUCCESSOR
from proxy.io.telemetry import Sample


class Link:
    """Keeps what is sent by it."""

    def __init__(self, name: str, waiting_bytes: int = 0) -> None:
        self.name = name
        self.waiting_bytes = waiting_bytes
        self.sent: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)


class Peers:
    """One link, or none; and whether the one before will ever be heard."""

    def __init__(self, *links: Link, over: bool = False) -> None:
        self._links = list(links)
        self._over = over
        self.reader = None

    def listen(self, kind: int, reader: object) -> None:
        assert kind == peer_wire.COUNTS
        self.reader = reader  # type: ignore[assignment]

    def links(self) -> list[Link]:
        return self._links

    def is_over(self, name: str) -> bool:
        assert name == PREDECESSOR
        return self._over


def _requests(count: float, outcome: str = "ok") -> Sample:
    labels = (("route", "chat"), ("model", "m"), ("code", "200"), ("outcome", outcome))
    return Sample("requests_total", labels, count)


def _estate(peers: Peers, *samples: Sample) -> Estate:
    async def count() -> list[Sample]:
        return list(samples)

    return Estate(peers, count)  # type: ignore[arg-type]


def _deliver(link: Link, heir: Estate, name: str = PREDECESSOR) -> None:
    for frame in link.sent:
        heir._hear(Link(name), peer_wire.read_frame(frame).batch)  # type: ignore[arg-type]


async def test_the_new_one_has_what_the_old_one_counted_last() -> None:
    heir = _estate(Peers())
    for count in (3.0, 5.0):
        link = Link(SUCCESSOR)
        await _estate(Peers(link), _requests(count)).farewell()
        _deliver(link, heir)
        assert heir.samples() == [_requests(count)], "the whole, not one more"
    await heir.wait()


async def test_what_is_told_too_late_is_not_taken() -> None:
    """The page has been read without it: taken now, it would look like a burst."""
    heir = _estate(Peers(over=True))
    await heir.wait()
    link = Link(SUCCESSOR)
    await _estate(Peers(link), _requests(3.0)).farewell()
    _deliver(link, heir)
    assert heir.samples() == []


async def test_only_the_proxy_before_is_believed() -> None:
    heir, link = _estate(Peers()), Link(SUCCESSOR)
    await _estate(Peers(link), _requests(3.0)).farewell()
    _deliver(link, heir, "10.0.0.7:9000")
    assert heir.samples() == []


async def test_one_that_is_behind_gets_the_next_and_the_last_at_any_rate() -> None:
    link = Link(SUCCESSOR, waiting_bytes=10**7)
    leaving = _estate(Peers(link), _requests(3.0))
    task = asyncio.get_running_loop().create_task(leaving.run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    assert link.sent == []
    await leaving.farewell()
    assert len(link.sent) == 1


async def test_another_versions_counts_and_a_process_own_are_left_out() -> None:
    cpu = Sample("worker_cpu_seconds_total", (("worker", "0"),), 4.0)
    link, heir = Link(SUCCESSOR), _estate(Peers())
    await _estate(Peers(link), cpu, _requests(1.0)).farewell()
    _deliver(link, heir)
    assert heir.samples() == [_requests(1.0)]
    foreign = [
        Sample("no_such_total", (), 1.0),
        Sample("requests_total", (("route", "chat"),), 1.0),
        Sample("overhead_seconds", (), 1.0, (1, 2)),
    ]
    part = msgspec.msgpack.encode(Part([*foreign, _requests(2.0)], last=True))
    heir._hear(Link(PREDECESSOR), part)  # type: ignore[arg-type]
    assert heir.samples() == [_requests(2.0)]


async def test_it_is_told_as_sums_not_worker_by_worker() -> None:
    link, heir = Link(SUCCESSOR), _estate(Peers())
    await _estate(Peers(link), _requests(1.0), _requests(2.0), _requests(4.0, "x")).farewell()
    told = [s for f in link.sent for s in msgspec.msgpack.decode(f[1:], type=Part).samples]
    assert told == [_requests(3.0), _requests(4.0, "x")]
    _deliver(link, heir)
    assert heir.samples() == told


def test_names_are_capped_however_many_proxies_there_were_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(estate._CAPS, ("route", "model"), 2)
    monkeypatch.setitem(estate._CAPS, ("replica",), 1)
    caps = estate.Caps()

    def of(*labels: tuple[str, str]) -> tuple[tuple[str, str], ...]:
        return caps.within(Sample("a_total", labels, 1.0)).labels

    code = ("code", "200")
    for model in ("a", "b", "a"):
        assert of(("route", "chat"), ("model", model), code) == (
            *(("route", "chat"), ("model", model), code),
        )
    assert of(("route", "chat"), ("model", "c"), code) == (
        *(("route", "chat"), ("model", "other"), code),
    )
    assert of(("replica", "r0")) == (("replica", "r0"),)
    assert of(("replica", "r1")) == (("replica", "other"),)
    assert of(("reason", "home")) == (("reason", "home"),)
    assert of() == ()


def test_what_cannot_be_read_ends_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    heir = _estate(Peers())
    with pytest.raises(WireError, match="cannot be read"):
        heir._hear(Link(PREDECESSOR), b"\xc1")  # type: ignore[arg-type]
    monkeypatch.setattr(estate, "SAMPLES_MAX", 1)
    part = msgspec.msgpack.encode(Part([_requests(1.0)], last=False))
    heir._hear(Link(PREDECESSOR), part)  # type: ignore[arg-type]
    with pytest.raises(WireError, match="without end"):
        heir._hear(Link(PREDECESSOR), part)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_parts_fit_into_frames_and_are_the_whole(count: int) -> None:
    edges = len(FAMILIES["request_duration_seconds"].edges)
    samples = [
        Sample(
            "request_duration_seconds",
            (("route", "chat"), ("model", f"{number:>200}")),
            0.5,
            (number,) * (edges + 1),
        )
        for number in range(count)
    ]
    parts = list(parts_of(samples))
    assert all(len(part) <= 2 * estate.PART_BYTES_MAX - 64 for part in parts)
    decoded = [msgspec.msgpack.decode(part, type=Part) for part in parts]
    assert [part.last for part in decoded] == [False] * (len(parts) - 1) + [True]
    assert [sample for part in decoded for sample in part.samples] == samples
