"""A request crosses once, as it came; it is not lost with a region, nor believed of anybody."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from proxy.core import claim_limits, limits
from proxy.core.classes import SEMI_ONLINE
from proxy.core.policy import Request
from proxy.core.preamble import read_preamble
from proxy.errors import HopRefusedError
from proxy.io import regions as regions_module
from proxy.io.access_log import AccessLog
from tests.fakes.certificates import Authority
from tests.fakes.engine import Connection, Received, ScriptedEngine, answer_json, streaming
from tests.fakes.plane import CHAT_BODY, chat_request, until
from tests.fakes.regions import InRegion, Wire, joined
from tests.fakes.talk import Talk, ask

KEY = "the key of all regions"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEER_PAUSE_FIRST_S", 0.005)
    monkeypatch.setattr(claim_limits, "REGION_PAUSE_MAX_S", 0.02)
    monkeypatch.setattr(regions_module, "SUMMARY_INTERVAL_S", 0.02)


async def test_a_request_crosses_as_it_came_and_says_where_it_was_computed() -> None:
    engine = ScriptedEngine()
    async with engine:
        us = InRegion("us", [engine.record("a")], peer_key=KEY, api_key="key-of-us")
        eu = InRegion("eu", [], peer_key=KEY, api_key="key-of-eu")
        async with joined(eu, us):
            fields = ["authorization: Bearer key-of-eu", "x-request-id: mine", "x-session-id: s"]
            answered = await ask(eu.port, chat_request(fields=fields))
            assert answered.status == 200, answered.body
            assert answered.fields["x-doherty-region"] == "us"
            assert answered.fields["x-request-id"] == "mine"
            (request,) = engine.requests
            assert request.body == CHAT_BODY
            assert request.fields["x-session-id"] == "s"
            assert request.fields["x-request-id"] == "mine"
            assert request.fields["via"] == "1.1 doherty-eu"
            assert request.fields["authorization"] == "Bearer key-of-us"
            assert "key-of-eu" not in request.head.decode()
            assert "x-doherty-hop" not in request.fields
            assert us.plane.hops.arrived == {"eu": 1}
            assert eu.plane.hops.outcomes == {("us#0", "answered"): 1}
            refused = await ask(eu.port, chat_request())
            assert refused.status == 401


async def test_a_stream_crosses_whole_and_a_client_that_goes_ends_the_work_there() -> None:
    stays = asyncio.Event()

    async def hold(_: Connection) -> None:
        await stays.wait()

    async with ScriptedEngine(streaming(b"data: 1\n\n", b"data: [DONE]\n\n")) as engine:
        us, eu = InRegion("us", [engine.record("a")], peer_key=KEY), InRegion("eu", peer_key=KEY)
        async with joined(eu, us):
            body = CHAT_BODY[:-1] + b',"stream":true}'
            whole = await ask(eu.port, chat_request(body))
            assert whole.complete
            assert whole.body == b"data: 1\n\ndata: [DONE]\n\n"
            engine.script = streaming(b"data: 1\n\n", then=hold)
            async with Talk(eu.port) as talk:
                await talk.send(chat_request(body))
                await talk.read_until(b"data: 1")
                assert engine.connections_open
            await until(lambda: not us.plane.leases and not us.plane.upstreams.open_count)
            stays.set()


async def test_two_regions_that_both_have_nothing_do_not_send_in_circles() -> None:
    async with ScriptedEngine() as engine:
        record = engine.record("a")
    us = InRegion("us", [record], peer_key=KEY)
    eu = InRegion("eu", [record], peer_key=KEY)
    async with joined(eu, us):
        answered = await ask(eu.port, chat_request())
        assert answered.status in (502, 503)
        assert sum(us.plane.hops.arrived.values()) <= claim_limits.HOPS_TRIED_MAX
        assert not eu.plane.hops.arrived


async def test_what_has_been_here_before_is_a_loop() -> None:
    async with ScriptedEngine() as engine:
        us, eu = InRegion("us", [engine.record("a")], peer_key=KEY), InRegion("eu", peer_key=KEY)
        async with joined(eu, us):
            for port, fields in (
                (us.port, ["via: 1.1 doherty-us"]),
                (eu.port, ["via: 1.1 doherty-us", "via: 1.1 nginx, 1.1 doherty-eu"]),
            ):
                answered = await ask(port, chat_request(fields=fields))
                assert answered.status == 403
                assert b'"hop_refused"' in answered.body
            elsewhere = await ask(us.port, chat_request(fields=["via: 1.1 doherty-ap"]))
            assert elsewhere.status == 200
            # A hop that comes back from there, though only us has the model.
            back = await ask(eu.port, chat_request(fields=["via: 1.1 doherty-us"]))
            assert back.status in (403, 502, 503)
            assert len(engine.requests) == 1


# --- from outside --------------------------------------------------------------------------------


def hop_of(octets: bytes) -> bytes:
    found = re.search(rb"x-doherty-hop: ([^\r]+)\r\n", octets)
    assert found
    return found[1]


async def test_forged_replayed_and_altered_hops_are_refused() -> None:
    async with ScriptedEngine() as engine:
        us, eu = InRegion("us", [engine.record("a")], peer_key=KEY), InRegion("eu", peer_key=KEY)
        async with joined(eu, us), Wire(us.port) as wire:
            eu.link([("us", wire.port, us.peer_port)])
            await until(
                lambda: eu.plane.remotes and eu.plane.remotes[0].url.endswith(f"{wire.port}")
            )
            await until(lambda: eu.linked)
            assert (await ask(eu.port, chat_request())).status == 200
            await until(lambda: any(b"x-doherty-hop" in octets for octets in wire.carried))
            sent = next(octets for octets in wire.carried if b"x-doherty-hop" in octets)
            assert len(engine.requests) == 1
            attacks = {
                "replayed": sent,
                "forged": sent.replace(b"/v1/chat/completions", b"/v1/chat/completions?a=b"),
                "malformed": sent.replace(b"x-doherty-hop: v1;", b"x-doherty-hop: v2;"),
                "loop": sent.replace(b"via: 1.1 doherty-eu", b"via: 1.1 doherty-us"),
                "twice": sent.replace(b"via:", b"x-doherty-hop: " + hop_of(sent) + b"\r\nvia:"),
                "other id": re.sub(rb"x-request-id: \S+", b"x-request-id: other", sent),
                "nonsense": chat_request(fields=["x-doherty-hop: let me in"]),
                "empty": chat_request(fields=["x-doherty-hop:"]),
            }
            for attack, octets in attacks.items():
                answered = await ask(us.port, octets)
                assert answered.status == 403, attack
                assert b'"hop_refused"' in answered.body, attack
                assert answered.fields["x-doherty-hop"] == "refused"
                assert hop_of(sent) not in answered.body
            there = await ask(eu.port, sent)  # and not at the proxy that has signed it, either
            assert there.status == 403
            assert len(engine.requests) == 1
            wire.change = lambda octets: octets.replace(b"hello", b"jello")  # on its way
            altered = await ask(eu.port, chat_request())
            assert altered.status in (502, 503)
            assert us.plane.hops.refused["altered"] == 2  # with the one of another id
            assert len(engine.requests) == 1
            refused = us.plane.hops.refused
            assert refused["replayed"] == 1
            assert refused["forged"] == 1
            assert refused["loop"] == 1
            assert sum(refused.values()) == len(attacks) + 1


async def test_no_hop_is_taken_where_no_region_is_known_or_on_other_paths() -> None:
    async with (
        ScriptedEngine() as engine,
        InRegion("us", [engine.record("a")], offline_url=engine.url) as alone,
    ):
        hop = ["x-doherty-hop: v1;AAAA;AAAA"]
        posted = chat_request(fields=hop)
        got = b"GET %b HTTP/1.1\r\nhost: x\r\n" + hop[0].encode() + b"\r\n\r\n"
        for method, octets in (
            ("POST", posted),
            ("GET", got % b"/v1/models"),
            ("GET", got % b"/health"),
            ("GET", got % b"/v1/files"),
        ):
            answered = await ask(alone.port, octets, method)
            assert (answered.status, b'"hop_refused"' in answered.body) == (403, True), octets
        assert not engine.requests


async def test_without_a_key_hops_are_taken_from_this_machine_only() -> None:
    async with ScriptedEngine() as engine:
        us, eu = InRegion("us", [engine.record("a")]), InRegion("eu")
        async with joined(eu, us), Wire(us.port) as wire:
            eu.link([("us", wire.port, us.peer_port)])
            await until(lambda: bool(eu.urls == [f"http://127.0.0.1:{wire.port}"] and eu.linked))
            assert (await ask(eu.port, chat_request())).status == 200
            sent = next(octets for octets in wire.carried if b"x-doherty-hop" in octets)
            preamble = read_preamble(sent.partition(b"\r\n\r\n")[0])
            for peer in ("192.0.2.7", "2001:db8::1", "", "nobody"):
                with pytest.raises(HopRefusedError, match="this machine"):
                    us.plane.hops.arrive(preamble, peer)
            with pytest.raises(HopRefusedError, match="taken before"):
                us.plane.hops.arrive(preamble, "::1")


# --- a region that is lost -----------------------------------------------------------------------


async def test_a_request_that_was_sent_away_is_chosen_for_anew() -> None:
    """The other region's proxy is full, and then this one has a replica again."""

    async def full(connection: Connection, _: Received) -> None:
        await connection.send(
            b"HTTP/1.1 429 Full\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
        )

    async with ScriptedEngine(full) as theirs, ScriptedEngine() as ours:
        us = InRegion("us", [theirs.record("a")], peer_key=KEY)
        eu = InRegion("eu", [ours.record("b")], peer_key=KEY)
        async with joined(eu, us):
            eu.plane.suspect("b", "a test says so")
            asked = asyncio.ensure_future(ask(eu.port, chat_request()))
            await until(lambda: bool(theirs.requests))
            eu.plane.clear("b")
            answered = await asked
            assert answered.status in (200, 502, 503)
            assert eu.plane.hops.outcomes["us#0", "taken_back"] >= 1


async def test_a_request_that_waits_in_a_region_that_is_lost_is_taken_back_and_ended_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regions_module, "SUMMARY_AGE_S_MAX", 0.2)
    stays = asyncio.Event()

    async def silent(_: Connection, __: Received) -> None:
        await stays.wait()

    async with ScriptedEngine(silent) as theirs, ScriptedEngine() as ours:
        us = InRegion("us", [theirs.record("a")], peer_key=KEY)
        eu = InRegion("eu", [ours.record("b")], peer_key=KEY)
        async with (
            joined(eu, us),
            Wire(us.port) as requests,
            Wire(us.peer_port) as to_us,
            Wire(eu.peer_port) as to_eu,
        ):
            wires = (requests, to_us, to_eu)
            eu.link([("us", requests.port, to_us.port)])
            us.link([("eu", eu.port, to_eu.port)])
            await until(lambda: bool(to_us.carried and to_eu.carried))
            await asyncio.sleep(0.1)  # the links of before are gone
            await until(lambda: bool(eu.linked and us.linked))
            eu.plane.suspect("b", "a test says so")
            asked = asyncio.ensure_future(ask(eu.port, chat_request()))
            await until(lambda: bool(theirs.requests))
            eu.plane.clear("b")
            for wire in wires:
                wire.whole.clear()
            answered = await asked
            assert answered.status == 200
            assert len(ours.requests) == 1
            assert eu.plane.hops.outcomes == {("us#0", "taken_back"): 1}
            # The other side has seen it, too.
            await until(lambda: not us.plane.leases and not us.plane.upstreams.open_count)
            stays.set()
            for wire in wires:
                wire.whole.set()
            await until(lambda: bool(eu.linked and us.linked))


async def test_what_may_not_be_computed_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The regions differ in what they think of a model; the stricter one has its way."""
    import msgspec

    from proxy.config_access import ModelAccess

    async with ScriptedEngine() as engine:
        us, eu = InRegion("us", [engine.record("a")], peer_key=KEY), InRegion("eu", peer_key=KEY)
        async with joined(eu, us):
            access = msgspec.structs.replace(
                us.plane.config.access, models={"m": ModelAccess(regions=("ap", "eu"))}
            )
            us.plane.reconfigure(msgspec.structs.replace(us.plane.config, access=access), us.log)
            answered = await ask(eu.port, chat_request())
            assert answered.status in (502, 503)
            assert us.plane.hops.refused["misdirected"] >= 1
            assert not engine.requests


# --- mutual TLS, what is stored, what is spare ----------------------------------------------------


@pytest.mark.parametrize("shown", [True, False])
async def test_between_regions_both_ends_of_tls_show_who_they_are(
    tmp_path: Path, *, shown: bool
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("proxy")
    tls = {
        "peer_key": KEY,
        "tls_cert_path": cert,
        "tls_key_path": key,
        "tls_client_auth": "optional",
        "tls_client_ca_path": authority.path,
        "ca_cert_path": authority.path,
    }
    mine = {"client_cert_path": cert, "client_key_path": key} if shown else {}
    async with ScriptedEngine() as engine:
        us = InRegion("us", [engine.record("a")], **{**tls, "tls_client_auth": "required"})
        eu = InRegion("eu", **tls, **mine)
        async with joined(eu, us):
            answered = await ask(eu.port, chat_request(), context=authority.client_context())
            assert (answered.status == 200) is shown
            assert len(engine.requests) == shown


async def test_a_stored_answer_is_looked_up_where_it_was_made() -> None:
    stored = b'{"id":"resp_1","object":"response","output":[]}'

    async def store(connection: Connection, _: Received) -> None:
        await answer_json(connection, stored)

    async with ScriptedEngine(store) as engine:
        us, eu = InRegion("us", [engine.record("a")], peer_key=KEY), InRegion("eu", peer_key=KEY)
        async with joined(eu, us):
            body = b'{"model":"m","input":"hello"}'
            created = chat_request(body).replace(b"/v1/chat/completions", b"/v1/responses")
            assert (await ask(eu.port, created)).body == stored
            get = b"GET /v1/responses/resp_1?stream=false HTTP/1.1\r\nhost: x\r\n\r\n"
            assert (await ask(eu.port, get, "GET")).body == stored
            assert [request.target for request in engine.requests] == [
                "/v1/responses",
                "/v1/responses/resp_1?stream=false",
            ]


async def test_the_lines_of_a_job_do_not_cross() -> None:
    async with ScriptedEngine() as engine:
        us, eu = InRegion("us", [engine.record("a")], peer_key=KEY), InRegion("eu", peer_key=KEY)
        async with joined(eu, us):
            answered = await ask(eu.port, chat_request(fields=["x-doherty-class: spare"]))
            assert answered.status in (429, 503)
            assert not engine.requests


async def test_the_class_crosses_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    async with ScriptedEngine() as engine:
        us, eu = InRegion("us", [engine.record("a")], peer_key=KEY), InRegion("eu", peer_key=KEY)
        books = tmp_path / "usage.jsonl"
        written = AccessLog(str(books))
        us.plane.metering.change_log(written)
        async with joined(eu, us):
            seen: list[tuple[int, bool]] = []
            before = us.plane.decide

            def decide(request: Request, *rest: Any, **more: Any) -> Any:
                seen.append((request.work_class, request.abroad))
                return before(request, *rest, **more)

            us.plane.decide = decide  # type: ignore[method-assign]
            answered = await ask(eu.port, chat_request(fields=["x-doherty-class: semi-online"]))
            assert answered.status == 200
            assert seen == [(SEMI_ONLINE, False)]
            assert "x-doherty-class" not in engine.requests[0].fields
        written.close()
    assert not books.read_text()
