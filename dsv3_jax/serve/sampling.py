"""How each row's next token is chosen: penalties, biases, limits and noise, each row by its own parameters.

A row's token is a function of its own inputs, bit for bit, whatever its neighbours ask for and how many they are:

- Sums over the vocabulary are of integers, which have no order. top_p and top_k need no sort either: a threshold on the logits
  is found bit by bit.
- What only some requests ask for is computed if any row does, under `lax.cond`. All rows' tokens then come from one expression
  outside of it, in which thresholds and noise of rows that did not ask are neutral: a greedy row's is the argmax of its logits,
  which is all that is computed if all rows are greedy.
- Where a product meets a sum, a barrier keeps compilers from making one rounding of the two in some programs only.

A token is the argmax of logits and Gumbel noise, which is a draw from their softmax. The noise depends on a request's seed and
the token's position alone, so that a draft is accepted if it is what would have been drawn without it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from dsv3_jax.serve.request import MOST_BIASES, SamplingParams

_FLOAT32_BITS = 24  # of precision
_LEAST_TEMPERATURE = 1e-30  # below it quotients overflow


class RowSampling(NamedTuple):
    """Sampling parameters on the device, an entry a row; `SamplingParams` says what they mean."""

    temperature_B: Float[Array, " B"]
    top_p_B: Float[Array, " B"]
    min_p_B: Float[Array, " B"]
    presence_B: Float[Array, " B"]
    frequency_B: Float[Array, " B"]
    repetition_B: Float[Array, " B"]
    top_k_B: Int[Array, " B"]
    seed_B: UInt32[Array, " B"]
    prompt_length_B: Int[Array, " B"]
    bias_token_BK: Int[Array, "B K"]  # V where there is none
    bias_BK: Float[Array, "B K"]
    mask_BW: UInt32[Array, "B W"]  # bit v % 32 of word v // 32: token v may come
    constrained_B: Bool[Array, " B"]  # by the mask


def row_of(params: SamplingParams, prompt_length: int, vocab_size: int, seed: int) -> RowSampling:
    """One request's entries, NumPy's scalars and rows. `seed` is the request's, or a fresh one where it has none."""
    bias_token_K, bias_K = np.full(MOST_BIASES, vocab_size, np.int32), np.zeros(MOST_BIASES, np.float32)
    bias_token_K[: len(params.logit_bias)] = [*params.logit_bias]
    bias_K[: len(params.logit_bias)] = [*params.logit_bias.values()]
    mask_W = np.full(-(-vocab_size // 32), 2**32 - 1, np.uint32)  # a constraint's own comes before each token
    entries: list[Any] = [
        *map(np.float32, (params.temperature, params.top_p, params.min_p)),
        *map(np.float32, (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)),
        np.int32(min(params.top_k, vocab_size)), np.uint32(seed), np.int32(prompt_length),
        bias_token_K, bias_K, mask_W, np.bool_(params.constraint is not None),
    ]  # fmt: skip
    return RowSampling(*entries)


def choose(
    logits_BV: Float[Array, "B V"], rows: RowSampling, position_B: Int[Array, " B"], history_BS: Int[Array, "B S"]
) -> Int[Array, " B"]:
    """Each row's token: the likeliest one at temperature 0, otherwise one drawn from `processed_logits`.

    Args:
        logits_BV: f32[B, V] of the model.
        rows: The rows' parameters.
        position_B: i32[B] where the tokens will be.
        history_BS: i32[B, S] the tokens at positions 0.. of each row; those at its position or after don't count.
    """
    changed = (rows.bias_BK != 0).any() | rows.constrained_B.any() | _penalises(rows).any()
    greedy = ~((rows.temperature_B > 0).any() | changed)
    return jax.lax.cond(greedy, lambda: _first_of_largest(logits_BV), lambda: _drawn(logits_BV, rows, position_B, history_BS))


def _first_of_largest(x_BV: Array) -> Int[Array, " B"]:
    """argmax, in two passes that CPUs vectorise: a third of the time at 128 rows of 4096."""
    V = x_BV.shape[1]
    largest_BV = x_BV == x_BV.max(axis=-1, keepdims=True)
    return jnp.minimum(jnp.where(largest_BV, jnp.arange(V, dtype=jnp.int32), V).min(axis=-1), V - 1)


def _penalises(rows: RowSampling) -> Bool[Array, " B"]:
    return (rows.presence_B != 0) | (rows.frequency_B != 0) | (rows.repetition_B != 1)


def _drawn(logits_BV: Array, rows: RowSampling, position_B: Array, history_BS: Array) -> Int[Array, " B"]:
    processed_BV = processed_logits(logits_BV, rows, position_B, history_BS)
    noise_BV = jax.lax.cond(
        (rows.temperature_B > 0).any(),
        lambda: jnp.where(rows.temperature_B[:, None] > 0, _gumbel(rows.seed_B, position_B, logits_BV.shape[1]), 0),
        lambda: jnp.zeros_like(logits_BV),
    )
    return _first_of_largest(processed_BV + noise_BV)


def processed_logits(
    logits_BV: Float[Array, "B V"], rows: RowSampling, position_B: Int[Array, " B"], history_BS: Int[Array, "B S"]
) -> Float[Array, "B V"]:
    """The logits of the distribution that tokens are drawn from; arguments as `choose`'s.

    In this order: penalties, biases, mask, temperature (unless 0), top_k, top_p of what top_k leaves, min_p. What they exclude
    is -inf; of equally likely tokens all stay or none.
    """
    logits_BV = _penalised(logits_BV, rows, position_B, history_BS)
    logits_BV = jax.lax.cond((rows.bias_BK != 0).any(), _biased, lambda x_BV, _: x_BV, logits_BV, rows)
    logits_BV = jax.lax.cond(rows.constrained_B.any(), _masked, lambda x_BV, _: x_BV, logits_BV, rows)
    divisor_B = jnp.where(rows.temperature_B > 0, jnp.maximum(rows.temperature_B, _LEAST_TEMPERATURE), 1)
    scaled_BV = jax.lax.optimization_barrier(logits_BV / divisor_B[:, None])
    image_BV = _image(scaled_BV)
    likeliest_B = image_BV.max(axis=-1)
    least_B = jnp.minimum(_least(scaled_BV, image_BV, rows), likeliest_B)  # rounding must not exclude the likeliest one
    return jnp.where(image_BV >= least_B[:, None], scaled_BV, -jnp.inf)


def log_probabilities(
    logits_BV: Float[Array, "B V"], token_B: Int[Array, " B"], top: int
) -> tuple[Float[Array, " B"], Int[Array, "B top"], Float[Array, "B top"]]:
    """Log-probabilities by the model's own logits.

    Returns:
        Those of token_B, and the `top` likeliest tokens with theirs, likeliest first.
    """
    most_B = logits_BV.max(axis=-1)
    total_B = _mass(_digits(jnp.exp(logits_BV - most_B[:, None])), None)
    log_total_B = jax.lax.optimization_barrier(jnp.log(total_B))
    top_BK, token_BK = jax.lax.top_k(logits_BV, top)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return (chosen_B - most_B) - log_total_B, token_BK, (top_BK - most_B[:, None]) - log_total_B[:, None]


def _penalised(logits_BV: Array, rows: RowSampling, position_B: Array, history_BS: Array) -> Array:
    B, V = logits_BV.shape

    def penalised() -> Array:
        place_S, row_B1 = jnp.arange(history_BS.shape[1]), jnp.arange(B)[:, None]
        before_BS = place_S < position_B[:, None]
        generated_BS = before_BS & (place_S >= rows.prompt_length_B[:, None])
        none_BV = jnp.zeros((B, V), jnp.int32)
        count_BV = none_BV.at[row_B1, jnp.where(generated_BS, history_BS, V)].add(1, mode="drop")
        seen_BV = none_BV.at[row_B1, jnp.where(before_BS, history_BS, V)].max(1, mode="drop") > 0
        factor_BV = jnp.where(seen_BV, rows.repetition_B[:, None], 1)
        repeated_BV = jnp.where(logits_BV > 0, logits_BV / factor_BV, logits_BV * factor_BV)
        by_count_BV = rows.frequency_B[:, None] * count_BV
        repeated_BV, by_count_BV = jax.lax.optimization_barrier((repeated_BV, by_count_BV))
        return (repeated_BV - by_count_BV) - jnp.where(count_BV > 0, rows.presence_B[:, None], 0)

    return jax.lax.cond(_penalises(rows).any(), penalised, lambda: logits_BV)


def _biased(logits_BV: Array, rows: RowSampling) -> Array:
    row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[row_B1, rows.bias_token_BK].add(rows.bias_BK, mode="drop")


def _masked(logits_BV: Array, rows: RowSampling) -> Array:
    V = logits_BV.shape[1]
    word_BV = jnp.repeat(rows.mask_BW, 32, axis=1)[:, :V]
    allowed_BV = (word_BV >> (jnp.arange(V, dtype=jnp.uint32) % 32)) & 1
    return jnp.where(rows.constrained_B[:, None] & (allowed_BV == 0), -jnp.inf, logits_BV)


def _least(scaled_BV: Array, image_BV: Array, rows: RowSampling) -> UInt32[Array, " B"]:
    """The image of the least logit that top_k, top_p and min_p leave to each row."""

    def by_count() -> Array:
        least_B = _threshold(image_BV, lambda in_BV: in_BV.sum(axis=-1, dtype=jnp.int32) >= rows.top_k_B)
        return jnp.where(rows.top_k_B > 0, least_B, 0)

    def by_probability() -> Array:
        digits_DBV = _digits(jnp.exp(scaled_BV - scaled_BV.max(axis=-1, keepdims=True)))
        left_BV = image_BV >= by_count_B[:, None]
        enough_B = rows.top_p_B * _mass(digits_DBV, left_BV)
        least_B = _threshold(image_BV, lambda in_BV: _mass(digits_DBV, in_BV & left_BV) >= enough_B)
        least_B = jnp.where(rows.top_p_B < 1, least_B, 0)
        return jnp.maximum(least_B, _image(scaled_BV.max(axis=-1) + jnp.log(rows.min_p_B)))

    none_B = jnp.zeros(image_BV.shape[0], jnp.uint32)
    by_count_B = jax.lax.cond((rows.top_k_B > 0).any(), by_count, lambda: none_B)
    limited = ((rows.top_p_B < 1) | (rows.min_p_B > 0)).any()
    return jnp.maximum(by_count_B, jax.lax.cond(limited, by_probability, lambda: none_B))


def _image(x: Float[Array, " *shape"]) -> UInt32[Array, " *shape"]:
    """Integers in the order of float32 numbers; equal numbers have equal ones, as 0 and -0 do."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))


def _threshold(image_BV: Array, enough: Callable[[Array], Array]) -> UInt32[Array, " B"]:
    """The greatest number t for which the tokens with image >= t are `enough` (bool[B, V] -> bool[B]), bit by bit."""

    def with_bit(i: Array, least_B: Array) -> Array:
        higher_B = least_B | (jnp.uint32(2**31) >> i.astype(jnp.uint32))
        return jnp.where(enough(image_BV >= higher_B[:, None]), higher_B, least_B)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros(image_BV.shape[0], jnp.uint32))


def _digits(weight_BV: Array) -> list[UInt32[Array, "B V"]]:
    """Numbers of 0 to 1 in digits as large as sums of V of them allow, as many as sums need to be as precise as float32."""
    bits = _digit_bits(weight_BV.shape[1])
    digits = []
    for _ in range(-(-(_FLOAT32_BITS + weight_BV.shape[1].bit_length()) // bits)):
        weight_BV *= 2.0**bits
        digits.append(jnp.floor(weight_BV).astype(jnp.uint32))
        weight_BV -= jnp.floor(weight_BV)
    return digits


def _digit_bits(vocab_size: int) -> int:
    return 32 - vocab_size.bit_length()


def _mass(digits: list[Array], in_BV: Array | None) -> Float[Array, " B"]:
    """The sum of each row's numbers, or of those in a set."""
    mass_B = jnp.zeros(digits[0].shape[0])
    for i, digit_BV in enumerate(digits, 1):
        chosen_BV = digit_BV if in_BV is None else jnp.where(in_BV, digit_BV, 0)
        mass_B += chosen_BV.sum(axis=-1, dtype=jnp.uint32).astype(jnp.float32) * 2.0 ** (-i * _digit_bits(digit_BV.shape[1]))
    return mass_B


def _gumbel(seed_B: Array, position_B: Array, vocab_size: int) -> Float[Array, "B V"]:
    """Gumbel noise by seed and position: -log of exponential noise, -log(1 - u).

    u is precise near 0, where the greatest noise comes from: an unlikely token of a large vocabulary must keep its chance.
    """

    def bits_of(seed: Array, position: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(jax.random.key(seed), position), (vocab_size,))

    u_BV = (jax.vmap(bits_of)(seed_B, position_B).astype(jnp.float32) + 0.5) * 2.0**-32
    u_BV = jnp.minimum(u_BV, 1 - 2.0**-_FLOAT32_BITS)  # rounded to 1, the noise would be infinite
    return -jnp.log(-jnp.log1p(-u_BV))
