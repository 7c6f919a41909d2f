"""What protects the service from its clients: limits, admission, connection timeouts, headers, and metrics of all that.

    connection --TimedConnection--> complete headers --Guard--> host, origin, rate, token, size, free place --> the app

Everything here happens before a byte of a body is parsed. The limits that need the content are checked by the app.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from uvicorn.protocols.http.h11_impl import H11Protocol

from giffy_ray.core.errors import InputError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
_MAX_CLIENTS = 10_000  # whose rate is remembered
_RETRY_S = 5  # what a refused client is asked to wait
_CLIENT_GONE = 499  # the status of a request whose client hung up, as in nginx; only metrics show it
_logger = logging.getLogger("giffy_ray")
_SECURITY_HEADERS = {
    # The page loads nothing from elsewhere; blob: is for pictures that the visitor has chosen, and generated frames.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class ServiceLimits:
    """What one client, and all of them together, may ask of the service."""

    upload_mb: int = 32
    """Maximum size of a request with both images, in MiB."""
    upload_s: int = 30
    """Maximum time for a client to send it."""
    image_megapixels: float = 25
    """Maximum size of an image."""
    clip_megapixels: float = 150
    """Maximum size of a request's answer: pixels of a frame, times frames, times samples."""
    frames: int = 240
    """Maximum number of frames of a clip."""
    samples: int = 8
    """Maximum number of clips of a request."""
    decode_s: int = 10
    """Maximum time to decode an image."""
    decode_mb: int = 1536
    """Maximum memory of a process that decodes images, in MiB."""
    request_s: int = 300
    """Maximum time from the end of the upload to the end of the answer, including the time in the queue."""
    queue: int = 64
    """Maximum number of requests that are uploaded, waiting or computed."""
    requests_per_minute: int = 60
    """Maximum rate of a client's requests, in the long run and in a burst."""
    connections: int = 500
    """Maximum number of open connections."""
    header_s: int = 10
    """Maximum time for a client to send the header of a request, and to leave a connection idle."""
    stall_s: int = 30
    """Maximum time for a client to read about 100 KB of an answer."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise InputError(f"limits.{name}: must be above 0 (value {value})")


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status, 4xx or 5xx.
        message: One sentence for the client that says why.
        headers: Additional headers of the response.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


class ServiceMetrics:
    """Metrics of the service in the format of Prometheus, and of its own process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
        self.requests = Counter(
            "giffy_requests", "Requests by path and HTTP status.", ["path", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "giffy_request_seconds",
            "Time from the header of a request to the end of the response.",
            ["path"],
            buckets=buckets,
            registry=self.registry,
        )
        self.open = Gauge(
            "giffy_open_requests", "Interpolations being uploaded, waiting or computed.", registry=self.registry
        )
        self.waiting = Gauge("giffy_waiting_requests", "Interpolations waiting for a worker.", registry=self.registry)
        self.model = Gauge(
            "giffy_model_info", "1 for the version that new requests get.", ["model"], registry=self.registry
        )
        self.reloads = Counter(
            "giffy_model_reloads", "Attempts to load another version.", ["outcome"], registry=self.registry
        )


class RateLimiter:
    """A token bucket for each client, which holds the requests of a minute."""

    def __init__(self, per_minute: int):
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> tokens, at time in s

    def take(self, client: str) -> float:
        """Takes a token. Returns 0, or the seconds until there is one."""
        now_s = time.monotonic()
        tokens, last_s = self._buckets.pop(client, (float(self._per_minute), now_s))
        tokens = min(self._per_minute, tokens + (now_s - last_s) * self._per_minute / 60)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - allowed, now_s)
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) * 60 / self._per_minute


class Guard:
    """ASGI middleware: refuses requests by their header and address, counts and times all, and logs failures.

    Args:
        app: The application.
        limits: The limits.
        metrics: Counts every request.
        costly_paths: Paths with a limited rate, which ask for the token.
        queued_path: The path of the requests that `limits.queue` counts.
        other_paths: More paths that metrics name.
        token: Secret that clients must send, or None.
        is_loopback: The service listens on the loopback interface only.
    """

    def __init__(
        self,
        app: App,
        limits: ServiceLimits,
        metrics: ServiceMetrics,
        *,
        costly_paths: tuple[str, ...],
        queued_path: str,
        other_paths: tuple[str, ...],
        token: str | None,
        is_loopback: bool,
    ):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._costly_paths, self._queued_path = costly_paths, queued_path
        self._known_paths = {*costly_paths, queued_path, *other_paths}
        self._authorization = f"Bearer {token}".encode() if token else None
        self._is_loopback = is_loopback
        self._rates = RateLimiter(limits.requests_per_minute)
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers or refuses a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._known_paths else "other"
        begin_s, status = time.monotonic(), _CLIENT_GONE

        async def send_and_watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                extra = [(name.encode(), value.encode()) for name, value in _SECURITY_HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in present)]
            await send(message)

        try:
            await self._admit(scope, receive, send_and_watch)
        except Exception:
            _logger.exception("a request failed")
            raise
        finally:
            self._metrics.requests.labels(path, status).inc()
            self._metrics.latency.labels(path).observe(time.monotonic() - begin_s)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
            self._check_site(scope["method"], headers)
            if scope["path"] in self._costly_paths:
                self._check_client(scope, headers)
            if scope["path"] != self._queued_path or scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            max_bytes = self._limits.upload_mb * 2**20
            self._check_length(headers, max_bytes)
            if self._open >= self._limits.queue:
                raise RequestError(
                    429,
                    f"the service is busy with {self._open} requests; try again in {_RETRY_S} s",
                    {"retry-after": str(_RETRY_S)},
                )
        except RequestError as error:
            await send_error(send, error)
            return
        self._open += 1
        self._metrics.open.set(self._open)
        try:
            await self._app(scope, limit_body(receive, max_bytes), send)
        finally:
            self._open -= 1
            self._metrics.open.set(self._open)

    def _check_site(self, method: str, headers: dict[str, bytes]) -> None:
        """Refuses what other web sites make a visitor's browser send."""
        host = headers.get("host", b"").decode("latin-1").lower()
        if self._is_loopback and _host_name(host) not in LOOPBACK_NAMES:
            raise RequestError(403, "this service only answers requests to localhost")
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None:
            try:
                is_own = urlsplit(origin.decode("latin-1")).netloc.lower() == host
            except ValueError:
                is_own = False
            if not is_own:
                raise RequestError(403, "requests from other web sites are refused")

    def _check_client(self, scope: Scope, headers: dict[str, bytes]) -> None:
        client = scope["client"][0] if scope["client"] else ""
        wait_s = self._rates.take(client)
        if wait_s:
            seconds = int(wait_s) + 1
            raise RequestError(
                429,
                f"more than {self._limits.requests_per_minute} requests per minute; try again in {seconds} s",
                {"retry-after": str(seconds)},
            )
        if self._authorization is None:
            return
        given = headers.get("authorization", b"")
        if not hmac.compare_digest(given, self._authorization):
            problem = "the token is wrong" if given else "a token is needed, as in Authorization: Bearer TOKEN"
            raise RequestError(401, problem, {"www-authenticate": "Bearer"})

    def _check_length(self, headers: dict[str, bytes], max_bytes: int) -> None:
        length = headers.get("content-length")
        if length is not None and int(length) > max_bytes:  # h11 has checked that it is a number
            raise _too_large(max_bytes)


class TimedConnection(H11Protocol):
    """uvicorn's connection, which ends if its client is slow with a header, leaves it idle, or does not read.

    uvicorn itself waits for ever: for the rest of a header, and for room in a full send buffer. A client that is
    refused while it still sends its body has the idle time to read the answer; what it sends is discarded.
    """

    limits = ServiceLimits()
    _idle_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    @classmethod
    def with_limits(cls, limits: ServiceLimits) -> type[TimedConnection]:
        """Returns a subclass, because uvicorn creates the connections."""
        return type(cls.__name__, (cls,), {"limits": limits})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time for the first header."""
        super().connection_made(transport)
        self._update_idle_timer()

    def data_received(self, data: bytes) -> None:
        """Stops the time once a header is complete."""
        super().data_received(data)
        self._update_idle_timer()

    def on_response_complete(self) -> None:
        """Starts the time for the next header."""
        super().on_response_complete()
        self._update_idle_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers."""
        for timer in (self._idle_timer, self._stall_timer):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Starts the time for the client to make room in the full buffer."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.limits.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops that time."""
        super().resume_writing()
        if self._stall_timer:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _update_idle_timer(self) -> None:
        """Starts the timer unless it runs, so that a byte now and then does not extend the time."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.limits.header_s, self.transport.abort)
        elif not is_idle and self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None


async def send_error(send: Send, error: RequestError) -> None:
    """Sends the response of a refused request: {"error": "..."}."""
    body = json.dumps({"error": error.message}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def limit_body(receive: Receive, max_bytes: int) -> Receive:
    """Returns a `receive` that raises RequestError once a body is larger, also if it has no Content-Length."""
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise _too_large(max_bytes)
        return message

    return receive_limited


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(413, f"the request is larger than {max_bytes / 2**20:g} MiB; scale the images down")


def _host_name(host: str) -> str:
    """Returns the name in a Host header, without a port and the brackets of IPv6."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
