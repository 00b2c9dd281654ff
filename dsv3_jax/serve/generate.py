"""Text generation with the latent cache: one compiled prefill chunk, one compiled decoding loop."""

import functools
from collections.abc import Collection, Sized

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from dsv3_jax.checks import is_text, require, shortened
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.special_tokens import SpecialTokens
from dsv3_jax.data.tokenizer import tokenizer_errors
from dsv3_jax.errors import UserError
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.cache import LatentCache, empty_cache, extend, indices, unstack
from dsv3_jax.serve.request import SamplingParams
from dsv3_jax.serve.sampling import RowSampling, choose, row_of
from pallas_kernels.products import dot

_PREFILL_CHUNK = 64  # tokens at most: bounds the score matrix, and few programs serve prompts of every length
_LENGTH_STEP = 128  # cache lengths are multiples of this, so that few programs are compiled
_ENDS_STEP = 8  # and numbers of end tokens of this


def _head(model: Transformer, x_BD: Array) -> Float[Array, "B V"]:
    logits_BV = dot(x_BD, model.head_weight().astype(x_BD.dtype), dtype=jnp.float32)
    return model.layout.constrain(logits_BV, None, None)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(graph, state, cache: LatentCache, token_BL, start, last):
    """Run one chunk of the prompt; returns the logits at its position `last`, and the longer cache."""
    model = nnx.merge(graph, state)
    layers = unstack(model, token_BL.size)
    x_BLD, cache = extend(model, layers, cache, token_BL, start)
    return _head(model, jax.lax.dynamic_index_in_dim(x_BLD, last, 1, keepdims=False)), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode(graph, state, cache: LatentCache, token_BS, logits_BV, begin, end, rows: RowSampling, ends_E):
    """Fill token_BS[:, begin:end]; rows that reached one of `ends_E` (-1: none) repeat it, and all rows there end the loop."""
    model = nnx.merge(graph, state)
    layers = unstack(model, token_BS.shape[0])

    def running(carry):
        position, *_, done_B = carry
        return (position < end) & ~done_B.all()

    def step(carry):
        position, token_BS, logits_BV, cache, before_B, done_B = carry
        token_B = choose(logits_BV, rows, jnp.broadcast_to(position, token_BS.shape[:1]), token_BS)
        token_B = jnp.where(done_B, before_B, token_B)
        token_BS = jax.lax.dynamic_update_slice(token_BS, token_B[:, None], indices(0, position))
        x_B1D, cache = extend(model, layers, cache, token_B[:, None], position)
        done_B |= (token_B[:, None] == ends_E).any(-1)
        return position + 1, token_BS, _head(model, x_B1D[:, 0]), cache, token_B, done_B

    last_B, done_B = token_BS[:, 0], jnp.zeros(token_BS.shape[0], bool)
    carry = begin, token_BS, logits_BV, cache, last_B, done_B
    position, token_BS, _, _, last_B, done_B = jax.lax.while_loop(running, step, carry)
    after = (jnp.arange(token_BS.shape[1]) >= position) & (jnp.arange(token_BS.shape[1]) < end)
    return model.layout.constrain(jnp.where(after, last_B[:, None], token_BS), None, None)


def _rectangle(prompt_ids: Array | np.ndarray | list[list[int]]) -> np.ndarray:
    """The prompts as one array. Raises `UserError` if they differ in length."""
    try:
        return np.asarray(prompt_ids)
    except ValueError:  # NumPy's word for rows of several lengths
        lengths = sorted({len(row) if isinstance(row, Sized) else 0 for row in prompt_ids})
        raise UserError(
            f"prompt_ids has rows of {', '.join(map(str, lengths[:8]))} tokens; all prompts of a call must have the same length"
        ) from None


def _alike(params: SamplingParams, prompt_length: int, batch: int, config: ModelConfig) -> RowSampling:
    """One request's parameters for all rows, each with a seed of its own."""
    assert params.seed is not None
    row = row_of(params, prompt_length, config.vocab_size, params.seed)
    rows = jax.tree.map(lambda entry: np.broadcast_to(entry, (batch, *entry.shape)), row)
    return rows._replace(seed_B=rows.seed_B + np.arange(batch, dtype=np.uint32))


def generate(
    model: Transformer,
    prompt_ids: Int[Array, "B T"] | np.ndarray | list[list[int]],
    max_new_tokens: int = 24,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
) -> Int[Array, "B length"]:
    """Continue prompts with the latent cache; greedy unless a temperature is given.

    Args:
        model: From `load` or `load_hf`.
        prompt_ids: i32[B, T] token ids; all prompts have the same length.
        max_new_tokens: The number N of tokens to add.
        temperature: Divides the logits before sampling; 0 takes the likeliest token.
        top_p: Sample from the smallest set of tokens that has this probability.
        seed: Seed of the first row's sampling, 0 to 2^32 - 1; each further row has the next one.
        eos_id: A row that produces this token, or one of these, repeats it to the end. None: no token ends a row.

    Returns:
        i32[B, T + N]: the prompts, each followed by its continuation.

    Raises:
        UserError: Prompts of several lengths or none, an id outside the vocabulary, a length beyond `max_position_embeddings`,
            or a temperature, top_p or seed outside its range.
    """
    config = model.config
    prompt_BT = _rectangle(prompt_ids)
    if prompt_BT.ndim != 2 or prompt_BT.size == 0 or not np.issubdtype(prompt_BT.dtype, np.integer):
        raise UserError(f"prompt_ids has shape {prompt_BT.shape} and dtype {prompt_BT.dtype}; expected integers [B, T]")
    if prompt_BT.min() < 0 or prompt_BT.max() >= config.vocab_size:
        raise UserError(f"prompt_ids holds ids outside [0, {config.vocab_size}): {prompt_BT.min()}..{prompt_BT.max()}")
    B, T = prompt_BT.shape
    if max_new_tokens < 1 or T + max_new_tokens > config.max_position_embeddings:
        raise UserError(
            f"max_new_tokens={max_new_tokens} after a prompt of {T}: use 1 to {config.max_position_embeddings - T} "
            f"(model.max_position_embeddings={config.max_position_embeddings})"
        )
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)

    ends = [] if eos_id is None else [eos_id] if isinstance(eos_id, int | np.integer) else [*eos_id]
    ends_E = np.full(max(-(-len(ends) // _ENDS_STEP), 1) * _ENDS_STEP, -1, np.int32)
    ends_E[: len(ends)] = ends
    graph, state = nnx.split(model)
    length = -(-(T + max_new_tokens) // _LENGTH_STEP) * _LENGTH_STEP
    cache = empty_cache(config, model.layout, B, length, model.dtype)
    token_BS = np.zeros((B, length), np.int32)
    token_BS[:, :T] = prompt_BT
    logits_BV = None
    size = next(c for c in (8, 16, 32, _PREFILL_CHUNK) if c >= min(T, _PREFILL_CHUNK))
    # what comes from the host is numpy's, which several processes' devices take as one value
    for start in range(0, T, size):
        last = min(T - start, size) - 1
        logits_BV, cache = _prefill(graph, state, cache, token_BS[:, start : start + size], np.int32(start), np.int32(last))
    out_BS = _decode(
        graph,
        state,
        cache,
        token_BS,
        logits_BV,
        np.int32(T),
        np.int32(T + max_new_tokens),
        _alike(params, T, B, config),
        ends_E,
    )
    return out_BS[:, : T + max_new_tokens]


def continue_text(
    model: Transformer,
    tokenizer: Tokenizer,
    special: SpecialTokens,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """`generate` for text: the prompt and its continuation, which ends early at any of the end tokens.

    The prompt is begun as documents are. Special tokens that it names, such as those of a chat template, are those tokens.
    """
    require(is_text(prompt), f"--prompt={shortened(prompt)} holds bytes that are no UTF-8")
    with tokenizer_errors(f"--prompt={shortened(prompt)} cannot be encoded"):
        ids = special.begun(tokenizer.encode(prompt, add_special_tokens=False).ids)
    out = generate(model, [ids], max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, eos_id=special.ends)
    return tokenizer.decode(np.asarray(out)[0].tolist())
