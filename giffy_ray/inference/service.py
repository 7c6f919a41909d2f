"""Serves a model over HTTP: a page, `POST /interpolate`, reloads, health and metrics. FastAPI in front of Ray Serve.

    request --Guard--> multipart form --ImageSandbox--> checked images, in the queue
                                      --a free place--> decoded again --Ray Serve--> InterpolationWorker --> clips

The HTTP server runs in this process rather than in Serve's proxy, which reads a whole body into memory before the
application sees its first byte, and waits for ever for slow clients. Serve runs the workers, restarts those that end,
and balances their load.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import zipfile
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from giffy_ray.cluster.local import check_temp_dir_length
from giffy_ray.core.errors import InputError
from giffy_ray.core.machine import usable_cores
from giffy_ray.inference.service_guard import (
    LOOPBACK_NAMES,
    App,
    Guard,
    RequestError,
    ServiceLimits,
    TimedConnection,
)
from giffy_ray.inference.service_queue import RELOAD_INTERVAL_S, Backend, Service
from giffy_ray.inference.service_worker import MEDIA_TYPES, InterpolationWorker, ModelVersion, Options, Part

DEFAULT_MODEL = "between"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
_PAGE_FILES = {"/": "index.html", "/app.js": "app.js", "/style.css": "style.css", "/icon.svg": "icon.svg"}
_PAGE_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_CHUNK_BYTES = 2**16  # of a response, so that `TimedConnection` notices a client that does not read
_MAX_OPTION_BYTES = 1000
_MAX_SHOWN_CHARS = 60  # of a client's value in an error
_CLIENT_GONE = 499  # never sent
_STOP_TIMEOUT_S = 10  # for requests in progress when the service stops
_REQUESTS_PER_WORKER = 2  # one is computed, and the next one follows at once
_OTHER_CALLS = 2  # of a worker at the same time: reload and health check
_OBJECT_STORE_BYTES = 512 * 2**20  # for images and clips on their way to and from workers
_logger = logging.getLogger("giffy_ray")

_Result = TypeVar("_Result")


class ServeBackend:
    """Computes clips in the workers of a Ray Serve application.

    Args:
        handle: Handle of a deployment of `InterpolationWorker`.
    """

    def __init__(self, handle: Any):
        self._handle = handle

    async def ping(self) -> None:
        """Raises an exception if no worker answers."""
        await self._handle.ping.remote()

    async def load(self, model: ModelVersion) -> None:
        """Loads a model in a worker; other workers load it with their first request. Raises InputError."""
        from ray.exceptions import RayTaskError

        try:
            await self._handle.load.remote(model)
        except RayTaskError as error:  # its message is a traceback
            raise (error.cause if isinstance(error.cause, InputError) else error) from None

    async def generate(
        self, model: ModelVersion, start: np.ndarray, end: np.ndarray, options: Options
    ) -> AsyncGenerator[Part, None]:
        """Yields the files of a response. Raises InputError before the first one."""
        response = self._handle.options(stream=True).generate.remote(model, start, end, options)
        is_complete = False
        try:
            async for part in response:
                if isinstance(part, InputError):
                    raise part
                yield part
            is_complete = True
        finally:
            if not is_complete:
                response.cancel()


class InterpolationForm(NamedTuple):
    """The content of a request."""

    start: UploadFile
    end: UploadFile
    options: Options


def create_app(service: Service, token: str | None = None, is_loopback: bool = True) -> Guard:
    """Creates the HTTP application, behind its guard.

    Args:
        service: What the routes call; it must run meanwhile.
        token: Clients must send it with POST requests, if there is one.
        is_loopback: Only requests to localhost are answered, so that no web site can pretend to be this one.
    """
    # FastAPI's own /docs loads its scripts from another host.
    app = FastAPI(title="giffy_ray", version="1", docs_url=None, redoc_url=None)
    for path, name in _PAGE_FILES.items():
        _add_page_file(app, path, name)

    @app.get("/info")
    def info() -> dict[str, Any]:
        """The model, the limits, and whether a token is needed."""
        return {"model": service.model.label, "needs_token": token is not None, "limits": vars(service.limits)}

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """Whether the workers answer."""
        service.check_health()
        return {"status": "ok", "model": service.model.label}

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Metrics in the text format of Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/reload")
    async def reload() -> dict[str, Any]:
        """Load the newest version of the model. Requests in progress keep theirs."""
        if token is None:
            raise RequestError(403, "reloads need a service that was started with a token")
        try:
            is_new = await service.reload()
        except InputError as error:
            raise RequestError(502, f"requests still get {service.model.label}: {error}") from None
        return {"model": service.model.label, "changed": is_new}

    @app.post("/interpolate", response_class=Response, openapi_extra=_describe_form(), responses=_describe_responses())
    async def interpolate(request: Request) -> Response:
        """Generate the clips between two images."""
        return await _respond(request, service, await _read_form(request, service.limits))

    _add_error_handlers(app)
    return Guard(  # around FastAPI's own error handling, so that it sees every response
        cast(App, app),
        limits=service.limits,
        metrics=service.metrics,
        costly_paths=("/interpolate", "/reload"),
        queued_path="/interpolate",
        other_paths=(*_PAGE_FILES, "/info", "/healthz", "/metrics", "/openapi.json"),
        token=token,
        is_loopback=is_loopback,
    )


def _add_page_file(app: FastAPI, path: str, name: str) -> None:
    content = resources.files("giffy_ray.inference").joinpath("service_page", name).read_bytes()
    media_type = _PAGE_TYPES[name.rpartition(".")[2]]

    @app.get(path, response_class=Response, include_in_schema=False)
    def page_file() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})


def _add_error_handlers(app: FastAPI) -> None:
    """Makes every error {"error": "one sentence"}."""

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return JSONResponse({"error": error.message}, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "the service failed; its log says why"}, 500)


async def _read_form(request: Request, limits: ServiceLimits) -> InterpolationForm:
    """Reads a multipart form, whose large files Starlette keeps on disk. Raises RequestError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise RequestError(415, "expected multipart/form-data with the images start and end")
    try:
        async with asyncio.timeout(limits.upload_s):
            form = await request.form(
                max_files=3, max_fields=len(Options.model_fields) + 3, max_part_size=_MAX_OPTION_BYTES
            )
    except TimeoutError:
        raise RequestError(408, f"the upload took longer than {limits.upload_s} s") from None
    except ClientDisconnect:
        raise RequestError(_CLIENT_GONE, "the client hung up") from None
    try:
        return _parse_form(form, limits)
    except RequestError:
        await form.close()
        raise


def _parse_form(form: FormData, limits: ServiceLimits) -> InterpolationForm:
    files: dict[str, UploadFile] = {}
    values: dict[str, str] = {}
    for name, value in form.multi_items():
        if name in files or name in values:
            raise RequestError(422, f"{_show(name)} is given twice")
        if isinstance(value, UploadFile):
            files[name] = value
        else:
            values[name] = value
    for name in ("start", "end"):
        if name not in files:
            problem = "is text; send it as a file" if name in values else "is missing; send two images, start and end"
            raise RequestError(422, f"{name}: {problem}")
    if unknown := sorted(set(files) - {"start", "end"}):
        raise RequestError(422, f"{_show(unknown[0])} is a file; the images are start and end")
    try:
        options = Options.model_validate(values)
    except ValidationError as error:
        raise RequestError(422, _explain(error)) from None
    for name in ("frames", "samples"):
        value, limit = getattr(options, name), getattr(limits, name)
        if value > limit:
            raise RequestError(422, f"{name}: must be at most {limit} (value {_show(value)})")
    return InterpolationForm(files["start"], files["end"], options)


def _explain(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return f"{_show(name)} is no option; the options are {', '.join(Options.model_fields)}"
    return f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]} (value {_show(problem['input'])})"


def _show(value: Any) -> str:
    """Returns a client's value for a message, printable and short."""
    shown = ascii(value)
    return shown if len(shown) <= _MAX_SHOWN_CHARS else f"{shown[:_MAX_SHOWN_CHARS]}..."


async def _respond(request: Request, service: Service, form: InterpolationForm) -> Response:
    """Generates the clips. The status is known with the first part. Raises RequestError."""
    model = service.model
    parts = _iter_parts(service, model, form)
    first_parts = await _run_while_connected(request, _take(parts, 1 if form.options.preview else None))
    headers = {"x-giffy-model": model.label}
    if form.options.preview:
        boundary = secrets.token_hex(16)
        media_type = f"multipart/mixed; boundary={boundary}"
        return _StreamedResponse(
            _stream_multipart(first_parts, parts, boundary), media_type=media_type, headers=headers
        )
    file = _zip(first_parts) if len(first_parts) > 1 else first_parts[0]._replace(name=f"clip.{form.options.format}")
    headers |= {
        "content-disposition": f'attachment; filename="{file.name}"',
        "content-length": str(len(file.content)),
    }
    return _StreamedResponse(_iter_chunks(file.content), media_type=file.media_type, headers=headers)


class _StreamedResponse(StreamingResponse):
    """A response whose generator ends with it, also if the client hangs up."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with contextlib.aclosing(cast(AsyncGenerator, self.body_iterator)):
            await super().__call__(scope, receive, send)


async def _iter_parts(service: Service, model: ModelVersion, form: InterpolationForm) -> AsyncGenerator[Part, None]:
    """Yields the files of a response within the limits. Raises RequestError."""
    deadline_s = asyncio.get_running_loop().time() + service.limits.request_s
    steps = _generate(service, model, form)
    try:
        async with contextlib.aclosing(steps):
            while True:
                async with asyncio.timeout_at(deadline_s):
                    part = await anext(steps, None)
                if part is None:
                    return
                yield part
    except InputError as error:
        raise RequestError(422, str(error)) from None
    except TimeoutError:
        limit = f"{service.limits.request_s} s"
        raise RequestError(504, f"took longer than {limit}; ask for fewer frames or a smaller size") from None
    finally:
        form.start.file.close()
        form.end.file.close()


async def _generate(service: Service, model: ModelVersion, form: InterpolationForm) -> AsyncGenerator[Part, None]:
    options = form.options
    height, width = await service.check_image(form.start.file, "start", options.size)
    await service.check_image(form.end.file, "end", options.size)
    frames = options.samples * options.count_frames()
    limit = service.limits.clip_megapixels
    if frames * height * width > limit * 1e6:
        raise InputError(
            f"{frames} frames of {width}x{height} are {frames * height * width / 1e6:.0f} million pixels; the limit is "
            f"{limit:g} million, ask for fewer frames or samples, or a smaller size"
        )
    async with contextlib.aclosing(service.generate(model, form.start.file, form.end.file, options)) as parts:
        async for part in parts:
            yield part


async def _take(parts: AsyncGenerator[Part, None], count: int | None) -> list[Part]:
    """Returns the next `count` parts, or all of them."""
    taken: list[Part] = []
    while (count is None or len(taken) < count) and (part := await anext(parts, None)) is not None:
        taken.append(part)
    return taken


async def _run_while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Cancels the work if the client hangs up. Raises RequestError then."""
    task, hang_up = asyncio.create_task(work), asyncio.create_task(_wait_for_hang_up(request))
    try:
        await asyncio.wait({task, hang_up}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(_CLIENT_GONE, "the client hung up")
        return task.result()
    finally:
        task.cancel()
        hang_up.cancel()
        await asyncio.gather(task, hang_up, return_exceptions=True)


async def _wait_for_hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _zip(parts: Sequence[Part]) -> Part:
    """Packs clips, which are compressed already."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for part in parts:
            archive.writestr(part.name, part.content)
    return Part("samples.zip", "application/zip", out.getvalue())


async def _iter_chunks(content: bytes) -> AsyncGenerator[bytes, None]:
    for begin in range(0, len(content), _CHUNK_BYTES):
        yield content[begin : begin + _CHUNK_BYTES]


async def _stream_multipart(
    first_parts: list[Part], parts: AsyncGenerator[Part, None], boundary: str
) -> AsyncGenerator[bytes, None]:
    """Yields the body of a multipart/mixed response. An error after its start is a last part called `error`."""
    async with contextlib.aclosing(parts):
        try:
            for part in first_parts:
                yield _format_part(part, boundary)
            async for part in parts:
                yield _format_part(part, boundary)
        except RequestError as error:
            yield _format_part(_error_part(error.message), boundary)
        except Exception:
            _logger.exception("a request failed after the start of its response")
            yield _format_part(_error_part("the service failed; its log says why"), boundary)
    yield f"--{boundary}--\r\n".encode()


def _error_part(message: str) -> Part:
    return Part("error", "application/json", json.dumps({"error": message}).encode())


def _format_part(part: Part, boundary: str) -> bytes:
    header = (
        f'--{boundary}\r\nContent-Disposition: attachment; filename="{part.name}"\r\n'
        f"Content-Type: {part.media_type}\r\nContent-Length: {len(part.content)}\r\n\r\n"
    )
    return header.encode() + part.content + b"\r\n"


def _describe_form() -> dict[str, Any]:
    """Describes the multipart form for OpenAPI."""
    schema = Options.model_json_schema()
    images = {name: {"type": "string", "format": "binary"} for name in ("start", "end")}
    schema |= {"properties": images | schema["properties"], "required": ["start", "end"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _describe_responses() -> dict[int | str, dict[str, Any]]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    error = {"schema": {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}}
    media_types = (*MEDIA_TYPES.values(), "application/zip", "multipart/mixed")
    descriptions = {
        401: "The token is missing or wrong.",
        403: "The request comes from another web site.",
        408: "The upload is too slow.",
        413: "The upload is too large.",
        415: "The body is no multipart form.",
        422: "An image or an option cannot be used.",
        429: "Too many requests; Retry-After says when to try again.",
        504: "The time is over.",
    }
    return {
        200: {
            "description": "The clip; for several samples a zip file; with preview multipart/mixed.",
            "content": dict.fromkeys(media_types, binary),
        },
        **{
            status: {"description": text, "content": {"application/json": error}}
            for status, text in descriptions.items()
        },
    }


def run_service(
    model: str = DEFAULT_MODEL,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    *,
    token: str | None = None,
    device: str = "auto",
    workers: int = 1,
    limits: ServiceLimits | None = None,
    reload_interval_s: float = RELOAD_INTERVAL_S,
) -> None:
    """Serves a model until SIGTERM or Ctrl-C, and leaves no process behind.

    Joins the Ray cluster of RAY_ADDRESS, or starts a private one.

    Args:
        model: Name of a model of the package, path or URI of a checkpoint, `models:/NAME@ALIAS` or `models:/NAME/3`.
        host: Address to listen on.
        port: The port; 0 takes a free one.
        token: Secret that clients must send, or None.
        device: Of the workers: `cpu`, `cuda`, `mps`, or `auto`.
        workers: Number of processes that compute; they divide the cores or GPUs.
        limits: The limits.
        reload_interval_s: How often the registry is asked for the version of an alias.

    Raises:
        InputError: An argument cannot be used, or the port is taken.
    """
    limits = limits or ServiceLimits()
    if workers < 1:
        raise InputError(f"workers: must be at least 1 (value {workers})")
    if not 0 <= port < 2**16:
        raise InputError(f"port: must be 0 to 65535 (value {port})")
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise InputError("token: must consist of printable ASCII characters without spaces")
    is_loopback = host in LOOPBACK_NAMES
    with _bind(host, port) as listener, _stop_on_signals():
        if not is_loopback and token is None:
            print(f"warning: everyone who can reach {host} can use this service; set a token", file=sys.stderr)
        print("starting the workers; this takes about half a minute", flush=True)
        with start_workers(device, workers) as backend:
            asyncio.run(_serve(backend, listener, model, token, workers, limits, reload_interval_s, is_loopback))
    print("stopped", flush=True)


async def _serve(
    backend: Backend,
    listener: socket.socket,
    model: str,
    token: str | None,
    workers: int,
    limits: ServiceLimits,
    reload_interval_s: float,
    is_loopback: bool,
) -> None:
    parallel = workers * _REQUESTS_PER_WORKER
    service = Service(backend, model, limits, parallel=parallel, reload_interval_s=reload_interval_s)
    async with service.run():
        server = create_server(create_app(service, token, is_loopback), limits)
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"{service.model.label} is served at http://{address}; Ctrl-C stops it", flush=True)
        await server.serve(sockets=[listener])


def create_server(app: App, limits: ServiceLimits) -> uvicorn.Server:
    """Creates the HTTP server. It logs nothing about what clients send; `Guard` logs failures."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    config = uvicorn.Config(
        cast(Any, app),
        http=TimedConnection.with_limits(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,  # clients could choose the address whose rate is limited
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=limits.header_s,
        timeout_graceful_shutdown=_STOP_TIMEOUT_S,
    )
    return uvicorn.Server(config)


@contextlib.contextmanager
def start_workers(device: str = "auto", workers: int = 1) -> Iterator[ServeBackend]:
    """Runs workers in Ray Serve during the block: in the Ray of this process, of RAY_ADDRESS, or in a private one."""
    with _connect_ray(workers):
        import ray
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        name = f"giffy_ray-{secrets.token_hex(4)}"  # others may serve on the same cluster
        gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        deployment = serve.deployment(InterpolationWorker).options(
            num_replicas=workers,
            max_ongoing_requests=_REQUESTS_PER_WORKER + _OTHER_CALLS,
            ray_actor_options={"num_cpus": 1, "num_gpus": 1 / math.ceil(workers / gpus) if gpus else 0},
            graceful_shutdown_timeout_s=_STOP_TIMEOUT_S,
            graceful_shutdown_wait_loop_s=0.5,
        )
        threads = max(1, int(usable_cores()) // workers)
        serve.start(proxy_location="Disabled")
        try:
            handle = serve.run(deployment.bind(device, threads), name=name, route_prefix=None)
            yield ServeBackend(handle)
        finally:
            serve.delete(name)


@contextlib.contextmanager
def _connect_ray(workers: int) -> Iterator[None]:
    if os.environ.get("RAY_ADDRESS"):
        from giffy_ray.cluster.resources import connect

        connect()
        yield
        return
    folder = tempfile.mkdtemp(prefix="giffy_ray-")
    environment = dict(os.environ)
    try:
        check_temp_dir_length(folder)
        if "RAY_AUTH_MODE" not in os.environ:  # keeps other users out; Ray reads it when it is imported
            token_path = Path(folder, "token")
            token_path.touch(0o600)
            token_path.write_text(secrets.token_hex(32))
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if ray.is_initialized():
            yield
            return
        sigterm_handler = signal.getsignal(signal.SIGTERM)
        ray.init(
            address="local",
            num_cpus=workers,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm_handler)  # Ray has replaced it
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"):
            if name not in environment:
                os.environ.pop(name, None)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _bind(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a socket that is bound, but does not listen yet. Raises InputError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"host: {host!r} is no address to listen on ({error.strerror})") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise InputError(f"port: {host}:{port} cannot be used ({error.strerror}); choose another one") from error
        yield listener


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Ends the block in an orderly way on SIGTERM, SIGHUP or SIGINT, and ignores them until it has ended."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    is_stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal is_stopped
        if not is_stopped:
            is_stopped = True
            raise SystemExit

    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except SystemExit:
        if not is_stopped:
            raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
