"""The rules of the rivals: what everybody has, and what the routers of 2026 publish.

"X-like" is the published rule as we read it. Arguments come after a colon on the command line, as
in `chwbl:2:1.25`. `POLICIES` names them all; what each is:

random, round_robin, least_requests, power_of_two: the classics, blind to caches and lengths.
least_tokens: least prefill tokens sent whose first token was not seen. The best blind rule.
ring[:depth]: consistent hashing of the block at `depth` (0: the session).
chwbl[:depth:factor]: the same with bounded load, in requests (Mirrokni et al. 2018; KubeAI).
sglang[:match:absolute:relative]: longest match if long enough, else and when the fleet is out of
    balance least requests (SGLang's router, vLLM's router).
llm-d[:prefix:queue:memory]: weighted scores of prefix, queue depth and memory.
dynamo[:weight]: queued and new prefill blocks, and blocks being decoded.
preble: exploit what is cached when that is most of the prompt, else explore.
lmetric: (queued + new prefill tokens) x (requests + 1).
priced[:beta]: seconds queued less those done, own uncached (1 + beta) times; ties to the least
    worn: the rule to start from.
greedy, oracle[:beta]: true caches and true remaining work; `oracle` prices as `priced` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from loadtest.policies.engines import Flight
from loadtest.policies.router import Router, Rule, uncached
from loadtest.policies.workload import BLOCK_TOKENS, Job

PREBLE_WINDOW_S: Final = 180.0
PREBLE_BALANCE: Final = 2.0
PREBLE_ANSWER_SHARE: Final = 0.02


def by_chance() -> Rule:
    return lambda router, flight: router.chance.choice(router.live)


def round_robin() -> Rule:
    def rule(router: Router, flight: Flight) -> int:
        router.turn += 1
        return router.live[(router.turn - 1) % len(router.live)]

    return rule


def least_requests() -> Rule:
    return lambda router, flight: router.lightest(router.requests)


def least_tokens() -> Rule:
    return lambda router, flight: router.lightest(router.tokens)


def power_of_two() -> Rule:
    def rule(router: Router, flight: Flight) -> int:
        count = min(2, len(router.live))
        return router.lightest(router.requests, router.chance.sample(router.live, count))

    return rule


def _key(job: Job, depth: int) -> int:
    return (1 << 40) + job.session if depth == 0 else job.blocks[min(depth, len(job.blocks)) - 1]


def ring(depth: float = 2) -> Rule:
    return lambda router, flight: next(router.walk(_key(flight.job, int(depth))))


def chwbl(depth: float = 2, factor: float = 1.25) -> Rule:
    def rule(router: Router, flight: Flight) -> int:
        bound = max(1, math.ceil(factor * (sum(router.requests) + 1) / len(router.live)))
        replica = -1
        for replica in router.walk(_key(flight.job, int(depth))):
            if router.requests[replica] + 1 <= bound:
                break
        return replica

    return rule


def sglang(match: float = 0.5, absolute: float = 64, relative: float = 1.5) -> Rule:
    def rule(router: Router, flight: Flight) -> int:
        loads = [router.requests[replica] for replica in router.live]
        if max(loads) - min(loads) > absolute and max(loads) > relative * min(loads):
            return router.lightest(router.requests)
        depths = router.believed.depths(flight.job.blocks)
        best = max(depths[replica] for replica in router.live)
        if best * BLOCK_TOKENS / flight.job.prompt_tokens <= match:
            return router.lightest(router.requests)
        holders = [replica for replica in router.live if depths[replica] == best]
        return router.lightest(router.requests, holders)

    return rule


def llm_d(prefix: float = 3.0, queue: float = 2.0, memory: float = 2.0) -> Rule:
    def rule(router: Router, flight: Flight) -> int:
        stage, job = router.stage, flight.job
        depths = stage.truth.depths(job.blocks)
        queues = [len(engine.queue) for engine in stage.engines]
        low = min(queues[replica] for replica in router.live)
        high = max(queues[replica] for replica in router.live)
        scores = [
            prefix * depths[replica] / len(job.blocks)
            + queue * ((high - queues[replica]) / (high - low) if high > low else 1.0)
            + memory * (1 - min(1.0, router.blocks[replica] / stage.truth.capacity_blocks))
            for replica in range(len(queues))
        ]
        return router.lightest([-score for score in scores])

    return rule


def dynamo(weight: float = 1.0) -> Rule:
    def rule(router: Router, flight: Flight) -> int:
        job = flight.job
        depths = router.stage.truth.depths(job.blocks)
        costs = [
            weight * (router.tokens[replica] + uncached(job, depth)) / BLOCK_TOKENS
            + router.blocks[replica]
            for replica, depth in enumerate(depths)
        ]
        return router.lightest(costs)

    return rule


def preble() -> Rule:
    """E2 of Preble: within a window, the seconds of work that were sent to each."""

    def rule(router: Router, flight: Flight) -> int:
        stage, job, sent_s = router.stage, flight.job, router.window_s
        since_s = stage.now_s - PREBLE_WINDOW_S / stage.drive.scale
        while router.window and router.window[0][0] < since_s:
            _, replica, seconds = router.window.popleft()
            sent_s[replica] -= seconds
        depths = router.believed.depths(job.blocks)
        best = max(depths[replica] for replica in router.live)
        chosen = -1
        if 2 * best * BLOCK_TOKENS > job.prompt_tokens:
            holders = [replica for replica in router.live if depths[replica] == best]
            chosen = router.lightest(sent_s, holders)
            least_s = min(sent_s[replica] for replica in router.live)
            if sent_s[chosen] > PREBLE_BALANCE * least_s + 1.0:
                chosen = -1
        costs = [
            sent_s[replica] + uncached(job, depth) / router.rate
            for replica, depth in enumerate(depths)
        ]
        if chosen < 0:
            chosen = router.lightest(costs)
        answer_s = job.output_tokens / stage.fleet.timing.decode_tokens_per_s
        cost_s = uncached(job, depths[chosen]) / router.rate + PREBLE_ANSWER_SHARE * answer_s
        router.window.append((stage.now_s, chosen, cost_s))
        sent_s[chosen] += cost_s
        return chosen

    return rule


def lmetric() -> Rule:
    def rule(router: Router, flight: Flight) -> int:
        depths = router.stage.truth.depths(flight.job.blocks)
        products = [
            (router.tokens[replica] + uncached(flight.job, depth)) * (router.requests[replica] + 1)
            for replica, depth in enumerate(depths)
        ]
        return router.lightest(products)

    return rule


def priced(beta: float = 2.0) -> Rule:
    """The rule to start from: it sees what any proxy sees."""

    def rule(router: Router, flight: Flight) -> int:
        depths = router.believed.depths(flight.job.blocks)
        prices_s = {
            replica: (
                router.tokens[replica]
                - router.credit(replica)
                + (1 + beta) * uncached(flight.job, depths[replica])
            )
            / router.rate
            + router.slot_wait_s(replica)
            for replica in router.live
        }
        bound_s = min(prices_s.values()) + 1e-9
        cheapest = [replica for replica in router.live if prices_s[replica] <= bound_s]
        return router.lightest(router.wear, cheapest)

    return rule


def oracle(beta: float = 2.0) -> Rule:
    """True caches, true remaining work, true room. Not optimal: it minds each request alone."""

    def rule(router: Router, flight: Flight) -> int:
        stage, job = router.stage, flight.job
        depths = stage.truth.depths(job.blocks)
        prices_s = [math.inf] * len(depths)
        for replica in router.live:
            engine = stage.engines[replica]
            ahead_s = engine.under_way_s(stage.now_s)
            depth = depths[replica]
            for queued in engine.queue:
                ahead_s += queued.estimate_tokens / engine.rate
                depth = _shared(queued.job.blocks, job.blocks, depth)
            depths[replica] = depth
            own_s = uncached(job, depth) / engine.rate
            prices_s[replica] = ahead_s + (1 + beta) * own_s + engine.room_wait_s(job)
        chosen = router.lightest(prices_s)
        router.seen_depth = depths[chosen]
        return chosen

    return rule


def _shared(left: tuple[int, ...], right: tuple[int, ...], least: int) -> int:
    """Return how many leading blocks two prompts share, or `least` if that is more.

    A block's name stands for all before it, so there is no need to look at the first ones.
    """
    depth = least
    for a, b in zip(left[least:], right[least:], strict=False):
        if a != b:
            break
        depth += 1
    return depth


POLICIES: Final[dict[str, Callable[..., Rule]]] = {
    "random": by_chance,
    "round_robin": round_robin,
    "least_requests": least_requests,
    "least_tokens": least_tokens,
    "power_of_two": power_of_two,
    "ring": ring,
    "chwbl": chwbl,
    "sglang": sglang,
    "llm-d": llm_d,
    "dynamo": dynamo,
    "preble": preble,
    "lmetric": lmetric,
    "priced": priced,
    "greedy": lambda: oracle(0.0),
    "oracle": oracle,
}
# Those that somebody could run instead of ours.
RIVALS: Final = tuple(
    name for name in POLICIES if name not in ("random", "priced", "greedy", "oracle")
)


def rule_of(spec: str) -> Rule:
    """Return the rule that `spec` names, such as `chwbl:2:1.25`. Raises `ValueError`."""
    name, *arguments = spec.split(":")
    if name not in POLICIES:
        raise ValueError(f"policy {spec!r}: unknown; there are {', '.join(POLICIES)}")
    try:
        return POLICIES[name](*(float(argument) for argument in arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy {spec!r}: {error}") from error
