"""Tells an engine that nobody wants an answer any more, where cutting the connection is not enough.

SGLang's HTTP layer awaits the first token before it answers, and looks only every few seconds
whether its client is still there: until then a prompt is computed for nobody. To replicas that take
a request's id from a field of its head (`ReplicaRecord.rid_header`) it is sent under one, and by it
the request is ended at once. Whether that worked nobody asks: the cut connection says it, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from proxy.core import limits
from proxy.core.http1 import ResponseHead
from proxy.core.replica import Replica
from proxy.io.upstream import Upstream
from proxy.io.upstreams import Upstreams

_BODY: Final = b'{"rid":"%b"}'
_HEAD: Final = (
    b"POST /abort_request HTTP/1.1\r\n%b"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


class Aborts:
    """Those under way: so many at once, each for so long."""

    def __init__(self, upstreams: Callable[[], Upstreams]) -> None:
        self._upstreams = upstreams
        self._live: set[_Abort] = set()
        self.sent_total = 0
        self.dropped_total = 0

    def __len__(self) -> int:
        return len(self._live)

    def send(self, replica: Replica, rid: bytes) -> None:
        """End the request of this id there. Comes back at once."""
        if len(self._live) >= limits.ABORTS_MAX:
            self.dropped_total += 1  # the engine will notice by itself
            return
        abort = _Abort(replica, rid, self._ended)
        self._live.add(abort)
        self.sent_total += 1
        abort.begin(self._upstreams())

    def _ended(self, abort: _Abort) -> None:
        self._live.discard(abort)


class _Abort:
    """One call, and its connection's `Consumer`."""

    def __init__(self, replica: Replica, rid: bytes, on_end: Callable[[_Abort], None]) -> None:
        self._replica = replica
        body = _BODY % rid
        self._head, self._body = _HEAD % (replica.host_field, len(body)), body
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._upstream: Upstream | None = None

    def begin(self, upstreams: Upstreams) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(limits.ABORT_TIMEOUT_S, self._give_up)
        upstream = upstreams.take(self._replica.replica_id)
        if upstream is not None:
            self.connected(upstream)
        else:
            self._connecting = upstreams.connect(self._replica, self)

    def _give_up(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        if self._upstream is not None:
            self._upstream.abort()
        self._end()

    def _end(self) -> None:
        self._upstream = self._connecting = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._on_end(self)

    def connected(self, upstream: Upstream) -> None:
        self._connecting = None
        self._upstream = upstream
        upstream.send(self, self._head, self._body)

    def connect_failed(self, reason: str) -> None:
        self._end()

    def no_means(self, reason: str) -> None:
        self._end()

    def request_slow(self) -> None:
        """It is small."""

    def request_moves(self) -> None:
        """It is small."""

    def response_started(self, head: ResponseHead, length: int) -> None:
        """Whatever it answers."""

    def response_head_due(self) -> None:
        """Nobody is told."""

    def response_octets(self, data: bytes) -> None:
        """Nobody reads them."""

    def response_ended(self, *, reusable: bool) -> None:
        self._end()

    def response_failed(self, reason: str) -> None:
        self._end()

    def never_delivered(self, reason: str, *, reused: bool) -> None:
        self._end()
