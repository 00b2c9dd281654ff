"""Parameters: every array is declared once, with its shape, logical axes and what has to be known about it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class Kind:
    """What the rest of the package has to know about a parameter besides its logical axes."""

    component: str  # that it counts as: see counts.py
    float32: bool = False  # computed with in float32 whatever the activations' dtype
    decays: bool = True  # takes part in weight decay
    compressible: bool = True  # gradients may cross `data` in few bits


ATTENTION = Kind("attention")
DENSE_FFN = Kind("dense ffn")
SHARED_EXPERTS = Kind("shared experts")
ROUTED_EXPERTS = Kind("routed experts")
ROUTER = Kind("router", float32=True, compressible=False)
HEAD = Kind("head")
PROJECTION = Kind("projection")  # of an MTP module
# Most rows of the embedding's gradient are zero, and 2 bits have no zero: what they make of such rows, Adam takes for a
# direction.
EMBEDDING = Kind("embedding", compressible=False)


def vector(component: str) -> Kind:
    """The kind of norm scales and biases."""
    return Kind(component, float32=True, decays=False, compressible=False)


NORM = vector("norms")


class RouterBias(nnx.Variable):
    """The balancing bias of a router: state that the router updates by load, outside the gradient."""


def weight(rngs: nnx.Rngs, std: float, kind: Kind, **axes: int) -> nnx.Param:
    """A normal(0, std) float32 matrix; `axes` maps logical axis names to sizes, in order."""
    value = std * jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32)
    return nnx.Param(value, logical_axes=tuple(axes), kind=kind)


def constant(fill: float, kind: Kind, **axes: int) -> nnx.Param:
    """A float32 vector: a norm's scale or a bias."""
    return nnx.Param(jnp.full(tuple(axes.values()), fill, jnp.float32), logical_axes=tuple(axes), kind=kind)


def kind_of(parameter: nnx.Variable) -> Kind:
    return parameter.get_metadata("kind")


def is_float32(variable: nnx.Variable) -> bool:
    """Whether a variable is computed with in float32 whatever the activations' dtype: what is no parameter always is."""
    return not isinstance(variable, nnx.Param) or kind_of(variable).float32
