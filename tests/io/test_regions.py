"""Links between regions: only with whom is configured, only summaries, and left when these age."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Self

import pytest

from proxy.config import ProxyConfig
from proxy.config_access import AccessConfig, RemoteRegionConfig
from proxy.contract.regions import (
    ModelSummary,
    RegionSummary,
    RemoteState,
    encode_summary,
)
from proxy.core import claim_limits, limits, peer_wire
from proxy.io import control, regions
from proxy.io.hub import Hub
from proxy.io.peer_link import LinkLostError, PeerLink, connect
from proxy.io.peers import Peers
from proxy.io.regions import Regions
from proxy.io.tasks import Tasks
from tests.fakes.engine import free_port
from tests.fakes.hub import WORKERS, FakeWorker, value
from tests.fakes.plane import until
from tests.io.test_peers import Cable


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEER_PAUSE_FIRST_S", 0.005)
    monkeypatch.setattr(claim_limits, "REGION_PAUSE_MAX_S", 0.02)
    monkeypatch.setattr(claim_limits, "REGION_DIAL_TIMEOUT_S", 0.5)
    monkeypatch.setattr(regions, "SUMMARY_INTERVAL_S", 0.02)
    monkeypatch.setattr(regions, "SUMMARY_AGE_S_MAX", 0.15)
    monkeypatch.setattr(regions, "GIVEN_UP_S", 0.3)


def remotes(**peers: str) -> AccessConfig:
    """Name proxies of other regions, by region, with where they listen for peers."""
    return AccessConfig(
        remote_regions=tuple(
            RemoteRegionConfig(region=region, url=f"http://127.0.0.1:{8000 + number}", peer=peer)
            for number, (region, peer) in enumerate(peers.items())
        )
    )


class Proxy:
    """The supervisor of one proxy, as far as regions are concerned."""

    def __init__(self, region: str, **config: Any) -> None:
        self.config = ProxyConfig(region=region, **config)
        self.tasks = Tasks()
        self.hub = Hub(WORKERS)
        self.worker = FakeWorker(self.hub)
        self.told: list[control.RemotesAre] = []
        self.models = {"m": ModelSummary(awake=1, free=3)}
        self.regions = Regions(self._hear, lambda: self.models)
        self.peers = Peers(self.tasks, self.hub, self.regions)

    def _hear(self, message: control.Message) -> None:
        assert isinstance(message, control.RemotesAre)
        self.told.append(message)

    async def __aenter__(self) -> Self:
        self.peers.start(self.config, listen=True)
        self.tasks.start("regions", self.regions.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.tasks.close()
        assert not self.peers.links()
        assert not self.regions._links

    @property
    def remotes(self) -> list[RemoteState]:
        return self.told[-1].remotes if self.told else []

    @property
    def linked(self) -> list[str]:
        return [remote.name for remote in self.remotes if remote.linked]

    def failures(self, reason: str) -> float:
        return value(self.peers.samples(), "peer_failures_total", reason)


@contextlib.asynccontextmanager
async def two(key: str | None = "secret") -> AsyncIterator[tuple[Proxy, Proxy]]:
    """Two proxies, of eu and us, each configured with the other."""
    eu_at, us_at = [f"127.0.0.1:{await free_port()}" for _ in range(2)]
    async with (
        Proxy("eu", peer_listen=eu_at, peer_key=key, access=remotes(us=us_at)) as eu,
        Proxy("us", peer_listen=us_at, peer_key=key, access=remotes(eu=eu_at)) as us,
    ):
        yield eu, us


async def test_two_who_name_each_other_share_one_link_and_tell_summaries() -> None:
    async with two() as (eu, us):
        await until(lambda: eu.linked == ["us#0"] and us.linked == ["eu#0"])
        assert len(eu.peers.links(abroad=True)) == len(us.peers.links(abroad=True)) == 1
        (remote,) = eu.remotes
        assert (remote.region, remote.url) == ("us", "http://127.0.0.1:8000")
        assert remote.proxy_id == us.told[-1].ours != eu.told[-1].ours
        assert remote.summary is not None
        assert remote.summary.models == us.models
        await until(lambda: 0.0 < eu.remotes[0].round_trip_s < 1.0)
        assert eu.regions.serve
        us.models = {"m": ModelSummary()}
        await until(lambda: not eu.regions.serve)
        us.models = {"m": ModelSummary(awake=2, queued=7)}
        await until(lambda: eu.remotes[0].summary.models["m"].queued == 7)  # type: ignore[union-attr]
        us.regions.draining = True
        us.regions.say_now()
        await until(lambda: eu.remotes[0].summary.draining)  # type: ignore[union-attr]
        assert not eu.regions.serve
        assert [(s.name, s.value) for s in eu.regions.samples() if "linked" in s.name] == [
            ("remote_linked", 1.0)
        ]


async def test_what_is_too_much_to_tell_is_told_in_part() -> None:
    async with two() as (eu, us):
        us.models = {f"{number:0128}": ModelSummary(start_s=1.5) for number in range(10_000)}
        await until(lambda: bool(eu.linked) and len(eu.remotes[0].summary.models) > 1)  # type: ignore[union-attr]
        assert eu.remotes[0].summary.models.items() <= us.models.items()  # type: ignore[union-attr]
        assert not eu.failures("broken")


async def test_notes_do_not_cross_and_whoever_sends_them_is_cut_off() -> None:
    async with two() as (eu, us):
        await until(lambda: bool(eu.linked and us.linked))
        us.worker.note(b"who is cached where")
        await asyncio.sleep(0.05)
        assert eu.worker.batches() == []
        assert eu.worker.channel.heard(control.Listen)[-1] == control.Listen(
            on=False, origin=eu.worker.origin
        )
        (link,) = us.peers.links(abroad=True)
        link.send(peer_wire.write_notes(1, 0.0, b"notes"))
        await until(lambda: eu.failures("broken") == 1)
        await until(lambda: bool(eu.linked and us.linked))


@pytest.mark.parametrize(
    "octets",
    [b"", b"no summary", encode_summary(RegionSummary(region="ap", sequence=1))],
)
async def test_a_summary_that_is_none_ends_the_link(octets: bytes) -> None:
    async with two() as (eu, us):
        await until(lambda: bool(eu.linked and us.linked))
        (link,) = us.peers.links(abroad=True)
        link.send(peer_wire.write_message(peer_wire.SUMMARY, octets))
        await until(lambda: eu.failures("broken") == 1)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ({"peer_key": "other"}, "does not have our peer_key"),
        ({}, "one of us has a peer_key"),
        ({"peer_key": "secret", "region": "ap"}, "its region is 'ap', ours is 'eu'"),
    ],
)
async def test_who_is_not_configured_or_has_no_key_is_refused(
    theirs: dict[str, str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    eu_at, us_at = [f"127.0.0.1:{await free_port()}" for _ in range(2)]
    theirs = {"region": "us", **theirs}
    async with (
        Proxy("eu", peer_listen=eu_at, peer_key="secret", access=remotes(us=us_at)) as eu,
        Proxy(access=remotes(eu=eu_at), **theirs) as us,
    ):
        await until(lambda: eu.failures("refused") > 1)
        await until(lambda: reason in caplog.text)
        assert not eu.linked
        assert not us.linked


async def test_one_of_another_region_than_was_said_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    places = [f"127.0.0.1:{await free_port()}" for _ in range(2)]
    async with (
        Proxy("ap", peer_listen=places[0], access=remotes(us=places[1])),
        Proxy("us", access=remotes(ap=places[1], eu=places[0])) as us,
    ):
        await until(lambda: "its region is 'ap', and 'eu' was said" in caplog.text)
        assert not us.linked


async def test_a_region_that_is_cut_off_is_left_when_its_summary_is_old_and_comes_back() -> None:
    eu_at, us_at = [f"127.0.0.1:{await free_port()}" for _ in range(2)]
    async with Cable(int(us_at.rpartition(":")[2])) as cable:
        through = f"127.0.0.1:{cable.port}"
        async with (
            Proxy("eu", access=remotes(us=through)) as eu,
            Proxy("us", peer_listen=us_at, access=remotes(eu=eu_at)) as us,
        ):
            await until(lambda: eu.linked == ["us#0"])
            before = eu.remotes[0]
            cable.whole.clear()
            await until(lambda: eu.linked == [])
            assert eu.remotes[0].since_s == 0.0
            await until(lambda: not eu.peers.links() and not us.peers.links())
            cable.whole.set()
            await until(lambda: eu.linked == ["us#0"])
            assert eu.remotes[0].since_s > before.since_s


async def test_a_proxy_that_hands_over_lets_go_of_other_regions() -> None:
    async with two() as (eu, us):
        await until(lambda: bool(eu.linked and us.linked))
        us.peers.stop_listening()
        await until(lambda: eu.linked == [] and us.linked == [])
        async with Proxy("us", **_settings(us)) as successor:
            await until(lambda: eu.linked == ["us#0"] and successor.linked == ["eu#0"])
            assert eu.remotes[0].proxy_id == successor.told[-1].ours


async def test_who_was_greeting_while_a_proxy_handed_over_is_let_go_as_well() -> None:
    """With the link to the one that leaves, a region would not find the successor."""
    us_at = f"127.0.0.1:{await free_port()}"
    access = remotes(eu="127.0.0.1:1")
    async with Proxy("us", peer_listen=us_at, peer_key="secret", access=access) as us:
        with contextlib.closing(await _connected(us_at)) as link:
            await until(lambda: bool(us.peers._greeting))
            us.peers.stop_listening()
            await link.shake_hands(
                region="eu", proxy_id=bytes(16), key="secret", dialled=True, others=["us"]
            )
            with pytest.raises(LinkLostError):
                await link.receive()
            assert us.peers.links() == []
            assert us.failures("lost") == 1


async def _connected(address: str) -> PeerLink:
    while True:
        with contextlib.suppress(ConnectionRefusedError):  # it does not listen yet
            return await connect(address, 5.0)
        await asyncio.sleep(0)


def _settings(proxy: Proxy) -> dict[str, Any]:
    config = proxy.config
    return {
        "peer_listen": config.peer_listen,
        "peer_key": config.peer_key,
        "access": config.access,
    }


async def test_remotes_come_and_go_with_the_configuration() -> None:
    async with two() as (eu, us):
        await until(lambda: bool(eu.linked and us.linked))
        eu.peers.reconfigure(ProxyConfig(region="eu", peer_key="secret"))
        await until(lambda: eu.remotes == [] and us.linked == [])
        eu.peers.reconfigure(eu.config)
        await until(lambda: bool(eu.linked and us.linked))
