"""What training carries from step to step, and how it is made."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsv3_jax.config import Config
from dsv3_jax.exchange.exchange import Exchange
from dsv3_jax.exchange.residual import Residual
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.parameters import RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.optim.registry import optimizer_of
from dsv3_jax.parallel.rules import is_variable
from dsv3_jax.precision import controller
from dsv3_jax.precision.recipes import Recipe, recipe_of, unquantised
from dsv3_jax.precision.switch import EightBit, Probe


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything a step reads and writes; a pytree of arrays.

    Nothing in a step draws random numbers: initial weights and document order are functions of `train.seed` (and the
    data's position), which the checkpoint keeps beside this.
    """

    step: jax.Array  # i32[]: steps done
    params: nnx.State  # float32 master weights
    router_bias: nnx.State  # f32[layers, E]
    opt_state: optax.OptState
    ema: nnx.State | None  # moving average of params, or None
    controller: dict[str, controller.Memory]  # what the precision controller remembers of each layer; empty without it
    residuals: dict[str, Residual] = field(default_factory=dict)  # of compressed gradients, by parameter: see exchange/


ONE_DEVICE = Layout()


def make_model(config: Config, recipe: Recipe, rngs: nnx.Rngs, layout: Layout = ONE_DEVICE) -> Transformer:
    return Transformer(config.model, recipe=recipe, remat=config.remat.policy, layout=layout, rngs=rngs)


class AbstractModel(NamedTuple):
    """A model's graph definition, and the shapes of its variables of each kind."""

    graph: nnx.GraphDef
    params: nnx.State
    router_bias: nnx.State
    eight_bit: nnx.State
    probes: nnx.State


def abstract_model(config: Config, recipe: Recipe, layout: Layout = ONE_DEVICE) -> AbstractModel:
    """The model as `nnx.split` gives it, without arrays: allocates nothing."""
    model = nnx.eval_shape(lambda: make_model(config, recipe, nnx.Rngs(0), layout))
    return AbstractModel(*nnx.split(model, nnx.Param, RouterBias, EightBit, Probe))


def serving_graph(config: Config, layout: Layout) -> nnx.GraphDef:
    """The model that decodes with parameters stored for training with `layout`: in 16 or 32 bits, for any batch."""
    recipe = unquantised(recipe_of(config.precision))
    model = nnx.eval_shape(lambda: Transformer(config.model, recipe=recipe, layout=layout.serving, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param, RouterBias)[0]


def init_state(config: Config, layout: Layout = ONE_DEVICE) -> TrainState:
    """A fresh state, a pure function of `train.seed`: the same on any mesh, but for the residuals, which are zero."""
    model = make_model(config, recipe_of(config.precision), nnx.Rngs(config.train.seed))
    _, params, router_bias, eight_bit, _ = nnx.split(model, nnx.Param, RouterBias, EightBit, Probe)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        router_bias=router_bias,
        opt_state=optimizer_of(config).init(params),
        ema=jax.tree.map(jnp.copy, params) if config.optim.ema_decay else None,
        controller=controller.init(eight_bit),
        residuals=Exchange(layout, config.parallel.compress).init(params),
    )


def abstract_state(config: Config, layout: Layout = ONE_DEVICE) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing."""
    state = jax.eval_shape(functools.partial(init_state, config, layout))
    residuals = Exchange(layout, config.parallel.compress).shardings(state.params)
    shardings = replace(_shardings(layout, state), residuals=residuals)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def _shardings(layout: Layout, state: TrainState) -> TrainState:
    """Parameters, and arrays of the optimizer beside them, as the layout stores them; the rest replicated."""

    def of(leaf):
        sharding = layout.sharding(layout.stored_spec(leaf)) if is_variable(leaf) else layout.replicated
        return jax.tree.map(lambda _: sharding, leaf)

    return jax.tree.map(of, state, is_leaf=is_variable)


def init_program(config: Config, layout: Layout = ONE_DEVICE) -> Callable[[], TrainState]:
    """`init_state`, jitted, with its results where the layout wants them."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, layout))
    return jax.jit(functools.partial(init_state, config, layout), out_shardings=shardings)


def new_state(config: Config, layout: Layout = ONE_DEVICE) -> TrainState:
    """A fresh state where the layout wants it."""
    return init_program(config, layout)()
