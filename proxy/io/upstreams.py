"""All connections of one worker to replicas: made, kept while idle, and closed in time.

Idle ones are closed before the engine would close them, and looked at once more before use, so that
a request does not meet a close that is already on its way.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable, Iterable
from typing import Final, cast

from typing_extensions import override

from proxy import tls
from proxy.core import http1, limits
from proxy.core.head import read_answer_head
from proxy.core.head_memory import HeadMemory
from proxy.core.idle import IdleTrust
from proxy.core.replica import Replica
from proxy.io.clock import Clock
from proxy.io.outbox import Outbox
from proxy.io.paths import mind_path
from proxy.io.tasks import Tasks
from proxy.io.upstream import Consumer, Keeper, Upstream

# What says nothing about the replica: no descriptors, memory or local ports left.
_OUR_OWN_WANT: Final = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)
)


class Upstreams(Keeper):
    """The connections of one worker, by replica."""

    def __init__(
        self,
        clock: Clock,
        tasks: Tasks,
        connect_timeout_s: float,
        on_unsolicited: Callable[[], None],
        tls_context: Callable[[], ssl.SSLContext] = ssl.create_default_context,
        outbox: Outbox | None = None,
    ) -> None:
        """`outbox` is that of the worker; without one everything is written at once."""
        self.outbox = outbox or Outbox(clock, lambda: None)
        self._clock = clock
        self._tasks = tasks
        self._connect_timeout_s = connect_timeout_s
        self._on_unsolicited = on_unsolicited
        self._idle: dict[str, list[Upstream]] = {}
        self._open: set[Upstream] = set()
        self._dialled: set[Upstream] = set()  # not made yet
        self._make_tls = tls_context
        self._tls: ssl.SSLContext | None = None  # made when first needed: authorities are many
        self._trust = IdleTrust()
        self.answer_heads: HeadMemory[http1.ResponseHead] = HeadMemory(read_answer_head)

    @property
    def open_count(self) -> int:
        return len(self._open)

    @property
    def idle_count(self) -> int:
        return sum(map(len, self._idle.values()))

    def reconfigure(
        self, connect_timeout_s: float, tls_context: Callable[[], ssl.SSLContext]
    ) -> None:
        """From the next connection on. Idle ones with TLS go: certificates may have changed."""
        self._connect_timeout_s = connect_timeout_s
        self._make_tls, self._tls = tls_context, None
        for idle in self._idle.values():
            for upstream in [each for each in idle if each.secured]:
                idle.remove(upstream)
                upstream.abort()

    def take(self, replica_id: str) -> Upstream | None:
        """Return an idle connection that is clean, the most recently used first."""
        idle = self._idle.get(replica_id)
        if idle and self._trust.learnt:
            idle_s = self._clock.now_s() - idle[-1].idle_since_s
            if idle_s >= self._trust.trusted_s(replica_id):
                return None  # left to live, so that we learn how long it does
        while idle:
            upstream = idle.pop()
            if upstream.clean():
                return upstream
            self.closed_idle(upstream)
            upstream.abort()
        return None

    def connect(
        self, replica: Replica, consumer: Consumer, timeout_s: float = 0.0
    ) -> asyncio.Task[None]:
        """Open a connection and hand it to `consumer`; cancel the task to give up.

        It may take as long as is configured, or `timeout_s` if that is less.
        """
        within_s = min(self._connect_timeout_s, timeout_s or self._connect_timeout_s)
        work = self._connect(replica, consumer, within_s)
        return self._tasks.spawn(f"connect {replica.replica_id}", work)

    async def _connect(self, replica: Replica, consumer: Consumer, timeout_s: float) -> None:
        upstream = Upstream(replica.replica_id, self)
        self._dialled.add(upstream)
        try:
            async with asyncio.timeout(timeout_s):
                await self._dial(replica, upstream)
        except TimeoutError:
            consumer.connect_failed("connect timed out")
            return
        except OSError as error:
            reason = tls.explain(error) if isinstance(error, ssl.SSLError) else error.strerror
            reason = reason or type(error).__name__
            if error.errno in _OUR_OWN_WANT:
                consumer.no_means(reason)
            else:
                consumer.connect_failed(reason)
            return
        except asyncio.CancelledError:
            upstream.discard()
            raise
        except Exception as error:
            consumer.connect_failed(type(error).__name__)
            raise  # a fault of ours: the owner of the task reports it
        finally:
            self._dialled.discard(upstream)
        if upstream.moved:
            upstream.transport.abort()
            consumer.connect_failed("the replica has moved")
            return
        if not upstream.clean():  # closed, or spoken on, before we said a word
            upstream.transport.abort()
            consumer.connect_failed("connection closed as soon as it was made")
            return
        self._open.add(upstream)
        consumer.connected(upstream)

    async def _dial(self, replica: Replica, upstream: Upstream) -> None:
        await asyncio.get_running_loop().create_connection(
            lambda: cast("asyncio.Protocol", upstream),
            replica.host,
            replica.port,
            ssl=self._tls_context() if replica.tls else None,
        )
        upstream.watch()
        if replica.remote:
            mind_path(upstream.transport)

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = self._make_tls()
        return self._tls

    @override
    def give_back(self, upstream: Upstream) -> None:
        idle = self._idle.setdefault(upstream.replica_id, [])
        useless = idle and not self._trust.trusted_s(upstream.replica_id)
        if useless or len(idle) >= limits.UPSTREAM_IDLE_CONNECTIONS_MAX:
            upstream.abort()
            return
        upstream.idle_since_s = self._clock.now_s()
        idle.append(upstream)

    @override
    def lost(self, upstream: Upstream) -> None:
        self._open.discard(upstream)
        idle = self._idle.get(upstream.replica_id)
        if idle and upstream in idle:
            idle.remove(upstream)
            self.closed_idle(upstream)

    @override
    def closed_idle(self, upstream: Upstream) -> None:
        idle_s = self._clock.now_s() - upstream.idle_since_s
        self._trust.closed(upstream.replica_id, idle_s)

    @override
    def unsolicited(self, upstream: Upstream) -> None:
        self._on_unsolicited()

    def retain(self, replica_ids: frozenset[str]) -> None:
        """Let go of replicas that are gone or have moved, and forget what they taught.

        Their idle connections close; those in use end with their exchange.
        """
        for upstream in (*self._open, *self._dialled):
            if upstream.replica_id not in replica_ids:
                upstream.moved = True
        gone = [k for k in self._idle if k not in replica_ids]
        self.close_idle(gone)
        for replica_id in gone:
            self._trust.survived(replica_id)

    def close_idle(self, replica_ids: Iterable[str]) -> None:
        """Close what nobody uses: an engine that is to rest has no use for it, either."""
        for replica_id in replica_ids:
            for upstream in self._idle.pop(replica_id, ()):
                upstream.abort()

    def sweep(self, now_s: float) -> None:
        """Close what has been idle so long that the engine may be closing it."""
        for idle in self._idle.values():
            while idle and now_s - idle[0].idle_since_s > limits.UPSTREAM_IDLE_S_MAX:
                survivor = idle.pop(0)
                survivor.abort()
                self._trust.survived(survivor.replica_id)

    def close(self) -> None:
        for upstream in list(self._open):
            upstream.abort()
