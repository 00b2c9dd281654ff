"""What a client may ask for: every parameter with its range. Others are refused by name, and nothing is converted."""

import json
import re
from typing import Annotated, Any, Literal, NoReturn, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dsv3_jax.checks import shortened
from dsv3_jax.config import LARGEST_SEED
from dsv3_jax.serve.request import MOST_ALTERNATIVES, MOST_BIASES

MOST_PROMPTS = 64  # of one request
MOST_ANSWERS = 128  # of one request: prompts times n
_MOST_N = 16
_MOST_STOPS, _LONGEST_STOP = 16, 256
_MOST_MESSAGES = 1024
_LARGEST = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=_LARGEST)]
Ids = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
BiasedToken = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]


class ApiError(Exception):
    """A request that gets no answer: the HTTP status, and what OpenAI's clients read."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry_s: float = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_s = status, message, param, code, retry_s


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """`include_usage`: a last chunk with the usage; `continuous_usage_stats`: every chunk with that so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class TextFormat(_Strict):
    type: Literal["text"]


class JsonObjectFormat(_Strict):
    type: Literal["json_object"]


class JsonSchema(_Strict):
    """`strict` may be false, and the answer is held to the schema all the same."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: Annotated[str, Field(max_length=4096)] | None = None
    strict: bool | None = None


class JsonSchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class _Sampling(_Strict):
    """What both kinds of request have. null stands for the default."""

    model: str | None = Field(None, max_length=1024, description="The name that /v1/models gives; may be left out.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the likeliest token. Default 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=_LARGEST, description="0 for all.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[BiasedToken, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MOST_BIASES)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="Answer i of n has the seed + i.")
    n: int | None = Field(None, ge=1, le=_MOST_N)
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="With stream: true alone.")
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = Field(None, description="Go on after the end of the text, to max_tokens.")

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.stream_options is not None and not self.stream:
            _refuse("stream_options", "is for stream: true alone")
        if self.ignore_eos and self.is_constrained():
            _refuse("ignore_eos", "and response_format exclude each other")
        return self

    def is_constrained(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
    ) = Field(description="A text, token ids, or a list of either.")
    max_tokens: int | None = Field(None, ge=0, le=_LARGEST, description="Default 16.")
    echo: bool | None = Field(None, description="The text begins with the prompt; with logprobs, they too.")
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    def prompts(self) -> list[str] | list[list[int]]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=_MOST_MESSAGES)]

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_tokens: int | None = Field(None, ge=1, le=_LARGEST, description="Default: what the context has room for.")
    max_completion_tokens: int | None = Field(None, ge=1, le=_LARGEST, description="Another name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES, description="With logprobs: true alone.")

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            _refuse("max_completion_tokens", "and max_tokens are the same; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            _refuse("top_logprobs", "is for logprobs: true alone")
        return self


def _refuse(param: str, why: str) -> NoReturn:
    raise PydanticCustomError("combination", "{param} {why}", {"param": param, "why": why})


def parse[R: _Sampling](kind: type[R], body: bytes) -> R:
    """A request's body. Raises `ApiError` naming the parameter, its value, and what would be valid."""
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _explained(kind, error) from None


def _explained(kind: type[BaseModel], error: pydantic.ValidationError) -> ApiError:
    """One of the errors in one line; of those of a union's alternatives, that of the one that came furthest."""
    found = max(error.errors(include_url=False), key=lambda e: (not e["type"].endswith("_type"), len(e["loc"])))
    place, what, value = [str(part) for part in found["loc"]], found["msg"], found["input"]
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {what.removeprefix('Invalid JSON: ')}")
    if found["type"] == "combination":
        return ApiError(400, what, found.get("ctx", {}).get("param"), "invalid_value")
    name = _named(place)
    if found["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields)) if len(place) == 1 else "see /openapi.json"
        return ApiError(400, f"{name} is not supported; parameters: {known}", name, "unknown_parameter")
    if found["type"] == "missing":
        return ApiError(400, f"{name} is missing", name, "missing_required_parameter")
    line = f"{name or 'the body'}={_shown(value)}: {what[:1].lower()}{what[1:]}"
    if name in kind.model_fields and (description := kind.model_fields[name].description):
        line += f" ({description})"
    return ApiError(400, line, name or None, "invalid_value")


def _named(place: list[str]) -> str:
    """Where in the body: without the names that pydantic gives to alternatives of a union."""
    if place[:1] == ["response_format"]:
        place = [place[0], *place[2:]]  # the second is the value of `type`
    parts = [part for part in place if re.fullmatch(r"[\w-]+", part)]
    return ".".join(part for part in parts if part not in ("str", "int", "constrained-str"))


def _shown(value: Any) -> str:
    return shortened(value) if not isinstance(value, str) else shortened(json.dumps(value))
