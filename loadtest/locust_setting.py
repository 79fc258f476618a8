"""The options of `locustfile.py`, which needs this file, and what follows from them alone.

How many users there are when (`users_at`), and whether the results keep the limits that were given
(`broken_limits`), are functions of the options and of figures; Locust is not needed to try them.
`first_model` asks the server once, before the load, so that a wrong URL or key is one clear line.
"""

from __future__ import annotations

import json
import logging
import math
from argparse import BooleanOptionalAction, Namespace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from loadtest.locust_answers import error_code

SHAPES = ("steady", "burst", "steps", "day")
PROBE_TIMEOUT_S = 10.0
_MORE_THAN_0 = (
    *("prompt_tokens", "output_tokens", "turns", "batch_lines", "steps", "day_s"),
    *("burst_factor", "timeout_s"),
)
DAY_LOW = 0.1  # users at night, as a share of those at noon

_log = logging.getLogger(__name__)


def add_options(parser: Any) -> None:
    """Add to Locust's parser; on its page are those that may change from run to run."""
    _add_load(parser.add_argument)
    _add_judgement(parser.add_argument)
    _add_shape(parser.add_argument)


def _add_load(add: Any) -> None:
    key = {"env_var": "OPENAI_API_KEY", "include_in_web_ui": False}
    add("--model", default="", help="default: the first of /v1/models")
    add("--api-key", default="", help="bearer token; better given by OPENAI_API_KEY", **key)
    add("--prompt-tokens", type=int, default=200, help="new words in each turn of a user")
    add("--output-tokens", type=int, default=100, help="max_tokens of an answer")
    add("--ignore-eos", action="store_true", help="engines go on to --output-tokens (vLLM, SGLang)")
    add("--turns", type=int, default=4, help="requests of a chat; its history grows with each")
    add("--system-tokens", type=int, default=400, help="words of a chat's system message")
    add("--shared-prefix", type=float, default=1.0, help="share of chats that have the same one")
    add("--think-s", type=float, default=2.0, help="mean pause between two turns (exponential)")
    add("--stream", action=BooleanOptionalAction, default=True, help="stream answers")
    add("--session-header", default="", help="header that names the chat, such as x-session-id")
    add("--served-by-header", default="", help="answer's header that errors show: who served it")
    add("--timeout-s", type=float, default=600.0, help="longest silence of the server")
    add("--batch-lines", type=int, default=100, help="requests of a batch job")
    seed = "same texts again: their prefixes may still be cached from the last time"
    add("--seed", default="", help=seed, include_in_web_ui=False)


def _add_judgement(add: Any) -> None:
    add("--slo-ttft-ms", type=float, default=400.0, help="of an answer that counts as good")
    add("--slo-tpot-ms", type=float, default=50.0, help="likewise, for each further token")
    hidden = {"type": float, "include_in_web_ui": False}
    add("--fail-ttft-p99-ms", help="exit with 1 when the TTFT's p99 is over it", **hidden)
    add("--fail-error-ratio", help="exit with 1 when a greater share fails", **hidden)
    add("--fail-goodput-ratio", help="exit with 1 when a smaller share is good", **hidden)


def _add_shape(add: Any) -> None:
    about = "users over time, of which -u is the base: steady; burst: times --burst-factor;"
    about += " steps: up to -u over -t; day: from few to -u and back"
    add("--shape", choices=SHAPES, default="steady", help=about, include_in_web_ui=False)
    hidden = {"type": float, "include_in_web_ui": False}
    add("--burst-factor", default=10.0, help="users of a burst, times -u", **hidden)
    add("--burst-every-s", default=120.0, help="from one to the next; the base first", **hidden)
    add("--burst-s", default=30.0, help="how long one lasts", **hidden)
    add("--steps", type=int, default=5, help="of --shape steps", include_in_web_ui=False)
    add("--day-s", default=600.0, help="length of a day", **hidden)


def complaint(options: Namespace) -> str:
    """Return what is wrong with the options, in a line; empty when nothing is."""
    if not 0 <= options.shared_prefix <= 1:
        return f"--shared-prefix {options.shared_prefix:g}: expected a share, 0 to 1"
    for name in _MORE_THAN_0:
        if not 0 < getattr(options, name) < math.inf:  # NaN is neither
            return f"--{name.replace('_', '-')} {getattr(options, name):g}: expected more than 0"
    if not 0 <= options.think_s < math.inf:
        return f"--think-s {options.think_s:g}: expected 0 or more"
    if not 0 < options.burst_s <= options.burst_every_s:
        return f"--burst-s {options.burst_s:g}: expected at most --burst-every-s, and more than 0"
    if not options.stream and (
        options.fail_ttft_p99_ms is not None or options.fail_goodput_ratio is not None
    ):
        return "--no-stream: no first token is seen, so only --fail-error-ratio can be judged"
    return ""


def base_of(host: str) -> str:
    """Accept what clients call their base URL, too: `http://host/v1`."""
    return host.rstrip("/").removesuffix("/v1")


def key_headers(options: Namespace) -> dict[str, str]:
    return {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}


def first_model(host: str, options: Namespace) -> str:
    """Ask the server for its models. Raises `ValueError` with one line that says what is wrong."""
    url = f"{base_of(host)}/v1/models"
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--host {host}: expected a URL such as http://127.0.0.1:8000")
    try:
        asked = Request(url, headers=key_headers(options))  # noqa: S310 - the user's own URL
        with urlopen(asked, timeout=PROBE_TIMEOUT_S) as answer:  # noqa: S310
            names = [str(model["id"]) for model in json.load(answer)["data"]]
    except HTTPError as error:
        hint = "; give the key by OPENAI_API_KEY" if error.code in (401, 403) else ""
        raise ValueError(f"{url}: {error_code(error.code, error.read())}{hint}") from None
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{url}: {reason}; is the server up, and --host right?") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{url}: not a list of models; is --host an OpenAI API?") from None
    if options.model and options.model not in names:  # it may be another name of one
        _log.warning("--model %s is not among the server's: %s", options.model, ", ".join(names))
    if not (options.model or names):
        raise ValueError(f"{url}: the server has no model yet; wait, or give --model")
    return options.model or names[0]


def users_at(options: Namespace, elapsed_s: float) -> int | None:
    """Return how many users there are so long after the start; None: the test is over."""
    base, end_s = int(options.num_users or 1), float(options.run_time or 0)
    if end_s and elapsed_s >= end_s:
        return None
    if options.shape == "burst":
        # The base comes first, so that a burst can be told from a start.
        in_burst = elapsed_s % options.burst_every_s >= options.burst_every_s - options.burst_s
        return max(1, round(base * (float(options.burst_factor) if in_burst else 1)))
    if options.shape == "steps":
        step_s = (end_s or 60 * options.steps) / int(options.steps)
        step = min(int(options.steps), int(elapsed_s // step_s) + 1)
        return max(1, math.ceil(base * step / int(options.steps)))
    if options.shape == "day":
        swing = (1 - math.cos(2 * math.pi * elapsed_s / options.day_s)) / 2
        return max(1, round(base * (DAY_LOW + (1 - DAY_LOW) * swing)))
    return base


def limits_given(options: Namespace) -> bool:
    limits = (options.fail_ttft_p99_ms, options.fail_error_ratio, options.fail_goodput_ratio)
    return any(limit is not None for limit in limits)


def broken_limits(
    options: Namespace, *, ttft_p99_ms: float | None, error_ratio: float | None, good_ratio: float
) -> list[str]:
    """Return which of the --fail-... limits do not hold; None: there was nothing to judge by."""
    broken = []
    limit = options.fail_ttft_p99_ms
    if limit is not None and (ttft_p99_ms is None or ttft_p99_ms > limit):
        seen = "no first token seen" if ttft_p99_ms is None else f"TTFT p99 {ttft_p99_ms:g} ms"
        broken.append(f"{seen} (--fail-ttft-p99-ms {limit:g})")
    limit = options.fail_error_ratio
    if limit is not None and (error_ratio is None or error_ratio > limit):
        seen = "no request answered" if error_ratio is None else f"errors {error_ratio:.2%}"
        broken.append(f"{seen} (--fail-error-ratio {limit:g})")
    limit = options.fail_goodput_ratio
    if limit is not None and good_ratio < limit:
        broken.append(f"good {good_ratio:.2%} (--fail-goodput-ratio {limit:g})")
    return broken
