"""Why an engine ended, found in its log."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.last_words import READ_BYTES_MAX, WORDS_CHARACTERS_MAX, last_words, words_in
from backends.redact import secrets_of

_LOGS = Path(__file__).parents[1] / "fakes" / "engine_logs"


def log(name: str) -> str:
    """Return an engine's end, written in its format."""
    return (_LOGS / f"{name}.txt").read_text()


CASES = [
    (
        "vLLM out of memory",
        log("vllm-out-of-memory"),
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a total "
        "capacity of 139.80 GiB of which 620.50 MiB is free. (give it more GPUs, a smaller context "
        "or batch, or smaller weights)",
    ),
    (
        "vLLM finds the card in use",
        log("vllm-card-in-use"),
        "ValueError: Free memory on device cuda:0 (10.21/139.8 GiB) on startup is less than "
        "desired GPU memory utilization (0.9, 125.82 GiB). Decrease GPU memory utilization or "
        "reduce GPU memory used by other processes. (another process holds memory of the card "
        "(nvidia-smi), or lower --gpu-memory-utilization)",
    ),
    (
        "one rank of vLLM takes the others with it",
        log("vllm-ranks"),
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB. (give it more "
        "GPUs, a smaller context or batch, or smaller weights)",
    ),
    (
        "vLLM does not know a flag",
        log("vllm-unknown-flag"),
        "vllm serve: error: unrecognized arguments: --tensor-paralel-size 2 --api-token hush-hush",
    ),
    (
        "vLLM finds its port taken",
        log("vllm-port"),
        "OSError: [Errno 98] Address already in use (somebody else listens there; the next start "
        "takes another port)",
    ),
    (
        "vLLM finds no model",
        log("vllm-no-model"),
        "OSError: Can't load the configuration of '/models/none'. If you were trying to load it "
        "from 'https://huggingface.co/models', make sure you don't have a local directory with the "
        "same name.",
    ),
    (
        "pydantic tells in the line below",
        log("vllm-bad-config"),
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig: Value "
        "error, User-specified max_model_len (200000) is greater than the derived max_model_len "
        "[type=value_error]",
    ),
    (
        "SGLang out of memory",
        log("sglang-out-of-memory"),
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. (raise "
        "--gpu-memory-utilization (SGLang: --mem-fraction-static), or give it more GPUs, a smaller "
        "context or batch, or smaller weights)",
    ),
    (
        "SGLang finds its port taken",
        log("sglang-port"),
        "[Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): address "
        "already in use (somebody else listens there; the next start takes another port)",
    ),
    (
        "SGLang does not know a value",
        log("sglang-unknown-flag"),
        "sglang serve: error: argument --schedule-policy: invalid choice: 'lfp' (choose from lpm, "
        "random, fcfs)",
    ),
    (
        "SGLang finds no model: the last of a chain",
        log("sglang-no-model"),
        "OSError: Incorrect path_or_model_id: '/models/none'. Please provide either the path to a "
        "local folder or the repo_id of a model on the Hub.",
    ),
    (
        "an assertion without words is told by its place",
        log("sglang-ranks"),
        "AssertionError in linear.py:77 load",
    ),
    ("a crash", log("crash"), "Fatal Python error: Segmentation fault"),
    ("nothing but a logged error", log("logged-only"), "watchdog: the engine stopped answering"),
    (
        "SGLang, whose scheduler was killed",
        log("sglang-killed"),
        "Subprocess scheduler_0 (pid=1774) crashed with exit code -9. Triggering SIGQUIT for "
        "cleanup...",
    ),
    (
        "vLLM, ended in order",
        log("vllm-ended"),
        "Shutting down | Waiting for application shutdown. | Application shutdown complete.",
    ),
    ("nothing told: the end", log("quiet"), "half way | still there | and then"),
    ("an exception without words or place", "KeyError\n", "KeyError"),
    ("nothing at all", "", ""),
]


@pytest.mark.parametrize(("text", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_telling_line(text: str, words: str) -> None:
    assert words_in(text) == words


def test_an_end_in_order_is_no_cause(tmp_path: Path) -> None:
    path = tmp_path / "m-0.log"
    path.write_text(log("vllm-ended"))
    assert last_words(path, 0) == ""


def test_more_lines_are_those_of_the_end() -> None:
    words = words_in(log("vllm-port"), 3).splitlines()
    assert words[0].startswith("OSError: [Errno 98] Address already in use (")
    assert words[1:] == ["sock.bind(addr)", "OSError: [Errno 98] Address already in use"]


def test_only_this_life_counts(tmp_path: Path) -> None:
    path = tmp_path / "m-0.log"
    path.write_text(log("vllm-port"))
    before = path.stat().st_size
    with path.open("a") as file:
        file.write(log("logged-only"))
    assert last_words(path, since_bytes=before) == "watchdog: the engine stopped answering"
    assert last_words(path).startswith("OSError: [Errno 98]")
    path.write_text(log("crash"))  # cut under its writer
    assert last_words(path, since_bytes=10 * before) == "Fatal Python error: Segmentation fault"
    assert last_words(tmp_path / "none") == ""


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m-0.log"
    noise = "(APIServer pid=7) INFO 11-22 18:20:05 [x.py:1] tick\n"
    path.write_text(log("vllm-port") + noise * (READ_BYTES_MAX // len(noise) + 1) + "\xff\n")
    assert last_words(path) == "tick | tick | ÿ"


def test_a_very_long_line_is_cut() -> None:
    words = words_in("ValueError: " + "x" * 5_000)
    assert len(words) == WORDS_CHARACTERS_MAX
    assert words.endswith("x…")


def test_secrets_are_struck_out(tmp_path: Path) -> None:
    path = tmp_path / "m-0.log"
    path.write_text(log("vllm-unknown-flag"))
    args = ("--tensor-paralel-size", "2", "--api-token", "hush-hush", "--hf-token=whisper")
    hide = secrets_of(args, {"HF_TOKEN": "whispering", "SHORT_KEY": "2", "LANG": "C"})
    assert hide == ("whispering", "hush-hush", "whisper")
    assert last_words(path, hide=hide).endswith("--tensor-paralel-size 2 --api-token ***")
