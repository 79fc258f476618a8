"""From what is wanted and what is there to what is to be done."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.adapters import Loaded
from backends.ladder import Rung
from backends.lifecycle import Phase
from backends.reconcile import (
    Action,
    Adapt,
    Create,
    Lower,
    Observed,
    Raise,
    Remove,
    Restart,
    Start,
    Stop,
    Update,
    Wanted,
    reconcile,
)
from backends.spec import ReplicaSpec
from proxy.config import parse_config
from tests.fakes.specs import replica_specs


def spec(replica_id: str, target: int = 0) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id=replica_id, model="m", pool="m", engine="simulator", target_inputs=target
    )


def want(replica_id: str, launch: str = "new", target: int = 0) -> Wanted:
    return Wanted(spec(replica_id, target), launch)


def seen(
    replica_id: str, phase: Phase = Phase.READY, launch: str = "new", *, wanted: bool = True
) -> Observed:
    return Observed(spec(replica_id), launch, phase, wanted)


NEW, OLD = {"a": "/new"}, {"a": "/old"}
LOADED_NEW, LOADED_OLD = Loaded(NEW, room=True), Loaded(OLD, room=True)


def want_adapters(replica_id: str, adapters: dict[str, str]) -> Wanted:
    return Wanted(msgspec.structs.replace(spec(replica_id), adapters=adapters), "new")


def has(
    replica_id: str,
    loaded: Loaded,
    phase: Phase = Phase.READY,
    wants: dict[str, str] = NEW,
    *,
    adapting: bool = False,
) -> Observed:
    """Return one whose specification has been taken over already."""
    wanted = want_adapters(replica_id, wants).spec
    return Observed(wanted, "new", phase, wanted=True, loaded=loaded, adapting=adapting)


CASES: list[tuple[str, list[Wanted], list[Observed], list[Action]]] = [
    ("nothing to do", [want("a")], [seen("a")], []),
    ("a new one", [want("a")], [], [Create(want("a"))]),
    ("one that is gone", [], [seen("a")], [Stop("a")]),
    ("one that is on its way", [], [seen("a", Phase.DRAINING, wanted=False)], []),
    ("one that has arrived", [], [seen("a", Phase.STOPPED, wanted=False)], [Remove("a")]),
    ("the gone before the new", [want("b")], [seen("a")], [Stop("a"), Create(want("b"))]),
    (
        "wanted again while it drains",
        [want("a")],
        [seen("a", Phase.DRAINING, wanted=False)],
        [Start("a")],
    ),
    (
        "a setting that needs no restart",
        [want("a", target=9)],
        [seen("a")],
        [Update(want("a", target=9))],
    ),
    ("a changed one", [want("a")], [seen("a", launch="old")], [Restart("a")]),
    ("changed, and it sleeps", [want("a")], [seen("a", Phase.ASLEEP, "old")], []),
    ("changed, and it wakes", [want("a")], [seen("a", Phase.WAKING, "old")], []),
    (
        "changed, while another sleeps",
        [want("a"), want("b")],
        [seen("a", Phase.ASLEEP), seen("b", launch="old")],
        [Restart("b")],
    ),
    ("no longer wanted, and it sleeps", [], [seen("a", Phase.ASLEEP)], [Stop("a")]),
    (
        "changed, one at a time",
        [want("a"), want("b")],
        [seen("a", launch="old"), seen("b", launch="old")],
        [Restart("a")],
    ),
    (
        "changed, while another is away",
        [want("a"), want("b")],
        [seen("a", Phase.STARTING), seen("b", launch="old")],
        [],
    ),
    (
        "changed, the other back",
        [want("a"), want("b")],
        [seen("a"), seen("b", launch="old")],
        [Restart("b")],
    ),
    (
        "changed, while the other cannot start: it is not followed",
        [want("a"), want("b")],
        [seen("a", Phase.BACKOFF), seen("b", launch="old")],
        [],
    ),
    (
        "changed where nothing is lost",
        [want("a"), want("b")],
        [seen("a", Phase.BACKOFF, "old"), seen("b", Phase.STARTING, "old")],
        [Restart("a"), Restart("b")],
    ),
    ("changed, on its way down", [want("a")], [seen("a", Phase.STOPPING, "old")], []),
    (
        "held replicas may be restarted",
        [want("a")],
        [seen("a", Phase.HELD, "old")],
        [Restart("a")],
    ),
    ("adapters are as wanted", [want_adapters("a", NEW)], [has("a", LOADED_NEW)], []),
    (
        "adapters changed: all that are ready are told at once",
        [want_adapters(name, NEW) for name in "abc"],
        [has("a", LOADED_OLD), has("b", Loaded(room=True), Phase.HELD), has("c", LOADED_OLD)],
        [Adapt("a"), Adapt("b"), Adapt("c")],
    ),
    (
        "adapters changed: the specification is taken over first",
        [want_adapters("a", NEW)],
        [has("a", LOADED_OLD, wants=OLD)],
        [Update(want_adapters("a", NEW)), Adapt("a")],
    ),
    (
        "adapters are being changed",
        [want_adapters("a", NEW)],
        [has("a", LOADED_OLD, adapting=True)],
        [],
    ),
    *(
        (
            f"adapters changed, and it is {phase}: it waits",
            [want_adapters("a", NEW)],
            [has("a", LOADED_OLD, phase)],
            [],
        )
        for phase in (Phase.STARTING, Phase.ASLEEP, Phase.WAKING, Phase.EMPTYING)
    ),
    (
        "adapters changed where no process is",
        [want_adapters("a", NEW)],
        [has("a", LOADED_OLD, Phase.BACKOFF)],
        [Restart("a")],
    ),
    ("the first adapters", [want_adapters("a", NEW)], [has("a", Loaded())], [Restart("a")]),
    (
        "the last adapters go",
        [want_adapters("a", {})],
        [has("a", LOADED_OLD, wants={})],
        [Adapt("a")],
    ),
    (
        "a name that its cache knows for other weights",
        [want_adapters("a", NEW)],
        [has("a", Loaded(OLD, ("a",), room=True))],
        [Restart("a")],
    ),
    (
        "nobody knows which adapters they have: one at a time",
        [want_adapters("a", NEW), want_adapters("b", NEW)],
        [
            has("a", Loaded(NEW, settled=False, room=True)),
            has("b", Loaded(NEW, settled=False, room=True)),
        ],
        [Restart("a")],
    ),
    (
        "adapters and the command changed",
        [want_adapters("a", NEW)],
        [msgspec.structs.replace(has("a", LOADED_OLD), launch_hash="old")],
        [Restart("a")],
    ),
]


@pytest.mark.parametrize(
    ("wanted", "observed", "actions"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_case(wanted: list[Wanted], observed: list[Observed], actions: list[Action]) -> None:
    assert list(reconcile(wanted, observed)) == actions


NAMES = st.lists(st.sampled_from("abcdef"), unique=True, max_size=6)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    NAMES,
    st.lists(
        st.tuples(
            st.sampled_from("abcdef"), st.sampled_from(list(Phase)), st.sampled_from(["old", "new"])
        ),
        unique_by=lambda t: t[0],
        max_size=6,
    ),
)
def test_a_serving_pool_keeps_serving(names: list[str], rows: list[tuple[str, Phase, str]]) -> None:
    """At most one replica that serves is restarted, and none while another one is away."""
    wanted = [want(name) for name in names]
    observed = [seen(name, phase, launch) for name, phase, launch in rows]
    actions = reconcile(wanted, observed)
    serving = {name for name, phase, _ in rows if phase in {Phase.READY, Phase.HELD}}
    cut = [a for a in actions if isinstance(a, Restart) and a.replica_id in serving]
    assert len(cut) <= 1
    if cut:
        assert set(names) <= serving
    touched = {a.replica_id for a in actions if isinstance(a, Stop | Remove)}
    assert not touched & set(names)


def on(rung: Rung, launch: str = "new") -> list[Wanted]:
    return [Wanted(spec("a"), launch, rung)]


def at(phase: Phase, *, aim: Rung = Rung.AWAKE, rising: bool = False, out: str = "") -> Observed:
    return Observed(
        spec("a"),
        "new",
        phase,
        wanted=True,
        aim=aim,
        rising=rising,
        out=frozenset([Rung(out)] if out else []),
    )


TURNS: list[tuple[str, list[Wanted], list[Observed], list[Action]]] = [
    ("down", on(Rung.ASLEEP), [at(Phase.READY)], [Lower("a", Rung.ASLEEP)]),
    ("drained by an operator", on(Rung.ASLEEP), [at(Phase.HELD)], [Lower("a", Rung.ASLEEP)]),
    ("further down", on(Rung.SUSPENDED), [at(Phase.READY)], [Lower("a", Rung.SUSPENDED)]),
    (
        "from sleep",
        on(Rung.SUSPENDED),
        [at(Phase.ASLEEP, aim=Rung.ASLEEP)],
        [Lower("a", Rung.SUSPENDED)],
    ),
    (
        "on its way to sleep",
        on(Rung.SUSPENDED),
        [at(Phase.EMPTYING, aim=Rung.ASLEEP)],
        [Lower("a", Rung.SUSPENDED)],
    ),
    ("on its way there", on(Rung.SUSPENDED), [at(Phase.EMPTYING, aim=Rung.SUSPENDED)], []),
    ("there", on(Rung.ASLEEP), [at(Phase.ASLEEP, aim=Rung.ASLEEP)], []),
    ("deeper than that", on(Rung.ASLEEP), [at(Phase.SUSPENDED, aim=Rung.SUSPENDED)], []),
    ("in the calls", on(Rung.AWAKE), [at(Phase.FALLING_ASLEEP, aim=Rung.ASLEEP)], []),
    ("it failed lately", on(Rung.SUSPENDED), [at(Phase.READY, out="suspended")], []),
    ("up from sleep", on(Rung.AWAKE), [at(Phase.ASLEEP)], [Raise("a")]),
    ("up before it slept", on(Rung.AWAKE), [at(Phase.EMPTYING)], [Raise("a")]),
    ("up from suspension", on(Rung.AWAKE), [at(Phase.SUSPENDED)], [Raise("a")]),
    ("it waits for a card", on(Rung.AWAKE), [at(Phase.SUSPENDED, rising=True)], []),
    (
        "it need wait no more",
        on(Rung.SUSPENDED),
        [at(Phase.SUSPENDED, aim=Rung.SUSPENDED, rising=True)],
        [Lower("a", Rung.SUSPENDED)],
    ),
    ("on its way up", on(Rung.AWAKE), [at(Phase.WAKING)], []),
    ("a changed command goes first", on(Rung.ASLEEP, "x"), [at(Phase.READY)], [Restart("a")]),
    ("not made to rest", on(Rung.SUSPENDED), [], []),
    ("not started to rest", on(Rung.ASLEEP), [at(Phase.BACKOFF)], [Stop("a")]),
    ("nobody decides", [Wanted(spec("a"), "new")], [at(Phase.SUSPENDED)], []),
]


@pytest.mark.parametrize(
    ("wanted", "observed", "actions"), [t[1:] for t in TURNS], ids=[t[0] for t in TURNS]
)
def test_turns(wanted: list[Wanted], observed: list[Observed], actions: list[Action]) -> None:
    assert list(reconcile(wanted, observed)) == actions


IDS = [
    ("one pool", "[{engine: vllm, replicas: 2}]", ["m-0", "m-1"]),
    ("a named pool", "[{engine: vllm, name: fast, replicas: 2}]", ["fast-0", "fast-1"]),
    (
        "two unnamed pools",
        "[{engine: vllm}, {engine: sglang}, {engine: sglang}]",
        ["m-0", "m-sglang-0", "m-sglang-2-0"],
    ),
    ("none", "[{engine: vllm, replicas: 0}]", []),
]


@pytest.mark.parametrize(("pools", "ids"), [case[1:] for case in IDS], ids=[c[0] for c in IDS])
def test_replica_ids(pools: str, ids: list[str]) -> None:
    config = parse_config(f"models: [{{name: m, pools: {pools}}}]", "test")
    assert [spec.replica_id for spec in replica_specs(config)] == ids


def test_ids_are_fit_for_urls_and_file_names() -> None:
    config = parse_config(
        "models: [{name: org/Model:7b, pools: [{engine: vllm}]}, "
        "{name: org-Model-7b, pools: [{engine: vllm}]}]",
        "test",
    )
    ids = [spec.replica_id for spec in replica_specs(config)]
    assert ids == ["org-Model-7b-0", "org-Model-7b-vllm-0"]
