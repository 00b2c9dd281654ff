"""From a client's parameters to requests of the engine, and from the engine's events to pieces of text."""

import asyncio
import contextlib
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer

from dsv3_jax.config import LARGEST_SEED, ModelConfig
from dsv3_jax.data.special_tokens import SpecialTokens
from dsv3_jax.data.tokenizer import tokenizer_errors
from dsv3_jax.http_api.chat_template import ChatTemplate
from dsv3_jax.http_api.requests import MOST_ANSWERS, ApiError, ChatRequest, CompletionRequest, JsonSchemaFormat
from dsv3_jax.http_api.responses import Usage, Vocabulary, usage
from dsv3_jax.http_api.text import ChoiceText, Piece
from dsv3_jax.serve.request import Constraint, Event, Finish, OnEvent, SamplingParams

if TYPE_CHECKING:
    from dsv3_jax.http_api.grammar import Grammars

_COMPLETION_TOKENS = 16  # max_tokens of /v1/completions, as OpenAI has it
_PASSED_ON = ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")  # as they came


class Handle(Protocol):
    """A request in the engine."""

    def cancel(self) -> None: ...


class ServingEngine(Protocol):
    """What of `dsv3_jax.serve.engine.Engine` is used here."""

    config: ModelConfig
    context: int

    @property
    def stopped(self) -> str: ...

    def submit(self, prompt: Sequence[int], params: SamplingParams, on_event: OnEvent, *, cache_salt: str = "") -> Handle: ...
    def stats(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Job:
    """One answer that the engine shall give. With `echo` its text begins with the prompt, written so."""

    prompt: list[int]
    params: SamplingParams
    stops: list[str]
    echo: str | None = None


@dataclass(frozen=True)
class Service:
    """A model with its texts, by the name that clients call it."""

    engine: ServingEngine
    tokenizer: Tokenizer
    special: SpecialTokens
    template: ChatTemplate | None
    name: str
    created: int = field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    @functools.cached_property
    def _grammars(self) -> "Grammars":
        """Raises `ApiError` where llguidance is not installed, or a text cannot end."""
        if not self.special.ends:
            raise ApiError(400, "response_format: the model has no token that ends a text", "response_format")
        try:
            from dsv3_jax.http_api.grammar import Grammars
        except ImportError:
            raise ApiError(400, "response_format: this server has no llguidance", "response_format", "not_supported") from None
        return Grammars(self.tokenizer, self.engine.config.vocab_size, self.special.ends)

    def completion_jobs(self, request: CompletionRequest) -> list[Job]:
        """Answers in order: n to the first prompt, n to the second, ... Raises `ApiError`, `UserError`."""
        prompts, n = request.prompts(), request.n or 1
        if len(prompts) * n > MOST_ANSWERS:
            raise ApiError(400, f"n={n} for {len(prompts)} prompts: at most {MOST_ANSWERS} answers a request", "n")
        most = _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        prompt_logprobs = request.logprobs if request.echo else None
        jobs = []
        for prompt in prompts:
            ids = self.special.begun(self._ids(prompt)) if isinstance(prompt, str) else prompt
            self._check_ids(ids)
            echo = (prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)) if request.echo else None
            params = self._params(request, most, request.logprobs, prompt_logprobs)
            jobs += [Job(ids, self._answer(params, request, i), request.stops(), echo) for i in range(n)]
        return jobs

    def chat_jobs(self, request: ChatRequest) -> list[Job]:
        """n answers to a conversation. Raises `ApiError`, `UserError`."""
        if self.template is None:
            raise ApiError(400, f"{self.name} has no chat template; use /v1/completions", "messages", "no_chat_template")
        ids = self._ids(self.template.render([{"role": m.role, "content": m.text()} for m in request.messages]))
        if not ids:
            raise ApiError(400, "messages: the checkpoint's chat template makes no text of them", "messages")
        self._check_ids(ids)
        room = self.engine.context - len(ids)
        most = request.max_tokens or request.max_completion_tokens or max(room, 1)
        params = self._params(request, most, (request.top_logprobs or 0) if request.logprobs else None, None)
        return [Job(ids, self._answer(params, request, i), request.stops()) for i in range(request.n or 1)]

    def _ids(self, text: str) -> list[int]:
        with tokenizer_errors("the prompt cannot be encoded"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _check_ids(self, ids: list[int]) -> None:
        """What the engine checks too, before a list of requests is made."""
        if len(ids) > self.engine.context:
            raise ApiError(
                400, f"the prompt has {len(ids):,} tokens; prompt and answer together have room for {self.engine.context:,}",
                "prompt", "context_length_exceeded",
            )  # fmt: skip
        size = self.engine.config.vocab_size
        if max(ids, default=0) >= size:
            raise ApiError(400, f"prompt: {max(ids)} is no token; the vocabulary has 0 to {size - 1}", "prompt")

    def _params(
        self, request: CompletionRequest | ChatRequest, most: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """Parameters that answers share."""
        given = {name: value for name in _PASSED_ON if (value := getattr(request, name)) is not None}
        return SamplingParams(
            max_tokens=most,
            temperature=1.0 if request.temperature is None else request.temperature,
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            end_ids=frozenset(() if request.ignore_eos else self.special.ends),
            **given,
        )

    def _answer(self, params: SamplingParams, request: CompletionRequest | ChatRequest, index: int) -> SamplingParams:
        """Those of answer `index` of n: another seed, and a constraint of its own."""
        seed = None if params.seed is None else (params.seed + index) % (LARGEST_SEED + 1)
        return replace(params, seed=seed, constraint=self._constraint(request))

    def _constraint(self, request: CompletionRequest | ChatRequest) -> Constraint | None:
        if not request.is_constrained():
            return None
        wanted = request.response_format
        return self._grammars.json(wanted.json_schema.schema_ if isinstance(wanted, JsonSchemaFormat) else {"type": "object"})


class Inbox:
    """Brings the engine's events to the loop that made it: it is woken once for all that a step of the engine gives."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._posted: deque[tuple[OnEvent, Event]] = deque()
        self._woken = False

    def post(self, receive: OnEvent, event: Event) -> None:
        """From any thread: call `receive(event)` on the loop."""
        self._posted.append((receive, event))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._posted:
            receive, event = self._posted.popleft()
            receive(event)


class Running:
    """The answers to one client's request, while the engine makes them. `cancel` must end it, however it ends."""

    def __init__(self, service: Service, jobs: Sequence[Job], inbox: Inbox, cache_salt: str):
        """Submit them. Raises `UserError`, or `QueueFullError` when not all find room; then none runs."""
        self._jobs = jobs
        self.choices = [ChoiceText(service.tokenizer, job.prompt, job.stops, job.echo) for job in jobs]
        self._handles: list[Handle] = []
        self._arrived: list[tuple[int, Event]] = []
        self._news = asyncio.Event()

        try:
            for i, job in enumerate(jobs):
                post: OnEvent = functools.partial(inbox.post, functools.partial(self._arrive, i))
                self._handles.append(service.engine.submit(job.prompt, job.params, post, cache_salt=cache_salt))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Have the engine drop the answers that are not done."""
        for choice, handle in zip(self.choices, self._handles, strict=False):
            if choice.finish is None:
                handle.cancel()

    def _arrive(self, index: int, event: Event) -> None:
        self._arrived.append((index, event))
        self._news.set()

    async def pieces(self) -> AsyncIterator[dict[int, Piece]]:
        """What has come since the last time, by answer: one piece of each, however many events they were.

        Raises `ApiError` when the engine fails or stops.
        """
        while any(choice.finish is None for choice in self.choices):
            await self._news.wait()
            self._news.clear()
            arrived, self._arrived = self._arrived, []
            new: dict[int, Piece] = {}
            for i, event in arrived:
                piece = self._push(i, event)
                if piece != Piece():
                    new[i] = new[i].then(piece) if i in new else piece
            if new:
                yield new

    def _push(self, index: int, event: Event) -> Piece:
        choice = self.choices[index]
        piece = choice.push(event)
        if piece.finish is Finish.ERROR:
            raise ApiError(500, piece.error or "the engine failed", code="engine_error")
        if piece.finish is Finish.CANCELLED:
            raise ApiError(503, "the server is stopping", code="stopping", retry_s=1)
        if piece.finish is not None and (cut_off := getattr(self._jobs[index].params.constraint, "error", "")):
            raise ApiError(400, f"response_format: {cut_off}", "response_format")
        if piece.finish is not None and event.finish is None:  # at a stop string, which the engine does not know
            self._handles[index].cancel()
        return piece

    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many answers it gets."""
        prompts = {id(job.prompt): len(job.prompt) for job in self._jobs}
        cached = {id(job.prompt): choice.cached_tokens for job, choice in zip(self._jobs, self.choices, strict=True)}
        return usage(sum(prompts.values()), sum(choice.generated for choice in self.choices), sum(cached.values()))
