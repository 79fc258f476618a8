"""All that one proxy worker believes of its replicas: what each holds, has to do, and can do.

Decisions read it, and every decision changes it; what other workers and proxies decided is applied
by the same calls, so that all of them see what a single router would see. Replicas have slots,
small numbers that index every list; a slot is given away again only when its replica has gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from proxy.contract import LoadSample
from proxy.contract.regions import RemoteState
from proxy.core import limits
from proxy.core.fleet import Pool
from proxy.core.index import Index, Sighting
from proxy.core.lease import Lease
from proxy.core.lengths import Lengths
from proxy.core.loads import Loads
from proxy.core.outlook import Outlooks
from proxy.core.prefix import PrefixChain
from proxy.core.replica import Replica
from proxy.core.sketch import HotPrefixes
from proxy.core.usage import Usage


class Seats:
    """The replicas of a pool that may take requests, and their slots, in the same order.

    Apart from them, in the same way, its proxies of other regions, whatever can be sent there now.
    """

    __slots__ = ("all_bits", "away", "away_slots", "bits", "places", "pool", "replicas", "slots")

    def __init__(self, pool: Pool, slots: dict[str, int]) -> None:
        self.pool = pool
        self.replicas = [replica for replica in pool.available if replica.name in slots]
        self.slots = [slots[replica.name] for replica in self.replicas]
        self.places = {slot: place for place, slot in enumerate(self.slots)}
        self.bits = sum([1 << slot for slot in self.slots])
        self.away = [remote for remote in pool.remotes if remote.name in slots]
        self.away_slots = [slots[remote.name] for remote in self.away]
        self.all_bits = self.bits | sum([1 << slot for slot in self.away_slots])


class _Sizes:
    """What the answers of one group of replicas have taught: octets a token, and cache sizes."""

    __slots__ = (
        "applied_share", "cache_share", "octets", "prefill_squares", "prefill_tokens",
        "slots", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.octets = float(limits.BYTES_PER_TOKEN * limits.RATIO_PRIOR_TOKENS)
        self.tokens = float(limits.RATIO_PRIOR_TOKENS)
        self.cache_share = 1.0  # of the believed capacity that turned out to be there
        self.applied_share = 1.0
        self.prefill_tokens = 0.0  # of a usual request
        self.prefill_squares = 0.0
        self.slots: set[int] = set()

    @property
    def octets_per_token(self) -> float:
        return self.octets / self.tokens


class Picture:
    """One writer: the event loop of the worker that owns it."""

    def __init__(self, draw: Callable[[], float] | None = None) -> None:
        """`draw` returns the next number in [0, 1), for policies that want chance."""
        self.index = Index()
        self.loads = Loads()
        self.hot = HotPrefixes()
        self.lengths = Lengths()
        self.outlooks = Outlooks()
        self.slots: dict[str, int] = {}
        self.turn = 0  # of round robin
        self.draw = draw
        self._names: list[str] = []  # by slot; empty: free
        self._lives: list[int] = []  # by slot: how often it was given away
        self._misses: list[int] = []  # by slot: prefixes in a row that were not there
        self._restarts: dict[str, int] = {}
        self._read_at_s: dict[str, float] = {}
        self._sizes: dict[str, _Sizes] = {}
        self.size_of: list[_Sizes] = []
        self._heard_at_s: list[float] = []  # by slot: when its gauges came; below 0: never
        self._seats: dict[int, Seats] = {}
        self._lease_id = 0
        # By the name of a remote proxy: its models, and their slots.
        self._remotes: dict[str, list[tuple[str, int]]] = {}

    # --- the fleet ---------------------------------------------------------------------------

    def know(self, replicas: Iterable[Replica], now_s: float = 0.0) -> None:
        """These are the replicas now. Those that restarted or slept have an empty cache."""
        present = {replica.name: replica for replica in replicas}
        self._remotes.clear()
        for name in [name for name in self.slots if name not in present]:
            self._vacate(name)
        for name, replica in present.items():
            if name not in self.slots:
                self._settle_in(replica)
            elif self._restarts[name] != replica.restarts or replica.asleep:
                self.index.clear(self.slots[name])
            if replica.remote:
                places = self._remotes.setdefault(replica.replica_id, [])
                places += [(model, self.slots[name]) for model in replica.models]
            self._restarts[name] = replica.restarts
            slot = self.slots[name]
            running_max = replica.load.running_max if replica.load is not None else 0
            tokens = _capacity_tokens(replica)
            self.loads.limit(slot, tokens, replica.max_inputs, running_max, replica.max_tokens)
            self._size_cache(slot)
            if replica.load is not None and replica.load.at_s != self._read_at_s.get(name):
                self._read_at_s[name] = replica.load.at_s
                self._heard_at_s[slot] = now_s
                self._reconcile(slot, replica.load, now_s)
        self._seats.clear()

    def know_remotes(self, states: Iterable[RemoteState]) -> None:
        """This is what other regions tell of themselves now, of those that are known here."""
        for state in states:
            models = state.summary.models if state.summary is not None else {}
            for name, slot in self._remotes.get(state.name, ()):
                self.outlooks.of[slot].know(state, models.get(name))

    def suspect_remote(self, name: str, now_s: float) -> None:
        """A remote proxy could not be reached."""
        for _, slot in self._remotes.get(name, ()):
            self.outlooks.of[slot].suspect(now_s)

    def remote_answered(self, name: str) -> None:
        """It has served, or may be there at least."""
        for _, slot in self._remotes.get(name, ()):
            self.outlooks.of[slot].answered()

    def some_remote_serves(self, now_s: float) -> bool:
        """Whether another region serves anything."""
        return any(o.serves and not o.why_not(now_s) for o in self.outlooks.of.values())

    def may_leave(self, seats: Seats, now_s: float) -> bool:
        """Whether some remote of a pool would take one of those who wait for it."""
        loads = self.loads
        for slot in seats.away_slots:
            outlook = self.outlooks.of[slot]
            if outlook.why_not(now_s):
                continue
            inflight = loads.inflight[slot]
            if outlook.begins(inflight, now_s):
                return True
            if not seats.slots and outlook.takes(inflight, now_s):
                return True
        return False

    def some_serve(self, seats: Seats, tried: Collection[str], now_s: float) -> bool:
        """Whether a remote of a pool that was not `tried` serves it, or should again in a moment.

        It may have no room now.
        """
        for remote, slot in zip(seats.away, seats.away_slots, strict=True):
            outlook = self.outlooks.of[slot]
            if remote.name in tried or not outlook.serves:
                continue
            if not outlook.why_not(now_s) or outlook.returns_soon(now_s):
                return True
        return False

    def sweep(self, now_s: float) -> None:
        """Forget gauges that nobody has renewed."""
        for slot, heard_s in enumerate(self._heard_at_s):
            if heard_s >= 0.0 and now_s - heard_s > limits.GAUGE_AGE_S_MAX:
                self._heard_at_s[slot] = -1.0
                self.loads.forget_gauges(slot)

    @property
    def last_lease_id(self) -> int:
        """The id given last; they count up, and around."""
        return self._lease_id

    def life_of(self, slot: int) -> int:
        """Return the number of the slot's life, which a lease on it must name."""
        return self._lives[slot]

    def seats(self, pool: Pool) -> Seats:
        found = self._seats.get(id(pool))
        if found is None or found.pool is not pool:
            if len(self._seats) >= limits.SEATS_REMEMBERED_MAX:
                self._seats.clear()
            found = self._seats[id(pool)] = Seats(pool, self.slots)
        return found

    def _settle_in(self, replica: Replica) -> None:
        slot = self._names.index("") if "" in self._names else len(self._names)
        if slot == len(self._names):
            self._names.append("")
            self._lives.append(-1)
            self._misses.append(0)
            self._heard_at_s.append(-1.0)
            self.size_of.append(_Sizes())
        self._names[slot] = replica.name
        self._lives[slot] += 1
        self._misses[slot] = 0
        self._heard_at_s[slot] = -1.0
        self.slots[replica.name] = slot
        group = group_of(replica)
        sizes = self._sizes.get(group)
        if sizes is None:
            sizes = self._sizes[group] = _Sizes()
        sizes.slots.add(slot)
        self.size_of[slot] = sizes
        if replica.remote:
            self.outlooks.open(slot, replica.region, min(replica.models))
        tokens = _capacity_tokens(replica)
        self.loads.open(slot, group, capacity_tokens=tokens, inflight_max=replica.max_inputs)
        self.index.open(slot, self.cache_octets(slot))

    def _vacate(self, name: str) -> None:
        slot = self.slots.pop(name)
        self.index.close(slot)
        self.loads.close(slot)
        self.outlooks.close(slot)
        self._names[slot] = ""
        self._restarts.pop(name, None)
        self._read_at_s.pop(name, None)
        self.size_of[slot].slots.discard(slot)
        for group in [k for k, sizes in self._sizes.items() if not sizes.slots]:
            del self._sizes[group]

    def _reconcile(self, slot: int, load: LoadSample, now_s: float) -> None:
        sizes, waiting_tokens = self.size_of[slot], load.waiting_tokens
        if load.waiting and not waiting_tokens:  # vLLM counts requests: they will be like others
            waiting_tokens = int(load.waiting * sizes.prefill_tokens)
        if waiting_tokens and sizes.prefill_tokens:  # what is left of the one that they wait for
            waiting_tokens += int(sizes.prefill_squares / sizes.prefill_tokens / 2)
        self.loads.reconcile(
            slot,
            requests=load.running + load.waiting,
            waiting_tokens=waiting_tokens,
            held_tokens=load.used_tokens or int(load.kv_used_ratio * load.kv_capacity_tokens),
            now_s=now_s,
        )

    # --- one request -------------------------------------------------------------------------

    def tokens_of(self, octets: int, slot: int) -> int:
        """Return how many tokens so many octets of a prompt are for the model of this replica."""
        return int(octets / self.size_of[slot].octets_per_token)

    def usual_tokens(self, slot: int) -> float:
        """Return how many tokens of a usual request are still to be computed when it comes."""
        return self.size_of[slot].prefill_tokens

    def prompt_tokens_of(self, chain: PrefixChain, pool: Pool | None) -> int:
        """Return the tokens of a whole prompt: as an answer told, or by the mean of its model."""
        told = self.lengths.tokens_at(chain, chain.prompt_bytes)
        if told >= 0:
            return told
        slots = self.seats(pool).slots if pool is not None else []
        if not slots:
            return chain.prompt_bytes // limits.BYTES_PER_TOKEN
        return self.tokens_of(chain.prompt_bytes, slots[0])

    def cached_tokens_of(self, chain: PrefixChain, cached_octets: int, slot: int) -> int:
        """Return the tokens of what is believed cached: as an answer told, or by the mean."""
        told = self.lengths.tokens_at(chain, cached_octets) if cached_octets else 0
        return told if told >= 0 else self.tokens_of(cached_octets, slot)

    def acquire(
        self,
        replica: Replica,
        chain: PrefixChain,
        *,
        cached_octets: int,
        now_s: float,
        streamed: bool = True,
        weight: float = 1.0,
        known: int = 0,
        whole: bool = True,
    ) -> Lease:
        """Count a request that goes to this replica now, and what it will leave there.

        `known` is the hash of the longest prefix of it that any replica held; 0: none. `whole`: the
        prompt is all in the request, and no part of it with the engine.
        """
        if known and self.hot.count(known):
            self.hot.measure(known, chain.ends[chain.hashes.index(known)])
        slot = self.slots[replica.name]
        lease = self.lease(
            replica.name, slot, chain, cached_octets=cached_octets, streamed=streamed, weight=weight
        )
        if not whole:
            lease.prompt_octets = 0  # the answer's counts cannot be compared with it
        if self.loads.headcount is not None:
            self.loads.headcount.hold(lease)
        self.dispatched(lease, chain, now_s)
        return lease

    def reserve(self, chain: PrefixChain, cached_octets: int, slot: int, work_class: int) -> bool:
        """Take the place of a request that goes to this slot's replica in this turn, if it may."""
        if self.loads.headcount is None:
            return True
        tokens = self.tokens_of(chain.prompt_bytes - cached_octets, slot)
        return self.loads.reserve(slot, self._names[slot], max(1, tokens), work_class)

    def lease(
        self,
        name: str,
        slot: int,
        chain: PrefixChain,
        *,
        cached_octets: int,
        streamed: bool,
        weight: float,
    ) -> Lease:
        self._lease_id = (self._lease_id + 1) & 0xFFFFFFFF
        lease = Lease(
            slot,
            name,
            prefill_tokens=self.tokens_of(chain.prompt_bytes - cached_octets, slot),
            prompt_tokens=self.tokens_of(chain.prompt_bytes, slot),
            streamed=streamed,
            weight=weight,
            lease_id=self._lease_id,
        )
        lease.life = self._lives[slot]
        lease.prompt_octets = chain.prompt_bytes
        lease.cached_octets = cached_octets
        return lease

    def dispatched(self, lease: Lease, chain: PrefixChain, now_s: float) -> None:
        """Whoever decided it: this request is on its way."""
        lease.sighting = self.index.note(lease.slot, chain)
        lease.first_noted = self.index.first_noted
        self.loads.acquire(lease, now_s)
        if self.outlooks.of:
            self.outlooks.dispatched(lease)
        sizes = self.size_of[lease.slot]
        tokens = lease.prefill_tokens
        sizes.prefill_tokens += limits.MIX_SHARE * (tokens - sizes.prefill_tokens)
        sizes.prefill_squares += limits.MIX_SHARE * (tokens * tokens - sizes.prefill_squares)

    def prefill_ended(self, lease: Lease, now_s: float) -> None:
        if self._current(lease):
            self.loads.prefilling.ended(lease, now_s)

    def release(
        self,
        lease: Lease,
        now_s: float,
        usage: Usage | None = None,
        *,
        served: bool = True,
        refused: bool = False,
    ) -> None:
        """The request is over, for whatever reason; `usage` is what its answer said, if it did.

        `served`: it was answered; `refused`: the replica sent it away, or failed.
        """
        if lease.cell >= 0 and self.loads.headcount is not None:
            self.loads.headcount.give_back(lease)
        if not self._current(lease):
            assert not lease.released, "a lease is released exactly once"
            lease.released = True
            return
        computed_tokens = 0
        if usage is not None and usage.cached_tokens is not None:
            computed_tokens = max(1, usage.prompt_tokens - usage.cached_tokens)
        self.loads.release(lease, now_s, computed_tokens, served=served)
        if self.outlooks.of and self.outlooks.released(lease, now_s, refused=refused):
            refused = False
        if refused:
            self.loads.refused(lease.slot, now_s)
        if usage is not None:
            self._learn(lease, usage)

    def decoded(self, lease: Lease, tokens: int, seconds: float) -> None:
        """An answer took so long from its first token to its last."""
        if self._current(lease):
            self.loads.decoded(lease.slot, tokens, seconds)

    def _current(self, lease: Lease) -> bool:
        """Whether the slot still is that of the replica that the lease was taken on."""
        return self._lives[lease.slot] == lease.life and bool(self._names[lease.slot])

    # --- what answers teach ------------------------------------------------------------------

    def _learn(self, lease: Lease, usage: Usage) -> None:
        self.loads.pacing.learn_length(lease.slot, usage.completion_tokens)
        if usage.prompt_tokens <= 0 or lease.prompt_octets <= 0:
            return
        sizes = self.size_of[lease.slot]
        # One answer moves it by a twentieth at the most, and only between what text can be.
        part = min(1.0, limits.RATIO_WINDOW_TOKENS / 20 / usage.prompt_tokens)
        tokens, octets = usage.prompt_tokens * part, lease.prompt_octets * part
        octets = min(max(octets, tokens * limits.RATIO_MIN), tokens * limits.RATIO_MAX)
        keep = 1.0 - tokens / limits.RATIO_WINDOW_TOKENS
        sizes.octets = sizes.octets * keep + octets
        sizes.tokens = sizes.tokens * keep + tokens
        if usage.cached_tokens is not None and lease.sighting is not None:
            cached_octets = int(usage.cached_tokens * lease.prompt_octets / usage.prompt_tokens)
            self._resize(lease.slot, lease.sighting, sizes, cached_octets)

    def _resize(self, slot: int, sighting: Sighting, sizes: _Sizes, cached_octets: int) -> None:
        """Move the believed size of the caches towards where an answer says that it is.

        Under least recent use, what is there is what was used more recently than the cache is
        large. Something that is there although it was thought too old, or gone although it was
        thought young enough, moves the border part of the way to it; all else teaches nothing.
        """
        present, away = 2 * cached_octets >= sighting.octets, sighting.away
        self._misses[slot] = 0 if present else self._misses[slot] + 1
        if self._misses[slot] > limits.MISSES_TAUGHT_MAX:
            return  # this one has lost its cache; that says nothing of its size
        if present and away > 1.0:
            sizes.cache_share *= 1.0 + limits.RESIZE_SHARE * (min(away, 2.0) - 1.0)
        elif not present and limits.RESIZE_YOUNG_SHARE < away < 1.0:
            sizes.cache_share *= 1.0 - limits.RESIZE_SHARE * (1.0 - max(away, 0.5))
        else:
            return
        low, high = limits.CACHE_SHARE_MIN, limits.CACHE_SHARE_MAX
        sizes.cache_share = min(max(sizes.cache_share, low), high)
        if abs(sizes.cache_share - sizes.applied_share) > 0.02 * sizes.applied_share:
            sizes.applied_share = sizes.cache_share
            for each in sizes.slots:
                self._size_cache(each)

    def cache_octets(self, slot: int) -> int:
        """Return the KV cache that the replica is believed to have, in octets of prompts."""
        sizes = self.size_of[slot]
        tokens = self.loads.capacity_tokens[slot] * sizes.applied_share
        return max(1, int(tokens * sizes.octets_per_token))

    def _size_cache(self, slot: int) -> None:
        self.index.set_capacity(slot, self.cache_octets(slot))

    def cache_tokens(self, slot: int) -> int:
        """Return the KV cache that the replica is believed to have, in tokens."""
        return int(self.loads.capacity_tokens[slot] * self.size_of[slot].applied_share)


def group_of(replica: Replica) -> str:
    """Name the replicas that should be alike: one model, in one pool, on one engine."""
    model = min(replica.models) if replica.models else ""
    return f"{replica.pool}\n{replica.engine}\n{model}"


def _capacity_tokens(replica: Replica) -> int:
    return replica.kv_capacity_tokens or limits.KV_CAPACITY_TOKENS_DEFAULT
