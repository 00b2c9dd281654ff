"""The text that compression looks at: windows of a run's own training documents, or of other text."""

from dataclasses import dataclass

from dsv3_jax.checkpoint.load import Checkpoint
from dsv3_jax.data.batch import Batch, stack
from dsv3_jax.data.batches import PackedWindows


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
    store = checkpoint.corpus().train if config.path is None else checkpoint.read_text(config.path)
    source = PackedWindows(store, seq_len, ahead=1 + depth, seed=config.seed, shuffle=True)
    wanted = min(-(-config.tokens // seq_len), source.windows_per_epoch)
    # a full number of batches, so that one program serves all of them
    wanted = max(wanted // config.batch * config.batch, min(wanted, config.batch))
    return stack([source[i] for i in range(wanted)])


def batches(windows: Batch, size: int) -> list[slice]:
    """The windows, `size` at a time."""
    return [slice(i, min(i + size, windows.rows)) for i in range(0, windows.rows, size)]
