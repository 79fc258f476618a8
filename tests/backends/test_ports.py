"""Leases of loopback ports."""

from __future__ import annotations

import random
import socket

import pytest

from backends.engines.base import EVERYWHERE, HOST, UNPLACED, Ports, PortsNeeded
from backends.ports import (
    NoPortError,
    PortLeases,
    ReplicaPorts,
    bind_problem,
    cell_ports,
    port_free,
)


def free_range(count: int) -> int:
    """Return the first of `count` neighbouring ports that are all free now."""
    for start in range(21_000, 31_000, 97):
        if all(port_free("127.0.0.1", port) for port in range(start, start + count)):
            return start
    raise AssertionError("no free range of ports")


def test_no_port_is_leased_twice_until_it_is_released() -> None:
    start = free_range(4)
    leases = PortLeases(random.Random(1), start, start + 3)
    ports = {leases.lease() for _ in range(4)}
    assert ports == set(range(start, start + 4))
    with pytest.raises(NoPortError, match=str(start)):
        leases.lease()
    leases.release(start + 2)
    assert leases.lease() == start + 2


def test_a_port_that_somebody_listens_on_is_passed_over() -> None:
    start = free_range(2)
    leases = PortLeases(random.Random(1), start, start + 1)
    with socket.create_server(("127.0.0.1", start)):
        assert not port_free("127.0.0.1", start)
        assert leases.lease() == start + 1
        with pytest.raises(NoPortError):
            leases.lease()
    assert leases.lease() == start


def test_a_lease_moves_when_somebody_else_took_the_port() -> None:
    start = free_range(2)
    leases = PortLeases(random.Random(1), start, start + 1)
    port = leases.lease()
    assert leases.keep_or_lease(port) == port
    with socket.create_server(("127.0.0.1", port)):
        moved = leases.keep_or_lease(port)
    assert moved != port
    assert leases.lease() == port, "what was given up is free again"


def test_a_run_of_ports_has_no_gap_and_no_stranger_in_it() -> None:
    start = free_range(6)
    leases = PortLeases(random.Random(1), start, start + 5)
    with socket.create_server(("127.0.0.1", start + 2)):
        first = leases.lease(3)
        assert first == start + 3
        with pytest.raises(NoPortError, match=f"no 3 free ports in a row on .* in {start}-"):
            leases.lease(3)
        assert leases.lease(2) == start
    leases.release(first, 3)
    assert {leases.lease() for _ in range(4)} == set(range(start + 2, start + 6))


def test_more_ports_than_there_are_cannot_be_had() -> None:
    with pytest.raises(NoPortError):
        PortLeases(random.Random(1), 21_000, 21_002).lease(4)


def test_a_replica_keeps_its_ports_over_restarts_while_it_needs_them() -> None:
    leases = PortLeases(random.Random(1))
    ports = ReplicaPorts(leases)
    ports.take_http()
    http = ports.http
    first = ports.take(PortsNeeded(kv_events=2, kv_replay=2, internal=8))
    assert first.http == http
    assert ports.take(PortsNeeded(kv_events=2, kv_replay=2, internal=8)) == first
    with socket.create_server(("127.0.0.1", first.kv_events + 1)):
        second = ports.take(PortsNeeded(kv_events=2, kv_replay=2, internal=8))
    assert second.kv_events != first.kv_events, "a stranger listens on one of them"
    assert (second.http, second.kv_replay) == (first.http, first.kv_replay)
    third = ports.take(PortsNeeded(kv_events=1))
    assert (third.kv_replay, third.internal) == (0, 0)
    assert third == Ports(http=first.http, kv_events=third.kv_events)
    ports.release()
    assert (ports.http, leases._leased) == (0, set())


def test_the_ports_of_an_adopted_replica_are_nobody_elses() -> None:
    start = free_range(4)
    leases = PortLeases(random.Random(1), start, start + 3)
    ports = ReplicaPorts(leases)
    ports.claim(HOST, {"http": (start, 1), "kv_events": (start + 2, 2)})
    assert leases.lease() == start + 1
    with pytest.raises(NoPortError):
        leases.lease()
    assert ports.runs == {"http": (start, 1), "kv_events": (start + 2, 2)}


def test_a_claimed_port_is_not_leased() -> None:
    start = free_range(1)
    leases = PortLeases(random.Random(1), start, start)
    leases.claim(start)
    with pytest.raises(NoPortError):
        leases.lease()


def test_default_range_is_out_of_the_way_of_outgoing_connections() -> None:
    port = PortLeases(random.Random(1)).lease()
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        low, high = map(int, file.read().split())
    assert not low <= port <= high


def test_the_problem_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        problem = bind_problem("127.0.0.1", server.getsockname()[1])
    assert problem is not None
    assert "in use" in str(problem)
    assert bind_problem("no.such.host.invalid", 80) is not None


CELLS = [
    ("nothing else", PortsNeeded(), Ports(8000, host=EVERYWHERE)),
    ("events", PortsNeeded(1, 1), Ports(8000, 8001, 8002, host=EVERYWHERE)),
    ("ranks", PortsNeeded(4, 4, 8), Ports(8000, 8001, 8005, 8009, host=EVERYWHERE)),
    ("no events", PortsNeeded(internal=2), Ports(8000, internal=8001, host=EVERYWHERE)),
]


@pytest.mark.parametrize(("needed", "ports"), [c[1:] for c in CELLS], ids=[c[0] for c in CELLS])
def test_the_ports_in_a_cell_are_the_same_in_each(needed: PortsNeeded, ports: Ports) -> None:
    assert cell_ports(needed) == ports


def test_ports_of_other_machines_are_leased_unseen_and_anew_at_each_start() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]  # here, which says nothing of there
        leases = PortLeases(random.Random(1), port, port + 1, EVERYWHERE)
        ports = ReplicaPorts(leases)
        first = ports.take(PortsNeeded())
        assert first.host == EVERYWHERE
        assert ports.host == UNPLACED
        assert {first.http, ports.take(PortsNeeded()).http} == {port, port + 1}
        ports.release()
        ports.claim("10.0.0.7", {"http": (port, 1)})
        assert leases.lease() == port + 1
