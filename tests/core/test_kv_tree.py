"""The tree is what a plain set of blocks would be, and knows each block's depth and path."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.kv_tree import BEYOND, GPU, HOST, KvTree, Run, medium_bit


def held(tree: KvTree) -> int:
    """Count the places of all runs that can be reached."""
    runs: set[int] = set()
    total = 0
    waiting: list[Run] = list(tree.where.values())
    while waiting:
        run = waiting.pop()
        if id(run) in runs:
            continue
        runs.add(id(run))
        assert len(run.hashes) == len(run.times) > 0
        total += len(run.hashes)
        if run.above is not None:
            assert run.start <= run.above.end
            waiting.append(run.above)
    return total


def path(tree: KvTree, block: int) -> list[int]:
    """Return the path to a block, root first."""
    run = tree.where[block]
    blocks = []
    for depth in range(1, tree.depth_in(run, block) + 1):
        place = tree.place(run, depth)
        assert place is not None
        blocks.append(place[0].hashes[place[1]])
    return blocks


def test_a_path_has_depths() -> None:
    tree = KvTree(0.0)
    tree.store([1, 2, 3], None, GPU, 1.0)
    tree.store([4], 3, GPU, 2.0)
    tree.store([12, 13], 1, GPU, 3.0)
    assert path(tree, 4) == [1, 2, 3, 4]
    assert path(tree, 13) == [1, 12, 13]
    assert [(g.first, g.last, g.at_s) for g in tree.growths] == [
        (1, 3, 1.0),
        (4, 4, 2.0),
        (2, 3, 3.0),
    ]
    assert [g.last for g in tree.grown(1.5, 9.0, 3)] == [3]


def test_pages_of_one_batch_are_one_growth() -> None:
    tree = KvTree(0.0)
    for page in range(1, 6):
        tree.store([page], page - 1 or None, GPU, 1.0)
    assert [(g.first, g.last) for g in tree.growths] == [(1, 5)]


def test_what_is_there_already_is_not_new() -> None:
    tree = KvTree(0.0)
    tree.store([1, 2], None, GPU, 1.0)
    tree.store([1, 2], None, GPU, 2.0)
    tree.store([1, 2, 3], None, GPU, 3.0)
    assert len(tree) == 3
    assert [(g.first, g.last) for g in tree.growths] == [(1, 2), (3, 3)]


def test_a_block_that_went_from_the_middle_comes_back_to_its_place() -> None:
    tree = KvTree(0.0)
    tree.store([1, 2, 3], None, GPU, 1.0)
    assert tree.remove([2], GPU) == [2]
    assert len(tree) == 2
    tree.store([2], 1, GPU, 2.0)
    assert path(tree, 3) == [1, 2, 3]
    assert tree.remove([1], GPU) == [1]
    tree.store([1, 7], None, GPU, 3.0)
    assert path(tree, 7) == [1, 7]
    assert path(tree, 3) == [1, 2, 3]
    tree.remove([7, 3, 2, 1], GPU)
    assert (len(tree), held(tree)) == (0, 0)


def test_a_block_is_resident_while_it_is_in_any_medium() -> None:
    tree = KvTree(0.0)
    tree.store([1, 2], None, GPU, 1.0)
    tree.store([1], None, medium_bit("CPU"), 1.0)
    assert tree.media_of(1) == GPU | HOST
    assert tree.remove([1, 2], GPU) == [2]
    assert (len(tree), tree.gpu_blocks) == (1, 0)
    tree.store([1], None, GPU, 1.0)
    assert (len(tree), tree.gpu_blocks) == (1, 1)
    assert tree.remove([1], HOST) == []
    assert tree.remove([1], GPU) == [1]
    assert (medium_bit("DISK"), medium_bit("")) == (BEYOND, GPU)


def test_a_copy_on_the_host_has_no_depth_and_is_no_growth() -> None:
    tree = KvTree(0.0)
    tree.store([5, 6], None, HOST, 1.0)
    assert (len(tree), tree.gpu_blocks, tree.growths) == (2, 0, [])
    tree.store([1, 2], None, GPU, 1.0)
    tree.store([2], None, HOST, 2.0)
    assert (tree.remove([1, 2], GPU), len(tree)) == ([1], 3)


def test_a_block_without_a_known_parent_is_resident_and_nowhere() -> None:
    tree = KvTree(0.0)
    tree.store([5, 6], 4, GPU, 1.0)
    tree.store([7], 6, GPU, 2.0)
    assert len(tree) == 3
    assert tree.grown(0.0, 9.0, 1) == []
    assert tree.remove([7, 6, 5], GPU) == [7, 6, 5]


def test_blocks_are_bounded() -> None:
    tree = KvTree(0.0, blocks_max=3)
    tree.store([1, 2], None, GPU, 1.0)
    tree.store([3, 4], 2, GPU, 1.0)
    assert (len(tree), tree.refused_blocks) == (2, 2)
    tree.remove([2], GPU)
    tree.store([3, 4], 1, GPU, 1.0)
    assert (len(tree), tree.refused_blocks) == (3, 2)


def test_growths_are_bounded_and_say_since_when() -> None:
    tree = KvTree(0.0)
    for block in range(1, 2 * limits.KV_GROWTHS_MAX + 3):
        tree.store([block], block - 1 or None, GPU, float(block))
    assert len(tree.growths) < 2 * limits.KV_GROWTHS_MAX
    assert tree.known_since_s == limits.KV_GROWTHS_MAX
    assert tree.growths[0].at_s > tree.known_since_s


# A block is a path of small numbers, and its hash says which: a tree of every shape, small enough
# that the same paths come and go.
PATHS = st.lists(st.integers(1, 3), min_size=1, max_size=6)
STEPS = st.lists(
    st.tuples(st.sampled_from(["store", "store", "remove", "clear"]), PATHS, st.integers(0, 5),
              st.sampled_from([GPU, GPU, HOST])),
    max_size=60,
)  # fmt: skip


def named(parts: list[int]) -> int:
    name = 0
    for part in parts:
        name = name * 4 + part
    return name


@given(STEPS)
def test_it_is_a_set_with_paths(steps: list[tuple[str, list[int], int, int]]) -> None:
    tree = KvTree(0.0)
    model: dict[int, int] = {}
    for number, (what, parts, cut, drawn) in enumerate(steps):
        blocks = [named(parts[: i + 1]) for i in range(len(parts))]
        if what == "store":
            begin = min(cut, len(parts) - 1)
            known = begin == 0 or blocks[begin - 1] in model
            begin = begin if known else 0  # engines name parents that they have
            medium = drawn if begin else GPU  # what has no parent named is at the root
            tree.store(blocks[begin:], blocks[begin - 1] if begin else None, medium, number + 1.0)
            for block in blocks[begin:]:
                model[block] = model.get(block, 0) | medium
        elif what == "remove":
            gone = tree.remove([blocks[-1]], drawn)
            if blocks[-1] in model:
                model[blocks[-1]] &= ~drawn
            lost = [block for block, media in model.items() if media == 0]
            assert gone == lost
            for block in lost:
                del model[block]
        elif number % 7 == 0:
            tree.clear(number + 1.0)
            model.clear()
        assert tree.where.keys() == model.keys()
        assert tree.gpu_blocks == sum(media & GPU for media in model.values())
        assert held(tree) == tree._held
        for block, media in model.items():
            assert tree.media_of(block) == media
            assert path(tree, block)[-1] == block
            assert [name // 4 for name in path(tree, block)] == [0, *path(tree, block)[:-1]]
