"""The text that compression looks at: windows of a run's own training documents, or of other text."""

import functools
import sys
from dataclasses import dataclass, replace

import numpy as np

from dsv3_jax.checkpoint.load import Checkpoint
from dsv3_jax.data.batch import Batch, stack
from dsv3_jax.data.batches import PackedWindows
from dsv3_jax.data.store import TokenStore, load_corpus, read_documents
from dsv3_jax.errors import UserError


@dataclass(frozen=True)
class CalibrationConfig:
    """What compression looks at."""

    path: str | None = None  # as data.path; null: the documents that the run was trained on
    tokens: int = 65_536  # at most; windows of data.seq_len
    batch: int = 4  # windows that go through a layer together
    seed: int = 0  # of their choice


def calibration_windows(checkpoint: Checkpoint, config: CalibrationConfig) -> Batch:
    """i32[W, L + 1 + depth] windows of documents laid end to end, `depth` being the number of MTP modules.

    Raises `UserError` if there is no tokenizer, no text, or less than one window.
    """
    seq_len, depth = checkpoint.config.data.seq_len, checkpoint.config.model.num_nextn_predict_layers
    store = _documents(checkpoint, config)
    source = PackedWindows(store, seq_len, ahead=1 + depth, seed=config.seed, shuffle=True)
    wanted = min(-(-config.tokens // seq_len), source.windows_per_epoch)
    # a full number of batches, so that one program serves all of them
    wanted = max(wanted // config.batch * config.batch, min(wanted, config.batch))
    return stack([source[i] for i in range(wanted)])


def _documents(checkpoint: Checkpoint, config: CalibrationConfig) -> TokenStore:
    own = checkpoint.config.data
    if config.path is None:
        data = replace(own, tokenizer=str(checkpoint.need_tokenizer_file()))
        return load_corpus(data, checkpoint.config.model.vocab_size, companions=checkpoint.companions()).train
    report = functools.partial(print, file=sys.stderr, flush=True)
    return read_documents(replace(own, path=config.path), checkpoint.tokenizer(), report, checkpoint.special_tokens())


def batches(windows: Batch, size: int) -> list[slice]:
    """The windows, `size` at a time."""
    rows = windows.rows
    if rows == 0:
        raise UserError("calibration.tokens: no window of text to calibrate with")
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def real_tokens(windows: Batch, depth: int) -> np.ndarray:
    """bool[W, L]: what is no padding."""
    return np.asarray(windows.inputs(depth).segments) >= 0
