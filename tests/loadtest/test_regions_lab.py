"""Three regions in virtual time: nearly all stay below saturation, and a surge is shared."""

from __future__ import annotations

from loadtest.policies.regions_lab import HEADING, Scene, play, rows

REQUESTS = 500


def test_below_saturation_nearly_all_requests_stay_where_they_came() -> None:
    outcome = play(Scene(name="calm", loads=(0.75, 0.75, 0.75)), "nothing-shared", REQUESTS, 2)
    for one in outcome.shared:
        assert one.local_share >= 0.95
    assert len(rows(outcome).splitlines()) == len(outcome.shared)
    assert len(HEADING) == len(rows(outcome).splitlines()[0])


def test_a_region_in_a_surge_is_spared_half_of_its_wait_and_the_others_lose_little() -> None:
    outcome = play(Scene(name="surge", loads=(1.8, 0.35, 0.35)), "nothing-shared", REQUESTS, 2)
    surge, island = outcome.shared[0], outcome.islands[0]
    assert island.local_share == 1.0
    assert surge.local_share < 0.95
    assert surge.ttft_p99_s <= 0.5 * island.ttft_p99_s
    for one, alone in zip(outcome.shared[1:], outcome.islands[1:], strict=True):
        assert one.ttft_p99_s <= alone.ttft_p99_s + 0.25
        assert one.local_share >= 0.95
