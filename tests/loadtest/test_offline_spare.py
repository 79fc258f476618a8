"""The runs about spare capacity: the lab in virtual time, and a rehearsal of the real one."""

from __future__ import annotations

import asyncio
import sys

import msgspec
import pytest

from loadtest.offline import lab, spare
from loadtest.offline.lab import Lab
from loadtest.run import RunError

SHORT = lab.Setting(
    rate=40.0,
    replicas=2,
    seconds=12.0,
    before=2.0,
    profile="fast",
    online_prompt=(20, 60),
    online_answer=(5, 20),
    line_prompt=(20, 60),
    line_answer=(10, 40),
)


def test_the_lab_says_the_same_each_time_and_lines_come_out_in_a_burst() -> None:
    without, with_lines = (Lab(SHORT, lines=lines).run() for lines in (False, True))
    assert Lab(SHORT, lines=True).run() == with_lines
    assert with_lines.requests == without.requests > 300
    assert without.lines == without.cut == 0
    assert with_lines.lines > 20
    assert with_lines.line_tokens_per_s > 50
    burst = msgspec.structs.replace(SHORT, burst=10.0, burst_s=3.0)
    assert Lab(burst, lines=True).run().requests > 1.5 * with_lines.requests


def finding(*, job: bool, p99: float, gap: float = 0.007, lost: tuple[str, ...] = ()) -> object:
    return spare.Finding(
        job=job,
        requests=100,
        lost=lost,
        ttft_p50_s=0.02,
        ttft_p99_s=p99,
        gap_p50_s=0.005,
        gap_p99_s=gap,
        job_tokens_per_s=900.0 * job,
        job_lines=9 * job,
        replica_s=60.0,
    )


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"p99": 0.043}, True),
        ({"p99": 0.045}, False),
        ({"p99": 0.04, "gap": 0.0078}, False),
        ({"p99": 0.04, "lost": ("no end",)}, False),
    ],
)
def test_what_is_promised(fields: dict[str, object], kept: bool) -> None:
    findings = [finding(job=False, p99=0.04), finding(job=True, **fields)]  # type: ignore[arg-type]
    assert spare.kept(findings) is kept  # type: ignore[arg-type]
    shown = spare.table(findings, spare.Setting())  # type: ignore[arg-type]
    assert "with job" in shown
    assert ("lost: no end" in shown) is ("lost" in fields)


def test_a_rehearsal_with_a_job_that_is_there_all_the_time() -> None:
    setting = spare.Setting(
        lines=3000,
        # Four requests in all, and so never a burst, however late this process gets to send them:
        # of more than four at once the gate lets nothing in for 5 s, which are all that there are.
        rate=0.8,
        seconds=3.0,
        before=2.0,
        pairs=1,
        replicas=1,
        prompt_words=20,
        output_tokens=5,
        profile="fast",
        time_scale=0.2,  # tokens far enough apart not to be read together
        doherty=f"{sys.executable} -m backends.cli",
    )
    run = asyncio.run(spare.run_once(setting, job=True, seed=1))
    judged = spare.judge(True, [run], setting)
    assert judged.requests > 0
    assert judged.lost == ()
    assert judged.job_lines > 0
    assert judged.gap_p50_s > 0


def test_a_line_that_is_in_no_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(*_: object) -> dict[str, object]:
        return {"id": "batch_1", "status": "cancelled", "output_file_id": None}

    class Session:
        def post(self, _: str) -> None:
            return None

    monkeypatch.setattr(spare.stage, "answer_json", answer)
    with pytest.raises(RunError, match="0 results, 0 different ones, of 3 lines"):
        asyncio.run(spare.cancel(Session(), "batch_1", 3))  # type: ignore[arg-type]
