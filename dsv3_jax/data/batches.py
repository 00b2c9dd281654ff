"""Packed batches: documents shuffled per epoch, laid end to end, cut into windows, and the windows shuffled again (a
document's windows would otherwise fill entire batches); any window can be made from its index.

Window w covers tokens [w*L, w*L + L + ahead) of the epoch's stream: L inputs, and the tokens ahead that next-token and MTP
targets need (they are inputs of the next window, so that every token is a target exactly once). Because a window is a pure
function of (seed, index), the state of an iterator is one number, and a run can go on with any number of processes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np

from dsv3_jax.data.batch import Batch
from dsv3_jax.data.store import TokenStore
from dsv3_jax.errors import UserError


@dataclass(frozen=True)
class Epoch:
    """One pass over the documents in a given order."""

    order: np.ndarray  # i64[documents]
    begin: np.ndarray  # i64[documents + 1]: where each document of `order` begins in the stream


class PackedWindows:
    """Random-access source for grain: element i is a `Batch` of one row without that axis, i32[seq_len + ahead].

    Tokens of one document share a segment number, which differs from its neighbours'. With `shuffle` epochs follow each
    other without end; without, there is one pass in the store's order and the last window is padded with segment -1.
    """

    def __init__(self, store: TokenStore, seq_len: int, ahead: int, seed: int, shuffle: bool):
        self.store, self.seq_len, self.ahead, self.seed, self.shuffle = store, seq_len, ahead, seed, shuffle
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        if self.shuffle and self.windows_per_epoch == 0:
            raise UserError(
                f"data.seq_len={self.seq_len}: the training documents hold {len(self.store.tokens)} tokens, fewer than one "
                f"sequence of {self.seq_len + self.ahead}; use a shorter one or more data"
            )

    @property
    def windows_per_epoch(self) -> int:
        """How many windows one pass over the documents gives."""
        total = len(self.store.tokens)
        if self.shuffle:  # full windows only; the cut moves with every epoch's order
            return max((total - self.ahead) // self.seq_len, 0)
        return -(-(total - 1) // self.seq_len)  # every target once

    def __len__(self) -> int:
        return 2**62 if self.shuffle else self.windows_per_epoch

    def __getitem__(self, index: int) -> Batch:
        epoch, window = self._locate(index)
        tokens, segments = self._window(self._epoch(epoch), window)
        return Batch(tokens, segments)

    def _locate(self, index: int) -> tuple[int, int]:
        """Epoch and window of element `index`."""
        epoch, window = divmod(int(index), self.windows_per_epoch)
        if self.shuffle and self.windows_per_epoch > 1:
            seed = int(np.random.default_rng([self.seed, epoch]).integers(2**32))
            window = grain.experimental.index_shuffle(window, max_index=self.windows_per_epoch - 1, seed=seed, rounds=4)
        return epoch, window

    def _window(self, epoch: Epoch, window: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.seq_len + self.ahead
        start = window * self.seq_len
        tokens, segments = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        first = int(np.searchsorted(epoch.begin, start, side="right")) - 1
        filled, number = 0, 0
        for position in range(first, len(epoch.order)):
            document = epoch.order[position]
            skip = max(start - epoch.begin[position], 0)
            piece = self.store.tokens[self.store.offsets[document] + skip : self.store.offsets[document + 1]]
            piece = piece[: size - filled]
            tokens[filled : filled + len(piece)] = piece
            segments[filled : filled + len(piece)] = number
            filled, number = filled + len(piece), number + 1
            if filled == size:
                break
        return tokens, segments

    def _make_epoch(self, number: int) -> Epoch:
        count = len(self.store)
        order = np.random.default_rng([self.seed, number]).permutation(count) if self.shuffle else np.arange(count)
        lengths = np.diff(self.store.offsets)[order]
        return Epoch(order, np.concatenate([[0], np.cumsum(lengths)]))

    def document_ids(self, index: int) -> list[str]:
        """Names of the documents in window `index`, for error messages."""
        number, window = self._locate(index)
        epoch = self._epoch(number)
        start = window * self.seq_len
        first = int(np.searchsorted(epoch.begin, start, side="right")) - 1
        last = int(np.searchsorted(epoch.begin, start + self.seq_len + self.ahead, side="left"))
        return [self.store.ids[int(d)] for d in epoch.order[first:last]]


class _Rows:
    """Element i of a process's stream: row `rows[i % n]` of global batch i // n, n being the number of its rows."""

    def __init__(self, source: PackedWindows, batch_size: int, rows: Sequence[int]):
        self._source, self._batch_size, self._rows = source, batch_size, rows

    def __len__(self) -> int:
        return len(self._source) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        step, row = divmod(int(index), len(self._rows))
        return self._source[step * self._batch_size + self._rows[row]]


def train_batches(source: PackedWindows, batch_size: int, rows: Sequence[int]) -> grain.DatasetIterator:
    """The rows that this process's devices need of each global batch, in that order, without end.

    `get_state` and `set_state` save and restore the position exactly; it counts batches, whoever reads which rows.
    """
    dataset = grain.MapDataset.source(_Rows(source, batch_size, rows)).batch(len(rows))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))  # type: ignore[return-value]


def batch_windows(batch_size: int, step: int) -> range:
    """Window indices of the global batch that training step `step` (from 0) sees."""
    return range(step * batch_size, (step + 1) * batch_size)
