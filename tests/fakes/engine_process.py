"""A tiny engine server: health, metrics and models; it can misbehave.

Slow to become ready, deaf to SIGTERM, with a child that outlives it, or dead after a while: what a
manager must cope with in a real process, without an engine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from typing_extensions import override

METRICS = """\
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="m"}} 0.0
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {kv}
vllm:cache_config_info{{block_size="16",num_gpu_blocks="100"}} 1.0
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="m")
    parser.add_argument("--ready-after-s", type=float, default=0.0)
    parser.add_argument("--die-after-s", type=float, default=0.0)
    parser.add_argument("--exit-status", type=int, default=3)
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--child", action="store_true", help="start a child that only SIGKILL ends")
    parser.add_argument("--running", type=float, default=0.0, help="requests said to be running")
    options = parser.parse_args()
    up_s = time.monotonic()
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.child:
        code = "import signal,time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code])
        sys.stderr.write(f"child {child.pid}\n")
    if options.die_after_s:
        threading.Timer(options.die_after_s, os._exit, [options.exit_status]).start()

    class Requests(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, body = 200, b""
            if self.path == "/health":
                status = 200 if time.monotonic() - up_s >= options.ready_after_s else 503
            elif self.path == "/metrics":
                body = METRICS.format(running=options.running, kv=options.running / 4).encode()
            elif self.path == "/v1/models":
                body = json.dumps({"object": "list", "data": [{"id": options.model}]}).encode()
            else:
                status = 404
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        @override
        def log_message(self, format: str, *args: object) -> None:  # its name there
            pass

    sys.stderr.write(f"listening on {options.port}\n")
    ThreadingHTTPServer(("127.0.0.1", options.port), Requests).serve_forever()


if __name__ == "__main__":
    main()
