"""What a region tells other regions of its models: what a newcomer would meet there.

Only of its own replicas, since what is told must be what can be had by one hop. Workers share one
picture, so what one of them sees is not to be multiplied by their number; only requests that wait
are each worker's own. Where pictures differ for a moment the least promising is told: a request
that stays where it came costs less than one that has crossed for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from proxy.contract.regions import NAME_CHARS_MAX, ModelSummary
from proxy.core import claim_limits, limits
from proxy.core.fleet import Fleet, Pool
from proxy.core.opening import has_little_to_do
from proxy.core.picture import Picture

_NEVER: Final = float("inf")


def summarise(
    fleet: Fleet, picture: Picture, waiting: Mapping[str, int], now_s: float
) -> dict[str, ModelSummary]:
    """Return what there is for each model; `waiting` says how many requests wait, by model."""
    found: dict[str, ModelSummary] = {}
    for model, pool in fleet.pools.items():
        if not (pool.replicas or model in fleet.prospects):
            continue  # other regions alone have it: told on, it would be told back
        if len(found) >= claim_limits.SUMMARY_MODELS_MAX:
            break
        if len(model) > NAME_CHARS_MAX:
            continue  # one name that cannot be told must not silence the rest
        found[model] = _of(model, fleet, pool, picture, waiting.get(model, 0), now_s)
    return found


def _of(
    model: str, fleet: Fleet, pool: Pool, picture: Picture, queued: int, now_s: float
) -> ModelSummary:
    prospect = fleet.prospect_of(model)
    loads = picture.loads
    awake = free = 0
    best_s, s_per_token = _NEVER, 0.0
    for replica in pool.available:
        slot = picture.slots.get(replica.name, -1)
        if slot < 0:
            continue
        awake += 1
        free += _free(slot, picture, now_s)
        wait_s = loads.wait_s(slot, now_s) + loads.extra_s[slot]
        if wait_s < best_s:
            best_s, s_per_token = wait_s, loads.s_per_token[slot]
    return ModelSummary(
        awake=awake,
        free=free,
        wait_s=best_s if awake else 0.0,
        s_per_token=s_per_token,
        queued=queued,
        coming=prospect.coming,
        ready_in_s=prospect.ready_in_s,
        start_s=prospect.start_s,
        wakes=prospect.wakes,
        startable=prospect.startable,
        carries=prospect.carries,
    )


def _free(slot: int, picture: Picture, now_s: float) -> int:
    """Return how many usual requests a replica would begin at once, one after the other.

    It is open until it has work for `RUNWAY_S`; and never takes more than it may have in all.
    """
    loads = picture.loads
    if not has_little_to_do(slot, picture, now_s):
        return 0
    work_s = (
        max(claim_limits.USUAL_WORK_TOKENS, picture.usual_tokens(slot)) * loads.s_per_token[slot]
    )
    left_s = limits.RUNWAY_S - loads.wait_s(slot, now_s) - loads.extra_s[slot]
    room = 1 + int(max(0.0, left_s) / max(work_s, 1e-9))
    for most in (loads.inflight_max[slot], loads.running_max[slot]):
        if most:
            room = min(room, most - loads.inflight[slot])
    return max(0, min(room, claim_limits.SUMMARY_FREE_MAX))


def merge(parts: Iterable[Mapping[str, ModelSummary]]) -> dict[str, ModelSummary]:
    """Return what several workers of one proxy see, as one account."""
    found: dict[str, ModelSummary] = {}
    for part in parts:
        for model, one in part.items():
            before = found.get(model)
            found[model] = one if before is None else _both(before, one)
    return found


def _both(one: ModelSummary, other: ModelSummary) -> ModelSummary:
    return ModelSummary(
        awake=min(one.awake, other.awake),
        free=min(one.free, other.free),
        wait_s=max(one.wait_s, other.wait_s),
        s_per_token=max(one.s_per_token, other.s_per_token),
        queued=one.queued + other.queued,
        coming=max(one.coming, other.coming),
        ready_in_s=max(one.ready_in_s, other.ready_in_s),
        start_s=max(one.start_s, other.start_s),
        wakes=one.wakes or other.wakes,
        startable=min(one.startable, other.startable),
        carries=max(one.carries, other.carries),
    )
