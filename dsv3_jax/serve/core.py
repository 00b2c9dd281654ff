"""The engine without its thread: each turn starts a step and deals with the tokens of the one before."""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.drafts import DraftRule
from dsv3_jax.serve.pages import PagePool
from dsv3_jax.serve.programs import PIECE, Device, Shape, piece_sizes, row_buckets
from dsv3_jax.serve.request import Event, Finish, TokenLogprob
from dsv3_jax.serve.scheduler import NOWHERE, Piece, Scheduler, Sequence
from dsv3_jax.serve.step import DRAFT, LAST

EXACT_ROWS = 32  # of the one program of an exact engine
STEPS_AT_ONCE = 4  # that a call may take where few sequences decode: with them, the host takes as long as the device
_FEW = 8  # sequences

COUNTERS = (
    "requests_finished", "prompt_tokens", "output_tokens", "cached_tokens", "rows_live", "rows_computed", "decode_rows_live",
    "decode_rows_computed", "steps", "busy_s", "drafts", "drafts_accepted", "slots_live_while_waiting", "slots_while_waiting",
)  # fmt: skip


Place = tuple[int, int]  # of a token among those of steps that were started at once: its step, and where it is in it


@dataclass(frozen=True)
class Row:
    """The tokens of one sequence in a step: a piece of what is known (`piece`), or the last ones (None)."""

    sequence: Sequence
    first: int
    count: int
    piece: Piece | None = None


@dataclass(frozen=True)
class Flight:
    """Steps that were started at once. `index` has the place of each row's first token among a step's."""

    started: float
    steps: int
    chosen: Any
    logprobs: Any
    rows: list[Row]
    index: list[int]


class Core:
    """See `Engine` for the arguments; `drafts=None` leaves it to what is measured."""

    def __init__(
        self, model: Transformer, slots: int, context: int, pages: int, exact: bool, drafts: bool | None, prompt_rows: int
    ):
        self._exact, self._prompt_rows = exact, prompt_rows
        self.drafts = model.config.num_nextn_predict_layers > 0 if drafts is None else drafts
        measured = drafts is None and self.drafts and not exact
        devices = model.layout.decoding.shards("cache_batch")
        buckets = [devices * each for each in row_buckets(slots // devices)]
        self._pieces = piece_sizes(min(prompt_rows, context))
        self._few = _FEW if devices == 1 else 0
        if exact:
            shapes = [self._exact_shape]
        else:
            shapes = [self._piece_shape(size, devices) for size in self._pieces]
            kinds = (False, True) if measured else (self.drafts,)
            shapes += [self._shape(b, with_drafts) for b in buckets for with_drafts in kinds]
        self.device = Device(model, slots, context, pages, shapes)
        self._buckets, self.rule = buckets, None
        if measured:
            seconds = self.device.seconds
            self.rule = DraftRule({b: (seconds(self._shape(b, False)), seconds(self._shape(b, True))) for b in buckets})
        self.scheduler = Scheduler(slots, [PagePool(pages) for _ in range(devices)], 2 if self.drafts else 1)
        self._flights: deque[Flight] = deque()
        self.counts = dict.fromkeys(COUNTERS, 0.0)
        self._idle_since = time.monotonic()

    @property
    def _exact_shape(self) -> Shape:
        return Shape(True, EXACT_ROWS, 1, self.drafts)

    def _piece_shape(self, size: int, devices: int) -> Shape:
        return Shape(False, devices, size, self.drafts)

    def _shape(self, sequences: int, drafts: bool) -> Shape:
        return Shape(True, sequences, 2 if drafts else 1, drafts, STEPS_AT_ONCE if sequences <= self._few else 1)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._flights)

    def add(self, sequence: Sequence) -> None:
        self.counts["prompt_tokens"] += sequence.prompt_length
        self.scheduler.waiting.append(sequence)

    def end(self, sequence: Sequence, finish: Finish, event: Event | None = None, error: str = "") -> None:
        """End a sequence that has not ended; `event` has what is still to be said of it."""
        if sequence.finish is not None:
            return
        self.scheduler.retire(sequence)
        sequence.finish = finish
        self.counts["requests_finished"] += 1
        self.counts["cached_tokens"] += sequence.cached_tokens
        event = event or Event()
        sequence.on_event(
            Event(event.tokens, event.logprobs, event.prompt_logprobs, finish, error, cached_tokens=sequence.cached_tokens)
        )

    def turn(self) -> None:
        """End what is late, admit who waits, start a step, and deal with the one before it."""
        now = time.monotonic()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.deadline is not None and now >= sequence.deadline:
                self.end(sequence, Finish.DEADLINE)
        for sequence in self.scheduler.admit():
            self._begin(sequence)
        if any(s.params.constraint for s in self.scheduler.running):
            self.settle()  # what may come next depends on what came
        before = len(self._flights)
        self._start_exact() if self._exact else self._start()
        for _ in range(before):
            self._land()

    def settle(self) -> None:
        """Wait for all steps in flight."""
        while self._flights:
            self._land()

    def _begin(self, sequence: Sequence) -> None:
        self.device.admit(sequence.slot, sequence.tokens, sequence.prompt_length, sequence.params, sequence.seed)
        if sequence.params.prompt_logprobs is not None and sequence.prompt_length == 1 and not sequence.reported:
            sequence.prompt_logprobs = [None]
            self._report(sequence)
        self._end_if_only_filled(sequence)

    def _report(self, sequence: Sequence) -> None:
        sequence.reported = True
        sequence.on_event(Event(prompt_logprobs=tuple(sequence.prompt_logprobs)))

    def _end_if_only_filled(self, sequence: Sequence) -> None:
        done = sequence.filled == sequence.to_fill and (sequence.reported or sequence.params.prompt_logprobs is None)
        if sequence.params.max_tokens == 0 and done:
            self.end(sequence, Finish.LENGTH)

    # --- starting a step -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for pieces in self._one_a_device(self.scheduler.pieces(self._prompt_rows, PIECE)):
            size = next(size for size in self._pieces if size >= max(piece.count for piece in pieces))
            rows = [Row(piece.sequence, piece.first, piece.count, piece) for piece in pieces]
            self._launch(self._piece_shape(size, self.device.devices), rows)
        steps = self.scheduler.steps_at_once(STEPS_AT_ONCE) if len(self.scheduler.running) <= self._few else 1
        decoding = self._decoding(steps)
        if not decoding:
            return
        on_busiest = max(Counter(map(self.scheduler.device_of, decoding)).values())
        bucket = next(b for b in self._buckets if b >= on_busiest * self.device.devices)
        drafts = self.drafts and (self.rule is None or self.rule.pay(bucket))
        self._launch(self._shape(bucket, drafts), [Row(s, LAST, 2 if drafts else 1) for s in decoding], steps)

    def _decoding(self, steps: int = 1) -> list[Sequence]:
        """The sequences that decode in the next steps, with what limits their next tokens."""
        decoding = self.scheduler.decoding(self.settle, steps)
        for sequence in decoding:
            if constraint := sequence.params.constraint:
                mask_W = self._asked(sequence, constraint.mask)
                if mask_W is not None:
                    self.device.limit(sequence.slot, mask_W)
        return [s for s in decoding if s.finish is None]

    def _asked(self, sequence: Sequence, question: Callable, *arguments: Any) -> Any:
        """What a sequence's constraint answers; if it raises, the sequence ends, and no other."""
        try:
            return question(*arguments)
        except Exception as error:
            self.end(sequence, Finish.ERROR, error=f"its constraint raised {type(error).__name__}: {error}")

    def _one_a_device(self, pieces: list[Piece]) -> list[list[Piece]]:
        """Pieces for one program each: every device takes one at a time."""
        launches: list[list[Piece]] = []
        taken = Counter()
        for piece in pieces:
            device = self.scheduler.device_of(piece.sequence)
            if taken[device] == len(launches):
                launches.append([])
            launches[taken[device]].append(piece)
            taken[device] += 1
        return launches

    def _start_exact(self) -> None:
        rows = []
        for sequence in self._decoding():
            rows += [Row(sequence, place, 1) for place in ((LAST, DRAFT) if self.drafts else (LAST,))]
        free = max(-len(rows) % EXACT_ROWS, 0 if rows else EXACT_ROWS)
        for piece in self.scheduler.pieces(min(free, self._prompt_rows), EXACT_ROWS):
            rows += [Row(piece.sequence, place, 1, piece) for place in range(piece.first, piece.first + piece.count)]
        for i in range(0, len(rows), EXACT_ROWS):
            self._launch(self._exact_shape, rows[i : i + EXACT_ROWS])

    def _launch(self, shape: Shape, rows: list[Row], steps: int = 1) -> None:
        started = time.monotonic()
        arrays, places = self.device.rows(shape, [(r.sequence.slot, r.first, r.count, r.sequence.pages) for r in rows])
        chosen = None
        if shape.decodes:
            chosen = self.device.decode(shape, arrays, steps)
            logprobs = chosen.logprobs
        else:
            logprobs = self.device.fill(shape, arrays)
        for row in rows:
            if row.first == LAST:
                row.sequence.in_flight += steps
        self._flights.append(Flight(started, steps, chosen, logprobs, rows, [b * shape.length for b in places]))
        self._count(shape, rows, steps)

    def _count(self, shape: Shape, rows: list[Row], steps: int) -> None:
        live, computed = steps * sum(row.count for row in rows), steps * shape.sequences * shape.length
        counts, scheduler = self.counts, self.scheduler
        counts["rows_live"] += live
        counts["rows_computed"] += computed
        if shape.decodes:
            counts["steps"] += steps
            counts["decode_rows_live"] += live
            counts["decode_rows_computed"] += computed
            if scheduler.waiting:
                counts["slots_live_while_waiting"] += steps * len(scheduler.running)
                counts["slots_while_waiting"] += steps * scheduler.slots

    # --- the tokens of a step --------------------------------------------------------------------------------------------

    def _land(self) -> None:
        """Wait for the oldest steps in flight, and say what came of them."""
        flight = self._flights.popleft()
        logprobs = None
        if any(self._wants_logprobs(row) for row in flight.rows):
            logprobs = [np.asarray(a) for a in flight.logprobs]
            if flight.chosen is None:
                logprobs = [a[None] for a in logprobs]  # as if of one step
        if flight.chosen is not None:
            next_KN4 = np.asarray(flight.chosen.next_N4)[: flight.steps].tolist()
        drafted = right = 0
        for i, row in enumerate(flight.rows):
            if row.piece is not None:
                self._filled(row, flight.index[i], logprobs)
            elif row.first == LAST:
                slot = row.sequence.slot
                if slot == NOWHERE:  # it has ended since
                    continue
                found: list[tuple[int, Place]] = []
                for k, next_N4 in enumerate(next_KN4):
                    *tokens, count, had_draft = next_N4[slot]
                    drafted, right = drafted + had_draft, right + count - 1
                    found += [(token, (k, flight.index[i] + j)) for j, token in enumerate(tokens[:count])]
                row.sequence.in_flight -= flight.steps
                self._decoded(row.sequence, found, logprobs)
        if drafted:
            self.counts["drafts"] += drafted
            self.counts["drafts_accepted"] += right
            if self.rule:
                self.rule.saw(drafted, right)
        self.counts["busy_s"] += time.monotonic() - max(flight.started, self._idle_since)
        self._idle_since = time.monotonic()

    @staticmethod
    def _wants_logprobs(row: Row) -> bool:
        params = row.sequence.params
        return (params.logprobs if row.piece is None else params.prompt_logprobs) is not None

    def _filled(self, row: Row, index: int, logprobs: Any) -> None:
        sequence, wanted = row.sequence, row.sequence.params.prompt_logprobs
        if sequence.finish is not None:
            return
        if wanted is not None and not sequence.reported:
            if row.first == 0:
                sequence.prompt_logprobs = [None]
            for i in range(row.count):
                token = sequence.tokens[row.first + i + 1]
                sequence.prompt_logprobs.append(_logprob(logprobs, (0, index + i), token, wanted))
            if len(sequence.prompt_logprobs) >= sequence.prompt_length:
                del sequence.prompt_logprobs[sequence.prompt_length :]
                self._report(sequence)
        self._end_if_only_filled(sequence)

    def _decoded(self, sequence: Sequence, tokens: list[tuple[int, Place]], logprobs: Any) -> None:
        params, finish, taken, found = sequence.params, None, [], []
        for token, place in tokens:
            if token in params.end_ids:
                finish = Finish.STOP
                break
            taken.append(token)
            if params.logprobs is not None:
                found.append(_logprob(logprobs, place, token, params.logprobs))
            if params.constraint:
                self._asked(sequence, params.constraint.accept, token)
                if sequence.finish is not None:
                    return
            if len(sequence.tokens) + len(taken) == sequence.limit:
                finish = Finish.LENGTH
                break
        sequence.tokens += taken
        self.counts["output_tokens"] += len(taken)
        event = Event(tuple(taken), tuple(found))
        if finish:
            self.end(sequence, finish, event)
        elif taken:
            sequence.on_event(event)


def _logprob(logprobs: Any, place: Place, token: int, top: int) -> TokenLogprob:
    token_ST, top_STK, of_top_STK = logprobs
    alternatives = zip(top_STK[place][:top].tolist(), of_top_STK[place][:top].tolist(), strict=True)
    return TokenLogprob(token, float(token_ST[place]), tuple(alternatives))
