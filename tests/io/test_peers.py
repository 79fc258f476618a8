"""Links between proxies: one for each pair, for those who have the key, again after every cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest

from proxy.config import ProxyConfig
from proxy.core import limits, peer_wire
from proxy.io import control
from proxy.io.hub import Hub
from proxy.io.peer_link import PeerLink
from proxy.io.peers import PREDECESSOR, SUCCESSOR, Peers
from proxy.io.tasks import Tasks
from tests.fakes.engine import free_port
from tests.fakes.hub import WORKERS, FakeWorker, value
from tests.fakes.plane import until


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEER_PAUSE_FIRST_S", 0.005)
    monkeypatch.setattr(limits, "PEER_PAUSE_MAX_S", 0.02)
    monkeypatch.setattr(limits, "PEER_BEAT_S", 0.01)


class Proxy:
    """The supervisor of one proxy, as far as peers are concerned, with one worker."""

    def __init__(self, **config: Any) -> None:
        self.config = ProxyConfig(**config)
        self.tasks = Tasks()
        self.hub = Hub(WORKERS)
        self.hub.know_fleet()
        self.worker = FakeWorker(self.hub)
        self.peers = Peers(self.tasks, self.hub)

    async def __aenter__(self) -> Self:
        self.peers.start(self.config, listen=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.tasks.close()
        assert not self.links

    @property
    def links(self) -> list[PeerLink]:
        return list(self.peers._links.values())

    def failures(self, reason: str) -> float:
        return value(self.peers.samples(), "peer_failures_total", reason)


async def linked(*proxies: Proxy, count: int = 1) -> None:
    await until(lambda: all(len(proxy.links) == count for proxy in proxies))


async def addresses(count: int) -> list[str]:
    return [f"127.0.0.1:{await free_port()}" for _ in range(count)]


async def hears(one: Proxy, other: Proxy) -> None:
    """Have `one` say something new until `other` hears it."""
    said = os.urandom(8)
    heard: list[bytes] = []

    def is_heard() -> bool:
        one.worker.note(said)
        heard.extend(other.worker.batches())
        return said in heard

    await until(is_heard)


@pytest.mark.parametrize("key", [None, "secret"])
async def test_proxies_that_all_have_one_list_are_linked_each_to_each_once(
    key: str | None,
) -> None:
    places = await addresses(3)
    async with contextlib.AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(
                Proxy(peer_listen=place, peers=tuple(places), peer_key=key)
            )
            for place in places
        ]
        await linked(*proxies, count=2)
        for one in proxies:
            for other in proxies:
                if one is not other:
                    await hears(one, other)
        origins = {origin for origin, _, _ in proxies[0].worker.said()}
        assert len(origins) <= 2
        before = [proxy.links for proxy in proxies]
        await asyncio.sleep(5 * limits.PEER_PAUSE_MAX_S)
        assert [proxy.links for proxy in proxies] == before  # no link takes another's place
        assert proxies[0].hub.samples()[1][0].value == 2


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ({"peer_key": "other"}, "does not have our peer_key"),
        ({}, "one of us has a peer_key and the other has none"),
        ({"peer_key": "secret", "region": "us"}, "its region is 'us', ours is 'local'"),
    ],
)
async def test_who_does_not_belong_is_refused_until_he_does(
    theirs: dict[str, str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    (place,) = await addresses(1)
    ours = {"peer_listen": place, "peer_key": "secret"}
    async with Proxy(**ours) as one, Proxy(peers=(place,), **theirs) as other:
        await until(lambda: one.failures("refused") > 2)
        assert not one.links
        assert not other.links
        assert one.worker.channel.heard(control.Listen)[-1] == control.Listen(
            on=False, origin=one.worker.origin
        )
        said = [record.message for record in caplog.records if reason in record.message]
        assert 1 <= len(said) <= 2  # once by each side, however often it is tried
        other.peers.reconfigure(ProxyConfig(peers=(place,), peer_key="secret"))
        await linked(one, other)
        await hears(other, one)
        one.peers.reconfigure(ProxyConfig(peer_listen=place, peer_key="newer"))
        await until(lambda: not one.links)
        assert one.worker.channel.heard(control.Gone)


async def test_what_a_peer_that_ends_had_open_goes_with_it_and_it_may_come_again() -> None:
    places = await addresses(2)
    async with Proxy(peer_listen=places[0], peers=tuple(places)) as one:
        for _ in range(2):
            async with Proxy(peer_listen=places[1]) as other:
                await linked(one, other)
                await hears(other, one)
                assert one.worker.channel.heard(control.Gone) == []
            await until(lambda: not one.links)
            assert len(one.worker.channel.heard(control.Gone)) == 1
        async with Proxy(peers=(places[0],)) as other:  # it need not listen
            await linked(one, other)
            await hears(one, other)


async def test_peers_come_and_go_with_the_configuration() -> None:
    places = await addresses(3)
    async with Proxy() as one, Proxy(peer_listen=places[1]) as other:
        one.peers.reconfigure(ProxyConfig(peers=(places[1],)))
        await linked(one, other)
        (link,) = one.links
        one.peers.reconfigure(ProxyConfig(peers=(places[1], places[2])))
        await asyncio.sleep(0.02)
        assert one.links == [link]
        one.peers.reconfigure(ProxyConfig(peers=(places[2],)))
        await until(lambda: not one.links and not other.links)
        other.peers.reconfigure(ProxyConfig(peer_listen=places[2]))
        await linked(one, other)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", int(places[1].rpartition(":")[2]))


class Cable:
    """Between two proxies: carries what they say, or holds it back, or is cut."""

    def __init__(self, to_port: int) -> None:
        self.to_port = to_port
        self.port = 0
        self.whole = asyncio.Event()
        self.whole.set()
        self._tasks = Tasks()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._tasks.close()
        for writer in self._writers:
            writer.transport.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.start("cable", self._join(reader, writer))

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.to_port)
        self._writers += [writer, back]
        await asyncio.gather(self._carry(reader, back), self._carry(there, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                await self.whole.wait()
                writer.write(piece)
            writer.close()


async def test_a_partition_is_found_by_silence_and_heals(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "PEER_SILENCE_S", 0.1)
    monkeypatch.setattr(limits, "PEER_HANDSHAKE_TIMEOUT_S", 0.1)
    (place,) = await addresses(1)
    async with (
        Cable(int(place.rpartition(":")[2])) as cable,
        Proxy(peer_listen=place) as one,
        Proxy(peers=(f"127.0.0.1:{cable.port}",)) as other,
    ):
        await linked(one, other)
        await hears(one, other)
        for worker in (one.worker, other.worker):
            worker.channel.told.clear()
        cable.whole.clear()
        await until(lambda: not one.links and not other.links)
        assert "it is silent" in caplog.text
        assert other.worker.channel.heard(control.Gone)
        cable.whole.set()
        await linked(one, other)
        await hears(one, other)
        await hears(other, one)
        one.hub.tick()
        assert one.worker.channel.heard(control.Whole)  # what is open is told again


async def test_beats_say_how_old_notes_are() -> None:
    (place,) = await addresses(1)
    async with Proxy(peer_listen=place) as one, Proxy(peers=(place,)) as other:
        await linked(one, other)
        await until(lambda: one.links[0].delay_s > 0)
        assert one.links[0].delay_s < 1.0


# --- unix sockets, addresses that are taken, takeover --------------------------------------------


async def test_a_unix_socket_is_the_owners_and_goes_with_the_listener(tmp_path: Path) -> None:
    path = tmp_path / "peers"
    path.write_text("left by one that was killed")
    async with (
        Proxy(peer_listen=f"unix:{path}") as one,
        Proxy(peers=(f"unix:{path}",)) as other,
    ):
        await linked(one, other)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        one.peers.stop_listening()
        await until(lambda: not path.exists())
        await hears(one, other)


async def test_an_address_that_is_taken_is_listened_at_when_it_is_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (place,) = await addresses(1)
    async with Proxy(peer_listen=place) as one, Proxy(peer_listen=place) as successor:
        await until(lambda: "cannot be listened at: " in caplog.text)
        one.peers.stop_listening()
        async with Proxy(peers=(place,)) as other:
            await linked(other)
            await hears(successor, other)
            assert not one.links


@pytest.mark.parametrize(("key", "warned"), [(None, True), ("k", False)])
async def test_an_open_address_without_a_key_is_warned_of(
    key: str | None, caplog: pytest.LogCaptureFixture, *, warned: bool
) -> None:
    caplog.set_level("INFO")
    async with Proxy(peer_listen="0.0.0.0:0", peer_key=key) as one:
        await until(lambda: "listening for peers at 0.0.0.0:" in caplog.text)
        await asyncio.sleep(0)
        assert ("is believed" in caplog.text) is warned
        assert not one.links


async def test_a_successor_listens_once_the_address_is_its_own() -> None:
    (place,) = await addresses(1)
    async with Proxy() as one, Proxy(peers=(place,)) as other:
        one.peers.stop_listening()
        one.peers.reconfigure(ProxyConfig(peer_listen=place))
        await asyncio.sleep(0.05)
        assert not other.links
        one.peers.start_listening(ProxyConfig(peer_listen=place))
        await linked(one, other)


async def test_a_link_by_hand_needs_no_key() -> None:
    ours, theirs = socket.socketpair()
    async with Proxy(peer_key="old") as one, Proxy(peer_key="new") as other:
        one.peers.adopt(ours, dialled=True)
        other.peers.adopt(theirs, dialled=False)
        await linked(one, other)
        await hears(one, other)
        await hears(other, one)


async def test_a_link_by_hand_takes_the_place_of_one_that_was_dialled() -> None:
    """Who takes over has dialled the one before already, where the list names both as one."""
    (place,) = await addresses(1)
    async with Proxy(peer_listen=place) as old, Proxy() as new:
        new.peers.start_listening(ProxyConfig(peers=(place,)))
        await linked(old, new)
        ours, theirs = socket.socketpair()
        new.peers.adopt(ours, dialled=True)
        old.peers.adopt(theirs, dialled=False)
        await until(
            lambda: (
                [link.name for proxy in (old, new) for link in proxy.links]
                == [SUCCESSOR, PREDECESSOR]
            )
        )
        before = [*old.links, *new.links]
        await asyncio.sleep(5 * limits.PEER_PAUSE_MAX_S)
        assert [*old.links, *new.links] == before
        await hears(old, new)


async def test_what_was_sent_before_the_end_is_read_though_the_other_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A socket that is closed while the other side writes takes with it what that has not read."""
    monkeypatch.setattr(limits, "PEER_BEAT_S", 60.0)
    heard: list[bytes] = []
    ours, theirs = socket.socketpair()
    async with Proxy() as old, Proxy() as new:
        new.peers.listen(peer_wire.QUOTAS, lambda _, octets: heard.append(octets))
        assert not old.peers.greets(SUCCESSOR)
        old.peers.adopt(theirs, dialled=False)
        assert old.peers.greets(SUCCESSOR)
        assert not old.peers.is_over(SUCCESSOR)
        new.peers.adopt(ours, dialled=True)
        await linked(old, new)
        assert not old.peers.greets(SUCCESSOR)
        (there,), (here,) = old.links, new.links
        for number in range(200):
            there.send(peer_wire.write_message(peer_wire.QUOTAS, bytes((number,)) * 20_000))
        there.end_writing()
        there.send(peer_wire.write_beat(peer_wire.BEAT, 0.0))  # is nothing any more
        for _ in range(50):
            here.send(peer_wire.write_beat(peer_wire.BEAT, 0.0))
        await there.ended.wait()
        assert [octets[0] for octets in heard] == list(range(200))
        await until(lambda: new.peers.is_over(PREDECESSOR) and old.peers.is_over(SUCCESSOR))


async def test_a_link_by_hand_to_one_who_knows_none_is_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, theirs = socket.socketpair()
    async with Proxy() as one:
        one.peers.adopt(ours, dialled=True)
        theirs.close()
        await until(lambda: one.failures("lost") == 1)
        assert not caplog.text


# --- strangers -----------------------------------------------------------------------------------

LENGTH = peer_wire.LENGTH


class Stranger:
    """One who speaks with a proxy octet by octet."""

    def __init__(self, place: str, key: str | None = None) -> None:
        self.port = int(place.rpartition(":")[2])
        self.key = key

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def read(self) -> bytes:
        (size,) = LENGTH.unpack(await self.reader.readexactly(4))
        return await self.reader.readexactly(size)

    async def shake_hands(self) -> peer_wire.Seal:
        hello = peer_wire.make_hello("local", os.urandom(16), os.urandom(32), self.key)
        self.writer.write(LENGTH.pack(len(hello)) + hello)
        both = peer_wire.Link(self.key, hello, await self.read(), dialled=True)
        self.writer.write(LENGTH.pack(len(both.proof)) + both.proof)
        both.check(await self.read())
        return both.outward

    async def until_let_go(self) -> None:
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


@contextlib.asynccontextmanager
async def listening(**config: Any) -> AsyncIterator[tuple[Proxy, str]]:
    (place,) = await addresses(1)
    async with Proxy(peer_listen=place, **config) as proxy:
        port = int(place.rpartition(":")[2])
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
        yield proxy, place


@pytest.mark.parametrize(
    "octets",
    [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", LENGTH.pack(1 << 31), LENGTH.pack(3) + b"\xff\xff\xff"],
    ids=["http", "a huge frame", "nonsense"],
)
async def test_nonsense_is_hung_up_on(octets: bytes) -> None:
    async with listening() as (proxy, place):
        async with Stranger(place) as stranger:
            stranger.writer.write(octets)
            await stranger.until_let_go()
        await until(lambda: proxy.failures("refused") == 1)
        assert proxy.hub.samples()[1][0].value == 0


async def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEER_HANDSHAKE_TIMEOUT_S", 0.05)
    async with listening() as (proxy, place), Stranger(place) as stranger:
        await stranger.until_let_go()
        await until(lambda: proxy.failures("refused") == 1)


@pytest.mark.parametrize(
    "frame",
    [b"", b"\x00", b"\x01\x02", peer_wire.write_notes(1, -1.0, b""), b"\x01" * 1000 + b"?"],
    ids=["empty", "no kind", "short", "from the future", "not its number"],
)
async def test_a_bad_frame_ends_the_link_and_is_counted(
    frame: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(peer_key="k") as (proxy, place), Stranger(place, "k") as stranger:
        seal = await stranger.shake_hands()
        await linked(proxy)
        if frame.endswith(b"?"):
            seal.close(b"left out")
        stranger.writer.write(seal.close(frame))
        await stranger.until_let_go()
        await until(lambda: not proxy.links)
        assert proxy.failures("broken") == 1
        assert "has ended" in caplog.text


async def test_of_strangers_only_so_many_are_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEER_LINKS_MAX", 2)
    async with listening() as (proxy, place):
        await until(lambda: not proxy.peers._greeting)
        async with Stranger(place) as one, Stranger(place), Stranger(place) as third:
            await third.until_let_go()
            assert proxy.failures("crowded") == 1
            await one.shake_hands()


async def test_a_peer_that_does_not_read_costs_a_bounded_buffer_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "NOTES_WAITING_BYTES_MAX", 100_000)
    async with listening() as (proxy, place), Stranger(place) as stranger:
        await stranger.shake_hands()
        await linked(proxy)
        (link,) = proxy.links
        sibling = FakeWorker(proxy.hub)
        batch = bytes(30_000)
        sent = heard = 0
        while not value(proxy.hub.samples()[0], "note_batches_dropped_total"):
            proxy.worker.note(batch)
            sent += 1
            heard += len(sibling.batches())
            await asyncio.sleep(0)
            assert link.waiting_bytes < 100_000 + 2 * len(batch)
        assert heard == sent


async def test_hello_is_said_to_oneself_in_vain() -> None:
    (place,) = await addresses(1)
    async with Proxy(peer_listen=place, peers=(place,)) as proxy:
        await until(proxy.peers._dialling[place, "local"].done)
        assert not proxy.links
