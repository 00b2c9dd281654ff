"""`dsv3 chat`: a conversation in the terminal, with a server or with a model that is loaded here."""

import asyncio
import contextlib
import http.client
import json
import sys
from collections.abc import AsyncGenerator, Generator, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from dsv3_jax.checks import shortened
from dsv3_jax.errors import UserError
from dsv3_jax.http_api.keys import read_keys
from dsv3_jax.http_api.requests import ApiError, ChatRequest, CompletionRequest, parse
from dsv3_jax.http_api.service import Inbox, Job, Running, Service
from dsv3_jax.progress import one_line, printable
from dsv3_jax.streams import forgiving

_TIMEOUT_S = 600.0
_CONTINUED = 100  # max_tokens of a model that continues lines


class Partner(Protocol):
    """Whom one talks to."""

    has_chat: bool

    def answer(self, path: str, body: dict[str, Any]) -> Generator[str]:
        """The pieces of an answer to a request of the API. Leaving the iterator ends it. Raises `UserError`."""
        ...


class Remote:
    """A server with OpenAI's API."""

    def __init__(self, url: str, key: str | None):
        """Raises `UserError` if nobody answers there."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url} is no address of a server; use http://HOST:PORT")
        self._url, self._host = url, parts.netloc.rpartition("@")[2]
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        with self._asked("GET", "/v1/models", None) as response:
            try:
                model = json.load(response)["data"][0]
                self.name, self.has_chat = str(model["id"]), bool(model.get("chat", True))
            except (ValueError, LookupError, TypeError, AttributeError):
                raise UserError(f"{url} is no server with OpenAI's API") from None

    @contextlib.contextmanager
    def _asked(self, method: str, path: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        connection = self._kind(self._host, timeout=_TIMEOUT_S)
        headers = self._headers | ({} if body is None else {"Content-Type": "application/json"})
        try:
            connection.request(method, self._root + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise UserError(f"{self._url} answers {response.status}: {_message(response.read(10_000))}")
            yield response
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"{self._url}: {getattr(error, 'strerror', None) or error or type(error).__name__}") from None
        finally:
            connection.close()

    def answer(self, path: str, body: dict[str, Any]) -> Generator[str]:
        with self._asked("POST", path, {"model": self.name, "stream": True, **body}) as response:
            for line in response:
                data = line.strip().removeprefix(b"data: ")
                if data in (b"", b"[DONE]") or not line.startswith(b"data: "):
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise UserError(f"{self._url}: {_message(data)}")
                for choice in chunk["choices"]:
                    yield choice.get("text") or choice.get("delta", {}).get("content") or ""


def _message(body: bytes) -> str:
    """What an error says, of any server."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return shortened(body.decode("utf-8", "replace"))


class Local:
    """A model that is loaded here."""

    def __init__(self, service: Service):
        self._service, self.has_chat = service, service.template is not None
        self._loop = asyncio.new_event_loop()

    def answer(self, path: str, body: dict[str, Any]) -> Generator[str]:
        content = json.dumps(body).encode()
        try:
            if path == "/v1/completions":
                jobs = self._service.completion_jobs(parse(CompletionRequest, content))
            else:
                jobs = self._service.chat_jobs(parse(ChatRequest, content))
            pieces = self._pieces(jobs)
            try:
                while (text := self._loop.run_until_complete(anext(pieces, None))) is not None:
                    yield text
            finally:
                self._loop.run_until_complete(pieces.aclose())
        except ApiError as error:
            raise UserError(error.message) from None

    async def _pieces(self, jobs: list[Job]) -> AsyncGenerator[str]:
        running = Running(self._service, jobs, Inbox(), "")
        try:
            async for new in running.pieces():
                yield new[0].text
        finally:
            running.cancel()


def converse(partner: Partner, lines: Iterator[str], options: dict[str, Any], system: str | None) -> None:
    """Answer each line on standard output. Errors of one answer leave the conversation as it was before its line."""
    out = forgiving(sys.stdout)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in lines:
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line}]
        body: dict[str, Any] = {"messages": asked} if partner.has_chat else {"prompt": line, "max_tokens": _CONTINUED}
        path = "/v1/chat/completions" if partner.has_chat else "/v1/completions"
        text = ""
        try:
            with contextlib.closing(partner.answer(path, body | options)) as pieces:
                for piece in pieces:
                    text += piece
                    out.write(printable(piece))
                    out.flush()
        except KeyboardInterrupt:  # what has been said stands
            pass
        except UserError as error:
            out.write(f"[{one_line(str(error))}]\n")
            continue
        out.write("\n")
        messages = [*asked, {"role": "assistant", "content": text}]


def _typed() -> Iterator[str]:
    """Lines from the keyboard or a pipe, to its end; Ctrl-C begins a new one."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its editing
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


def chat(model: str, api_key_file: Path | None, temperature: float, max_tokens: int | None, system: str | None) -> None:
    """Talk to a server, or to a model that is loaded first, until the input ends. Raises `UserError`."""
    options = {"temperature": temperature} | ({} if max_tokens is None else {"max_tokens": max_tokens})
    if "://" in model:
        key = None if api_key_file is None else read_keys(api_key_file)[0]
        return converse(Remote(model, key), _typed(), options, system)
    from dsv3_jax.http_api.served import load_served
    from dsv3_jax.serve.engine import Engine

    served = load_served(Path(model))
    engine = Engine(served.model, slots=1)
    try:
        converse(Local(served.service(engine)), _typed(), options, system)
    finally:
        engine.close()
