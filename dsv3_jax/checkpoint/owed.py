"""What an exchange of gradients owes (parallel/exchange.py), of a checkpoint that other replicas wrote, or none.

With as many replicas it is loaded as it is. Else all that R replicas owe becomes an equal part for each of the new ones, so
that the sum over them is the same; what is owed to arrays that are not compressed any more is dropped, such as everything
where one replica is left: it is about what a step's gradients are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.optim.compress import Errors

type Struct = jax.ShapeDtypeStruct

_ERRORS = "errors/"  # in flat names


def _names(parameter: str) -> Errors[str]:
    return Errors(f"{_ERRORS}{parameter}/worker", f"{_ERRORS}{parameter}/server")


def as_stored(templates: dict[str, Any], stored: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What to load for these templates, by flat name, of a checkpoint with `stored` shapes: `by` makes of it what is wanted."""
    found = {name: leaf for name, leaf in templates.items() if not name.startswith(_ERRORS)}
    for name in templates.keys() - found.keys():
        parameter, _, field = name.removeprefix(_ERRORS).rpartition("/")
        names = _names(parameter)
        if names.worker not in stored:
            continue
        replicas, server = stored[names.worker][0], templates[names.server]
        other = field == "worker" and replicas != templates[name].shape[0]
        found[name] = _of_replicas(server, replicas) if other else templates[name]
    return found


def _of_replicas(server: Struct, replicas: int) -> Struct:
    """All replicas' errors, of those places that this device's server has."""
    assert isinstance(server.sharding, NamedSharding)
    sharding = NamedSharding(server.sharding.mesh, P(None, *server.sharding.spec))
    return jax.ShapeDtypeStruct((replicas, *server.shape), server.dtype, sharding=sharding)


def by(wanted: dict[str, Errors[Struct]], loaded: dict[str, Any]) -> dict[str, jax.Array]:
    """Errors by flat name, of those that were loaded; what was not there is nothing."""
    found = {}
    for parameter, errors in wanted.items():
        names = _names(parameter)
        if names.worker not in loaded:
            pair = _nothing(errors)
        else:
            pair = Errors(*(loaded[name] for name in names))
            pair = pair if pair.worker.shape == errors.worker.shape else _folded(pair, errors)
        found |= dict(zip(names, pair, strict=True))
    return found


def _shardings(errors: Errors[Struct]) -> Errors[Any]:
    return Errors(errors.worker.sharding, errors.server.sharding)


def _nothing(wanted: Errors[Struct]) -> Errors[jax.Array]:
    zeros = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), wanted), out_shardings=_shardings(wanted))
    return zeros()


def _folded(stored: Errors[jax.Array], wanted: Errors[Struct]) -> Errors[jax.Array]:
    """With fewer replicas each has a larger part of a batch, and its gradients, and what it owes, are as much larger."""
    before, after = stored.worker.shape[0], wanted.worker.shape[0]

    def fold(stored: Errors[jax.Array]) -> Errors[jax.Array]:
        each = stored.worker.sum(0, keepdims=True) / after
        return Errors(jnp.broadcast_to(each, wanted.worker.shape), stored.server * (before / after))

    return jax.jit(fold, out_shardings=_shardings(wanted))(stored)
