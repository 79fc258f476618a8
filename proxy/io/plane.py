"""What all exchanges of one worker share: the fleet, the picture, the connections, the counts.

One writer: the worker's event loop. Events change the fleet here and nowhere else.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import orjson

from proxy import tls
from proxy.config import ProxyConfig
from proxy.contract import FleetSnapshot, ReplicaRecord
from proxy.contract.keys import KeySet
from proxy.contract.regions import RemoteState
from proxy.contract.span_export import SpanCounts
from proxy.core import fleet as fleets
from proxy.core import limits
from proxy.core.charging import charge, settle
from proxy.core.head_memory import HeadMemory
from proxy.core.lease import Lease
from proxy.core.policy import Decision, Request
from proxy.core.preamble import Preamble, read_preamble
from proxy.core.principal import ANYBODY, Principal
from proxy.core.replica import Replica, replica_of
from proxy.core.routes import Route, model_of_path
from proxy.core.usage import Usage
from proxy.errors import (
    BodyTooLargeError,
    DrainingError,
    NoReplicaError,
    OverloadedError,
    UnsupportedEncodingError,
)
from proxy.io import beliefs
from proxy.io.aborts import Aborts
from proxy.io.abroad import Abroad, moved_of
from proxy.io.access_log import AccessLog
from proxy.io.authentication import Authentication
from proxy.io.clock import Clock
from proxy.io.hops import Hops
from proxy.io.metering import Metering
from proxy.io.noting import Noting
from proxy.io.outbox import Outbox
from proxy.io.sharing import Sharing
from proxy.io.tasks import Tasks
from proxy.io.telemetry import Sample
from proxy.io.tracing import Tracer, span_samples
from proxy.io.upstreams import Upstreams


class Plane(Abroad):
    """The data plane of one worker."""

    def __init__(
        self,
        config: ProxyConfig,
        clock: Clock,
        tasks: Tasks,
        access_log: AccessLog,
        on_suspect: Callable[[str, str], None],
        on_doubt: Callable[[str], None],
    ) -> None:
        """`on_suspect(replica_id, reason)` has it probed until it answers, `on_doubt` once."""
        super().__init__(config, clock)
        self.access_log = access_log
        self._leases: dict[int, Lease] = {}  # those held, by id
        self.noting = Noting(clock, self.picture, self._leases)
        self.sharing = Sharing(
            self.picture,
            self.responses,
            self.noting,
            clock,
            tasks,
            self.give_way,
            on_news=self.waiting.heard,
            on_fault=self._fault,
        )
        self.catch_up = self.waiting.catch_up = self.sharing.catch_up
        self.preemption.know_others(self.sharing.hearsay.yielding, self.noting.ask_way)
        self.preambles: HeadMemory[Preamble] = HeadMemory(read_preamble)
        self.outbox = Outbox(clock, self._fault)
        self.upstreams = Upstreams(
            clock,
            tasks,
            config.connect_timeout_secs,
            self._unsolicited,
            partial(tls.replica_context, config),
            self.outbox,
        )
        # Not of the fleet: apart, so that what changes there closes nothing here.
        self.offline_links = Upstreams(
            clock, tasks, config.connect_timeout_secs, self._unsolicited, outbox=self.outbox
        )
        self.offline = _offline(config)
        self.aborts = Aborts(lambda: self.upstreams)
        self.fleet_epoch, self.fleet_version = "", 0  # of the snapshot taken last
        self.draining = False
        self.relieved = False  # while draining: a successor serves the port, so it is ready
        self.exchanges_open = 0
        self.retries_max = 0 if config.disable_retries else config.retry_max_retries
        self.bodies_bytes = 0  # request bodies held
        self.connections_max = limits.CLIENT_CONNECTIONS_MAX
        self._on_suspect = on_suspect
        self._on_doubt = on_doubt
        self._doubted_s: dict[str, float] = {}
        self._server_errors: dict[str, int] = {}  # in a row, by replica
        self.authentication = Authentication(config, clock)
        self.hops = Hops(config, clock)
        self.metering = Metering(config, clock)
        self.tracer: Tracer | None = None  # while traces are off
        self.span_counts = SpanCounts()

    def reconfigure(self, config: ProxyConfig, access_log: AccessLog) -> AccessLog:
        """Go on as `config` says, from the next request on; return the log that is left."""
        self.follow(config)
        self.hops.follow(config)
        self.retries_max = 0 if config.disable_retries else config.retry_max_retries
        self.authentication.reconfigure(config)
        self.metering.follow(config)
        self.preambles.clear()
        self.upstreams.reconfigure(
            config.connect_timeout_secs, partial(tls.replica_context, config)
        )
        self.offline_links.reconfigure(config.connect_timeout_secs, ssl.create_default_context)
        self.offline = _offline(config)
        before, self.access_log = self.access_log, access_log
        access_log.dropped_total = before.dropped_total
        return before

    # --- the fleet ---------------------------------------------------------------------------

    def take_snapshot(
        self, snapshot: FleetSnapshot, columns: Mapping[str, int] | None = None
    ) -> None:
        """`columns` says where all workers count what each replica has (`core.headcount`)."""
        if self.fleet_known:  # else nothing that is said of a replica says anything to us
            self.catch_up()  # or engines would seem to have what others sent there from elsewhere
        before = self.fleet.replicas
        self.know_region(snapshot.region)
        self.fleet = fleets.apply(self.fleet, fleets.SnapshotReceived(snapshot, self.region))
        self.fleet_known = True
        self.fleet_epoch, self.fleet_version = snapshot.epoch, snapshot.version
        self.seat()
        self.sharing.know(self.picture.slots)
        if self.picture.loads.headcount is not None:
            replicas = self.fleet.replicas.values()
            self.picture.loads.headcount.know(columns or {}, replicas, self.leases)
        servers = self.fleet.servers
        present = frozenset(servers)
        for gone in {r.replica_id for r in before.values()} - present:
            self._server_errors.pop(gone, None)
            self._doubted_s.pop(gone, None)
        # A connection to the address that a replica had before is one to somebody else.
        moved = moved_of(before, servers)
        self._retain(moved)
        self.upstreams.close_idle([r.replica_id for r in servers.values() if not r.serves])
        self.fleet_changed()

    def _retain(self, moved: Collection[str]) -> None:
        """Let go of connections and counts of what is not there any more."""
        remotes = [remote.replica_id for remote in self.fleet.remotes.values()]
        present = frozenset((*self.fleet.servers, *remotes))
        self.upstreams.retain(present.difference(moved))
        self.telemetry.retain_replicas(present)

    def know_keys(self, keys: KeySet) -> None:
        """These are all API keys now, from the next request on."""
        self.authentication.know_keys(keys)
        self.preambles.clear()  # what is no key any more need not stay in memory
        self.some_keys = bool(keys.keys)
        self.tell_tenants_apart()

    def know_remotes(self, remotes: Sequence[RemoteState], ours: bytes = b"") -> None:
        """This is what is known now of other regions; `ours` names this proxy's life to them."""
        moved = self.take_remotes(remotes)
        if moved is not None:
            self.sharing.know(self.picture.slots)
            self._retain(moved)
            self.fleet_changed()
        self.upstreams.close_idle(self.hops.know(remotes, ours))
        self.work_done()

    def suspect(self, replica_id: str, reason: str) -> None:
        """A replica failed a request in a way that says it may be gone."""
        if self.fleet.remotes:
            self.picture.suspect_remote(replica_id, self.clock.now_s())
        before = self.fleet
        self.fleet = fleets.apply(before, fleets.ReplicaSuspected(replica_id))
        if self.fleet is not before:
            self.fleet_changed()
            self._on_suspect(replica_id, reason)

    def clear(self, replica_id: str) -> None:
        self._server_errors.pop(replica_id, None)
        self.fleet = fleets.apply(self.fleet, fleets.ReplicaCleared(replica_id))
        self.fleet_changed()

    def accuse(self, replica_id: str) -> None:
        """The supervisor's probe of a silent replica has failed."""
        self.fleet = fleets.apply(self.fleet, fleets.ReplicaSuspected(replica_id))
        self.fleet_changed()

    def doubt(self, replica_id: str, now_s: float) -> None:
        """A request has long heard nothing of its replica: have it asked, now and then."""
        before_s = self._doubted_s.get(replica_id, -limits.SILENCE_DOUBT_S)
        if now_s - before_s < limits.SILENCE_DOUBT_S:
            return
        self._doubted_s[replica_id] = now_s
        self._on_doubt(replica_id)

    def answered(self, replica_id: str, status: int) -> None:
        """Count server errors in a row. Client errors are no sign of a sick replica."""
        if status < 500 or status == 501:
            if self.fleet.remotes:
                self.picture.remote_answered(replica_id)
            if self._server_errors:
                self._server_errors.pop(replica_id, None)
            return
        count = self._server_errors.get(replica_id, 0) + 1
        self._server_errors[replica_id] = count
        if count >= limits.SERVER_ERRORS_IN_ROW_MAX:
            self._server_errors[replica_id] = 0
            self.suspect(replica_id, f"{count} server errors in a row")

    @property
    def ready(self) -> bool:
        """Whether a request that came now could be served."""
        if self.draining and not self.relieved:
            return False
        fleet = self.fleet
        if self.offline is not None and self.fleet_known and not (fleet.servers or fleet.scaled):
            return True  # nobody is meant to take requests here: what is served is files and jobs
        return (
            any(r.available for r in fleet.replicas.values())
            or any(p.wakes for p in fleet.prospects.values())
            or self.picture.some_remote_serves(self.clock.now_s())
        )

    @property
    def leases(self) -> Collection[Lease]:
        """Those held: from the moment in which a request is bound to a replica to its end."""
        return self._leases.values()

    # --- the load ----------------------------------------------------------------------------

    def acquire(
        self, decision: Decision, request: Request, now_s: float, *, yields: bool = False
    ) -> Lease:
        """Count a request that goes out now; `yields`: and may have to come back.

        Raises `InternalError` where it may not be computed there, whoever decided so.
        """
        self.assert_permitted(decision, request)
        lease = self.picture.acquire(
            decision.replica,
            request.chain,
            cached_octets=decision.cached_octets,
            now_s=now_s,
            streamed=request.stream,
            weight=request.weight,
            known=decision.known,
            whole=not request.response_key,
        )
        lease.spare, lease.yields = request.spare, yields
        if self.waiting.shares.on:
            charge(self.waiting.shares, lease, request, now_s)
        self._leases[lease.lease_id] = lease
        if decision.replica.remote:
            self.count_departure(lease, 1)
        if self.noting.on:
            self.noting.dispatched(lease, request.chain)
        return lease

    def prefill_ended(self, lease: Lease, now_s: float) -> None:
        """The first octet of the answer has come. Harmless when repeated."""
        if lease.pending:
            self.catch_up()  # whose octets came before left the line before
            self.picture.prefill_ended(lease, now_s)
            if self.noting.on:
                self.noting.prefill_ended(lease)
            self.work_done()

    def release(
        self,
        lease: Lease,
        usage: Usage | None,
        first_octet_s: float,
        now_s: float,
        *,
        served: bool,
        refused: bool,
    ) -> None:
        """It is over. Exactly once for each lease.

        `served`: its prompt has been computed. `refused`: the replica sent it away.
        """
        del self._leases[lease.lease_id]
        if lease.pending and self.fleet.remotes:
            self.count_departure(lease, -1)  # nothing was computed there: it is ours again
        if lease.account is not None:
            loads = self.picture.loads
            settle(self.waiting.shares, lease, loads, usage, first_octet_s, now_s)
        if usage is not None and first_octet_s and lease.streamed:
            self.picture.decoded(lease, usage.completion_tokens, now_s - first_octet_s)
        self.picture.release(lease, now_s, usage, served=served, refused=refused)
        if self.noting.on:
            self.noting.released(lease, usage)
        self.work_done()

    def remember_response(self, response_key: int, replica_name: str) -> None:
        """A replica keeps an answer that later requests may go on from."""
        self.responses.stored(response_key, replica_name)
        if self.noting.on:
            self.noting.stored(response_key, replica_name)

    # --- answers of our own ------------------------------------------------------------------

    def local_answer(self, path: bytes, principal: Principal = ANYBODY) -> bytes:
        """Return the body of a path that the proxy answers itself. Raises `ProxyError`."""
        if path == b"/readyz":
            if self.draining and not self.relieved:
                raise DrainingError("this proxy is draining")
            if not self.ready:
                raise NoReplicaError(self.no_replica_reason())
            return b'{"status":"ready"}'
        if path in (b"/livez", b"/health"):
            return b'{"status":"alive"}'
        return self._models(model_of_path(path).decode("ascii"), principal)

    def _models(self, wanted: str, principal: Principal) -> bytes:
        """OpenAI's model list: what the fleet can serve, whether or not a replica is up now.

        What its reader may not ask for is not there, here as elsewhere.
        """
        may = principal.models
        listed = [
            {"id": model, "object": "model", "created": 0, "owned_by": "doherty"}
            for model, pool in sorted(self.fleet.pools.items())
            if (pool.replicas or pool.remotes or self.fleet.prospect_of(model).wakes)
            and (may is None or model in may)
        ]
        if not wanted:
            return orjson.dumps({"object": "list", "data": listed})
        for model in listed:
            if model["id"] == wanted:
                return orjson.dumps(model)
        raise self.unknown_model(wanted, principal)

    def admit(
        self, route: Route, preamble: Preamble, length: int, known: Principal | None = None
    ) -> Principal:
        """Judge a head by what this proxy may and can serve; return who asks. Raises `ProxyError`.

        A `length` that is announced is judged, but only what has come is held and counted. `known`
        is who asks where another region has found that out.
        """
        if known is None and preamble.crossed:
            self.hops.refuse(preamble)
        principal = known or (
            ANYBODY if route.name == "health" else self.authentication.who_asks(preamble)
        )
        if preamble.encoded:
            raise UnsupportedEncodingError("compressed request bodies are not read here")
        self.judge_length(length)
        if route.local:
            return principal
        if self.exchanges_open > self.config.max_concurrent_requests:
            raise OverloadedError(
                f"{self.config.max_concurrent_requests} requests are in flight already"
            )
        return principal

    def judge_length(self, body_bytes: int) -> None:
        """Refuse a body that is, or will be, too large. Raises `BodyTooLargeError`."""
        if body_bytes > self.config.max_payload_size:
            raise BodyTooLargeError(
                f"the request body is over {self.config.max_payload_size} bytes "
                "(--max-payload-size)"
            )

    def hold_body(self, held_bytes: int, more_bytes: int) -> int:
        """Count octets of one request's body; return how many it holds now. Raises `ProxyError`."""
        held_bytes += more_bytes
        self.judge_length(held_bytes)
        if self.bodies_bytes + more_bytes > self.bodies_bytes_max:
            raise OverloadedError("this proxy holds as many request bodies as it may")
        self.bodies_bytes += more_bytes
        return held_bytes

    def _unsolicited(self) -> None:
        self.telemetry.unsolicited_total += 1

    # --- what is reported --------------------------------------------------------------------

    def counters(self) -> list[Sample]:
        dropped = Sample("access_log_dropped_total", (), self.access_log.dropped_total)
        aborts = "engine_aborts_total"
        return [
            Sample(aborts, (("outcome", "sent"),), self.aborts.sent_total),
            Sample(aborts, (("outcome", "dropped"),), self.aborts.dropped_total),
            *self.telemetry.samples(),
            *self.classes.samples(),
            *self.sharing.counters(),
            *self.waiting.counters(),
            *self.preemption.counters(),
            *self.hops.counters(),
            *self.metering.counters(),
            *span_samples(self.span_counts),
            dropped,
        ]

    def gauges(self, connections_open: int) -> list[Sample]:
        busy = self.upstreams.open_count - self.upstreams.idle_count
        now_s = self.clock.now_s()
        return [
            Sample("client_connections", (), connections_open),
            Sample("requests_in_flight", (), self.exchanges_open),
            Sample("upstream_connections", (("state", "idle"),), self.upstreams.idle_count),
            Sample("upstream_connections", (("state", "busy"),), busy),
            Sample("request_bodies_bytes", (), self.bodies_bytes),
            Sample("leases", (), len(self._leases)),
            Sample("prefix_index_entries", (), self.picture.index.entries()),
            Sample("event_loop_lag_seconds", (), self.telemetry.take_lag_s()),
            *self.sharing.gauges(),
            *self.waiting.gauges(now_s),
            *self.hops.gauges(),
            *beliefs.of_servers(self.fleet, self.picture, self.sharing.hearsay.inflight, now_s),
            *beliefs.of_remotes(self.fleet, self.picture, self.leases, now_s),
        ]


def _offline(config: ProxyConfig) -> Replica | None:
    """Return the address of the service that keeps files and jobs, in the form of a replica's."""
    if config.offline_url is None:
        return None
    return replica_of(ReplicaRecord(replica_id="offline", url=config.offline_url))
