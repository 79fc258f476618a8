"""How traces are written down: four published formats, told apart by their first line.

Mooncake (one JSON object a line: arrival, lengths, block hashes), Azure (CSV: arrival and lengths),
packed coding-agent sessions (one session a line: turns, think times, block hashes as runs) and
recorded text (one JSON object a line: arrival, prompt, answer). A file may be compressed with xz. A
faulty line is an error with its number: a trace of which half was skipped in silence gives figures
of something else.
"""

from __future__ import annotations

import itertools
import lzma
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, TypeVar

import msgspec
from msgspec import Meta

from loadtest.traces import SHARED_HEAD_SHARE, Arrival, Trace, TraceError, join_runs, shared_blocks

DATA_DIR = Path(__file__).parent / "data"
LINE_BYTES_MAX = 64 * 1024 * 1024  # one agent session of a day is some hundred KB
LINES_MAX = 2_000_000  # a day of a large service; more is a wrong file
SLOT_GAP_S_MAX = 3.1  # Mooncake stamps arrivals in slots of about 3 s
BLOCK_TOKENS_KNOWN = (512, 16, 64, 32, 128, 256, 1024)  # likeliest first
AGENT_BLOCK_TOKENS = 64
AZURE_BLOCK_TOKENS = 512
SUBAGENT_DEPTH_MAX = 8
TEXT_BYTES_PER_TOKEN = 4

Tokens = Annotated[int, Meta(ge=0, le=100_000_000)]


class MooncakeRow(msgspec.Struct):
    timestamp: float  # ms
    input_length: Tokens
    output_length: Tokens
    hash_ids: Annotated[list[int], Meta(min_length=1)]


class AgentTurn(msgspec.Struct):
    """A request, or a subagent with requests of its own that the session waits for."""

    input_tokens: Tokens = msgspec.field(name="in", default=0)
    output_tokens: Tokens = msgspec.field(name="out", default=0)
    think: float | None = 0.0  # s
    h: list[tuple[int, Annotated[int, Meta(ge=1, le=1_000_000)]]] = []
    tool_tokens: Tokens = 0
    system_tokens: Tokens = 0
    requests: list[AgentTurn] = []


class AgentRow(msgspec.Struct):
    id: str
    requests: list[AgentTurn]
    tool_tokens: Tokens = 0
    system_tokens: Tokens = 0


class TextRow(msgspec.Struct):
    timestamp: float  # us
    input: str
    session_id: str | int
    output: str = ""


Line = tuple[int, bytes]
Row = TypeVar("Row")


def find_trace(name: str) -> Path:
    """Return the file that `name` means: a path, or a trace shipped with the load test."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.name.split(".")[0]: p for p in sorted(DATA_DIR.glob("*.xz"))}
    if name in shipped:
        return shipped[name]
    raise TraceError(f"{name}: no such file; shipped traces: {', '.join(shipped) or 'none'}")


def read_trace(name: str) -> Trace:
    """Read the trace that `name` means. Raises `TraceError` naming file, line and remedy."""
    path = find_trace(name)
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".xz":
                with lzma.open(raw) as file:
                    return parse_trace(_lines(file, name), name)
            return parse_trace(_lines(raw, name), name)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise TraceError(f"{name}: cannot be read: {error}") from error


def _lines(file: IO[bytes], source: str) -> Iterator[Line]:
    for number in itertools.count(1):
        line = file.readline(LINE_BYTES_MAX + 1)
        if not line:
            return
        if len(line) > LINE_BYTES_MAX:
            raise TraceError(f"{source}:{number}: line over {LINE_BYTES_MAX} bytes; not a trace")
        if number > LINES_MAX:
            raise TraceError(f"{source}: over {LINES_MAX} lines; split the trace")
        if line.strip():
            yield number, line.strip()


def parse_trace(lines: Iterable[Line], source: str) -> Trace:
    """Return the trace in `lines`; `source` names it in errors."""
    lines = iter(lines)
    first = next(lines, None)
    if first is None:
        raise TraceError(f"{source}: empty; expected one request or session a line")
    lines = itertools.chain([first], lines)
    keys = _keys(first[1])
    if "hash_ids" in keys:
        return _mooncake(lines, source)
    if "contexttokens" in keys:
        return _azure(lines, source)
    if "requests" in keys:
        return _agent(lines, source)
    if {"input", "session_id"} <= keys:
        return _text(lines, source)
    raise TraceError(
        f"{source}:{first[0]}: not a known trace; expected Mooncake (hash_ids), "
        "Azure (TIMESTAMP,ContextTokens,GeneratedTokens), agent sessions (requests) "
        "or text (input, session_id)"
    )


def _keys(line: bytes) -> set[str]:
    """Return the names in the first line: keys of a JSON object or columns of a CSV head."""
    try:
        value = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return {name.strip().lower() for name in line.decode("utf-8", "replace").split(",")}
    return set(value) if isinstance(value, dict) else set()


def _rows(lines: Iterable[Line], source: str, row: type[Row]) -> Iterator[Row]:
    decoder = msgspec.json.Decoder(row)
    for number, line in lines:
        try:
            yield decoder.decode(line)
        except msgspec.DecodeError as error:
            raise TraceError(f"{source}:{number}: {error}") from error


# --- Mooncake ---------------------------------------------------------------------------------


def _mooncake(lines: Iterable[Line], source: str) -> Trace:
    rows = sorted(_rows(lines, source, MooncakeRow), key=lambda row: row.timestamp)
    block_tokens = _block_tokens(rows, source)
    openers = Counter(row.hash_ids[0] for row in rows)
    arrivals = []
    for at_s, row in zip(_spread([row.timestamp / 1000 for row in rows]), rows, strict=True):
        ids = row.hash_ids
        shared = openers[ids[0]] > SHARED_HEAD_SHARE * len(rows)
        root = ids[min(int(shared), len(ids) - 1)]
        arrivals.append(
            Arrival(
                at_s=at_s,
                input_tokens=max(1, row.input_length),
                output_tokens=max(1, row.output_length),
                session=f"{root:x}",
                block_tokens=block_tokens,
                runs=join_runs((block_id, 1) for block_id in ids),
                system_blocks=int(shared),
            )
        )
    return Trace(source=source, kind="mooncake", arrivals=tuple(arrivals))


def _block_tokens(rows: Sequence[MooncakeRow], source: str) -> int:
    """Return the block size that explains every row: the file does not state it."""
    for tokens in BLOCK_TOKENS_KNOWN:
        if all(len(r.hash_ids) == max(1, -(-r.input_length // tokens)) for r in rows):
            return tokens
    raise TraceError(
        f"{source}: hash_ids and input_length do not fit any block size of "
        f"{', '.join(map(str, sorted(BLOCK_TOKENS_KNOWN)))} tokens"
    )


def _spread(stamps_s: Sequence[float]) -> list[float]:
    """Spread arrivals that were stamped in slots over the slot, in their order.

    Left as they are, the stamps make a burst of a dozen requests every three seconds that no client
    sent. Uniform at random is what independent clients look like; the seed is the slot's own time,
    so that a slot looks the same in every replay and in every part of the trace.
    """
    slots = sorted(set(stamps_s))
    if len(slots) > 0.5 * len(stamps_s):
        return [stamp_s - slots[0] for stamp_s in stamps_s]
    counts = Counter(stamps_s)
    spread: list[float] = []
    for slot_s, next_s in itertools.pairwise([*slots, slots[-1] + SLOT_GAP_S_MAX]):
        chance = random.Random(round(slot_s * 1000))
        width_s = min(next_s - slot_s, SLOT_GAP_S_MAX)
        spread += sorted(slot_s + chance.random() * width_s for _ in range(counts[slot_s]))
    return [stamp_s - spread[0] for stamp_s in spread]


# --- Azure ------------------------------------------------------------------------------------


def _azure(lines: Iterator[Line], source: str) -> Trace:
    """Arrivals and lengths only: every prompt is its own, nothing can be reused."""
    _, head = next(lines)
    columns = [name.strip().lower() for name in head.decode("utf-8", "replace").split(",")]
    wanted = ("timestamp", "contexttokens", "generatedtokens")
    try:
        places = [columns.index(name) for name in wanted]
    except ValueError as error:
        raise TraceError(f"{source}:1: needs the columns {', '.join(wanted)}") from error
    rows = sorted(_azure_rows(lines, source, places))
    arrivals = []
    for index, (stamp_s, input_tokens, output_tokens) in enumerate(rows):
        count = max(1, -(-input_tokens // AZURE_BLOCK_TOKENS))
        arrivals.append(
            Arrival(
                at_s=stamp_s - rows[0][0],
                input_tokens=max(1, input_tokens),
                output_tokens=max(1, output_tokens),
                session=f"{index:x}",
                block_tokens=AZURE_BLOCK_TOKENS,
                runs=(((index + 1) << 32, count),),
                message_blocks=(count,),
            )
        )
    return Trace(source=source, kind="azure", arrivals=tuple(arrivals))


def _azure_rows(
    lines: Iterable[Line], source: str, places: Sequence[int]
) -> Iterator[tuple[float, int, int]]:
    for number, line in lines:
        cells = line.decode("utf-8", "replace").split(",")
        try:
            stamp, input_tokens, output_tokens = (cells[place].strip() for place in places)
            at = datetime.fromisoformat(stamp)
            at = at if at.tzinfo else at.replace(tzinfo=UTC)
            yield at.timestamp(), int(input_tokens), int(output_tokens)
        except (ValueError, IndexError) as error:
            raise TraceError(f"{source}:{number}: not a request: {error}") from error


# --- coding agents ----------------------------------------------------------------------------


def _agent(lines: Iterable[Line], source: str) -> Trace:
    sessions = []
    for index, row in enumerate(_rows(lines, source, AgentRow)):
        turns = tuple(_agent_turns(row.requests, row, f"{row.id}", (index + 1) << 40))
        if turns:
            sessions.append(turns)
    return Trace(source=source, kind="agent", sessions=tuple(sessions))


def _agent_turns(
    requests: Sequence[AgentTurn], head: AgentRow | AgentTurn, session: str, first_id: int
) -> Iterator[Arrival]:
    """Yield a conversation's turns, and its subagents' where it waits for them.

    Ids count within one session file; `first_id` keeps the sessions apart. The head (tools and
    system prompt) is the same text for all users of a client version, but its ids are not: it is
    shared here between sessions whose heads have equal lengths.
    """
    if session.count("/") > SUBAGENT_DEPTH_MAX:
        raise TraceError(f"session {session}: subagents nested over {SUBAGENT_DEPTH_MAX} deep")
    head_blocks = (head.tool_tokens + head.system_tokens) // AGENT_BLOCK_TOKENS
    head_name = f"{head.tool_tokens}:{head.system_tokens}".encode()
    head_id = (1 << 61) | (zlib.crc32(head_name) << 24)
    previous: Arrival | None = None
    for place, turn in enumerate(requests):
        if turn.requests:
            yield from _agent_turns(turn.requests, turn, f"{session}/{place}", first_id)
            continue
        total = sum(count for _, count in turn.h)
        if total == 0:
            continue
        system_blocks = min(head_blocks, total - 1)
        runs = [(head_id, system_blocks)] if system_blocks else []
        runs += [(first_id + first, count) for first, count in _without(turn.h, system_blocks)]
        arrival = Arrival(
            # The trace names whole blocks only; up to 63 tokens after the last have no identity.
            input_tokens=total * AGENT_BLOCK_TOKENS,
            output_tokens=max(1, turn.output_tokens),
            think_s=max(0.0, turn.think or 0.0),
            session=session,
            block_tokens=AGENT_BLOCK_TOKENS,
            runs=join_runs(runs),
            system_blocks=system_blocks,
        )
        previous = msgspec.structs.replace(arrival, message_blocks=_agent_cut(previous, arrival))
        yield previous


def _without(runs: Iterable[tuple[int, int]], blocks: int) -> Iterator[tuple[int, int]]:
    """Yield `runs` without their first `blocks` blocks."""
    for first, count in runs:
        gone = min(blocks, count)
        blocks -= gone
        if count > gone:
            yield first + gone, count - gone


def _agent_cut(previous: Arrival | None, arrival: Arrival) -> tuple[int, ...]:
    """Return the sizes of the messages after the system message.

    The trace knows blocks, not messages. A conversation grows by an answer and a next question, so
    what is new is cut in two: an assistant message as long as the last answer, and a user message.
    """
    total = arrival.block_count - arrival.system_blocks
    if previous is None or previous.system_blocks != arrival.system_blocks:
        return (total,)
    shared = shared_blocks(previous, arrival) - arrival.system_blocks
    answer_blocks = previous.output_tokens // AGENT_BLOCK_TOKENS
    return cut_messages(previous.message_blocks, shared, total, answer_blocks)


def cut_messages(
    previous: Sequence[int], shared: int, total: int, answer_blocks: int
) -> tuple[int, ...]:
    """Return message sizes in blocks, user and assistant in turn, user first and last.

    Messages of the `previous` request that lie in the `shared` part are kept as they were.
    """
    assert shared >= 0
    assert total >= 1
    kept: list[int] = []
    for size in previous:
        if sum(kept) + size > min(shared, total):
            break
        kept.append(size)
    rest = total - sum(kept)
    if rest == 0 and len(kept) % 2 == 1:
        return tuple(kept)
    while kept and rest < (2 if len(kept) % 2 else 1):
        rest += kept.pop()
    if len(kept) % 2 == 0:
        return (*kept, rest)
    answer_blocks = min(max(1, answer_blocks), rest - 1)
    return (*kept, answer_blocks, rest - answer_blocks)


# --- recorded text ----------------------------------------------------------------------------


def _text(lines: Iterable[Line], source: str) -> Trace:
    """Cut each prompt where the session's last one ended.

    The recorded prompts leave the model's own answers out; a chat client sends them back, so the
    recorded answer stands between the two user messages.
    """
    rows = sorted(_rows(lines, source, TextRow), key=lambda row: row.timestamp)
    latest: dict[str | int, tuple[TextRow, tuple[str, ...]]] = {}
    arrivals = []
    for row in rows:
        last, texts = latest.get(row.session_id, (None, ()))
        if last is None or not row.input.startswith(last.input):
            texts = (row.input or " ",)
        elif added := row.input[len(last.input) :]:
            texts = (
                (*texts, last.output, added) if last.output else (*texts[:-1], texts[-1] + added)
            )
        latest[row.session_id] = row, texts
        arrivals.append(
            Arrival(
                at_s=(row.timestamp - rows[0].timestamp) / 1e6,
                input_tokens=_text_tokens("".join(texts)),
                output_tokens=_text_tokens(row.output),
                session=str(row.session_id),
                texts=texts,
            )
        )
    return Trace(source=source, kind="text", arrivals=tuple(arrivals))


def _text_tokens(text: str) -> int:
    return max(1, -(-len(text.encode("utf-8", "replace")) // TEXT_BYTES_PER_TOKEN))
