"""One picture of the fleet: who has which slot, and what answers teach about octets and caches."""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict

import pytest

from proxy.contract import LoadSample
from proxy.core import limits
from proxy.core.picture import Picture
from proxy.core.prefix import PrefixChain
from proxy.core.replica import Replica
from proxy.core.usage import Usage
from tests.core.builders import chain, pool, replica

_OCTETS = limits.BYTES_PER_TOKEN


def _sized(name: str, tokens: int, **fields: object) -> Replica:
    return dataclasses.replace(replica(name), kv_capacity_tokens=tokens, **fields)


def _picture(*replicas: Replica) -> Picture:
    picture = Picture()
    picture.know(replicas)
    return picture


def test_slots_stay_while_the_fleet_changes_and_are_given_away_again() -> None:
    a, b, c = (replica(name) for name in "abc")
    picture = _picture(a, b)
    kept = picture.slots["b"]
    picture.index.note(kept, chain(1, 4096))
    picture.index.note(picture.slots["a"], chain(1, 4096))
    picture.know([b, c])
    assert picture.slots == {"b": kept, "c": 1 - kept}
    assert picture.index.held_of(kept, chain(1, 4096)) == 4096
    assert picture.index.held_of(1 - kept, chain(1, 4096)) == 0


def test_a_new_process_has_an_empty_cache_and_the_old_load_runs_out() -> None:
    a = replica("a")
    picture = _picture(a)
    lease = picture.acquire(a, chain(1, 4096), cached_octets=0, now_s=0.0)
    picture.know([dataclasses.replace(a, restarts=1)])
    assert picture.index.held_of(0, chain(1, 4096)) == 0
    picture.release(lease, 1.0)
    assert picture.loads.inflight[0] == 0


def test_who_has_slept_has_an_empty_cache() -> None:
    a = replica("a")
    picture = _picture(a)
    lease = picture.acquire(a, chain(1, 4096), cached_octets=0, now_s=0.0)
    picture.release(lease, 1.0)
    for asleep in (True, False):
        picture.know([dataclasses.replace(a, asleep=asleep)])
    assert picture.index.held_of(0, chain(1, 4096)) == 0


def test_a_lease_on_a_replica_that_is_gone_changes_nothing_of_its_successor() -> None:
    a, b = replica("a"), replica("b")
    picture = _picture(a)
    lease = picture.acquire(a, chain(1, 40_000), cached_octets=0, now_s=0.0)
    picture.know([b])
    assert picture.slots == {"b": 0}
    other = picture.acquire(b, chain(2, 40_000), cached_octets=0, now_s=0.0)
    picture.prefill_ended(lease, 1.0)
    picture.release(lease, 1.0, Usage(10_000, 1, 0))
    assert picture.loads.inflight[0] == 1
    assert picture.loads.prefilling.queued_tokens(0) == 10_000
    with pytest.raises(AssertionError):
        picture.release(lease, 1.0)
    picture.release(other, 1.0)


def test_seats_follow_the_pool() -> None:
    replicas = [replica(name) for name in "abc"]
    picture = _picture(*replicas)
    two = pool(replicas[:2])
    seats = picture.seats(two)
    assert [r.name for r in seats.replicas] == ["a", "b"]
    assert picture.seats(two) is seats
    picture.know(replicas[1:])
    assert [r.name for r in picture.seats(two).replicas] == ["b"]
    for number in range(2 * limits.SEATS_REMEMBERED_MAX):
        picture.seats(pool([replica(f"x{number}")]))


def test_octets_a_token_are_learned_from_answers() -> None:
    a = replica("a")
    picture = _picture(a)
    for key in range(200):  # a language of two octets a token
        lease = picture.acquire(a, chain(key, 20_000), cached_octets=0, now_s=0.0)
        picture.release(lease, 0.1, Usage(10_000, 5, 0))
    assert picture.tokens_of(20_000, 0) == pytest.approx(10_000, rel=0.05)
    picture.know([a, replica("b")])  # of the same group
    assert picture.tokens_of(20_000, 1) == picture.tokens_of(20_000, 0)


@pytest.mark.parametrize(("believed_tokens", "true_tokens"), [(20_000, 80_000), (80_000, 20_000)])
def test_the_size_of_a_cache_is_learned_from_cached_tokens(
    believed_tokens: int, true_tokens: int
) -> None:
    draw = random.Random(5)
    a = _sized("a", believed_tokens)
    picture = _picture(a)
    truth: OrderedDict[int, None] = OrderedDict()  # an engine's cache, in prompts of 1,000 tokens
    assert picture.cache_tokens(0) == believed_tokens
    for _ in range(3000):
        key = min(199, int(draw.paretovariate(0.4)))
        prompt = PrefixChain(key, (key,), (1000 * _OCTETS,), 1000 * _OCTETS)
        cached_octets = picture.index.held_of(0, prompt)
        lease = picture.acquire(a, prompt, cached_octets=cached_octets, now_s=0.0)
        cached = key in truth
        truth.pop(key, None)
        truth[key] = None
        while len(truth) > true_tokens // 1000:
            truth.popitem(last=False)
        picture.release(lease, 0.0, Usage(1000, 1, 1000 if cached else 0))
    assert picture.cache_tokens(0) == pytest.approx(true_tokens, rel=0.25)


def test_answers_that_say_nothing_of_the_cache_teach_nothing_of_it() -> None:
    a = _sized("a", 10_000)
    picture = _picture(a)
    for key in range(100):
        lease = picture.acquire(a, chain(key % 20, 4000), cached_octets=0, now_s=0.0)
        picture.release(lease, 0.0, Usage(1000, 1, None))
    assert picture.cache_tokens(0) == 10_000


def test_gauges_are_read_once_each() -> None:
    read = LoadSample(at_s=5.0, running=3, waiting=2, waiting_tokens=6000)
    a = _sized("a", 10_000, load=read)
    picture = _picture(a)
    first_s = picture.loads.wait_s(0, 0.0)
    assert first_s == pytest.approx(6000 / limits.PREFILL_TOKENS_PER_S_DEFAULT)
    picture.know([a], first_s)  # the same reading in another snapshot
    assert picture.loads.wait_s(0, first_s) == 0.0


def test_a_name_that_comes_back_is_another_life() -> None:
    a = replica("a")
    picture = _picture(a)
    old = [picture.acquire(a, chain(n, 400), cached_octets=0, now_s=0.0) for n in range(5)]
    picture.know([])
    picture.know([a])
    new = [picture.acquire(a, chain(n, 400), cached_octets=0, now_s=0.0) for n in range(5)]
    for lease in old:
        picture.prefill_ended(lease, 1.0)
        picture.decoded(lease, 10, 1.0)
        picture.release(lease, 1.0)
    assert picture.loads.inflight[0] == 5
    for lease in new:
        picture.release(lease, 1.0)
    assert picture.loads.inflight[0] == 0


def test_a_prompt_whose_history_the_engine_keeps_teaches_no_sizes() -> None:
    a = replica("a")
    picture = _picture(a)
    for key in range(100):
        prompt = chain(key, 40)
        lease = picture.acquire(a, prompt, cached_octets=0, now_s=0.0, whole=False)
        picture.release(lease, 0.1, Usage(50_000, 5, 49_000))
    assert picture.tokens_of(4000, 0) == 1000


def test_no_answer_makes_nonsense_of_the_octets_a_token() -> None:
    a = replica("a")
    picture = _picture(a)
    for tokens in (10**9, 1, 10**12):
        lease = picture.acquire(a, chain(1, 4000), cached_octets=0, now_s=0.0)
        picture.release(lease, 0.1, Usage(tokens, 5, 0))
        assert 4000 / limits.RATIO_MAX <= picture.tokens_of(4000, 0) <= 4000 / limits.RATIO_MIN


def test_one_that_lost_its_cache_does_not_shrink_the_others() -> None:
    replicas = [_sized(name, 100_000) for name in "ab"]
    picture = _picture(*replicas)
    prompts = [chain(key, 4000) for key in range(50)]
    for prompt in prompts:
        picture.index.note(0, prompt)
    for prompt in prompts[:40]:
        lease = picture.acquire(replicas[0], prompt, cached_octets=4000, now_s=0.0)
        picture.release(lease, 0.1, Usage(1000, 5, 0))
    assert picture.cache_tokens(1) >= 80_000


def test_gauges_that_nobody_renews_are_forgotten() -> None:
    a = _sized("a", 10_000, load=LoadSample(at_s=5.0, running=9))
    picture = _picture(a)
    assert picture.loads.foreign_share([0]) == 1.0
    picture.sweep(limits.GAUGE_AGE_S_MAX / 2)
    assert picture.loads.foreign_share([0]) == 1.0
    picture.sweep(limits.GAUGE_AGE_S_MAX + 1)
    assert picture.loads.foreign_share([0]) == 0.0
