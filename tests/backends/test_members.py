"""What replicas are to whoever scales them, and what is remembered of them."""

from __future__ import annotations

import msgspec
import pytest

from backends.ladder import Rung
from backends.lifecycle import Lifecycle, Phase
from backends.members import HEAT_HALF_LIFE_S, Look, Memory, Standing, standing_of, wanted_on
from proxy.contract import LoadSample

S = Standing


def state(phase: Phase, **more: bool) -> Lifecycle:
    return msgspec.structs.replace(Lifecycle(phase=phase, wanted=True), **more)


@pytest.mark.parametrize(
    ("given", "standing", "kept_on"),
    [
        (state(Phase.STARTING), S.COMING, Rung.AWAKE),
        (state(Phase.READY), S.SERVES, Rung.AWAKE),
        (state(Phase.HELD, held=True), S.HELD, Rung.AWAKE),
        (state(Phase.WAKING), S.COMING, Rung.AWAKE),
        (state(Phase.BACKOFF, faulted=True), S.COMING, Rung.AWAKE),
        (state(Phase.BACKOFF), S.GONE, None),  # no GPU for it
        (state(Phase.STOPPED, wanted=False), S.GONE, None),
        (state(Phase.DRAINING, wanted=False), S.GOING, None),
        (state(Phase.DRAINING), S.COMING, Rung.AWAKE),  # a restart
        (state(Phase.STOPPING, wanted=False), S.GOING, None),
        (state(Phase.EMPTYING), S.GOING, Rung.SUSPENDED),
        (state(Phase.FALLING_ASLEEP), S.GOING, Rung.SUSPENDED),
        (state(Phase.ASLEEP), S.RESTS, Rung.SUSPENDED),
        (state(Phase.SUSPENDED), S.RESTS, Rung.SUSPENDED),
    ],
)
def test_where_a_replica_stands_says_what_it_is_wanted_on(
    given: Lifecycle, standing: Standing, kept_on: Rung | None
) -> None:
    assert standing_of(given) is standing
    assert wanted_on(standing, given, Rung.SUSPENDED) is kept_on


def test_every_phase_has_a_standing() -> None:
    for phase in Phase:
        assert standing_of(state(phase)) in Standing


class Seen:
    """One replica, looked at again and again."""

    def __init__(self) -> None:
        self.memory = Memory()

    def __call__(
        self,
        phase: Phase,
        at_s: float,
        aim: Rung = Rung.AWAKE,
        load: LoadSample | None = None,
        restored_s: float = 0.0,
    ):  # type: ignore[no-untyped-def]
        it_is = state(phase, faulted=True)
        look = Look("m-0", "h", it_is, aim, load, (), None, 0, restored_s=restored_s)
        return self.memory.see(look, at_s)


def test_what_may_have_only_what_is_spare_keeps_nobody_busy() -> None:
    memory, it_is = Memory(), state(Phase.READY, faulted=True)
    load = LoadSample(at_s=0.0, running=5)
    idle = Look("m-0", "h", it_is, Rung.AWAKE, load, (), 5, 0, spare=5)
    memory.see(idle, 0.0)
    member, _ = memory.see(idle, 30.0)
    assert (member.in_flight, member.idle_s) == (0, 30.0)
    member, _ = memory.see(idle._replace(in_flight=6), 31.0)
    assert (member.in_flight, member.idle_s) == (1, 0.0)
    member, _ = memory.see(idle._replace(in_flight=None, spare=0), 32.0)
    assert member.in_flight == 5, "nobody knows better than the engine"


def test_a_rise_is_measured_from_where_it_rested() -> None:
    see = Seen()
    assert see(Phase.STARTING, 0.0)[1] is None
    _, cold = see(Phase.READY, 12.5)
    assert (cold.rung, cold.up_s, cold.launch_hash) == (Rung.COLD, 12.5, "h")
    see(Phase.EMPTYING, 20.0, Rung.ASLEEP)
    see(Phase.ASLEEP, 21.0, Rung.ASLEEP)
    see(Phase.WAKING, 30.0, Rung.ASLEEP)
    member, warm = see(Phase.READY, 30.5)
    assert (warm.rung, warm.up_s) == (Rung.ASLEEP, 0.5)
    assert (member.start_s, member.for_s) == (0.5, 0.0)
    assert see(Phase.READY, 31.0)[1] is None, "told once"


def test_a_start_from_an_image_is_told_from_a_cold_one() -> None:
    see = Seen()
    see(Phase.STARTING, 0.0)
    _, rise = see(Phase.READY, 1.5, restored_s=1.4)
    assert rise.rung is Rung.SNAPSHOTTED
    see(Phase.BACKOFF, 2.0, restored_s=1.4)
    _, again = see(Phase.READY, 9.0, restored_s=1.4)
    assert again.rung is Rung.COLD, "that was the former one's"


def test_what_is_awake_after_all_has_not_risen() -> None:
    see = Seen()
    see(Phase.READY, 0.0)
    see(Phase.EMPTYING, 1.0, Rung.ASLEEP)
    assert see(Phase.READY, 2.0)[1] is None


def test_one_that_dies_at_rest_is_not_started_again() -> None:
    see = Seen()
    see(Phase.ASLEEP, 0.0, Rung.ASLEEP)
    member, _ = see(Phase.BACKOFF, 1.0)
    assert (member.standing, member.keep_on) == (Standing.GONE, None)
    awake = Seen()
    awake(Phase.READY, 0.0)
    member, _ = awake(Phase.BACKOFF, 1.0)
    assert (member.standing, member.keep_on) == (Standing.COMING, Rung.AWAKE)


def sample(**figures: int) -> LoadSample:
    return LoadSample(at_s=0.0, **figures)


def test_heat_is_what_was_read_from_the_cache_lately() -> None:
    see = Seen()
    see(Phase.READY, 0.0, load=sample(cached_tokens_total=1000))
    assert see(Phase.READY, 0.0, load=sample(cached_tokens_total=5000))[0].heat == 5000
    later, _ = see(Phase.READY, HEAT_HALF_LIFE_S, load=sample(cached_tokens_total=5000))
    assert later.heat == 2500
    reset, _ = see(Phase.READY, HEAT_HALF_LIFE_S, load=sample(cached_tokens_total=100))
    assert reset.heat == 2600, "a counter that fell began anew"


def test_idleness_and_preemptions() -> None:
    see = Seen()
    see(Phase.READY, 0.0, load=sample(running=1, preemptions_total=2))
    see(Phase.READY, 5.0, load=sample(running=1, preemptions_total=5))
    member, _ = see(Phase.READY, 8.0, load=sample(preemptions_total=1))
    assert (member.idle_s, member.preemptions) == (3.0, 6)


def test_others_are_forgotten() -> None:
    see = Seen()
    see(Phase.READY, 0.0)
    see.memory.keep(set())
    member, _ = see(Phase.READY, 9.0)
    assert member.for_s == 0.0
