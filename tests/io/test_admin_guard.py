"""Who may ask the admin listener, and what a web page cannot have a browser ask."""

from __future__ import annotations

import gzip
import socket
from pathlib import Path

import pytest

from proxy.io.admin_guard import Guard, is_local
from proxy.io.dashboard import Dashboard
from tests.fakes.admin import Standing, admin, error_of
from tests.fakes.talk import ask

LOCAL = "host: localhost"
DRAIN = "/replicas/a/drain"
AWAY = "host: proxy.example"
KEY = "authorization: Bearer s3cret"
READ = ("/view", "/view/watch", "/replicas", "/metrics")


@pytest.mark.parametrize(
    "fields",
    [
        (LOCAL, "origin: http://evil.example"),
        (LOCAL, "origin: null"),
        (LOCAL, "origin: http://localhost:3000"),
        (LOCAL, "origin: http://["),
        (LOCAL, "origin:"),
        (LOCAL, "sec-fetch-site: cross-site"),
        (LOCAL, "sec-fetch-site: same-site"),
        ("host: evil.example",),  # its name points to 127.0.0.1 now
        ("host: evil.example", "origin: http://evil.example", "sec-fetch-site: same-origin"),
        ("host: 127.0.0.1.evil.example",),
        ("host: localhost.evil.example",),
        ("host: evil.example@localhost",),
        ("host: 10.0.0.1:8001",),
        ("host: [::2]:8001",),
    ],
)
async def test_another_page_cannot_have_a_browser_drain(fields: tuple[str, ...]) -> None:
    async with admin(Standing("a")) as listener:
        for path in (DRAIN, "/debug/route"):
            answer = await listener.post(path, *fields)
            assert answer.status == 403, path
            assert error_of(answer)["type"] == "permission_error"
        assert not listener.standing.held()


async def test_a_page_of_another_site_cannot_take_the_places_of_those_who_watch() -> None:
    async with admin(Standing("a")) as listener:
        for path in READ:
            for fields in (
                ("sec-fetch-site: cross-site", "sec-fetch-mode: no-cors", "sec-fetch-dest: image"),
                ("sec-fetch-site: same-site", "sec-fetch-mode: navigate", "sec-fetch-dest: iframe"),
                ("sec-fetch-site: cross-site",),
                ("origin: http://localhost:3000", "sec-fetch-site: same-site"),
            ):
                answer = await listener.get(path, LOCAL, *fields)
                assert (answer.status, error_of(answer)["code"]) == (403, "cross_site")
        link = (
            "sec-fetch-site: cross-site",
            "sec-fetch-mode: navigate",
            "sec-fetch-dest: document",
        )
        assert (await listener.get("/metrics", LOCAL, *link)).status == 200
        assert (await listener.get("/view", LOCAL, "sec-fetch-site: same-origin")).status == 200
        assert listener.viewing.watchers == 0


async def test_a_body_that_is_not_packed_as_it_says_is_the_askers_fault() -> None:
    async with admin(Standing("a")) as listener:
        head = "POST /debug/route HTTP/1.1\r\nhost: localhost\r\ncontent-encoding: gzip\r\n"
        answer = await ask(listener.port, f"{head}content-length: 5\r\n\r\nhello".encode())
        assert (answer.status, error_of(answer)["code"]) == (400, "bad_encoding")
        bomb = gzip.compress(bytes(256 * 1024 * 1024), 9)
        head += f"content-length: {len(bomb)}\r\n\r\n"
        assert (await ask(listener.port, head.encode() + bomb)).status == 413


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8001", "127.0.0.1:8001", "127.9.9.9", "[::1]:8001", "LOCALHOST.",
     "a.localhost:1"],
)  # fmt: skip
async def test_our_own_page_can(host: str) -> None:
    async with admin(Standing("a")) as listener:
        fields = (f"host: {host}", f"origin: http://{host}", "sec-fetch-site: same-origin")
        assert (await listener.post(DRAIN, *fields)).status == 200
        assert (await listener.post("/debug/route", *fields)).status == 200


async def test_a_rebound_name_reads_nothing_and_whoever_probes_may_call_it_what_he_likes() -> None:
    async with admin(Standing("a")) as listener:
        for path in READ:
            answer = await listener.get(path, "host: evil.example")
            assert (answer.status, error_of(answer)["code"]) == (403, "host_not_allowed")
            assert "admin_api_key" in error_of(answer)["message"]
        for path in ("/livez", "/readyz", "/health"):
            assert (await listener.get(path, "host: evil.example")).status == 200


async def test_with_a_key_the_key_counts_wherever_one_asks_from() -> None:
    for local in (True, False):
        async with admin(Standing("a"), key="s3cret", local=local) as listener:
            for fields in (
                (AWAY,),
                (LOCAL,),
                (AWAY, KEY[:-1]),
                (AWAY, KEY + "t"),
                (AWAY, "authorization: s3cre"),
            ):
                answer = await listener.post(DRAIN, *fields)
                assert (answer.status, error_of(answer)["code"]) == (401, "invalid_api_key")
                for path in READ:
                    assert (await listener.get(path, *fields)).status == 401
            assert (await listener.post(DRAIN, AWAY, KEY, "origin: http://a.example")).status == 403
            for scheme in ("Bearer", "bearer", "BEARER"):
                key = f"authorization: {scheme} s3cret"
                assert (await listener.post(DRAIN, AWAY, key)).status == 200
            assert (await listener.get("/view", AWAY, KEY)).status == 200
            assert (await listener.get("/", AWAY)).status != 401  # the page asks for the key


async def test_without_a_key_nobody_on_a_network_may_drain() -> None:
    async with admin(Standing("a"), local=False) as listener:
        answer = await listener.post(DRAIN)
        assert (answer.status, error_of(answer)["code"]) == (403, "admin_key_required")
        assert error_of(answer)["message"] == Guard(None, local=False).can_drain
        assert (await listener.post("/debug/route", AWAY)).status == 200  # changes nothing
        for path in ("/view", "/replicas"):
            assert (await listener.get(path, AWAY)).status == 200


def test_what_is_local_is_what_nobody_else_reaches() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as near,
        socket.create_server(("", 0)) as far,
        socket.socket(socket.AF_UNIX) as file,
    ):
        assert is_local([near])
        assert is_local([near, file])
        assert not is_local([near, far])


async def test_answers_tell_browsers_what_to_keep_to() -> None:
    async with admin(Standing("a")) as listener:
        for path in ("/view", "/livez", "/nothing"):
            fields = (await listener.get(path)).fields
            assert fields["x-content-type-options"] == "nosniff"
            assert fields["x-frame-options"] == "DENY"
            assert "default-src 'self'" in fields["content-security-policy"]
            assert "frame-ancestors 'none'" in fields["content-security-policy"]
            assert "unsafe" not in fields["content-security-policy"]
        assert (await listener.get("/view")).fields["cache-control"] == "no-store"
        assert error_of(await listener.get("/nothing"))


# --- the files of the page -----------------------------------------------------------------------


async def test_files_of_the_page_are_served_by_name_and_no_others(tmp_path: Path) -> None:
    files = {
        "index.html": b"<!doctype html>",
        "app.js": b"1;",
        "style.css": b"a{}",
        "x.svg": b"<svg/>",
    }
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    (tmp_path / "notes.txt").write_bytes(b"secret")
    (tmp_path / "below").mkdir()
    async with admin(Standing("a"), key="s3cret", dashboard=Dashboard(tmp_path)) as listener:
        for path, name, kind in (
            ("/", "index.html", "text/html"),
            ("/app.js", "app.js", "text/javascript"),
            ("/style.css", "style.css", "text/css"),
            ("/x.svg", "x.svg", "image/svg+xml"),
        ):
            got = await listener.get(path, AWAY)
            assert (got.status, got.body) == (200, files[name])
            assert got.fields["content-type"] == f"{kind}; charset=utf-8"
            tag = got.fields["etag"]
            again = await listener.get(path, AWAY, f'if-none-match: "x", {tag}')
            assert (again.status, again.body, again.fields["etag"]) == (304, b"", tag)
            other = await listener.get(path, AWAY, 'if-none-match: "x"')
            assert other.body == files[name]
        for path in (
            "/notes.txt",
            "/below",
            "/../app.js",
            "/%2e%2e/app.js",
            "/app.js/",
            "//app.js",
        ):
            assert (await listener.get(path, AWAY)).status in (401, 404), path


async def test_an_installation_without_the_page_says_so(tmp_path: Path) -> None:
    async with admin(Standing("a"), dashboard=Dashboard(tmp_path / "none")) as listener:
        answer = await listener.get("/")
        assert answer.status == 404
        assert "install doherty" in error_of(answer)["message"]
