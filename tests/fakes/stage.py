"""A bench whose engines answer by themselves, with the canaries that follow a vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.conformance.judge import check_delivered
from tests.conformance.reader import Taken
from tests.conformance.vector import head, posted
from tests.fakes.plane import Bench, Client, FakeUpstreams, read_answers
from tests.fakes.strict_engine import Conversation, Odd, echo

Cut = Callable[[bytes], list[bytes]]


def whole(octets: bytes) -> list[bytes]:
    return [octets] if octets else []


def canary(token: bytes) -> bytes:
    return head(b"Content-Length: %d" % len(token)) + token


class Stage:
    """A bench whose replicas answer by themselves, and are strict about what they are sent."""

    def __init__(self, bench: Bench, service: FakeUpstreams | None = None) -> None:
        """`service` is what answers, where that is not the replicas."""
        self.bench = bench
        self._engines = (service or bench.upstreams).engines
        self.odd: dict[bytes, Odd] = {}
        self.cut: Cut = whole  # how the engines' octets come
        self.conversations: list[Conversation] = []
        self._read_bytes: list[int] = []

    async def settle(self) -> None:
        """Let engines and clients talk until nobody has anything to say."""
        engines = self._engines
        moved = True
        while moved:
            await self.bench.settle()
            moved = False
            for index, engine in enumerate(engines):
                if index == len(self.conversations):
                    self.conversations.append(Conversation(self.odd))
                    self._read_bytes.append(0)
                unread = engine.received[self._read_bytes[index] :]
                if not unread:
                    continue
                moved = True
                self._read_bytes[index] += len(unread)
                conversation = self.conversations[index]
                for answer in conversation.feed(unread):
                    for piece in self.cut(answer):
                        if not engine.transport.lost:
                            engine.send(piece)
                if conversation.closing:
                    engine.transport.hang_up()

    def check_engines(self, expected: Sequence[Taken], *, marked: bool = True) -> None:
        delivered = [request for talk in self.conversations for request in talk.delivered]
        assert [talk.fault for talk in self.conversations if talk.fault] == []
        assert all(talk.at_rest for talk in self.conversations if not talk.closing)
        check_delivered(delivered, expected, marked=marked)

    async def send(self, client: Client, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            while not client.transport.reading:
                await self.settle()
            if client.transport.lost:
                return
            client.send(piece)
        await self.settle()

    async def check_canaries(self, used: Client | None) -> list[Taken]:
        """Ask over a new connection, and over `used` if it is open. Return what was asked."""
        fresh, asked = self.bench.client(), [posted(b"fresh")]
        await self.send(fresh, [canary(b"fresh")])
        assert fresh.answer().body == echo(b"fresh")
        if used is not None and not used.transport.closed and not used.transport.eof_written:
            before = len(used.received)
            await self.send(used, [canary(b"again")])
            (answer,) = read_answers(used.received[before:])
            assert answer.body == echo(b"again")
            asked.append(posted(b"again"))
        return asked
