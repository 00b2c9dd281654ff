"""A server in this process with an engine that only pretends: its output is a script, one token a step."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dsv3_jax.data.special_tokens import special_tokens
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.http_api.api import make_app
from dsv3_jax.http_api.chat_template import ChatTemplate
from dsv3_jax.http_api.connections import Limits
from dsv3_jax.http_api.server import Server, bound_socket
from dsv3_jax.http_api.service import Service
from dsv3_jax.serve.request import Event, Finish, OnEvent, QueueFullError, SamplingParams, TokenLogprob

SCRIPT = "The quick brown fox — naïve, 日本語 🎉 — jumps over the lazy dog. "
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer() -> Tokenizer:
    return train_tokenizer([SCRIPT * 3, "def main(): return 0\n" * 3], 320)


class _Request:
    def __init__(self, prompt: list[int], params: SamplingParams, on_event: OnEvent):
        self.prompt, self.params, self.on_event = prompt, params, on_event
        self.count, self.cancelled = 0, False

    def cancel(self) -> None:
        self.cancelled = True


class FakeEngine:
    """Gives each request the script's tokens from place `seed` on, and says of token t that its log-probability is -t / 100.

    Attributes:
        step_s: How long a step takes.
        most_waiting: How many requests it takes at once.
        running: Those that are not done.
        salts: Of all requests, in order.
        cancelled: How many have been cancelled.
        failing: What the next step fails with.
    """

    def __init__(self, its: Tokenizer, context: int = 256):
        self.config: Any = SimpleNamespace(vocab_size=its.get_vocab_size())
        self.context, self.step_s, self.most_waiting = context, 0.0, 64
        self.script = its.encode(SCRIPT, add_special_tokens=False).ids
        self.running: list[_Request] = []
        self.salts: list[str] = []
        self.cancelled = 0
        self.failing: str | None = None
        self.stopped = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, prompt: Sequence[int], params: SamplingParams, on_event: OnEvent, *, cache_salt: str = "") -> _Request:
        if len(prompt) + params.max_tokens > self.context:
            raise UserError(f"max_tokens={params.max_tokens} after a prompt of {len(prompt)}: the context is {self.context}")
        if len(self.running) >= self.most_waiting:
            raise QueueFullError(len(self.running), 2.0)
        self.salts.append(cache_salt)
        request = _Request(list(prompt), params, on_event)
        self.running.append(request)
        return request

    def stats(self) -> dict[str, float]:
        return {
            "requests_running": len(self.running), "requests_waiting": 0, "requests_finished": 3, "output_tokens": 5,
            "slots_live": len(self.running), "slots": 64, "pages": 8, "pages_free": 8, "steps": 7, "busy_s": 1.5,
        }  # fmt: skip

    def close(self, drain_s: float = 0) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            for request in list(self.running):
                event = self._step(request)
                if event.finish is not None:
                    self.running.remove(request)
                if not request.cancelled:
                    request.on_event(event)
            time.sleep(self.step_s or 0.0002)
        for request in self.running:
            request.on_event(Event(finish=Finish.CANCELLED))

    def _step(self, request: _Request) -> Event:
        params = request.params
        if request.cancelled:
            self.cancelled += 1
            return Event(finish=Finish.CANCELLED)
        if self.failing:
            return Event(finish=Finish.ERROR, error=self.failing)
        prompt = None
        if request.count == 0 and params.prompt_logprobs is not None:
            prompt = (None, *(self._logprob(token, params.prompt_logprobs) for token in request.prompt[1:]))
        if params.max_tokens == 0:
            return Event(prompt_logprobs=prompt, finish=Finish.LENGTH)
        token = self.script[(request.count + (params.seed or 0)) % len(self.script)]
        if params.constraint is not None:
            mask = params.constraint.mask()
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            token = min(allowed, key=lambda i: (i not in params.end_ids, i in request.prompt, i))
            params.constraint.accept(int(token))
            request.prompt.append(int(token))
        request.count += 1
        if int(token) in params.end_ids:
            return Event(finish=Finish.STOP)
        logprobs = () if params.logprobs is None else (self._logprob(int(token), params.logprobs),)
        done = Finish.LENGTH if request.count == params.max_tokens else None
        return Event((int(token),), logprobs, prompt, done, cached_tokens=3)

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        return TokenLogprob(token, -token / 100, tuple((i, -i / 100) for i in range(2, 2 + top)))


class Client:
    """Asks a server, one connection a request."""

    def __init__(self, address: tuple[str, int], engine: FakeEngine, its: Tokenizer):
        self.address, self.engine, self.tokenizer = address, engine, its

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, http.client.HTTPMessage, Any]:
        """Status, headers, and the body: parsed where it is JSON."""
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, sent, given | {key.replace("_", "-"): value for key, value in headers.items()})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, response.headers, json.loads(content) if is_json else content.decode()

    def complete(self, **body: Any) -> Any:
        status, _, answer = self.ask("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer

    def refused(self, path: str = "/v1/completions", **body: Any) -> dict:
        status, _, answer = self.ask("POST", path, body)
        assert status == 400, answer
        return answer["error"]

    def events(self, path: str = "/v1/completions", **body: Any) -> list[dict]:
        """The events of a stream, whose last is [DONE]."""
        status, headers, content = self.ask("POST", path, {"stream": True, **body})
        assert status == 200, content
        assert headers["Content-Type"] == "text/event-stream"
        *events, done, empty = content.split("\n\n")
        assert (done, empty) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def settled(self) -> None:
        """Wait until the engine has nothing to do."""
        until = time.monotonic() + 30
        while self.engine.running:
            assert time.monotonic() < until, "a request is left in the engine"
            time.sleep(0.005)


@contextlib.contextmanager
def serving(keys: Sequence[str] = (), template: str | None = TEMPLATE, limits: Limits | None = None) -> Iterator[Client]:
    """A server on a free port."""
    its = tokenizer()
    engine = FakeEngine(its)
    chat = None if template is None else ChatTemplate(template, {"bos_token": "<|begin_of_text|>"})
    app = make_app(Service(engine, its, special_tokens(its), chat, "fake/model"), keys)
    bound = bound_socket("127.0.0.1", 0)
    running = threading.Event()
    stop: list[Any] = []

    async def run() -> None:
        stopping, started = asyncio.Event(), asyncio.Event()
        stop.extend((asyncio.get_running_loop(), stopping))
        served = asyncio.ensure_future(Server(app, bound, limits or Limits()).run_until(stopping, started))
        await started.wait()
        running.set()
        await served

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert running.wait(10)
    try:
        yield Client(bound.getsockname(), engine, its)
    finally:
        engine.close()
        stop[0].call_soon_threadsafe(stop[1].set)
        thread.join()
