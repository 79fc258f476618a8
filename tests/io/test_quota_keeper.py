"""The supervisor's part in the counts of tenants: other proxies, takeovers, the file of the day."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.config import ProxyConfig
from proxy.config_access import AccessConfig, TenantConfig
from proxy.core import peer_wire, quota
from proxy.core.peer_wire import read_frame
from proxy.core.quota import Account
from proxy.io import quota_keeper
from proxy.io.peers import PREDECESSOR, SUCCESSOR
from proxy.io.quota_file import DaySums, read_sums, write_sums
from proxy.io.quota_keeper import QuotaKeeper
from proxy.io.quota_memory import QuotaMemory, quota_cells_at
from proxy.listeners import StartError
from proxy.sources import check_source

DAY = 20_000


class Clocks:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.unix_s = DAY * 86_400.0


class Link:
    """One end of a link; what it is told the other end hears at once."""

    def __init__(self, life: bytes, name: str = "a peer") -> None:
        self.peer_id = life  # the other's
        self.name = name
        self.waiting_bytes = 0
        self.ended = asyncio.Event()
        self.other: Proxy
        self.theirs: Link

    def end_writing(self) -> None:
        """The other side has read all of it, and ends the link."""
        part(self.other, self.theirs.other)

    def send(self, frame: bytes) -> None:
        self.other.readers[peer_wire.QUOTAS](self.theirs, read_frame(frame).batch)


class Proxy:
    """A supervisor's memory and keeper, one worker, and links that the test holds."""

    def __init__(self, clocks: Clocks, number: int, path: Path | None = None, **how: bool) -> None:
        self.proxy_id = bytes((number,)) * 16
        self.readers: dict[int, Callable[..., None]] = {}
        self.linked: list[Link] = []
        self.greeting: set[str] = set()  # links by hand that are to come
        self.over: set[str] = set()  # and those that have ended
        self.memory = QuotaMemory(1)
        row = self.memory.assign(["t"])["t"]
        self.account = Account(quota_cells_at(self.memory.fd, 1), 1, row, 0)
        self.account.advance(quota.bucket_at(clocks.now_s))
        self.keeper = QuotaKeeper(
            self.memory, self, now_s=lambda: clocks.now_s, unix_s=lambda: clocks.unix_s, **how  # type: ignore[arg-type]
        )  # fmt: skip
        tenants = (TenantConfig(name="t", tokens_per_day=5),)
        self.config = ProxyConfig(
            quota_path=str(path) if path else None, access=AccessConfig(tenants=tenants)
        )
        self.keeper.know(self.config)

    def listen(self, kind: int, reader: Callable[..., None]) -> None:
        self.readers[kind] = reader

    def links(self) -> list[Link]:
        return list(self.linked)

    def greets(self, name: str) -> bool:
        return name in self.greeting

    def is_over(self, name: str) -> bool:
        return name in self.over

    def use(self, clocks: Clocks, tokens: int) -> None:
        """A request has begun, and is over."""
        self.account.use(quota.bucket_at(clocks.now_s), quota.TOKENS, tokens)
        self.account.add_to_day(quota.day_at(clocks.unix_s), tokens, 7 * tokens)

    def day(self) -> tuple[int, int]:
        """Return the day's tokens as the worker finds them."""
        today = self.keeper._today
        return tuple(  # type: ignore[return-value]
            self.account.of_day(kind, today) for kind in (quota.DAY_TOKENS, quota.DAY_COST)
        )


def link(one: Proxy, other: Proxy, *, before: bool = False) -> None:
    """`before`: the other is the one from which the first takes over."""
    here = Link(other.proxy_id, PREDECESSOR if before else "a peer")
    there = Link(one.proxy_id, SUCCESSOR if before else "a peer")
    here.other, here.theirs, there.other, there.theirs = other, there, one, here
    one.linked.append(here)
    other.linked.append(there)


def part(one: Proxy, other: Proxy) -> None:
    for here, there in ((one, other), (other, one)):
        ends = [each for each in here.linked if each.other is there]
        here.linked = [each for each in here.linked if each not in ends]
        here.over.update(each.name for each in ends)
        for each in ends:
            each.ended.set()


@pytest.fixture
def clocks() -> Iterator[Clocks]:
    return Clocks()  # type: ignore[return-value]


def test_each_counts_what_the_other_has(clocks: Clocks) -> None:
    one, other = Proxy(clocks, 1), Proxy(clocks, 2)
    one.use(clocks, 30)
    link(one, other)
    one.keeper.tick()
    assert other.account.sum(quota.TOKENS) == 30
    other.use(clocks, 5)
    other.account.add(quota.CONCURRENT, 1)
    other.keeper.tick()
    one.use(clocks, 1)
    one.keeper.tick()
    for proxy in (one, other):
        assert proxy.account.sum(quota.TOKENS) == 36
        assert proxy.account.sum(quota.CONCURRENT) == 1
        assert proxy.day() == (36, 252)
        told = {sample.name: sample.value for sample in proxy.keeper.samples()}
        assert told == {
            "tenant_minute_requests": 0,
            "tenant_minute_tokens": 36,
            "tenant_concurrent": 1,
            "tenant_day_tokens": 36,
            "tenant_day_cost": pytest.approx(252e-9),
        }
    part(one, other)
    one.keeper.tick()
    assert (one.account.sum(quota.TOKENS), one.account.sum(quota.CONCURRENT)) == (36, 0)
    clocks.now_s += 61.0
    one.account.advance(quota.bucket_at(clocks.now_s))
    one.keeper.tick()
    assert one.account.sum(quota.TOKENS) == 0
    assert one.day() == (36, 252)
    clocks.unix_s += 86_400.0
    one.keeper.tick()
    assert one.day() == (0, 0)


def test_a_link_that_is_behind_is_told_all_of_it_later(clocks: Clocks) -> None:
    one, other = Proxy(clocks, 1), Proxy(clocks, 2)
    link(one, other)
    one.keeper.tick()
    one.linked[0].waiting_bytes = 10**6
    one.use(clocks, 30)
    one.keeper.tick()
    assert other.account.sum(quota.TOKENS) == 0
    one.linked[0].waiting_bytes = 0
    one.keeper.tick()
    assert other.account.sum(quota.TOKENS) == 30


async def test_the_day_outlives_an_end_and_counts_once_for_others(
    clocks: Clocks, tmp_path: Path
) -> None:
    path = tmp_path / "day"
    one, other = Proxy(clocks, 1, path), Proxy(clocks, 2)
    link(one, other)
    one.use(clocks, 30)
    for proxy in (one, other):
        proxy.keeper.tick()
    await one.keeper.keep()
    part(one, other)
    other.keeper.tick()
    again = Proxy(clocks, 3, path)
    assert again.day() == (30, 210)
    link(again, other)
    again.use(clocks, 2)
    again.keeper.tick()
    assert other.day() == (32, 224)
    await again.keeper.keep()
    third = Proxy(clocks, 4, path)
    assert third.day() == (32, 224)
    clocks.unix_s += 86_400.0
    assert Proxy(clocks, 5, path).day() == (0, 0)


async def test_a_takeover_hands_the_counts_over(clocks: Clocks, tmp_path: Path) -> None:
    path = tmp_path / "day"
    old, peer = Proxy(clocks, 1, path), Proxy(clocks, 9)
    link(old, peer)
    old.use(clocks, 30)
    old.account.add(quota.CONCURRENT, 1)
    old.keeper.tick()
    await old.keeper.keep()
    new = Proxy(clocks, 2, path, takes_over=True)
    await new.keeper.keep()  # before it has heard anything it writes nothing
    assert read_sums(str(path)).tenants == {"t": (30, 210)}
    await old.keeper.leave()
    link(new, old, before=True)
    link(new, peer)
    old.keeper.tick()
    new.keeper.tick()
    assert new.account.sum(quota.TOKENS) == 30
    assert new.account.sum(quota.CONCURRENT) == 1
    assert new.day() == (30, 210)
    new.use(clocks, 4)
    old.use(clocks, 1)  # it finishes what it had
    old.keeper.tick()
    new.keeper.tick()
    await new.keeper.keep()
    await old.keeper.keep()  # the file is not its own any more
    assert read_sums(str(path)).tenants == {"t": (35, 245)}
    assert peer.day() == (35, 245)
    part(new, old)
    part(peer, old)
    for proxy in (peer, new):
        proxy.keeper.tick()
    assert new.day() == (35, 245)
    assert peer.day() == (35, 245)
    await new.keeper.keep()
    assert read_sums(str(path)).tenants == {"t": (35, 245)}


async def test_one_that_hears_nothing_of_the_one_before_reads_its_file(
    clocks: Clocks, tmp_path: Path
) -> None:
    path = tmp_path / "day"
    write_sums(str(path), DaySums(DAY, ["01" * 16], {"t": (8, 9)}))
    old, new = Proxy(clocks, 1), Proxy(clocks, 2, path, takes_over=True)
    link(new, old, before=True)
    new.keeper.tick()
    assert new.day() == (0, 0)
    part(new, old)
    new.keeper.tick()
    assert new.day() == (8, 9)


async def test_one_that_is_never_linked_with_the_one_before_reads_and_keeps_its_file(
    clocks: Clocks, tmp_path: Path
) -> None:
    path = tmp_path / "day"
    old, new = Proxy(clocks, 1, path), Proxy(clocks, 2, path, takes_over=True)
    old.use(clocks, 8)
    await old.keeper.leave()  # it has had no time to keep anything yet
    new.keeper.tick()
    assert new.day() == (0, 0)
    new.over.add(PREDECESSOR)
    new.use(clocks, 1)
    new.keeper.tick()
    assert new.day() == (9, 63)
    await new.keeper.keep()
    assert read_sums(str(path)) == DaySums(DAY, ["01" * 16, "02" * 16], {"t": (9, 63)})


async def test_a_link_that_comes_and_goes_between_two_looks_is_seen(
    clocks: Clocks, tmp_path: Path
) -> None:
    path = tmp_path / "day"
    old, new, peer = Proxy(clocks, 1), Proxy(clocks, 2, path, takes_over=True), Proxy(clocks, 3)
    old.use(clocks, 8)
    old.account.add(quota.CONCURRENT, 1)
    link(new, old, before=True)
    link(peer, old)
    old.keeper.tick()
    part(new, old)
    part(peer, old)
    for proxy in (new, peer):
        proxy.keeper.tick()
        assert proxy.day() == (8, 56)
        assert proxy.account.sum(quota.CONCURRENT) == 0
    await new.keeper.keep()
    assert read_sums(str(path)) == DaySums(DAY, ["01" * 16, "02" * 16], {"t": (8, 56)})


async def test_it_leaves_when_its_successor_has_read_the_last_of_it(
    clocks: Clocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_keeper, "TELL_INTERVAL_S", 0.001)
    path = tmp_path / "day"
    old, new = Proxy(clocks, 1, path), Proxy(clocks, 2, path, takes_over=True)
    await old.keeper.leave()
    old.greeting.add(SUCCESSOR)
    old.use(clocks, 8)
    ending = asyncio.ensure_future(old.keeper.farewell())
    await asyncio.sleep(0.01)
    assert not ending.done()
    old.greeting.clear()
    link(new, old, before=True)
    there = old.linked[0]
    there.waiting_bytes = 10**6
    await asyncio.sleep(0.01)
    assert not ending.done()
    there.waiting_bytes = 0
    await ending
    new.keeper.tick()
    assert new.day() == (8, 56)


async def test_a_successor_that_hangs_holds_up_no_end(
    clocks: Clocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_keeper, "FAREWELL_TIMEOUT_S", 0.01)
    old = Proxy(clocks, 1, tmp_path / "day")
    old.greeting.add(SUCCESSOR)
    async with asyncio.timeout(20):  # only so that this ends if the claim is false
        await old.keeper.farewell()


async def test_one_that_is_upgraded_twice_hands_on_what_is_still_running(
    clocks: Clocks, tmp_path: Path
) -> None:
    path = tmp_path / "day"
    first, second, third = (Proxy(clocks, n, path, takes_over=n > 1) for n in (1, 2, 3))
    await first.keeper.leave()
    link(second, first, before=True)
    first.use(clocks, 8)
    first.keeper.tick()
    second.use(clocks, 1)
    await second.keeper.leave()
    link(third, second, before=True)
    first.use(clocks, 4)  # a long answer
    for proxy in (first, second, third):
        proxy.keeper.tick()
    assert third.day() == (13, 91)
    await second.keeper.farewell()
    third.keeper.tick()
    await third.keeper.keep()
    assert third.day() == (13, 91)
    assert read_sums(str(path)).tenants == {"t": (13, 91)}


async def test_a_file_that_cannot_be_read_or_written_is_named(
    clocks: Clocks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "day"
    path.write_text("not what it should be")
    proxy = Proxy(clocks, 1, path)
    assert "cannot be read, the day begins anew" in caplog.text
    proxy.use(clocks, 1)
    proxy.keeper.tick()
    path.unlink()
    path.mkdir()
    await proxy.keeper.keep()
    assert "quota_path" in caplog.text
    assert "cannot be written" in caplog.text
    assert list(tmp_path.iterdir()) == [path]
    path.rmdir()
    await proxy.keeper.keep()
    assert read_sums(str(path)).tenants == {"t": (1, 7)}


async def test_the_last_that_is_kept_waits_for_one_that_is_being_written(
    clocks: Clocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write under one name until they are whole, and the later one has to win."""
    proxy = Proxy(clocks, 1, tmp_path / "day")
    writing, go = threading.Event(), threading.Event()
    written: list[int] = []

    def slowly(path: str, sums: DaySums) -> None:
        writing.set()
        go.wait(5.0)
        write_sums(path, sums)
        written.append(sums.tenants["t"][0])

    monkeypatch.setattr(quota_keeper, "write_sums", slowly)
    proxy.use(clocks, 1)
    proxy.keeper.tick()

    async def keep_the_last() -> None:
        await asyncio.to_thread(writing.wait, 5.0)
        proxy.use(clocks, 2)
        proxy.keeper.tick()
        asyncio.get_running_loop().call_later(0.01, go.set)
        await proxy.keeper.keep()

    await asyncio.gather(proxy.keeper.keep(), keep_the_last())
    assert written == [1, 3]
    assert read_sums(str(tmp_path / "day")).tenants == {"t": (3, 21)}


def test_a_tenant_that_is_configured_later_has_what_was_known_of_it(
    clocks: Clocks, tmp_path: Path
) -> None:
    path = tmp_path / "day"
    write_sums(str(path), DaySums(DAY, ["01" * 16], {"later": (8, 9)}))
    one, other = Proxy(clocks, 1, path), Proxy(clocks, 2)
    link(one, other)
    other.memory.assign(["t", "later"])
    other.memory.rows()["later"].add_to_day(DAY, 1, 1)
    for proxy in (one, other):
        proxy.keeper.tick()
    row = one.memory.assign(["t", "later"])["later"]
    one.keeper.tick()
    late = Account(quota_cells_at(one.memory.fd, 1), 1, row, 0)
    assert late.of_day(quota.DAY_TOKENS, DAY) == 8


def test_a_daily_limit_that_nothing_keeps_is_warned_of(
    clocks: Clocks, caplog: pytest.LogCaptureFixture
) -> None:
    Proxy(clocks, 1)
    assert "quota_path names a file that keeps it" in caplog.text


def test_more_tenants_with_limits_than_can_be_counted_are_refused() -> None:
    def config(count: int) -> ProxyConfig:
        tenants = [TenantConfig(name=str(n), requests_per_min=1) for n in range(count)]
        free = TenantConfig(name="free")
        return ProxyConfig(
            worker_urls=("http://127.0.0.1:1",), access=AccessConfig(tenants=(*tenants, free))
        )

    check_source(config(quota.ROWS_MAX))
    with pytest.raises(StartError, match="at most 4096 of them may have limits"):
        check_source(config(quota.ROWS_MAX + 1))
