"""The model's arrays by the names that `hf_tensors` and checkpoints have for them."""

import jax
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import RouterBias
from dsv3_jax.model.transformer import Transformer


def array_names(state: nnx.State) -> dict[str, nnx.Variable]:
    """A model's variables by name, such as moe_blocks/attention/w_o_HUD."""
    flat = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): variable for path, variable in flat}


def abstract_arrays(config: ModelConfig) -> dict[str, nnx.Variable]:
    """Shapes of all arrays; allocates nothing."""
    return array_names(nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))))


def stored_name(name: str, variable: nnx.Variable) -> str:
    """An array's name among a checkpoint's weights (see checkpoint/manager.py)."""
    return f"{'router_bias' if isinstance(variable, RouterBias) else 'params'}/{name}/value"
