"""What training carries from step to step, and how it is made."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsv3_jax.config import Config
from dsv3_jax.model.layers import RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.optim.adamw import adamw


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


DTYPES = {"float32": jnp.dtype("float32"), "bf16": jnp.dtype("bfloat16")}


def make_model(config: Config, rngs: nnx.Rngs) -> Transformer:
    return Transformer(config.model, dtype=DTYPES[config.precision.recipe], remat=config.remat.policy, rngs=rngs)


def abstract_model(config: Config) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Graph definition, and the shapes of parameters and router biases; allocates nothing."""
    model = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0)))
    graph, params, router_bias = nnx.split(model, nnx.Param, RouterBias)
    return graph, params, router_bias


def init_state(config: Config) -> TrainState:
    """A fresh state from `train.seed`; jit or eval_shape it."""
    _, params, router_bias = nnx.split(make_model(config, nnx.Rngs(config.train.seed)), nnx.Param, RouterBias)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        router_bias=router_bias,
        opt_state=adamw(config.optim).init(params),
        ema=jax.tree.map(jnp.copy, params) if config.optim.ema_decay else None,
    )
