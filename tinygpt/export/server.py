"""A model behind OpenAI's HTTP interface, and its page at /.

HTTP is answered in a thread of its own; the model computes in the thread that calls `serve`.
"""

import asyncio
import gc
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tinygpt import device
from tinygpt.config import SampleConfig
from tinygpt.data.chat import ChatTemplate, chat_template_of
from tinygpt.export.chat_completions import ChatAnswer, parse_chat
from tinygpt.export.completions import Answer, Completion, RequestError, parse
from tinygpt.export.schedule import PLACES, Piece, Scheduler
from tinygpt.inference.decoder import MOST_IDLE, cache_size

MOST_BODY = 1 << 20  # bytes
BODY_SECONDS = 10  # in which a body has to arrive
MOST_CONNECTIONS = 1024
MOST_ROWS = 8  # of a batch
TICK = 0.3  # seconds between two looks at the signals
GARBAGE = 20_000  # new objects after which cycles are collected
HEADERS = {"Content-Security-Policy": "frame-ancestors 'none'", "Cache-Control": "no-store"}


class Service:
    """The endpoints."""

    def __init__(self, model, name: str, page: bytes, defaults: SampleConfig):
        self.tokenizer, self.config = model.tokenizer, model.config
        self.name, self.page, self.defaults = name, page, defaults
        self.created = int(time.time())
        self.scheduler = Scheduler(model, rows_that_fit(model))

    def app(self, host: str) -> ASGIApp:
        """The application; host is the name that it is served under besides localhost."""
        routes = [Route("/", self.show_page), Route("/v1/models", self.list_models),
                  Route("/v1/models/{name:path}", self.show_model),
                  Route("/v1/completions", self.complete, methods=["POST"]),
                  Route("/v1/chat/completions", self.chat, methods=["POST"])]
        app = Starlette(routes=routes, exception_handlers={
            RequestError: refuse, HTTPException: refuse_path, ClientDisconnect: forget})
        return Guard(app, host)

    async def show_page(self, request: Request) -> Response:
        return HTMLResponse(self.page, headers=HEADERS)

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def show_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "tinygpt"}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise RequestError(f"there is no model {name[:80]!r}: this server has {self.name}",
                               status=404, param="model", code="model_not_found")

    async def complete(self, request: Request) -> Response:
        return await self._respond(request, Answer, lambda body: parse(
            body, self.tokenizer, self.config.vocab_size, self.defaults, self.scheduler.most_rows))

    async def chat(self, request: Request) -> Response:
        return await self._respond(request, ChatAnswer, lambda body: parse_chat(
            body, self.template, self.config.block_size, self.defaults, self.scheduler.most_rows))

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises RequestError where the tokenizer has none that can be used."""
        try:
            return chat_template_of(self.tokenizer)
        except ValueError as error:
            raise RequestError(f"{self.name} holds no conversation: {error}") from error

    async def _respond(self, request: Request, answer_class: type[Answer],
                       parse: Callable[[object], Completion]) -> Response:
        body = await read_json(request)
        completion = await asyncio.to_thread(parse, body)
        self._check_model(completion.options.model)
        answer = answer_class(completion, self.name, self.tokenizer)
        writing = Writing(self.scheduler, completion)
        if completion.options.stream:
            return Events(writing, answer)
        with writing:
            pieces = await unless_disconnected(request, writing.all_pieces(answer.unfinished))
        return JSONResponse(answer.whole(pieces))


class Writing:
    """The pieces of a completion, in the order in which they are written.

    Raises RequestError if the queue is full. Leaving its context frees the places.
    """

    def __init__(self, scheduler: Scheduler, completion: Completion):
        loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue()
        self._scheduler = scheduler
        self._jobs = completion.jobs(
            lambda piece: loop.call_soon_threadsafe(self._pieces.put_nowait, piece))
        if not scheduler.submit(self._jobs):
            raise RequestError("too many requests are waiting: try again later", status=429,
                               code="rate_limit_exceeded")

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._scheduler.leave(self._jobs)

    async def next_piece(self) -> Piece:
        """Raises RequestError where the model failed."""
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise RequestError(f"the model failed ({type(piece).__name__}: {piece})", status=500)
        return piece

    async def all_pieces(self, unfinished: int) -> list[Piece]:
        pieces = []
        while unfinished:
            pieces.append(await self.next_piece())
            unfinished -= pieces[-1].finish is not None
        return pieces


class Events(StreamingResponse):
    """A completion as server-sent events, one for each piece."""

    def __init__(self, writing: Writing, answer: Answer):
        self.writing, self.answer = writing, answer
        super().__init__(self._events(), media_type="text/event-stream", headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.writing:  # until the last event is sent, or the client has left
            await super().__call__(scope, receive, send)

    async def _events(self) -> AsyncIterator[str]:
        try:
            while self.answer.unfinished:
                yield event(self.answer.chunk(await self.writing.next_piece()))
        except RequestError as error:
            yield event(error.body)
        if self.answer.completion.include_usage:
            yield event(self.answer.last_chunk())
        yield "data: [DONE]\n\n"


def event(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def read_json(request: Request) -> object:
    """The JSON value in the body of a request. Raises RequestError."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST_BODY:
                    raise RequestError(f"the request has more than {MOST_BODY:,} bytes: send a "
                                       "shorter prompt", status=413)
        return json.loads(body)
    except TimeoutError as error:
        raise RequestError(f"the request did not arrive within {BODY_SECONDS} seconds", status=408
                           ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"the request is not JSON ({str(error)[:80]})") from error


async def unless_disconnected(request: Request, work) -> list[Piece]:
    """Awaits work. Raises ClientDisconnect, and cancels the work, once the client has left."""
    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def refuse(request: Request, error: RequestError) -> Response:
    return JSONResponse(error.body, error.status)


async def refuse_path(request: Request, error: HTTPException) -> Response:
    error = RequestError(f"{request.method} {request.url.path[:80]}: {error.detail}",
                         status=error.status_code)
    return JSONResponse(error.body, error.status)


async def forget(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


class Guard:
    """Refuses the requests that pages of other sites make a browser send.

    The Host of a request has to be an address of IP, localhost or `host`, since another name may
    have been pointed to this machine by its owner; and the Origin, where there is one, has to be
    the page of this server.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app, self.names = app, {"localhost", host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        request = Request(scope)
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        error = None
        if not self._is_ours(host):
            error = f"the host {host[:80]!r} is not served here: use an address, or --host"
        elif origin is not None and origin.lower() != f"http://{host.lower()}":
            error = f"pages of {origin[:80]!r} are not served here"
        if error is None:
            return await self.app(scope, receive, send)
        refused = RequestError(error, status=403)
        return await JSONResponse(refused.body, refused.status)(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name, colon, port = host.lower().rpartition(":")
        if not colon or not port.isdigit():
            name = host.lower()
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return name in self.names
        return True


def rows_that_fit(model) -> int:
    """Rows of a batch such that the caches of all batches, and those of idle decoders, take at most
    half of the memory."""
    row = 4 * cache_size(model.config)  # bytes
    rows = device.memory() // 2 // ((PLACES + MOST_IDLE) * row)
    return max(1, min(rows, MOST_ROWS))


def listen(host: str, port: int) -> socket.socket:
    """A socket of that address. Raises ValueError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=MOST_CONNECTIONS)
    except OSError as error:
        raise ValueError(f"port {port} of {host} cannot be listened on ({error.strerror}): choose "
                         "another --port or --host") from error


@contextmanager
def garbage_collected_here() -> Iterator[None]:
    """Keeps Python from collecting garbage in whichever thread it happens to run, since that would
    free tensors while the model's thread uses tinygrad, which is not thread-safe."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def serve(service: Service, listening: socket.socket, host: str, signals: Sequence[int]) -> None:
    """Answers requests until there is a signal in signals; then those that have been accepted are
    finished."""
    # it warns of writes to a client that has left, whose request ends soon after
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    server = uvicorn.Server(uvicorn.Config(
        service.app(host), http="h11", ws="none", loop="asyncio", lifespan="off",
        log_level="error", access_log=False, server_header=False,
        limit_concurrency=MOST_CONNECTIONS))
    thread = threading.Thread(target=server.run, args=[[listening]], daemon=True)
    with garbage_collected_here():
        thread.start()
        while thread.is_alive():
            server.should_exit = bool(signals)
            service.scheduler.work(TICK)
            if gc.get_count()[0] > GARBAGE:
                gc.collect()
