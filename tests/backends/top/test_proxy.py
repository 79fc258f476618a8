"""`doherty top` on a real proxy: what it shows is there, what it asks for is done."""

from __future__ import annotations

import asyncio

import pytest

from backends.cli import main
from backends.top.app import Top
from tests.fakes.engine import ScriptedEngine
from tests.fakes.plane import chat_request
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import ask


async def test_a_replica_is_watched_drained_explained_and_brought_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--worker-urls", engine.url, "--admin-api-key", "k") as proxy,
    ):
        name = engine.url.removeprefix("http://")
        app = Top(f"http://127.0.0.1:{proxy.admin_port}", "k")
        async with app.run_test(size=(100, 30)) as pilot:

            async def until(words: str) -> None:
                while True:
                    strips = app.screen._compositor.render_strips()
                    if words in "\n".join(strip.text for strip in strips):
                        return
                    await asyncio.sleep(0.05)

            await until(name)
            assert (await ask(proxy.port, chat_request())).status == 200
            await pilot.press("e", "enter")
            await until(f"goes to {name}")
            await pilot.press("escape", "d")
            await until(f"Drain {name}?")
            await pilot.press("y")
            await until("1 held")
            assert (await ask(proxy.port, chat_request())).status == 503
            await pilot.press("u", "y")
            await until("1 ready")
            assert (await ask(proxy.port, chat_request())).status == 200
        url = f"http://127.0.0.1:{proxy.admin_port}"
        assert await asyncio.to_thread(main, ["top", "--once", "--url", url]) == 1
        assert "the admin key is wrong or missing" in capsys.readouterr().err
