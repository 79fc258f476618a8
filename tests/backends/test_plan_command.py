"""`doherty plan` as a person uses it: models found, reports printed, mistakes told in one line."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from backends.cli import main
from backends.planning.launch import Limits, Pool, snippet
from proxy.config import Config, parse_config
from tests.fakes.model_shapes import CONFIGS


def folder(tmp_path: Path, name: str, **changes: Any) -> str:
    path = tmp_path / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**CONFIGS[name], **changes}))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    try:
        status = main(["plan", *args])
    except SystemExit as left:
        status = int(left.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def configuration(report: str) -> Config:
    return parse_config(report.split("\nconfiguration\n")[1], "snippet")


@pytest.mark.parametrize(
    "model", ["llama-3.1-8b", "llama-3.1-405b", "gpt-oss-20b", "deepseek-v3", "gemma-3-27b"]
)
@pytest.mark.parametrize("work", ["online", "offline", "semi-online"])
@pytest.mark.parametrize("gpu", ["h200", "b300"])
def test_every_snippet_is_a_valid_configuration(
    model: str, work: str, gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, model)
    status, report, _ = run(capsys, path, "--gpu", gpu, "--class", work)
    assert status == 0
    (read,) = configuration(report).models
    (pool,) = read.pools
    assert read.name == model
    assert pool.model_path == path
    assert pool.engine == ("sglang" if work == "online" else "vllm")
    assert "--tensor-parallel-size" in pool.args
    assert not [arg for arg in pool.args if " " in arg]
    if work == "offline":
        assert (pool.serves, pool.replicas) == ("jobs", None)
        assert pool.autoscale is not None
    else:
        assert pool.replicas is not None


def test_doherty_check_takes_the_snippet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "llama-3.1-8b")
    _, report, _ = run(capsys, path, "--gpu", "h100", "--class", "online", "--engine", "vllm")
    file = tmp_path / "doherty.yaml"
    file.write_text(report.split("\nconfiguration\n")[1])
    assert main(["check", str(file)]) == 0
    assert '"method":"eagle3"' in file.read_text().replace("\\", "")
    assert ": ok" in capsys.readouterr().out


def test_offline_work_is_a_pool_of_engine_workers_with_its_price(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "llama-3.1-8b")
    args = ("--gpu", "h200", "--class", "offline", "--price", "h200=3.5")
    file = tmp_path / "doherty.yaml"
    file.write_text(run(capsys, path, *args)[1].split("\nconfiguration\n")[1])
    assert main(["check", str(file)]) == 0
    assert ": ok" in capsys.readouterr().out
    (pool,) = parse_config(file.read_text(), "snippet").models[0].pools
    assert (pool.serves, pool.gpu_price_per_hour) == ("jobs", 3.5)
    serving = run(capsys, path, *args, "--engine", "sglang")[1]
    assert configuration(serving).models[0].pools[0].serves == "requests", "it has no worker"


def test_the_report_names_floors_budget_and_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "llama-3.3-70b")
    _, report, _ = run(capsys, path, "--gpu", "h200", "--class", "online")
    for part in (
        "70.55 B parameters",
        "327,680 bytes a token",
        "NVIDIA H200 data sheet",
        "floor, batch 1",
        "times a token, at 2.9 tokens a step",
        "speed of light",
        "memory of a GPU: 150.8 GB",
        "the draft's ",
        "  --mem-fraction-static 0.",
        "GPUs per replica: ",
        "targets met: 5 ms a token at batch 8, 400 ms to the first",
        "a million take",
    ):
        assert part in report
    assert max(len(line) for line in report.split("choices")[1].splitlines()) < 160


def test_a_missed_target_is_told_with_what_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "qwen3-235b-a22b")
    status, report, _ = run(
        capsys, path, *("--gpu", "h100", "--class", "online", "--tpot-ms", "6", "--ttft-ms", "10")
    )
    assert status == 0
    assert "MISSED time per token" in report
    assert "MISSED time to first token" in report
    assert "  would do: " in report


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--tpot-ms", "50"), "targets met: 50 ms a token at batch 1"),
        (("--ttft-ms", "900"), "targets met: 900 ms to the first"),
        (
            ("--tpot-ms", "50", "--ttft-ms", "900"),
            "targets met: 50 ms a token at batch 1, 900 ms to the first",
        ),
        ((), ""),
    ],
)
def test_only_targets_that_were_set_are_told_as_met(
    given: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "qwen3-8b")
    report = run(capsys, path, "--gpu", "h200,h100", "--class", "offline", *given)[1]
    assert [line for line in report.splitlines() if "targets met" in line] == [said] * bool(said)
    (row,) = (line for line in report.splitlines() if line.startswith("  h200 "))
    assert row.endswith("  met" if said else "  -")


def test_a_reader_that_leaves_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        @override
        def write(self, text: str) -> int:
            raise BrokenPipeError

        @override
        def fileno(self) -> int:
            return descriptor

    descriptor = os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
    path = folder(tmp_path, "qwen3-0.6b")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Closed())
        assert main(["plan", path, "--gpu", "h200", "--class", "online"]) == 0
    assert os.readlink(f"/proc/self/fd/{descriptor}") == os.devnull
    os.close(descriptor)


def test_offline_work_says_what_its_figures_leave_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "llama-3.3-70b")
    _, report, _ = run(capsys, path, "--gpu", "h100", "--class", "offline")
    assert "left out: these count prefill and decode one after the other" in report
    assert "cheaper by these figures, not chosen: --engine sglang --draft auto: 1,3" in report
    _, report, _ = run(capsys, path, "--gpu", "h100", "--class", "online")
    assert "left out" not in report
    _, text, _ = run(capsys, path, "--gpu", "h100", "--class", "offline", "--json")
    (plan,) = json.loads(text)["plans"]
    assert plan["cheaper"][0]["flags"] == "--engine sglang --draft auto"
    assert plan["yield"]["gpu_s_per_million_mixed"] < plan["yield"]["gpu_s_per_million"]


def test_json_is_versioned_and_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path, "gpt-oss-120b")
    args = ("--gpu", "h100,a100,h100", "--class", "offline", "--price", "h100=2.5", "--json")
    _, text, _ = run(capsys, path, *args)
    values = json.loads(text)
    assert values["version"] == 1
    assert {plan["gpu"] for plan in values["plans"]} == {"h100", "a100"}
    first = values["plans"][0]
    assert first["format"] == "mxfp4"
    assert first["model"]["parameters"] == 116_789_022_720
    assert {"step_floor_s", "step_expected_s", "prefill_floor_s"} <= set(first["considered"][0])
    assert all(d["why"] for d in first["decisions"])
    assert parse_config(values["configuration"], "json").models[0].pools[0].args == tuple(
        first["args"]
    )


def test_predictions_stand_beside_the_plan_for_every_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "qwen3-8b")
    _, text, _ = run(capsys, path, "--gpu", "h200", "--class", "online", "--json")
    outlook = json.loads(text)["decode"]
    found = {(p["engine"], p["tp"], p["weights"]): p for p in outlook["predictions"]}
    assert len(found) == 2 * 4 * 2
    one = found["vllm", 1, "bf16"]
    assert one["expected_ms"] == pytest.approx(5.2, rel=0.15)
    assert one["floor_ms"] == pytest.approx(3.15, rel=0.01)
    assert one["collective_ms"] == 0.0
    layer_s = outlook["calibration"]["vllm"]["value"]
    assert one["overhead_ms"] == pytest.approx(36 * layer_s * 1e3)
    for prediction in found.values():
        assert prediction["expected_ms"] > prediction["overhead_ms"] + prediction["floor_ms"]
    shipped = folder(tmp_path, "gpt-oss-20b")
    _, text, _ = run(capsys, shipped, "--gpu", "b200", "--class", "online", "--json")
    assert {p["weights"] for p in json.loads(text)["decode"]["predictions"]} == {"mxfp4"}


def test_all_types_are_compared_and_the_best_is_told_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "deepseek-v3")
    prices = tmp_path / "prices.yaml"
    prices.write_text("h200: 4\nb200: 8\ngb200: 9\nb300: 1\n")
    _, report, _ = run(
        capsys, path, *("--gpu", "all", "--class", "offline", "--prices", str(prices))
    )
    assert "offline on B300" in report.splitlines()[0]
    assert "by price per million tokens" in report
    assert "  h100   the weights in fp8 do not fit 8 GPUs" in report
    assert "at your prices" in report
    _, report, _ = run(
        capsys,
        path,
        *("--gpu", "all", "--class", "offline", "--prices", str(prices), "--price", "b300=900"),
    )
    assert "offline on B300" not in report.splitlines()[0]
    _, report, _ = run(
        capsys, path, *("--gpu", "b200", "--class", "offline", "--format", "shipped")
    )
    assert "asked for by --format shipped" in report


# finding models


def test_a_hub_id_is_found_in_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--Qwen--Qwen3-8B"
    for revision, layers in (("aaaa", 36), ("bbbb", 18)):
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        values = {**CONFIGS["qwen3-8b"], "num_hidden_layers": layers}
        (snapshot / "config.json").write_text(json.dumps(values))
    os.utime(repository / "snapshots/aaaa/config.json", (1, 1))
    args = ("Qwen/Qwen3-8B", "--gpu", "h200", "--class", "online")
    assert "18 layers" in run(capsys, *args)[1]  # the newest, without a reference
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("aaaa\n")
    _, report, _ = run(capsys, *args)
    assert "36 layers" in report
    assert configuration(report).models[0].name == "Qwen3-8B"
    assert configuration(report).models[0].pools[0].model_path == "Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HF_HOME": "{}"}, "hub"),
        ({"XDG_CACHE_HOME": "{}"}, "huggingface/hub"),
        ({"HOME": "{}"}, ".cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hub_keeps_it(
    variables: dict[str, str],
    place: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    status, _, error = run(capsys, "no/model", "--gpu", "h200", "--class", "online")
    assert status == 2
    assert f"({tmp_path / place})" in error
    assert "hf download no/model config.json" in error


def test_the_checkpoint_is_weighed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(folder(tmp_path, "gemma-3-27b"))
    args = (str(path / "config.json"), "--gpu", "h200", "--class", "offline")
    assert "only the language model is counted" in run(capsys, *args)[1]
    index = {"metadata": {"total_size": 54_800_000_000}, "weight_map": {}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    report = run(capsys, *args)[1]
    assert "54.8 GB as shipped" in report
    assert "only the language model" not in report


def test_modelopt_tells_its_format_in_a_file_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(folder(tmp_path, "llama-3.3-70b", max_position_embeddings=131072.0))
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (path / "hf_quant_config.json").write_text(json.dumps(told))
    report = run(capsys, str(path), "--gpu", "b200", "--class", "online")[1]
    assert "format: nvfp4, as shipped" in report
    assert "--quantization" not in report
    assert "131,072 tokens" in report


# mistakes


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (("--gpu", "h20", "--class", "online"), 2, "did you mean h200?"),
        (("--class", "online"), 2, "--gpu"),
        (("--gpu", "h200", "--class", "fast"), 2, "invalid choice"),
        (("--gpu", "h200", "--class", "online", "--price", "h200"), 2, "TYPE=PER_HOUR"),
        (("--gpu", "h200", "--class", "online", "--price", "h200=-1"), 2, "no price per hour"),
        (
            ("--gpu", "h200", "--class", "online", "--price", "x=1"),
            2,
            "--price x: no such GPU type",
        ),
        (("--gpu", "h200", "--class", "online", "--price", "h10=1"), 2, "--price h10: no such"),
        (("--gpu", "h200", "--class", "online", "--prices", "/no/file"), 2, "cannot be read"),
        (("--gpu", "h200", "--class", "online", "--context", "100"), 2, "shorter than a request"),
        (("--gpu", "h200", "--class", "online", "--accept-length", "0.5"), 2, "at least 1"),
        (("--gpu", "h200", "--class", "online", "--accept-length", "9"), 2, "at most 4"),
        (("--gpu", "h200", "--class", "offline", "--accept-length", "2"), 2, "add --draft auto"),
        (("--gpu", "h200", "--class", "online", "--draft", "/nope"), 2, "no such folder"),
        (("--gpu", "h200", "--class", "online", "--draft", "."), 2, "has no config.json"),
        (("--gpu", "all", "--class", "online", "--context", "200000"), 2, "takes 131,072 tokens"),
        (("--gpu", "h200", "--class", "online", "--price", "h200=much"), 2, "no price per hour"),
        (("--gpu", "h200", "--class", "online", "--tpot-ms", "fast"), 2, "no number above 0"),
        (("--gpu", "h200", "--class", "online", "--tpot-ms", "0"), 2, "no number above 0"),
        (("--gpu", "h200", "--class", "online", "--gpus-per-node", "0"), 2, "no whole number"),
        (("--gpu", "h200", "--class", "online", "--concurrency", "99999"), 1, "--concurrency"),
        (
            ("--gpu", "h200", "--class", "online", "--context", "200000"),
            2,
            "the model takes 131,072 tokens",
        ),
        (
            ("--gpu", "h200", "--class", "online", "--prompt-tokens", "131072"),
            2,
            "the model takes 131,072 tokens",
        ),
        (("--gpu", "h200,h20", "--class", "online"), 2, "did you mean h200?"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(
    args: tuple[str, ...],
    status: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    got, out, error = run(capsys, folder(tmp_path, "llama-3.1-8b"), *args)
    assert (got, out) == (status, "")
    assert said in error.splitlines()[-1]


def test_a_draft_may_be_a_folder_or_a_hub_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "llama-3.1-8b")
    for draft in (folder(tmp_path, "qwen3-0.6b"), "owner/head-1.0"):
        status, report, _ = run(
            capsys, path, "--gpu", "h200", "--class", "online", "--draft", draft
        )
        assert status == 0
        assert f"EAGLE-3 with {draft}" in report


def test_prices_that_are_no_table_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, "llama-3.1-8b")
    prices = tmp_path / "prices.yaml"
    prices.write_text("- 3\n")
    args = (path, "--gpu", "h200", "--class", "online", "--prices", str(prices))
    assert "one line a GPU type" in run(capsys, *args)[2]
    prices.write_text("h10: 3\n")
    assert f"--prices {prices}: h10: no such GPU type; did you mean h100?" in run(capsys, *args)[2]
    prices.write_text("h200: dear\n")
    assert f"--prices {prices}: h200: 'dear' is no price per hour" in run(capsys, *args)[2]


def test_help_tells_the_classes_and_their_targets(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "--help")
    assert status == 0
    for part in (
        "somebody waits for every token",
        "5 ms a token with 8 requests at once (--concurrency), 400 ms to the first",
        "50 ms a token with 32 requests at once (--concurrency), 5000 ms to the first",
        "no targets; cost is what counts",
        "such as `h200: 3.20`",
    ):
        assert part in " ".join(text.split()), "wherever the terminal's width breaks its lines"


def test_rows_that_do_not_fit_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path, "llama-3.3-70b")

    def rows(*args: str) -> list[str]:
        report = run(capsys, path, "--gpu", "h100", *args)[1]
        table = report.split("GPUs a replica:")[1].split("floor: the speed")[0].splitlines()[2:]
        return [row.split("  ")[-1].strip() for row in table if row.strip()]

    asked = ("--class", "online", "--engine", "vllm", "--concurrency")
    assert rows(*asked, "200", "--draft", "none")[:2] == [
        "holds 4 of 200 requests",
        "holds 105 of 200 requests",
    ]
    assert rows(*asked, "1", "--context", "100000", "--draft", "none")[0] == (
        "holds no sequence of 100,000 tokens"
    )
    assert rows("--class", "online", "--draft", "none")[0] == (
        "does not fit while it loads in 16 bits"
    )
    assert "do not fit" not in rows("--class", "offline")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not a JSON object"), ("[]", "not a JSON object"), ("{}", "num_hidden_layers")],
)
def test_a_broken_file_is_named(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    status, _, error = run(capsys, str(tmp_path), "--gpu", "h200", "--class", "online")
    assert status == 2
    assert said in error


def test_a_file_that_cannot_be_a_configuration_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path, "qwen3-0.6b")
    monkeypatch.setattr("backends.planning.command.INDEX_BYTES_MAX", 10)
    args = (path, "--gpu", "h200", "--class", "online")
    assert "too large to be" in run(capsys, *args)[2]
    monkeypatch.undo()
    index = tmp_path / "qwen3-0.6b" / "model.safetensors.index.json"
    index.write_text('{"metadata": {"total_size": "?"}}')
    (index.parent / "model.safetensors").write_bytes(b"\0" * 100)  # weighed instead
    assert "the larger is planned with" in run(capsys, *args)[1]


def test_a_folder_without_a_model_and_a_path_without_a_folder_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--gpu", "h200", "--class", "online")
    assert "has no config.json" in run(capsys, str(tmp_path), *args)[2]
    assert "no such folder" in run(capsys, str(tmp_path / "away"), *args)[2]


# the snippet


def test_a_model_named_by_its_file_is_launched_by_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path, "qwen3-8b")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (f"{path}/config.json", "~/qwen3-8b", "~/qwen3-8b/config.json"):
        report = run(capsys, given, "--gpu", "H100, h200,h100", "--class", "offline")[1]
        (model,) = configuration(report).models
        assert (model.name, model.pools[0].model_path) == ("qwen3-8b", path)


@pytest.mark.parametrize("name", ["plain", "no", "a:b", "x.y_z"])
@pytest.mark.parametrize("path", ["/models/x", "on", "org/name", "/with space/#x"])
def test_names_and_paths_are_read_back_as_they_are(name: str, path: str) -> None:
    args = ("--flag", "--other", '{"a": [1]}', "--third", "-1")
    limits = Limits(context_tokens=1, step_tokens=1, aim=0, most=3)
    pool = Pool(
        name=name, engine="vllm", model_path=path, replicas=2, args=args, gpus=4, limits=limits
    )
    text = snippet(pool, note="a note: with a colon")
    (model,) = parse_config(text, "snippet").models
    assert (model.name, model.pools[0].model_path, model.pools[0].args) == (name, path, args)
    assert (model.pools[0].max_inputs, model.pools[0].target_inputs) == (3, 0)
    assert model.pools[0].gpus == 4
