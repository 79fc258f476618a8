"""Real prompts as jobs: the requests as values, and a rehearsal of the run with a few of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.formats import read_trace
from loadtest.offline.jobs import Row, Setting, first_turns, prompts, questions, second_turns, shown


def test_each_question_has_two_turns_and_the_second_follows_the_answer() -> None:
    asked = questions()
    assert len(asked) == 80
    assert {len(turns) for turns in asked} == {2}
    answers = {
        f"line-{number}": {"choices": [{"message": {"content": f"answer {number}"}}]}
        for number in range(80)
    }
    first, second = first_turns(asked), second_turns(asked, answers)
    assert first[7]["messages"] == [{"role": "user", "content": asked[7][0]}]
    assert second[7]["messages"] == [
        {"role": "user", "content": asked[7][0]},
        {"role": "assistant", "content": "answer 7"},
        {"role": "user", "content": asked[7][1]},
    ]


def test_the_agents_prompts_are_whole_and_their_beginnings_shared() -> None:
    made = prompts(read_trace("miniswe"))
    assert len(made) == 402
    beginnings = {str(request["messages"])[:2000] for request in made}
    assert len(beginnings) <= 20, "as many as there are runs"
    assert all(isinstance(request["max_tokens"], int) for request in made)


def test_few_of_them_go_through_a_whole_doherty(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["offline", "jobs", "--limit", "6", "--profile", "fast"]) == 0
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row[:9].strip() for row in rows] == ["mtbench 1", "mtbench 2", "miniswe"]
    assert [row[12:].split()[:2] for row in rows] == [["6", "0"]] * 3


def test_what_is_wrong_is_shown_and_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row(
        job="miniswe",
        lines=4,
        wrong=1,
        prompt_tokens=100,
        cached_tokens=25,
        completion_tokens=100,
        seconds=2.0,
    )
    assert shown(Setting(), [row]).splitlines()[-1].split() == (
        ["miniswe", "4", "1", "100", "25.0%", "100", "2.00", "100"]
    )

    async def measured(_setting: Setting, _folder: Path) -> list[Row]:
        return [row]

    monkeypatch.setattr("loadtest.offline.jobs.measure", measured)
    assert main(["offline", "jobs"]) == 1
    assert main(["offline", "jobs", "--limit", "-1"]) == 2
    assert "expected 0 or more" in capsys.readouterr().err
