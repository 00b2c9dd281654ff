"""A load on a server with OpenAI's API: a thread for each request, which reads its stream as it comes."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from dsv3_jax.bench.figures import Outcome
from dsv3_jax.bench.in_process import Served
from dsv3_jax.bench.workload import Request
from dsv3_jax.checks import require, shortened
from dsv3_jax.errors import UserError
from dsv3_jax.http_api.metrics import metric_name
from dsv3_jax.serve.core import COUNTERS

_TIMEOUT_S = 600.0
_PREFIX = "data: "


class Server:
    """A server, by its address. Raises `UserError` if nobody answers there as OpenAI's API does."""

    def __init__(self, url: str, key: str | None):
        parts = urlsplit(url)
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname), f"{url} is no address of a server; use http://HOST:PORT"
        )
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._root = parts.netloc.rpartition("@")[2], parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            with self._asked("GET", "/v1/models") as response:
                self.model = str(json.load(response)["data"][0]["id"])
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{url} does not answer as OpenAI's API does: {type(error).__name__}: {error}") from None

    def serve_load(self, requests: Sequence[Request]) -> Served:
        """Send each request when it arrives, and wait for all of them."""
        outcomes: list[Outcome | None] = [None] * len(requests)
        before, began = self.counts(), time.monotonic()

        def send(i: int) -> None:
            outcomes[i] = self._outcome(requests[i], began)

        threads = []
        for i, request in enumerate(requests):
            time.sleep(max(began + request.arrival_s - time.monotonic(), 0))
            threads.append(threading.Thread(target=send, args=(i,), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()
        wall_s, after = time.monotonic() - began, self.counts()
        counts = {name: value - before[name] for name, value in after.items() if name in before}
        return Served([outcome for outcome in outcomes if outcome is not None], counts, wall_s)

    def counts(self) -> dict[str, float]:
        """The counters of `Engine.stats` from /metrics; none of another server, or one that does not show them."""
        with (
            contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError),
            self._asked("GET", "/metrics") as response,
        ):
            lines = [line.split() for line in response.read().decode().splitlines() if not line.startswith("#")]
            values = {line[0]: float(line[1]) for line in lines if len(line) == 2}
            return {name: values[metric_name(name)] for name in COUNTERS}
        return {}

    def _outcome(self, request: Request, began: float) -> Outcome:
        times, tokens, error = [], 0, ""
        body = {
            "model": self.model, "prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        try:
            with self._asked("POST", "/v1/completions", body) as response:
                for chunk in _chunks(response):
                    if any(choice.get("text") for choice in chunk.get("choices", [])):
                        times.append(time.monotonic() - began)
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        except (OSError, http.client.HTTPException, ValueError) as failed:
            error = f"{type(failed).__name__}: {failed}"
        if not times:
            return Outcome(request.arrival_s, len(request.prompt), error=error or "no text came")
        # a delivery does not say how many tokens it has: the last one stands for the rest
        deliveries = [(at, 1) for at in times[:-1]] + [(times[-1], max(tokens - len(times) + 1, 1))]
        return Outcome(request.arrival_s, len(request.prompt), tuple(deliveries), error)

    @contextlib.contextmanager
    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[http.client.HTTPResponse]:
        connection = self._kind(self._host, timeout=_TIMEOUT_S)
        try:
            connection.request(method, self._root + path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise http.client.HTTPException(
                    f"status {response.status}, {shortened(response.read(200).decode(errors='replace'))}"
                )
            yield response
        finally:
            connection.close()


def _chunks(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream. Raises `ValueError` for what is no event of this API."""
    for raw in response:
        line = raw.decode().rstrip()
        if not line.startswith(_PREFIX) or line == f"{_PREFIX}[DONE]":
            continue
        chunk = json.loads(line.removeprefix(_PREFIX))
        if not isinstance(chunk, dict) or "error" in chunk:
            raise ValueError(shortened(chunk))
        yield chunk
