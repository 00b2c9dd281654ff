"""What compression did to a model, measured on text that it did not see, before the checkpoint is there for anybody."""

import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from dsv3_jax.checkpoint.load import Checkpoint
from dsv3_jax.checkpoint.storage import load_weights, read_metadata
from dsv3_jax.compression.measure import compare, measuring_batches
from dsv3_jax.config import Config, ModelConfig, ParallelConfig, PrecisionConfig
from dsv3_jax.data.batch import Batch
from dsv3_jax.errors import UserError
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.progress import human
from dsv3_jax.state.train_state import abstract_state, serving_graph

_ROWS = 4  # windows that are measured together
_MOST = 0.8  # of a device's memory, for the weights of both models


@dataclass(frozen=True)
class MeasureConfig:
    """The text on which a compressed model is measured beside the original."""

    path: str | None = None  # as data.path, text that calibration does not see; null: the documents that the run held out
    tokens: int = 16_384  # at most; windows of data.seq_len; 0: nothing is measured


def held_out_batches(checkpoint: Checkpoint, config: MeasureConfig) -> list[Batch] | str:
    """The batches to measure on, or why nothing is measured, in a line.

    Raises `UserError` if `config.path` cannot be read.
    """
    if config.tokens == 0:
        return "measure.tokens=0"
    models = 2 * 4 * parameters(checkpoint.config.model)
    memory = device_memory()
    if models > _MOST * memory:
        return (
            f"the float32 weights of both models ({human(models, 'B')}) do not fit the device's {human(memory, 'B')}; "
            "measure exports with a client that shards"
        )
    if config.path is None and not read_metadata(checkpoint.path).get("corpus"):
        return "the checkpoint was not trained here, so that no text is held out; give measure.path"
    try:
        store = checkpoint.corpus().validation if config.path is None else checkpoint.read_text(config.path)
    except UserError as error:
        if config.path is not None:
            raise
        return f"the documents that the run held out cannot be read: {error}"
    seq_len, depth = checkpoint.config.data.seq_len, checkpoint.config.model.num_nextn_predict_layers
    wanted = -(-config.tokens // (seq_len * _ROWS))
    return list(itertools.islice(measuring_batches(store, seq_len, depth, _ROWS), wanted))


def parameters(config: ModelConfig) -> int:
    """How many numbers a model's weights are."""
    return sum(variable.get_value().size for variable in abstract_variables(config).values())


def device_memory() -> int:
    """Bytes of the first device's memory; of a CPU the host's."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measured(original: Checkpoint, compressed: Path, config: Config, batches: list[Batch]) -> dict[str, Any]:
    """The figures of `measure.Comparison`, of both models on one device and in float32, in which no rounding of activations
    hides what the weights did.

    Args:
        original: Before compression.
        compressed: A directory with the weights of the compressed model, which need not be complete as a checkpoint.
        config: The compressed model's.
        batches: From `held_out_batches`.
    """
    models = _model(original.path, original.config), _model(compressed, config)
    return compare(models[0], {"compressed": models[1]}, batches)["compressed"].figures()


def _model(directory: Path, config: Config) -> Transformer:
    config = replace(config, parallel=ParallelConfig(), precision=PrecisionConfig())
    layout = layout_for(config)
    state = abstract_state(config, layout)
    weights = load_weights(directory, state.params, state.router_bias)
    return nnx.merge(serving_graph(config, layout), *weights)
