"""What every service shares: health, readiness, metrics, limits, and errors as JSON with a message."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from polyspec.errors import PolyspecError
from polyspec.metrics import DecodingStats
from polyspec.serving.batching import DeadlineExceeded, Overloaded

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class Metrics:
    """Prometheus metrics of one service."""

    def __init__(self, depth: Callable[[], int]):
        self.registry = CollectorRegistry()
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
        self.latency = Histogram(
            "polyspec_request_seconds", "From request to answer", ["path", "status"], buckets=seconds, registry=self.registry
        )
        self.batch = Histogram(
            "polyspec_batch_size", "Requests in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        counters = {
            "new_tokens": "Tokens generated",
            "row_calls": "Target calls, counted for every request in the batch",
            "proposed_tokens": "Tokens drafted",
            "accepted_tokens": "Drafted tokens that were accepted",
        }
        self.counters = {n: Counter(f"polyspec_{n}", text, registry=self.registry) for n, text in counters.items()}
        self.tokens_per_call = Gauge("polyspec_tokens_per_call", "In the last batch", registry=self.registry)
        self.acceptance = Gauge("polyspec_acceptance_rate", "In the last batch", registry=self.registry)
        Gauge("polyspec_queue_depth", "Requests that wait", registry=self.registry).set_function(depth)

    def record(self, requests: int, stats: DecodingStats) -> None:
        """Count a batch."""
        self.batch.observe(requests)
        for name, counter in self.counters.items():
            counter.inc(getattr(stats, name))
        self.tokens_per_call.set(stats.tokens_per_call)
        self.acceptance.set(stats.acceptance_rate)


def base_app(title: str, lifespan: Lifespan, metrics: Metrics, max_body: int) -> FastAPI:
    """An application with GET /health, /ready and /metrics. Bodies above `max_body` bytes get 413, polyspec's errors
    422, a full queue 503 with Retry-After, a missed deadline 504; all with {"detail": message}.

    It is ready once `app.state.ready` is set, which is for `lifespan` to do. Once `app.state.closing` is set, which is for
    the server to do, answers end their connections.
    """
    app = FastAPI(title=title, version=version("polyspec"), lifespan=lifespan)
    app.state.ready, app.state.closing = False, False
    app.add_middleware(LimitBody, most=max_body)

    @app.middleware("http")
    async def measure(request: Request, call_next: Any) -> Response:
        start = time.perf_counter()
        response = await call_next(request)
        route = request.scope.get("route")
        if route is not None:
            path = getattr(route, "path", "")
            metrics.latency.labels(path, str(response.status_code)).observe(time.perf_counter() - start)
        if app.state.closing:  # asked over a kept connection, which otherwise would keep the service alive
            response.headers["Connection"] = "close"
        return response

    @app.exception_handler(PolyspecError)
    async def explain(_: Request, error: PolyspecError) -> JSONResponse:
        detail = {"detail": str(error)}
        if isinstance(error, Overloaded):
            return JSONResponse(detail, 503, {"Retry-After": str(error.retry_after)})
        return JSONResponse(detail, 504 if isinstance(error, DeadlineExceeded) else 422)

    @app.get("/health", tags=["service"])
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["service"])
    async def ready(response: Response) -> dict[str, bool]:
        """Whether requests are taken: 503 while the model is being loaded and once the service shuts down."""
        if not app.state.ready:
            response.status_code = 503
        return {"ready": app.state.ready}

    @app.get("/metrics", tags=["service"])
    async def expose() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class LimitBody:
    """ASGI middleware: requests with more than `most` bytes are refused, whether they say so or not."""

    def __init__(self, app: Any, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = b"", int(said) <= self.most if said.isdigit() else True
        too_long = not more
        while more and not too_long:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_long = len(body) > self.most
        if too_long:
            refusal = JSONResponse({"detail": f"a request may have at most {self.most} bytes"}, 413)
            await refusal(scope, receive, send)
            return
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return given.pop() if given else await receive()

        await self.app(scope, replay, send)
