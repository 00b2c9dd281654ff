"""What an exchange of gradients owes (exchange/exchange.py), of a checkpoint that other replicas wrote, or none.

With as many replicas it is loaded as it is. Else all that R replicas owe becomes an equal part for each of the new ones, so
that the sum over them is the same; so does what servers owe where this mesh has none. What is owed to arrays that are not
compressed any more is dropped, such as everything where one replica is left: it is about what a step's gradients are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.exchange.compress import Errors

type Struct = jax.ShapeDtypeStruct

_ERRORS = "errors/"  # in flat names


class _Names(NamedTuple):
    worker: str
    server: str

    @classmethod
    def of(cls, parameter: str) -> "_Names":
        return cls(f"{_ERRORS}{parameter}/worker", f"{_ERRORS}{parameter}/server")


def as_stored(templates: dict[str, Any], stored: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What to load for these templates, by flat name, of a checkpoint with `stored` shapes: `by` makes of it what is wanted."""
    found = {name: leaf for name, leaf in templates.items() if not name.startswith(_ERRORS)}
    for name in filter(templates.__contains__, stored):
        parameter, _, field = name.removeprefix(_ERRORS).rpartition("/")
        if not name.startswith(_ERRORS) or field != "worker":
            continue
        names = _Names.of(parameter)
        wanted = Errors(templates[name], templates.get(names.server))
        if stored[name] == wanted.worker.shape and (names.server in stored) == (wanted.server is not None):
            found |= {n: templates[n] for n in names if n in templates}
        else:
            found |= {n: _near(wanted, stored[n]) for n in names if n in stored}
    return found


def _near(wanted: Errors[Struct], shape: tuple[int, ...]) -> Struct:
    """An array of `shape`, all replicas' or the servers', of those places that this device will owe for."""
    worker, server = wanted.worker.sharding, wanted.server and wanted.server.sharding
    assert isinstance(worker, NamedSharding)
    places = server.spec if isinstance(server, NamedSharding) else worker.spec[1:]
    whole = [None] * (len(shape) - wanted.worker.ndim + 1)
    return jax.ShapeDtypeStruct(shape, wanted.worker.dtype, sharding=NamedSharding(worker.mesh, P(*whole, *places)))


def by(wanted: dict[str, Errors[Struct]], loaded: dict[str, Any]) -> dict[str, jax.Array]:
    """Errors by flat name, of those that were loaded; what was not there is nothing."""
    found = {}
    for parameter, errors in wanted.items():
        names = _Names.of(parameter)
        if names.worker not in loaded:
            pair = _nothing(errors)
        else:
            pair = Errors(loaded[names.worker], loaded.get(names.server))
            same = jax.tree.map(jnp.shape, pair) == jax.tree.map(jnp.shape, errors)
            pair = pair if same else _folded(pair, errors)
        found |= dict(zip(names, pair, strict=True))
    return found


def _shardings(errors: Errors[Struct]) -> Errors[Any]:
    return jax.tree.map(lambda a: a.sharding, errors)


def _nothing(wanted: Errors[Struct]) -> Errors[jax.Array]:
    zeros = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), wanted), out_shardings=_shardings(wanted))
    return zeros()


def _folded(stored: Errors[jax.Array], wanted: Errors[Struct]) -> Errors[jax.Array]:
    """With fewer replicas each has a larger part of a batch, and its gradients, and what it owes, are as much larger."""
    before, after = stored.worker.shape[0], wanted.worker.shape[0]

    def fold(stored: Errors[jax.Array]) -> Errors[jax.Array]:
        each, server = stored.worker.sum(0, keepdims=True) / after, stored.server
        server = jnp.zeros(each.shape[1:], each.dtype) if server is None else server * (before / after)
        if wanted.server is None:
            each, server = each + server, None
        return Errors(jnp.broadcast_to(each, wanted.worker.shape), server)

    return jax.jit(fold, out_shardings=_shardings(wanted))(stored)
