"""Each published format, told apart and read; what is wrong is named with its line."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.formats import cut_messages, find_trace, parse_trace, read_trace
from loadtest.traces import Trace, TraceError, block_ids, reusable_share, shared_blocks


def parse(*lines: str | dict[str, Any]) -> Trace:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return parse_trace([(n, text.encode()) for n, text in enumerate(texts, 1)], "sample")


def chat(timestamp: int, ids: list[int], input_length: int = 0) -> dict[str, Any]:
    return {
        "timestamp": timestamp,
        "input_length": input_length or 512 * len(ids),
        "output_length": 7,
        "hash_ids": ids,
    }


def test_mooncake_rows_become_arrivals_with_runs_of_blocks() -> None:
    trace = parse(chat(2000, [0, 5, 6, 9], 1600), chat(0, [0, 1, 2]), chat(1000, [0, 1, 2, 3]))
    assert trace.kind == "mooncake"
    assert not trace.closed_loop
    assert [a.at_s for a in trace.arrivals] == [0.0, 1.0, 2.0]
    last = trace.arrivals[2]
    assert (last.input_tokens, last.output_tokens, last.block_tokens) == (1600, 7, 512)
    assert last.runs == ((0, 1), (5, 2), (9, 1))
    assert list(block_ids(last)) == [0, 5, 6, 9]
    assert last.system_blocks == 1
    assert [a.session for a in trace.arrivals] == ["1", "1", "5"]  # turns of one chat share it


def test_mooncake_slots_are_spread_in_order_and_always_alike() -> None:
    rows = [chat(slot, [0, slot + i]) for slot in (0, 3000, 6000) for i in range(1, 9)]
    first, second = parse(*rows), parse(*rows)
    times = [a.at_s for a in first.arrivals]
    assert times == sorted(times) == [a.at_s for a in second.arrivals]
    assert len(set(times)) == len(times)
    # Measured from the first arrival, a slot's requests stay within three seconds of each other.
    assert times[7] < 3.0
    assert times[15] - times[8] < 3.0


def test_mooncake_block_size_is_inferred() -> None:
    assert parse(chat(0, [1, 2, 3], 40)).arrivals[0].block_tokens == 16
    with pytest.raises(TraceError, match="do not fit any block size"):
        parse(chat(0, [1, 2, 3], 40), chat(1, [1, 2], 4000))


def test_azure_prompts_share_nothing() -> None:
    trace = parse(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,1396,109",
    )
    assert trace.kind == "azure"
    assert [round(a.at_s, 3) for a in trace.arrivals] == [0.0, 4.315]
    assert [a.input_tokens for a in trace.arrivals] == [374, 1396]
    assert [a.output_tokens for a in trace.arrivals] == [44, 109]
    assert [a.block_count for a in trace.arrivals] == [1, 3]
    assert reusable_share(trace.arrivals, 0) == 0.0


def agent_session(name: str, requests: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": name, "tool_tokens": 128, "system_tokens": 70, "requests": requests}


def turn(h: list[list[int]], out: int = 64, think: float = 2.0) -> dict[str, Any]:
    return {"in": 64 * sum(n for _, n in h) + 5, "out": out, "m": "x", "think": think, "h": h}


def test_agent_sessions_grow_by_an_answer_and_a_question() -> None:
    first = agent_session(
        "a", [turn([[1, 10]], think=0.0), turn([[1, 13]]), turn([[1, 12], [20, 3]])]
    )
    trace = parse(first, agent_session("b", [turn([[1, 4]])]))
    assert trace.kind == "agent"
    assert trace.closed_loop
    one, two, three = trace.sessions[0]
    (other,) = trace.sessions[1]
    assert [t.input_tokens for t in (one, two, three)] == [640, 832, 960]
    assert [t.think_s for t in (one, two, three)] == [0.0, 2.0, 2.0]
    assert one.system_blocks == 3
    assert one.message_blocks == (7,)
    assert two.message_blocks == (7, 1, 2)
    assert three.message_blocks == (7, 1, 4)  # the last question differs in its last block
    assert shared_blocks(one, two) == 10
    assert shared_blocks(two, three) == 12
    assert shared_blocks(one, other) == 3  # the head of one client version, and no more


def test_agent_subagents_run_while_the_session_waits() -> None:
    inner = {"subagent": "x", "tool_tokens": 64, "system_tokens": 0, "requests": [turn([[90, 4]])]}
    trace = parse(agent_session("a", [turn([[1, 9]]), inner, turn([[1, 12]])]))
    (turns,) = trace.sessions
    assert [t.block_count for t in turns] == [9, 4, 12]
    assert turns[0].session == turns[2].session != turns[1].session
    assert shared_blocks(turns[0], turns[1]) == 0
    assert shared_blocks(turns[0], turns[2]) == 9


def test_recorded_text_is_cut_where_the_last_prompt_ended() -> None:
    rows = [
        {"timestamp": 2_000_000, "input": "hello\nfound", "output": "done", "session_id": "s"},
        {"timestamp": 1_000_000, "input": "hello", "output": "look", "session_id": "s"},
        {"timestamp": 1_500_000, "input": "hello", "output": "", "session_id": "t"},
        {"timestamp": 3_000_000, "input": "anew", "output": "", "session_id": "s"},
    ]
    trace = parse(*rows)
    assert trace.kind == "text"
    assert [a.texts for a in trace.arrivals] == [
        ("hello",),
        ("hello",),
        ("hello", "look", "\nfound"),
        ("anew",),
    ]
    assert [a.at_s for a in trace.arrivals] == [0.0, 0.5, 1.0, 2.0]
    assert reusable_share(trace.arrivals, 0) is None


FAULTY: dict[str, tuple[list[Any], str]] = {
    "nothing": ([], "empty"),
    "another file": (["a,b,c"], r"sample:1: not a known trace"),
    "json, but no trace": ([{"question": 1}], r"sample:1: not a known trace"),
    "wrong type": (
        [chat(0, [1]), chat(0, [2]) | {"input_length": "x"}],
        r"sample:2: .*input_length",
    ),
    "broken line": ([chat(0, [1]), "{"], r"sample:2: "),
    "no blocks": ([chat(0, [], 5)], r"sample:1: "),
    "azure column missing": (["TIMESTAMP,ContextTokens", "x,1"], "needs the columns"),
    "azure cell": (
        ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16,x,1"],
        "sample:2: not a",
    ),
    "azure short row": (
        ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16"],
        "sample:2: not a",
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_traces_are_errors_with_a_place(name: str) -> None:
    lines, message = FAULTY[name]
    with pytest.raises(TraceError, match=message):
        parse(*lines)


def test_subagents_nest_only_so_deep() -> None:
    inner = turn([[1, 2]])
    for _ in range(12):
        inner = {"subagent": "x", "requests": [inner]}
    with pytest.raises(TraceError, match="nested"):
        parse(agent_session("a", [inner]))


def test_files_are_read_plain_and_compressed(tmp_path: Path) -> None:
    text = (json.dumps(chat(0, [1, 2])) + "\n\n" + json.dumps(chat(10, [1, 3])) + "\n").encode()
    plain, packed = tmp_path / "t.jsonl", tmp_path / "t.jsonl.xz"
    plain.write_bytes(text)
    packed.write_bytes(lzma.compress(text))
    assert read_trace(str(plain)).arrivals == read_trace(str(packed)).arrivals
    packed.write_bytes(lzma.compress(text)[:-8])
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(str(packed))
    with pytest.raises(TraceError, match="no such file; shipped traces: azure_code, conversation"):
        find_trace("nowhere")


def test_the_shipped_trace_is_whole_and_worth_routing() -> None:
    trace = read_trace("conversation")
    assert find_trace("conversation").stat().st_size < 60 * 1024
    assert trace.request_count == 1750
    assert 590 < trace.arrivals[-1].at_s < 610
    bound = reusable_share(trace.arrivals, 175)
    assert bound is not None
    assert round(bound, 3) == 0.313


sizes = st.integers(1, 6)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(sizes, max_size=4).map(lambda s: s if len(s) % 2 else [*s, 1]),
    st.integers(0, 20),
    st.integers(1, 30),
    st.integers(0, 9),
)
def test_messages_cover_the_prompt_and_keep_what_is_shared(
    previous: list[int], shared: int, total: int, answer_blocks: int
) -> None:
    shared = min(shared, sum(previous), total)
    cut = cut_messages(previous, shared, total, answer_blocks)
    assert sum(cut) == total
    assert len(cut) % 2 == 1  # the user speaks first and last
    assert min(cut) >= 1
    if shared == sum(previous) and total >= shared + 2:
        assert list(cut[: len(previous)]) == previous
