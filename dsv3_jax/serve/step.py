"""What a server's steps compute: prompts' tokens into the cache, and the next tokens of many sequences at once.

A slot is a running sequence's place on the device: its tokens so far, how they are chosen, and a draft of the next one. A row
is one token of one slot. All of a slot's tokens but the last are in the cache; the row of the last one gives the next, and a
second row, that of the draft, gives the one after it if the draft proves right (arXiv 2412.19437, section 5.4.3).

A draft is right if it is the token that the model itself chooses there. Chosen tokens depend on logits, seed and position
alone, and so texts are the same with drafts and without, sampled ones too. Drafts are chosen with the same random numbers,
which makes them right as often as the two distributions agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.serve.attend import LayerPages
from dsv3_jax.serve.decoder import Decoder, Tokens
from dsv3_jax.serve.request import MOST_ALTERNATIVES
from dsv3_jax.serve.sampling import RowSampling, choose, log_probabilities

NO_DRAFT = -1
LAST, DRAFT = -1, -2  # in place of a row's position: that of a sequence's last token, and the one after it
BEYOND = 2  # tokens that a step may write after a sequence's longest length


class Slots(NamedTuple):
    """The state of N slots; the last one belongs to nobody: rows that are no token are its."""

    token_NS: Int[Array, "N S"]
    length_N: Int[Array, " N"]  # tokens of the sequence
    draft_N: Int[Array, " N"]  # the token after them, perhaps


class Settings(NamedTuple):
    """What stays as it is while a sequence has its slot."""

    logprobs_N: Bool[Array, " N"]  # whether log-probabilities are wanted
    sampling: RowSampling


class Logprobs(NamedTuple):
    """Log-probabilities of tokens and of the likeliest ones at their places; zeros where nobody wants them."""

    token_T: Float[Array, " T"]
    top_TK: Int[Array, "T K"]
    of_top_TK: Float[Array, "T K"]


class Chosen(NamedTuple):
    """The next tokens of a step's slots, and what is known of the rows'; of several steps with an axis for them before."""

    next_N4: Int[Array, "N 4"]  # a slot's next two tokens, how many of them count, and whether there was a draft
    logprobs: Logprobs


class Rows(NamedTuple):
    """The tokens of a step: B sequences with L neighbouring ones.

    `first_B` is the position of the first, or LAST or DRAFT, which only the device knows.
    """

    slot_B: Int[Array, " B"]
    first_B: Int[Array, " B"]
    count_B: Int[Array, " B"]  # tokens that are real
    page_BP: Int[Array, "B P"]

    @classmethod
    def of(cls, packed_BX: Int[Array, "B 3+P"]) -> "Rows":
        """Rows from one array, which the host sends more quickly than four."""
        return cls(packed_BX[:, 0], packed_BX[:, 1], packed_BX[:, 2], packed_BX[:, 3:])


def admit(slots: Slots, settings: Settings, slot, token_S, length, its: Settings) -> tuple[Slots, Settings]:
    """A new sequence in a slot, with its settings."""
    new = Slots(token_S, length, jnp.int32(NO_DRAFT)), its
    return jax.tree.map(lambda all_N, one: all_N.at[slot].set(one), (slots, settings), new)


def limit(settings: Settings, slot, mask_W) -> Settings:
    """Other tokens that may come next in a slot."""
    sampling = settings.sampling._replace(mask_BW=settings.sampling.mask_BW.at[slot].set(mask_W))
    return settings._replace(sampling=sampling)


@dataclass(frozen=True)
class Programs:
    """The steps of sequences with `length` neighbouring tokens; with `drafts`, the MTP module's cache and drafts are kept.

    `decoder` makes one of its weights. `decode_steps` takes `most_steps` at most.
    """

    decoder: Callable[[Sequence[Array]], Decoder]
    length: int
    drafts: bool
    most_steps: int

    def fill(
        self, weights, pages: list[LayerPages], slots: Slots, settings: Settings, packed_BX
    ) -> tuple[list[LayerPages], Logprobs]:
        """Known tokens into the cache, none of them its sequence's last; log-probabilities of those after them."""
        decoder, rows = self.decoder(weights), Rows.of(packed_BX)
        tokens = _tokens(rows, slots, self.length)
        token_BL, next_BL = (slots.token_NS[rows.slot_B[:, None], tokens.position_BL + i] for i in (0, 1))
        hidden_BLD, pages = decoder.hidden(pages, token_BL, tokens)
        if self.drafts:
            pages = decoder.mtp_hidden(pages, hidden_BLD, next_BL, tokens)[1]
        hidden_TD, wanted = hidden_BLD.reshape(next_BL.size, -1), settings.logprobs_N[rows.slot_B].any()
        return pages, _logprobs_if(wanted, lambda: decoder.logits(hidden_TD), next_BL.reshape(-1))

    def decode_steps(
        self, weights, pages: list[LayerPages], slots: Slots, settings: Settings, packed_BX, steps: Int[Array, ""]
    ) -> tuple[list[LayerPages], Slots, Chosen]:
        """`steps` times `decode`, without the host in between; what is beyond them in the result is zero."""
        K = self.most_steps
        if K == 1:
            pages, slots, chosen = self.decode(weights, pages, slots, settings, packed_BX)
            return pages, slots, jax.tree.map(lambda one: one[None], chosen)

        def step(i, carry):
            pages, slots, chosen_K = carry
            pages, slots, chosen = self.decode(weights, pages, slots, settings, packed_BX)
            return pages, slots, jax.tree.map(lambda all_K, one: all_K.at[i].set(one), chosen_K, chosen)

        none_K = Chosen(jnp.zeros((K, slots.length_N.size, 4), jnp.int32), _no_logprobs(K, packed_BX.shape[0] * self.length))
        return lax.fori_loop(0, steps, step, (pages, slots, none_K))

    def decode(
        self, weights, pages: list[LayerPages], slots: Slots, settings: Settings, packed_BX
    ) -> tuple[list[LayerPages], Slots, Chosen]:
        """The next tokens of slots whose last token, and perhaps draft, is among the rows; other rows do as in `fill`."""
        decoder, rows, N = self.decoder(weights), Rows.of(packed_BX), slots.length_N.size
        tokens = _tokens(rows, slots, self.length)
        drafts_in_NS = _put(slots.token_NS, jnp.arange(N), slots.length_N, jnp.maximum(slots.draft_N, 0))
        slots = slots._replace(token_NS=drafts_in_NS)
        slot_T = jnp.repeat(rows.slot_B, self.length)
        position_T, real_T = tokens.position_BL.reshape(-1), tokens.real_BL.reshape(-1)
        after_T = position_T - (slots.length_N[slot_T] - 1)  # 0: the last token; 1: the draft; negative: known ones
        slot_of_last_T = jnp.where(real_T & (after_T == 0), slot_T, N)
        slot_of_draft_T = jnp.where(real_T & (after_T == 1), slot_T, N)

        def by_slot(slot_T, values_T, fill):
            return jnp.full(N, fill, values_T.dtype).at[slot_T].set(values_T, mode="drop")

        token_BL = slots.token_NS[rows.slot_B[:, None], tokens.position_BL]
        hidden_BLD, pages = decoder.hidden(pages, token_BL, tokens)
        logits_TV = decoder.logits(hidden_BLD.reshape(slot_T.size, -1))
        sampling_T = jax.tree.map(lambda a: a[slot_T], settings.sampling)
        chosen_T = choose(logits_TV, sampling_T, position_T + 1, slots.token_NS[slot_T])
        running_N = by_slot(slot_of_last_T, real_T, False)
        first_N, second_N = by_slot(slot_of_last_T, chosen_T, 0), by_slot(slot_of_draft_T, chosen_T, 0)
        drafted_N = by_slot(slot_of_draft_T, real_T, False) & (slots.draft_N >= 0)
        right_N = drafted_N & (slots.draft_N == first_N)
        known_T = slots.token_NS[slot_T, position_T + 1]
        logprobs = _logprobs_if(settings.logprobs_N[slot_T].any(), lambda: logits_TV, jnp.where(after_T < 0, known_T, chosen_T))

        token_NS = _put(slots.token_NS, jnp.where(running_N, jnp.arange(N), N), slots.length_N, first_N)
        token_NS = _put(token_NS, jnp.where(right_N, jnp.arange(N), N), slots.length_N + 1, second_N)
        count_N = running_N.astype(jnp.int32) + right_N
        draft_N = jnp.full(N, NO_DRAFT)
        if self.drafts:
            next_T = jnp.where(after_T < 0, known_T, chosen_T)
            mtp_BLD, pages = decoder.mtp_hidden(pages, hidden_BLD, next_T.reshape(token_BL.shape), tokens)
            mtp_logits_TV = decoder.logits(mtp_BLD.reshape(slot_T.size, -1))
            draft_T = choose(mtp_logits_TV, sampling_T, position_T + 2, token_NS[slot_T])
            after_last_N, after_draft_N = (
                by_slot(slot_of_last_T, draft_T, NO_DRAFT),
                by_slot(slot_of_draft_T, draft_T, NO_DRAFT),
            )
            # a limit on the next token says nothing of the one after it
            draft_N = jnp.where(settings.sampling.constrained_B, NO_DRAFT, jnp.where(right_N, after_draft_N, after_last_N))
        slots = slots._replace(
            token_NS=token_NS,
            length_N=slots.length_N + count_N,
            draft_N=jnp.where(running_N, draft_N, slots.draft_N).astype(jnp.int32),
        )
        return pages, slots, Chosen(jnp.stack([first_N, second_N, count_N, drafted_N], axis=1), logprobs)


def _tokens(rows: Rows, slots: Slots, length: int) -> Tokens:
    last_B = slots.length_N[rows.slot_B] - 1
    first_B = jnp.where(rows.first_B >= 0, rows.first_B, last_B + LAST - rows.first_B)
    return Tokens(first_B[:, None] + jnp.arange(length), jnp.arange(length) < rows.count_B[:, None], rows.page_BP)


def _put(token_NS: Array, slot_N: Array, place_N: Array, value_N: Array) -> Array:
    """With a value a slot; nothing for a slot N or a place beyond the longest."""
    return token_NS.at[slot_N, place_N].set(value_N, mode="drop")


def _logprobs_if(wanted: Array, logits: Callable[[], Array], token_T: Array) -> Logprobs:
    nothing = _no_logprobs(token_T.size)
    return lax.cond(wanted, lambda: Logprobs(*log_probabilities(logits(), token_T, MOST_ALTERNATIVES)), lambda: nothing)


def _no_logprobs(*shape: int) -> Logprobs:
    of_top = *shape, MOST_ALTERNATIVES
    return Logprobs(jnp.zeros(shape, jnp.float32), jnp.zeros(of_top, jnp.int32), jnp.zeros(of_top, jnp.float32))
