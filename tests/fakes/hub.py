"""A hub with workers that only listen."""

from __future__ import annotations

import mmap
from typing import Any, TypeVar

from typing_extensions import override

from proxy.core.note_ring import RingReader, RingWriter, rings_bytes
from proxy.io import control
from proxy.io.control import Channel, Message
from proxy.io.hub import Hub
from proxy.io.shared_cells import rings_at

T = TypeVar("T")
WORKERS = 8  # that a hub of a test has place for


class FakeChannel(Channel):
    """The supervisor's end of a channel to a worker that the test plays."""

    def __init__(self) -> None:
        self.told: list[Message] = []
        self.waiting = 0

    @override
    def send_frame(self, frame: bytes) -> None:
        self.told.append(control._decoder.decode(frame[4:]))

    @property
    @override
    def waiting_bytes(self) -> int:
        return self.waiting

    @override
    async def drained(self) -> None:
        """Whatever was sent has been taken."""

    def heard(self, kind: type[T]) -> list[T]:
        """Return what came of one kind, and forget it."""
        found = [message for message in self.told if isinstance(message, kind)]
        self.told = [message for message in self.told if not isinstance(message, kind)]
        return found


class FakeRing:
    """A ring whose writer is tested."""

    def __init__(self) -> None:
        memory = memoryview(mmap.mmap(-1, rings_bytes(1)))
        self.writer = RingWriter(memory, 0)
        self.reader = RingReader(memory, 0, (0, 0), ours=True)


class FakeWorker:
    """A worker that has joined a hub."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.channel = FakeChannel()
        ends = hub.notes.ends()
        self.origin = hub.join(self.channel)
        # No two of one test have the same place, but for those who follow each other.
        self.ring, self.others = rings_at(hub.notes.fd, self.origin % (len(ends) - 1), ends)

    def note(self, batch: bytes, at_s: float = 0.0) -> None:
        self.ring.write(self.origin, at_s, batch)
        self.hub.hear(self.origin, control.Noted())

    def said(self) -> list[tuple[int, float, bytes]]:
        """Return what others have said since: who, when and what."""
        return [
            (said.origin, said.at_s, said.batch) for ring in self.others for said in ring.take()
        ]

    def batches(self) -> list[bytes]:
        pages = [message.batch for message in self.channel.heard(control.Heard)]
        return [batch for _, _, batch in self.said()] + pages

    def recite(self, *pages: bytes) -> bool:
        """Answer a request for what is cached where; return whether there was one."""
        asked = self.channel.heard(control.Recite)
        for request in asked:
            for page in pages:
                self.hub.hear(self.origin, control.Page(request.transfer, page, last=False))
            self.hub.hear(self.origin, control.Page(request.transfer, b"", last=True))
        return bool(asked)

    def leave(self) -> None:
        self.hub.leave(self.origin)


def value(samples: list[Any], name: str, *labels: str) -> float:
    """Return the sum of a series, of those whose labels have these values."""
    return sum(
        sample.value
        for sample in samples
        if sample.name == name and set(labels) <= {text for _, text in sample.labels}
    )
