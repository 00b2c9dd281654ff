"""Starting a run with the weights of another run or of an imported checkpoint: `train.init_from`."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from dsv3_jax.checkpoint.load import Checkpoint, open_checkpoint, resolve
from dsv3_jax.checkpoint.storage import load_weights
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


def with_initial_tokenizer(config: Config) -> Config:
    """The configuration with the tokenizer of `train.init_from`, unless `data.tokenizer` names one.

    Raises `UserError` if `train.init_from` has another model, or no tokenizer where none is named.
    """
    if config.train.init_from is None:
        return config
    found = open_checkpoint(config.train.init_from)
    _check_same_model(config, found)
    if config.data.tokenizer is not None:
        return config
    file = found.tokenizer_file()
    if file is None:
        raise UserError(f"train.init_from={config.train.init_from} has no tokenizer.json; set data.tokenizer")
    return replace(config, data=replace(config.data, tokenizer=str(file)))


def initial_companions(config: Config) -> Companions:
    """The files that a fresh run keeps: those beside its tokenizer, and those of `train.init_from`.

    Those of `train.init_from` that are about its tokenizer stay behind where the run has another one. `config` is that of
    `with_initial_tokenizer`.
    """
    file = config.data.tokenizer
    there = {} if file is None else about_text(beside(file))
    if config.train.init_from is None:
        return there
    found = Checkpoint(resolve(config.train.init_from), config)
    own, its = found.tokenizer_file(), found.companions()
    if file is not None and own is not None and own != Path(file):
        size = config.model.vocab_size
        if load_tokenizer(own, size).get_vocab() != load_tokenizer(file, size).get_vocab():
            its = about_weights(its)
    return merged(its, there)


def with_initial_weights(config: Config, layout: Layout, state: TrainState, init_from: str) -> TrainState:
    """A fresh state with the weights of a checkpoint, which any mesh may have written."""
    template = abstract_state(config, layout)
    params, router_bias = load_weights(open_checkpoint(init_from).path, template.params, template.router_bias)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return replace(state, params=params, router_bias=router_bias, ema=ema)
