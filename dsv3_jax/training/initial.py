"""Starting a run with the weights of another run or of an imported checkpoint: `train.init_from`."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.checkpoint.load import Checkpoint, open_checkpoint
from dsv3_jax.checkpoint.storage import load_weights, read_metadata
from dsv3_jax.config import Config
from dsv3_jax.data.companions import Companions, about_text, about_weights, beside, merged
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model.layout import Layout
from dsv3_jax.state.train_state import TrainState, abstract_state


def _check_same_model(config: Config, found: Checkpoint) -> None:
    for field in dataclasses.fields(config.model):
        ours, theirs = getattr(config.model, field.name), getattr(found.config.model, field.name)
        if ours != theirs and field.name != "initializer_range":
            raise UserError(f"model.{field.name}={ours!r}, and train.init_from={config.train.init_from} has {theirs!r}")


def open_initial(config: Config) -> Checkpoint | None:
    """The checkpoint that `train.init_from` names, verified; None if it names none. Only a fresh start needs it.

    Raises `UserError` if it has another model, or no tokenizer where `data.tokenizer` names none.
    """
    if config.train.init_from is None:
        return None
    found = open_checkpoint(config.train.init_from)
    _check_same_model(config, found)
    if config.data.tokenizer is None and found.tokenizer_file() is None:
        raise UserError(f"train.init_from={config.train.init_from} has no tokenizer.json; set data.tokenizer")
    return found


def initial_companions(config: Config, initial: Checkpoint | None) -> Companions:
    """The files that a fresh run keeps: those beside its tokenizer, and those of `initial`, what `open_initial` gave.

    Those of `initial` that are about its tokenizer stay behind where the run has another one.
    """
    if initial is None:
        return {} if config.data.tokenizer is None else about_text(beside(config.data.tokenizer))
    own, its = initial.tokenizer_file(), initial.companions()
    file = config.data.tokenizer or own
    if file is not None and own is not None and own != Path(file):
        size = config.model.vocab_size
        if load_tokenizer(own, size).get_vocab() != load_tokenizer(file, size).get_vocab():
            its = about_weights(its)
    return its if file is None else merged(its, about_text(beside(str(file))))


def initial_layout(initial: Checkpoint | None) -> dict[str, Any] | None:
    """The dtypes that an import's tensors came in, which a run that begins with it keeps for its exports; None if unknown."""
    return None if initial is None else read_metadata(initial.path).get("hf_layout")


def with_initial_weights(config: Config, layout: Layout, state: TrainState, initial: Checkpoint) -> TrainState:
    """A fresh state with the weights of a checkpoint, which any mesh may have written."""
    template = abstract_state(config, layout)
    params, router_bias = load_weights(initial.path, template.params, template.router_bias)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return replace(state, params=params, router_bias=router_bias, ema=ema)
