"""What a worker lets a request have: of its fleet's models, of its pools' classes, of regions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.config_access import AccessConfig, ModelAccess
from proxy.core.asked import Asked
from proxy.core.classes import OFFLINE
from proxy.core.preamble import read_preamble
from proxy.core.principal import ANYBODY, Principal
from proxy.core.routes import find_route
from proxy.errors import InvalidRequestError, ModelNotFoundError
from tests.fakes.plane import Bench, records

MakeBench = Callable[..., Bench]
_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: p"


def _read(
    bench: Bench, model: str, principal: Principal = ANYBODY, body: str = "", field: str = ""
) -> Asked:
    preamble = read_preamble(_HEAD + (f"\r\n{field}".encode() if field else b""))
    whole = f'{{"model":"{model}","messages":[]{body}}}'.encode()
    route = find_route(b"POST", preamble.path)
    return bench.plane.read(route, preamble, whole, principal, 50.0)


async def test_a_model_that_a_key_may_not_ask_for_is_not_there_and_no_other_is_named(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(records("a", ["m", "secret"]))
    principal = Principal("acme", "k1")
    principal.models = frozenset(("m",))
    assert _read(bench, "m", principal).model == "m"
    for model in ("secret", "invented"):
        with pytest.raises(ModelNotFoundError) as raised:
            _read(bench, model, principal)
        assert raised.value.message == f"the model '{model}' is not served here; served: m"
    with pytest.raises(ModelNotFoundError):
        _read(bench, "m", principal, body=',"lora_path":"theirs"')
    assert _read(bench, "secret").model == "secret"


async def test_where_it_may_be_computed_is_the_keys_and_the_models(make_bench: MakeBench) -> None:
    access = AccessConfig(models={"m": ModelAccess(regions=("eu", "us")), "free": ModelAccess()})
    bench = make_bench(records("a", ["m", "free"]), access=access)
    principal = Principal("acme", "k1")
    principal.regions = frozenset(("eu",))
    assert _read(bench, "m").request.regions == {"eu", "us"}
    assert _read(bench, "m", principal).request.regions == {"eu"}
    assert _read(bench, "free", principal).request.regions == {"eu"}
    assert _read(bench, "free").request.regions is None


@pytest.mark.parametrize(
    ("stream", "pause_s", "listens_until_s"),
    [("true", 3.0, 0.0), ("false", 3.0, 57.0), ("true", 0.0, 57.0), ("true", 10.0, 57.0)],
)
async def test_whom_comments_keep_alive_is_listening(
    make_bench: MakeBench, stream: str, pause_s: float, listens_until_s: float
) -> None:
    bench = make_bench(records("a", ["m"]), keepalive_comment_secs=pause_s)
    asked = _read(bench, "m", body=f',"stream":{stream}', field="x-stainless-read-timeout: 7")
    assert asked.request.listens_until_s == listens_until_s


async def test_head_and_key_say_class_and_deadline(make_bench: MakeBench) -> None:
    bench = make_bench(records("a", ["m"]))
    assert _read(bench, "m", field="x-slo-ttft-ms: 200").request.deadline_s == 50.2
    principal = Principal("acme", "k1")
    principal.classes = 1 << OFFLINE
    request = _read(bench, "m", principal, body=',"service_tier":"priority"').request
    assert (request.work_class, request.tenant) == (OFFLINE, "acme")
    with pytest.raises(InvalidRequestError) as raised:
        _read(bench, "m", field="x-slo-ttft-ms: soon")
    assert raised.value.param == "x-slo-ttft-ms"
