"""What the scaling lab's pools are asked: steps, noise, waves, and what a public service saw.

Rates are in replicas: how many it takes at their target, so that a load means the same whatever
the speeds are. Arrivals are Poisson at that rate, sizes lognormal, all from one seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import msgspec

from loadtest.formats import read_trace
from loadtest.scaling.replicas import Job, Speeds

PROMPT_TOKENS = 2_000  # means of the made loads; answers of a few sentences
OUTPUT_TOKENS = 150
SIGMA = 0.6  # of the logarithm of both
CONTEXT_TOKENS = 30_000  # cached, of the load whose caches fill
KV_TARGET = 0.85  # of a cache that is held by requests
LEAD_S = 300.0  # of base load before anything happens


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A load by its name. `steady`: there is nothing in it to follow, so nobody should."""

    name: str
    what: str
    span_s: float
    rate: Callable[[float, random.Random], float] = lambda _, __: 0.0  # replicas, at a second
    cached_tokens: int = 0
    steady: bool = False
    recorded: bool = False  # a trace: no seed changes it


def _step(factor: float, base: float, burst_s: float) -> Callable[[float, random.Random], float]:
    def rate(at_s: float, _: random.Random) -> float:
        return base * factor if LEAD_S <= at_s < LEAD_S + burst_s else base

    return rate


def _noise(at_s: float, chance: random.Random) -> float:
    """Another level within a fifth every ten seconds: `chance` is asked once for each."""
    return 4.5 * chance.uniform(0.8, 1.2)


def _sawtooth(at_s: float, _: random.Random) -> float:
    return 1.0 + 7.0 * (at_s % 240.0) / 240.0


def _ramp(at_s: float, _: random.Random) -> float:
    return 1.0 + 9.0 * min(1.0, max(0.0, at_s - LEAD_S) / 1200.0)


def _day(at_s: float, _: random.Random) -> float:
    return 5.5 - 4.0 * math.cos(2 * math.pi * at_s / 3600.0)


LOADS: dict[str, Load] = {
    load.name: load
    for load in (
        Load(name="step10", what="10 x for 5 minutes", span_s=900.0, rate=_step(10, 0.6, 300.0)),
        Load(name="step100", what="100 x for 5 minutes", span_s=900.0, rate=_step(100, 0.1, 300.0)),
        Load(name="azure", what="a code assistant's 29 minutes", span_s=1740.0, recorded=True),
        Load(name="noise", what="+-20 % for 30 minutes", span_s=1800.0, rate=_noise, steady=True),
        Load(name="sawtooth", what="1 to 8 in 4 minutes, and again", span_s=1440.0, rate=_sawtooth),
        Load(name="ramp", what="1 to 10 in 20 minutes", span_s=1800.0, rate=_ramp),
        Load(name="day", what="a day's wave in an hour", span_s=3600.0, rate=_day),
        Load(
            name="kv",
            what="5 x for 5 minutes, caches full before the request count says so",
            span_s=900.0,
            rate=_step(5, 0.6, 300.0),
            cached_tokens=CONTEXT_TOKENS,
        ),
    )
}


def jobs_of(load: Load, target_inputs: float, speeds: Speeds, seed: int) -> list[Job]:
    """Return the requests of a load in the order of arrival."""
    if load.recorded:
        return _azure()
    chance = random.Random(seed)
    carried = carried_by(load, target_inputs, speeds)
    unit = speeds.rate_at(carried, PROMPT_TOKENS, OUTPUT_TOKENS)
    return [
        Job(
            at_s,
            _size(chance, PROMPT_TOKENS),
            _size(chance, OUTPUT_TOKENS),
            cached_tokens=load.cached_tokens,
        )
        for at_s in _arrivals(load, unit, chance)
    ]


def carried_by(load: Load, target_inputs: float, speeds: Speeds) -> float:
    """Return the requests that a replica carries: the target, or what its cache holds."""
    context_tokens = load.cached_tokens + PROMPT_TOKENS + OUTPUT_TOKENS
    return min(target_inputs, KV_TARGET * speeds.kv_tokens / context_tokens)


def _arrivals(load: Load, unit: float, chance: random.Random) -> Iterator[float]:
    """Yield Poisson arrivals at a rate that holds for a second (of noise: for ten)."""
    stretch_s = 10.0 if load.steady else 1.0
    start_s = 0.0
    while start_s < load.span_s:
        rate = unit * load.rate(start_s, chance)
        at_s = start_s + chance.expovariate(rate)
        while at_s < start_s + stretch_s:
            yield at_s
            at_s += chance.expovariate(rate)
        start_s += stretch_s


def _size(chance: random.Random, mean: float) -> int:
    return max(1, round(chance.lognormvariate(math.log(mean) - SIGMA * SIGMA / 2, SIGMA)))


def _azure() -> list[Job]:
    trace = read_trace("azure_code")
    first_s = trace.arrivals[0].at_s
    return [Job(a.at_s - first_s, a.input_tokens, max(1, a.output_tokens)) for a in trace.arrivals]
