"""Flags of other routers: those of the guide are taken, or refused with what to use instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from proxy import flags
from proxy.config import ALIASES, ConfigError, ProxyConfig
from proxy.config_reading import describe_fields
from proxy.dialect import REMARKS, remark

GUIDE = (Path(__file__).parents[2] / "deploy/guides/migrate.md").read_text(encoding="utf-8")
OURS = {"--" + name.replace("_", "-") for name, _, _ in describe_fields(ProxyConfig)}
# A value that each flag of the dialect takes, as launch scripts have them.
_VALUES = {
    "--worker-urls": ["http://10.0.0.1:30000", "http://[::1]:2"], "--policy": ["cache_aware"],
    "--disable-retries": [], "--health-check-endpoint": ["/health"], "--log-level": ["warn"],
    "--host": ["0.0.0.0"], "--api-key": ["key"], "--tls-cert-path": ["c.pem"],
    "--enable-trace": [], "--log-json": [], "--otlp-traces-endpoint": ["http://[::1]:4318"],
    "--tls-key-path": ["k.pem"], "--client-cert-path": ["c.pem"], "--client-key-path": ["k.pem"],
}  # fmt: skip


def _part(heading: str) -> str:
    return GUIDE.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]


def _theirs(part: str) -> list[str]:
    """Return the flags in the first cells of the tables."""
    cells = re.findall(r"^\| (.*?) \|", part, re.MULTILINE)
    return [flag for cell in cells for flag in re.findall(r"(?<![\w-])--[a-z0-9-]+", cell)]


TAKEN = [flag for flag in _theirs(_part("## Taken as they are")) if flag in OURS]
REFUSED = _theirs(_part("## Refused, with what to use"))


@pytest.mark.parametrize("flag", TAKEN)
def test_what_the_guide_says_is_taken_is_taken(flag: str) -> None:
    value = _VALUES.get(flag, ["7"])
    read = flags.read([flag, *value], {})
    name = flag[2:].replace("-", "_")
    assert getattr(read, name) != getattr(ProxyConfig(), name) or flag in {
        "--policy", "--health-check-endpoint"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--router-policy", "use --policy"),
        ("--router-max-payload-size=5", "use --max-payload-size"),
        ("--router-cache-threshold", "a replica's price"),
        ("--router-temperature", "a replica's price"),  # its own name, not a prefix
        ("--eviction-interval", "a replica's price"),
        ("--verbose", "use --log-level"),
    ],
)
def test_flags_of_a_launcher_and_of_older_releases(flag: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flags.read([flag, "cache_aware"], {})
    said = str(caught.value)
    assert said.startswith(f"{flag.partition('=')[0]} is another router's: {words}")


def test_no_other_flag_is_said_to_be_taken() -> None:
    assert len(TAKEN) > 15
    assert set(_theirs(_part("## Taken as they are"))) - set(TAKEN) == set()


@pytest.mark.parametrize("flag", REFUSED)
def test_what_the_guide_says_is_refused_is_refused_with_words(flag: str) -> None:
    assert flag not in OURS
    with pytest.raises(ConfigError) as caught:
        flags.read([flag, "value"], {})
    said = str(caught.value)
    assert said.startswith(f"{flag} is another router's: ")
    assert "\n" not in said
    for ours in re.findall(r"--[a-z-]+[a-z]", said.partition(": ")[2]):
        assert ours in OURS | {"--config", "--served-model-name"}, said


def test_the_policies_of_the_guide_are_those_that_are_understood() -> None:
    part = _part("## Taken as they are")
    rows = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \| `([a-z_]+)` \|", part, re.MULTILINE)
    told = {alias: policy for cell, policy in rows for alias in re.findall(r"`(\w+)`", cell)}
    assert told == ALIASES["policy"]


def test_every_remark_names_only_what_is_there() -> None:
    for pattern, words in REMARKS:
        for ours in re.findall(r"--[a-z-]+[a-z]", words):
            assert ours in OURS | {"--config", "--served-model-name"}, words
        for path in re.findall(r"[\w/]+\.(?:md|py)", words):
            assert (Path(__file__).parents[2] / path).is_file(), words
        assert not any(re.fullmatch(pattern, flag[2:]) for flag in OURS), pattern


@pytest.mark.parametrize("flag", ["--no-such-flag", "--worker"])
def test_what_nobody_has_is_an_error_of_the_command_line(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert remark("--no-such-flag") is None
    with pytest.raises(SystemExit) as ended:
        flags.read([flag], {})
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err


def test_a_command_line_of_another_router_is_mended_in_one_go() -> None:
    theirs = [
        "--cache-threshold",
        "0.5",
        "--balance-abs-threshold=32",
        "--prometheus-port",
        "29000",
    ]
    with pytest.raises(ConfigError) as caught:
        flags.read([*theirs, "--policy", "cache_aware"], {})
    of_cache, of_metrics = str(caught.value).split("; --prometheus-port is another router's: ")
    assert of_cache.startswith("--cache-threshold, --balance-abs-threshold are another router's: ")
    assert "--admin-port" in of_metrics


def test_a_value_by_an_equals_sign_is_no_part_of_the_name() -> None:
    with pytest.raises(
        ConfigError, match=r"^--prometheus-port is another router's: .*--admin-port"
    ):
        flags.read(["--prometheus-port=29000", "--port", "1"], {})
