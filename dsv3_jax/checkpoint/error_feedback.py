"""The residuals of an exchange of gradients (exchange/residual.py) in checkpoints, written by any number of replicas.

With as many replicas they are loaded as they are; else they are refitted. Residuals of arrays that are not compressed any more
are dropped, such as all where one replica is left: they are about what a step's gradients are.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.checkpoint.names import RESIDUALS
from dsv3_jax.exchange.residual import Residual, refit_residual

type Struct = jax.ShapeDtypeStruct

_PREFIX = f"{RESIDUALS}/"  # of flat names


class _Names(NamedTuple):
    """The flat names of a residual's fields."""

    worker: str
    server: str

    @classmethod
    def of(cls, parameter: str) -> "_Names":
        return cls(*(f"{_PREFIX}{parameter}/{field}" for field in Residual._fields))


def templates_as_stored(templates: dict[str, Any], stored: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What to load of a checkpoint, for `refit_loaded` to turn into what is wanted.

    Args:
        templates: abstract arrays with shardings, by flat name.
        stored: shapes in the checkpoint, by flat name.

    Returns: `templates` with residuals in the shapes that are stored, without those that are not stored.
    """
    found = {name: leaf for name, leaf in templates.items() if not name.startswith(_PREFIX)}
    for name in filter(templates.__contains__, stored):
        parameter, _, field = name.removeprefix(_PREFIX).rpartition("/")
        if not name.startswith(_PREFIX) or field != "worker":
            continue
        names = _Names.of(parameter)
        wanted = Residual(templates[name], templates.get(names.server))
        if stored[name] == wanted.worker.shape and (names.server in stored) == (wanted.server is not None):
            found |= {n: templates[n] for n in names if n in templates}
        else:
            found |= {n: _sharded_like(wanted, stored[n]) for n in names if n in stored}
    return found


def _sharded_like(wanted: Residual[Struct], shape: tuple[int, ...]) -> Struct:
    """A stored array of `shape`, all replicas' or the servers', sharded so that each device reads the elements it will keep."""
    worker, server = wanted.worker.sharding, wanted.server and wanted.server.sharding
    assert isinstance(worker, NamedSharding)
    axes = server.spec if isinstance(server, NamedSharding) else worker.spec[1:]
    unsharded = [None] * (len(shape) - wanted.worker.ndim + 1)
    return jax.ShapeDtypeStruct(shape, wanted.worker.dtype, sharding=NamedSharding(worker.mesh, P(*unsharded, *axes)))


def refit_loaded(wanted: dict[str, Residual[Struct]], loaded: dict[str, Any]) -> dict[str, jax.Array]:
    """Residuals by flat name, refitted to `wanted` (by parameter); those that were not loaded are zero."""
    found = {}
    for parameter, template in wanted.items():
        names = _Names.of(parameter)
        stored = Residual(loaded[names.worker], loaded.get(names.server)) if names.worker in loaded else None
        found |= dict(zip(names, refit_residual(stored, template), strict=True))
    return found
