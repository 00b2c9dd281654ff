"""Slots and pages without a device: nobody shares what they may not, nothing is lost, everybody ends."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.serve.attend import PAGE
from dsv3_jax.serve.drafts import DraftRule
from dsv3_jax.serve.pages import PagePool, extend_keys
from dsv3_jax.serve.programs import PIECE_SIZES, piece_sizes, row_buckets
from dsv3_jax.serve.request import Finish, SamplingParams
from dsv3_jax.serve.scheduler import NOWHERE, Scheduler, Sequence


def sequence(number: int, prompt: list[int], max_tokens: int = 8, **fields) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, **fields)
    return Sequence(number, len(prompt), [*prompt], params, 0, "", lambda event: None)


class NoConstraint:
    def mask(self) -> np.ndarray | None:
        return None

    def accept(self, token: int) -> None: ...


def test_keys_are_of_all_tokens_so_far_and_of_the_salt():
    tokens = list(range(3 * PAGE + 5))
    keys = extend_keys([], tokens, "a")
    assert len(keys) == 3
    assert extend_keys(keys[:1], tokens, "a") == keys  # by and by
    assert not set(keys) & set(extend_keys([], tokens, "b"))
    changed = extend_keys([], [*tokens[:PAGE], 99, *tokens[PAGE + 1 :]], "a")
    assert (changed[0] == keys[0], changed[1] == keys[1], changed[2] == keys[2]) == (True, False, False)


def test_a_page_is_free_used_or_idle_until_it_is_taken_again():
    pool = PagePool(4)
    a, b, c = (pool.take() for _ in range(3))
    assert {a, b, c} == {1, 2, 3}  # page 0 is nobody's
    pool.publish(a, b"a")
    pool.publish(b, b"b")
    pool.publish(c, b"b")  # the key is b's already
    assert pool.find([b"a", b"x", b"b"]) == [a]
    pool.release([a, b, c])
    assert pool.available == 2  # a has another user
    assert pool.find([b"b"]) == [b]
    pool.release([b])
    pool.release([a])
    assert pool.available == 3
    assert pool.take() == c  # free ones first, then the longest idle
    assert pool.take() == b
    assert pool.find([b"b"]) == []
    assert pool.find([b"a"]) == [a]


def test_a_prompt_may_not_use_the_page_of_its_last_token():
    """Which the first decoding step writes."""
    scheduler = Scheduler(2, [PagePool(9)], 1)
    scheduler.waiting.append(first := sequence(0, list(range(2 * PAGE))))
    scheduler.admit()
    scheduler.pieces(100, 100)
    scheduler.waiting.append(second := sequence(1, list(range(2 * PAGE))))
    scheduler.admit()
    assert second.filled == PAGE
    assert second.pages[0] == first.pages[0]
    assert second.pages[1] != first.pages[1]


def test_pieces_share_a_budget_and_the_oldest_comes_first():
    scheduler = Scheduler(3, [PagePool(99)], 1)
    scheduler.waiting.extend(sequence(i, [i] * length) for i, length in enumerate((1, 21, 31)))
    assert len(scheduler.admit()) == 3
    assert [(p.sequence.number, p.first, p.count) for p in scheduler.pieces(24, 16)] == [(1, 0, 16), (2, 0, 8)]
    assert [(p.sequence.number, p.first, p.count) for p in scheduler.pieces(24, 16)] == [(1, 16, 4), (2, 8, 16)]
    assert [s.number for s in scheduler.decoding(lambda: None)] == [0, 1]


def test_steps_at_once_go_past_no_end_and_nobody_waits_for_them():
    scheduler = Scheduler(2, [PagePool(5)], tokens_a_step=2)
    assert scheduler.steps_at_once(4) == 1
    scheduler.waiting.append(one := sequence(0, [1, 2], max_tokens=20))
    assert scheduler.steps_at_once(4) == 1
    scheduler.admit()
    assert scheduler.steps_at_once(4) == 1  # its prompt comes first
    scheduler.pieces(64, 64)
    assert scheduler.steps_at_once(4) == 4
    one.in_flight = 4  # which may give 8 tokens, so that 12 are left
    assert scheduler.steps_at_once(4) == 4
    one.tokens += [1] * 5  # 7 are left
    assert scheduler.steps_at_once(4) == 3
    one.tokens += [1] * 6
    assert scheduler.steps_at_once(4) == 1
    del one.tokens[2:]
    one.in_flight = 0
    assert scheduler.steps_at_once(64) == 1  # they may take more pages than there are
    assert scheduler.steps_at_once(16) == 10
    scheduler.waiting.append(sequence(1, [1, 2]))
    assert scheduler.steps_at_once(4) == 1
    scheduler.waiting.clear()
    scheduler.decoding(lambda: None, steps=10)
    assert len(one.pages) == 2  # for 2 + 20 tokens
    one.params = replace(one.params, constraint=NoConstraint())  # which must hear of each token before the next
    assert scheduler.steps_at_once(4) == 1


def test_the_youngest_gives_its_pages_back():
    scheduler = Scheduler(3, [PagePool(6)], 1)
    scheduler.waiting.extend(sequence(i, [i] * 10, max_tokens=60) for i in range(2))
    scheduler.admit()
    scheduler.pieces(99, 99)
    settled = []
    for _ in range(60):
        for s in scheduler.decoding(lambda: settled.append(1)):
            s.tokens.append(7)
        if scheduler.preemptions:
            break
    assert settled
    assert [s.number for s in scheduler.running] == [0]
    (waiting,) = scheduler.waiting
    assert (waiting.number, waiting.slot, waiting.pages) == (1, NOWHERE, [])
    assert len(waiting.tokens) > 10  # what it has, it keeps


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(4, 20), st.integers(1, 40), st.sampled_from([1, 2]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_everybody_ends_and_nothing_is_shared_that_is_written(devices, each, pages, budget, gain, seed):
    """Any sizes, random ends and cancellations: a page that two sequences have holds the same tokens of both."""
    draw = random.Random(seed)
    scheduler = Scheduler(devices * each, [PagePool(pages + 1) for _ in range(devices)], gain)
    most = pages * PAGE // 2
    sequences = []
    for i in range(12):
        length = draw.randint(1, max(most - 1, 1))
        sequences.append(sequence(i, [draw.randint(0, 1)] * length, draw.randint(1, max(most - length, 1))))
    scheduler.waiting.extend(sequences)

    def end(s: Sequence) -> None:
        scheduler.retire(s)
        s.finish = Finish.CANCELLED

    for _ in range(5000):
        if all(s.finish for s in sequences):
            break
        scheduler.admit()
        scheduler.pieces(budget, 16)
        for s in scheduler.decoding(lambda: None):
            s.tokens += [5] * min(draw.randint(1, gain), s.left)
            if s.left == 0 or draw.random() < 0.02:
                end(s)
        owners: dict[tuple[int, int], list[tuple[int, Sequence]]] = {}
        for s in scheduler.running:
            for i, page in enumerate(s.pages):
                owners.setdefault((scheduler.device_of(s), page), []).append((i, s))
        for (_, page), users in owners.items():
            assert page > 0
            texts = {(i, *s.tokens[: (i + 1) * PAGE]) for i, s in users}
            assert len(texts) == 1, (page, users)
            # whoever shares a page has filled it before
            assert len(users) == 1 or all((i + 1) * PAGE <= s.to_fill for i, s in users)
    assert all(s.finish for s in sequences)
    assert scheduler.all_free


def test_shapes_cover_all_sizes():
    assert row_buckets(64) == [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64]
    assert row_buckets(1) == [1]
    assert row_buckets(20) == [1, 2, 4, 8, 12, 16, 20]
    # a tenth is padding if all numbers are equally likely
    fill = [n / next(b for b in row_buckets(64) if b >= n) for n in range(1, 65)]
    assert sum(fill) / 64 == pytest.approx(0.90, abs=0.005)
    assert piece_sizes(64) == list(PIECE_SIZES)
    assert piece_sizes(17) == [8, 16, 24]
    assert piece_sizes(1) == [8]


def test_drafts_pay_if_a_step_gains_more_than_it_costs():
    rule = DraftRule({1: (1.0, 1.6), 64: (1.0, 1.9)})
    assert rule.acceptance == 0.65
    assert (rule.pay(1), rule.pay(64)) == (True, False)  # 1.65 tokens for 1.6, and for 1.9
    for _ in range(300):
        rule.saw(10, 3)
    assert rule.acceptance == pytest.approx(0.3, abs=0.01)
    assert not rule.pay(1)
    rule.saw(0, 0)  # a step without drafts says nothing
    for _ in range(300):
        rule.saw(10, 10)
    assert rule.pay(64)
