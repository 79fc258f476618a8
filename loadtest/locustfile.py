"""Load for any OpenAI-compatible server, by Locust: chats, completions, embeddings, batch jobs.

    pip install locust
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000         # page on port 8089
    locust -f loadtest/locustfile.py --host URL --headless -u 50 -r 10 -t 5m --html report.html
    locust -f loadtest/locustfile.py --host URL --headless -u 5 -t 5m --shape burst
    locust -f loadtest/locustfile.py --host URL --headless -t 5m ChatUser BatchUser

It needs Locust and, beside it in a folder `loadtest`, `locust_answers.py` and `locust_setting.py`:
copy the three where you like. The key is `OPENAI_API_KEY`.

The rows of the table, by route:

    POST   one request: from the first byte sent to the last one read; its failures are by code
    TTFT   ms until the first token of a stream
    TPOT   ms for each further token: (last - first token) / (tokens - 1)
    GOOD   answers whose TTFT and TPOT met --slo-ttft-ms and --slo-tpot-ms; its req/s is the goodput
    JOB    a batch: from the upload until every line has come back once

`Aggregated` counts requests alone: the other rows are further measures of the same answers, and
would be counted as requests if they were fired as such.

Locust's users form a *closed* loop: a user who waits for an answer asks nothing, so a server that
stalls gets less load, and its stall is in fewer figures than strangers would have suffered. Use it
for sessions and for shapes of load; for arrivals that wait for nobody replay a trace.
"""

from __future__ import annotations

# Without @override, which Python 3.11 has only from a further package.
# mypy: disable-error-code="explicit-override"
import json
import logging
import random
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from locust import FastHttpUser, LoadTestShape, events, task
from locust.contrib.fasthttp import ResponseContextManager
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import WorkerRunner
from locust.stats import RequestStats, StatsEntry, StatsError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever Locust is started

from loadtest.locust_answers import Answer, error_code, form_of, lines_wrong
from loadtest.locust_setting import (
    add_options,
    base_of,
    broken_limits,
    complaint,
    first_model,
    key_headers,
    limits_given,
    users_at,
)

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
FILES, BATCHES = "/v1/files", "/v1/batches"
DRAIN_S = 60  # answers that are open at the end of a test: cut off, the long ones would not count
JOB_ENDED = ("completed", "failed", "expired", "cancelled")
# Words that usual vocabularies have as one token, with the space before them.
TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book"
)
WORDS = TEXT.split()

_log = logging.getLogger("locustfile")
_tokens: Counter[str] = Counter()  # of this process, since the last report to the master


def options_of(environment: Environment) -> Namespace:
    options = environment.parsed_options
    assert isinstance(options, Namespace)
    return options


class Shape(LoadTestShape):
    """Users over time as --shape says. Abstract, so that Locust takes it only when told to."""

    abstract = True

    def __init__(self, options: Namespace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._options = options

    def tick(self) -> tuple[int, float] | None:
        users = users_at(self._options, self.get_run_time())  # type: ignore[no-untyped-call]
        # All at once: a ramp would be another shape, and Locust holds the next tick until its end.
        return None if users is None else (users, float(max(users, self._options.spawn_rate or 1)))


def record(stats: RequestStats, kind: str, route: str, ms: float, error: str = "") -> None:
    """Add to a row of its own, and not to the sum of all requests."""
    entry = stats.get(route, kind)
    entry.log(ms, 0)  # type: ignore[arg-type]  # it takes parts of milliseconds
    if error:
        entry.log_error(error)
        key = StatsError.create_key(kind, route, error)
        stats.errors.setdefault(key, StatsError(kind, route, error)).occurred()


# --- users ----------------------------------------------------------------------------------------


class OpenAIUser(FastHttpUser):
    """What all users have: a model, a key, texts of their own."""

    abstract = True
    host = "http://127.0.0.1:8000"

    def __init__(self, environment: Environment) -> None:
        self.options = options_of(environment)
        self.host = base_of(self.host or OpenAIUser.host)
        self.network_timeout = self.options.timeout_s
        super().__init__(environment)
        self.random = random.Random(self.options.seed and f"{self.options.seed} {_next_user()}")
        self.model = ""

    def on_start(self) -> None:
        try:
            self.model = self.options.model or _model_of(self.host or "", self.options)
        except ValueError as error:
            _log.error("%s", error)
            record(self.environment.stats, "GET", "/v1/models", 0, str(error))
            raise StopUser from None

    def wait_time(self) -> float:
        mean_s = self.options.think_s
        return self.random.expovariate(1 / mean_s) if mean_s > 0 else 0.0

    def words(self, count: int) -> str:
        return " ".join(self.random.choices(WORDS, k=count))

    def ask(self, route: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> str:
        """Send a request for a completion and measure it. Returns the text; empty if it failed."""
        options, stream = self.options, bool(self.options.stream)
        body = {"model": self.model, **body, "max_tokens": options.output_tokens, "stream": stream}
        if options.ignore_eos:
            body["ignore_eos"] = True
        if stream:
            body["stream_options"] = {"include_usage": True}
        start_s = time.perf_counter()
        given = {**key_headers(options), **(headers or {})}
        with self.client.post(
            route, json=body, headers=given, stream=stream, catch_response=True
        ) as response:
            answer = read_answer(response, stream=stream)
            response.request_meta["response_time"] = (time.perf_counter() - start_s) * 1000
            if answer.error:
                response.failure(f"{answer.error}{self._served_by(response)}")
                return ""
            self._measure(route, answer, start_s)
            response.success()
        return "".join(answer.text)

    def _served_by(self, response: ResponseContextManager) -> str:
        name = self.options.served_by_header
        served_by = (response.headers or {}).get(name) if name else None
        return f" (served by {served_by})" if served_by else ""

    def _measure(self, route: str, answer: Answer, start_s: float) -> None:
        details = answer.usage.get("prompt_tokens_details") or {}
        _tokens["prompt"] += answer.usage.get("prompt_tokens") or 0
        _tokens["cached"] += details.get("cached_tokens") or 0
        _tokens["output"] += answer.output_tokens
        if not self.options.stream or not answer.first_s:
            return
        stats = self.environment.stats
        ttft_ms, tpot_ms = (answer.first_s - start_s) * 1000, 0.0
        record(stats, "TTFT", route, ttft_ms)
        if answer.output_tokens > 1:
            tpot_ms = (answer.last_s - answer.first_s) * 1000 / (answer.output_tokens - 1)
            record(stats, "TPOT", route, tpot_ms)
        if ttft_ms <= self.options.slo_ttft_ms and tpot_ms <= self.options.slo_tpot_ms:
            record(stats, "GOOD", route, ttft_ms)


def read_answer(response: ResponseContextManager, *, stream: bool) -> Answer:
    """Read an answer to its end. What is not a whole, good one has an `error`."""
    answer = Answer()
    try:
        if response.status_code == 0:
            answer.error = f"no answer: {getattr(response, 'error', None)}"
        elif response.status_code != 200:
            answer.error = error_code(response.status_code, response.text)
        elif stream and not is_event_stream(response):
            answer.error = "answered without an event stream"
        elif stream:
            while line := response.stream.readline(b"\n"):
                answer.take(bytes(line), time.perf_counter())
            if not (answer.done or answer.error):
                answer.error = "cut: the stream ended without [DONE]"
        else:
            answer.take_value(json.loads(response.text or ""), time.perf_counter())
    except ValueError:
        answer.error = "broken answer: not the API's JSON"
    except Exception as error:  # noqa: BLE001 - the client's errors have no class in common
        # A proxy that loses its engine says so in an event, and then lets the stream break off.
        answer.error = answer.error or f"cut: {type(error).__name__}"
    return answer


def is_event_stream(response: ResponseContextManager) -> bool:
    kind = "" if response.headers is None else response.headers.get("content-type")
    return str(kind).lower().startswith("text/event-stream")


class ChatUser(OpenAIUser):
    """A person who chats: each turn sends the whole history, and thinks before the next."""

    def on_start(self) -> None:
        super().on_start()
        self.messages: list[dict[str, str]] = []
        self.turn = 0

    @task
    def say(self) -> None:
        """One turn. A chat ends after --turns of them, or when one failed."""
        if self.turn == 0:
            self._begin()
        self.messages.append({"role": "user", "content": self.words(self.options.prompt_tokens)})
        named = self.options.session_header
        headers = {named: f"chat-{self.chat}"} if named else None
        text = self.ask(CHAT, {"messages": self.messages}, headers)
        self.messages.append({"role": "assistant", "content": text})
        self.turn = (self.turn + 1) % self.options.turns if text else 0

    def _begin(self) -> None:
        self.chat = f"{self.random.getrandbits(48):012x}"
        shared = self.random.random() < self.options.shared_prefix
        writer = random.Random("system message") if shared else self.random
        system = " ".join(writer.choices(WORDS, k=self.options.system_tokens))
        self.messages = [{"role": "system", "content": system}] if system else []


class CompletionUser(OpenAIUser):
    """A program that completes texts, each of its own."""

    @task
    def complete(self) -> None:
        self.ask(COMPLETIONS, {"prompt": self.words(self.options.prompt_tokens)})


class EmbeddingsUser(OpenAIUser):
    """A program that wants vectors."""

    @task
    def embed(self) -> None:
        body = {"model": self.model, "input": self.words(self.options.prompt_tokens)}
        headers = key_headers(self.options)
        with self.client.post(
            EMBEDDINGS, json=body, headers=headers, catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure(error_code(response.status_code, response.text))


class BatchUser(OpenAIUser):
    """Gives a job of --batch-lines requests, waits for it, and counts: each line once."""

    def on_start(self) -> None:
        super().on_start()
        self.job = ""

    def on_stop(self) -> None:
        if self.job:  # nobody would fetch what it computes
            self._call("POST", f"{BATCHES}/{self.job}/cancel", f"{BATCHES}/ID/cancel")

    @task
    def give_job(self) -> None:
        start_s = time.perf_counter()
        wanted = [f"line-{number}" for number in range(self.options.batch_lines)]
        try:
            lines = self._upload("".join(map(self._line, wanted)))
            asked = {"input_file_id": lines, "endpoint": CHAT, "completion_window": "24h"}
            self.job = self._json("POST", BATCHES, BATCHES, json=asked)["id"]
            problem = lines_wrong(wanted, self._results())
        except ValueError as error:  # it is a row of its own already
            problem = f"not done: {error}"
        self.job = ""
        ms = (time.perf_counter() - start_s) * 1000
        record(self.environment.stats, "JOB", BATCHES, ms, problem)

    def _line(self, custom_id: str) -> str:
        messages = [{"role": "user", "content": self.words(self.options.prompt_tokens)}]
        body = {"model": self.model, "messages": messages, "max_tokens": self.options.output_tokens}
        line = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}
        return json.dumps(line) + "\n"

    def _upload(self, lines: str) -> str:
        """Send a file as a form does (RFC 7578)."""
        mark = f"form-{random.getrandbits(96):024x}"
        form, kind = form_of(lines, mark)
        return str(
            self._json("POST", FILES, FILES, data=form, headers={"Content-Type": kind})["id"]
        )

    def _results(self) -> list[dict[str, Any]]:
        """Wait for the job; return what both of its files say."""
        while True:
            job = self._json("GET", f"{BATCHES}/{self.job}", f"{BATCHES}/ID")
            if job["status"] in JOB_ENDED:
                break
            time.sleep(1.0)
        files = filter(None, (job.get("output_file_id"), job.get("error_file_id")))
        texts = [
            self._call("GET", f"{FILES}/{name}/content", f"{FILES}/ID/content") for name in files
        ]
        return [json.loads(line) for text in texts for line in text.splitlines()]

    def _json(self, method: str, path: str, name: str, **more: Any) -> Any:
        return json.loads(self._call(method, path, name, **more))

    def _call(self, method: str, path: str, name: str, **more: Any) -> str:
        """Return the body. Raises `ValueError` with the error's code when it is not a good one."""
        headers = {**key_headers(self.options), **more.pop("headers", {})}
        with self.client.request(
            method, path, name=name, headers=headers, catch_response=True, **more
        ) as response:
            if response.status_code == 200:
                return response.text or ""
            problem = read_answer(response, stream=False).error
            response.failure(problem)
        raise ValueError(problem)


_models: dict[str, str] = {}
_users_made = 0


def _model_of(host: str, options: Namespace) -> str:
    """Ask once, not once for each user."""
    if host not in _models:
        _models[host] = first_model(host, options)
    return _models[host]


def _next_user() -> int:
    global _users_made  # noqa: PLW0603 - a count of this process
    _users_made += 1
    return _users_made


# --- the run --------------------------------------------------------------------------------------


def _prepare(environment: Environment, **_: Any) -> None:
    """Choose users and shape; find out before the start what would make every request fail."""
    options = options_of(environment)
    if not (options.user_classes or options.class_picker):
        environment.user_classes[:] = [ChatUser]
    environment.stop_timeout = environment.stop_timeout or DRAIN_S
    if isinstance(environment.runner, WorkerRunner):
        return
    if problem := complaint(options):
        _give_up(problem)
    if options.shape != "steady":
        environment.shape_class = Shape(options)
        environment.shape_class.runner = environment.runner
    if options.headless:
        host = base_of(environment.host or OpenAIUser.host)
        try:
            _models[host] = first_model(host, options)
        except ValueError as error:
            _give_up(str(error))
    environment.events.quit.add_listener(lambda **_: print(summary(environment)))


def _give_up(problem: str) -> NoReturn:
    sys.stderr.write(f"locustfile: {problem}\n")
    sys.exit(2)


def _begin(**_: Any) -> None:
    _tokens.clear()


def _report(data: dict[str, Any], **_: Any) -> None:
    data["tokens"] = dict(_tokens)
    _tokens.clear()


def _take_report(data: dict[str, Any], **_: Any) -> None:
    _tokens.update(data.get("tokens") or {})


def rows(environment: Environment, kind: str) -> list[StatsEntry]:
    return [entry for (_, k), entry in environment.stats.entries.items() if k == kind]


def goodput(environment: Environment) -> tuple[int, int]:
    """Return how many answers were good, of how many requests that could have been."""
    asked = [entry for entry in rows(environment, "POST") if entry.name in (CHAT, COMPLETIONS)]
    good = rows(environment, "GOOD")
    return sum(entry.num_requests for entry in good), sum(entry.num_requests for entry in asked)


def broken(environment: Environment) -> list[str]:
    """Return which of the --fail-... limits do not hold."""
    total, (good, asked) = environment.stats.total, goodput(environment)
    waits = [entry.get_response_time_percentile(0.99) for entry in rows(environment, "TTFT")]
    return broken_limits(
        options_of(environment),
        ttft_p99_ms=max(waits, default=None),
        error_ratio=total.fail_ratio if total.num_requests else None,
        good_ratio=good / asked if asked else 0.0,
    )


def summary(environment: Environment) -> str:
    """Return what Locust's own tables do not say."""
    options, total = options_of(environment), environment.stats.total
    wall_s = max(1.0, (total.last_request_timestamp or 0) - total.start_time)
    good, asked = goodput(environment)
    lines = []
    if asked and options.stream:
        lines.append(
            f"goodput: {good} of {asked} requests ({good / asked:.1%}), {good / wall_s:.2f}/s, with"
            f" TTFT <= {options.slo_ttft_ms:g} ms and TPOT <= {options.slo_tpot_ms:g} ms"
        )
    if prompt := _tokens["prompt"]:
        lines.append(
            f"tokens: {prompt} of prompts, {_tokens['cached'] / prompt:.1%} of them from a cache;"
            f" {_tokens['output']} of answers, {_tokens['output'] / wall_s:.1f}/s"
        )
    return "\n".join([*lines, *(f"over the limit: {text}" for text in broken(environment))])


def _judge(environment: Environment, **_: Any) -> None:
    """Where limits are given, they alone decide the exit status; else any failure is a 1."""
    if limits_given(options_of(environment)) and environment.process_exit_code is None:
        environment.process_exit_code = 1 if broken(environment) else 0


events.init_command_line_parser.add_listener(add_options)
events.init.add_listener(_prepare)
events.test_start.add_listener(_begin)
events.report_to_master.add_listener(_report)
events.worker_report.add_listener(_take_report)
events.quitting.add_listener(_judge)
