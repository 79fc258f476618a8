"""What one decision of the project's own policy costs, on a warm picture, by number of replicas.

The picture has been filled with the workload's prompts, dealt out by the policy itself, the latest
still under way. Then every further prompt is decided and not sent, several times over; the least of
the repeats counts, since nothing makes a processor faster than it is.

It measures the `proxy` that is imported: the sources, or their translation with
`PYTHONPATH=$(doherty compile) python -P -m loadtest policies --decisions`.
"""

from __future__ import annotations

import time
from typing import Final

import msgspec

from loadtest.policies.cells import Source, workload_of
from loadtest.policies.chains import chains_of
from loadtest.policies.ours import lab_replicas
from loadtest.policies.tables import aligned
from proxy.core import policy as core_policy
from proxy.core.fleet import Pool, make_pool
from proxy.core.lease import Lease
from proxy.core.picture import Picture
from proxy.core.policy import POLICIES, Request

REPLICAS: Final = (8, 64, 512)
TARGETS_US: Final = {8: 10.0, 64: 40.0, 512: 150.0}
WARM: Final = 2000
ASKED: Final = 1000
REPEATS: Final = 5
CAPACITY_TOKENS: Final = 1_000_000
ARRIVAL_S: Final = 0.01  # between two requests, for each eight replicas


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    replicas: int
    decision_us: float
    dispatch_us: float  # counting the lease and noting the chain, afterwards
    target_us: float
    entries: int  # of the index
    translated: bool


def measure(source: Source) -> list[Cost]:
    """Return the cost at each number of replicas."""
    return [_measure(source, count) for count in REPLICAS]


def _measure(source: Source, count: int) -> Cost:
    workload = workload_of(source)
    chains = chains_of(workload, "chain")
    members = {replica.name: replica for replica in lab_replicas(count, CAPACITY_TOKENS)}
    pool, picture, policy = make_pool(members, {}), Picture(), POLICIES["prefix"]
    picture.know(members.values(), 0.0)
    requests = [Request(chain, has_session=False) for chain in chains]
    now_s = 0.0
    under_way: list[Lease] = []
    dispatch_ns = 0
    warm = min(WARM, len(requests) // 2)
    for request in requests[:warm]:
        now_s += ARRIVAL_S * 8 / count
        decision = policy(request, pool, picture, now_s)
        assert decision is not None
        begin_ns = time.thread_time_ns()
        lease = picture.acquire(
            decision.replica, request.chain, cached_octets=decision.cached_octets, now_s=now_s
        )
        dispatch_ns += time.thread_time_ns() - begin_ns
        under_way.append(lease)
        if len(under_way) > 4 * count:
            ended = under_way.pop(0)
            picture.prefill_ended(ended, now_s)
            picture.release(ended, now_s)
    asked = requests[warm : warm + ASKED]
    least_ns = min(_ask(asked, pool, picture, now_s) for _ in range(REPEATS))
    return Cost(
        replicas=count,
        decision_us=least_ns / len(asked) / 1000,
        dispatch_us=dispatch_ns / warm / 1000,
        target_us=TARGETS_US[count],
        entries=picture.index.entries(),
        translated=not str(core_policy.__file__).endswith(".py"),
    )


def _ask(asked: list[Request], pool: Pool, picture: Picture, now_s: float) -> int:
    policy = POLICIES["prefix"]
    begin_ns = time.thread_time_ns()
    for request in asked:
        policy(request, pool, picture, now_s)
    return time.thread_time_ns() - begin_ns


def table(costs: list[Cost]) -> str:
    form = "translated" if costs[0].translated else "from the sources"
    rows = [["replicas", "decision", "target", "dispatch", "index entries"]]
    rows += [
        [
            str(cost.replicas),
            f"{cost.decision_us:.1f} us",
            f"{cost.target_us:.0f} us",
            f"{cost.dispatch_us:.1f} us",
            f"{cost.entries:,}",
        ]
        for cost in costs
    ]
    return f"processor time of one decision, {form}\n{aligned(rows)}"
