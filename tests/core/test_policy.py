"""The choice of a replica: never one that cannot, always for a reason, and never by luck."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.contract import ReplicaState
from proxy.core import claim_limits, limits
from proxy.core.cost import stall_s
from proxy.core.fleet import Pool
from proxy.core.lease import Lease
from proxy.core.picture import Picture
from proxy.core.policy import POLICIES, REASONS, Decision, Prices, Request, terms
from proxy.core.prefix import NO_CHAIN, PrefixChain
from proxy.core.replica import Replica
from proxy.core.usage import Usage
from tests.core.builders import chain, pool, replica

_RATE = limits.PREFILL_TOKENS_PER_S_DEFAULT
_OCTETS = limits.BYTES_PER_TOKEN


def _picture(replicas: Pool) -> Picture:
    picture = Picture(random.Random(7).random)
    picture.know(replicas.replicas.values())
    return picture


def _request(
    prompt: PrefixChain | None = None,
    *,
    has_session: bool = False,
    tried: set[str] | None = None,
) -> Request:
    request = Request(prompt or chain(1, 512), has_session=has_session)
    request.tried |= tried or set()
    return request


def _choose(
    policy: str, replicas: Pool, picture: Picture, request: Request | None = None, now_s: float = 0
) -> tuple[str, str] | None:
    decision: Decision | None = POLICIES[policy](request or _request(), replicas, picture, now_s)
    if decision is None:
        return None
    assert decision.reason in REASONS
    return decision.replica.replica_id, decision.reason


def _load(picture: Picture, name: str, tokens: int, now_s: float = 0.0) -> Lease:
    """Put a prompt of so many tokens on a replica, of which it has nothing."""
    lease = Lease(picture.slots[name], name, prefill_tokens=tokens, prompt_tokens=tokens)
    picture.loads.acquire(lease, now_s)
    return lease


def _walk(replicas: Pool, key: int = 1) -> list[str]:
    return list(replicas.ring.walk(key))


_STATES = st.sampled_from([ReplicaState.READY] * 3 + [ReplicaState.DRAINING, ReplicaState.BACKOFF])


@st.composite
def _situations(draw: st.DrawFn) -> tuple[list[Replica], Picture, Request]:
    names = "abcdef"[: draw(st.integers(0, 6))]
    made = [
        replica(
            name,
            state=draw(_STATES),
            max_inputs=draw(st.integers(0, 3)),
            suspect=draw(st.integers(0, 3)) == 0,
        )
        for name in names
    ]
    picture = _picture(pool(made))
    prompt = chain(draw(st.integers(1, 1 << 60)), 4096, 40_000, 400_000)
    for name in names:
        for tokens in draw(st.lists(st.integers(0, 20_000), max_size=3)):
            _load(picture, name, tokens)
        if draw(st.booleans()):
            picture.index.note(picture.slots[name], prompt)
    request = Request(prompt, has_session=draw(st.booleans()))
    request.tried |= set(draw(st.lists(st.sampled_from("abcdef"), max_size=3)))
    return made, picture, request


@pytest.mark.sweep
@pytest.mark.parametrize("policy", POLICIES)
@given(situation=_situations(), now_s=st.floats(0, 10))
def test_a_choice_is_one_that_may_take_it_and_is_the_same_each_time(
    policy: str, situation: tuple[list[Replica], Picture, Request], now_s: float
) -> None:
    made, picture, request = situation
    replicas = pool(made)
    may = {
        r.replica_id
        for r in made
        if r.available
        and r.replica_id not in request.tried
        and not (r.max_inputs and picture.loads.inflight[picture.slots[r.name]] >= r.max_inputs)
    }
    chosen = _choose(policy, replicas, picture, request, now_s)
    assert (chosen is None) == (not may)
    if chosen is not None:
        assert chosen[0] in may
    if policy in ("prefix", "session", "least_load"):
        shuffled = pool(reversed(made))
        assert _choose(policy, shuffled, picture, request, now_s) == chosen


@given(situation=_situations(), now_s=st.floats(0, 10))
def test_the_cheapest_is_taken_and_its_terms_add_up(
    situation: tuple[list[Replica], Picture, Request], now_s: float
) -> None:
    made, picture, request = situation
    request.has_session = False
    replicas = pool(made)
    decision = POLICIES["prefix"](request, replicas, picture, now_s)
    if decision is None:
        return
    prices = Prices(request, replicas, picture, now_s)
    for place, slot in enumerate(prices.seats.slots):
        if prices.prices_s[place] < float("inf"):
            one = Decision(prices.seats.replicas[place], slot, "", prices.cached_octets(place))
            priced = terms(one, request, picture, now_s)
            assert priced.price_s == pytest.approx(prices.prices_s[place], abs=1e-3)
            parts = priced.as_dict()
            total = sum(parts[k] for k in parts if k.endswith("_s") and k != "price_s")
            assert parts["price_s"] == pytest.approx(total, abs=1e-4)
    least = min(prices.prices_s)
    place = prices.seats.slots.index(decision.slot)
    assert prices.prices_s[place] <= least + limits.SAME_PRICE_S_MAX + limits.SAME_PRICE_S


def test_a_conversation_stays_where_its_prefix_is() -> None:
    replicas = pool([replica(name) for name in "abc"])
    picture = _picture(replicas)
    first = _request(chain(1, 4096, 40_000))
    assert _choose("prefix", replicas, picture, first) == ("a", "new")
    picture.index.note(picture.slots["b"], first.chain)
    later = _request(chain(1, 4096, 40_000, 60_000))
    assert _choose("prefix", replicas, picture, later) == ("b", "prefix")


def test_staying_costs_more_than_computing_again_and_only_then_it_moves() -> None:
    replicas = pool([replica(name) for name in "ab"])
    picture = _picture(replicas)
    wanted = _request(chain(1, 40_000))
    picture.index.note(picture.slots["a"], wanted.chain)
    toll_tokens = int((1 + limits.RECOMPUTE_WEIGHT) * 40_000 / _OCTETS)
    picture.loads.dispatched_tokens[picture.slots["b"]] = 10**9
    lease = _load(picture, "a", toll_tokens - 10)
    assert _choose("prefix", replicas, picture, wanted) == ("a", "prefix")
    picture.release(lease, 0.0)
    _load(picture, "a", int(toll_tokens + limits.SAME_PRICE_S_MAX * _RATE) + 10)
    assert _choose("prefix", replicas, picture, wanted) == ("b", "spill")
    # What must be computed by now no longer counts.
    assert _choose("prefix", replicas, picture, wanted, 0.5) == ("a", "prefix")


def test_streams_that_decode_make_a_long_prefill_dearer_there() -> None:
    replicas = pool([replica(name) for name in "ab"])
    picture = _picture(replicas)
    for _ in range(20):
        picture.prefill_ended(_load(picture, "a", 1), 0.0)
    picture.loads.dispatched_tokens[picture.slots["b"]] = 10_000  # which alone would have it be a
    assert _choose("prefix", replicas, picture, _request(chain(3, 40_000))) == ("b", "new")
    free = Request(chain(3, 40_000), has_session=False, weight=0.0)
    for _ in range(200):  # work for which nobody waits holds up nobody
        lease = picture.acquire(
            replicas.replicas["b"], chain(9, 4), cached_octets=0, now_s=0.0, weight=0.0
        )
        picture.prefill_ended(lease, 0.0)
    assert _choose("prefix", replicas, picture, free) == ("b", "new")


def test_those_who_wait_there_are_held_up_as_well_since_they_will_have_begun() -> None:
    replicas = pool([replica(name) for name in "ab"])
    picture = _picture(replicas)
    for _ in range(20):
        _load(picture, "a", 1)
    picture.loads.dispatched_tokens[picture.slots["b"]] = 10_000
    assert _choose("prefix", replicas, picture, _request(chain(3, 40_000))) == ("b", "new")


def test_what_a_prompt_costs_others_ends_at_a_chunk_and_is_halved_behind_a_line() -> None:
    replicas = pool([replica("a")])
    picture = _picture(replicas)
    loads, slot = picture.loads, picture.slots["a"]
    assert stall_s(loads, slot, 8_192, 0.0) == 0.0
    held = [_load(picture, "a", 1) for _ in range(4)]
    chunk_s = stall_s(loads, slot, limits.STALL_TOKENS_MAX, 0.0)
    by_hand_s = limits.STALL_TOKENS_MAX / _RATE * limits.STALL_WEIGHT * 4
    assert chunk_s == pytest.approx(by_hand_s / claim_limits.OUTPUT_TOKENS_DEFAULT)
    assert stall_s(loads, slot, 100_000, 0.0) == chunk_s
    assert stall_s(loads, slot, limits.STALL_TOKENS_MAX // 2, 0.0) == pytest.approx(chunk_s / 2)
    assert stall_s(loads, slot, 8_192, limits.STALL_LINE_S) == pytest.approx(chunk_s / 2)
    for each in held:  # each with an answer of four times the length
        usage = Usage(1, int(4 * claim_limits.OUTPUT_TOKENS_DEFAULT), None)
        picture.release(each, 1.0, usage)
    assert stall_s(loads, slot, 8_192, 0.0) == 0.0
    _load(picture, "a", 1)
    assert 0.0 < stall_s(loads, slot, 8_192, 0.0) < chunk_s / 4 / 1.5


def test_prompts_that_share_nothing_go_to_the_least_work() -> None:
    replicas = pool([replica(name) for name in "abcd"])
    picture = _picture(replicas)
    sent: Counter[str] = Counter()
    for key in range(1, 101):
        request = _request(chain(key, 4096))
        decision = POLICIES["prefix"](request, replicas, picture, 0.0)
        assert decision is not None
        picture.acquire(decision.replica, request.chain, cached_octets=0, now_s=0.0)
        sent[decision.replica.name] += 1
    assert set(sent.values()) == {25}


def test_a_prefix_that_all_want_comes_to_lie_everywhere() -> None:
    replicas = pool([replica(name) for name in "abcd"])
    picture = _picture(replicas)
    sent: Counter[str] = Counter()
    for key in range(1, 101):
        prompt = PrefixChain(key, (7, key * 1000), (8192, 16_384), 16_384)
        decision = POLICIES["prefix"](_request(prompt), replicas, picture, 0.0)
        assert decision is not None
        lease = picture.acquire(
            decision.replica,
            prompt,
            cached_octets=decision.cached_octets,
            now_s=float(key),
            known=decision.known,
        )
        picture.release(lease, key + 0.5)  # nobody ever waits, so only heat can spread it
        sent[decision.replica.name] += 1
    assert len(sent) == 4
    assert max(sent.values()) <= 25 + limits.HOT_COUNT_MIN


def test_documents_that_only_a_few_share_stay_where_they_are() -> None:
    replicas = pool([replica(name) for name in "abcd"])
    picture = _picture(replicas)
    for name in "abcd":
        picture.loads.limit(picture.slots[name], 100_000)
        picture.index.set_capacity(picture.slots[name], 400_000)
    homes: dict[int, set[str]] = {}
    for turn in range(200):
        document = turn % 8
        prompt = PrefixChain(turn + 1, (document, 10**6 + turn), (160_000, 161_000), 161_000)
        decision = POLICIES["prefix"](_request(prompt), replicas, picture, float(turn))
        assert decision is not None
        lease = picture.acquire(
            decision.replica,
            prompt,
            cached_octets=decision.cached_octets,
            now_s=float(turn),
            known=decision.known,
        )
        picture.release(lease, turn + 0.5)
        homes.setdefault(document, set()).add(decision.replica.name)
    assert all(len(names) == 1 for names in homes.values())


def test_a_session_goes_by_the_ring_while_nothing_of_it_is_known() -> None:
    replicas = pool([replica(name) for name in "abcdef"])
    picture = _picture(replicas)
    for key in range(1, 30):
        home, after, *_ = _walk(replicas, key)
        session = _request(chain(key, 4096), has_session=True)
        assert _choose("prefix", replicas, picture, session) == (home, "session")
        lease = _load(picture, home, int(_RATE * 2 * limits.SPILL_SLACK_S))
        assert _choose("prefix", replicas, picture, session) == (after, "spill")
        picture.release(lease, 0.0)


def test_a_session_stays_at_its_home_however_busy() -> None:
    replicas = pool([replica(name) for name in "abc"])
    picture = _picture(replicas)
    home, after, _ = _walk(replicas)
    _load(picture, home, 1_000_000)
    request = _request(has_session=True)
    assert _choose("session", replicas, picture, request) == (home, "session")
    picture.loads.limit(picture.slots[home], 100_000, inflight_max=1)
    assert _choose("session", replicas, picture, request) == (after, "spill")
    picture.loads.limit(picture.slots[home], 100_000)
    request.tried.add(home)
    assert _choose("session", replicas, picture, request) == (after, "spill")


def test_routers_that_share_nothing_agree_by_the_ring() -> None:
    replicas = pool([replica(name) for name in "abcdef"])
    picture = _picture(replicas)
    for name in "abcdef":
        picture.loads.reconcile(
            picture.slots[name], requests=5, waiting_tokens=0, held_tokens=0, now_s=0.0
        )
    for key in range(1, 30):
        home = _walk(replicas, key)[0]
        assert _choose("prefix", replicas, picture, _request(chain(key, 4096))) == (home, "home")


def test_a_request_without_a_prompt_goes_where_there_is_least_to_do() -> None:
    replicas = pool([replica(name) for name in "ab"])
    picture = _picture(replicas)
    _load(picture, "a", 1000)
    assert _choose("prefix", replicas, picture, _request(NO_CHAIN)) == ("b", "new")


def test_least_load_counts_tokens_then_requests_then_past_work() -> None:
    replicas = pool([replica(name) for name in "abc"])
    picture = _picture(replicas)
    for name, tokens in (("a", 100), ("b", 50), ("c", 70)):
        _load(picture, name, tokens)
    assert _choose("least_load", replicas, picture) == ("b", "least_load")
    picture = _picture(replicas)
    turns = []
    for _ in range(6):
        chosen = _choose("least_load", replicas, picture)
        assert chosen is not None
        turns.append(chosen[0])
        picture.release(_load(picture, chosen[0], 10), 0.0)
    assert turns == list("abcabc")


def test_round_robin_takes_turns_and_random_takes_all() -> None:
    replicas = pool([replica(name) for name in "abc"])
    picture = _picture(replicas)
    turns = [_choose("round_robin", replicas, picture) for _ in range(6)]
    assert [turn[0] for turn in turns if turn] == list("abcabc")
    drawn = Counter(_choose("random", replicas, picture) for _ in range(300))
    assert len(drawn) == 3
    assert min(drawn.values()) > 60


def test_an_adapter_is_asked_for_where_it_is_loaded() -> None:
    has = replica("b", adapters=frozenset(("french",)))
    replicas = pool([replica("a", adapters=frozenset()), has, replica("c")])
    picture = _picture(replicas)
    picture.loads.dispatched_tokens[picture.slots["b"]] = 10**6
    picture.loads.dispatched_tokens[picture.slots["c"]] = 10**7
    wanted = Request(chain(1, 512), has_session=False, adapter="french")
    assert _choose("prefix", replicas, picture, wanted) == ("b", "new")
    assert _choose("prefix", replicas, picture, _request()) == ("a", "new")
