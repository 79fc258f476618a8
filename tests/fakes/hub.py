"""A hub with workers that only listen."""

from __future__ import annotations

from typing import Any, TypeVar

from typing_extensions import override

from proxy.io import control
from proxy.io.control import Channel, Message
from proxy.io.hub import Hub

T = TypeVar("T")


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


class FakeWorker:
    """A worker that has joined a hub."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.channel = FakeChannel()
        self.origin = hub.join(self.channel)

    def note(self, batch: bytes, at_s: float = 0.0) -> None:
        self.hub.hear(self.origin, control.Noted(at_s, batch))

    def batches(self) -> list[bytes]:
        return [message.batch for message in self.channel.heard(control.Heard)]

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
