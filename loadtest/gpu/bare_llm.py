"""vLLM's `LLM.generate` with all lines of a file in one call: the yardstick of jobs on a GPU.

It runs in vLLM's own Python, as a program, and knows nothing of Doherty:

    vllm-python loadtest/gpu/bare_llm.py --input a.jsonl --input b.jsonl -- --model FOLDER ...

Lines are of /v1/completions. The model is loaded once; before each file the first lines of `--warm`
are done and the prefix cache is emptied. One line of JSON for each file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from typing import Any


def load(flags: Sequence[str]) -> Any:
    """Return the LLM that these flags describe; they are those of `vllm serve`."""
    arguments = importlib.import_module("vllm.engine.arg_utils").EngineArgs
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    args = arguments.from_cli_args(arguments.add_cli_args(parser).parse_args(list(flags)))
    args.disable_log_stats = True  # as `LLM` has it by itself
    return importlib.import_module("vllm").LLM.from_engine_args(args)


def read(path: str) -> tuple[list[str], list[Any]]:
    """Return prompts and sampling parameters of a file."""
    sampling = importlib.import_module("vllm").SamplingParams
    prompts, params = [], []
    with open(path, encoding="utf-8") as file:
        for row in file:
            body = json.loads(row)["body"]
            prompts.append(body["prompt"])
            names = ("max_tokens", "temperature", "ignore_eos")
            params.append(sampling(**{name: body[name] for name in names}))
    return prompts, params


def figures(outputs: Sequence[Any], seconds: float) -> dict[str, float]:
    """Return the sums of all outputs."""
    prompts = sum(len(output.prompt_token_ids) for output in outputs)
    answers = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    return {
        "lines": len(outputs),
        "failed": sum(not output.finished for output in outputs),
        "prompt_tokens": prompts,
        "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        "completion_tokens": answers,
        "seconds": round(seconds, 3),
        "tokens_per_s": round((prompts + answers) / seconds, 1),
    }


def main() -> None:
    """Print the figures of each file."""
    own, flags = sys.argv[1:], list[str]()
    if "--" in own:
        at = own.index("--")
        own, flags = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", action="append", required=True, metavar="FILE")
    parser.add_argument("--warm", required=True, metavar="FILE")
    options = parser.parse_args(own)
    llm = load(flags)
    for path in options.input:
        llm.generate(*read(options.warm), use_tqdm=False)
        llm.reset_prefix_cache()
        prompts, params = read(path)
        begun_s = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begun_s
        print("FIGURES " + json.dumps(figures(outputs, seconds)), flush=True)


if __name__ == "__main__":
    main()
