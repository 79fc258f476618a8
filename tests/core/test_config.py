"""The configuration: strict, explained by line, the same from file, environment and flags."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy import flags
from proxy.config import (
    ALIASES,
    EMBEDDED_DEFAULT,
    AutoscaleConfig,
    Config,
    ConfigError,
    ManagerConfig,
    PoolConfig,
    ProxyConfig,
    describe_fields,
    load_config,
    override,
    parse_config,
)
from proxy.contract import (
    SNAPSHOT_BYTES_MAX,
    FleetSnapshot,
    LoadSample,
    ReplicaRecord,
    ReplicaState,
    decode_snapshot,
    encode_snapshot,
)


def test_nothing_is_the_default() -> None:
    assert parse_config("", "f") == parse_config("# no more than this\n", "f") == Config()


def test_the_embedded_default_is_right() -> None:
    config = parse_config(EMBEDDED_DEFAULT, "f")
    assert [(m.name, p.engine, p.replicas) for m in config.models for p in m.pools] == [
        ("demo", "simulator", 2)
    ]


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "doherty.yaml"
    path.write_text(
        "region: eu-west\nproxy:\n  port: 9000\n  policy: cache_aware\n  worker_urls: [http://a:1]\n"
        "manager: {run_dir: /run/x}\nmodels:\n  - name: org/m\n    pools:\n"
        "      - {engine: vllm, name: p, replicas: 3, env: {A: b}, args: [--x, '1'],"
        " target_inputs: 4, max_inputs: 4}\n",
        encoding="utf-8",
    )
    config = load_config(str(path))
    assert (config.region, config.proxy.port, config.proxy.policy) == ("eu-west", 9000, "prefix")
    assert config.proxy.worker_urls == ("http://a:1",)
    assert config.manager == ManagerConfig(run_dir="/run/x")
    assert config.models[0].pools[0] == PoolConfig(
        engine="vllm", name="p", replicas=3, env={"A": "b"}, args=("--x", "1"),
        target_inputs=4, max_inputs=4,
    )  # fmt: skip


_POOL = "models:\n  - name: m\n    pools:\n      - engine: simulator\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prxy: {}", "f:1: unknown key 'prxy'; did you mean 'proxy'?"),
        ("proxy:\n  port: 1\n  prot: 2", "f:3: proxy: unknown key 'prot'; did you mean 'port'?"),
        (
            _POOL + "        evn: {}",
            "f:5: models[0].pools[0]: unknown key 'evn'; did you mean 'env'",
        ),
        (
            "zzz: 1",
            "f:1: unknown key 'zzz'; valid keys: version, region, proxy, manager, offline, models",
        ),
        ("proxy:\n  port: 70000", "f:2: proxy.port: Expected `int` <= 65535"),
        ("\nproxy: {port: '80'}", "f:2: proxy.port: Expected `int`, got `str`"),
        ("proxy: {api_key: ''}", "f:1: proxy.api_key: Expected `str` of length >= 1"),
        ("proxy:\n\n  policy: best", "f:3: proxy.policy: Invalid enum value 'best'"),
        (
            "manager: {provider: slurm}",
            "f:1: manager.provider: Invalid enum value 'slurm'; use one of process, docker",
        ),
        ("proxy: {policy: [a]}", "f:1: proxy.policy: Expected `str`, got `array`"),
        ("proxy: {connect_timeout_secs: .nan}", "f:1: proxy.connect_timeout_secs: Expected"),
        ("proxy:\n  worker_urls:\n  - 1", "f:3: proxy.worker_urls[0]: Expected `str`, got `int`"),
        ("proxy: []", "f:1: proxy: Expected `object`, got `array`"),
        ("region: a b", "f:1: region: Expected `str` matching regex"),
        (_POOL + "        env:\n          A: b\n          C: 1", "f:6: models[0].pools[0].env"),
        ("models:\n  - {name: m, pools: []}", "f:2: models[0].pools: Expected `array` of length"),
        (
            "models:\n  - pools: [{engine: vllm}]",
            "f:2: models[0]: Object missing required field `name`",
        ),
        ("- 1", "f:1: Expected `object`, got `array`"),
        ("1: 2", "f:1: Expected `str`"),
        ("a: [", "f:1: not valid YAML: did not find expected node content"),
        ("a: 1\n--- b", "f:2: not valid YAML: but found another document"),
        ("a: \x00", "f: not valid YAML: unacceptable character"),
        ("!!python/object:os.system {}", "f:1: not valid YAML: could not determine a constructor"),
        ("a: 2001-99-99", "f: a date, number or tag cannot be read (month must be"),
        ("a: !!int b", "f: a date, number or tag cannot be read"),
        ("a: !!int ", "f: a date, number or tag cannot be read"),
        ("a: !!bool b", "f: a date, number or tag cannot be read"),
        ("a: !!timestamp b", "f: a date, number or tag cannot be read"),
        ("&a [*a]", "f: nested too deeply, or an anchor holds itself"),
        ("[" * 3000, "f:1: not valid YAML: exceeded maximum nesting depth"),
        ("? [a]\n: b", "f:1: not valid YAML: found unhashable key"),
        ("proxy: {port: 1}\nproxy: {}", "f:2: 'proxy' is given twice"),
        ("proxy:\n  port: 1\n  port: 1", "f:3: 'port' is given twice"),
        ("models:\n- {name: m, name: n, pools: []}", "f:2: 'name' is given twice"),
        (
            "tenants: [{name: a, budget_per_day: 1.0e+300}]",
            "f:1: tenants[0].budget_per_day: Expected `float` <= 1000000000.0",
        ),
        (
            _POOL + "    prompt_price: 1.0e+300",
            "f:5: models[0].prompt_price: Expected `float` <= 1000000.0",
        ),
        (_POOL + _POOL[8:], "f:1: model 'm' is defined twice; give it several pools instead"),
        (
            _POOL + "        target_inputs: 5\n        max_inputs: 3",
            "f:4: models[0].pools[0]: target_inputs 5 is above max_inputs 3",
        ),
        (
            _POOL + "        target_tokens: 5\n        max_tokens: 3",
            "f:4: models[0].pools[0]: target_tokens 5 is above max_tokens 3",
        ),
        (
            _POOL + "        replicas: 2\n        autoscale: {max: 3}",
            "f:4: models[0].pools[0]: replicas and autoscale exclude each other",
        ),
        (
            _POOL + "        autoscale:\n          max: 2\n          min: 3",
            "f:6: models[0].pools[0].autoscale: max 2 is below min 3",
        ),
        (
            _POOL + "        autoscale: {max: 2, panic_window_secs: 90}",
            "f:5: models[0].pools[0].autoscale: panic_window_secs 90 is above stable_window_secs",
        ),
        (
            _POOL + "        autoscale: {max: 3}",
            "f:4: models[0].pools[0]: autoscale needs target_inputs: how many requests",
        ),
        (
            _POOL + "        autoscale: {min: 0}",
            "f:5: models[0].pools[0].autoscale: Object missing required field `max`",
        ),
        (
            _POOL + "        autoscale: {max: 2, rung: [cold]}",
            "f:5: models[0].pools[0].autoscale: unknown key 'rung'; did you mean 'rungs'?",
        ),
        (
            _POOL + "        autoscale: {max: 2, rungs: [awake]}",
            "f:5: models[0].pools[0].autoscale.rungs[0]: Invalid enum value 'awake'; use one of",
        ),
        (
            _POOL + "        clas: offline",
            "f:5: models[0].pools[0]: unknown key 'clas'; did you mean 'class'?",
        ),
        (
            _POOL + "        class: batch",
            "f:5: models[0].pools[0].class: Invalid enum value 'batch'; use one of online, semi-",
        ),
        (_POOL + "        gpus: -1", "f:5: models[0].pools[0].gpus: Expected `int` >= 0"),
        (
            _POOL + "        adapters: {m: /lora}",
            "f:2: models[0]: model 'm' has an adapter of the same name; clients could not ask",
        ),
        (_POOL + "        adapters: {a: ''}", "f:5: models[0].pools[0].adapters"),
        (
            "tenants: [{name: t, budget_per_day: .inf}]",
            "f:1: tenants[0].budget_per_day: Expected `float` <= 1000000000",
        ),
        (
            _POOL + "    prompt_price: .inf",
            "f:5: models[0].prompt_price: Expected `float` <= 1000000",
        ),
        ("manager: {gpus: 0-999999999}", "f:1: manager: gpus: '0-999999999' is none of"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "f")
    assert str(caught.value).startswith(message)


def test_a_scaled_pool_is_read_and_written() -> None:
    text = _POOL + (
        "        class: semi-online\n        snapshot: true\n        target_tokens: 4000\n"
        "        target_inputs: 8\n"
        "        autoscale: {min: 1, max: 8, buffer: 1, rungs: [asleep, cold]}\n"
    )
    config = parse_config(text, "f")
    pool = config.models[0].pools[0]
    assert pool.autoscale == AutoscaleConfig(min=1, max=8, buffer=1, rungs=("asleep", "cold"))
    assert (pool.replicas_fixed, pool.work_class, pool.snapshot) == (None, "semi-online", True)
    again = yaml.safe_dump(msgspec.to_builtins(config))
    assert parse_config(again, "f") == config


def test_a_pool_has_one_replica_unless_something_is_said() -> None:
    assert PoolConfig(engine="simulator").replicas_fixed == 1
    assert PoolConfig(engine="simulator", replicas=0).replicas_fixed == 0


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-file: cannot be read"):
        load_config(str(tmp_path / "no-such-file"))
    latin = tmp_path / "latin"
    latin.write_bytes(b"region: \xe9")
    with pytest.raises(ConfigError, match="latin: cannot be read"):
        load_config(str(latin))


_SCRAPS = st.sampled_from(
    ["proxy", "models", "port", ":", ": ", "\n", "\n  ", "- ", "[", "]", "{", "}", "&a ", "*a",
     "? ", "!!int ", "!!set ", "<<", "'", '"', "~", "1", "0x", "1:60", "2001-01-99", "|", "#",
     "name", ",", ".nan", "\t", "---", "%YAML 1.1", "é", "\x00", "simulator", "engine: "]
)  # fmt: skip


@given(st.lists(_SCRAPS | st.text(max_size=4), max_size=14).map("".join))
def test_any_text_is_read_or_explained(text: str) -> None:
    try:
        config = parse_config(text, "f")
    except ConfigError as error:
        said = str(error)
    else:
        said = "f:"
        assert isinstance(config, Config)
    assert said.startswith("f:")


# --- flags and environment ------------------------------------------------------------------


def test_without_flags_everything_is_the_default() -> None:
    assert flags.read([], {}) == ProxyConfig()


def test_flag_then_environment_then_file_then_default(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("proxy: {port: 1, workers: 2, log_level: error, host: a}", encoding="utf-8")
    environment = {"DOHERTY_PORT": "3", "DOHERTY_WORKERS": "4", "DOHERTY_CONFIG": str(path)}
    config = flags.read(["--port", "5"], environment)
    assert (config.port, config.workers, config.log_level) == (5, 4, "error")
    assert (config.host, config.policy) == ("a", "prefix")
    other = tmp_path / "g.yaml"
    other.write_text("proxy: {host: b}", encoding="utf-8")
    assert flags.read(["--config", str(other)], environment).host == "b"


# For each field a value that is not its default, as a flag and in the environment.
_OTHER_VALUES: dict[str, tuple[list[str], str, object]] = {
    "host": (["::1"], "::1", "::1"),
    "port": (["0"], "0", 0),
    "admin_host": (["0.0.0.0"], "0.0.0.0", "0.0.0.0"),
    "admin_port": (["9"], "9", 9),
    "workers": (["2"], "2", 2),
    "worker_urls": (["http://a", "http://b"], "http://a  http://b", ("http://a", "http://b")),
    "manager_url": (["http://m"], "http://m", "http://m"),
    "policy": (["power_of_two"], "power_of_two", "least_load"),
    "session_affinity": (["strict"], "strict", "strict"),
    "api_key": (["{k}%"], "{k}%", "{k}%"),
    "admin_api_key": (["null"], "null", "null"),
    "max_payload_size": (["1"], "1", 1),
    "max_concurrent_requests": (["1"], "1", 1),
    "scrape_interval_secs": (["0"], "0", 0.0),
    "connect_timeout_secs": (["0.5"], "0.5", 0.5),
    "request_timeout_secs": (["1"], "1", 1.0),
    "queue_size": (["0"], "0", 0),
    "queue_bytes": (["9"], "9", 9),
    "hold_timeout_secs": (["7.5"], "7.5", 7.5),
    "keepalive_comment_secs": (["2"], "2", 2.0),
    "offline_url": (["http://127.0.0.1:8003"], "http://127.0.0.1:8003", "http://127.0.0.1:8003"),
    "queue_timeout_secs": (["5"], "5", 5.0),
    "retry_max_retries": (["0"], "0", 0),
    "disable_retries": ([], "true", True),
    "health_check_endpoint": (["/"], "/", "/"),
    "health_check_interval_secs": (["0.05"], "0.05", 0.05),
    "health_check_timeout_secs": (["7"], "7", 7.0),
    "kv_events": (["off"], "off", "off"),
    "kv_events_port": (["5557"], "5557", 5557),
    "kv_events_replay_port": (["5558"], "5558", 5558),
    "shutdown_grace_period_secs": (["0"], "0", 0.0),
    "drain_settle_secs": (["2"], "2", 2.0),
    "access_log": (["off"], "off", "off"),
    "access_log_ratio": (["0.1"], "0.1", 0.1),
    "log_level": (["debug"], "debug", "debug"),
    "log_json": ([], "1", True),
    "enable_trace": ([], "1", True),
    "otlp_traces_endpoint": (["http://c:4318"], "http://c:4318", "http://c:4318"),
    "trace_sample_ratio": (["0.5"], "0.5", 0.5),
    "trace_context": (["restart"], "restart", "restart"),
    "expose_routing": ([], "1", True),
    "tenant_isolation": ([], "1", True),
    "region": (["eu"], "eu", "eu"),
    "peer_listen": (["0.0.0.0:7000"], "0.0.0.0:7000", "0.0.0.0:7000"),
    "peers": (["a:1", "unix:b"], "a:1 unix:b", ("a:1", "unix:b")),
    "peer_key": (["k"], "k", "k"),
    "upgrade_socket": (["u"], "u", "u"),
    "upgrade_grace_period_secs": (["9"], "9", 9.0),
    "tls_cert_path": (["a.pem"], "a.pem", "a.pem"),
    "tls_key_path": (["b.pem"], "b.pem", "b.pem"),
    "tls_client_auth": (["required"], "required", "required"),
    "tls_client_ca_path": (["c.pem"], "c.pem", "c.pem"),
    "ca_cert_path": (["d.pem"], "d.pem", "d.pem"),
    "client_cert_path": (["e.pem"], "e.pem", "e.pem"),
    "client_key_path": (["f.pem"], "f.pem", "f.pem"),
    "verify_replica_tls": ([], "false", False),
    "keys_path": (["k.json"], "k.json", "k.json"),
    "internal_key": (["k"], "k", "k"),
    "usage_log": (["-"], "-", "-"),
    "quota_path": (["day.json"], "day.json", "day.json"),
}


@pytest.mark.parametrize("name", [name for name, _, _ in describe_fields(ProxyConfig)])
def test_every_field_has_its_flag_and_its_twin(name: str) -> None:
    words, text, value = _OTHER_VALUES[name]
    assert getattr(ProxyConfig(), name) != value
    flag = ("--no-" if value is False else "--") + name.replace("_", "-")
    assert getattr(flags.read([flag, *words], {}), name) == value
    assert getattr(flags.read([], {"DOHERTY_" + name.upper(): text}), name) == value


def test_the_region_is_the_files_unless_something_nearer_says_so(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("region: eu", encoding="utf-8")
    assert flags.read(["--config", str(file)], {}).region == "eu"
    assert flags.read(["--config", str(file)], {"DOHERTY_REGION": "us"}).region == "us"
    assert flags.read(["--config", str(file), "--region", "local"], {}).region == "local"
    file.write_text("region: eu\nproxy: {region: asia}", encoding="utf-8")
    assert flags.read(["--config", str(file)], {}).region == "asia"


def test_a_switch_can_be_turned_off_again() -> None:
    assert flags.read(["--no-disable-retries"], {"DOHERTY_DISABLE_RETRIES": "1"}) == ProxyConfig()


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        (["--port", "x"], {}, "--port: Expected `int`"),
        (["--port", "8.5"], {}, "--port: Expected `int`"),
        (["--port", "\u0661"], {}, "--port: Expected `int`"),
        (["--max-payload-size", "0"], {}, "--max-payload-size: Expected `int` >= 1"),
        (["--policy", "best"], {}, "--policy: Invalid enum value 'best'; use one of prefix, "),
        ([], {"DOHERTY_LOG_LEVEL": "x"}, "DOHERTY_LOG_LEVEL: Invalid enum value 'x'; use one of"),
        (["--connect-timeout-secs", "5s"], {}, "--connect-timeout-secs: Expected `float`"),
        (["--api-key", ""], {}, "--api-key: Expected `str` of length >= 1"),
        ([], {"DOHERTY_API_KEY": ""}, "DOHERTY_API_KEY: Expected `str` of length >= 1"),
        ([], {"DOHERTY_ADMIN_PORT": ""}, "DOHERTY_ADMIN_PORT: Expected `int`"),
        ([], {"DOHERTY_EXPOSE_ROUTING": "yes"}, "DOHERTY_EXPOSE_ROUTING: Expected `bool`"),
        ([], {"DOHERTY_CONFIG": "/no/such/file"}, "/no/such/file: cannot be read"),
        (["--config", "/no/such/file"], {}, "/no/such/file: cannot be read"),
    ],
)
def test_a_wrong_value_is_named_as_it_was_given(
    argv: list[str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        flags.read(argv, environment)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("argv", [["--prot", "1"], ["8000"], ["--port"]])
def test_an_unknown_flag_ends_the_program(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        flags.read(argv, {})
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        flags.read(["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, _, words in describe_fields(ProxyConfig):
        assert "--" + name.replace("_", "-") in text
        assert words
        assert words.split()[0] in text


@pytest.mark.parametrize("section", [ProxyConfig, ManagerConfig, PoolConfig])
def test_every_field_is_explained(section: type[ProxyConfig]) -> None:
    for name, _, words in describe_fields(section):
        assert words, name


def test_an_override_without_a_field_at_fault_is_still_explained() -> None:
    with pytest.raises(ConfigError, match="unknown"):
        override(ProxyConfig(), {"workrs": 1}, "--{flag}")


def test_aliases_are_understood_everywhere() -> None:
    for name, aliases in ALIASES.items():
        for alias, meant in aliases.items():
            told = parse_config(f"proxy: {{{name}: {alias}}}", "f").proxy
            assert getattr(told, name) == meant
            assert getattr(flags.read(["--" + name.replace("_", "-"), alias], {}), name) == meant
            assert getattr(flags.read([], {"DOHERTY_" + name.upper(): alias}), name) == meant


@pytest.mark.parametrize("text", ["", "version: 1", "version: 1\nregion: eu"])
def test_the_version_may_be_said(text: str) -> None:
    assert parse_config(text, "f").version == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("region: eu\nversion: 2\nmodles: []", "f:2: version: 2 is of a newer release"),
        ("version: 0", "f:1: version: Expected `int` >= 1"),
        ("version: '1'", "f:1: version: Expected `int`, got `str`"),
        ("version: true", "f:1: version: Expected `int`, got `bool`"),
    ],
)
def test_another_version_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "f")
    assert str(caught.value).startswith(said)


def test_what_is_said_at_the_top_is_refused_below_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"^f:2: proxy.access: say tenants, jwt"):
        parse_config("proxy:\n  access: {models: {m: {prompt_price: 1}}}", "f")


# --- the contract ---------------------------------------------------------------------------

_WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_RECORDS = st.builds(
    ReplicaRecord,
    replica_id=_WORDS,
    url=_WORDS,
    models=st.lists(_WORDS, max_size=2).map(tuple),
    state=st.sampled_from(ReplicaState),
    restarts=st.integers(0, 9),
    kv_events=_WORDS,
    kv_replay=_WORDS,
    kv_topic=_WORDS,
    engine_version=_WORDS,
    wake_s=st.floats(0, 1e9),
    load=st.none() | st.builds(LoadSample, at_s=st.floats(0, 1e9), kv_used_ratio=st.floats(0, 1)),
)


@given(st.lists(_RECORDS, max_size=3), st.integers(0, 1 << 50), _WORDS)
def test_a_snapshot_is_one_line_and_reads_as_it_was(
    records: list[ReplicaRecord], version: int, epoch: str
) -> None:
    snapshot = FleetSnapshot(epoch=epoch, version=version, replicas=tuple(records))
    line = encode_snapshot(snapshot)
    assert b"\n" not in line
    assert decode_snapshot(line) == snapshot


def test_what_an_earlier_manager_does_not_tell_is_not_known() -> None:
    line = b'{"epoch":"e","version":1,"replicas":[{"replica_id":"a","url":"u"}]}'
    (record,) = decode_snapshot(line).replicas
    assert (record.kv_events, record.kv_replay, record.kv_topic) == ("", "", "")
    assert (record.engine_version, record.sleep_s, record.wake_s) == ("", 0.0, 0.0)


def test_a_later_managers_fields_are_passed_over() -> None:
    line = b'{"epoch":"e","version":1,"new":2,"replicas":[{"replica_id":"a","url":"u","new":3}]}'
    assert decode_snapshot(line).replicas == (ReplicaRecord(replica_id="a", url="u"),)


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{}", b"[]", b'{"epoch":1,"version":1}', b'{"epoch":"e","version":"1"}',
        b'{"epoch":"e","version":1,"replicas":[{"url":"u"}]}',
        b'{"epoch":"e","version":1,"replicas":[{"replica_id":"a","url":"u","state":"fine"}]}',
        b" " * (SNAPSHOT_BYTES_MAX + 1),
    ],
)  # fmt: skip
def test_what_is_no_snapshot(line: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_snapshot(line)


def test_a_bare_off_is_the_word() -> None:
    text = "proxy: {access_log: off, kv_events: off, tls_client_auth: off}"
    proxy = parse_config(text, "f").proxy
    assert (proxy.access_log, proxy.kv_events, proxy.tls_client_auth) == ("off", "off", "off")


@pytest.mark.parametrize("key", ["", "a b", "a\tb", "k\u00e9y", "k\r\nx-evil: 1", "k" * 8193])
def test_a_key_that_no_head_could_carry_is_refused_unseen(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key: ") as refused:
        override(ProxyConfig(), {"api_key": key}, "--{flag}")
    assert not key or key not in str(refused.value)
