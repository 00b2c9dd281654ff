"""What a checkpoint holds: which arrays, in which of its sets, under which names. Checkpoints on disk depend on these."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flax import nnx

from dsv3_jax.model.names import leaves_by_name, tree_from_names
from dsv3_jax.model.parameters import RouterBias
from dsv3_jax.state.train_state import TrainState

WEIGHTS = "weights"  # the set of arrays that a model needs, which all checkpoints have
OPTIMIZER = "optimizer"
EMA = "ema"  # only where a moving average is kept
RESIDUALS = "errors"  # in OPTIMIZER: `TrainState.residuals`, under the name that the first checkpoints gave them

type Arrays = dict[str, dict[str, Any]]  # {set: {name within it: array, or a template of one}}


def weight_name(variable_name: str, variable: nnx.Variable) -> str:
    """A model's variable's name in the set WEIGHTS."""
    return f"{'router_bias' if isinstance(variable, RouterBias) else 'params'}/{variable_name}/value"


def _weights(params: Any, router_bias: Any) -> dict[str, Any]:
    return {"params": params, "router_bias": router_bias}


def _sets(state: TrainState) -> dict[str, dict[str, Any]]:
    sets = {
        WEIGHTS: _weights(state.params, state.router_bias),
        OPTIMIZER: {
            "step": state.step, "opt_state": state.opt_state, "controller": state.controller, RESIDUALS: state.residuals,
        },
    }  # fmt: skip
    return sets if state.ema is None else sets | {EMA: {"ema": state.ema}}


def state_to_arrays(state: TrainState) -> Arrays:
    """All leaves of a state, or of the templates in its place."""
    return {name: leaves_by_name(tree) for name, tree in _sets(state).items()}


def state_from_arrays(template: TrainState, arrays: Mapping[str, Mapping[str, Any]]) -> TrainState:
    """The inverse of `state_to_arrays`: a state with the structure of `template`."""
    fields: dict[str, Any] = {}
    for name, tree in _sets(template).items():
        fields |= tree_from_names(tree, arrays[name])
    fields["residuals"] = fields.pop(RESIDUALS)
    return replace(template, **fields)


def weights_to_arrays(params: Any, router_bias: Any) -> Arrays:
    """The set WEIGHTS alone."""
    return {WEIGHTS: leaves_by_name(_weights(params, router_bias))}


def weights_from_arrays(params: Any, router_bias: Any, arrays: Mapping[str, Mapping[str, Any]]) -> tuple[Any, Any]:
    """The inverse of `weights_to_arrays`, with the structures of the given templates."""
    tree = tree_from_names(_weights(params, router_bias), arrays[WEIGHTS])
    return tree["params"], tree["router_bias"]


def joined(arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{set/name: array}."""
    return {f"{group}/{name}": leaf for group, leaves in arrays.items() for name, leaf in leaves.items()}
