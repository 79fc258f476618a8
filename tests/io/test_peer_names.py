"""Peers behind a name: every address that it has, as they come and go."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from proxy.core import limits, peer_wire
from tests.fakes.engine import free_port
from tests.fakes.plane import until
from tests.io.test_peers import Proxy, linked

NAME = "peers.test"
_getaddrinfo = socket.getaddrinfo


class NameServer:
    """Answers for one name; `None`: not at all."""

    def __init__(self) -> None:
        self.hosts: list[str] | None = []
        self.asked = 0

    def __call__(self, host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host != NAME:
            return _getaddrinfo(host, port, *args, **options)
        self.asked += 1
        if not self.hosts:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        kind = socket.SOCK_STREAM
        return [(socket.AF_INET, kind, 6, "", (each, port)) for each in self.hosts]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> NameServer:
    server = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", server)
    for limit in ("PEER_NAMES_INTERVAL_S", "PEER_PAUSE_FIRST_S", "PEER_PAUSE_MAX_S"):
        monkeypatch.setattr(limits, limit, 0.01)
    monkeypatch.setattr(limits, "PEER_BEAT_S", 0.01)
    return server


async def test_all_behind_a_name_are_linked_as_they_come_and_go(names: NameServer) -> None:
    port = await free_port()
    told = {"peers": (f"dns:{NAME}:{port}",), "peer_key": "k"}
    names.hosts = ["127.0.0.2", "127.0.0.3"]
    async with (
        Proxy(peer_listen=f"127.0.0.2:{port}", **told) as one,
        Proxy(peer_listen=f"127.0.0.3:{port}", **told) as two,
    ):
        await linked(one, two)
        async with Proxy(peer_listen=f"127.0.0.4:{port}", **told) as three:
            names.hosts.append("127.0.0.4")
            await linked(one, two, three, count=2)
            before, names.hosts = names.asked, None
            await until(lambda: names.asked > before + 6)
            await linked(one, two, three, count=2)  # who cannot be asked says nothing
            names.hosts = ["127.0.0.2", "127.0.0.3"]
        await linked(one, two)
        one.peers.stop_listening()
        await until(lambda: not _following(one))


def _following(proxy: Proxy) -> bool:
    return any(task.get_name() == "peer names" for task in proxy.tasks._tasks)


async def test_a_configuration_without_names_asks_nobody(names: NameServer) -> None:
    async with Proxy(peers=("127.0.0.1:9",)) as proxy:
        assert not _following(proxy)
        proxy.config = type(proxy.config)(peers=(f"dns:{NAME}:9",))
        proxy.peers.reconfigure(proxy.config)
        await until(lambda: names.asked > 0)
        proxy.peers.reconfigure(type(proxy.config)())
        await until(lambda: not _following(proxy))


@pytest.mark.parametrize("address", ["dns:x", "dns::1", "dns:x:y"])
def test_names_have_a_port(address: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        peer_wire.parse_address(address)


def test_a_name_is_told_from_an_address() -> None:
    assert peer_wire.parse_address("dns:doherty-peers:8004") == ("doherty-peers", 8004)
    assert peer_wire.is_name("dns:doherty-peers:8004")
    assert not peer_wire.is_name("doherty-peers:8004")
