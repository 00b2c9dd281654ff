"""The compiled programs of a server: every shape that a step may have, compiled before the first request.

They are executables, not functions: a shape that was not compiled is an error, never a compilation while somebody waits.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.model.layout import Layout
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.attend import table_width
from dsv3_jax.serve.decoder import Decoder, take_apart
from dsv3_jax.serve.request import SamplingParams
from dsv3_jax.serve.sampling import row_of
from dsv3_jax.serve.step import BEYOND, NO_DRAFT, Chosen, Logprobs, Programs, Settings, Slots, admit, limit

PIECE_SIZES = (8, 16, 24, 32, 48, 64)  # tokens of a prompt that one program computes
PIECE = PIECE_SIZES[-1]


def row_buckets(slots: int) -> list[int]:
    """Numbers of sequences that a decoding step is compiled for: padding costs 10% if all numbers are equally likely."""
    return sorted({*(b for b in (1, 2, 4, 8, 12, 16) if b < slots), *range(24, slots, 8), slots})


def piece_sizes(largest: int) -> list[int]:
    """The sizes that pieces of `largest` tokens at most need."""
    return [size for i, size in enumerate(PIECE_SIZES) if i == 0 or PIECE_SIZES[i - 1] < largest]


@dataclass(frozen=True)
class Shape:
    """B sequences with L neighbouring tokens, to decode or to fill into the cache; with the MTP module's part or without.

    One that decodes takes up to `most_steps` steps at a call.
    """

    decodes: bool
    sequences: int
    length: int
    drafts: bool
    most_steps: int = 1


MakeDecoder = Callable[[Sequence[jax.Array]], Decoder]


def flattened(graph: nnx.GraphDef[Decoder], state: nnx.State) -> tuple[list[Any], MakeDecoder]:
    """A decoder's weights, and what makes it of them: a list is passed to a step more quickly than nnx's state."""
    weights, structure = jax.tree.flatten(state)
    return weights, lambda weights: nnx.merge(graph, jax.tree.unflatten(structure, weights))


def lower(
    layout: Layout, decoder: MakeDecoder, shape: Shape, weights: list[Any], pages: Any, slots: Any, settings: Any, rows: Any
) -> jax.stages.Lowered:
    """The step of a shape, for weights that lie where they are; arguments may be abstract. It overwrites pages and slots."""
    programs, everywhere = Programs(decoder, shape.length, shape.drafts, shape.most_steps), layout.replicated
    on_each = layout.sharding(layout.spec("cache_batch"))
    lie = [w.sharding for w in weights], on_each, everywhere, everywhere, everywhere
    if not shape.decodes:
        return layout.jit(programs.fill, lie, (on_each, everywhere), (1,)).lower(weights, pages, slots, settings, rows)
    step = layout.jit(programs.decode_steps, (*lie, everywhere), (on_each, everywhere, everywhere), (1, 2))
    return step.lower(weights, pages, slots, settings, rows, np.int32(1))


class Device:
    """The state on the device, or on all of a mesh, and the programs that change it.

    A mesh's devices have `pages` and `slots` / devices each; a shape's sequences are as many of every device, in order.
    """

    def __init__(self, model: Transformer, slots: int, context: int, pages: int, shapes: list[Shape]):
        graph, state = take_apart(model)
        self._layout = layout = model.layout.decoding
        self.devices = layout.shards("cache_batch")
        self._weights, decoder = flattened(graph, state)
        self.slots, self._width, self._history = slots, table_width(context), context + BEYOND
        vocab_size = model.config.vocab_size
        self._pages = jax.jit(lambda weights: decoder(weights).empty_pages(self.devices * pages))(self._weights)
        self._slots, self._settings = jax.device_put(empty_slots(slots, self._history, vocab_size), layout.replicated)
        self.vocab_size, self.compile_s = vocab_size, 0.0
        self._compile(decoder, shapes)

    def _compile(self, decoder: MakeDecoder, shapes: list[Shape]) -> None:
        began = time.perf_counter()
        slot, everywhere = jnp.int32(0), self._layout.replicated
        history, its = jax.tree.map(lambda a: a[0], (self._slots.token_NS, self._settings))
        layout, settings = self._layout, self._settings
        admitting, limiting = (
            layout.jit(f, (everywhere,) * n, everywhere, d) for f, n, d in ((admit, 6, (0, 1)), (limit, 3, (0,)))
        )
        wanted: dict[Any, Callable[[], jax.stages.Lowered]] = {
            "admit": lambda: admitting.lower(self._slots, settings, slot, history, slot, its),
            "limit": lambda: limiting.lower(settings, slot, its.sampling.mask_BW),
        }
        for shape in shapes:
            arguments = self._weights, self._pages, self._slots, settings, self.rows(shape, [])[0]
            wanted[shape] = functools.partial(lower, layout, decoder, shape, *arguments)

        def compiled(key):
            return key, wanted[key]().compile()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._run = dict(pool.map(compiled, wanted))
        self.compile_s = time.perf_counter() - began

    def rows(self, shape: Shape, rows: Sequence[tuple[int, int, int, list[int]]]) -> tuple[np.ndarray, list[int]]:
        """(slot, first, count, pages) of each sequence for `Rows.of`, filled up with rows of nobody, and where each one is.

        Sequences that are on one device must not be more than the shape has of it.
        """
        packed_BX = np.zeros((shape.sequences, 3 + self._width), np.int32)
        packed_BX[:, 0] = self.slots
        each, used, index = shape.sequences // self.devices, [0] * self.devices, []
        for slot, first, count, pages in rows:
            device = min(slot * self.devices // self.slots, self.devices - 1)
            b = device * each + used[device]
            used[device] += 1
            packed_BX[b, :3] = slot, first, count
            packed_BX[b, 3 : 3 + len(pages)] = pages
            index.append(b)
        return packed_BX, index

    def admit(self, slot: int, tokens: list[int], prompt_length: int, params: SamplingParams, seed: int) -> None:
        token_S = np.zeros(self._history, np.int32)
        token_S[: len(tokens)] = tokens
        its = _settings(params, prompt_length, self.vocab_size, seed)
        arguments = self._slots, self._settings, np.int32(slot), token_S, np.int32(len(tokens)), its
        self._slots, self._settings = self._run["admit"](*arguments)

    def limit(self, slot: int, mask_W: np.ndarray) -> None:
        self._settings = self._run["limit"](self._settings, np.int32(slot), mask_W)

    def seconds(self, shape: Shape) -> float:
        """What a decoding step takes, the quickest of eight calls, with tokens of nobody at different places."""
        self.admit(self.slots, [(7919 * i) % self.vocab_size for i in range(self._history)], 0, SamplingParams(), 0)
        packed_BX, _ = self.rows(shape, [])
        packed_BX[:, 1], packed_BX[:, 2] = np.arange(shape.sequences) * shape.length, shape.length
        times = []
        for _ in range(8):
            began = time.perf_counter()
            jax.block_until_ready(self.decode(shape, packed_BX, shape.most_steps))
            times.append((time.perf_counter() - began) / shape.most_steps)
        self.admit(self.slots, [0], 0, SamplingParams(), 0)
        return min(times)

    def fill(self, shape: Shape, rows: np.ndarray) -> Logprobs:
        self._pages, logprobs = self._run[shape](self._weights, self._pages, self._slots, self._settings, rows)
        return logprobs

    def decode(self, shape: Shape, rows: np.ndarray, steps: int) -> Chosen:
        """What came of each step, [most_steps, ...]."""
        arguments = self._weights, self._pages, self._slots, self._settings, rows, np.int32(steps)
        self._pages, self._slots, chosen = self._run[shape](*arguments)
        return chosen


def empty_slots(slots: int, history: int, vocab_size: int) -> tuple[Slots, Settings]:
    N = slots + 1
    token_NS, length_N = jnp.zeros((N, history), jnp.int32), jnp.ones(N, jnp.int32)  # a last token at place 0
    row = _settings(SamplingParams(), 0, vocab_size, 0)
    settings = jax.tree.map(lambda a: jnp.broadcast_to(jnp.asarray(a), (N, *np.shape(a))), row)
    return Slots(token_NS, length_N, jnp.full(N, NO_DRAFT, jnp.int32)), settings


def _settings(params: SamplingParams, prompt_length: int, vocab_size: int, seed: int) -> Settings:
    """One sequence's."""
    logprobs: Any = np.bool_(params.logprobs is not None or params.prompt_logprobs is not None)
    return Settings(logprobs, row_of(params, prompt_length, vocab_size, seed))


def bytes_a_token(model: Transformer) -> int:
    """Bytes of a token in the cache, the MTP module's included."""
    config = model.config
    layers = config.num_hidden_layers + min(config.num_nextn_predict_layers, 1)
    return layers * (config.kv_lora_rank + config.qk_rope_head_dim) * model.dtype.itemsize
