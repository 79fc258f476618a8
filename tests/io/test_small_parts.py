"""Tasks, the control channel, the access log, counts: the parts that everything else leans on."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from pathlib import Path

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from proxy.config import ProxyConfig
from proxy.contract import FleetSnapshot
from proxy.core import limits
from proxy.io import control
from proxy.io.access_log import AccessLog
from proxy.io.exposition import render_metrics, sum_samples
from proxy.io.tasks import Tasks, next_beat_s
from proxy.io.telemetry import SECONDS_BUCKETS, Histogram, Sample, Telemetry
from tests.fakes.plane import until

# --- tasks ---------------------------------------------------------------------------------------


async def test_a_task_that_fails_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("broken")

    tasks = Tasks()
    task = tasks.spawn("the one that fails", fail())
    await until(task.done)
    await asyncio.sleep(0)
    assert len(tasks) == 0
    assert "task the one that fails failed" in caplog.text
    assert "ValueError: broken" in caplog.text


async def test_closing_ends_every_task_and_waits_for_it() -> None:
    ended: list[int] = []

    async def work(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(number)

    tasks = Tasks()
    for number in range(3):
        tasks.start(f"work {number}", work(number))
    await asyncio.sleep(0)
    assert len(tasks) == 3
    await tasks.close()
    assert sorted(ended) == [0, 1, 2]
    assert len(tasks) == 0


@pytest.mark.parametrize(
    ("now_s", "after_s", "due_s"),
    [
        (100.0, 0.0, 100.25),
        (100.1, 0.0, 100.25),
        (100.24, 0.0, 100.25),  # what took nearly all of the interval misses no moment
        (100.2495, 0.0, 100.5),  # it came a little early
        (100.0, 0.025, 100.025),  # soon after the others, and asked for by what they did
        (100.005, 0.025, 100.025),
        (100.0245, 0.025, 100.275),
        (100.03, 0.025, 100.275),
    ],
)
async def test_what_is_done_at_intervals_is_done_at_the_same_moments(
    now_s: float, after_s: float, due_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now_s)
    assert next_beat_s(0.25, after_s) == pytest.approx(due_s)


# --- supervisor and worker -----------------------------------------------------------------------

MESSAGES: list[control.Message] = [
    control.Start(ProxyConfig(worker_urls=("http://h:1",), policy="session")),
    control.FleetIs(FleetSnapshot(epoch="e", version=3)),
    control.Cleared("a"),
    control.Drain(1.5),
    control.Count(),
    control.Explain(3, b"/v1/x", [(b"a", b"\xff")], b"{}"),
    control.Explained(3, 400, b"{}"),
    control.Ready(),
    control.Suspect("a", "refused"),
    control.Counted([Sample("x", (("k", "v"),), 1.0, (1, 2))], [Sample("y", (), 2.0)]),
]


async def test_every_message_arrives_as_it_was_sent_and_the_end_is_seen() -> None:
    one, other = socket.socketpair()
    sender, receiver = await control.Channel.open(one), await control.Channel.open(other)
    for message in MESSAGES:
        sender.send(message)
    sender.close()
    assert [message async for message in receiver] == MESSAGES
    assert await receiver.receive() is None
    receiver.close()
    sender.send(control.Count())  # to nobody: no matter
    await asyncio.sleep(0)


async def test_a_frame_that_claims_too_much_ends_the_channel() -> None:
    one, other = socket.socketpair()
    receiver = await control.Channel.open(other)
    with one:
        one.sendall(struct.pack("!I", control.FRAME_BYTES_MAX + 1))
        assert await receiver.receive() is None
        receiver.close()
        await asyncio.sleep(0)


async def test_what_nobody_takes_is_left_with_the_sender_and_comes_when_it_is_wanted() -> None:
    one, other = socket.socketpair()
    sender, receiver = await control.Channel.open(one), await control.Channel.open(other)
    batches = [bytes([number]) * (control._HELD_BYTES_MAX // 4) for number in range(40)]
    for batch in batches:
        sender.send(control.Heard(batch))
    drained = Tasks().spawn("drained", sender.drained())
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert sender.waiting_bytes > 20 * len(batches[0])
    assert len(receiver._held) < 3 * control._HELD_BYTES_MAX
    assert not drained.done()
    for batch in batches:
        assert await receiver.receive() == control.Heard(batch)
    await drained
    sender.close()
    assert await receiver.receive() is None


async def test_who_follows_hears_all_that_was_read_and_raises_what_its_handler_raises() -> None:
    one, other = socket.socketpair()
    sender, receiver = await control.Channel.open(one), await control.Channel.open(other)
    heard: list[control.Message] = []

    def hear(message: control.Message) -> None:
        heard.append(message)
        if message == control.Ready():
            raise RuntimeError("enough")

    sender.send(control.Count())
    sender.send(control.Whole())
    assert await receiver.receive() == control.Count()
    following = Tasks().spawn("following", receiver.follow(hear))
    while not heard:
        await asyncio.sleep(0)
    sender.send(control.Ready())
    sender.send(control.Count())
    with pytest.raises(RuntimeError, match="enough"):
        await following
    assert heard == [control.Whole(), control.Ready()]
    sender.close()
    await receiver.follow(heard.append)
    assert heard[2:] == [control.Count()]
    receiver.close()


async def test_octets_that_are_no_message_end_those_who_follow() -> None:
    one, other = socket.socketpair()
    receiver = await control.Channel.open(other)
    with one:
        one.sendall(struct.pack("!I", 2) + b"\xc1\xc1")
        with pytest.raises(msgspec.MsgspecError):
            await receiver.follow(lambda message: None)
    receiver.close()


# --- access log ----------------------------------------------------------------------------------


def test_lines_are_written_in_order_and_all_of_them_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(str(path))
    for number in range(1000):
        log.write({"number": number, "path": "a\nb\0c"})
    log.close()
    lines = path.read_bytes().splitlines()
    assert [orjson.loads(text)["number"] for text in lines] == list(range(1000))
    assert log.dropped_total == 0
    assert path.stat().st_mode & 0o007 == 0


def test_lines_are_added_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    for number in range(2):
        log = AccessLog(str(path))
        log.write({"number": number})
        log.close()
    assert len(path.read_bytes().splitlines()) == 2


def test_a_log_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        AccessLog(str(tmp_path / "no" / "log"))


def test_a_stuck_reader_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe is full, the thread waits in it; lines are kept up to a bound and then counted."""
    monkeypatch.setattr(limits, "ACCESS_LOG_LINES_MAX", 100)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(str(path))
    written = 0
    while log.dropped_total < 500:  # never waits: a full pipe would hold this thread for ever
        log.write({"number": written, "filler": "x" * 1000})
        written += 1
        assert len(log._lines) <= 100
    dropped = log.dropped_total
    os.set_blocking(reader, True)
    octets = bytearray()

    def read() -> None:
        while piece := os.read(reader, 65536):
            octets.extend(piece)

    thread = threading.Thread(target=read)
    thread.start()
    log.close()
    thread.join(10)
    os.close(reader)
    numbers = [orjson.loads(text)["number"] for text in bytes(octets).splitlines()]
    assert numbers == sorted(numbers)
    assert len(numbers) == written - dropped


def test_a_disk_that_is_full_is_counted() -> None:
    log = AccessLog("/dev/full")
    for _ in range(3):
        log.write({"a": 1})
    log.close()
    assert log.dropped_total == 3


def test_lines_of_several_workers_do_not_mix_in_a_pipe(tmp_path: Path) -> None:
    """POSIX keeps writes of at most PIPE_BUF octets to a pipe in one piece, and no longer ones."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    logs = [AccessLog(str(path)) for _ in range(3)]
    for number in range(300):
        for log in logs:
            log.write({"number": number, "filler": "x" * 900})
    while any(log._lines for log in logs):
        time.sleep(0.01)  # until every thread has taken its lines and waits for room in the pipe
    os.set_blocking(reader, True)
    octets = bytearray()

    def read() -> None:
        while piece := os.read(reader, 1000):
            octets.extend(piece)

    thread = threading.Thread(target=read)
    thread.start()
    for log in logs:
        log.close()
    thread.join(10)
    os.close(reader)
    lines = bytes(octets).splitlines()
    assert len([orjson.loads(text) for text in lines]) == 900


# --- counts --------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1000), max_size=50))
def test_a_histogram_counts_each_value_once_where_it_belongs(values: list[float]) -> None:
    histogram = Histogram(SECONDS_BUCKETS)
    for value in values:
        histogram.observe(value)
    assert sum(histogram.counts) == len(values)
    assert histogram.total == pytest.approx(sum(values))
    for edge, _ in enumerate(SECONDS_BUCKETS):
        at_most = sum(value <= SECONDS_BUCKETS[edge] for value in values)
        assert sum(histogram.counts[: edge + 1]) == at_most


def telemetry_of(outcomes: list[tuple[str, int, float]]) -> Telemetry:
    telemetry = Telemetry()
    for model, status, duration_s in outcomes:
        series = telemetry.series("chat", model)
        series.outcomes[status, "ok"] += 1
        series.duration_s.observe(duration_s)
    return telemetry


OUTCOMES = st.lists(
    st.tuples(st.sampled_from(["m", 'n"\\\n', ""]), st.sampled_from([200, 502]), st.floats(0, 900)),
    max_size=20,
)


@given(st.lists(OUTCOMES, max_size=4))
def test_what_is_exposed_is_the_sum_over_workers(
    workers: list[list[tuple[str, int, float]]],
) -> None:
    samples = [sample for outcomes in workers for sample in telemetry_of(outcomes).samples()]
    text = render_metrics(samples, [])[0].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    every = [outcome for outcomes in workers for outcome in outcomes]
    if not every:
        assert "doherty_requests" not in families
        return
    for model, status in {(model, status) for model, status, _ in every}:
        due = sum((m, s) == (model, status) for m, s, _ in every)
        found = [
            sample.value
            for sample in families["doherty_requests"].samples
            if sample.labels["model"] == model and sample.labels["code"] == str(status)
        ]
        assert found == [due]
    counts = [
        sample.value
        for sample in families["doherty_request_duration_seconds"].samples
        if sample.name.endswith("_count")
    ]
    assert sum(counts) == len(every)


def test_models_as_labels_are_bounded() -> None:
    telemetry = Telemetry()
    for number in range(10_000):
        telemetry.series("chat", f"model-{number}").outcomes[200, "ok"] += 1
    samples = [s for s in telemetry.samples() if s.name == "requests_total"]
    assert len(samples) <= limits.REQUEST_SERIES_MAX + 1
    assert sum(sample.value for sample in samples) == 10_000


def test_what_each_worker_believes_is_not_summed() -> None:
    name, by = "replica_prefill_tokens_per_second", (("replica", "a"),)
    samples = [Sample(name, by, 20_000.0), Sample(name, by, 30_000.0)]
    assert sum_samples(samples) == [Sample(name, by, 30_000.0)]


def test_the_lag_is_the_longest_and_not_the_sum() -> None:
    lag = "event_loop_lag_seconds"
    assert sum_samples([Sample(lag, (), 0.2), Sample(lag, (), 0.5)]) == [Sample(lag, (), 0.5)]
    telemetry = Telemetry()
    telemetry.loop_lag_s_max = 0.25
    assert (telemetry.take_lag_s(), telemetry.take_lag_s()) == (0.25, 0.0)


def test_every_series_has_a_help_text() -> None:
    """A name without one would be a KeyError in the middle of a scrape."""
    telemetry = telemetry_of([("m", 200, 0.1)])
    for table in (telemetry.decisions, telemetry.retries, telemetry.cancellations):
        table["x"] += 1
    telemetry.replica_requests["a"] += 1
    text = render_metrics(telemetry.samples(), [])[0].decode()
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
