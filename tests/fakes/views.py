"""Views as a busy fleet's would be, out of a seed: for those who show them, and for their size."""

from __future__ import annotations

import itertools
import random

from proxy.contract.view import (
    ARCS_MAX,
    ArcView,
    ClassView,
    ModelView,
    NoteView,
    Percentiles,
    PoolView,
    PrefixView,
    ProxyView,
    RegionView,
    ReplicaView,
    RingView,
    View,
)

AT_S = 1_790_000_000.0
MODELS = ("qwen3-32b", "llama-3.3-70b", "deepseek-v3.2")


def a_view(replicas: int = 6, seed: int = 0, *, at_s: float = AT_S) -> View:
    """Return a view of so many replicas; the same seed returns the same view."""
    draw = random.Random(f"{seed}")
    models = MODELS[: max(1, min(len(MODELS), replicas // 3))]
    shown = tuple(_replica(draw, n, models[n % len(models)]) for n in range(replicas))
    shown = tuple(sorted(shown, key=lambda one: (one.pool, one.replica_id)))
    return View(
        at_s=at_s,
        window_s=30.0,
        proxy=ProxyView(
            version="0.1.0",
            policy="prefix",
            region="eu-west",
            workers=4,
            fleet_age_s=round(draw.uniform(0.0, 1.0), 3),
            manager_url="http://127.0.0.1:8002",
            in_flight=sum(one.inflight for one in shown),
            connections=draw.randrange(50, 500),
            requests_per_s=round(draw.uniform(20.0, 90.0), 3),
            errors_per_s=round(draw.choice((0.0, 0.0, 0.2)), 3),
            tokens_per_s=round(draw.uniform(5e3, 3e4), 1),
            cached_ratio=round(draw.uniform(0.5, 0.9), 4),
            loop_lag_s=round(draw.uniform(0.0005, 0.004), 6),
        ),
        replicas=shown,
        classes=tuple(_class(draw, name) for name in ("online", "semi-online", "offline")),
        models=tuple(_model(draw, name) for name in models),
        pools=tuple(_pool(shown, name) for name in models),
        scaling=tuple(_note(draw, n, models[n % len(models)], at_s) for n in range(8)),
        scaling_age_s=0.4,
        rings=tuple(_ring(draw, name, shown, ARCS_MAX // len(models)) for name in models),
        regions=(
            RegionView(
                region="us-east",
                peer="us-east#0",
                linked=True,
                round_trip_s=0.081,
                summary_age_s=0.12,
                inflight=draw.randrange(12),
            ),
            RegionView(region="ap-south", peer="ap-south#0", linked=False),
        ),
        decisions={"prefix": 31.2, "new": 4.1, "hot": 9.0, "spill": 1.5},
        codes={"200": 44.0, "429": 1.1, "502": 0.1},
    )


def _replica(draw: random.Random, number: int, model: str) -> ReplicaView:
    fate = draw.random()
    state, reason, held = "ready", "", False
    if fate < 0.04:
        state, reason = "backoff", "it died with exit status 1; the next start is in 8 s"
    elif fate < 0.08:
        state, reason, held = "draining", "drained by an operator", True
    elif fate < 0.12:
        state, reason = "starting", "loading its weights"
    elif fate < 0.15:
        state, reason = "asleep", "nothing was asked of it for 300 s"
    up = state in ("ready", "draining")
    inflight = draw.randrange(64) if up else 0
    return ReplicaView(
        replica_id=f"{model}-{number:03d}",
        pool=model,
        region="eu-west",
        engine=draw.choice(("sglang", "vllm")),
        engine_version="0.5.23",
        models=(model,),
        state=state,
        reason=reason,
        suspect=up and draw.random() < 0.03,
        held=held,
        gpus=(str(number % 8),),
        restarts=draw.choice((0, 0, 0, 1, 4)),
        inflight=inflight,
        inflight_max=64,
        queued_tokens=draw.randrange(20_000) if up else 0,
        wait_s=round(draw.expovariate(2.0), 4) if up else 0.0,
        decoding=round(inflight * 0.8, 2),
        prefill_tokens_per_s=round(draw.uniform(4e3, 2e4), 1) if up else 0.0,
        requests_per_s=round(draw.uniform(0.0, 4.0), 3) if up else 0.0,
        running=inflight if up else None,
        waiting=draw.randrange(4) if up else None,
        kv_used_ratio=round(draw.random(), 4) if up else None,
        cached_ratio=round(draw.random(), 4) if up else None,
        cache_tokens=draw.randrange(100_000, 900_000) if up else 0,
        cache_source=draw.choice(("record", "events")),
        cache_source_age_s=round(draw.random(), 3),
        ring_ratio=0.01,
    )


def _times(draw: random.Random, middle_s: float, count: int) -> Percentiles:
    p50_s = draw.uniform(0.7, 1.3) * middle_s
    return Percentiles(
        p50_s=round(p50_s, 4), p95_s=round(3 * p50_s, 4), p99_s=round(7 * p50_s, 4), count=count
    )


def _class(draw: random.Random, name: str) -> ClassView:
    depth = draw.choice((0, 0, 3, 40))
    return ClassView(
        work_class=name,
        depth=depth,
        queue_bytes=depth * 9000,
        oldest_s=round(draw.uniform(0.1, 9.0), 3) if depth else None,
        requests_per_s=round(draw.uniform(0.0, 30.0), 3),
        refused_per_s=round(draw.choice((0.0, 0.0, 0.7)), 3),
        first_token=_times(draw, 0.2, 700),
        token=_times(draw, 0.02, 650),
        queue_wait=_times(draw, 0.4, depth) if depth else Percentiles(),
    )


def _model(draw: random.Random, name: str) -> ModelView:
    return ModelView(
        model=name,
        requests_per_s=round(draw.uniform(5.0, 40.0), 3),
        tokens_per_s=round(draw.uniform(900.0, 9000.0), 1),
        cached_ratio=round(draw.uniform(0.4, 0.9), 4),
        first_token=_times(draw, 0.2, 700),
        token=_times(draw, 0.02, 650),
    )


def _pool(shown: tuple[ReplicaView, ...], model: str) -> PoolView:
    mine = [one for one in shown if one.pool == model]
    ready = sum(one.state == "ready" for one in mine)
    return PoolView(
        pool=model,
        model=model,
        work_class="online",
        scaled=True,
        min=1,
        max=len(mine) + 2,
        desired=len(mine),
        ready=ready,
        coming=sum(one.state == "starting" for one in mine),
        going=0,
        resting=sum(one.state == "asleep" for one in mine),
        waiting="no GPU is free" if ready < len(mine) else "",
    )


def _note(draw: random.Random, number: int, model: str, at_s: float) -> NoteView:
    was = draw.randrange(1, 5)
    desired = was + draw.choice((-1, 1, 2))
    return NoteView(
        at_s=round(at_s - 40.0 * number - draw.random(), 3),
        pool=model,
        was=was,
        desired=desired,
        reason=f"{draw.randrange(8, 60)} requests in flight, 8 to a replica",
        moves=(f"{model}-{number:03d}: wake",) if desired > was else (),
    )


def _ring(draw: random.Random, model: str, shown: tuple[ReplicaView, ...], most: int) -> RingView:
    names = [one.replica_id for one in shown if model in one.models]
    edges = sorted(draw.random() for _ in range(min(most, 40 * len(names)) - 1))
    bounds = [0.0, *(round(edge, 5) for edge in edges), 1.0]
    arcs = [ArcView(begin, end, draw.choice(names)) for begin, end in itertools.pairwise(bounds)]
    prefixes = [_prefix(draw, 600.0 / (n + 1), names) for n in range(12)]
    return RingView(model=model, models=(model,), arcs=tuple(arcs), prefixes=tuple(prefixes))


def _prefix(draw: random.Random, heat: float, names: list[str]) -> PrefixView:
    holders = draw.sample(names, min(len(names), draw.randrange(1, 5)))
    name = draw.getrandbits(64)
    return PrefixView(
        name=f"{name:016x}",
        octets=draw.randrange(512, 60_000),
        heat=round(heat, 1),
        spread=len(names) if heat > 200.0 else 0,
        at=round(name / 2**64, 5),
        home=draw.choice(names),
        holders=tuple(sorted(holders)),
        held_by=len(holders),
    )
