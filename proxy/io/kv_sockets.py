"""Sockets of ZeroMQ in the event loop, without an awakening for each message.

An engine publishes a batch with nearly every step. What its batches change is worth seconds and
bears a moment's delay, and waking this process for each of them costs more than reading it. So the
sockets that engines publish to are not waited for: they are read every `limits.KV_GATHER_S`, all of
them at the same moments, and each until nothing is left.

Others are waited for. The descriptor of such a socket says only that something has happened since
it was read from (zmq_getsockopt(3), ZMQ_FD): so it is asked before anybody waits, and after.
"""

from __future__ import annotations

import asyncio
from typing import Final

import zmq

from proxy.core import limits

# Batches that wait to be read; beyond it they are dropped, and asked for again.
QUEUED_BATCHES_MAX: Final = 4096
HEARTBEAT_S: Final = 5.0
BROKEN_AFTER_S: Final = 15.0  # not a beat in that time

Socket = zmq.Socket[bytes]


def opened(context: zmq.Context[Socket], kind: int) -> Socket:
    """Return a socket within our limits."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.RCVHWM, QUEUED_BATCHES_MAX)
    socket.setsockopt(zmq.MAXMSGSIZE, limits.KV_BATCH_BYTES_MAX)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(BROKEN_AFTER_S * 1000))
    return socket


def has_message(socket: Socket) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def take(socket: Socket) -> list[bytes] | None:
    """Return the frames of the next message; None when none is there."""
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None


async def arrival(timeout_s: float, *sockets: Socket) -> bool:
    """Wait until one of them may have something; False: none had in that time."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + timeout_s
    while not any(map(has_message, sockets)):
        if not await _readable(until_s - loop.time(), sockets):
            return False
    return True


async def _readable(timeout_s: float, sockets: tuple[Socket, ...]) -> bool:
    """Wait until the loop says that something has happened to one of them."""
    if timeout_s <= 0.0:
        return False
    loop = asyncio.get_running_loop()
    told: asyncio.Future[bool] = loop.create_future()
    descriptors = [int(socket.getsockopt(zmq.FD)) for socket in sockets]
    for descriptor in descriptors:
        loop.add_reader(descriptor, _tell, told, True)
    timer = loop.call_later(timeout_s, _tell, told, False)
    try:
        return await told
    finally:
        timer.cancel()
        for descriptor in descriptors:  # it stays readable until its socket is read from
            loop.remove_reader(descriptor)


def _tell(told: asyncio.Future[bool], happened: bool) -> None:
    if not told.done():
        told.set_result(happened)
