"""Arguments that an engine would not take are refused before it is started."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from backends.engines import ENGINES
from backends.engines.base import FlagError, Ports
from backends.engines.flags import FlagTable, check_flags, flag_table, parse_table
from backends.engines.release import UNKNOWN_RELEASE, Release, parse_release
from backends.spec import ReplicaSpec

ROOT = Path(__file__).parents[2]
BASE = ReplicaSpec(replica_id="m-0", model="m", pool="m", engine="vllm")
TABLE = parse_table(
    "vllm",
    """\
# made up
# 1.0.0 1.4.0
--always value 1.0.0 -
--came either 1.4.0 -
--went switch 1.0.0 1.0.0
-a value 1.0.0 - --always
--ask maybe 1.0.0 -
""",
)


def check(args: str, release: str, table: FlagTable = TABLE) -> tuple[str, ...]:
    return check_flags(table, args.split(), parse_release(release))


def told(args: str, release: str, table: FlagTable = TABLE) -> str:
    """Return what is refused, what is warned of, or nothing."""
    try:
        return "; ".join(check(args, release, table))
    except FlagError as error:
        return f"refused: {error}"


RELEASES = [
    ("--came", "1.0.0", "refused: vllm 1.0.0 has no flag --came (1.4.0 has it)"),
    ("--came", "1.2.0", ""),
    ("--came", "1.4.0", ""),
    ("--came", "1.5.0", ""),
    ("--came", "0.9.0", "refused: vllm 0.9.0 has no flag --came (1.4.0 has it)"),
    ("--went", "1.0.0", ""),
    ("--went", "0.9.0", ""),
    ("--went", "1.0.1", ""),
    ("--went", "1.4.0", "refused: vllm 1.4.0 has no flag --went (1.0.0 had it)"),
    ("--went", "1.5.0", "vllm 1.5.0: --went was gone in 1.4.0"),
    ("--new", "1.4.0", "refused: vllm 1.4.0 has no flag --new"),
    ("--new", "1.2.0", "refused: vllm 1.2.0 has no flag --new"),
    ("--new", "1.4.1", "vllm 1.4.1: --new is not known here; let pass"),
    ("--new", "0.9.0", "vllm 0.9.0: --new is not known here; let pass"),
    ("--new", "nonsense", "vllm of unknown release: --new is not known here; let pass"),
    ("--went --came", "nonsense", ""),
    ("--alwys 1", "1.4.0", "refused: vllm 1.4.0 has no flag --alwys; did you mean --always?"),
]


@pytest.mark.parametrize(("args", "release", "answer"), RELEASES)
def test_flags_by_release(args: str, release: str, answer: str) -> None:
    found = told(args, release)
    assert found == answer or (found.startswith(answer + "; did you mean") and answer)


FORMS = [
    ("--always 1", ""),
    ("--always=1", ""),
    ("--always -1", ""),
    ("--always {\"a\":-1}", ""),
    ("-a 1", ""),
    ("-a=1", ""),
    ("--always", "refused: vllm 1.4.0: --always needs a value"),
    ("--always --came", "refused: vllm 1.4.0: --always needs a value"),
    ("--ask", ""),
    ("--ask x", ""),
    ("--came=1", "refused: vllm 1.4.0: --came takes no value"),
    ("--no-came", ""),
    ("--no-always", "refused: vllm 1.4.0 has no flag --no-always; did you mean --always?"),
    ("--always.key 1", ""),
    ("--always.a.b=1", ""),
    ("--alw 1", "--alw is short for --always; write it in full, releases add flags"),
    ("--a 1", "refused: vllm 1.4.0: --a may be --always or --ask"),
    ("-O3", ""),
    ("-O=2", ""),
    ("word -1 -0.5 - --", ""),
]  # fmt: skip


@pytest.mark.parametrize(("args", "answer"), FORMS)
def test_forms(args: str, answer: str) -> None:
    assert told(args, "1.4.0") == answer


REAL = [
    ("vllm", "0.26.0", "--max-num-queued-reqs 5",
     "refused: vllm 0.26.0 has no flag --max-num-queued-reqs (0.33.0 has it); "
     "did you mean --max-num-seqs?"),
    ("vllm", "0.30.0", "--max-num-queued-reqs 5", ""),
    ("vllm", "0.33.0", "--max_num_seqs=5 -tp 2 --compilation-config.mode 3 -cc.level=2 -O3 "
     "--no-enable-prefix-caching --max-model-len 32k", ""),
    ("vllm", "0.33.0", "--kv-cache-dtpe fp8",
     "refused: vllm 0.33.0 has no flag --kv-cache-dtpe; did you mean --kv-cache-dtype?"),
    ("sglang", "0.5.23", "--cuda-graph-max-bs 8",
     "refused: sglang 0.5.23 has no flag --cuda-graph-max-bs (0.5.17 had it); "
     "did you mean --cuda-graph-max-bs-decode?"),
    ("sglang", "0.5.17", "--cuda-graph-max-bs 8 --chunked-prefill-size -1", ""),
    ("sglang", "0.5.23", "--tp 2",
     "--tp is short for --tp-size; write it in full, releases add flags"),
    ("sglang", "0.5.23", "--mem_fraction_static 0.5",
     "refused: sglang 0.5.23 has no flag --mem_fraction_static; "
     "did you mean --mem-fraction-static?"),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "release", "args", "answer"), REAL)
def test_flags_of_real_releases(engine: str, release: str, args: str, answer: str) -> None:
    assert told(args, release, flag_table(engine)) == answer


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_we_write_ourselves_every_release_takes(engine: str) -> None:
    """All that a pool can switch on, on every release that the table was read from, and around."""
    table = flag_table(engine)
    extra = ("--speculative-draft-model-path", "/d") if engine == "sglang" else ()
    full = msgspec.structs.replace(
        BASE, engine=engine, sleep=True, adapters={"a": "/a", "b": "/b"}, args=extra
    )
    assert len(table.releases) >= 2
    for release in (*table.releases, UNKNOWN_RELEASE):
        launch = ENGINES[engine].command(full, Ports(1, 2, 3, 4), release)
        assert len([word for word in launch.argv if word.startswith("--")]) > 12
        assert check_flags(table, launch.argv[3:], release) == ()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_tables_are_whole(engine: str) -> None:
    table = flag_table(engine)
    assert len(table.flags) > 300
    assert all(release > Release(0) for release in table.releases)
    assert list(table.releases) == sorted(table.releases)
    assert {flag.kind for flag in table.flags.values()} <= {"switch", "either", "maybe", "value"}
    for flag in table.flags.values():
        assert flag.since in table.releases
        assert flag.until is None or flag.until in table.releases
        assert flag.stands_for in table.flags


def test_the_tables_are_installed_with_the_program() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "engines/*.flags" in data["package-data"]["backends"]


REFUSED = [
    ("vllm", {"args": ("--port", "1")}, "--port cannot be an argument: the manager leases it"),
    ("vllm", {"args": ("--host=0.0.0.0",)}, "--host cannot be an argument"),
    ("vllm", {"args": ("--ssl_keyfile", "k")}, "plain HTTP on loopback"),
    ("vllm", {"args": ("--hos=0.0.0.0",)}, "--hos cannot be an argument"),
    ("sglang", {"args": ("--hos", "0.0.0.0")}, "--hos cannot be an argument"),
    ("sglang", {"args": ("--ssl-keyfil", "k")}, "may be --ssl-keyfile or"),
    ("vllm", {"args": ("--model", "x")}, "say model_path in the pool"),
    ("sglang", {"args": ("--port", "1")}, "--port cannot be an argument"),
    ("sglang", {"args": ("--model-path", "x")}, "say model_path in the pool"),
    ("vllm", {"args": ("--served-model-name", "a", "b", "--seed", "1")}, "a b leaves out 'm'"),
    ("sglang", {"args": ("--served-model-name=x",)}, "x leaves out 'm'"),
    ("vllm", {"args": ("--served_model_name", "x")}, "x leaves out 'm'"),
    ("sglang", {"args": ("--weight-cache-mode", "client"), "sleep": True}, "put to sleep"),
    ("vllm", {"args": ("--max-num-sqs", "1")}, "did you mean --max-num-seqs?"),
]


@pytest.mark.parametrize(("engine", "fields", "why"), REFUSED)
def test_arguments_that_would_break_a_replica(
    engine: str, fields: dict[str, object], why: str
) -> None:
    wanted = msgspec.structs.replace(BASE, engine=engine, **fields)
    with pytest.raises(FlagError, match=why.replace("?", r"\?")):
        ENGINES[engine].check(wanted, flag_table(engine).releases[-1])


WARNED = [
    ("vllm", {}, "0.33.0", ""),
    ("vllm", {}, "0.23.0", ""),
    ("vllm", {}, "0.22.1", "older than 0.23.0"),
    ("vllm", {}, "0.34.0", "newer than 0.33.0"),
    ("vllm", {}, "", "does not say its release"),
    ("sglang", {}, "0.5.23.post1", ""),
    ("sglang", {}, "0.5.9", "older than 0.5.10"),
    ("sglang", {"adapters": {"a": "/a"}}, "0.5.23", "'m:ADAPTER'"),
    ("vllm", {"adapters": {"a": "/a"}}, "0.33.0", ""),
    ("vllm", {"args": ("--served-model-name", "m", "b")}, "0.33.0", ""),
    ("vllm", {"args": ("--disable-log-stats",)}, "0.33.0", "hides the load"),
    ("sglang", {"args": ("--weight-cache-mode", "client")}, "0.5.23", ""),
    ("sglang", {"args": ("--admin-api-key", "k")}, "0.5.23", "leave keys to the proxy"),
    ("vllm", {"args": ("--api-key", "k")}, "0.33.0", "leave keys to the proxy"),
]


@pytest.mark.parametrize(("engine", "fields", "release", "warning"), WARNED)
def test_warnings(engine: str, fields: dict[str, object], release: str, warning: str) -> None:
    wanted = msgspec.structs.replace(BASE, engine=engine, **fields)
    found = ENGINES[engine].check(wanted, parse_release(release))
    if warning:
        assert any(warning in one for one in found), found
    else:
        assert found == ()


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("0.33.0", Release(0, 33, 0)),
        ("0.5.10.post2", Release(0, 5, 10)),
        ("v0.27.1", Release(0, 27, 1)),
        ("0.34.0rc1.dev3+g1a2b", Release(0, 34, 0)),
        ("1.2", Release(1, 2, 0)),
        ("0.5.10rc1", Release(0, 5, 10)),
        (" 0.26.0\n", Release(0, 26, 0)),
        ("", UNKNOWN_RELEASE),
        ("main", UNKNOWN_RELEASE),
        ("1", UNKNOWN_RELEASE),
    ],
)
def test_releases_are_read(text: str, release: Release) -> None:
    assert parse_release(text) == release


def test_releases_have_an_order_and_a_text() -> None:
    assert Release(0, 5, 9) < Release(0, 5, 10) < Release(0, 33) < Release(1)
    assert [str(Release(0, 5, 10)), str(UNKNOWN_RELEASE)] == ["0.5.10", "of unknown release"]
