"""Who runs when: slots, pages and rows of each step. Nothing here touches a device.

A sequence waits, is admitted to a slot, has its known tokens filled into the cache piece by piece, and decodes. All that decode
have a row in every step, and prompts share a budget of rows beside them, so that a long prompt delays nobody by more than
that. When pages run out the youngest sequence gives its own back and waits again, with what it has. On a mesh each device has
slots and pages of its own.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from dsv3_jax.serve.attend import PAGE
from dsv3_jax.serve.pages import PagePool, extend_keys
from dsv3_jax.serve.request import Finish, OnEvent, SamplingParams, TokenLogprob

NOWHERE = -1  # in place of a slot


@dataclass(eq=False)
class Sequence:
    """A request from its arrival to its end."""

    number: int  # in order of arrival
    prompt_length: int
    tokens: list[int]  # prompt and output as far as the host knows
    params: SamplingParams
    seed: int
    salt: str
    on_event: OnEvent
    deadline: float | None = None
    slot: int = NOWHERE
    pages: list[int] = field(default_factory=list)
    to_fill: int = 0  # tokens that fill the cache before the first decoding step
    filled: int = 0  # of those, in it or on the way
    in_flight: int = 0  # decoding steps whose tokens the host does not have yet
    finish: Finish | None = None
    keys: list[bytes] = field(default_factory=list)  # of full pages
    published: int = 0  # pages that others may find
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    reported: bool = False  # whether the prompt's log-probabilities are

    @property
    def limit(self) -> int:
        """The most tokens, prompt and output, that it may have."""
        return self.prompt_length + self.params.max_tokens

    @property
    def decodes(self) -> bool:
        return self.slot != NOWHERE and self.filled == self.to_fill and self.finish is None

    @property
    def left(self) -> int:
        """Tokens that are still wanted, if each step in flight gives one."""
        return self.limit - len(self.tokens) - self.in_flight


@dataclass(frozen=True)
class Piece:
    """Neighbouring known tokens of a sequence, for one step."""

    sequence: Sequence
    first: int
    count: int


class Scheduler:
    """`pools` has the pages of each device, which has as many of the slots; slot s is on device s // (slots / devices).

    `tokens_a_step` is how many a sequence may gain in one: 2 with drafts.
    """

    def __init__(self, slots: int, pools: list[PagePool], tokens_a_step: int):
        assert slots % len(pools) == 0, (slots, len(pools))
        self.pools, self.tokens_a_step = pools, tokens_a_step
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        each = slots // len(pools)
        self._free_slots = [list(range((d + 1) * each - 1, d * each - 1, -1)) for d in range(len(pools))]
        self.slots, self.preemptions = slots, 0

    def device_of(self, sequence: Sequence) -> int:
        return sequence.slot * len(self.pools) // self.slots

    def _pool(self, sequence: Sequence) -> PagePool:
        return self.pools[self.device_of(sequence)]

    @property
    def free_pages(self) -> int:
        return sum(pool.available for pool in self.pools)

    @property
    def all_free(self) -> bool:
        """Whether no slot and no page is anybody's."""
        return self.free_pages == sum(pool.size for pool in self.pools) and sum(map(len, self._free_slots)) == self.slots

    def admit(self) -> list[Sequence]:
        """Give slots to those who wait the longest, as far as there are slots and pages for their prompts."""
        admitted = []
        while self.waiting and self._start(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            admitted.append(sequence)
        self.running.sort(key=lambda s: s.number)
        return admitted

    def _start(self, sequence: Sequence) -> bool:
        sequence.to_fill = len(sequence.tokens) - 1
        keys = extend_keys(sequence.keys, sequence.tokens, sequence.salt)[: sequence.to_fill // PAGE]
        if sequence.params.prompt_logprobs is not None:
            keys = []  # what is found has none
        with_slots = [d for d, slots in enumerate(self._free_slots) if slots]
        best = max(with_slots, key=lambda d: (self.pools[d].known(keys), self.pools[d].available), default=None)
        if best is None:
            return False
        pool, neighbours = self.pools[best], sum(self.device_of(s) == best for s in self.running)
        found = pool.find(keys)
        needed = -(-len(sequence.tokens) // PAGE) - len(found)
        if needed + neighbours > pool.available:  # those that run may soon want a page each
            pool.release(found)
            return False
        sequence.pages = found + [pool.take() for _ in range(needed)]
        sequence.filled = len(found) * PAGE
        sequence.cached_tokens = max(sequence.cached_tokens, sequence.filled)
        sequence.slot = self._free_slots[best].pop()
        return True

    def pieces(self, budget: int, largest: int) -> list[Piece]:
        """Known tokens to fill in a step, of the oldest sequences first: `budget` in all, `largest` of one sequence."""
        pieces = []
        for sequence in self.running:
            count = min(sequence.to_fill - sequence.filled, budget, largest)
            if count > 0 and sequence.finish is None:
                pieces.append(Piece(sequence, sequence.filled, count))
                sequence.filled += count
                budget -= count
                self._publish(sequence, sequence.filled)
        return pieces

    def steps_at_once(self, most: int) -> int:
        """How many decoding steps may be started at once, at most `most`: one where anybody waits for what comes between.

        No sequence may end before the last of them by its length, and their pages must be there.
        """
        alone = not self.waiting and all(s.decodes and s.params.constraint is None for s in self.running)
        if not self.running or not alone or self.free_pages < len(self.running) * -(-most * self.tokens_a_step // PAGE):
            return 1
        left = min(s.left - s.in_flight * (self.tokens_a_step - 1) for s in self.running)
        return max(1, min(most, left // self.tokens_a_step))

    def decoding(self, settle: Callable[[], None], steps: int = 1) -> list[Sequence]:
        """The sequences that decode in the next `steps` steps, each with the pages for them.

        `settle` waits for all steps in flight; it is called before a sequence has to give up its place.
        """
        ready = [s for s in self.running if s.decodes and s.left > 0]
        for sequence in ready:
            while sequence.decodes and not self._grow(sequence, steps):
                settle()  # tokens may end sequences, and with them free pages
                if sequence.decodes and not self._grow(sequence, steps):
                    neighbours = (s for s in self.running if self.device_of(s) == self.device_of(sequence))
                    self._preempt(max(neighbours, key=lambda s: s.number))
        return [s for s in ready if s.decodes and s.left > 0]

    def _grow(self, sequence: Sequence, steps: int) -> bool:
        """Whether there are pages for all tokens that a sequence may have after `steps` more."""
        most = len(sequence.tokens) + (sequence.in_flight + steps) * self.tokens_a_step
        needed, pool = -(-min(most, sequence.limit) // PAGE) - len(sequence.pages), self._pool(sequence)
        if needed > pool.available:
            return False
        sequence.pages += [pool.take() for _ in range(needed)]
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._leave(sequence)
        self.waiting.appendleft(sequence)

    def retire(self, sequence: Sequence) -> None:
        """Take a sequence that has ended from wherever it is."""
        if sequence.slot != NOWHERE:
            self._publish(sequence, len(sequence.tokens) - 1)
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _publish(self, sequence: Sequence, filled: int) -> None:
        if sequence.filled < sequence.to_fill:
            filled = min(filled, sequence.filled)
        keys = extend_keys(sequence.keys, sequence.tokens, sequence.salt)
        for i in range(sequence.published, filled // PAGE):
            self._pool(sequence).publish(sequence.pages[i], keys[i])
        sequence.published = max(sequence.published, filled // PAGE)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot != NOWHERE
        self.running.remove(sequence)
        self._free_slots[self.device_of(sequence)].append(sequence.slot)
        self._pool(sequence).release(sequence.pages)
        sequence.slot, sequence.pages, sequence.filled, sequence.in_flight, sequence.published = NOWHERE, [], 0, 0, 0
