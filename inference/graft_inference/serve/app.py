"""The routes of the server, and its error responses."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from socket import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import GraftError
from .answer import Answer, Asked, Piece, TooLong
from .metrics import Metrics
from .protocol import ChatBody, CompletionBody, Generating, Refused, Reply, error_of, event, usage_of
from .scheduler import Overloaded, Scheduler

ASKING = ("/v1/completions", "/v1/chat/completions")
RETRY_AFTER = 2
"""Seconds after which a request that found no place may come again."""
GRACE = 5
"""Seconds that a response may take to end, once the server is told to."""
CLOSED = 499
"""The status for a client that has gone: nobody reads it."""


class NoSuchModel(Refused):
    """A request for another model."""


class BodyLimit:
    """Middleware that refuses request bodies over a size, while they arrive.

    Args:
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.most:
                raise HTTPException(413, f"the body has more than {self.most} bytes, which is this server's limit")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)


class Streamed(StreamingResponse):
    """A stream of server-sent events; the answer is cancelled when its client disconnects."""

    def __init__(self, events: AsyncIterator[str], answer: Answer) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()


class Server(uvicorn.Server):
    """uvicorn's server, which reports when it listens, and does not wait for long answers when a signal ends it.

    Args:
        ready: called once requests are accepted.
    """

    def __init__(self, app: FastAPI, scheduler: Scheduler, ready: Callable[[], None]) -> None:
        # The same loop and parser everywhere, whatever else is installed.
        config = uvicorn.Config(app, loop="asyncio", http="h11", log_level="warning", timeout_graceful_shutdown=GRACE)
        super().__init__(config)
        self.scheduler = scheduler
        self.ready = ready

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.scheduler.end()
        super().handle_exit(sig, frame)


def make_app(scheduler: Scheduler, metrics: Metrics, name: str, most_bytes: int) -> FastAPI:
    """The server's application.

    Args:
        name: the model's, in requests and answers.
        most_bytes: of a body.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        scheduler.end()
        await asyncio.to_thread(scheduler.join)

    app = FastAPI(title="graft-serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, most=most_bytes)
    _add_errors(app, metrics)
    models = [{"id": name, "object": "model", "owned_by": "graft", "max_model_len": scheduler.limits.model_length}]

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/metrics")
    async def shown() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": models}

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, http: Request) -> Response:
        return await _respond(scheduler, http, Reply(body, name, is_chat=False), body.to_asked())

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        return await _respond(scheduler, http, Reply(body, name, is_chat=True), body.to_asked())

    return app


async def _respond(scheduler: Scheduler, http: Request, reply: Reply, asked: Asked) -> Response:
    body: Generating = reply.body
    if body.model not in (None, reply.model):
        raise NoSuchModel(f"the model {body.model} is not here, {reply.model} is", "model")
    loop, told = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception | None]()

    def tell(one: Piece | Exception | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(told.put_nowait, one)

    answer = Answer(asked, tell)
    scheduler.submit(answer)
    async with _leaving(http, answer):
        first = await told.get()
        streams = body.stream and isinstance(first, Piece)
        pieces = [] if streams else [one async for one in _rest(first, told)]
    if streams:
        return Streamed(_events(reply, answer, first, told), answer)
    if failed := next((one for one in pieces if isinstance(one, Exception)), None):
        return JSONResponse(*_told(failed))
    if answer.outcome != "completed":
        return Response(status_code=CLOSED)
    found = [one for one in pieces if isinstance(one, Piece)]
    return JSONResponse(reply.whole(answer.prompt_ids, found, _usage(answer)))


async def _events(
    reply: Reply, answer: Answer, first: Piece | Exception | None, told: asyncio.Queue[Piece | Exception | None]
) -> AsyncIterator[str]:
    for line in reply.opening():
        yield line
    async for one in _rest(first, told):
        if isinstance(one, Exception):
            yield event(_told(one)[0])
            return
        for line in reply.piece(one):
            yield line
    for line in reply.closing(_usage(answer)):
        yield line


async def _rest(
    first: Piece | Exception | None, told: asyncio.Queue[Piece | Exception | None]
) -> AsyncIterator[Piece | Exception]:
    """All that is told of an answer, until nothing more comes."""
    one = first
    while one is not None:
        yield one
        one = await told.get()


@asynccontextmanager
async def _leaving(http: Request, answer: Answer) -> AsyncIterator[None]:
    """While the block runs, a client that goes ends its answer."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        answer.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        answer.cancel()
        raise
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


def _usage(answer: Answer) -> dict[str, Any]:
    return usage_of(len(answer.prompt_ids), answer.stats.emitted, answer.stats.reused)


def _told(error: Exception) -> tuple[dict[str, Any], int]:
    """The error body and the HTTP status for a request that failed after it was accepted."""
    if isinstance(error, GraftError):
        return _bad_request(error), 404 if isinstance(error, NoSuchModel) else 400
    if isinstance(error, Overloaded):
        return error_of(str(error), "overloaded_error"), 503
    return error_of("the server could not answer; its log says why", "internal_error"), 500


def _bad_request(error: GraftError) -> dict[str, Any]:
    param = error.param if isinstance(error, Refused) else None
    codes = {TooLong: "context_length_exceeded", NoSuchModel: "model_not_found"}
    return error_of(" ".join(str(error).split()), "invalid_request_error", param, codes.get(type(error)))


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(error_of(message, "invalid_request_error", param), status)


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    """Handlers for requests that are not accepted: errors in OpenAI's shape, counted."""

    def count(http: Request, outcome: str) -> None:
        if http.url.path in ASKING:
            metrics.requests.labels(outcome).inc()

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        count(http, "refused")
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part != "body"]
        if isinstance(own := first.get("ctx", {}).get("error"), GraftError):
            return JSONResponse(_bad_request(own), 400)
        if first["type"] == "json_invalid":
            return _error(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        if first["type"] == "extra_forbidden":
            return _error(400, f"Unrecognized request argument supplied: {'.'.join(path)}", ".".join(path))
        return _error(400, f"{'.'.join(path) or 'the body'}: {first['msg']}", ".".join(path) or None)

    @app.exception_handler(GraftError)
    async def refused(http: Request, error: GraftError) -> Response:
        count(http, "refused")
        return JSONResponse(*_told(error))

    @app.exception_handler(Overloaded)
    async def overloaded(http: Request, error: Overloaded) -> Response:
        count(http, "overloaded")
        return JSONResponse(*_told(error), headers={"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(HTTPException)
    async def other(http: Request, error: HTTPException) -> Response:
        count(http, "refused")
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def failed(http: Request, error: Exception) -> Response:
        count(http, "failed")
        return JSONResponse(*_told(error))
