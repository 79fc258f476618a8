"""Where engines run and how long their machine stays, as the configuration says it."""

from __future__ import annotations

import re

import pytest

from proxy.config import ConfigError, parse_config

DOCKER = """\
manager:
  provider: docker
  docker: {{images: {{{images}}}, mounts: [{mounts}], user: '{user}'}}
models:
  - name: m
    pools: [{{engine: vllm{image}}}]
"""


def docker_text(
    images: str = "vllm: 'v:1'", mounts: str = "/data:ro", user: str = "1000:1000", image: str = ""
) -> str:
    return DOCKER.format(images=images, mounts=mounts, user=user, image=image)


def test_a_pools_image_is_its_own_or_its_engines() -> None:
    config = parse_config(docker_text(), "f")
    assert config.image_of(config.models[0].pools[0]) == "v:1"
    config = parse_config(docker_text(image=", image: 'w:2'"), "f")
    assert config.image_of(config.models[0].pools[0]) == "w:2"


def test_without_docker_nobody_has_an_image() -> None:
    config = parse_config("models: [{name: m, pools: [{engine: vllm, image: x}]}]", "f")
    assert config.image_of(config.models[0].pools[0]) == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (docker_text(images=""), "manager.docker.images.vllm"),
        (docker_text(image=", snapshot: true"), "snapshot"),
        (docker_text(images="tgi: x"), "tgi"),
        (docker_text(mounts="data"), "mounts"),
        (docker_text(mounts="/a:b"), "mounts"),
        (docker_text(user="a b"), "user"),
        ("manager: {docker: {url: 'tcp://elsewhere:2375'}}", "url"),
        ("manager: {reclaim_notice: {kind: file}}", "source"),
        ("manager: {reclaim_notice: {kind: ovh}}", "kind"),
    ],
)
def test_what_containers_cannot_be_made_of_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_config(text, "f")


RAY = """\
manager: {{provider: ray, ray: {{{ray}}}}}
models: [{{name: m, pools: [{{engine: vllm{pool}}}]}}]
"""


@pytest.mark.parametrize(
    "address", ["local", "auto", "10.0.0.1:6379", "ray://head.ray.svc:10001"], ids=str
)
def test_a_ray_cluster_is_named_in_every_way_that_ray_has(address: str) -> None:
    config = parse_config(RAY.format(ray=f"address: '{address}'", pool=""), "f")
    assert config.manager.ray.address == address


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RAY.format(ray="address: head", pool=""), "address"),
        (RAY.format(ray="port_min: 3000, port_max: 2000", pool=""), "port_max 2000 is below"),
        (RAY.format(ray="port_min: 80", pool=""), "port_min"),
        (RAY.format(ray="auth: on", pool=""), "auth"),
        (RAY.format(ray="versions: {tgi: '1'}", pool=""), "tgi"),
        (RAY.format(ray="", pool=", snapshot: true"), "snapshot"),
        (RAY.format(ray="", pool=", resources: {GPU: 1}"), "GPU is said by gpus"),
        (RAY.format(ray="", pool=", resources: {CPU: 0}"), "> 0"),
        ("models: [{name: m, pools: [{engine: vllm, resources: {CPU: 1}}]}]", "provider: ray"),
        (RAY.format(ray="address: auto", pool=", serves: jobs"), "offline.work_url"),
        ("manager: {provider: ray, gpus: '0-3'}", "with provider ray say auto or none"),
    ],
)
def test_what_ray_cannot_start_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_config(text, "f")
