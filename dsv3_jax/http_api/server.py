"""`dsv3 serve`: a model behind the HTTP API, from its checkpoint to the signal that ends it."""

import asyncio
import contextlib
import functools
import logging
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from dsv3_jax.checks import require
from dsv3_jax.errors import UserError
from dsv3_jax.http_api.api import make_app
from dsv3_jax.http_api.connections import Connection, Limits
from dsv3_jax.http_api.keys import is_loopback, read_keys
from dsv3_jax.http_api.served import load_served
from dsv3_jax.serve.engine import Engine
from dsv3_jax.streams import say

DRAIN_S = 30.0  # that running requests may go on after SIGTERM
_OTHER_FILES = 256  # that the process has open besides connections
_BACKLOG = 4096


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket with the address; nobody can connect to it before it listens. Raises `UserError` if it cannot be had."""
    require(0 <= port <= 65535, f"--port={port} is out of range; use 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        raise _address_error(host, port, error) from None
    return bound


def _address_error(host: str, port: int, error: Exception) -> UserError:
    return UserError(f"--host={host} --port={port}: {getattr(error, 'strerror', None) or error}")


def url_of(bound: socket.socket) -> str:
    """Where the server is, for people."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def allowed_connections() -> int:
    """How many connections may be open: the system's limit of open files, raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = Limits().most
    wanted = most + _OTHER_FILES if hard == resource.RLIM_INFINITY else min(most + _OTHER_FILES, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    return max(min(most, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FILES), 16)


class Server(uvicorn.Server):
    """uvicorn's server on a socket, with our connections. It leaves signals to others: its own end the process by them."""

    def __init__(self, app: ASGIApp, bound: socket.socket, limits: Limits):
        connection: Any = functools.partial(Connection, limits=limits)
        super().__init__(uvicorn.Config(
            app, http=connection, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, backlog=_BACKLOG,
        ))  # fmt: skip
        self._bound = bound

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_until(self, stopping: asyncio.Event, started: asyncio.Event) -> None:
        """Serve until `stopping`, and then until the requests that run have their answers. Raises `OSError` for the address."""
        serving = asyncio.ensure_future(self.serve(sockets=[self._bound]))
        while not self.started and not serving.done():
            await asyncio.sleep(0.01)
        started.set()
        stopped = asyncio.ensure_future(stopping.wait())
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        self.should_exit = True
        stopped.cancel()
        await serving


async def _run(app: ASGIApp, engine: Engine, bound: socket.socket, name: str) -> None:
    loop, stopping, started = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = Server(app, bound, Limits(most=allowed_connections()))
    serving = asyncio.ensure_future(server.run_until(stopping, started))
    await started.wait()
    if server.started:
        say(f"{name} is served at {url_of(bound)}")
        await stopping.wait()
        say("stopping: running requests have their answers first")
    await asyncio.to_thread(engine.close, DRAIN_S)
    await serving


def serve(path: Path, host: str, port: int, api_key_file: Path | None, **engine_options: Any) -> None:
    """Serve a run, checkpoint or Hugging Face directory until SIGTERM or SIGINT; `engine_options` are `Engine`'s.

    The port opens once all is compiled. Raises `UserError`.
    """
    keys = [] if api_key_file is None else read_keys(api_key_file)
    bound = bound_socket(host, port)
    if not keys and not is_loopback(bound.getsockname()[0]):
        raise UserError(f"--host={host} lets others connect: give --api-key-file, a file with one key on each line")
    served = load_served(path)
    engine = Engine(served.model, **engine_options)
    app, name = make_app(served.service(engine), keys), served.name
    del served  # with the model's weights, of which the engine has its own
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # a stranger's bad request is no news
    try:
        asyncio.run(_run(app, engine, bound, name))
    except OSError as error:
        raise _address_error(host, port, error) from None
    finally:
        engine.close()
