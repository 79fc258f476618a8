"""The links to other proxies: listened for, dialled, kept to one for each pair.

Every proxy may be given the same list, itself in it: who dials himself hears his own name and lets
it be. Two who dial each other keep the link of whose name is smaller, and both know which that is;
one that a proxy gave to its successor by hand is kept before any other. A proxy's name is drawn
anew for each life. A link that breaks is dialled again, with pauses that grow; whatever the other
side does wrong ends its link and nothing else.

With the proxies of the region notes are shared. Those of other regions that the configuration names
may link as well, and say only messages; what becomes of these links `io/regions.py` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping

from proxy.config import ProxyConfig
from proxy.core import claim_limits, limits, peer_wire
from proxy.core.peer_wire import WireError
from proxy.io.hub import Hub
from proxy.io.peer_link import LinkLostError, PeerLink, accepted, connect
from proxy.io.peer_names import PeerNames
from proxy.io.regions import Regions
from proxy.io.tasks import Tasks
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.peers")

_REFUSALS_REMEMBERED_MAX = 256
# Names of the links between one that takes over and the one that leaves.
PREDECESSOR, SUCCESSOR = "the proxy before", "the proxy that takes over"
_BY_HAND = frozenset((PREDECESSOR, SUCCESSOR))
Reader = Callable[[PeerLink, bytes], None]


class _IsSelfError(Exception):
    """We have dialled ourselves."""


class _DoubledError(Exception):
    """There is a better link to the same proxy."""

    def __init__(self, other: PeerLink) -> None:
        super().__init__()
        self.other = other


class Peers:
    """All links of one proxy."""

    def __init__(self, tasks: Tasks, hub: Hub, regions: Regions | None = None) -> None:
        self._tasks = tasks
        self._hub = hub
        self._regions = regions or Regions(lambda _: None, dict)
        self._readers: dict[int, Reader] = {peer_wire.SUMMARY: self._regions.hear}
        self._others: frozenset[str] = frozenset()  # regions whose proxies may link to us
        self._proxy_id = os.urandom(peer_wire.PROXY_ID_BYTES)
        self._region = ""
        self._key: str | None = None
        self._may_listen = True
        self._leaving = False  # to a successor
        self._listen_at: str | None = None
        self._listening: asyncio.Task[None] | None = None
        self._names = PeerNames(tasks, self._dial_again)
        self._peers: tuple[str, ...] = ()  # of this region, as configured
        self._dialling: dict[tuple[str, str], asyncio.Task[None]] = {}  # by address and region
        self._links: dict[bytes, PeerLink] = {}  # by the other's name
        self._by_hand: dict[str, asyncio.Task[None]] = {}  # by the link's name
        self._greeting: set[PeerLink] = set()  # who has not shown yet who he is
        self._failures: dict[str, int] = defaultdict(int)
        self._refusals: dict[str, str] = {}  # what was said last of a place, to say it once

    def start(self, config: ProxyConfig, *, listen: bool) -> None:
        """Begin; without listening, as long as a predecessor has the address."""
        self._may_listen = listen
        self._tasks.start("peer beats", self._beat())
        self.reconfigure(config)

    def start_listening(self, config: ProxyConfig) -> None:
        self._may_listen, self._leaving = True, False
        self.reconfigure(config)

    def reconfigure(self, config: ProxyConfig) -> None:
        """Listen and dial as `config` says. Other words of it leave the links as they are."""
        if (config.region, config.peer_key) != (self._region, self._key):
            self._region, self._key = config.region, config.peer_key
            for link in (*self._links.values(), *self._greeting):
                link.fail("the configuration has changed")
        self._refusals.clear()
        self._regions.know(config, self._proxy_id)
        remotes = self._regions.places()
        self._others = frozenset(remotes.values())
        for link in self._links.values():
            if link.region not in (self._region, *self._others):
                link.fail("its region is no longer configured")
        listen_at = config.peer_listen if self._may_listen else None
        if listen_at != self._listen_at:
            self._close_listener()
            self._listen_at = listen_at
            if listen_at is not None:
                self._listening = self._tasks.spawn("peer listener", self._listen(listen_at))
        self._peers = config.peers
        self._names.know(config.peers)
        self._dial_again()

    def _dial_again(self) -> None:
        peers = self._names.resolved(self._peers)
        self._dial({**dict.fromkeys(peers, self._region), **self._regions.places()})

    def _dial(self, wanted: Mapping[str, str]) -> None:
        """Keep linked with those at these addresses, each of the region that is said."""
        for place in self._dialling.keys() - wanted.items():
            self._dialling.pop(place).cancel()
        for place in wanted.items():
            if place not in self._dialling:
                work = self._keep_linked(*place)
                self._dialling[place] = self._tasks.spawn(f"peer {place[0]}", work)

    @property
    def proxy_id(self) -> bytes:
        """The name of this proxy's life."""
        return self._proxy_id

    def listen(self, kind: int, reader: Reader) -> None:
        """Have messages of this kind read by `reader`; it raises `WireError`."""
        assert kind in peer_wire.MESSAGES
        self._readers[kind] = reader

    def links(self, *, abroad: bool | None = None) -> list[PeerLink]:
        """Return the links with this region's proxies, with those of others, or all."""
        return [
            link
            for link in self._links.values()
            if abroad is None or abroad == (link.region != self._region)
        ]

    def stop_listening(self) -> None:
        """Leave the address to a successor. The links remain, but for those with other regions:
        these are to find the successor."""
        self._may_listen, self._leaving = False, True
        self._close_listener()
        self._names.know(())
        self._dial({place: region for place, region in self._dialling if region == self._region})
        for link in self.links(abroad=True):
            link.fail("a new proxy takes over")

    def _close_listener(self) -> None:
        self._listen_at = None
        if self._listening is not None:
            self._listening.cancel()
            self._listening = None

    def adopt(self, end: socket.socket, *, dialled: bool) -> None:
        """Link by a socket that only a proxy of ours can have."""
        name = PREDECESSOR if dialled else SUCCESSOR
        self._by_hand[name] = self._tasks.spawn("peer by hand", self._adopt(end, dialled=dialled))

    def greets(self, name: str) -> bool:
        """Say whether the link by hand of this name is yet to come about."""
        task = self._by_hand.get(name)
        linked = any(link.name == name for link in self._links.values())
        return task is not None and not task.done() and not linked

    def is_over(self, name: str) -> bool:
        """Say whether the link by hand of this name has ended, or never came about."""
        task = self._by_hand.get(name)
        return task is not None and task.done()

    async def _adopt(self, end: socket.socket, *, dialled: bool) -> None:
        end.setblocking(False)
        try:
            reader, writer = await asyncio.open_unix_connection(sock=end)
        except OSError:
            end.close()
            return
        link = PeerLink(reader, writer, PREDECESSOR if dialled else SUCCESSOR, "")
        with contextlib.suppress(_IsSelfError, _DoubledError):
            await self._run(link, None, dialled=dialled)

    def samples(self) -> list[Sample]:
        """Return counters."""
        return [
            Sample("peer_failures_total", (("reason", reason),), count)
            for reason, count in self._failures.items()
        ]

    # --- listening ---------------------------------------------------------------------------

    async def _listen(self, address: str) -> None:
        """Take links at `address`, as soon as it is free."""
        pause_s = limits.PEER_PAUSE_FIRST_S
        while True:
            try:
                server = await self._open(address)
            except OSError as error:
                if pause_s > limits.PEER_PAUSE_FIRST_S:  # one that leaves may need a moment
                    self._refuse(address, f"cannot be listened at: {error.strerror or error}")
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, limits.PEER_PAUSE_MAX_S)
                continue
            break
        _log.info("listening for peers at %s", _shown(server, address))
        if self._key is None and not peer_wire.is_near(address):
            _log.warning("without a peer_key, whoever reaches %s is believed", address)
        path = address.removeprefix(peer_wire.UNIX) if address.startswith(peer_wire.UNIX) else None
        inode = os.stat(path).st_ino if path else 0
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()
            with contextlib.suppress(OSError):
                if path and os.stat(path).st_ino == inode:  # else a successor's
                    os.unlink(path)

    async def _open(self, address: str) -> asyncio.Server:
        host, port = peer_wire.parse_address(address)
        if port >= 0:
            return await asyncio.start_server(self._accept, host, port)
        path = host.removeprefix(peer_wire.UNIX)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fresh = f"{path}.{os.getpid()}"
        before = os.umask(0o177)  # only the owner may connect
        try:
            listener.bind(fresh)
            os.rename(fresh, path)  # in place of one that has left
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(before)
        return await asyncio.start_unix_server(self._accept, sock=listener)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._greeting) + len(self._links) >= limits.PEER_LINKS_MAX:
            self._failures["crowded"] += 1
            writer.transport.abort()
            return
        self._tasks.start("peer link", self._serve(accepted(reader, writer)))

    async def _serve(self, link: PeerLink) -> None:
        with contextlib.suppress(_IsSelfError, _DoubledError):
            await self._run(link, self._key, dialled=False)

    # --- dialling ----------------------------------------------------------------------------

    async def _keep_linked(self, address: str, region: str) -> None:
        pause_s, pause_s_max = limits.PEER_PAUSE_FIRST_S, limits.PEER_PAUSE_MAX_S
        timeout_s = limits.PEER_HANDSHAKE_TIMEOUT_S
        if region != self._region:
            pause_s_max, timeout_s = (
                claim_limits.REGION_PAUSE_MAX_S,
                claim_limits.REGION_DIAL_TIMEOUT_S,
            )
        while True:
            try:
                link = await connect(address, timeout_s)
                link.expected = region
            except OSError as error:  # a timeout is one
                self._refuse(address, f"cannot be reached: {error.strerror or error}")
            else:
                try:
                    if await self._run(link, self._key, dialled=True):
                        pause_s = limits.PEER_PAUSE_FIRST_S
                except _IsSelfError:
                    return
                except _DoubledError as doubled:
                    await doubled.other.ended.wait()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, pause_s_max)

    # --- one link ----------------------------------------------------------------------------

    async def _run(self, link: PeerLink, key: str | None, *, dialled: bool) -> bool:
        """Serve a connection to its end; return whether it became a link."""
        self._greeting.add(link)
        try:
            await link.shake_hands(
                region=self._region,
                proxy_id=self._proxy_id,
                key=key,
                dialled=dialled,
                others=self._others,
            )
            self._greeting.discard(link)
            self._know_who(link)
            self._establish(link)
            while self._links.get(link.peer_id) is link:
                self._hear(link, await link.receive())
        except WireError as error:
            self._failed(link, str(error), "refused" if link.peer_id == b"" else "broken")
        except LinkLostError as error:
            self._failed(link, str(error), "lost")
        finally:
            self._greeting.discard(link)
            established = self._links.get(link.peer_id) is link
            if established:
                del self._links[link.peer_id]
                self._unlink(link)
            link.ended.set()
            link.close()
        return established

    def _know_who(self, link: PeerLink) -> None:
        """Whom we have called must be of the region that is said. Raises `WireError`."""
        if link.expected and link.region != link.expected:
            region, link.peer_id = link.region, b""
            raise WireError(f"its region is {region!r}, and {link.expected!r} was said")
        if link.expected:
            self._regions.met(link.place, link.peer_id)

    def _hear(self, link: PeerLink, frame: peer_wire.Frame) -> None:
        reader = self._readers.get(frame.kind)
        if reader is not None:
            reader(link, frame.batch)
        elif frame.kind in peer_wire.MESSAGES:
            pass  # nobody here wants to know
        elif link.region == self._region:
            self._hub.hear_peer(link, frame, link.delay_s)
        else:
            raise WireError(f"a proxy of another region sends a frame of kind {frame.kind}")

    def _unlink(self, link: PeerLink) -> None:
        if link.region == self._region:
            self._hub.unlink(link)
        else:
            self._regions.unlink(link)

    def _establish(self, link: PeerLink) -> None:
        """Make it the one link to this proxy. Raises when it should not be."""
        if link.peer_id == self._proxy_id:
            raise _IsSelfError
        if self._leaving and link.region != self._region:  # it was greeting when we began to
            raise LinkLostError("a new proxy takes over")
        other = self._links.get(link.peer_id)
        if other is not None:
            smaller = min(self._proxy_id, link.peer_id)
            worse = link.dialled_by != smaller or other.dialled_by == smaller
            if other.name in _BY_HAND or (worse and link.name not in _BY_HAND):
                raise _DoubledError(other)
            del self._links[link.peer_id]
            self._unlink(other)
            other.fail("there is another link to the same proxy")
        self._links[link.peer_id] = link
        self._refusals.pop(link.place, None)
        _log.info("linked with the proxy at %s", link.name)
        if link.region == self._region:
            self._hub.link(link)
        else:
            self._regions.link(link)

    def _failed(self, link: PeerLink, reason: str, kind: str) -> None:
        self._failures[kind] += 1
        if self._links.get(link.peer_id) is link:
            _log.warning("the link with the proxy at %s has ended: %s", link.name, reason)
        elif link.peer_id == b"":
            self._refuse(link.place, f"is not linked with: {reason}")

    def _refuse(self, place: str, text: str) -> None:
        """Say it once, and again when it is something else."""
        if place and self._refusals.get(place) != text:
            if len(self._refusals) >= _REFUSALS_REMEMBERED_MAX:
                self._refusals.clear()
            self._refusals[place] = text
            _log.error("peer %s %s", place, text)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(limits.PEER_BEAT_S)
            for link in self.links(abroad=False):
                link.beat()


def _shown(server: asyncio.Server, address: str) -> str:
    """Say where it listens: a port 0 has become one."""
    host, port = peer_wire.parse_address(address)
    return address if port else f"{host}:{server.sockets[0].getsockname()[1]}"
