"""The desk: lines go out in chunks, results come in, and each line counts exactly once.

A chunk's number grows from one to the next and is its fence; a line knows which chunk holds it. A
result counts if its line is held by the chunk that it is reported for: one statement changes that
line's state, and the result goes in with it. When a chunk is silent for `hold_s` it is buried by
whoever asks next: its lines wait again, and what it still reports counts for nothing.

A worker that begins is no longer who it was: with its first ask, what its id holds is buried
at once. What a dispatcher held is only let go: it sends lines, and dies of none.

Lateness alone costs nothing: until somebody buries it a chunk can be renewed. And a store that has
just been opened buries nothing for `hold_s`: while no service ran, no worker could report.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from backends.clock import Clock
from backends.offline.database import Bell, Database, Transaction
from backends.offline.giving import SHARED_TURN, Candidate, Offer, Taking, chosen, span_after_death
from backends.offline.rates import Rates
from backends.offline.records import DIED_ERROR, IN_PROGRESS, Limits
from backends.offline.rows import LOCK_JOB, WORK
from backends.offline.schema import DONE, HELD, PIECE_BYTES, WAITING
from backends.offline.store_jobs import JobStore
from backends.offline.work import Ask, Chunk, JobNeed, Line, Receipt, Report, Result

_WAIT_SLICE_S = 1.0  # between looks of an ask that waits: a chunk may have to be buried
_CANDIDATES_MAX = 1000  # jobs of one model that are looked at
_BURIED_AT_ONCE = 100
_ATTEMPTS_MAX = 100  # of one ask, each of which another ask made vain by taking lines
_PIECES_AT_ONCE = 128
_NEEDS_MAX = 64  # of one model
_MODELS_MAX = 10_000  # whose turns are counted


# A worker's id, and tenant and model of each result of its that counts.
OnTaken = Callable[[str, Sequence[tuple[str, str, Result]]], None]


def _nobody_hears(_worker_id: str, _taken: Sequence[tuple[str, str, Result]]) -> None:
    """Where nobody keeps books."""


class DeskStore(JobStore):
    """The part of the store that workers talk to; it is a `Desk`."""

    def __init__(self, database: Database, clock: Clock, limits: Limits, bell: Bell) -> None:
        super().__init__(database, clock, limits, bell)
        self._buries_from_s = clock.unix_s() + limits.hold_s
        self._turns: Counter[str] = Counter()  # chunks given, by model
        self._rates = Rates()
        self.on_taken: OnTaken = _nobody_hears

    async def ask(self, ask: Ask) -> Chunk | None:
        """Give lines of one model; see `Desk`."""
        until_s = self._clock.now_s() + ask.wait_s
        if ask.first:
            await self._bury_former(ask)
        with self._bell.alarm(WORK) as alarm:
            while True:
                chunk = await self._give(ask)
                left_s = until_s - self._clock.now_s()
                if chunk is not None or left_s <= 0:
                    return chunk
                await alarm.wait(min(left_s, _WAIT_SLICE_S))

    async def _give(self, ask: Ask) -> Chunk | None:
        await self.bury_silent()
        for _ in range(_ATTEMPTS_MAX):
            now_s = self._clock.unix_s()
            jobs = await self._jobs_for(ask, now_s)
            if not jobs:
                return None
            taking = Taking(self._lines_max(ask), ask.bytes_max)
            if (chunk := await self._hold(ask, jobs, taking, now_s)) is not None:
                return chunk
            # Others took what was seen; there may be more elsewhere.
        return None

    def _lines_max(self, ask: Ask) -> int:
        return min(ask.lines_max, self._limits.chunk_lines)

    async def _jobs_for(self, ask: Ask, now_s: float) -> tuple[int, ...]:
        """Return the jobs whose turn it is."""
        async with self._database.reading() as reading:
            rows = await reading.fetch_each(
                "SELECT number, owner, expires_s, waiting, turn, model FROM jobs "
                "WHERE state = 'in_progress' AND model = $1 AND endpoint = $2 "
                "AND waiting > 0 AND expires_s > $3 ORDER BY expires_s, number LIMIT $4",
                [(model, url, now_s, _CANDIDATES_MAX) for model in ask.models for url in ask.urls],
            )
        if not rows:
            return ()
        model = str(min(rows, key=lambda row: (row[2], row[0]))[5])
        candidates = [Candidate(*row[:5]) for row in rows if row[5] == model]
        if len(self._turns) >= _MODELS_MAX:
            self._turns.clear()  # which takes no more than a turn from anybody
        self._turns[model] += 1
        shared = self._turns[model] % SHARED_TURN == 0
        return chosen(candidates, shared=shared, lines_max=self._lines_max(ask))

    async def _hold(
        self, ask: Ask, jobs: Sequence[int], taking: Taking, now_s: float
    ) -> Chunk | None:
        """Make a chunk of lines of these jobs."""
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch_each(
                "SELECT number, id, state, endpoint, input_file_id, expires_s, tenant FROM jobs "
                "WHERE number = $1 FOR UPDATE",
                [(job,) for job in sorted(jobs)],
            )
            there = {int(row[0]): row for row in rows if row[2] == IN_PROGRESS}
            for job in jobs:
                if job in there and taking.room > 0:
                    offers = await transaction.fetch(
                        "SELECT job, number, start, bytes, span FROM lines "
                        "WHERE job = $1 AND state = 0 ORDER BY sort_key, number LIMIT $2 "
                        "FOR UPDATE SKIP LOCKED",
                        job,
                        taking.room,
                    )
                    taking.fill(Offer(*offer) for offer in offers)
            if not taking.lines:
                return None
            taken = Counter(line.job for line in taking.lines)
            found = await transaction.fetch(
                "INSERT INTO chunks (worker_id, jobs, held_until_s) VALUES ($1, $2, $3) "
                "RETURNING number",
                ask.worker_id,
                msgspec.json.encode(sorted(taken)).decode(),
                now_s + self._limits.hold_s,
            )
            chunk = int(found[0][0])
            await transaction.execute_each(
                "UPDATE lines SET state = $3, chunk = $4 WHERE job = $1 AND number = $2",
                [(line.job, line.number, HELD, chunk) for line in taking.lines],
            )
            await transaction.execute_each(
                "UPDATE jobs SET waiting = waiting - $2, turn = $3 WHERE number = $1",
                [(job, count, chunk) for job, count in sorted(taken.items())],
            )
        try:
            bodies = await self._bodies({job: str(there[job][4]) for job in taken}, taking.lines)
        except BaseException:
            await self._let_go(chunk, sorted(taken))  # at once: nobody is to blame for these lines
            raise
        return Chunk(
            chunk_id=f"chunk_{chunk}",
            fence=chunk,
            hold_s=self._limits.hold_s,
            due_in_s=min(float(there[job][5]) for job in taken) - now_s,
            lines=tuple(
                Line(
                    *(str(there[line.job][1]), line.number, str(there[line.job][3]), body),
                    tenant=str(there[line.job][6]),
                )
                for line, body in zip(taking.lines, bodies, strict=True)
            ),
            alone=any(line.span for line in taking.lines),
        )

    async def _let_go(self, chunk: int, jobs: Sequence[int]) -> None:
        async with self._database.transaction() as transaction:
            await transaction.fetch_each(LOCK_JOB, [(job,) for job in jobs])
            await transaction.execute("DELETE FROM chunks WHERE number = $1", chunk)
            back = await transaction.fetch(
                "UPDATE lines SET state = $2, chunk = NULL WHERE chunk = $1 RETURNING job",
                chunk,
                WAITING,
            )
            await self._wait_again(transaction, Counter(int(row[0]) for row in back))

    async def _bodies(self, files: dict[int, str], lines: Sequence[Offer]) -> list[msgspec.Raw]:
        """Cut the bodies out of the input files; each piece is read once, a few at a time."""
        numbers = dict[int, int]()
        async with self._database.reading() as reading:
            for job, file_id in files.items():
                found = await reading.fetch("SELECT number FROM files WHERE id = $1", file_id)
                numbers[job] = int(found[0][0])
        parts: list[list[bytes]] = [[] for _ in lines]
        wanted: dict[tuple[int, int], list[int]] = {}  # lines that have octets in a piece
        for index, line in enumerate(lines):
            last = (line.start + line.bytes - 1) // PIECE_BYTES
            for piece in range(line.start // PIECE_BYTES, last + 1):
                wanted.setdefault((numbers[line.job], piece), []).append(index)
        pieces = sorted(wanted)  # so the parts of a line come in order
        for start in range(0, len(pieces), _PIECES_AT_ONCE):
            async with self._database.reading() as reading:
                rows = await reading.fetch_each(
                    "SELECT file, piece, content FROM pieces WHERE file = $1 AND piece = $2",
                    pieces[start : start + _PIECES_AT_ONCE],
                )
            for file, piece, content in rows:
                for index in wanted[int(file), int(piece)]:
                    line, base = lines[index], int(piece) * PIECE_BYTES
                    end = line.start + line.bytes - base
                    parts[index].append(content[max(0, line.start - base) : end])
        return [msgspec.Raw(b"".join(part)) for part in parts]

    async def report(self, report: Report) -> Receipt:
        """Take results of a chunk; see `Desk`."""
        now_s = self._clock.unix_s()
        async with self._database.transaction() as transaction:
            found = await transaction.fetch(
                "SELECT jobs FROM chunks WHERE number = $1 AND worker_id = $2",
                report.fence,
                report.worker_id,
            )
            if not found or report.chunk_id != f"chunk_{report.fence}":
                return Receipt(held=False)
            # The order of locks: jobs by number, the chunk, its lines.
            jobs = await transaction.fetch_each(
                LOCK_JOB, [(job,) for job in msgspec.json.decode(found[0][0], type=list[int])]
            )
            running = {str(row[1]): int(row[0]) for row in jobs if row[2] == IN_PROGRESS}
            held = await transaction.fetch(
                "UPDATE chunks SET held_until_s = $2 WHERE number = $1 RETURNING number",
                report.fence,
                now_s + self._limits.hold_s,
            )
            if not held:
                return Receipt(held=False)
            accepted = await self._take(transaction, report, running, now_s)
            await self._take_back(transaction, report, running)
            await self._charge(transaction, report, running)
        self._rates.count(report.worker_id, now_s, sum(map(_tokens, accepted)))
        owners = {str(row[1]): (str(row[3]), str(row[4])) for row in jobs}
        self.on_taken(report.worker_id, [(*owners[each.job_id], each) for each in accepted])
        return Receipt(
            held=True,
            accepted=len(accepted),
            hold_s=self._limits.hold_s,
            dropped=tuple(str(row[1]) for row in jobs if row[2] != IN_PROGRESS),
        )

    async def _take(
        self, transaction: Transaction, report: Report, running: dict[str, int], now_s: float
    ) -> list[Result]:
        """Add the results whose lines the chunk holds; return those."""
        results: dict[tuple[int, int], Result] = {}
        for result in report.results:
            if (job := running.get(result.job_id)) is not None:
                results.setdefault((job, result.number), result)
        # `+ 0`: found by its key, not among all the lines of the chunk.
        done = await transaction.fetch_each(
            "UPDATE lines SET state = $4, chunk = NULL "
            "WHERE job = $1 AND number = $2 AND chunk + 0 = $3 "
            "RETURNING job, number, custom_id",
            [(*key, report.fence, DONE) for key in results],
        )
        accepted: dict[int, list[tuple[str, Result]]] = {}
        for job, number, custom_id in done:
            accepted.setdefault(int(job), []).append((custom_id, results[int(job), int(number)]))
        for job, pairs in sorted(accepted.items()):
            await self._add_results(transaction, job, pairs, now_s)
        return [result for pairs in accepted.values() for _, result in pairs]

    async def _take_back(
        self, transaction: Transaction, report: Report, running: dict[str, int]
    ) -> None:
        """Let lines wait again that the worker will not do."""
        if report.done:
            back = await transaction.fetch(
                "UPDATE lines SET state = $2, chunk = NULL WHERE chunk = $1 RETURNING job",
                report.fence,
                WAITING,
            )
            await transaction.execute("DELETE FROM chunks WHERE number = $1", report.fence)
        else:
            back = await transaction.fetch_each(
                "UPDATE lines SET state = $4, chunk = NULL "
                "WHERE job = $1 AND number = $2 AND chunk + 0 = $3 RETURNING job",
                [
                    (running[job_id], number, report.fence, WAITING)
                    for job_id, number in report.back
                    if job_id in running
                ],
            )
        await self._wait_again(transaction, Counter(int(row[0]) for row in back))

    async def _wait_again(self, transaction: Transaction, lines: Counter[int]) -> None:
        if lines:
            await transaction.execute_each(
                "UPDATE jobs SET waiting = waiting + $2 WHERE number = $1", sorted(lines.items())
            )
            await self._database.tell(transaction, WORK)

    async def _charge(
        self, transaction: Transaction, report: Report, running: dict[str, int]
    ) -> None:
        """Share the time that a worker computed among the jobs that it had results of."""
        if not report.busy_s or not running:
            return
        shares = Counter(r.job_id for r in report.results if r.job_id in running)
        if not shares:
            shares = Counter(dict.fromkeys(running, 1))  # it has only renewed: nobody knows better
        await transaction.execute_each(
            "UPDATE jobs SET busy_s = busy_s + $2 WHERE number = $1",
            [
                (running[job_id], report.busy_s * count / shares.total())
                for job_id, count in sorted(shares.items(), key=lambda share: running[share[0]])
            ],
        )

    async def bury_silent(self) -> int:
        """Give the lines of chunks that were silent for too long back; return how many chunks."""
        now_s = self._clock.unix_s()
        if now_s < self._buries_from_s:
            return 0
        async with self._database.reading() as reading:
            silent = await reading.fetch(
                "SELECT number, jobs FROM chunks WHERE held_until_s < $1 "
                "ORDER BY held_until_s LIMIT $2",
                now_s,
                _BURIED_AT_ONCE,
            )
        for number, jobs in silent:
            await self._bury(int(number), msgspec.json.decode(jobs, type=list[int]), now_s)
        return len(silent)

    async def _bury_former(self, ask: Ask) -> None:
        """Have done with what a worker's id held before it began anew."""
        async with self._database.reading() as reading:
            former = await reading.fetch(
                "SELECT number, jobs FROM chunks WHERE worker_id = $1 ORDER BY number",
                ask.worker_id,
            )
        for number, text in former:
            jobs = msgspec.json.decode(text, type=list[int])
            if ask.spare:
                await self._let_go(int(number), jobs)
            else:
                await self._bury(int(number), jobs, math.inf)

    async def _bury(self, chunk: int, jobs: list[int], silent_since_s: float) -> None:
        now_s = self._clock.unix_s()
        async with self._database.transaction() as transaction:
            locked = await transaction.fetch_each(LOCK_JOB, [(job,) for job in jobs])
            running = {int(row[0]): str(row[1]) for row in locked if row[2] == IN_PROGRESS}
            gone = await transaction.fetch(
                "DELETE FROM chunks WHERE number = $1 AND held_until_s < $2 RETURNING number",
                chunk,
                silent_since_s,
            )
            if not gone:  # it has been renewed, or another service was faster
                return
            lines = await transaction.fetch(
                "SELECT job, number, custom_id, deaths FROM lines WHERE chunk = $1", chunk
            )
            alone = len(lines) == 1 and int(lines[0][0]) in running
            if alone and int(lines[0][3]) + 1 >= self._limits.attempts_max:
                job, number, custom_id, _ = lines[0]
                await transaction.execute(
                    "UPDATE lines SET state = $2, chunk = NULL WHERE chunk = $1", chunk, DONE
                )
                result = Result(job_id=running[int(job)], number=int(number), error=DIED_ERROR)
                await self._add_results(transaction, int(job), [(str(custom_id), result)], now_s)
                return
            await transaction.execute(
                "UPDATE lines SET state = $2, chunk = NULL, span = $3, deaths = deaths + $4 "
                "WHERE chunk = $1",
                chunk,
                WAITING,
                span_after_death(len(lines)),
                int(alone),
            )
            await self._wait_again(transaction, Counter(int(line[0]) for line in lines))

    async def needs(self) -> dict[str, tuple[JobNeed, ...]]:
        """Say what is left to do, by model, the earliest deadline first."""
        now_s = self._clock.unix_s()
        async with self._database.reading() as reading:
            rows = await reading.fetch(
                "SELECT model, endpoint, expires_s, total, completed + failed, tokens, "
                "prompt_tokens + completion_tokens FROM jobs WHERE state = 'in_progress' "
                "ORDER BY expires_s, number"
            )
        needs: dict[str, list[JobNeed]] = {}
        for model, endpoint, expires_s, total, done, thought, used in rows:
            left = int(total) - int(done)
            # What its lines took so far says more than what they might have taken.
            each = used / done if done >= _LINES_TELLING else thought / max(1, total)
            need = JobNeed(
                due_in_s=max(0.0, float(expires_s) - now_s),
                lines=left,
                tokens=round(left * each),
                url=str(endpoint),
            )
            of_model = needs.setdefault(str(model), [])
            if len(of_model) == _NEEDS_MAX:
                last = of_model.pop()
                need = msgspec.structs.replace(
                    last,
                    lines=last.lines + need.lines,
                    tokens=last.tokens + need.tokens,
                    url=last.url if last.url == need.url else "",
                )
            of_model.append(need)
        return {model: tuple(of_model) for model, of_model in needs.items()}

    def rates(self) -> dict[str, float]:
        """Tokens a second of each worker that reported to this service in the last minute."""
        return self._rates.per_worker(self._clock.unix_s())


_LINES_TELLING = 50  # done ones, whose mean is trusted


def _tokens(result: Result) -> int:
    return result.prompt_tokens + result.completion_tokens
