"""The sampler against sorting in NumPy, against exact probabilities, and against itself beside other rows."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from dsv3_jax.serve import sampling
from dsv3_jax.serve.request import MOST_BIASES, SamplingParams
from dsv3_jax.serve.sampling import RowSampling, choose, log_probabilities, processed_logits, row_of

V, S = 333, 24  # V is no multiple of a vector's length: rows begin anywhere in one
processed = jax.jit(processed_logits)
OPTIMISED = {"xla_backend_optimization_level": 3}  # as users' programs are: conftest.py turns vectors off for the rest


class Allowed:
    """A constraint that allows some tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def mask(self):
        bits_V = np.isin(np.arange(-(-V // 32) * 32), self.tokens)
        return np.packbits(bits_V, bitorder="little").view("<u4")

    def accept(self, token):
        raise NotImplementedError


KINDS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=0.7, top_p=0.3),
    SamplingParams(temperature=1.3, top_k=40),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.6),
    SamplingParams(temperature=0.9, min_p=0.05),
    SamplingParams(temperature=0.9, min_p=0.02, top_p=0.95, top_k=100),
    SamplingParams(presence_penalty=1.5, frequency_penalty=0.7, repetition_penalty=1.3),
    SamplingParams(temperature=1.1, frequency_penalty=-0.7),
    SamplingParams(temperature=1.1, repetition_penalty=0.8, top_p=0.9),
    SamplingParams(logit_bias={3: 9.0, 7: -100.0}),
    SamplingParams(temperature=1.0, logit_bias={v: 0.1 * v for v in range(MOST_BIASES)}),
    SamplingParams(constraint=Allowed([5, 32, 63, 332])),
    SamplingParams(temperature=2.0, constraint=Allowed([332]), top_p=0.9, presence_penalty=2.0),
    SamplingParams(temperature=1e-6, top_p=0.9),
]  # fmt: skip


def inputs(rows, seed=0):
    """Logits, positions and histories."""
    random = np.random.default_rng(seed)
    logits_BV = (4 * random.standard_normal((rows, V))).astype(np.float32)
    position_B = random.integers(12, S, rows).astype(np.int32)
    return logits_BV, position_B, random.integers(0, V // 8, (rows, S)).astype(np.int32)


def batch(params, seeds=None, prompt_length=9) -> RowSampling:
    rows = [row_of(p, prompt_length, V, s) for p, s in zip(params, seeds or itertools.count(), strict=False)]
    limits = [p.constraint and p.constraint.mask() for p in params]
    rows = [row if limit is None else row._replace(mask_BW=limit) for row, limit in zip(rows, limits, strict=True)]
    return RowSampling(*(np.stack(column) for column in zip(*rows, strict=True)))


def by_sorting(x_V, params, position, history_S, prompt_length=9):
    """`processed_logits` of one row in float64, as one would write it first."""
    x_V = x_V.astype(np.float64)
    for v in set(history_S[:position].tolist()):
        x_V[v] = x_V[v] / params.repetition_penalty if x_V[v] > 0 else x_V[v] * params.repetition_penalty
    for v in history_S[prompt_length:position]:
        x_V[v] -= params.frequency_penalty
    for v in set(history_S[prompt_length:position].tolist()):
        x_V[v] -= params.presence_penalty
    for v, bias in params.logit_bias.items():
        x_V[v] += bias
    if params.constraint is not None:
        x_V[~np.isin(np.arange(V), params.constraint.tokens)] = -np.inf
    x_V /= params.temperature or 1
    if params.top_k:
        x_V[x_V < np.sort(x_V)[-params.top_k]] = -np.inf
    if params.top_p < 1:
        sorted_V = -np.sort(-x_V)
        x_V[x_V < sorted_V[np.searchsorted(np.cumsum(scipy.special.softmax(sorted_V)), params.top_p)]] = -np.inf
    x_V[scipy.special.softmax(x_V) < params.min_p * scipy.special.softmax(x_V).max()] = -np.inf
    return x_V


def test_logits_are_processed_as_by_sorting():
    """float32 beside float64: 1e-5, and the same sets, as no logit of these is that near to a limit."""
    params = KINDS * 4
    logits_BV, position_B, history_BS = inputs(len(params))
    processed_BV = processed(logits_BV, batch(params), position_B, history_BS)
    for row in zip(processed_BV, logits_BV, params, position_B, history_BS, strict=True):
        np.testing.assert_allclose(row[0], by_sorting(*row[1:]), rtol=1e-5, atol=1e-5, err_msg=str(row[2]))


@pytest.mark.parametrize(
    ("params", "left"),
    [
        (SamplingParams(temperature=1.0, top_p=0.39), [1, 4]),  # as likely as each other: both
        (SamplingParams(temperature=1.0, top_p=0.81), [1, 2, 4]),
        (SamplingParams(temperature=1.0, top_p=1e-9), [1, 4]),
        (SamplingParams(temperature=1.0, top_k=1), [1, 4]),
        (SamplingParams(temperature=1.0, top_k=3), [1, 2, 4]),
        (SamplingParams(temperature=1.0, top_k=3, top_p=0.81), [1, 4]),  # 0.8 of 1 are 0.89 of what top_k leaves
        (SamplingParams(temperature=1.0, top_k=3, top_p=0.9), [1, 2, 4]),
        (SamplingParams(temperature=1.0, min_p=0.24), [1, 2, 4]),
        (SamplingParams(temperature=1.0, min_p=1.0), [1, 4]),
        (SamplingParams(temperature=1.0), [0, 1, 2, 3, 4]),
    ],
)
def test_limits_by_hand(params, left):
    logits_BV = jnp.log(jnp.asarray([[0.05, 0.4, 0.1, 0.05, 0.4]]))
    rows = jax.tree.map(lambda a: a[None], row_of(params, 1, 5, 0))
    processed_BV = processed(logits_BV, rows, jnp.asarray([1]), jnp.zeros((1, 4), jnp.int32))
    assert np.flatnonzero(np.isfinite(processed_BV[0])).tolist() == left


def test_limits_treat_zeros_and_a_wide_range_exactly():
    """0 and -0 are one number; a threshold may have either sign, and logits that float32 barely tells apart are told apart."""
    next_to_1 = np.nextafter(np.float32(1), np.float32(2))
    x_V = np.array([0.0, -0.0, -1e30, 1e30, 1, next_to_1, -2, -3], np.float32)
    for top_k, left in ((1, [3]), (2, [3, 5]), (3, [3, 4, 5]), (4, [0, 1, 3, 4, 5]), (6, [0, 1, 3, 4, 5, 6]), (8, range(8))):
        rows = jax.tree.map(lambda a: a[None], row_of(SamplingParams(temperature=1.0, top_k=top_k), 1, 8, 0))
        processed_BV = processed(x_V[None], rows, jnp.asarray([1]), jnp.zeros((1, 4), jnp.int32))
        assert np.flatnonzero(np.isfinite(processed_BV[0])).tolist() == [*left]


def test_a_large_vocabulary_sums_exactly():
    """Sums over 129,280 tokens of which most are 1e-6 as likely as the first: top_p counts them to 1e-6."""
    size = 129_280
    x_BV = np.full((1, size), np.log(1e-6), np.float32)
    x_BV[0, 0], x_BV[0, 1:] = 0, x_BV[0, 1:] - np.arange(size - 1) * np.float32(1e-5)
    probability_V = scipy.special.softmax(x_BV[0].astype(np.float64))
    for top_p in (0.94, 0.97, 0.999):
        rows = jax.tree.map(lambda a: a[None], row_of(SamplingParams(temperature=1.0, top_p=top_p), 1, size, 0))
        left_V = np.isfinite(processed(x_BV, rows, jnp.asarray([1]), jnp.zeros((1, 4), jnp.int32))[0])
        assert probability_V[left_V].sum() == pytest.approx(top_p, abs=1e-6)


def test_a_row_is_its_own_whatever_is_beside_it():
    """Its processed logits, token and log-probabilities, bit for bit: alone, among 2, 8 and 64, at any place."""
    jitted = functools.partial(jax.jit, compiler_options=OPTIMISED)

    @jitted
    def everything(logits_BV, rows, position_B, history_BS):
        given = logits_BV, rows, position_B, history_BS
        return processed_logits(*given), choose(*given), log_probabilities(logits_BV, position_B, 3)

    params = KINDS * 4
    logits_BV, position_B, history_BS = inputs(len(params))
    given = logits_BV, batch(params), position_B, history_BS
    among_64 = everything(*given)
    for B in (1, 2, 8):
        for start in range(0, 64 if B > 1 else 16, B):
            place_B = np.roll(np.arange(start, start + B), 1)
            for found, expected in zip(
                jax.tree.leaves(everything(*jax.tree.map(lambda a, place_B=place_B: a[place_B], given))),
                jax.tree.leaves(among_64),
                strict=True,
            ):
                np.testing.assert_array_equal(found, np.asarray(expected)[place_B])
    # beside rows that ask for nothing, so that no branch but its own is taken
    for row in range(16):
        alone = [SamplingParams()] * 8
        alone[row % 8] = params[row]
        rows = batch(alone, seeds=[row] * 8)
        beside = everything(*(np.tile(a[row], (8, *[1] * (a.ndim - 1))) for a in given[:1]), rows, *(
            np.tile(a[row], (8, *[1] * (a.ndim - 1))) for a in given[2:]))  # fmt: skip
        for found, expected in zip(jax.tree.leaves(beside), jax.tree.leaves(among_64), strict=True):
            np.testing.assert_array_equal(found[row % 8], expected[row])
    assert everything._cache_size() == 4  # one a batch size


@jax.jit
def draws(logits_V, row, seed_B, position_B, history_S):
    """A token for each seed and position, by one request's parameters."""
    B = seed_B.shape[0]
    rows = jax.tree.map(lambda a: jnp.broadcast_to(a, (B, *a.shape)), row)._replace(seed_B=seed_B)
    history_BS = jnp.broadcast_to(history_S, (B, *history_S.shape))
    return choose(jnp.broadcast_to(logits_V, (B, logits_V.shape[0])), rows, position_B, history_BS)


def p_value(params, seed_B, position_B):
    """How likely draws as unequal as these are by `by_sorting`'s probabilities."""
    logits_V, history_S = np.random.default_rng(5).standard_normal(SMALL_V, np.float32), np.arange(S, dtype=np.int32) % 5
    probability_V = scipy.special.softmax(by_sorting(logits_V, params, position_B[0], history_S))
    tokens_B = draws(logits_V, row_of(params, 9, SMALL_V, 0), seed_B, position_B, history_S)
    count_V, expected_V = np.bincount(tokens_B, minlength=SMALL_V), probability_V * len(tokens_B)
    assert count_V[probability_V == 0].sum() == 0
    order_V = np.argsort(expected_V)
    group_V = (np.cumsum(expected_V[order_V]) / 20).astype(int)  # of 20 draws or more each, as the approximation needs
    observed, expected = (np.bincount(group_V, a[order_V]) for a in (count_V, expected_V))
    return scipy.stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue


SMALL_V = 40
ALL_SEEDS = np.arange(20_000, dtype=np.uint32), np.full(20_000, S, np.int32)
ALL_POSITIONS = np.full(20_000, 7, np.uint32), S + np.arange(20_000, dtype=np.int32)
DRAWN = SamplingParams(temperature=1.0), SamplingParams(temperature=0.7, top_p=0.9, frequency_penalty=0.5, presence_penalty=0.4)


@pytest.mark.parametrize("over", [ALL_SEEDS, ALL_POSITIONS], ids=["seeds", "positions"])
@pytest.mark.parametrize("params", DRAWN, ids=["all", "limited"])
def test_draws_have_the_probabilities(params, over):
    assert p_value(params, *over) > 1e-3


@pytest.mark.parametrize("params", DRAWN, ids=["all", "limited"])
def test_draws_with_too_little_noise_are_noticed(params, monkeypatch):
    """Noise that is a tenth too small makes likely tokens likelier; the test above must see it."""
    true_gumbel = sampling._gumbel
    monkeypatch.setattr(sampling, "_gumbel", lambda *given: 0.9 * true_gumbel(*given))
    draws.clear_cache()
    try:
        assert p_value(params, *ALL_SEEDS) < 1e-3
    finally:
        draws.clear_cache()


def test_draws_of_rows_and_positions_are_independent():
    """Of two draws from the same four tokens, each pair is as likely as its product: other seeds, and the next position."""
    row = row_of(SamplingParams(temperature=1.0), 0, 4, 0)
    seed_B, position_B, history_S = np.arange(20_000, dtype=np.uint32), np.full(20_000, 30, np.int32), np.zeros(4, np.int32)
    tokens_B = np.asarray(draws(np.zeros(4, np.float32), row, seed_B, position_B, history_S))
    next_B = np.asarray(draws(np.zeros(4, np.float32), row, seed_B, position_B + 1, history_S))
    for other_B in (next_B, np.roll(tokens_B, 1), np.roll(next_B, 1)):
        assert scipy.stats.chisquare(np.bincount(4 * tokens_B + other_B, minlength=16)).pvalue > 1e-3


def test_noise_is_gumbels(monkeypatch):
    noise_BV = jax.jit(sampling._gumbel, static_argnums=2)(np.arange(64, dtype=np.uint32), np.zeros(64, np.int32), 2**14)
    shares = [0.01, 0.1, 0.5, 0.9, 0.99]
    np.testing.assert_allclose(
        np.quantile(noise_BV, shares), scipy.stats.gumbel_r.ppf(shares), atol=0.04
    )  # 4 standard deviations
    # 33 bits say how rare the greatest noise is; 1 - u of float32 numbers would end at 16.6, and the least one is finite
    for bits, noise in ((0, 33 * np.log(2)), (2**32 - 1, -np.log(24 * np.log(2)))):
        monkeypatch.setattr(jax.random, "bits", lambda _, shape, bits=bits: jnp.full(shape, bits, jnp.uint32))
        found_BV = sampling._gumbel(np.zeros(1, np.uint32), np.zeros(1, np.int32), 3)
        np.testing.assert_allclose(found_BV, np.full((1, 3), noise), rtol=1e-6)


def test_log_probabilities_are_the_models():
    """float32 beside float64: 3e-6 of numbers up to 30."""
    logits_BV, _, _ = inputs(7)
    token_B = np.arange(7, dtype=np.int32) * 40
    found_B, top_BK, top_logprob_BK = jax.jit(log_probabilities, static_argnums=2)(logits_BV, token_B, 5)
    expected_BV = scipy.special.log_softmax(logits_BV.astype(np.float64), axis=-1)
    np.testing.assert_allclose(found_B, expected_BV[np.arange(7), token_B], atol=3e-6)
    np.testing.assert_array_equal(top_BK, np.argsort(-logits_BV, axis=-1, stable=True)[:, :5])
    np.testing.assert_allclose(top_logprob_BK, np.take_along_axis(expected_BV, np.asarray(top_BK), -1), atol=3e-6)
