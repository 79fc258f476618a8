"""`doherty check FILE --tenant …`: what holds, and what says so."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from backends.access_report import Question, effective_policy
from backends.cli import main
from proxy.config import ConfigError, parse_config
from proxy.config_policy import WORK_CLASSES, class_granted
from proxy.contract.keys import KeyRecord, KeySet
from proxy.core.claims import allowed_class
from proxy.core.principals import class_bits

TEXT = """\
region: eu
tenants:
  - {name: search, weight: 3, classes: [semi-online, offline], models: [demo, other],
     requests_per_min: 600, budget_per_day: 20, regions: [eu, us], slo_ttft_ms: 400}
  - {name: lab, cache_isolation: true}
remote_regions: [{region: us, url: "https://us.example", peer: "us.example:8004"}]
models:
  - {name: demo, pools: [{engine: simulator, class: online}], prompt_price: 0.3,
     completion_price: 1.2}
  - {name: other, regions: [eu], pools: [{engine: simulator}]}
"""
CONFIG = parse_config(TEXT, "f")
KEYS = KeySet(
    salt="drawn once, for a test",
    keys=(
        KeyRecord(key_id="k1", tenant="search", digest="1" * 64, name="web", models=("demo",)),
        KeyRecord(key_id="k2", tenant="search", digest="2" * 64, expires_at=5.0),
        KeyRecord(key_id="k3", tenant="search", digest="3" * 64, regions=("us",)),
    ),
)


def told(question: Question) -> dict[str, tuple[str, str]]:
    rows = effective_policy(CONFIG, KEYS, question, 10.0)
    return {row.what: (row.value, row.origin) for row in reversed(rows)}


def test_a_key_is_laid_over_its_tenant() -> None:
    found = told(Question(key_id="web", model="demo", work_class="online"))
    assert found["tenant"][0] == "search"
    assert found["key"] == ("k1 (web)", "in force")
    assert found["models"] == ("demo", "key's models")
    assert found["class"] == ("semi-online", "asked for online; the classes allow no more")
    assert found["regions"] == ("eu, us", "tenant or key; here is eu")
    assert found["requests/min"] == ("600", "tenant")
    assert found["budget/day"] == ("20.00", "tenant")
    assert found["share"][0] == "3 of 4: 75% if all want more"
    assert found["price"][0].startswith("0.3 prompt, 0.3 cached, 1.2 completion")
    assert "400 ms" in found["deadline"][0]


def test_what_is_refused_is_said_so() -> None:
    assert told(Question(key_id="k2"))["admitted"] == ("no: 401", "the key: expired")
    refused = told(Question(key_id="k1", model="other"))["admitted"]
    assert refused == ("no: 404, as if there were no other; only demo", "key's models")
    assert "sent there" in told(Question(key_id="k3", model="demo"))["regions"][0]
    assert told(Question(key_id="k3", model="other"))["regions"][0].startswith("none: 403")


def test_one_without_limits_has_none() -> None:
    found = told(Question(tenant="lab", model="demo"))
    assert found["limits"] == ("none", "")
    assert found["class"] == ("online", "says none: the pool's class")
    assert found["cache"][1] == "tenant's cache_isolation"
    assert found["regions"] == ("all", "")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Question(tenant="serch"), "tenant 'serch' is not configured; did you mean 'search'"),
        (Question(key_id="k9"), "key 'k9' is not in the key file; there are k1, k2, k3, web"),
        (Question(tenant="lab", key_id="k1"), "key 'k1' is of tenant 'search'"),
    ],
)
def test_unknown_names_are_told_with_the_nearest(question: Question, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        effective_policy(CONFIG, KEYS, question, 10.0)


def test_it_grants_the_class_that_a_proxy_grants() -> None:
    for bits in range(1, 8):
        names = [name for number, name in enumerate(WORK_CLASSES) if bits >> number & 1]
        assert class_bits(names) == bits
        for number, wanted in enumerate(WORK_CLASSES):
            assert class_granted(wanted, names) == WORK_CLASSES[allowed_class(number, bits)]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, keys = tmp_path / "f.yaml", tmp_path / "keys.json"
    config.write_text(TEXT, encoding="utf-8")
    keys.write_bytes(msgspec.json.encode(KEYS))
    keys.chmod(0o600)
    asked = ["check", str(config), "--key", "web", "--keys", str(keys), "--model", "demo"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "in force" in said
    assert "1" * 64 not in said
    assert main(["check", str(config), "--model", "demo"]) == 2
    assert "say --tenant NAME or --key ID" in capsys.readouterr().err
    assert main(["check", str(config), "--key", "web", "--keys", str(config)]) == 2
    assert main(["check", str(config), "--tenant", "lab", "--model", "dmo"]) == 0  # perhaps abroad
