"""Spans on their way to a collector: by OpenTelemetry's own exporter, in a thread of its own.

Whoever hands spans over only appends to a list. The thread takes what is there every few seconds,
or sooner when a batch is full, and sends it as OTLP over HTTP. A collector that is slow, gone or
talks nonsense holds nobody up: what does not fit into the list is dropped and counted, what was
refused is counted, and the log says so once, and once more when it works again.

What OpenTelemetry's environment says is obeyed (`OTEL_EXPORTER_OTLP_*`, `OTEL_SERVICE_NAME`,
`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_*`), but a setting of ours goes before it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from typing_extensions import override

from proxy.contract.extras import install_command
from proxy.contract.spans import SpanRecord, endpoint_url

_log = logging.getLogger("doherty.traces")

FLUSH_S: Final = 1.5  # at the end, for what still waits
_SHUT_S: Final = 0.5
# While spans are made and sent, the loop of the same process wants to run, too. Python lets a
# thread that computes have 5 ms before another gets a turn; so much would show in a stream.
_TURN_S: Final = 0.0005
_EXTRA: Final = "opentelemetry.exporter.otlp.proto.http"


class ExportSettings(msgspec.Struct, frozen=True):
    """Where spans go, and who sends them. `endpoint` "": where the environment says."""

    endpoint: str
    resource: dict[str, str]
    delay_s: float = 5.0
    waiting_max: int = 2048
    batch_max: int = 512


def missing_library() -> str:
    """Return what to install; empty where it is there."""
    try:
        found = importlib.util.find_spec(_EXTRA) is not None
    except ModuleNotFoundError:
        found = False
    return "" if found else f"traces need OpenTelemetry's exporter: {install_command('otel')}"


def switched_off(environment: Mapping[str, str]) -> bool:
    """Whether the environment forbids traces, whatever else is said."""
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return disabled or environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none"


def export_settings(
    endpoint: str | None, resource: Mapping[str, str], environment: Mapping[str, str]
) -> ExportSettings:
    """Return the settings, with what the environment says of batches. Raises `ValueError`."""
    waiting_max = _number(environment, "OTEL_BSP_MAX_QUEUE_SIZE", 2048)
    return ExportSettings(
        endpoint_url(endpoint) if endpoint else "",
        dict(resource),
        _number(environment, "OTEL_BSP_SCHEDULE_DELAY", 5000) / 1e3,
        waiting_max,
        min(waiting_max, _number(environment, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)),
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    return int(text) if text.isascii() and text.isdecimal() and int(text) > 0 else default


class _FirstWords(logging.Handler):
    """Keeps the first thing that the library says of a batch: why it was not taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said = ""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.said = self.said or record.getMessage()[:300]


class SpanCounts:
    """What has become of spans. It outlives whoever sends them: no counter falls when traces are
    changed or switched off, and one that is closed still counts what it sends at its end.
    """

    def __init__(self) -> None:
        self._adding = threading.Lock()  # two may send for a moment
        self.exported_total = 0
        self.dropped_total = 0  # for want of room
        self.refused_total = 0  # by the collector, or it was not there

    def add(self, *, exported: int = 0, dropped: int = 0, refused: int = 0) -> None:
        with self._adding:
            self.exported_total += exported
            self.dropped_total += dropped
            self.refused_total += refused


class SpanExport:
    """What waits to be sent. `make` turns what was handed over into spans, in the thread."""

    def __init__(
        self,
        settings: ExportSettings,
        make: Callable[[Any], Iterable[SpanRecord]],
        counts: SpanCounts | None = None,
    ) -> None:
        self.settings = settings
        self.counts = counts or SpanCounts()
        self._make = make
        self._waiting: deque[object] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._exporter: Any = None
        self._failing = self._stumbled = False
        self._words = _FirstWords()
        sys.setswitchinterval(_TURN_S)
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def put(self, what: object, spans: int = 1) -> None:
        """Hand over what so many spans are made of. Never waits."""
        if len(self._waiting) >= self.settings.waiting_max:
            self.counts.add(dropped=spans)
            return
        self._waiting.append(what)
        if len(self._waiting) == self.settings.batch_max:
            self._wake.set()

    def close(self) -> None:
        """Send what waits, for a moment, and stop. What is not taken by then is left behind."""
        self._closing = True
        self._wake.set()
        self._thread.join(FLUSH_S)
        if self._thread.is_alive() and self._exporter is not None:
            self._exporter.shutdown()
            self._thread.join(_SHUT_S)

    def _run(self) -> None:
        library = logging.getLogger("opentelemetry")
        library.propagate = False
        library.addHandler(self._words)
        try:
            convert = self._open()
            while True:
                closing = self._closing
                while self._waiting:
                    self._send(convert)
                if closing:
                    break
                self._wake.wait(self.settings.delay_s)
                self._wake.clear()
            self._exporter.shutdown()
        except Exception:  # noqa: BLE001 - the top of this thread: what it serves goes on
            _log.exception("no more traces are sent")
        finally:
            library.removeHandler(self._words)

    def _open(self) -> Callable[[SpanRecord], Any]:
        from proxy.contract.span_library import Converter, exporter_of  # noqa: PLC0415 - an extra

        self._exporter = exporter_of(self.settings.endpoint)
        return Converter(self.settings.resource)

    def _send(self, convert: Callable[[SpanRecord], Any]) -> None:
        spans: list[Any] = []
        while self._waiting and len(spans) < self.settings.batch_max:
            spans += self._made(self._waiting.popleft(), convert)
        if not spans:
            return
        if self._export(spans):
            self.counts.add(exported=len(spans))
            if self._failing:
                self._failing = False
                _log.info("traces are taken again")
            return
        self.counts.add(refused=len(spans))
        if not self._failing:
            self._failing = True
            _log.warning(
                "traces are not taken, and requests go on without them: %s",
                self._words.said or "the collector refused them",
            )

    def _made(self, what: object, convert: Callable[[SpanRecord], Any]) -> list[Any]:
        try:
            return [convert(span) for span in self._make(what)]
        except Exception:  # noqa: BLE001 - one that cannot be told is not to end the others
            self.counts.add(refused=1)
            if not self._stumbled:
                self._stumbled = True
                _log.exception("a span cannot be made; others go on")
            return []

    def _export(self, spans: Sequence[Any]) -> bool:
        self._words.said = ""
        try:
            return bool(self._exporter.export(spans).value == 0)
        except Exception as error:  # noqa: BLE001 - whatever a library raises about one batch
            self._words.said = repr(error)[:300]
            return False


def process_resource(service: str, region: str, version: str) -> dict[str, str]:
    """Return what OpenTelemetry calls the resource: which process of which service this is."""
    return {
        "service.name": service,
        "service.version": version,
        "service.instance.id": f"{os.uname().nodename}:{os.getpid()}",
        "doherty.region": region,
    }
