"""What a running training says of itself: /metrics for Prometheus, /progress for the operator, on one port."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from socketserver import ThreadingMixIn
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app

from qlorajob.status import Progress

logger = logging.getLogger(__name__)


class Telemetry:
    """The current progress and the gauges that go with it. Gauges appear when they have a value, never as a false 0."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._changing = threading.Lock()

    def advance(self, **changes: Any) -> None:
        """Change fields of the progress and what the gauges say of them. From any thread."""
        with self._changing:
            self.progress = self.progress.model_copy(update={**changes, "updated_at": datetime.now(UTC)})
        progress = self.progress
        self._set("qlora_train_step", "Optimizer steps done.", progress.step)
        self._set("qlora_train_steps", "Optimizer steps to do.", progress.total_steps)
        self._set("qlora_train_epoch", "Passes over the data done.", progress.epoch)
        self._set("qlora_train_loss", "Training loss, mean over the last logging interval.", progress.loss)
        self._set("qlora_eval_loss", "Validation loss of the tuned model.", progress.eval_loss)
        self._set("qlora_train_tokens_per_second", "Training tokens a second, no padding.", progress.tokens_per_second)

    def speed(self, *, step_seconds: float, samples_per_second: float) -> None:
        """Say how fast steps are."""
        self._set("qlora_train_step_seconds", "Duration of an optimizer step, recent mean.", step_seconds)
        self._set("qlora_train_samples_per_second", "Training rows a second, recent mean.", samples_per_second)

    def gpu_memory(self, *, allocated: int, reserved: int, peak: int, predicted: int) -> None:
        """Say how much GPU memory there is in use. Never called without a GPU."""
        self._set("qlora_gpu_memory_allocated_bytes", "GPU memory in tensors.", allocated)
        self._set("qlora_gpu_memory_reserved_bytes", "GPU memory that torch holds.", reserved)
        self._set("qlora_gpu_memory_peak_bytes", "Peak GPU memory, CUDA context included.", peak)
        self._set("qlora_gpu_memory_predicted_bytes", "Peak GPU memory that the plan predicted.", predicted)

    def serve(self, port: int) -> int | None:
        """Start answering in the background; the port, or None when it is taken. Training goes on without."""
        try:
            server = _make_server(port, self._app())
        except OSError as error:
            logger.warning("no metrics: port %d can't be opened: %s", port, error.strerror)
            return None
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        logger.info("serving /metrics and /progress", extra={"port": server.server_port})
        return int(server.server_port)

    def _set(self, name: str, text: str, value: float | None) -> None:
        if value is None:
            return
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, registry=self.registry)
        self._gauges[name].set(value)

    def _app(self) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
        metrics = make_wsgi_app(self.registry)

        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                return cast("Iterable[bytes]", metrics(environ, start_response))
            status, content = "200 OK", json.dumps({"status": "ok"})
            if path == "/progress":
                # pydantic's JSON: a loss that isn't a number any more is null there. json's NaN is no JSON.
                content = self.progress.model_dump_json(by_alias=True, exclude_none=True)
            elif path != "/healthz":
                status, content = "404 Not Found", json.dumps({"error": "there are /metrics, /progress and /healthz"})
            start_response(status, [("Content-Type", "application/json")])
            return [content.encode()]

        return answer


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a thread of its own, so that a slow scraper blocks nobody."""

    daemon_threads = True


class _Ipv6Server(_Server):
    """Listens on IPv6 and IPv4."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        """Bind, to both families."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Quiet(WSGIRequestHandler):
    """A scrape every few seconds is no news."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        """Say nothing."""


def _make_server(port: int, app: Any) -> WSGIServer:
    if socket.has_dualstack_ipv6():
        return make_server("::", port, app, server_class=_Ipv6Server, handler_class=_Quiet)
    return make_server("", port, app, server_class=_Server, handler_class=_Quiet)
