"""`doherty plan`: reads a model's files and the command line, and leaves the rest to the rules.

No network: a model is a folder, or a hub id that is in the local cache already.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from backends.failure import StartError
from backends.plan import Plan
from backends.planning.compare import compare
from backends.planning.drafts import CHAIN_TOKENS, check_length
from backends.planning.failure import PlanError, RequestError
from backends.planning.goal import DEFAULT_TARGETS, Goal, WorkClass
from backends.planning.hardware import GPUS, Gpu, gpu_named
from backends.planning.launch import Pool
from backends.planning.parallel import GPUS_MAX
from backends.planning.reading import read_shape
from backends.planning.report import json_report, text_report
from backends.planning.shape import ModelShape
from proxy.config import ConfigError

WORK_CLASSES: tuple[WorkClass, ...] = ("online", "semi-online", "offline")
_MEANING: dict[WorkClass, str] = {
    "online": "somebody waits for every token: SGLang, GPUs until the targets are met",
    "semi-online": "bursts that must begin soon: what starts fast, on GPUs that are easy to get",
    "offline": "nobody waits: vLLM, the fewest GPUs that hold a full batch, the rest as replicas",
}
_NODE_HELP = f"of one machine (default: %(default)s); a replica has at most {GPUS_MAX} of them"
_DRAFT_HELP = "EAGLE-3 head, a folder or hub id; auto: one that is known; none: no speculation"
INDEX_BYTES_MAX = 64 * 1024 * 1024  # of one of these files; the largest indices known have some MB


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `doherty plan` takes."""
    parser.description = "Plan a launch: GPUs of a replica, format, limits, and why; no network."
    parser.epilog = _explained()
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder with a config.json, or a hub id in the local cache")
    add("--gpu", required=True, metavar="TYPE", help=f"{', '.join(GPUS)}; several by commas; all")
    add("--class", dest="work", required=True, choices=WORK_CLASSES, help="of the work: see below")
    add("--gpus-per-node", type=_count, default=8, metavar="N", help=_NODE_HELP)
    add("--prompt-tokens", type=_count, default=2048, metavar="N", help="of a request (2048)")
    add("--answer-tokens", type=_count, default=256, metavar="N", help="of a request (256)")
    add("--context", type=_count, default=0, metavar="N", help="longest sequence to serve")
    add("--concurrency", type=_count, metavar="N", help="requests at once on each replica")
    add("--tpot-ms", type=_positive, metavar="MS", help="time per token to meet")
    add("--ttft-ms", type=_positive, metavar="MS", help="time to first token to meet")
    add("--engine", choices=("vllm", "sglang"), help="instead of the class's")
    add("--draft", default="", metavar="MODEL", help=_DRAFT_HELP)
    add("--accept-length", type=_positive, metavar="L", help="tokens a step yields with it")
    add("--format", choices=("auto", "shipped"), default="auto", help="of the weights")
    add("--kv-dtype", choices=("auto", "fp8"), default="auto", help="of the KV cache")
    add("--price", action="append", default=[], metavar="TYPE=PER_HOUR", help="of one GPU")
    add("--prices", metavar="FILE", help="YAML, a line for each GPU type, such as `h200: 3.20`")
    add("--name", metavar="NAME", help="that clients will ask for (default: the model's)")
    add("--json", action="store_true", help="print values instead of a report")


def _explained() -> str:
    """Return what the classes are, with their targets where the command line is silent."""
    lines = ["classes of work, and the targets that hold without --tpot-ms and --ttft-ms:"]
    for work in WORK_CLASSES:
        targets = DEFAULT_TARGETS[work]
        if targets.token_s is None or targets.first_token_s is None:
            said = "no targets; cost is what counts"
        else:
            said = (
                f"{targets.token_s * 1e3:g} ms a token with {targets.concurrency} requests at once "
                f"(--concurrency), {targets.first_token_s * 1e3:g} ms to the first"
            )
        for text in (_MEANING[work], said):
            first = f"  {work:12s} " if text is _MEANING[work] else " " * 15
            lines += textwrap.wrap(text, 78, initial_indent=first, subsequent_indent=" " * 15)
    lines += ["", "prices are per hour of one GPU, in any currency; --price overrides --prices."]
    return "\n".join(lines)


def run_plan(options: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """Return what the command prints. Raises `ConfigError` or `StartError`."""
    try:
        gpus = gpus_of(options.gpu)
        goal = goal_of(options)
        check_draft(options.draft)
        shape = load_shape(goal.model, environ)
        comparison = compare(goal, shape, gpus)
    except RequestError as error:
        raise ConfigError(f"doherty plan: {error}") from error
    except PlanError as error:
        raise StartError(f"doherty plan: {error}") from error
    pool = pool_of(comparison.best, options.name)
    if options.json:
        values = json_report(comparison, pool)
        return json.dumps(values, indent=2)
    return text_report(comparison, pool).rstrip("\n")


def gpus_of(text: str) -> tuple[Gpu, ...]:
    if text == "all":
        return tuple(GPUS.values())
    names = [name.strip().lower() for name in text.split(",")]
    return tuple(gpu_named(name) for name in dict.fromkeys(names))


def goal_of(options: argparse.Namespace) -> Goal:
    """Return what the command line asks for, with its class's targets where it is silent."""
    defaults = DEFAULT_TARGETS[options.work]
    token_s = defaults.token_s if options.tpot_ms is None else options.tpot_ms / 1e3
    first_s = defaults.first_token_s if options.ttft_ms is None else options.ttft_ms / 1e3
    if options.context and options.context < options.prompt_tokens + options.answer_tokens:
        raise RequestError(
            f"--context {options.context} is shorter than a request of "
            f"{options.prompt_tokens} + {options.answer_tokens} tokens; lower --prompt-tokens"
        )
    if options.accept_length is not None:
        check_length(options.accept_length, CHAIN_TOKENS)
        if options.draft == "none" or (options.work != "online" and not options.draft):
            raise RequestError(
                "--accept-length counts only with a draft; add --draft auto or MODEL"
            )
    return Goal(
        model=_model_of(options.model),
        work=options.work,
        gpus_per_node=options.gpus_per_node,
        prompt_tokens=options.prompt_tokens,
        answer_tokens=options.answer_tokens,
        context_tokens=options.context,
        concurrency=options.concurrency or defaults.concurrency,
        token_target_s=token_s,
        first_token_target_s=first_s,
        engine=options.engine,
        draft=options.draft,
        accept_length=options.accept_length or 0.0,
        as_shipped=options.format == "shipped",
        kv_fp8=options.kv_dtype == "fp8",
        prices_per_hour=_prices(options.prices, options.price),
    )


def _model_of(given: str) -> str:
    """Return the model as an engine takes it: the folder, where its file was named."""
    path = Path(given)
    if path.name == "config.json" and path.expanduser().is_file():
        path = path.parent
        given = str(path)
    return str(path.expanduser()) if given.startswith("~") else given


def check_draft(draft: str) -> None:
    """Refuse what is neither a folder of a model nor could be a hub id. Raises `RequestError`."""
    if draft in ("", "none", "auto"):
        return
    folder = Path(draft).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RequestError(f"--draft {draft}: the folder has no config.json")
    elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", draft):
        raise RequestError(
            f"--draft {draft}: there is no such folder, and it is no hub id (OWNER/NAME); "
            "auto takes one that is known, none leaves it away"
        )


def pool_of(plan: Plan, name: str | None) -> Pool:
    """Return the pool that the plan describes."""
    model = plan.goal.model.rstrip("/")
    stem = re.sub(r"[^A-Za-z0-9._:-]+", "-", Path(model).name).lstrip("-._:") or "model"
    return Pool(
        name=name or stem[:128],
        engine=plan.replica.engine,
        model_path=model,
        replicas=plan.replicas,
        args=plan.args,
        gpus=plan.replica.gpus,
        limits=plan.limits,
        serves_jobs=plan.goal.work == "offline" and plan.replica.engine == "vllm",
        gpu_price_per_hour=plan.goal.prices_per_hour.get(plan.replica.gpu.name),
    )


def load_shape(model: str, environ: Mapping[str, str]) -> ModelShape:
    """Return the shape of the model at or named `model`. Raises `RequestError`."""
    folder = find_model(model, environ)
    config = _read(folder / "config.json")
    if "quantization_config" not in config and (folder / "hf_quant_config.json").is_file():
        quantization = _read(folder / "hf_quant_config.json")
        config["quantization_config"] = {"quant_method": "modelopt", **quantization}
    context = config.get("max_position_embeddings")
    if isinstance(context, float):  # some tools write whole numbers so
        config["max_position_embeddings"] = int(context)
    return read_shape(config, _stored_bytes(folder))


def find_model(model: str, environ: Mapping[str, str]) -> Path:
    """Return the folder of a model: as given, or its newest snapshot in the hub's cache."""
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise RequestError(f"{model}: the folder has no config.json; give one of a model")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise RequestError(f"{model}: there is no such folder, and it is no hub id either")
    cache = _hub_cache(environ)
    snapshots = cache / f"models--{model.replace('/', '--')}" / "snapshots"
    main = snapshots.parent / "refs" / "main"
    if main.is_file():
        found = snapshots / main.read_text(encoding="utf-8").strip()
        if (found / "config.json").is_file():
            return found
    held = sorted(snapshots.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
    if held:
        return held[-1].parent
    raise RequestError(
        f"{model}: neither a folder nor in the hub's cache ({cache}); nothing is fetched here: "
        f"run `hf download {model} config.json`, or give a folder with a config.json"
    )


def _hub_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder that huggingface_hub caches in, by its own order of variables."""
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser() / "hub"
    base = environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path(environ.get("HOME", "~")).expanduser() / ".cache"
    return home / "huggingface" / "hub"


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > INDEX_BYTES_MAX:
            raise RequestError(f"{path} is too large to be a model's configuration")
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise RequestError(f"{path} is not a JSON object: {error}") from error


def _stored_bytes(folder: Path) -> int:
    """Return the size of the checkpoint: as its index says, else of its files; 0 if it is away."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        metadata = _read(index).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if isinstance(total, int | float) and total > 0:
            return int(total)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _prices(path: str | None, given: Sequence[str]) -> dict[str, float]:
    """Return the price of each GPU type: the file's, and over them the command line's."""
    found: dict[str, float] = {}
    if path is not None:
        flag = f"--prices {path}:"
        try:
            read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RequestError(f"{flag} cannot be read: {error}") from error
        if not isinstance(read, dict):
            raise RequestError(f"{flag} one line a GPU type, such as `h200: 3.20`")
        for name, value in read.items():
            found[gpu_named(str(name), flag).name] = _price(f"{flag} {name}", value)
    for text in given:
        name, equals, price = text.partition("=")
        if not equals:
            raise RequestError(f"--price {text}: write TYPE=PER_HOUR, such as h200=3.20")
        found[gpu_named(name, "--price").name] = _price(f"--price {name}", price)
    return found


def _price(name: str, value: object) -> float:
    try:
        price = float(str(value))
    except ValueError:
        price = -1.0
    if not 0 < price < 1e6:
        raise RequestError(f"{name}: '{value}' is no price per hour")
    return price


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
    return value
