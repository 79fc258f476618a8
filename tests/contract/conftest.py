"""Two replicas in each engine's manners, an embedding engine, and a proxy before them all.

One proxy, three models: what a client asks for decides whose manners it meets.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.fakes.engines import Engines
from tests.fakes.programs import Endpoint, fetch, proxy_before, simulator_at, until

# A name with a slash, as hubs give them, must survive the client's escaping.
MODELS = {"vllm": "demo-vllm", "sglang": "org/demo-sglang", "embed": "demo-embed"}
KEY = "a-key-for-tests"
CLIENT_TIMEOUT_S = 60.0


class Site(msgspec.Struct, frozen=True):
    """A proxy and the engines behind it."""

    proxy: Endpoint
    engines: dict[str, Engines]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="session")
def site(folder: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        engines: dict[str, Engines] = {}
        for name, model in MODELS.items():
            task = ("--task=embed",) if name == "embed" else (f"--dialect={name}",)
            urls = [
                stack.enter_context(
                    simulator_at(folder / f"{name}-{number}.log", *task, model=model)
                )
                for number in range(1 if name == "embed" else 2)
            ]
            engines[name] = Engines("vllm" if name == "embed" else name, model, urls)
        urls = [url for group in engines.values() for url in group.urls]
        proxy = stack.enter_context(proxy_before(folder / "proxy.log", "--worker-urls", *urls))
        until_served(proxy, *MODELS.values())
        yield Site(proxy, engines)


def until_served(proxy: Endpoint, *models: str) -> None:
    """Wait until the proxy has read the engines' model lists."""

    def listed() -> bool:
        answer = fetch(proxy.base_url + "/models")
        return answer.status == 200 and {m["id"] for m in answer.value["data"]} >= set(models)

    until(listed, f"models {models}")


@pytest.fixture(scope="session", params=["vllm", "sglang"])
def engines(request: pytest.FixtureRequest, site: Site) -> Engines:
    """The engines of one dialect; a test that takes them runs once for each."""
    return site.engines[request.param]


@pytest.fixture(scope="session")
def client(site: Site) -> Iterator[OpenAI]:
    """The official client. It does not repeat by itself, so that a test sees the first answer."""
    with OpenAI(
        base_url=site.proxy.base_url, api_key=KEY, max_retries=0, timeout=CLIENT_TIMEOUT_S
    ) as made:
        yield made


@pytest.fixture
async def aclient(site: Site) -> AsyncIterator[AsyncOpenAI]:
    """The official client for asyncio, without repeats."""
    async with AsyncOpenAI(
        base_url=site.proxy.base_url, api_key=KEY, max_retries=0, timeout=CLIENT_TIMEOUT_S
    ) as made:
        yield made
