"""What a client gets: OpenAI's objects, as dictionaries with the types that the OpenAPI document shows."""

import functools
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from tokenizers import Tokenizer

from dsv3_jax.http_api.requests import ApiError
from dsv3_jax.http_api.text import Piece, PlacedToken, token_bytes, token_name

_LEAST = -9999.0  # JSON has no infinity
type FinishReason = Literal["stop", "length"] | None


class CachedTokens(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(TypedDict):
    """By places. `top_logprobs` has the likeliest tokens, and the one that came."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(TypedDict):
    """An answer of /v1/completions, or a chunk of one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """An answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    chat: bool  # whether it has a chat template


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    error: ErrorFields


_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_object(error: ApiError) -> Error:
    kind = _ERROR_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def usage(prompt: int, generated: int, cached: int) -> Usage:
    return {
        "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip


class Vocabulary:
    """The tokens' bytes, which log-probabilities are shown with."""

    def __init__(self, tokenizer: Tokenizer):
        self.bytes = functools.cache(functools.partial(token_bytes, tokenizer))

    def name(self, token: int) -> str:
        return token_name(self.bytes(token))


class Answer(Protocol):
    """One of the two kinds of answers: `head` begins an object, or a chunk of a stream."""

    def head(self, stream: bool) -> dict[str, Any]: ...
    def choice(self, index: int, piece: Piece) -> Mapping[str, Any]: ...
    def chunk(self, index: int, piece: Piece, first: bool) -> Mapping[str, Any]: ...


class CompletionAnswer:
    """Answers of /v1/completions."""

    def __init__(self, model: str, vocabulary: Vocabulary, logprobs: bool):
        self._fixed = _head(f"cmpl-{secrets.token_hex(12)}", "text_completion", model)
        self._vocabulary, self._logprobs = vocabulary, logprobs

    def head(self, stream: bool) -> dict[str, Any]:
        return dict(self._fixed)

    def choice(self, index: int, piece: Piece) -> CompletionChoice:
        logprobs = self._shown(piece.tokens) if self._logprobs else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": _reason(piece)}

    def chunk(self, index: int, piece: Piece, first: bool) -> CompletionChoice:
        return self.choice(index, piece)

    def _shown(self, tokens: Sequence[PlacedToken]) -> CompletionLogprobs:
        return {
            "tokens": [self._vocabulary.name(token.id) for token in tokens],
            "token_logprobs": [_number(token.logprob.logprob) if token.logprob else None for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: PlacedToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        top = {self._vocabulary.name(i): _number(logprob) for i, logprob in token.logprob.top}
        return top | {self._vocabulary.name(token.id): _number(token.logprob.logprob)}


class ChatAnswer:
    """Answers of /v1/chat/completions."""

    def __init__(self, model: str, vocabulary: Vocabulary, logprobs: bool):
        self._fixed = _head(f"chatcmpl-{secrets.token_hex(12)}", "chat.completion", model)
        self._vocabulary, self._logprobs = vocabulary, logprobs

    def head(self, stream: bool) -> dict[str, Any]:
        return self._fixed | ({"object": "chat.completion.chunk"} if stream else {})

    def choice(self, index: int, piece: Piece) -> ChatChoice:
        message: AssistantMessage = {"role": "assistant", "content": piece.text}
        return {"index": index, "message": message, "logprobs": self._shown(piece), "finish_reason": _reason(piece)}

    def chunk(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | ({"content": piece.text} if piece.text or first else {})
        return {"index": index, "delta": delta, "logprobs": self._shown(piece), "finish_reason": _reason(piece)}

    def _shown(self, piece: Piece) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {**self._one(token.id, token.logprob.logprob), "top_logprobs": [self._one(*top) for top in token.logprob.top]}
                for token in piece.tokens
                if token.logprob is not None
            ]
        }

    def _one(self, token: int, logprob: float) -> TopLogprob:
        return {"token": self._vocabulary.name(token), "logprob": _number(logprob), "bytes": [*self._vocabulary.bytes(token)]}


def _head(name: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _number(logprob: float) -> float:
    return max(logprob, _LEAST)


def _reason(piece: Piece) -> FinishReason:
    return None if piece.finish is None else "stop" if piece.finish == "stop" else "length"
