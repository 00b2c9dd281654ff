"""A load on an engine in this process, and the same requests in the older ways: in static batches, and one at a time."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsv3_jax.bench.figures import Outcome
from dsv3_jax.bench.workload import Request
from dsv3_jax.errors import UserError
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.generate import generate
from dsv3_jax.serve.request import Event, Finish, OnEvent, QueueFullError, SamplingParams


@dataclass(frozen=True)
class Served:
    """What came of a load."""

    outcomes: list[Outcome]
    counts: dict[str, float]  # of the engine, meanwhile
    wall_s: float
    cpu_s: float | None = None  # of this process, if the engine is in it


def serve_load(engine: Engine, requests: Sequence[Request], salt: str) -> Served:
    """Submit each request when it arrives, and wait for all of them.

    `salt` keeps the prefixes of one load from those of another, so that nobody finds its prompt in the cache.
    """
    heard: list[list[tuple[float, Event]]] = [[] for _ in requests]
    ended = threading.Semaphore(0)

    def listener(events: list[tuple[float, Event]]) -> OnEvent:
        def on_event(event: Event) -> None:
            events.append((time.monotonic(), event))
            if event.finish is not None:
                ended.release()

        return on_event

    before, began, cpu_began = engine.stats(), time.monotonic(), time.process_time()
    for request, events in zip(requests, heard, strict=True):
        time.sleep(max(began + request.arrival_s - time.monotonic(), 0))
        assert not isinstance(request.prompt, str), request
        try:
            engine.submit(request.prompt, SamplingParams(max_tokens=request.max_tokens), listener(events), cache_salt=salt)
        except (UserError, QueueFullError) as error:
            listener(events)(Event(finish=Finish.ERROR, error=str(error)))
    for _ in requests:
        ended.acquire()
    wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu_began
    counts = {name: value - before[name] for name, value in engine.stats().items()}
    return Served([_outcome(*both, began) for both in zip(requests, heard, strict=True)], counts, wall_s, cpu_s)


def _outcome(request: Request, events: list[tuple[float, Event]], began: float) -> Outcome:
    last = events[-1][1]
    deliveries = tuple((at - began, len(event.tokens)) for at, event in events if event.tokens)
    error = last.error or ("" if deliveries else f"ended by {last.finish} without a token")
    return Outcome(request.arrival_s, len(request.prompt), deliveries, error)


@dataclass(frozen=True)
class Rectangles:
    """What `generate` took for some requests."""

    tokens: int  # that were asked for
    wall_s: float
    cpu_s: float
    row_utilisation: float
    decode_fill: float


def serve_in_batches(model: Transformer, requests: Sequence[Request], batch: int) -> Rectangles:
    """Static batching: `batch` requests in order of arrival, all there from the beginning.

    Prompts are padded to the longest of the batch, and all decode until the longest output of the batch has come. It is done
    twice and the second time counts, so that nothing is compiled in it.
    """
    rectangles = [_rectangle(requests[i : i + batch]) for i in range(0, len(requests), batch)]
    for _ in range(2):
        began, cpu_began = time.monotonic(), time.process_time()
        for prompts, most in rectangles:
            np.asarray(generate(model, prompts, most))
        wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu_began
    tokens = sum(request.max_tokens for request in requests)
    decoded = sum(len(prompts) * most for prompts, most in rectangles)
    filled = sum(prompts.size for prompts, _ in rectangles)
    live = tokens + sum(len(request.prompt) for request in requests)
    return Rectangles(tokens, wall_s, cpu_s, live / (decoded + filled), tokens / decoded)


def _rectangle(requests: Sequence[Request]) -> tuple[np.ndarray, int]:
    """Prompts, padded on the left, and the number of tokens to add."""
    longest = max(len(request.prompt) for request in requests)
    prompts = np.zeros((len(requests), longest), np.int32)
    for row, request in zip(prompts, requests, strict=True):
        row[longest - len(request.prompt) :] = request.prompt
    return prompts, max(request.max_tokens for request in requests)
