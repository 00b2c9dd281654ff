"""Loading a trained model from a run or a checkpoint, with its tokenizer."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from flax import nnx
from tokenizers import Tokenizer

from dsv3_jax.checkpoint.manager import load_weights, read_metadata, resolve
from dsv3_jax.checkpoint.manifest import verify
from dsv3_jax.cluster.processes import on_first
from dsv3_jax.config import Config, ParallelConfig, config_from_dict
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.state.train_state import abstract_state, serving_graph


@dataclass(frozen=True)
class Checkpoint:
    """A whole, undamaged checkpoint's place and config."""

    path: Path
    config: Config

    def tokenizer_file(self) -> Path | None:
        """tokenizer.json: the run's, two levels above a checkpoint, or in an imported checkpoint itself."""
        found = (parent / "tokenizer.json" for parent in (self.path, *self.path.parents[:2]))
        return next((file for file in found if file.is_file()), None)

    def tokenizer(self) -> Tokenizer:
        """Raises `UserError` if there is none."""
        file = self.tokenizer_file()
        if file is None:
            raise UserError(f"no tokenizer.json in {self.path} or above it; a checkpoint needs its run's one")
        return load_tokenizer(file, self.config.model.vocab_size)


@dataclass(frozen=True)
class Loaded(Checkpoint):
    model: Transformer


@dataclass(frozen=True)
class LoadedWeights(Checkpoint):
    """Weights on a mesh, for `train.step.make_eval_step`."""

    layout: Layout
    params: nnx.State
    router_bias: nnx.State


def open_checkpoint(run_or_checkpoint: str | Path) -> Checkpoint:
    """Raises `UserError` if there is no whole, undamaged checkpoint of this project at the path."""
    path = resolve(run_or_checkpoint)
    on_first(lambda: verify(path))
    config = config_from_dict(read_metadata(path)["config"], str(path))
    if (path / "tokenizer.json").is_file():  # imported: text is read by what came with it
        config = replace(config, data=replace(config.data, tokenizer=str(path / "tokenizer.json")))
    return Checkpoint(path, config)


def load_for_evaluation(run_or_checkpoint: str | Path) -> LoadedWeights:
    """The weights on the run's mesh, or on one device where there are too few for it. Raises as `open_checkpoint`."""
    found = open_checkpoint(run_or_checkpoint)
    config = found.config
    needed = math.prod(abs(getattr(config.parallel, axis)) for axis in AXES)
    if needed > len(jax.devices()) and jax.process_count() == 1:
        config = replace(config, parallel=ParallelConfig())
    layout = layout_for(config)
    state = abstract_state(config, layout)
    return LoadedWeights(found.path, config, layout, *load_weights(found.path, state.params, state.router_bias))


def load_with_config(run_or_checkpoint: str | Path) -> Loaded:
    """The model where `load_for_evaluation` puts its weights. Raises as `open_checkpoint`."""
    loaded = load_for_evaluation(run_or_checkpoint)
    model = nnx.merge(serving_graph(loaded.config, loaded.layout), loaded.params, loaded.router_bias)
    return Loaded(loaded.path, loaded.config, model)


def load(run_or_checkpoint: str | Path) -> Transformer:
    """The model of a run (its latest checkpoint) or of one checkpoint, on the run's mesh if there are the devices for it."""
    return load_with_config(run_or_checkpoint).model
