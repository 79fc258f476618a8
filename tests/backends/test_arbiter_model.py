"""Many pools on one set of cards, over time: what must hold whatever they want."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.arbiter import Unserved, arbitrate
from backends.claims import Claim, Holder, Lower, Raise, Room, Transit, Verdict
from backends.gpus import Gpu
from backends.ladder import Ladder, Resting, Rung, RungCost, Rungs
from backends.planning.goal import WorkClass
from backends.shares import PATIENCE_S, TURN_S_MIN, TURN_STARTS

ALLOWED = frozenset({Rung.ASLEEP, Rung.SUSPENDED})


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    work_class: WorkClass = "online"
    gpus_each: int = 1
    min: int = 0
    weight: float = 1.0
    up_s: float = 5.0
    down_s: float = 2.0


class Replica(msgspec.Struct, kw_only=True):
    pool: str
    rung: Rung
    devices: tuple[str, ...]
    transit: Transit = Transit.COMING
    done_s: float = 0.0
    up_at_s: float = math.inf


class World:
    """Cards and replicas that do as they are told, each move in its own time."""

    def __init__(self, cards: int, pools: Sequence[Pool]) -> None:
        self.now_s = 0.0
        self.gpus = tuple(Gpu(device=str(n), name="h200") for n in range(cards))
        self.pools = {pool.name: pool for pool in pools}
        self.desired = {pool.name: 0 for pool in pools}
        self.replicas: dict[str, Replica] = {}
        self.unserved = Unserved()
        self.longest_s = {pool.name: 0.0 for pool in pools}
        self.moves = 0
        self._count = 0
        self._ladder = Ladder()
        for pool in pools:
            cost = RungCost(pool.up_s, pool.down_s)
            turns = dict.fromkeys((*ALLOWED, Rung.COLD), cost)
            self._ladder.learn(pool.name, "any", turns)

    def run(self, seconds: int, judge: Callable[[Verdict], None] = lambda verdict: None) -> None:
        for _ in range(seconds):
            self.tick(judge)

    def tick(self, judge: Callable[[Verdict], None] = lambda verdict: None) -> Verdict:
        self._arrive()
        claims = self.claims()
        verdict = arbitrate(claims, self.room())
        assert verdict == arbitrate(claims, self.room())
        before = {pool: self.serving(pool) for pool in self.pools}
        for move in verdict.moves:
            self._apply(move)
        self._check(before)
        judge(verdict)
        self.now_s += 1.0
        return verdict

    def serving(self, pool: str) -> int:
        return sum(
            r.pool == pool and r.rung is Rung.AWAKE and r.transit is Transit.NONE
            for r in self.replicas.values()
        )

    def room(self) -> Room:
        held = {device for r in self.replicas.values() for device in r.devices}
        free = frozenset(gpu.device for gpu in self.gpus if gpu.device not in held)
        return Room(gpus=self.gpus, free=free)

    def claims(self) -> list[Claim]:
        none = [p for p in self.pools if self.wants(p) and not self.serving(p)]
        waits_s = self.unserved.note(none, self.now_s)
        for pool, waited_s in waits_s.items():
            self.longest_s[pool] = max(self.longest_s[pool], waited_s)
        return [self._claim(pool, waits_s.get(pool.name, 0.0)) for pool in self.pools.values()]

    def wants(self, pool: str) -> int:
        return max(self.desired[pool], self.pools[pool].min)

    def _claim(self, pool: Pool, unserved_s: float) -> Claim:
        rungs = Rungs(launch_hash=pool.name, engine="simulator", allowed=ALLOWED)
        mine = {name: r for name, r in self.replicas.items() if r.pool == pool.name}
        resting = [
            Resting(name, r.rung)
            for name, r in mine.items()
            if r.rung is not Rung.AWAKE and r.transit is Transit.NONE
        ]
        rests = self._ladder.rests(rungs, self.now_s)
        return Claim(
            pool=pool.name,
            work_class=pool.work_class,
            gpus_each=pool.gpus_each,
            desired=self.desired[pool.name],
            min=pool.min,
            weight=pool.weight,
            unserved_s=unserved_s,
            queued=int(self.serving(pool.name) < self.wants(pool.name)),
            ways_up=self._ladder.ways_up(rungs, resting, self.now_s),
            holders=tuple(
                Holder(
                    replica_id=name,
                    rung=r.rung,
                    transit=r.transit,
                    devices=r.devices,
                    from_nothing=not r.rung.has_process,
                    up_for_s=max(0.0, self.now_s - r.up_at_s),
                    start_s=pool.up_s,
                    rests=rests,
                )
                for name, r in mine.items()
            ),
        )

    def _arrive(self) -> None:
        for name, replica in list(self.replicas.items()):
            if replica.transit is Transit.NONE or replica.done_s > self.now_s:
                continue
            if replica.transit is Transit.COMING:
                replica.rung, replica.up_at_s = Rung.AWAKE, self.now_s
            replica.transit = Transit.NONE
            if not replica.rung.holds_gpus:
                replica.devices = ()
            if not replica.rung.has_process:
                del self.replicas[name]

    def _apply(self, move: object) -> None:
        if isinstance(move, Lower):
            self.moves += 1
            replica = self.replicas[move.replica_id]
            if replica.transit is Transit.COMING:
                assert self.pools[replica.pool].work_class == "offline"
                assert move.rung is replica.rung is Rung.COLD
            else:
                assert replica.transit is Transit.NONE
                assert move.rung.depth > replica.rung.depth
            replica.rung, replica.transit = move.rung, Transit.GOING
            replica.done_s = self.now_s + self.pools[replica.pool].down_s
        elif isinstance(move, Raise):
            self.moves += 1
            pool = self.pools[move.pool]
            free = self.room().free
            assert free.issuperset(move.devices)
            name = move.replica_id
            if name is None:
                self._count += 1
                name = f"{pool.name}-{self._count}"
                self.replicas[name] = Replica(pool=pool.name, rung=move.rung, devices=())
            replica = self.replicas[name]
            assert (move.replica_id is None) or replica.transit is Transit.NONE
            assert replica.rung is move.rung
            replica.devices = replica.devices or move.devices
            assert len(replica.devices) == pool.gpus_each
            replica.transit, replica.done_s = Transit.COMING, self.now_s + pool.up_s

    def _check(self, before: dict[str, int]) -> None:
        held = [device for r in self.replicas.values() for device in r.devices]
        assert len(held) == len(set(held))
        for name, pool in self.pools.items():
            assert self.serving(name) >= min(before[name], pool.min)


def pools_of(work_class: WorkClass) -> st.SearchStrategy[Pool]:
    return st.builds(
        Pool,
        name=st.just(""),
        work_class=st.just(work_class),
        gpus_each=st.sampled_from((1, 1, 1, 2, 4)),
        min=st.sampled_from((0, 0, 0, 1)),
        weight=st.sampled_from((1.0, 1.0, 2.0)),
        up_s=st.sampled_from((0.0, 1.0, 7.0)),
        down_s=st.sampled_from((0.0, 2.0)),
    )


ANY_POOL = st.sampled_from(("online", "semi-online", "offline")).flatmap(pools_of)


def named(pools: Sequence[Pool]) -> list[Pool]:
    return [msgspec.structs.replace(pool, name=f"p{n}") for n, pool in enumerate(pools)]


@settings(max_examples=40, deadline=None)
@given(
    cards=st.integers(1, 8),
    pools=st.lists(ANY_POOL, min_size=1, max_size=6).map(named),
    changes=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(1, 20)), max_size=12
    ),
)
def test_whatever_is_wanted_no_card_is_given_twice_and_no_pool_falls_below_its_min(
    cards: int, pools: list[Pool], changes: list[tuple[int, int, int]]
) -> None:
    world = World(cards, pools)
    for index, desired, seconds in changes:
        world.desired[pools[index % len(pools)].name] = desired
        world.run(seconds)


@settings(max_examples=20, deadline=None)
@given(
    pools=st.lists(ANY_POOL, min_size=1, max_size=6).map(named),
    wants=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    before=st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
def test_where_all_fits_all_get_what_they_want_and_then_nothing_moves(
    pools: list[Pool], wants: list[int], before: list[int]
) -> None:
    cards = sum(p.gpus_each * max(now, p.min) for p, now in zip(pools, wants, strict=False))
    world = World(cards, pools)
    for pool, then in zip(pools, before, strict=False):
        world.desired[pool.name] = then
    world.run(30)
    for pool, now in zip(pools, wants, strict=False):
        world.desired[pool.name] = now
    world.run(150)
    assert {p.name: world.serving(p.name) for p in pools} == {
        p.name: max(now, p.min) for p, now in zip(pools, wants, strict=False)
    }
    moves = world.moves
    world.run(60)
    assert world.moves == moves


@settings(max_examples=4, deadline=None)
@given(
    cards=st.integers(1, 4),
    pools=st.lists(
        ANY_POOL.map(lambda p: msgspec.structs.replace(p, min=0)), min_size=2, max_size=7
    ).map(named),
    desired=st.integers(1, 4),
)
def test_no_pool_waits_longer_than_the_bound(cards: int, pools: list[Pool], desired: int) -> None:
    largest = max(p.gpus_each for p in pools)
    places = (cards + largest - 1) // largest
    world = World(places * largest, pools)
    world.desired = dict.fromkeys(world.desired, desired)
    turn_s = max(max(TURN_S_MIN, TURN_STARTS * p.up_s) * p.weight for p in pools)
    up_s, down_s = max(p.up_s for p in pools), 2 * max(p.down_s for p in pools)
    ticks = 3  # a decision is made once a second: to lower, to raise, to see that it serves
    round_s = turn_s + up_s + down_s + ticks
    bounds = {
        p.name: PATIENCE_S[p.work_class] + math.ceil(len(pools) / places) * round_s for p in pools
    }
    world.run(int(max(bounds.values())) + int(2 * round_s))
    assert {n: s for n, s in world.longest_s.items() if s > bounds[n]} == {}
    assert all(world.longest_s[p.name] < bounds[p.name] for p in pools)


def test_online_has_what_it_wants_before_offline_has_any() -> None:
    pools = [Pool(name="on"), Pool(name="off", work_class="offline")]
    world = World(4, pools)
    world.desired = {"on": 0, "off": 4}
    world.run(20)
    assert world.serving("off") == 4
    world.desired["on"] = 3
    world.run(20)
    assert (world.serving("on"), world.serving("off")) == (3, 1)


def test_lasting_scarcity_is_shared_by_weight() -> None:
    pools = [Pool(name="heavy", weight=2.0), Pool(name="light"), Pool(name="other")]
    world = World(8, pools)
    world.desired = dict.fromkeys(world.desired, 8)
    world.run(60)
    assert [world.serving(p.name) for p in pools] == [4, 2, 2]


def test_one_card_goes_round_by_weight_and_most_of_the_time_it_serves() -> None:
    pools = [Pool(name="heavy", weight=2.0), Pool(name="light")]
    world = World(1, pools)
    world.desired = dict.fromkeys(world.desired, 1)
    served = dict.fromkeys(world.desired, 0)
    for _ in range(2000):
        world.tick()
        for pool in served:
            served[pool] += world.serving(pool)
    assert 1.8 < served["heavy"] / served["light"] < 2.2
    assert sum(served.values()) > 0.75 * 2000


def test_a_burst_of_all_moves_each_card_once() -> None:
    pools = [Pool(name=f"p{n}") for n in range(4)]
    world = World(4, pools)
    world.desired["p0"] = 4
    world.run(20)
    moves = world.moves
    world.desired = dict.fromkeys(world.desired, 4)
    world.run(200)
    assert [world.serving(p.name) for p in pools] == [1, 1, 1, 1]
    assert world.moves - moves == 6  # three go, three come
