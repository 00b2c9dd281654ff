"""The shapes of a model's arrays, by the names that `hf_tensors` has for them."""

from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.transformer import Transformer


def abstract_variables(config: ModelConfig) -> dict[str, nnx.Variable]:
    """A model's variables by name, with shapes instead of arrays; allocates nothing."""
    return variables_by_name(nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))))
