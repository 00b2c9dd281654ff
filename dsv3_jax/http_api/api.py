"""The application: routes, and how each answers."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dsv3_jax.errors import UserError
from dsv3_jax.http_api import openapi
from dsv3_jax.http_api.guard import OPEN, Guard, check_json, refusal
from dsv3_jax.http_api.metrics import Metrics
from dsv3_jax.http_api.requests import ApiError, ChatRequest, CompletionRequest, StreamOptions, parse
from dsv3_jax.http_api.responses import Answer, ChatAnswer, CompletionAnswer, Model, error_object
from dsv3_jax.http_api.service import Inbox, Job, Running, Service
from dsv3_jax.http_api.streams import DONE, DisconnectedError, EventStream, event, until_disconnect
from dsv3_jax.http_api.text import Piece
from dsv3_jax.serve.request import QueueFullError, StoppedError

BODY_S = 30.0  # in which a request's body must have come
_INLINE = 4096  # bytes of a body that is prepared in less time than another thread takes to begin
# bytes of a body that is too large, which are read and dropped: many clients read no answer before they have sent
_LINGER = 2**26
_GONE = 499  # nginx's number for a client that went before its answer
_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


class Api:
    """The endpoints of one served model."""

    def __init__(self, service: Service, metrics: Metrics, with_keys: bool):
        self._service, self._metrics = service, metrics
        self._inbox: Inbox | None = None  # of the loop that serves
        self._page = (files("dsv3_jax.http_api") / "page.html").read_text(encoding="utf-8")
        self._openapi = openapi.document(with_keys)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": _PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        why = self._service.engine.stopped
        return JSONResponse({"status": why or "ok"}, 503 if why else 200)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._metrics.text(self._service.engine.stats()), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._openapi)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response | EventStream:
        wanted, jobs = await self._prepared(request, CompletionRequest, self._service.completion_jobs)
        answer = CompletionAnswer(self._service.name, self._service.vocabulary, wanted.logprobs is not None)
        return await self._answer(request, wanted, jobs, answer)

    async def chat(self, request: Request) -> Response | EventStream:
        wanted, jobs = await self._prepared(request, ChatRequest, self._service.chat_jobs)
        answer = ChatAnswer(self._service.name, self._service.vocabulary, bool(wanted.logprobs))
        return await self._answer(request, wanted, jobs, answer)

    async def _prepared[R: CompletionRequest | ChatRequest](
        self, request: Request, kind: type[R], jobs: Callable[[R], list[Job]]
    ) -> tuple[R, list[Job]]:
        """What a request's body asks for: found beside the loop where that may take long. Raises `ApiError`, `UserError`."""

        def prepare(body: bytes) -> tuple[R, list[Job]]:
            wanted = parse(kind, body)
            self._check_model(wanted.model)
            return wanted, jobs(wanted)

        body = await _body(request, _body_limit(self._service.engine.context))
        if len(body) <= _INLINE and b"response_format" not in body:
            return prepare(body)
        return await asyncio.to_thread(prepare, body)

    def _model(self) -> Model:
        its = self._service
        return {
            "id": its.name, "object": "model", "created": its.created, "owned_by": "dsv3_jax",
            "max_model_len": its.engine.context, "chat": its.template is not None,
        }  # fmt: skip

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._service.name):
            raise ApiError(404, f"there is no such model; this server has {self._service.name}", "model", "model_not_found")

    async def _answer(
        self, request: Request, wanted: CompletionRequest | ChatRequest, jobs: list[Job], answer: Answer
    ) -> Response | EventStream:
        """Raises `UserError` or `QueueFullError` while there is still a status to say so by."""
        if self._inbox is None:
            self._inbox = Inbox()
        began = time.monotonic()
        running = Running(self._service, jobs, self._inbox, request.state.cache_salt)
        if wanted.stream:
            options = wanted.stream_options or StreamOptions()
            return EventStream(self._events(running, answer, options, began), running.cancel)
        try:
            return await until_disconnect(self._whole(running, answer, began), request.receive)
        finally:
            running.cancel()

    async def _whole(self, running: Running, answer: Answer, began: float) -> Response:
        found = [Piece()] * len(running.choices)
        async for new in self._timed(running, began):
            for i, piece in new.items():
                found[i] = found[i].then(piece)
        choices = [answer.choice(i, piece) for i, piece in enumerate(found)]
        return JSONResponse(answer.head(stream=False) | {"choices": choices, "usage": running.usage()})

    async def _events(self, running: Running, answer: Answer, options: StreamOptions, began: float) -> AsyncIterator[bytes]:
        head, begun = answer.head(stream=True), set()
        try:
            async for new in self._timed(running, began):
                usage = {"usage": running.usage() if options.continuous_usage_stats else None} if options.include_usage else {}
                chunks = []
                for i, piece in new.items():
                    chunks.append(event(head | {"choices": [answer.chunk(i, piece, i not in begun)]} | usage))
                    begun.add(i)
                yield b"".join(chunks)
            if options.include_usage:
                yield event(head | {"choices": [], "usage": running.usage()})
        except ApiError as error:
            yield event(error_object(error))
        yield DONE

    async def _timed(self, running: Running, began: float) -> AsyncIterator[dict[int, Piece]]:
        first = True
        async for new in running.pieces():
            if first:
                self._metrics.first_token.observe(time.monotonic() - began)
                first = False
            yield new
        self._metrics.duration.observe(time.monotonic() - began)


async def _body(request: Request, most: int) -> bytes:
    """The body. Raises `ApiError` for one that is not declared JSON, is too large, or does not come."""
    check_json(request.headers)
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    body += part
                elif size > most + _LINGER:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body has not come within {BODY_S:.0f} s") from None
    if size > most:
        raise ApiError(413, f"the body has more than {most:,} bytes", code="too_large")
    return bytes(body)


class _Counting:
    """Counts responses by status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope, receive, send) -> None:
        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.statuses[message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counted)


def _body_limit(context: int) -> int:
    """Bytes of the largest body: a batch of prompts that fill the context, and what JSON adds."""
    return 2**21 + 64 * context


def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = refusal(ApiError(error.status_code, error.detail.lower()))
    response.headers.update(error.headers or {})  # such as which methods a path allows
    return response


def _refuse(request: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            return refusal(error)
        case QueueFullError():
            return refusal(ApiError(503, str(error), code="queue_full", retry_s=error.retry_after_s))
        case StoppedError():
            return refusal(ApiError(503, str(error), code="stopped", retry_s=1))
        case UserError():
            return refusal(ApiError(400, str(error), code="invalid_value"))
        case DisconnectedError() | ClientDisconnect():
            return Response(status_code=_GONE)
        case _:
            return refusal(ApiError(500, "an error of the server, which its log describes", code="internal_error"))


def make_app(service: Service, keys: Collection[str] = ()) -> ASGIApp:
    """The application that answers for a service, to callers with one of the keys."""
    metrics = Metrics()
    api = Api(service, metrics, bool(keys))
    kinds = (ApiError, QueueFullError, UserError, DisconnectedError, ClientDisconnect, Exception)
    app = Starlette(
        routes=[
            Route("/", api.page),
            Route(OPEN, api.health),
            Route("/metrics", api.metrics),
            Route("/openapi.json", api.openapi),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
        ],
        middleware=[Middleware(_Counting, metrics=metrics), Middleware(Guard, keys=keys)],
        exception_handlers={HTTPException: _refuse_http} | dict.fromkeys(kinds, _refuse),
    )
    app.router.redirect_slashes = False  # a redirection would go to the host that the request names
    return app
