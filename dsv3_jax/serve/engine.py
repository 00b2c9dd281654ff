"""Many requests at once on one model: continuous batching over a paged latent cache, with drafts by the MTP module.

One thread owns the device and all state. It starts a step, and while that runs it deals with the tokens of the step before:
others speak to it by a queue, and hear from it by their `on_event`.
"""

import asyncio
import contextlib
import itertools
import queue
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable

import jax
import numpy as np

from dsv3_jax.checks import require
from dsv3_jax.errors import UserError
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.attend import PAGE
from dsv3_jax.serve.core import Core
from dsv3_jax.serve.programs import PIECE, bytes_a_token
from dsv3_jax.serve.request import Completion, Event, Finish, OnEvent, Prompt, QueueFullError, SamplingParams, StoppedError
from dsv3_jax.serve.scheduler import Sequence
from dsv3_jax.streams import say

_CONTEXT = 4096  # of an engine whose context is not given, at most
_CACHE_BYTES = 2**30  # of a cache whose size is not given, at most
_RETRY_S = 1.0


class Handle:
    """A request that was submitted."""

    def __init__(self, cancel: Callable[[], None]):
        self._cancel = cancel

    def cancel(self) -> None:
        """End it, if it has not ended; its last event says so. From any thread."""
        self._cancel()


class Engine:
    """Serves one model. Blocking use: `complete`; asynchronous: `stream`; by callbacks: `submit`. Threads may share it."""

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int = 64,
        context: int | None = None,
        cache_tokens: int | None = None,
        exact: bool = False,
        drafts: bool | None = None,
        prompt_rows: int = PIECE,
        most_waiting: int = 256,
    ):
        """Compile everything, and start.

        Args:
            model: From `load` or `load_hf`. The engine has weights of its own: drop the model's if nothing else needs them.
            slots: The most sequences that run at once.
            context: The longest sequence, prompt and output; None for 4096 or the model's positions, if these are fewer.
            cache_tokens: Tokens that the cache has room for; None for `slots` contexts or a GiB, if that is less.
            exact: Compute all tokens by one program, so that a request's bits depend on nothing but itself. Slower.
            drafts: Let the MTP module draft a token ahead; None: where there is one, while it is measured to pay.
            prompt_rows: Tokens of prompts in a step, beside those that decode. With more of them prompts are answered sooner,
                and everybody waits longer between two tokens.
            most_waiting: Requests that may wait for a slot.

        Raises:
            UserError: A number is out of range, or there are no drafts because the model has no MTP module.
        """
        self.config = model.config
        positions = self.config.max_position_embeddings
        self.context = min(_CONTEXT, positions) if context is None else context
        for name, value, least, most in (
            ("slots", slots, 1, 4096), ("context", self.context, 2, positions), ("prompt_rows", prompt_rows, 1, 2**31),
            ("most_waiting", most_waiting, 0, 2**31), ("cache_tokens", cache_tokens or PAGE, PAGE, 2**31),
        ):  # fmt: skip
            require(least <= value <= most, f"{name}={value} is out of range; use {least} to {most}")
        has_mtp = self.config.num_nextn_predict_layers > 0
        require(has_mtp or not drafts, "drafts=true needs an MTP module, which this model has not; use drafts=false")
        if cache_tokens is None:
            cache_tokens = min(slots * self.context, max(_CACHE_BYTES // bytes_a_token(model), self.context))
        devices = model.layout.decoding.shards("cache_batch")
        require(jax.process_count() == 1, f"an engine runs in one process, and there are {jax.process_count()}")
        require(slots % devices == 0, f"slots={slots} is no multiple of the {devices} devices that share the sequences")
        require(devices == 1 or not exact, f"exact=true is for one device, and the model is on {devices}; use exact=false")
        pages = -(-cache_tokens // (PAGE * devices)) + 1
        self.core = Core(model, slots, self.context, pages, exact, drafts, prompt_rows)
        self._most_waiting = most_waiting
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._numbers, self._lock, self._open = itertools.count(), threading.Lock(), 0
        self._stop_at: float | None = None  # on time.monotonic's clock
        self._broken = ""
        self._thread = threading.Thread(target=self._serve, name="dsv3-engine", daemon=True)
        self._thread.start()

    # --- for any thread --------------------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, params: SamplingParams, on_event: OnEvent, *, cache_salt: str = "") -> Handle:
        """Serve a request, whose events go to `on_event` on the engine's thread; the last one has `finish`.

        Args:
            prompt: Token ids, one at least.
            params: How its tokens are chosen.
            on_event: Must be quick. If it raises, the request is cancelled.
            cache_salt: Requests of other salts don't share cached prefixes with it, so that nobody learns of them by timing.

        Raises:
            UserError: The prompt is empty, too long or not of the vocabulary.
            StoppedError: The engine is closing or has failed.
            QueueFullError: As many requests wait as may.
        """
        tokens = self._checked(prompt, params)
        seed = secrets.randbits(32) if params.seed is None else params.seed
        deadline = None if params.deadline_s is None else time.monotonic() + params.deadline_s
        with self._lock:
            if why := self.stopped:
                raise StoppedError(why)
            waiting = self._open - self.core.scheduler.slots
            if waiting >= self._most_waiting:
                raise QueueFullError(waiting, _RETRY_S)
            self._open += 1
            number = next(self._numbers)

        def heard(event: Event) -> None:
            if event.finish is not None:
                with self._lock:
                    self._open -= 1
            try:
                on_event(event)
            except Exception as error:  # one listener's fault is nobody else's
                say(f"a request is cancelled: its on_event raised {type(error).__name__}: {error}", sys.stderr)
                self._commands.put(lambda: self.core.end(sequence, Finish.CANCELLED))

        sequence = Sequence(number, len(tokens), tokens, params, seed, cache_salt, heard, deadline)
        self._commands.put(lambda: self.core.add(sequence))
        return Handle(lambda: self._commands.put(lambda: self.core.end(sequence, Finish.CANCELLED)))

    def complete(self, prompts: Iterable[Prompt], params: SamplingParams | Iterable[SamplingParams]) -> list[Completion]:
        """Serve requests, and wait for all of them. Raises as `submit`, but waits where the queue is full."""
        prompts = list(prompts)
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        require(
            len(params) == len(prompts), f"{len(prompts)} prompts and {len(params)} params; give one for each, or one for all"
        )
        events: list[list[Event]] = [[] for _ in prompts]
        done = [threading.Event() for _ in prompts]
        handles = []

        def listener(i: int) -> OnEvent:
            def on_event(event: Event) -> None:
                events[i].append(event)
                if event.finish is not None:
                    done[i].set()

            return on_event

        try:
            for i, (prompt, its) in enumerate(zip(prompts, params, strict=True)):
                while True:
                    try:
                        handles.append(self.submit(prompt, its, listener(i)))
                        break
                    except QueueFullError:
                        next(d for d in done if not d.is_set()).wait()
            for waited in done:
                waited.wait()
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return [completion(its) for its in events]

    async def stream(self, prompt: Prompt, params: SamplingParams, *, cache_salt: str = "") -> AsyncIterator[Event]:
        """The events of a request as they come. Whoever leaves the iterator cancels the request. Raises as `submit`."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def on_event(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        handle = self.submit(prompt, params, on_event, cache_salt=cache_salt)
        try:
            while True:
                event = await events.get()
                yield event
                if event.finish is not None:
                    return
        finally:
            handle.cancel()

    @property
    def stopped(self) -> str:
        """Why it takes no requests; "" if it does."""
        return (
            f"the engine has failed: {self._broken}"
            if self._broken
            else ""
            if self._stop_at is None
            else "the engine is closing"
        )

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what is so now (docs/serving.md says what each is)."""
        scheduler = self.core.scheduler
        running = len(scheduler.running)
        now = {
            "requests_running": running, "requests_waiting": max(self._open - running, 0), "slots_live": running,
            "slots": scheduler.slots, "pages_free": scheduler.free_pages, "pages": sum(pool.size for pool in scheduler.pools),
            "preemptions": scheduler.preemptions,
        }  # fmt: skip
        return self.core.counts | now

    def close(self, drain_s: float = 0) -> None:
        """Take no more requests; let those that are open go on for `drain_s` seconds, and end what is left of them."""
        with self._lock:
            self._stop_at = time.monotonic() + drain_s
        self._commands.put(lambda: None)
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        array = np.asarray(prompt)
        require(array.ndim == 1 and array.size > 0, "the prompt is empty; give one token at least")
        require(bool(np.issubdtype(array.dtype, np.integer)), f"the prompt is of {array.dtype}; give token ids")
        size, total = self.config.vocab_size, len(array) + params.max_tokens
        require(
            array.min() >= 0 and array.max() < size, f"the prompt holds ids outside [0, {size}): {array.min()}..{array.max()}"
        )
        asked = f"a prompt of {len(array)} tokens and max_tokens={params.max_tokens} are {total}"
        require(total <= self.context, f"{asked}; {self.context} is the longest here")
        room = self.core.scheduler.pools[0].size * PAGE
        require(total <= room, f"{asked}; the cache has room for {room}")
        for token in (*params.logit_bias, *params.end_ids):
            require(0 <= token < size, f"token {token} of logit_bias or end_ids is outside [0, {size})")
        return array.tolist()

    # --- the engine's thread ---------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while True:
                self._hear()
                if self._stop_at is not None and (not self.core.busy or time.monotonic() >= self._stop_at):
                    return self._end_all(Finish.CANCELLED)
                if self.core.busy:
                    self.core.turn()
        except Exception as error:  # whoever waits must hear of it
            self._broken = f"{type(error).__name__}: {error}".splitlines()[0]
            self._end_all(Finish.ERROR)
            raise

    def _hear(self) -> None:
        """Do what others have asked for; wait for that where there is nothing else to do."""
        if not self.core.busy and self._stop_at is None:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _end_all(self, finish: Finish) -> None:
        while not self._commands.empty():
            self._commands.get()()
        for sequence in [*self.core.scheduler.running, *self.core.scheduler.waiting]:
            self.core.end(sequence, finish, error=self._broken)


def completion(events: list[Event]) -> Completion:
    """A request's events, put together. Raises `UserError` if it ended in an error."""
    last = events[-1]
    if last.finish is Finish.ERROR:
        raise UserError(f"the engine has failed: {last.error}")
    assert last.finish is not None
    return Completion(
        [t for e in events for t in e.tokens],
        [p for e in events for p in e.logprobs],
        next((list(e.prompt_logprobs) for e in events if e.prompt_logprobs is not None), None),
        last.finish,
        last.cached_tokens,
    )
