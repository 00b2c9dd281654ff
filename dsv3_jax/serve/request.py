"""What a client asks of the engine and what it gets: token ids, nothing of text or of HTTP."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dsv3_jax.checks import require
from dsv3_jax.config import LARGEST_SEED
from dsv3_jax.errors import UserError

MOST_ALTERNATIVES = 20  # log-probabilities of other tokens beside a token's own
MOST_BIASES = 300  # tokens that one request may bias, as in OpenAI's API


class Finish(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # one of its end tokens
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class Constraint(Protocol):
    """What limits a request's next token, such as a grammar. The engine's thread alone calls it."""

    def mask(self) -> np.ndarray:
        """u32[ceil(V / 32)]: bit v % 32 of word v // 32 says whether token v may come next; one at least may."""
        ...

    def accept(self, token: int) -> None:
        """`token` came."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen. Raises `UserError` for a value out of range, by its name.

    Attributes:
        max_tokens: The number of tokens to add at most; 0 for the prompt's log-probabilities alone.
        temperature: Divides the logits before sampling; 0 takes the likeliest token.
        top_p: Sample from the smallest set of tokens that has this probability.
        top_k: Sample from this many likeliest tokens; 0 for all.
        min_p: Sample from tokens of at least this share of the likeliest one's probability.
        presence_penalty: Subtracted from the logits of tokens that were generated.
        frequency_penalty: The same, times how often they were.
        repetition_penalty: Divides positive, and multiplies negative logits of tokens in prompt or output.
        logit_bias: Added to tokens' logits.
        seed: The same seed gives the same text, whatever else is served; None for a fresh one.
        logprobs: Log-probabilities of the output's tokens and of this many likeliest others at each place; None for none.
        prompt_logprobs: The same of the prompt's tokens.
        end_ids: Tokens that end the text; they are not part of it.
        constraint: Limits each next token.
        deadline_s: Seconds after which the request ends with what it has; None for no limit.
    """

    max_tokens: int = 24
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    end_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    deadline_s: float | None = None

    def __post_init__(self):
        for name, low, high in (
            ("max_tokens", 0, 2**31 - 1), ("temperature", 0, 100), ("top_k", 0, 2**31 - 1), ("min_p", 0, 1),
            ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2), ("seed", 0, LARGEST_SEED),
            ("logprobs", 0, MOST_ALTERNATIVES), ("prompt_logprobs", 0, MOST_ALTERNATIVES),
        ):  # fmt: skip
            value = getattr(self, name)  # None of what may be None; NaN is in no range
            require(value is None or low <= value <= high, f"{name}={value} is out of range; use {low} to {high}")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} is out of range; use more than 0, to 1")
        require(
            0 < self.repetition_penalty <= 10,
            f"repetition_penalty={self.repetition_penalty} is out of range; use more than 0, to 10",
        )
        require(len(self.logit_bias) <= MOST_BIASES, f"logit_bias has {len(self.logit_bias)} tokens; use {MOST_BIASES} at most")
        for token, bias in self.logit_bias.items():
            require(-100 <= bias <= 100, f"logit_bias[{token}]={bias} is out of range; use -100 to 100")
        require(self.deadline_s is None or self.deadline_s > 0, f"deadline_s={self.deadline_s} must be more than 0")


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, before temperature, penalties, bias and limits, and of the likeliest ones there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, log-probability), likeliest first


@dataclass(frozen=True)
class Event:
    """What has come of a request since its last event; the last one has `finish`."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # of `tokens`, if asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # once, before the first token; the first place has None
    finish: Finish | None = None
    error: str = ""  # one line, with Finish.ERROR
    cached_tokens: int = 0  # of the prompt, found in the prefix cache


@dataclass(frozen=True)
class Completion:
    """A request's events, put together."""

    tokens: list[int]
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob | None] | None
    finish: Finish
    cached_tokens: int = 0


class StoppedError(UserError):
    """The engine takes no more requests: it is closing, or has failed."""


class QueueFullError(Exception):
    """As many requests wait as may. `retry_after_s` is when to try again."""

    def __init__(self, waiting: int, retry_after_s: float):
        super().__init__(f"{waiting} requests wait already; try again in {retry_after_s:.0f} s")
        self.waiting, self.retry_after_s = waiting, retry_after_s


type OnEvent = Callable[[Event], None]  # called by the engine's thread: must be quick
type Prompt = Sequence[int]
