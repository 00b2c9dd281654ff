"""The engine: the same bits whatever runs beside a request, `generate`'s texts, and nothing left behind."""

import asyncio
import dataclasses
import threading
import time

import jax
import jax.monitoring
import numpy as np
import pytest

import dsv3_jax as dsv3
from dsv3_jax.errors import UserError
from dsv3_jax.serve.attend import PAGE
from dsv3_jax.serve.core import EXACT_ROWS
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.request import Finish, QueueFullError, SamplingParams
from tests.serve import cases


def engine(**options) -> Engine:
    standard = {"slots": 4, "context": 128, "prompt_rows": 16, "cache_tokens": 2048, "drafts": True}
    return Engine(cases.model(), **(standard | options))


@pytest.fixture(scope="module")
def fast():
    with engine() as made:
        yield made


@pytest.fixture(scope="module")
def exact():
    with engine(exact=True) as made:
        yield made


def is_empty(its: Engine) -> bool:
    """Whether no slot and no page is in use; waits for the engine's thread to see the last commands."""
    deadline = time.monotonic() + 20
    while its.core.busy or not its._commands.empty():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return its.core.scheduler.all_free


def test_greedy_texts_are_those_of_generate(fast):
    prompts = cases.prompts(12)
    found = fast.complete(prompts, SamplingParams(max_tokens=20))
    for prompt, its in zip(prompts, found, strict=True):
        expected = np.asarray(dsv3.generate(cases.model(), [prompt], 20))[0, len(prompt) :]
        assert (its.tokens, its.finish) == (expected.tolist(), Finish.LENGTH)


def test_log_probabilities_are_the_models(fast):
    """Within 1e-5: products of other shapes sum in other orders."""
    prompts = cases.prompts(3, seed=1)
    found = fast.complete(prompts, SamplingParams(max_tokens=6, logprobs=4, prompt_logprobs=2))
    for prompt, its in zip(prompts, found, strict=True):
        assert its.prompt_logprobs is not None
        text = [*prompt, *its.tokens]
        expected_SV = np.asarray(jax.nn.log_softmax(cases.model()(np.array([text])), axis=-1))[0]
        assert its.prompt_logprobs[0] is None
        said = [*its.prompt_logprobs[1:], *its.logprobs]
        assert [p.token for p in said] == text[1:]
        for at, p in enumerate(said):
            np.testing.assert_allclose(p.logprob, expected_SV[at, p.token], atol=1e-5)
            best = np.argsort(-expected_SV[at])[: len(p.top)]
            assert [token for token, _ in p.top] == best.tolist()
            np.testing.assert_allclose([value for _, value in p.top], expected_SV[at, best], atol=1e-5)
        assert {len(p.top) for p in its.logprobs} == {4}


def test_exact_bits_depend_on_nothing_but_the_request(exact):
    """Alone, together, in another order and after prefix hits; in pieces, without drafts, and with too few pages."""
    prompts, params = cases.prompts(24, longest=40), cases.params(24, most=60)
    expected = [exact.complete([p], its)[0] for p, its in zip(prompts, params, strict=True)]
    assert any(e.cached_tokens for e in exact.complete(prompts, params))  # those with more than a page

    def equal(found):
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert (a.tokens, a.logprobs, a.prompt_logprobs, a.finish) == (b.tokens, b.logprobs, b.prompt_logprobs, b.finish), i

    equal(exact.complete(prompts, params))
    equal(exact.complete(prompts[::-1], params[::-1])[::-1])
    assert exact.stats()["drafts_accepted"] > 20  # so that what follows one is compared
    assert exact.stats()["drafts"] - exact.stats()["drafts_accepted"] > 20
    for options in ({"prompt_rows": 3, "slots": 9, "cache_tokens": 128}, {"drafts": False}):
        with engine(exact=True, **options) as other:
            equal(other.complete(prompts, params))
            assert (other.stats()["preemptions"] > 0) == ("cache_tokens" in options)
            assert other.stats()["rows_computed"] % EXACT_ROWS == 0
            assert is_empty(other)


def test_a_seed_gives_the_same_text_beside_others(fast):
    prompts, params = cases.prompts(20, seed=2), cases.params(20)
    alone = [fast.complete([p], its)[0].tokens for p, its in zip(prompts, params, strict=True)]
    assert [its.tokens for its in fast.complete(prompts, params)] == alone
    unseeded = SamplingParams(max_tokens=16, temperature=1.0)
    assert fast.complete([[1, 2]], unseeded)[0].tokens != fast.complete([[1, 2]], unseeded)[0].tokens


def test_steps_at_once_give_what_single_steps_give(fast, monkeypatch):
    """Bit for bit, as one program takes both: texts, ends within the steps, and log-probabilities."""
    prompts = cases.prompts(6, longest=PAGE, seed=7)  # no page of them is found again
    params = [dataclasses.replace(its, end_ids=frozenset({7, 40})) for its in cases.params(6, most=40)]
    calls, decode = [], fast.core.device.decode
    monkeypatch.setattr(fast.core.device, "decode", lambda *a: calls.append(a[2]) or decode(*a))
    at_once = [fast.complete([p], its)[0] for p, its in zip(prompts, params, strict=True)]
    assert calls.count(4) > 5
    monkeypatch.setattr(fast.core.scheduler, "steps_at_once", lambda most: 1)
    calls.clear()
    assert [fast.complete([p], its)[0] for p, its in zip(prompts, params, strict=True)] == at_once
    assert set(calls) == {1}
    assert {its.finish for its in at_once} == {Finish.STOP, Finish.LENGTH}


def test_nothing_compiles_after_the_start(fast):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    prompts, params = cases.prompts(30, longest=100, seed=3), cases.params(30)
    fast.complete(prompts, params)
    assert compiled == []
    jax.jit(lambda x: x + 1.25)(np.float32(time.time()))
    assert compiled != []  # the listener hears


def test_end_tokens_and_lengths(fast):
    (plain,) = fast.complete([[3, 4, 5]], SamplingParams(max_tokens=12))
    at = next(i for i, token in enumerate(plain.tokens) if i > 2 and token not in plain.tokens[:i])
    (ended,) = fast.complete([[3, 4, 5]], SamplingParams(max_tokens=12, end_ids=frozenset({plain.tokens[at]})))
    assert (ended.tokens, ended.finish) == (plain.tokens[:at], Finish.STOP)
    (scored,) = fast.complete([[3, 4, 5]], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert (scored.tokens, scored.finish) == ([], Finish.LENGTH)
    assert scored.prompt_logprobs is not None
    assert [p and p.token for p in scored.prompt_logprobs] == [None, 4, 5]
    (single,) = fast.complete([[3]], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert (single.tokens, single.prompt_logprobs, single.finish) == ([], [None], Finish.LENGTH)


class Even:
    """Allows even tokens, and two of them in a row only if the second is greater."""

    def __init__(self):
        self.accepted = []

    def mask(self) -> np.ndarray:
        least = self.accepted[-1] + 1 if self.accepted else 0
        allowed = [v % 2 == 0 and (v >= least or v == 94) for v in range(96)]
        return np.packbits(np.array(allowed), bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_holds_beside_others(fast, temperature):
    limit = Even()
    limited = SamplingParams(max_tokens=10, temperature=temperature, seed=1, constraint=limit)
    others = [SamplingParams(max_tokens=30, temperature=1.0, seed=i) for i in range(3)]
    found, *rest = fast.complete([[1, 2], *cases.prompts(3)], [limited, *others])
    assert found.tokens == limit.accepted
    assert all(v % 2 == 0 and (v > before or v == 94) for before, v in zip([-1, *found.tokens], found.tokens, strict=False))
    assert [len(its.tokens) for its in rest] == [30] * 3


@pytest.mark.parametrize("question", ["mask", "accept"])
def test_a_constraint_that_fails_ends_its_own_request_alone(fast, question):
    limit, events = Even(), []
    setattr(limit, question, lambda *_: 1 / 0)
    fast.submit([1, 2], SamplingParams(max_tokens=10, constraint=limit), events.append)
    assert len(fast.complete([[3]], SamplingParams(max_tokens=20))[0].tokens) == 20
    assert is_empty(fast)
    assert (events[-1].finish, events[-1].error) == (
        Finish.ERROR, "its constraint raised ZeroDivisionError: division by zero",
    )  # fmt: skip


def test_prefixes_are_shared_with_those_of_the_same_salt_alone(fast):
    prompt = list(range(60))

    def cached(salt: str, tokens: list[int]) -> int:
        async def last():
            return [e async for e in fast.stream(tokens, SamplingParams(max_tokens=2), cache_salt=salt)][-1]

        return asyncio.run(last()).cached_tokens

    assert cached("a", prompt) == 0
    assert cached("a", prompt) == 48  # full pages that hold no last token
    assert cached("b", prompt) == 0
    assert cached("a", [*prompt[:40], 90, *prompt[41:]]) == 32
    assert cached("a", [90, *prompt[1:]]) == 0


def test_whoever_leaves_a_stream_leaves_nothing_behind(fast):
    async def leave(after: int) -> None:
        events = fast.stream(list(range(40)), SamplingParams(max_tokens=80, temperature=1.0))
        async for _ in events:
            if after == 0:
                break
            after -= 1
        await events.aclose()

    async def many() -> None:
        await asyncio.gather(*(leave(i % 7) for i in range(40)))

    asyncio.run(many())
    assert is_empty(fast)


def test_cancelled_at_any_time(fast):
    random, finished = np.random.default_rng(0), []
    for i in range(60):
        handle = fast.submit(
            cases.prompts(1, longest=90, seed=i)[0],
            SamplingParams(max_tokens=30, temperature=1.0),
            lambda event: finished.append(event.finish) if event.finish else None,
        )
        time.sleep(random.exponential(0.003))
        if i % 2:
            handle.cancel()
        handle.cancel() if i % 3 == 0 else None
    assert is_empty(fast)
    assert len(finished) == 60
    assert set(finished) <= {Finish.CANCELLED, Finish.LENGTH}


def test_a_listener_that_fails_loses_its_own_request_alone(fast, capsys):
    heard = []

    def fails(event):
        heard.append(event)
        raise ValueError("no")

    fast.submit([1], SamplingParams(max_tokens=100), fails)
    assert len(fast.complete([[2]], SamplingParams(max_tokens=20))[0].tokens) == 20
    assert is_empty(fast)
    assert heard[-1].finish is Finish.CANCELLED
    assert "a request is cancelled: its on_event raised ValueError: no" in capsys.readouterr().err


def test_a_deadline_ends_a_request_with_what_it_has(fast):
    (late,) = fast.complete([[1]], SamplingParams(max_tokens=120, deadline_s=1e-9))
    assert (late.tokens, late.finish) == ([], Finish.DEADLINE)


def test_a_full_queue_and_what_can_never_run_are_refused(fast):
    with engine(slots=1, most_waiting=1, cache_tokens=64, drafts=False) as small:
        started = threading.Event()
        small._commands.put(started.wait)  # the engine's thread is busy, and so both requests are open
        for _ in range(2):
            small.submit([1], SamplingParams(max_tokens=2), lambda event: None)
        with pytest.raises(QueueFullError, match="1 requests wait already"):
            small.submit([1], SamplingParams(max_tokens=2), lambda event: None)
        started.set()
        with pytest.raises(UserError, match="a prompt of 40 tokens and max_tokens=40 are 80; the cache has room for 64"):
            small.complete([[1] * 40], SamplingParams(max_tokens=40))
    with pytest.raises(UserError, match="the engine is closing"):
        small.complete([[1]], SamplingParams())
    for prompt, match in (
        ([], "the prompt is empty"), ([96], r"ids outside \[0, 96\): 96..96"), ([-1, 5], r"-1..5"), ([1.5], "is of float64"),
        ([1] * 120, "a prompt of 120 tokens and max_tokens=24 are 144; 128 is the longest here"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            fast.complete([prompt], SamplingParams())
    with pytest.raises(UserError, match="token 96 of logit_bias"):
        fast.complete([[1]], SamplingParams(logit_bias={96: 1.0}))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"slots": 0}, "slots=0 is out of range; use 1 to 4096"),
        ({"context": 513}, "context=513 is out of range; use 2 to 512"),
        ({"cache_tokens": 3}, "cache_tokens=3 is out of range; use 16"),
        ({"prompt_rows": 0}, "prompt_rows=0"),
    ],
)
def test_sizes_out_of_range_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        engine(**options)


def test_drafts_need_a_module():
    with pytest.raises(UserError, match="drafts=true needs an MTP module"):
        Engine(cases.model(num_nextn_predict_layers=0), drafts=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_is_heard_by_all_and_ends_the_engine():
    with engine(drafts=False, slots=1) as broken:
        broken.core.device.decode = lambda *_: 1 / 0
        with pytest.raises(UserError, match="the engine has failed: ZeroDivisionError"):
            broken.complete([[1], [2]], SamplingParams())
        with pytest.raises(UserError, match="the engine has failed"):
            broken.complete([[1]], SamplingParams())
