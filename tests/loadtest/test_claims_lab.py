"""Tenants and classes in virtual time: offline work goes on, and online work hardly notices."""

from __future__ import annotations

from loadtest.policies.claims import Claimant, Scene
from loadtest.policies.claims_lab import play
from proxy.core.classes import OFFLINE


def test_a_flood_of_offline_work_goes_on_and_costs_online_work_little() -> None:
    scene = Scene(seconds=12.0)
    online = Claimant(name="online", tenant="a", rate=8.0)
    offline = Claimant(name="offline", tenant="a", rate=8.0, work_class=OFFLINE)
    (alone,) = play([online], scene)
    beside, given = play([online, offline], scene)
    assert alone.requests == beside.requests > 50
    assert beside.ttft_p50_s < 2.0 * alone.ttft_p50_s
    assert given.tokens_per_s > 0.0
