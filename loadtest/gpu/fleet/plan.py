"""Which cells are run, in the order of what they decide, since time may end before they do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from loadtest.gpu.fleet.load import AGENTS, CONVERSATION, UNIQUE
from loadtest.gpu.fleet.record import CellKey

OURS, OURS_RR, OURS_LEAST = "ours", "ours_round_robin", "ours_least_load"
OURS_DEAF = "ours_no_events"  # learns of caches by the answers alone, as the others do
NGINX, SGLANG, VLLM = "nginx", "sglang_cache_aware", "vllm_consistent_hash"
ARMS: Final = (OURS, OURS_DEAF, OURS_RR, OURS_LEAST, NGINX, SGLANG, VLLM)
EVENTS: Final = ("kill", "backfill")
LOADS: Final = (0.6, 0.75, 0.9, 1.1)

# A group is run as a whole before the next one begins: its arms are compared with each other.
_FIRST: Final = (
    (CONVERSATION, 0.9, (OURS, SGLANG, OURS_RR)),
    (CONVERSATION, 0.75, (OURS, SGLANG)),
    (UNIQUE, 0.75, (OURS, OURS_LEAST)),
    (AGENTS, 0.9, (OURS, OURS_RR, SGLANG)),
)
_THEN: Final = (
    (CONVERSATION, 0.75, (OURS_RR,)),
    (CONVERSATION, 0.9, (OURS_DEAF,)),
    (CONVERSATION, 0.9, (NGINX, VLLM, OURS_LEAST)),
    (CONVERSATION, 0.6, (OURS, SGLANG, OURS_RR)),
    (CONVERSATION, 1.1, (OURS, SGLANG, OURS_RR)),
    (AGENTS, 0.75, (OURS, SGLANG, OURS_RR)),
)


def default_order(repeats: int, shape: str) -> list[CellKey]:
    """Return the cells: what the targets name, once; the same again; then the rest."""
    cells: list[CellKey] = []
    rounds = [(_FIRST, 0), *((_FIRST, 1) for _ in range(repeats > 1)), (_THEN, 0)]
    rounds += [(part, repeat) for repeat in range(2, repeats) for part in (_FIRST, _THEN)]
    rounds += [(_THEN, 1)] if repeats > 1 else []
    for part, repeat in rounds:
        for workload, load, arms in part:
            # The other way round the next time: what drifts meets all of them.
            turned = arms if repeat % 2 == 0 else tuple(reversed(arms))
            cells += [
                CellKey(workload=workload, load=load, arm=arm, repeat=repeat, shape=shape)
                for arm in turned
            ]
    return cells


def written_order(text: str, repeats: int, shape: str) -> list[CellKey]:
    """Read `conversation:0.9:ours,sglang_cache_aware;conversation:0.6:ours:kill`.

    Raises `ValueError`.
    """
    cells = []
    for part in filter(None, (one.strip() for one in text.split(";"))):
        words = part.split(":")
        if len(words) not in (3, 4):
            raise ValueError(f"--plan {part!r}: expected WORKLOAD:LOAD:ARM,ARM[:EVENT]")
        event = words[3] if len(words) == 4 else ""
        if event and event not in EVENTS:
            raise ValueError(f"--plan {part!r}: no event {event!r}; there are {', '.join(EVENTS)}")
        for arm in words[2].split(","):
            if arm not in ARMS:
                raise ValueError(f"--plan {part!r}: no arm {arm!r}; there are {', '.join(ARMS)}")
        cells += [(words[0], float(words[1]), arm, event) for arm in words[2].split(",")]
    return [
        CellKey(workload=workload, load=load, arm=arm, repeat=repeat, shape=shape, event=event)
        for repeat in range(repeats)
        for workload, load, arm, event in cells
    ]


def left_to_do(
    cells: Iterable[CellKey], done: set[CellKey], arms: Sequence[str]
) -> Iterator[CellKey]:
    """Yield what is not done yet and can be run here, each once."""
    seen = set(done)
    for cell in cells:
        if cell not in seen and cell.arm in arms:
            seen.add(cell)
            yield cell
