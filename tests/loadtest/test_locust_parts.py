"""What the locustfile decides without Locust: users over time, limits, what an answer says."""

import json
import math
from argparse import ArgumentParser, Namespace
from typing import Any

import pytest
from typing_extensions import override

from loadtest import locust_setting
from loadtest.locust_answers import Answer, code_of, error_code, form_of, lines_wrong
from loadtest.locust_setting import base_of, broken_limits, complaint, first_model, users_at


class _Parser(ArgumentParser):
    """Locust's parser takes a word more: whether an option is on its page."""

    @override
    def add_argument(self, *args: Any, include_in_web_ui: bool = True, **kwargs: Any) -> Any:
        assert kwargs.pop("env_var", "") or isinstance(include_in_web_ui, bool)
        return super().add_argument(*args, **kwargs)


def options(*argv: str, users: int = 10, run_time: float | None = None) -> Namespace:
    parser = _Parser()
    locust_setting.add_options(parser)
    given = parser.parse_args(argv)
    given.num_users, given.run_time = users, run_time
    return given


def test_a_burst_comes_after_the_base_and_again() -> None:
    burst = options("--shape", "burst", "--burst-every-s", "60", "--burst-s", "10", run_time=130)
    seen = [users_at(burst, at) for at in (0, 49.9, 50, 59.9, 60, 110, 119.9, 120, 130)]
    assert seen == [10, 10, 100, 100, 10, 100, 100, 10, None]
    assert users_at(options("--shape", "burst", "--burst-factor", "0.01"), 100) == 1


def test_steps_end_at_all_users_when_the_run_ends() -> None:
    steps = options("--shape", "steps", "--steps", "4", users=10, run_time=100)
    assert [users_at(steps, at) for at in (0, 24.9, 25, 50, 75, 99.9, 100)] == [
        *(3, 3, 5, 8, 10, 10, None)
    ]


def test_a_day_swings_between_a_tenth_and_all_users_and_does_not_end() -> None:
    day = options("--shape", "day", "--day-s", "100", users=100)
    assert [users_at(day, at) for at in (0, 50, 100, 150, 10_050)] == [10, 100, 10, 100, 100]
    quarter = users_at(day, 25)
    assert quarter is not None
    assert math.isclose(quarter, 55, abs_tol=1)


def test_steady_users_are_as_many_as_were_asked_for() -> None:
    assert [users_at(options(run_time=5), at) for at in (0, 4.9, 5)] == [10, 10, None]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--shared-prefix", "1.5"), "--shared-prefix 1.5"),
        (("--turns", "0"), "--turns 0: expected more than 0"),
        (("--shape", "day", "--day-s", "nan"), "--day-s nan: expected more than 0"),
        (("--burst-factor", "-3"), "--burst-factor -3: expected more than 0"),
        (("--timeout-s", "0"), "--timeout-s 0: expected more than 0"),
        (("--think-s", "-1"), "--think-s -1: expected 0 or more"),
        (("--burst-s", "200"), "at most --burst-every-s"),
        (("--no-stream", "--fail-ttft-p99-ms", "5"), "--no-stream: no first token is seen"),
    ],
)
def test_options_that_contradict_are_named(argv: tuple[str, ...], said: str) -> None:
    assert said in complaint(options(*argv))


def test_a_host_that_is_no_url_is_named() -> None:
    for host in ("nonsense", "file:///etc/passwd", "127.0.0.1:8000"):
        with pytest.raises(ValueError, match=f"--host {host}: expected a URL such as http://"):
            first_model(host, options())


def test_good_options_have_no_complaint() -> None:
    assert complaint(options()) == ""
    assert complaint(options("--no-stream", "--fail-error-ratio", "0")) == ""


def test_limits_break_when_passed_and_when_there_was_nothing_to_judge() -> None:
    limits = options(
        *("--fail-ttft-p99-ms", "100", "--fail-error-ratio", "0.1", "--fail-goodput-ratio", "0.9")
    )
    kept = broken_limits(limits, ttft_p99_ms=100, error_ratio=0.1, good_ratio=0.9)
    assert kept == []
    passed = broken_limits(limits, ttft_p99_ms=101, error_ratio=0.11, good_ratio=0.89)
    assert [text.partition(" (")[0] for text in passed] == [
        *("TTFT p99 101 ms", "errors 11.00%", "good 89.00%")
    ]
    nothing = broken_limits(limits, ttft_p99_ms=None, error_ratio=None, good_ratio=0)
    assert len(nothing) == 3
    assert "no first token seen" in nothing[0]
    assert broken_limits(options(), ttft_p99_ms=None, error_ratio=None, good_ratio=0) == []


def test_a_base_url_may_end_in_v1() -> None:
    assert {base_of(url) for url in ("http://h", "http://h/", "http://h/v1", "http://h/v1/")} == {
        "http://h"
    }


def chunk(**choice: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n"


def test_the_first_token_is_the_first_that_says_something() -> None:
    answer = Answer()
    lines = [
        b": a comment, as from a proxy whose request waits\n",
        chunk(delta={"role": "assistant", "content": ""}),
        b"\n",
        chunk(delta={"reasoning_content": "so"}),
        chunk(delta={"content": "Hello"}),
        chunk(delta={}, finish_reason="stop"),
        b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n',
        b"data: [DONE]\n",
    ]
    for at_s, line in enumerate(lines):
        answer.take(line, float(at_s))
    assert (answer.first_s, answer.last_s) == (3.0, 4.0)
    assert "".join(answer.text) == "soHello"
    assert answer.events == 2
    assert answer.output_tokens == 7
    assert answer.done
    assert answer.error == ""


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'data: {"error": {"code": "replica_lost", "message": "m"}}', "in stream: replica_lost"),
        (b"data: {not json}", "event is not a JSON object of the API"),
        (b"data: [1]", "event is not a JSON object of the API"),
        (b'data: {"choices": [3]}', "event is not a JSON object of the API"),
    ],
)
def test_an_event_can_be_an_error(line: bytes, error: str) -> None:
    answer = Answer()
    answer.take(line, 1.0)
    assert answer.error == error


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ('{"error": {"code": "queue_full", "type": "t"}}', "429 queue_full"),
        ('{"error": {"code": 429, "type": "TooMany"}}', "429 TooMany"),
        ('{"object": "error", "code": 429, "type": "Busy", "message": "m"}', "429 Busy"),
        ('{"detail": "Not Found"}', "429 no code"),
        ('{"error": "plain"}', "429 plain"),
        ("<html>", "429 without a JSON body"),
        (None, "429 without a JSON body"),
    ],
)
def test_errors_are_told_by_code_in_every_engines_shape(body: str | None, code: str) -> None:
    assert error_code(429, body) == code


def test_a_code_has_a_bound() -> None:
    assert len(code_of({"error": {"message": "x" * 1000}})) == 80


def result(custom_id: str, status: int = 200) -> dict[str, object]:
    return {"custom_id": custom_id, "response": {"status_code": status}}


def test_a_jobs_lines_come_each_once_and_well() -> None:
    wanted = ["a", "b", "c"]
    assert lines_wrong(wanted, [result("c"), result("a"), result("b")]) == ""
    wrong = [result("a"), result("a"), result("x"), result("b", 500)]
    assert lines_wrong(wanted, wrong) == (
        "1 lines missing, 1 lines unknown, 1 lines twice, 1 lines failed"
    )
    assert lines_wrong(["a"], [{"custom_id": "a", "response": None}]) == "1 lines failed"


def test_a_form_ends_each_part_where_the_next_begins() -> None:
    form, kind = form_of('{"custom_id": "a"}\n', "mark")
    assert kind == "multipart/form-data; boundary=mark"
    parts = form.split("--mark")
    assert parts[0] == ""
    assert parts[-1] == "--\r\n"
    assert [part.partition("\r\n\r\n")[2] for part in parts[1:-1]] == [
        *("batch\r\n", '{"custom_id": "a"}\n\r\n')
    ]
