"""The choice of a replica: never one that cannot, always for a reason, and never by luck."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.contract import ReplicaState
from proxy.core import limits
from proxy.core.accounts import Accounts
from proxy.core.fleet import Pool
from proxy.core.index import PrefixRecord
from proxy.core.policy import (
    POLICIES,
    REASONS,
    Decision,
    Offer,
    PolicyState,
    Request,
    candidates,
)
from proxy.core.prefix import NO_CHAIN, PrefixChain
from proxy.core.replica import Replica
from tests.core.builders import chain, pool, replica

_RATE = limits.PREFILL_TOKENS_PER_S_DEFAULT
# Tokens that make exactly the slack: one more and a home spills.
_SLACK_TOKENS = int(_RATE * limits.SPILL_SLACK_S)


def _state(accounts: Accounts | None = None, record: PrefixRecord | None = None) -> PolicyState:
    return PolicyState(accounts or Accounts(), record or PrefixRecord(), random.Random(7).random)


def _request(
    prompt: PrefixChain | None = None, *, has_session: bool = False, tried: set[str] | None = None
) -> Request:
    request = Request(prompt or chain(1, 512), has_session=has_session)
    request.tried |= tried or set()
    return request


def _choose(
    policy: str, replicas: Pool, state: PolicyState, request: Request | None = None
) -> tuple[str, str, int] | None:
    decision: Decision | None = POLICIES[policy](request or _request(), replicas, state)
    if decision is None:
        return None
    assert decision.reason in REASONS
    return decision.replica.replica_id, decision.reason, decision.cached_tokens


def _walk(replicas: Pool, key: int = 1) -> list[str]:
    return list(replicas.ring.walk(key))


_REPLICAS = st.builds(
    lambda state, max_inputs, suspect: (state, max_inputs, suspect),
    st.sampled_from([ReplicaState.READY] * 3 + [ReplicaState.DRAINING, ReplicaState.BACKOFF]),
    st.integers(0, 3),
    st.integers(0, 3).map(lambda n: n == 0),
)


@st.composite
def _situations(
    draw: st.DrawFn,
) -> tuple[list[Replica], dict[str, list[int]], PrefixRecord, Request]:
    names = "abcdef"[: draw(st.integers(0, 6))]
    made = []
    loads: dict[str, list[int]] = {}
    record = PrefixRecord()
    prompt = chain(draw(st.integers(1, 1 << 60)), 4096, 40_000, 400_000)
    for name in names:
        state, max_inputs, suspect = draw(_REPLICAS)
        made.append(replica(name, state=state, max_inputs=max_inputs, suspect=suspect))
        loads[name] = draw(st.lists(st.integers(0, 20_000), max_size=4))
        if draw(st.booleans()):
            record.note(name, prompt)
    tried = draw(st.sets(st.sampled_from("abcdef"), max_size=3))
    return made, loads, record, _request(prompt, has_session=draw(st.booleans()), tried=tried)


def _accounts(loads: dict[str, list[int]]) -> Accounts:
    accounts = Accounts()
    for name, tokens in loads.items():
        for count in tokens:
            accounts.acquire(name, count)
    return accounts


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(_situations(), st.permutations("abcdef"))
def test_only_one_that_may_and_whoever_may(
    policy: str,
    situation: tuple[list[Replica], dict[str, list[int]], PrefixRecord, Request],
    order: list[str],
) -> None:
    replicas, loads, record, request = situation
    able = {
        r.replica_id
        for r in replicas
        if r.state is ReplicaState.READY
        and not r.suspect
        and r.replica_id not in request.tried
        and not (r.max_inputs and len(loads[r.replica_id]) >= r.max_inputs)
    }
    chosen = _choose(policy, pool(replicas), _state(_accounts(loads), record), request)
    assert (chosen is None) == (not able)
    if chosen is not None:
        assert chosen[0] in able
        held = record.matched_tokens(chosen[0], request.chain)
        assert chosen[2] == held
    # The order in which replicas are listed says nothing.
    replicas.sort(key=lambda replica: order.index(replica.replica_id))
    again = _choose(policy, pool(replicas), _state(_accounts(loads), record), request)
    assert again == chosen


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_when_all_are_full_nobody(policy: str) -> None:
    replicas = pool([replica("a", max_inputs=1), replica("b", max_inputs=2)])
    accounts = _accounts({"a": [1], "b": [1]})
    last = _choose(policy, replicas, _state(accounts))
    assert last is not None
    assert last[0] == "b"
    accounts.acquire("b", 1)
    assert _choose(policy, replicas, _state(accounts)) is None
    assert _choose(policy, pool([]), _state()) is None


def test_candidates_are_filtered_in_one_place() -> None:
    replicas = pool([replica("a"), replica("b", suspect=True), replica("c", max_inputs=1)])
    accounts = _accounts({"c": [5]})
    assert [r.replica_id for r in candidates(replicas, accounts, ())] == ["a"]
    assert candidates(replicas, accounts, {"a"}) == []
    queued = _accounts({"a": [int(_RATE)]})
    warm = Request(NO_CHAIN, has_session=False)
    cold = Request(PrefixChain(0, (), (), int(_RATE) * limits.BYTES_PER_TOKEN), has_session=False)
    (a,) = candidates(replicas, queued, {"c"})
    assert Offer(warm, a, _state(queued)).price_s == 1.0
    assert Offer(cold, a, _state(queued)).price_s == 1.0 + limits.UNCACHED_WEIGHT


# --- prefix ---------------------------------------------------------------------------------


def test_prefix_takes_the_home_while_queues_are_even() -> None:
    replicas = pool(replica(name) for name in "abcd")
    for key in range(1, 50):
        home = _walk(replicas, key)[0]
        even = _accounts({name: [5000] for name in "abcd"})
        assert _choose("prefix", replicas, _state(even), _request(chain(key, 512))) == (
            home, "home", 0,
        )  # fmt: skip


def test_prefix_names_a_session_as_its_reason() -> None:
    replicas = pool(replica(name) for name in "ab")
    chosen = _choose("prefix", replicas, _state(), _request(has_session=True))
    assert chosen == (_walk(replicas)[0], "session", 0)


@pytest.mark.parametrize("over", [0, 1])
def test_a_home_spills_above_the_slack_and_not_at_it(over: int) -> None:
    replicas = pool(replica(name) for name in "abcd")
    home, successor, *_ = _walk(replicas)
    accounts = _accounts({home: [_SLACK_TOKENS + over]})
    expected = (successor, "spill", 0) if over else (home, "home", 0)
    assert _choose("prefix", replicas, _state(accounts)) == expected


def test_only_the_requests_of_the_hot_replica_spill() -> None:
    replicas = pool(replica(name) for name in "abcd")
    accounts = _accounts({"a": [10 * _SLACK_TOKENS]})
    for key in range(1, 200):
        walk = _walk(replicas, key)
        expected = (walk[1], "spill", 0) if walk[0] == "a" else (walk[0], "home", 0)
        request = _request(chain(key, 512))
        assert _choose("prefix", replicas, _state(accounts), request) == expected


def test_a_spill_is_bounded_by_the_successors_queue_too() -> None:
    replicas = pool(replica(name) for name in "abc")
    home, second, third = _walk(replicas)
    accounts = _accounts({home: [9 * _SLACK_TOKENS], second: [5 * _SLACK_TOKENS]})
    assert _choose("prefix", replicas, _state(accounts)) == (third, "spill", 0)


def test_a_warm_cache_is_worth_a_longer_queue() -> None:
    replicas = pool(replica(name) for name in "ab")
    home, other = _walk(replicas)
    prompt = chain(1, 40_000)
    saved_tokens = 40_000 // limits.BYTES_PER_TOKEN
    record = PrefixRecord()
    record.note(home, prompt)
    worth = _SLACK_TOKENS + limits.UNCACHED_WEIGHT * saved_tokens
    for tokens, expected in (
        (worth - 10, (home, "home", saved_tokens)),
        (worth + 10, (other, "spill", 0)),
    ):
        accounts = _accounts({home: [tokens]})
        chosen = _choose("prefix", replicas, _state(accounts, record), _request(prompt))
        assert chosen == expected


def test_a_conversation_follows_its_cache_away_from_home() -> None:
    replicas = pool(replica(name) for name in "ab")
    home, other = _walk(replicas)
    record = PrefixRecord()
    record.note(other, chain(1, 40_000))  # it spilled there in an earlier turn
    saved_tokens = 40_000 // limits.BYTES_PER_TOKEN
    request = _request(chain(1, 40_000))
    chosen = _choose("prefix", replicas, _state(record=record), request)
    assert chosen == (other, "spill", saved_tokens)
    assert home != other


def test_an_unavailable_home_gives_its_keys_to_the_successor() -> None:
    replicas = [replica(name) for name in "abc"]
    home, successor, _ = _walk(pool(replicas))
    without = pool(r if r.replica_id != home else replica(home, suspect=True) for r in replicas)
    assert _choose("prefix", without, _state()) == (successor, "spill", 0)
    assert _choose("prefix", pool(replicas), _state(), _request(tried={home})) == (
        successor, "spill", 0,
    )  # fmt: skip


# --- the others -----------------------------------------------------------------------------


def test_session_stays_however_busy_its_home_is() -> None:
    replicas = pool(replica(name) for name in "abc")
    home, successor, _ = _walk(replicas)
    accounts = _accounts({home: [100 * _SLACK_TOKENS] * 5})
    assert _choose("session", replicas, _state(accounts)) == (home, "session", 0)
    assert _choose("session", replicas, _state(accounts), _request(tried={home})) == (
        successor, "spill", 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ({"a": [10], "b": [5], "c": [7]}, "b"),
        ({"a": [0, 0], "b": [0], "c": [0, 0]}, "b"),  # the same tokens: fewer requests
        ({"a": [], "b": [], "c": []}, "a"),  # all the same: by name
    ],
)
def test_least_load(loads: dict[str, list[int]], chosen: str) -> None:
    replicas = pool(replica(name) for name in "abc")
    assert _choose("least_load", replicas, _state(_accounts(loads))) == (chosen, "least_load", 0)


def test_least_load_takes_turns_when_nobody_is_busy() -> None:
    replicas = pool(replica(name) for name in "abc")
    accounts = Accounts()
    seen = Counter[str]()
    for _ in range(30):
        chosen = _choose("least_load", replicas, _state(accounts))
        assert chosen is not None
        accounts.release(accounts.acquire(chosen[0], 100))
        seen[chosen[0]] += 1
    assert seen == {"a": 10, "b": 10, "c": 10}


def test_round_robin_takes_turns() -> None:
    replicas = pool(replica(name) for name in "abc")
    state = _state()
    turns = [_choose("round_robin", replicas, state) for _ in range(6)]
    assert [turn[0] for turn in turns if turn] == ["a", "b", "c", "a", "b", "c"]
    assert {turn[1] for turn in turns if turn} == {"round_robin"}


@pytest.mark.parametrize(("draw", "chosen"), [(0.0, "a"), (0.34, "b"), (0.999999, "c")])
def test_random_is_what_was_drawn(draw: float, chosen: str) -> None:
    replicas = pool(replica(name) for name in "cab")
    state = PolicyState(Accounts(), PrefixRecord(), lambda: draw)
    assert _choose("random", replicas, state) == (chosen, "random", 0)
