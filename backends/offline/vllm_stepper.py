"""vLLM's offline `LLM` in a thread of its own, stepped without an end.

`LLM.generate` takes all prompts, steps until none is left, and returns: between two calls the
engine runs empty, and its last, long answers are computed with hardly any company. Here requests
are added between any two steps, so that the batch stays full from the first line to the last, with
the calls that `LLM` itself makes: `llm_engine.add_request`, `step`, `abort_request` (there in vLLM
0.26.0 and in 0.33.0). Everything that touches the engine happens in this thread; what renders
prompts and words answers is the event loop's, beside it. The GPU's own loop is a further process,
which goes on while either of them is busy.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from backends.offline.line_engine import EngineError, FlagsError

_T = TypeVar("_T")
ADDED_MAX = 256  # between two steps: some 100 us each, and answers wait meanwhile
Work = Callable[[Any], None]  # with the LLMEngine
_OF_THE_ENGINE = {"EngineDeadError", "ZMQError"}  # by name: nothing of vLLM's is imported here


class Stepper:
    """One thread, one `LLM`."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build
        self._loop = asyncio.get_running_loop()
        self._work: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._waiters: dict[str, asyncio.Future[Any]] = {}
        self._stopping = False
        self._built: asyncio.Future[Any] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="stepper", daemon=True)
        self.dead: asyncio.Future[str] = self._loop.create_future()

    def __len__(self) -> int:
        return len(self._waiters)

    async def start(self) -> Any:
        """Load the model; return the `LLM`. Raises `EngineError`."""
        self._thread.start()
        return await self._built

    async def request(self, request_id: str, add: Work) -> Any:
        """Have `add` add a request and return its finished output. Raises what `add` raises,
        `EngineError`, and `ValueError` for an id in use; cancelled, the request is aborted."""
        if self.dead.done():
            raise EngineError(self.dead.result())
        if request_id in self._waiters:  # the output of one would never come
            raise ValueError(f"the request id {request_id} is another request's")
        waiter: asyncio.Future[Any] = self._loop.create_future()
        self._waiters[request_id] = waiter
        self._work.put(partial(self._add, request_id, add))
        try:
            return await waiter
        except asyncio.CancelledError:
            self._work.put(lambda engine: engine.abort_request([request_id]))
            raise
        finally:
            self._waiters.pop(request_id, None)

    async def call(self, function: Callable[[Any], _T]) -> _T:
        """Return what `function` makes of the engine, between two steps."""
        future: asyncio.Future[_T] = self._loop.create_future()

        def work(engine: Any) -> None:
            try:
                value = function(engine)
            except Exception as error:  # noqa: BLE001  # the caller's
                self._tell(_fail, future, error)
            else:
                self._tell(_resolve, future, value)

        self._work.put(work)
        return await future

    async def stop(self) -> None:
        """End the thread and the engine. Raises `EngineError` while the model is loading."""
        if self._thread.is_alive() and not self._built.done():
            raise EngineError("the model is still being loaded")
        self._stopping = True
        self._work.put(lambda _: None)  # it may be waiting for work
        if self._thread.is_alive():
            await self._ended.wait()

    # --- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            llm = self._load()
            if llm is not None:
                self._tell(_resolve, self._built, llm)
                self._live(llm.llm_engine)
        finally:
            self._tell(self._ended.set)

    def _load(self) -> Any:
        """Return the `LLM`; None when there is none, which has been told."""
        try:
            return self._build()
        except SystemExit:
            error: EngineError = FlagsError("vLLM does not take these arguments, see above")
        except EngineError as known:
            error = known
        except Exception as unknown:  # noqa: BLE001  # of a foreign program, whatever it is
            error = EngineError(f"vLLM did not start: {type(unknown).__name__}: {unknown}")
        self._tell(_fail, self._built, error)
        return None

    def _live(self, engine: Any) -> None:
        try:
            self._step_on(engine)
        except BaseException as error:  # noqa: BLE001  # of a foreign program, whatever it is
            self._tell(self._die, f"{type(error).__name__}: {error}")
        else:
            engine.engine_core.shutdown()

    def _step_on(self, engine: Any) -> None:
        while not self._stopping:
            self._take_work(engine)
            if not engine.has_unfinished_requests():
                continue
            finished = [output for output in engine.step() if output.finished]
            if finished:
                self._tell(self._deliver, finished)

    def _take_work(self, engine: Any) -> None:
        """Do what was asked for since the last step; wait for it when there is no step to do."""
        if not engine.has_unfinished_requests():
            self._work.get()(engine)
        for _ in range(ADDED_MAX):
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                return
            work(engine)

    def _add(self, request_id: str, add: Work, engine: Any) -> None:
        try:
            add(engine)
        except Exception as error:  # of this request, unless the engine is gone
            if {kind.__name__ for kind in type(error).__mro__} & _OF_THE_ENGINE:
                raise
            engine.abort_request([request_id])  # it may be known already, and never be computed
            self._tell(self._refuse, request_id, error)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended: nobody listens any more
            self._stopping = True

    # --- in the event loop ---------------------------------------------------------------------

    def _deliver(self, outputs: list[Any]) -> None:
        for output in outputs:
            waiter = self._waiters.get(output.request_id)
            if waiter is not None and not waiter.done():
                waiter.set_result(output)

    def _refuse(self, request_id: str, error: Exception) -> None:
        waiter = self._waiters.get(request_id)
        if waiter is not None:
            _fail(waiter, error)

    def _die(self, why: str) -> None:
        if not self.dead.done():
            self.dead.set_result(why)
        for waiter in self._waiters.values():
            _fail(waiter, EngineError(why))


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
