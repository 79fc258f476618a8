"""Bindings go with their block, and with any block before it on its path."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.kv_points import Points


def test_a_block_takes_along_what_is_bound_beyond_it() -> None:
    points = Points(100)
    first, second, third = points.bind(1, 10, 1), points.bind(2, 20, 2), points.bind(3, 30, 3)
    points.join(second, third)
    points.join(first, second)
    assert sorted(points.gone(20)) == [2, 3]
    assert points.gone(30) == []
    assert points.gone(10) == [1]
    assert len(points) == 0


def test_a_chain_hash_is_bound_once() -> None:
    points = Points(100)
    points.bind(1, 10, 1)
    points.bind(1, 20, 2)
    assert points.gone(10) == []
    assert points.gone(20) == [1]


def test_what_was_between_leaves_the_others_joined() -> None:
    points = Points(100)
    first, second, third = points.bind(1, 10, 1), points.bind(2, 20, 2), points.bind(3, 30, 3)
    points.join(second, third)
    points.join(first, second)
    points.bind(2, 40, 4)  # elsewhere now
    assert sorted(points.gone(10)) == [1, 3]


def test_the_oldest_binding_goes_first() -> None:
    points = Points(2)
    for chain in (1, 2, 3):
        points.bind(chain, 10 * chain, chain)
    assert len(points) == 2
    assert points.at_chain(1) is points.at_block(10) is None
    points.bind(2, 20, 2)
    points.bind(4, 40, 4)
    assert points.at_chain(3) is None


@given(
    st.lists(
        st.tuples(st.sampled_from(["bind", "gone"]), st.integers(0, 9), st.integers(1, 6)),
        max_size=60,
    )
)
def test_every_chain_hash_is_bound_where_it_was_bound_last(
    steps: list[tuple[str, int, int]],
) -> None:
    """Blocks are a single path here: 1 is before 2, and so on."""
    points = Points(100)
    model: dict[int, int] = {}
    for what, chain, block in steps:
        if what == "bind":
            point = points.bind(chain, block, block)
            model[chain] = block
            others = sorted(set(model.values()))
            at = others.index(block)
            if at + 1 < len(others):
                below = points.at_block(others[at + 1])
                assert below is not None
                points.join(point, below)
            if at:
                above = points.at_block(others[at - 1])
                assert above is not None
                points.join(above, point)
        else:
            known = block in model.values()
            gone = {name for name, at in model.items() if known and at >= block}
            assert set(points.gone(block)) == gone
            model = {name: at for name, at in model.items() if name not in gone}
        assert len(points) == len(model)
        for name, at in model.items():
            found = points.at_chain(name)
            assert found is not None
            assert (found.block, name in found.chains) == (at, True)
