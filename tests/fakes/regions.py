"""Regions in one process: planes on real sockets, linked as supervisors link them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Self

import msgspec

from proxy.config_access import AccessConfig, RemoteRegionConfig
from proxy.contract import ReplicaRecord
from proxy.core import limits
from proxy.io import control
from proxy.io.hub import Hub
from proxy.io.peers import Peers
from proxy.io.regions import Regions
from proxy.io.tally import summary_of
from proxy.io.tasks import Tasks
from tests.fakes.engine import free_port
from tests.fakes.plane import RealPlane, until


class Wire:
    """Carries octets between two ports, keeps what was carried, and can be cut."""

    def __init__(self, to_port: int) -> None:
        self.to_port = to_port
        self.port = 0
        self.carried: list[bytes] = []  # from those who dial, one for each connection
        self.whole = asyncio.Event()  # cleared: nothing comes through, and nobody is told
        self.whole.set()
        self.change: Callable[[bytes], bytes] = bytes  # what is carried to those who are dialled
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
        self._tasks.start("wire", self._join(reader, writer))

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.carried)
        self.carried.append(b"")
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.to_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers += [writer, back]
        await asyncio.gather(self._carry(reader, back, number), self._carry(there, writer, -1))

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                await self.whole.wait()
                if number >= 0:
                    self.carried[number] += piece
                    piece = self.change(piece)
                writer.write(piece)
        await self.whole.wait()
        writer.close()


class InRegion(RealPlane):
    """One proxy of a region. It links to others once `link` has named them."""

    def __init__(self, region: str, records: Sequence[ReplicaRecord] = (), **config: Any) -> None:
        self.region = region
        self.peer_port = 0
        self._started = False
        super().__init__(records, region=region, **config)
        self.regions = Regions(self._tell, lambda: summary_of(self.plane))
        self.peers = Peers(self.tasks, Hub(1), self.regions)

    def _tell(self, message: control.Message) -> None:
        assert isinstance(message, control.RemotesAre)
        self.plane.know_remotes(message.remotes, message.ours)

    def link(self, others: Iterable[tuple[str, int, int]]) -> None:
        """Link with these proxies: region, port for requests, port for peers."""
        scheme = "https" if self.plane.config.tls_cert_path else "http"
        remotes = [
            RemoteRegionConfig(
                region=region, url=f"{scheme}://127.0.0.1:{port}", peer=f"127.0.0.1:{peer_port}"
            )
            for region, port, peer_port in others
        ]
        config = msgspec.structs.replace(
            self.plane.config,
            peer_listen=f"127.0.0.1:{self.peer_port}",
            access=AccessConfig(remote_regions=tuple(remotes)),
        )
        self.plane.reconfigure(config, self.log)
        if self._started:
            self.peers.reconfigure(config)
            return
        self._started = True
        self.peers.start(config, listen=True)
        self.tasks.start("regions", self.regions.run())
        self.tasks.start("sweep", self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(limits.SWEEP_INTERVAL_S)
            for connection in list(self.connections):
                connection.check_deadline(self.plane.clock.now_s())

    @property
    def urls(self) -> list[str]:
        return [state.url for state in self.plane.remotes]

    @property
    def linked(self) -> list[str]:
        return [state.region for state in self.plane.remotes if state.linked]


@contextlib.asynccontextmanager
async def joined(*proxies: InRegion) -> AsyncIterator[None]:
    """Have all of them linked, each with each."""
    async with contextlib.AsyncExitStack() as stack:
        for proxy in proxies:
            proxy.peer_port = await free_port()
            await stack.enter_async_context(proxy)
        for proxy in proxies:
            others = [other for other in proxies if other is not proxy]
            proxy.link([(other.region, other.port, other.peer_port) for other in others])
        await until(lambda: all(len(proxy.linked) == len(proxies) - 1 for proxy in proxies))
        yield
