"""The flags of `doherty simulator` and the settings that they make.

Flags go by vLLM's names; where SGLang calls the same thing otherwise, its name is understood too,
so that a manager can start a simulator by the line it would start the engine with. What is left of
that line and means nothing here is left out (`ignored`).
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from backends.arguments import at_least, port_number
from backends.command_words import WORDS
from backends.simulator.faults import FaultError, parse_fault
from backends.simulator.kv_events import Dialect, Endpoint
from backends.simulator.profiles import PROFILES, Profile, parse_profile
from backends.simulator.settings import (
    CHAT_TOKENS_DEFAULT,
    COMPLETION_TOKENS_DEFAULT,
    VERSIONS,
    Settings,
)
from proxy.help_form import dress

KEEP_ALIVE_VARIABLE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
HEALTH_VARIABLE = "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"
NOTICE_S = 4.0  # SGLang 0.5.17 on an H200, measured: it awaits the first token before it looks
OVERRIDES_VARIABLE = "SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES"
LORA_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"

_DESCRIPTION = f"""\
Run one engine server that needs no GPU, in the manners of vLLM or SGLang.

It has continuous batching, a KV cache with prefix hits, and the speed of a real
engine. Tokens are groups of four bytes; answers are made-up words, the same
for the same prompt. Without max_tokens a completion has at most {COMPLETION_TOKENS_DEFAULT} tokens
and a chat answer {CHAT_TOKENS_DEFAULT}, where a real engine would fill the context."""

_EPILOG = """\
faults: refuse, status:N, delay:S, stall:N, cut:N, garbage:N, error:N, exit:N
(N chunks are sent before), slow:F, sick; each may end in :p=0.1 (chance) and
:times=3 (at most so often). They can be changed at run time: POST
/simulator/faults {"faults": ["cut:3:p=0.1"]}. Internals: GET /simulator/state."""

# Switches of launch lines whose effect is always on here.
_ALWAYS_ON = (
    "--enable-prompt-tokens-details",
    "--enable-cache-report",
    "--enable-metrics",
    "--enable-prefix-caching",
    "--enable-chunked-prefill",
    "--enable-memory-saver",
    "--enable-weights-cpu-backup",
)


class EventsConfig(msgspec.Struct):
    """`--kv-events-config` of both engines."""

    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    topic: str = ""
    enable_kv_cache_events: bool = True
    publisher: str | None = "zmq"


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 on")
    return float(text)


def _factor(text: str) -> float:
    value = _seconds(text)
    if not 1e-3 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0.001 and 1000000")
    return value


def _profile(text: str) -> Profile:
    if text in PROFILES:
        return PROFILES[text]
    if not text.endswith(".json"):
        known = ", ".join(sorted(PROFILES))
        raise argparse.ArgumentTypeError(f"no profile '{text}'; there are {known}, or a .json file")
    try:
        return parse_profile(Path(text).read_bytes())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def _fault(text: str) -> str:
    try:
        parse_fault(text)
    except FaultError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="doherty simulator", allow_abbrev=False)
    add_flags(parser)
    dress(parser, WORDS["simulator"])
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all that the simulator takes, and say what it is."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    _add_identity(parser.add_argument_group("identity"))
    _add_speed(parser.add_argument_group("speed"))
    _add_capacity(parser.add_argument_group("capacity"))
    _add_manners(parser.add_argument_group("manners"))
    for flag in _ALWAYS_ON:
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)


def _add_identity(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="address to listen on (%(default)s)"
    )
    group.add_argument(
        "--port",
        type=port_number,
        default=30000,
        metavar="PORT",
        help="port; 0 takes a free one (%(default)s)",
    )
    group.add_argument(
        "--model", "--model-path", default="demo", metavar="NAME", help="name of the model"
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names it answers to instead",
    )
    group.add_argument(
        "--lora-modules",
        "--lora-paths",
        nargs="+",
        metavar="NAME",
        default=[],
        help="further names, each with its own cache",
    )
    group.add_argument(
        "--enable-lora", action="store_true", help="room for adapters that come at run time"
    )
    group.add_argument(
        "--dialect", choices=("vllm", "sglang"), default="vllm", help="whose manners (%(default)s)"
    )
    group.add_argument(
        "--task", choices=("generate", "embed"), default="generate", help="what the model does"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="bearer token that clients must present",
    )


def _add_speed(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--profile",
        type=_profile,
        default="h200-8b",
        metavar="NAME",
        help=f"model and GPU: {', '.join(sorted(PROFILES))}, or a .json file (%(default)s)",
    )
    add(
        "--time-scale",
        type=_factor,
        default=1.0,
        metavar="FACTOR",
        help="simulated seconds per real second: 10 is ten times faster than the GPU",
    )
    add(
        "--mean-output-tokens",
        type=_seconds,
        metavar="N",
        default=0.0,
        help="answers end by themselves after so many tokens on average (0: never)",
    )
    add(
        "--seed",
        "--random-seed",
        type=at_least(0),
        metavar="N",
        default=0,
        help="for words and faults",
    )
    add(
        "--startup-seconds",
        type=_seconds,
        metavar="S",
        default=0.0,
        help="simulated time until it serves",
    )
    add(
        "--start-tables-mib",
        type=at_least(0),
        metavar="N",
        default=0,
        help="real work before it serves: tables of this size; 1024 take some 40 s (%(default)s)",
    )


def _add_capacity(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--block-size",
        "--page-size",
        type=at_least(1),
        metavar="N",
        default=16,
        help="tokens of a KV block",
    )
    add(
        "--kv-cache-tokens",
        "--max-total-tokens",
        type=at_least(1),
        metavar="N",
        default=0,
        help="size of the KV cache (the profile's)",
    )
    add(
        "--data-parallel-size",
        "--dp-size",
        type=at_least(1),
        metavar="N",
        default=1,
        help="ranks, each with such a cache; X-Data-Parallel-Rank names one (%(default)s)",
    )
    add(
        "--max-num-seqs",
        "--max-running-requests",
        type=at_least(1),
        metavar="N",
        default=1024,
        help="sequences computed at once (%(default)s)",
    )
    add(
        "--max-num-batched-tokens",
        "--chunked-prefill-size",
        type=at_least(1),
        metavar="N",
        default=8192,
        help="tokens of a step (%(default)s)",
    )
    add(
        "--max-model-len",
        "--context-length",
        type=at_least(2),
        metavar="N",
        default=0,
        help="prompt and answer together (the profile's)",
    )


def _add_manners(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--scheduling-policy",
        choices=("fcfs", "priority"),
        default="fcfs",
        help="who is next (%(default)s)",
    )
    add("--enable-priority-scheduling", action="store_true", help="SGLang's word for the same")
    add("--schedule-low-priority-values-first", action="store_true", help="as vLLM always does")
    add(
        "--stream-interval",
        type=at_least(1),
        metavar="N",
        default=1,
        help="tokens of a chunk (%(default)s)",
    )
    add(
        "--kv-events-port",
        type=port_number,
        metavar="PORT",
        help="publish KV events here; 0 takes a free port",
    )
    add("--kv-events-replay-port", type=port_number, metavar="PORT", help="replay them here")
    add(
        "--kv-events-config",
        metavar="JSON",
        help="the same as the engines' JSON; an endpoint of all interfaces means --host",
    )
    add("--enable-sleep-mode", action="store_true", help="vLLM's /sleep, /wake_up, /is_sleeping")
    add("--enable-server-load-tracking", action="store_true", help="count in /load")
    add("--enable-request-id-headers", action="store_true", help="echo X-Request-Id")
    add(
        "--shutdown-timeout",
        type=_seconds,
        metavar="S",
        default=0.0,
        help="vLLM: real seconds that requests may take after SIGTERM (%(default)s)",
    )
    add(
        "--drain-poll-seconds",
        type=_seconds,
        metavar="S",
        default=5.0,
        help="SGLang: simulated pause between its looks whether it is idle (%(default)s)",
    )
    add(
        "--notice-seconds",
        type=_seconds,
        metavar="S",
        default=NOTICE_S,
        help="SGLang: until it sees that a client has left before its answer began (%(default)s)",
    )
    add(
        "--keep-alive-timeout",
        type=_seconds,
        metavar="S",
        default=None,
        help=f"real seconds an idle connection stays open ({KEEP_ALIVE_VARIABLE}, else 5)",
    )
    add(
        "--fault",
        type=_fault,
        action="append",
        default=[],
        metavar="FAULT",
        help="misbehave, see below",
    )


def _endpoint(flags: argparse.Namespace, fail: Callable[[str], NoReturn]) -> Endpoint | None:
    """Return where KV events go; None: nowhere."""
    if flags.kv_events_config is None:
        if flags.kv_events_port is None:
            return None
        return Endpoint(
            host=flags.host, port=flags.kv_events_port, replay_port=flags.kv_events_replay_port
        )
    try:
        config = msgspec.json.decode(flags.kv_events_config, type=EventsConfig)
    except msgspec.DecodeError as error:
        fail(f"--kv-events-config: {error}")
    if not config.enable_kv_cache_events or config.publisher != "zmq":
        return None
    host, port = _split(config.endpoint, flags.host, fail)
    replay_port = None
    if config.replay_endpoint:
        _, replay_port = _split(config.replay_endpoint, flags.host, fail)
    return Endpoint(host=host, port=port, replay_port=replay_port, topic=config.topic)


def _updates_loras(flags: argparse.Namespace) -> bool:
    """Say whether adapters may come and go: vLLM wants a word of the environment beside room."""
    room = flags.enable_lora or bool(flags.lora_modules)
    return room and (flags.dialect == "sglang" or _says_yes(LORA_VARIABLE))


def _says_yes(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() in ("1", "true")


def _split(endpoint: str, host: str, fail: Callable[[str], NoReturn]) -> tuple[str, int]:
    match = re.fullmatch(r"tcp://(?:\[::ffff:([0-9.]+)\]|([^:]+)):([0-9]{1,5})", endpoint)
    if match is None or int(match[3]) > 65535:
        fail(f"--kv-events-config: '{endpoint}' is not like tcp://*:5557")
    return match[1] or match[2].replace("*", host), int(match[3])


def _ignore(dialect: Dialect, rest: list[str], fail: Callable[[str], NoReturn]) -> None:
    """Let pass what the engine would understand. The table of its flags is read only then."""
    from backends.simulator.ignored import problem_of  # noqa: PLC0415  # 60 ms of every start

    problem = problem_of(dialect, VERSIONS[dialect], rest)
    if problem:
        fail(problem)


def parse_flags(argv: list[str]) -> Settings:
    """Return the settings; exits with a message when they make no sense."""
    parser = _parser()
    flags, rest = parser.parse_known_args(argv)
    if rest:
        _ignore(flags.dialect, rest, parser.error)
    keep_alive_s: float = flags.keep_alive_timeout
    if flags.keep_alive_timeout is None:
        try:
            keep_alive_s = _seconds(os.environ.get(KEEP_ALIVE_VARIABLE) or "5")
        except argparse.ArgumentTypeError as error:
            parser.error(f"{KEEP_ALIVE_VARIABLE}: {error}")
    settings = Settings(
        host=flags.host,
        port=flags.port,
        models=tuple(flags.served_model_name) or (flags.model,),
        adapters=tuple(name.partition("=")[0] for name in flags.lora_modules),
        lora_updates=_updates_loras(flags),
        dialect=flags.dialect,
        task=flags.task,
        profile=flags.profile,
        time_scale=flags.time_scale,
        block_tokens=flags.block_size,
        kv_cache_tokens=flags.kv_cache_tokens,
        dp_size=flags.data_parallel_size,
        sequences_max=min(flags.max_num_seqs, flags.max_num_batched_tokens),
        batched_tokens_max=flags.max_num_batched_tokens,
        model_tokens_max=flags.max_model_len,
        stream_interval=flags.stream_interval,
        priorities=flags.scheduling_policy == "priority" or flags.enable_priority_scheduling,
        low_priority_first=flags.schedule_low_priority_values_first,
        mean_output_tokens=flags.mean_output_tokens,
        seed=flags.seed,
        sleep_mode=flags.enable_sleep_mode,
        load_tracking=flags.enable_server_load_tracking,
        echo_request_id=flags.enable_request_id_headers,
        health_generation=_says_yes(HEALTH_VARIABLE),
        header_overrides=flags.dialect == "sglang" and _says_yes(OVERRIDES_VARIABLE),
        notice_s=flags.notice_seconds if flags.dialect == "sglang" else 0.0,
        api_keys=tuple(flags.api_key),
        kv_events=_endpoint(flags, parser.error),
        startup_s=flags.startup_seconds,
        tables_mib=flags.start_tables_mib,
        shutdown_timeout_s=flags.shutdown_timeout,
        drain_poll_s=flags.drain_poll_seconds,
        keep_alive_timeout_s=keep_alive_s,
        faults=tuple(flags.fault),
    )
    events = settings.kv_events
    if settings.dp_size > 1 and events and (events.port == 0 or events.replay_port == 0):
        parser.error("ranks have consecutive ports for their KV events: name the first")
    if settings.kv_blocks_max < 1:
        parser.error("--kv-cache-tokens must hold at least one block of --block-size tokens")
    return settings
