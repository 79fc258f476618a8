"""What answers tell of the lengths of prompts, in tokens."""

from __future__ import annotations

import pytest

from proxy.core import limits
from proxy.core.lengths import Lengths
from proxy.core.prefix import NO_CHAIN, PrefixChain


def chain(*points: tuple[int, int], prompt_bytes: int = 0) -> PrefixChain:
    """A chain of (hash, end) points; its prompt ends at the last one."""
    ends = [end for _, end in points]
    return PrefixChain(1, [name for name, _ in points], ends, prompt_bytes or ends[-1])


FIRST = chain((11, 512), (12, 4000))
NEXT = chain((11, 512), (12, 4000), (13, 6000))


def test_the_turn_before_is_as_long_as_its_answer_told() -> None:
    lengths = Lengths()
    assert lengths.tokens_at(NEXT, 4000) == -1
    lengths.learn(FIRST, 0, 2900, 0)  # 1.4 octets a token: code
    assert lengths.tokens_at(NEXT, 4000) == 2900
    assert lengths.tokens_at(NEXT, 512) == -1


def test_what_was_reported_cached_is_the_length_of_what_was_believed_cached() -> None:
    lengths = Lengths()
    lengths.learn(FIRST, 0, 2900, 0)
    lengths.learn(NEXT, 4000, 4400, 2880)  # whole blocks of it
    assert lengths.tokens_at(NEXT, 4000) == 2880
    assert lengths.tokens_at(NEXT, 6000) == 4400


def test_the_same_prompt_again_is_told_by_its_last_report() -> None:
    lengths = Lengths()
    lengths.learn(FIRST, 0, 1000, 0)
    lengths.learn(FIRST, 4000, 1000, 992)
    assert lengths.tokens_at(FIRST, 4000) == 992


@pytest.mark.parametrize("cached_tokens", [0, 500, 4300])
def test_a_report_of_another_beginning_is_not_taken(cached_tokens: int) -> None:
    lengths = Lengths()
    lengths.learn(NEXT, 4000, 4400, cached_tokens)
    assert lengths.tokens_at(NEXT, 4000) == -1
    assert lengths.tokens_at(NEXT, 6000) == 4400


def test_only_points_of_the_chain_have_a_length() -> None:
    lengths = Lengths()
    lengths.learn(NEXT, 4000, 4400, 2900)
    assert lengths.tokens_at(NEXT, 4001) == -1
    lengths.learn(chain((11, 512), prompt_bytes=700), 0, 300, 0)  # its end is no point
    assert lengths.tokens_at(NEXT, 512) == -1
    lengths.learn(NO_CHAIN, 0, 300, 0)
    assert lengths.tokens_at(NO_CHAIN, 0) == -1


def test_what_was_told_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LENGTHS_REMEMBERED_MAX", 4)
    lengths = Lengths()
    for name in (1, 2, 1, 3):
        lengths.learn(chain((name, 1000)), 0, 100 * name, 0)
    assert [lengths.tokens_at(chain((name, 1000)), 1000) for name in (1, 2, 3)] == [100, -1, 300]
