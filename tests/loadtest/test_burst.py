"""The burst over real processes: its load, its figures, and what is configured for each law."""

from __future__ import annotations

import argparse

import orjson
import pytest

from loadtest import burst
from loadtest.burst import Options, Request, Sample, Told, arrivals, configuration, judge, turns
from loadtest.fleet import Ports
from loadtest.run import RunError
from loadtest.scaling.laws import Knative

PORTS = Ports(proxy=1, admin=2, manager=3)
OPTIONS = Options(rate=1.0, before_s=10.0, burst_s=5.0, after_s=10.0)


def test_the_step_is_a_step() -> None:
    times = arrivals(10.0, OPTIONS)
    assert sum(at_s < 10.0 for at_s in times) == 10
    assert abs(sum(10.0 <= at_s < 15.0 for at_s in times) - 50) <= 1
    assert sum(at_s >= 15.0 for at_s in times) == 10


@pytest.mark.parametrize("law", burst.LAWS)
def test_only_who_decides_differs(law: str) -> None:
    (model,) = configuration(law, 2.0, OPTIONS, PORTS, "/run")["models"]
    (pool,) = model["pools"]
    assert pool["args"][:2] == ["--startup-seconds", "2"]
    assert ("autoscale" in pool, pool.get("replicas")) == {
        "ours": (True, None),
        "static": (False, 4),
        "knative": (False, 1),
        "tracking": (False, 1),
    }[law]


def test_a_run_is_judged_by_what_the_clients_saw() -> None:
    requests = [Request(100.0, 100.1, "complete"), Request(110.0, 110.5, "complete")]
    requests += [Request(112.0, 0.0, "failed: status 429"), Request(120.0, 129.0, "complete")]
    samples = [Sample(90.0, 1, 1), Sample(100.0, 1, 1), Sample(110.0, 3, 3), Sample(120.0, 2, 3)]
    told = judge("ours", 2.0, 10.0, requests, [*samples, Sample(122.0, 2, 2)], OPTIONS)
    assert (told.requests, told.lost, told.details) == (4, 1, ("failed: status 429",))
    assert (told.ttft_p50_s, told.ttft_p99_s) == (0.5, 0.5), "of those that began in the burst"
    assert (told.replicas_max, told.turns, told.replica_s) == (3, 1, 10.0 + 30.0 + 6.0)
    assert "failed: status 429" in burst.table([told])


def test_turns_are_changes_of_direction() -> None:
    assert turns([1, 1, 3, 5, 5, 4, 2, 2, 3]) == 2
    assert turns([4, 4, 3, 3, 1]) == 0
    assert turns([]) == 0


def test_rivals_look_at_what_a_manager_tells() -> None:
    observation = {
        "in_flight": 30, "in_flight_tokens": 0, "queued": 10, "queued_tokens": 0,
        "arrivals_total": 99, "refused_total": 0, "kv_used_ratio": 0.1, "ready": 1,
        "coming_in_s": [1.0], "start_s": 2.0,
    }  # fmt: skip
    assert Knative(4.0, 1, 20).desired(Told(0.0, observation)) == 10


def test_the_body_is_a_request_of_its_own() -> None:
    one, two = (orjson.loads(burst.body(number, 20)) for number in (1, 2))
    assert one["messages"] != two["messages"]
    assert (one["max_tokens"], one["stream"]) == (20, True)


def test_a_law_that_there_is_not_is_refused_before_anything_starts() -> None:
    parser = argparse.ArgumentParser()
    burst.add_arguments(parser)
    with pytest.raises(RunError, match="no law 'magic'; there are static, ours"):
        burst.run(parser.parse_args(["--laws", "ours,magic"]))
    with pytest.raises(SystemExit):
        parser.parse_args(["--starts", "soon"])
