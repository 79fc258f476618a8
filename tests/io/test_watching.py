"""Those who watch the view: how many may, and what becomes of the slow."""

from __future__ import annotations

import asyncio
import socket
import zlib
from contextlib import AsyncExitStack

from proxy.io.watching import WATCHERS_MAX, packed, takes_gzip
from tests.fakes.admin import Admin, Standing, ViewsByHand, admin, error_of
from tests.fakes.talk import Talk, ask

WATCH = b"GET /view/watch HTTP/1.1\r\nhost: localhost\r\n%b\r\n"


def views_of(listener: Admin) -> ViewsByHand:
    assert isinstance(listener.viewing, ViewsByHand)
    return listener.viewing


async def test_as_many_watch_as_may_and_a_place_is_free_again_when_one_goes() -> None:
    async with admin(Standing("a"), by_hand=True) as listener, AsyncExitStack() as stack:
        views_of(listener).tell(b"{}")
        talks = []
        for _ in range(WATCHERS_MAX):
            talk = await stack.enter_async_context(Talk(listener.port))
            await talk.send(WATCH % b"")
            await talk.read_until(b"data: {}\n\n")
            talks.append(talk)
        refused = await listener.get("/view/watch")
        assert (refused.status, error_of(refused)["code"]) == (503, "too_many_watchers")
        assert (await listener.get("/view")).status == 200
        talks[0].writer.transport.abort()
        while listener.viewing.watchers == WATCHERS_MAX:  # until it is told something
            views_of(listener).tell(b"{}")
            await asyncio.sleep(0.01)
        last = await stack.enter_async_context(Talk(listener.port))
        await last.send(WATCH % b"")
        await last.read_until(b"data: {}\n\n")
        views_of(listener).tell(b"[2]")
        for talk in (*talks[1:], last):
            await talk.read_until(b"event: view\ndata: [2]\n\n")


async def test_who_watches_hears_no_more_when_the_listener_ends() -> None:
    async with admin(Standing("a"), by_hand=True) as listener, Talk(listener.port) as talk:
        views_of(listener).tell(b"{}")
        await talk.send(WATCH % b"")
        await talk.read_until(b"data: {}\n\n")
        listener.viewing.close()
        await talk.read_until(b"\r\n0\r\n\r\n")  # in order: not cut


async def test_a_slow_watcher_skips_what_it_missed_and_ends_with_the_newest() -> None:
    async with admin(Standing("a"), by_hand=True) as listener:
        views = views_of(listener)
        views.tell(b"[0]")
        end = socket.socket()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        end.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(end, ("127.0.0.1", listener.port))
        reader, writer = await asyncio.open_connection(sock=end, limit=4096)
        writer.write(WATCH % b"")
        received = b""
        while b"data: [0]\n\n" not in received:
            received += await reader.read(1000)
        large, told = b"x" * 300_000, 40  # more than the kernel keeps for one connection
        for number in range(1, told + 1):
            views.tell(b"[%d,%b]" % (number, large))
            for _ in range(20):
                await asyncio.sleep(0)
        views.tell(b"[-1]")
        while b"data: [-1]\n\n" not in received:
            received += await reader.read(1 << 20)
        seen = received.count(b"event: view\n")
        assert 2 < seen < told  # the first, some, and the last
        writer.close()


async def test_compressed_and_plain_watchers_are_told_the_same() -> None:
    async with (
        admin(Standing("a"), by_hand=True) as listener,
        Talk(listener.port) as plain,
        Talk(listener.port) as gzip,
    ):
        views = views_of(listener)
        views.tell(b'{"a":"%b"}' % (b"0123456789" * 5000))
        await plain.send(WATCH % b"connection: close\r\n")
        await plain.read_until(b'"}\n\n')
        # It comes in later, and its stream begins in the middle of those of others.
        await gzip.send(WATCH % b"accept-encoding: br, gzip\r\nconnection: close\r\n")
        await gzip.read_until(b"\r\n\r\n")
        for number in range(5):
            seen = listener.viewing.number
            views.tell(b"[%d]" % number)
            await plain.read_until(b"data: [%d]\n\n" % number)
            assert views.number == seen + 1
        views.close()
        told = [await plain.answer("GET"), await gzip.answer("GET")]
        assert told[0].complete
        assert told[1].complete
        assert told[1].fields["content-encoding"] == "gzip"
        assert "content-encoding" not in told[0].fields
        unpacker = zlib.decompressobj(31)
        unpacked = unpacker.decompress(told[1].body)
        assert unpacker.eof  # with the check sum right
        assert len(told[1].body) < len(told[0].body) // 20
        first = told[0].body.index(b"event: view")
        assert unpacked.startswith(told[0].body[:first])
        assert unpacked.endswith(b"data: [4]\n\n")


async def test_a_head_is_no_watcher() -> None:
    async with admin(Standing("a"), by_hand=True) as listener:
        asked = WATCH.replace(b"GET", b"HEAD") % b""
        assert (await ask(listener.port, asked, "HEAD")).status == 405
        assert listener.viewing.watchers == 0


async def test_each_event_can_be_read_as_soon_as_it_has_come() -> None:
    unpacker = zlib.decompressobj(-15)
    for event in (b"one", b"two" * 1000, b"one"):
        assert unpacker.decompress(packed(event)) == event


def test_who_takes_gzip() -> None:
    for accepted in ("gzip", "deflate, gzip;q=0.5, br", "GZIP", "x-gzip"):
        assert takes_gzip(accepted)
    for accepted in ("", "br", "gzip;q=0", "gzip; q=0.0", "identity, gzipped"):
        assert not takes_gzip(accepted)
