"""The screen as lines: a pure function, so that each size and each choice is tried."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.top.ink import BAD, EMPTY, Inked, changed, inked
from backends.top.look import Look, Place, moved, settled
from backends.top.plain import as_text
from backends.top.replicas import ORDERS, arranged, details, states_line
from backends.top.screen import Drawn, Heard, draw
from backends.top.words import width_of
from proxy.contract.view import ReplicaView, View
from tests.fakes.views import a_view

VIEW = a_view(40, seed=3)
EMPTY_VIEW = View(at_s=VIEW.at_s, window_s=0.0, proxy=VIEW.proxy)
VIEWS = (None, EMPTY_VIEW, a_view(1), a_view(12))  # by number: too long to be printed


def _texts(drawn: Drawn) -> list[str]:
    return [line.text for line in drawn.lines]


def _with(*replicas: ReplicaView, **proxy: object) -> View:
    shown = msgspec.structs.replace(VIEW.proxy, **proxy)
    return msgspec.structs.replace(VIEW, replicas=replicas, proxy=shown)


LOOKS = st.fixed_dictionaries(
    {
        "panel": st.integers(0, 5),
        "swapped": st.booleans(),
        "words": st.sampled_from(("", "qwen", "no such thing")),
        "ascii_only": st.booleans(),
    }
).map(lambda chosen: Look(**chosen))


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 260), st.integers(1, 70)),
    look=LOOKS,
    number=st.integers(0, len(VIEWS) - 1),
    message=st.sampled_from(("", "it was done\x1b[2J" * 9)),
)
def test_nothing_is_drawn_beyond_the_screen(
    size: tuple[int, int], look: Look, number: int, message: str
) -> None:
    drawn = draw(VIEWS[number], look, Heard(), size, message)
    assert len(drawn.lines) == size[1]
    for line in drawn.lines:
        assert width_of(line.text) <= size[0], line.text
        assert len(line.text) == len(line.ink)
        assert line.text.isprintable()
        assert line.text.isascii() or not look.ascii_only


@pytest.mark.parametrize("panel", range(6))
def test_eighty_columns_and_24_lines_show_what_matters(panel: int) -> None:
    texts = _texts(draw(a_view(9, seed=1), Look(panel=panel), Heard(), (80, 24)))
    must = [
        ("REPLICA ", "STATE", "LOAD", "WAIT", "KV", "HIT", "REQ/S", "TTFT50", "TPOT99", "QUEUED"),
        ("QUEUED", "OLDEST", "REFUSED", "TTFT50", "TTFT99", "TPOT99", "STATUS"),
        ("MODEL", "TOKENS/S", "CACHED", "TTFT99", "TPOT50", "TPOT99"),
        ("WANTED", "READY", "COMING", "FROM-TO", "WHY", "requests in flight"),
        ("REASON", "prefix", "68.1%", "REGION", "us-east", "cut"),
        ("PREFIX", "HEAT", "HOME", "HELD BY"),
    ][panel]
    whole = "\n".join(texts)
    assert [word for word in must if word not in whole] == []
    assert [
        word for word in ("req/s", "err/s", "hit", "lag", "fleet", "READY") if word not in whole
    ] == []
    assert not texts[-1].endswith("…"), "the keys fit"


def test_the_cursor_stays_with_its_replica_when_the_order_changes() -> None:
    look = Look(order=1).with_place(Place("qwen3-32b-018"))
    for seed in (3, 4, 5):
        drawn = draw(a_view(40, seed=seed), look, Heard(), (100, 20))
        look = drawn.look
        assert look.place.name == "qwen3-32b-018"
        marked = [line.text for line in drawn.lines if line.ink.isupper()]
        assert len(marked) == 1
        assert marked[0].startswith("qwen3-32b-018"), "it is in sight"


@given(
    st.lists(st.text("abc", min_size=1, max_size=2), unique=True, max_size=12),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 9),
    st.integers(-20, 20),
)
def test_the_cursor_is_on_a_row_and_in_sight(
    names: list[str], at: int, top: int, rows: int, by: int
) -> None:
    place = settled(moved(settled(Place("ab", at, top), names, rows), names, by), names, rows)
    if not names:
        assert place == Place()
        return
    assert names[place.at] == place.name
    assert place.top <= place.at < place.top + max(rows, 1)
    assert place.top == 0 or place.top + rows <= len(names), "no line is empty in vain"


def test_orders_put_first_what_is_asked_for() -> None:
    by = {order.name: arranged(VIEW.replicas, at) for at, order in enumerate(ORDERS)}
    loads = [one.inflight for one in by["load"]]
    assert loads == sorted(loads, reverse=True)
    known = [one.kv_used_ratio for one in by["KV"]]
    assert known[-1] is None, "what nobody knows comes last"
    assert by["state"][0].state == "backoff", "trouble comes first"
    turned = arranged(VIEW.replicas, 1, backwards=True)
    assert [one.inflight for one in turned] == sorted(loads)


def test_a_lost_stream_is_told_with_its_age_and_the_values_stay() -> None:
    heard = Heard(12.3, "http://h:1 does not answer: refused", 4.0)
    drawn = draw(VIEW, Look(), heard, (100, 24))
    assert drawn.lines[2].text.startswith("STALE: 12 s old; again in 4 s: http://h:1 does not")
    assert set(drawn.lines[2].ink) == {BAD}
    assert drawn.names, "the last that was known is still there"
    silent = draw(VIEW, Look(), Heard(5.0), (100, 24)).lines[2].text
    assert silent.startswith("STALE: 5 s old")
    assert "STALE" not in draw(VIEW, Look(), Heard(1.4), (100, 24)).lines[2].text


def test_states_of_trouble_are_told_apart() -> None:
    base = a_view(3, seed=9).replicas[0]
    states = [
        msgspec.structs.replace(base, state=state, suspect=suspect, held=held)
        for state, suspect, held in (
            ("ready", False, False),
            ("ready", True, False),
            ("draining", False, True),
            ("backoff", False, False),
        )
    ]
    said = [one.text for one in states_line(states)]
    assert said[:2] == ["4 replicas:", "1 ready"]
    assert sorted(said[2:]) == ["1 backoff", "1 held", "1 suspect"]
    assert [one.text for one in states_line([])] == ["no replicas"]


def test_a_proxy_that_is_not_ready_says_why() -> None:
    first = draw(_with(not_ready="no fleet yet"), Look(), Heard(), (80, 24)).lines[0]
    assert "NOT READY: no fleet yet" in first.text
    assert BAD in first.ink


def test_all_that_is_known_of_a_replica() -> None:
    replica = msgspec.structs.replace(VIEW.replicas[0], reason="loading\x07", gpus=("0", "1"))
    told = dict(details(replica, VIEW.proxy))
    assert told["reason"] == "loading�"
    assert told["GPUs"] == "0, 1"
    assert told["region"] == "eu-west, this one"
    shown = " ".join(told.values())
    assert replica.engine in shown


def test_text_has_every_table_and_every_replica() -> None:
    text = as_text(VIEW)
    for title in (
        *("REPLICAS", "CLASSES", "MODELS", "POOLS", "SCALING DECISIONS", "HOT PREFIXES"),
        *("CHOICES OF A REPLICA", "OTHER REGIONS", "RINGS", "ANSWERS"),
    ):
        assert f"\n{title}\n" in text
    assert all(one.replica_id in text for one in VIEW.replicas)
    assert text.isascii()
    few = as_text(VIEW, words="qwen3-32b-018")
    assert few.split("\n\n")[1].count("\n") == 2, "title, heading and one row"


def test_only_what_changed_is_written_again() -> None:
    same = inked("replica  12/64")
    assert changed(same, same) is None
    assert changed(same, inked("replica  13/64")) == (10, 11)
    assert changed(same, Inked(same.text, "g" * 7 + same.ink[7:])) == (0, 7)
    assert changed(same, EMPTY) == (0, 14)
    assert changed(inked("模型 1"), inked("模型 2")) == (0, 6)


def test_a_second_in_which_little_happens_changes_little() -> None:
    first = draw(VIEW, Look(), Heard(), (120, 40))
    later = msgspec.structs.replace(
        VIEW,
        at_s=VIEW.at_s + 1,
        proxy=msgspec.structs.replace(VIEW.proxy, in_flight=VIEW.proxy.in_flight + 1),
    )
    second = draw(later, Look(), Heard(), (120, 40))
    spans = [changed(a, b) for a, b in zip(first.lines, second.lines, strict=True)]
    assert sum(end - begin for begin, end in filter(None, spans)) <= 4
