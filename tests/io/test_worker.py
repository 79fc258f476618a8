"""A worker obeys its supervisor, and goes on doing so when an order cannot be carried out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator

import pytest

from proxy.config import ConfigError, ProxyConfig
from proxy.contract import FleetSnapshot
from proxy.io import control, entrance
from proxy.worker import Worker
from tests.fakes.plane import RealPlane, records
from tests.fakes.talk import ask

LIVE = b"GET /livez HTTP/1.1\r\nhost: p\r\nconnection: close\r\n\r\n"
CONFIG = ProxyConfig(access_log="off")


def no_descriptors(_: int) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


async def live(port: int) -> int:
    return (await ask(port, LIVE, "GET")).status


class Held:
    """A worker in this process, and the supervisor's end of its channel."""

    def __init__(self, channel: control.Channel, port: int, end: asyncio.Task[int]) -> None:
        self.channel, self.port, self.end = channel, port, end

    async def counts(self) -> bool:
        self.channel.send(control.Count())
        return isinstance(await self.channel.receive(), control.Counted)


@contextlib.asynccontextmanager
async def held_worker(monkeypatch: pytest.MonkeyPatch, *, accept: bool) -> AsyncIterator[Held]:
    monkeypatch.setattr("proxy.worker._connections_possible", lambda: 100)
    monkeypatch.setattr("proxy.worker.set_up_logging", lambda _, **__: None)
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr("gc.set_threshold", lambda *_: None)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    channel = await control.Channel.open(ours)
    worker = Worker(await control.Channel.open(theirs), [listener])
    end = asyncio.ensure_future(worker.run())
    channel.send(control.Start(CONFIG, accept=accept))
    channel.send(control.FleetIs(FleetSnapshot(epoch="e", version=1, replicas=records("a"))))
    assert isinstance(await channel.receive(), control.Ready)
    try:
        async with asyncio.timeout(10):  # only so that this ends if a claim is false
            yield Held(channel, port, end)
            channel.send(control.Drain(0.0))
            await end
    finally:
        end.cancel()
        await worker._tasks.close()
        channel.close()


async def test_a_worker_that_cannot_open_its_sockets_anew_goes_on_as_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with held_worker(monkeypatch, accept=True) as worker:
        secure = ssl.create_default_context()
        with monkeypatch.context() as patch:
            patch.setattr(entrance.os, "dup", no_descriptors)
            patch.setattr("proxy.tls.server_context", lambda _: secure)
            worker.channel.send(control.Reconfigure(CONFIG))
            assert await worker.counts()
        assert "not reloaded, going on as before" in caplog.text
        assert await live(worker.port) == 200


@pytest.mark.parametrize("failure", [ConfigError("no such file"), OSError(errno.EMFILE, "many")])
async def test_a_worker_that_cannot_take_connections_ends(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(_: ProxyConfig) -> None:
        raise failure

    async with held_worker(monkeypatch, accept=False) as worker:
        monkeypatch.setattr("proxy.tls.server_context", fail)
        worker.channel.send(control.Accept())
        assert await worker.end == 1


async def test_sockets_that_cannot_all_be_opened_anew_are_served_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with RealPlane(records("a")) as proxy:
        door = proxy.entrance
        door._listeners *= 2
        dup = os.dup
        calls = iter([dup, no_descriptors])

        def once(fd: int) -> int:
            return next(calls)(fd)

        before = list(door._servers)
        monkeypatch.setattr(entrance.os, "dup", once)
        with pytest.raises(OSError, match="Too many open files"):
            await door.open(ssl.create_default_context())
        monkeypatch.setattr(entrance.os, "dup", dup)
        assert door._servers == before
        assert door._context is None
        for _ in range(4):
            assert await live(proxy.port) == 200


class Broken:
    """Stands where an order's work was done, and fails."""

    def __call__(self, *_: object, **__: object) -> None:
        raise RuntimeError("a fault of ours")


async def test_a_worker_whose_order_fails_obeys_the_next_ones(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with held_worker(monkeypatch, accept=True) as worker:
        with monkeypatch.context() as patch:
            patch.setattr("proxy.io.plane.Plane.take_snapshot", Broken())
            patch.setattr("proxy.io.plane.Plane.clear", Broken())
            fleet = FleetSnapshot(epoch="e", version=2, replicas=records("b"))
            worker.channel.send(control.FleetIs(fleet))
            worker.channel.send(control.Cleared("a"))
            worker.channel.send_frame(b"\x00\x00\x00\x01\xc1")  # no order at all
            worker.channel.send(control.Count())
            counted = await worker.channel.receive()
        assert isinstance(counted, control.Counted)
        (faults,) = [s for s in counted.counters if s.name == "internal_errors_total"]
        assert faults.value == 3
        assert "obeying FleetIs" in caplog.text
        assert "a fault of ours" in caplog.text
        worker.channel.send(control.FleetIs(fleet))
        worker.channel.send(control.Count())
        counted = await worker.channel.receive()
        assert isinstance(counted, control.Counted)
        assert ("replica", "b") in {label for s in counted.gauges for label in s.labels}
        worker.channel.send(control.Drain(0.0))
        assert await worker.end == 0


async def test_a_worker_that_can_hear_nothing_any_more_drains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with held_worker(monkeypatch, accept=True) as worker:
        monkeypatch.setattr("proxy.io.control._decoder", None)  # what is not foreseen
        worker.channel.send(control.Count())
        assert await worker.end == 0
