"""Implementations of operations by name, and what `auto` takes. A name means the same in every operation:

* `reference`: the definition, for reading and for tests;
* `xla`: plain JAX, which runs on every platform and which XLA partitions over a mesh;
* `tpu`, `hopper`: kernels for TPUs (Mosaic) and for NVIDIA GPUs of compute capability 9.x (Mosaic GPU). They take one device's
  arrays, so on a mesh they are called inside `shard_map`;
* `cpu`: a kernel in C++, built when it is first used;
* another name: what a plug-in registered under it;
* `auto`: on a TPU `tpu`, on a Hopper GPU `hopper` and on a CPU `cpu`, where the operation has it and it takes these arguments,
  else `xla`; of a kernel that cannot be built it warns, once.
  The platform is the one that the program is lowered for, so that a program compiled on a machine without an accelerator is
  right; which GPU it is, the mesh in context says, or the process's own device.

Only `auto` falls back. Whoever names an implementation gets it, or an error: `Unavailable` says what it does not take, and JAX
itself refuses to lower a kernel for a platform that it is not for.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels import devices
from pallas_kernels.errors import NotBuilt, Unavailable

# what a platform's plug-in brings: products in 8 bits, attention and the head in 16, routed experts in 16 or 32
EIGHT_BIT = (
    "quantize", "quantize_transposed", "swiglu_quantize", "swiglu_backward", "scaled_matmul", "grouped_scaled_matmul",
    "grouped_scaled_wgrad",
)  # fmt: skip
CORE = ("causal_attention", "logit_statistics")
EXPERTS = ("grouped_swiglu",)
GRADIENTS = ("pack_codes", "mean_of_codes")
INTEGER = ("integer_linear", "integer_experts")
OPERATIONS = (*EIGHT_BIT, *CORE, *EXPERTS, *GRADIENTS, *INTEGER)
PLAIN = ("reference", "xla")  # plain JAX, which XLA partitions

# operation -> name -> function with the arguments of the operation's api, without `implementation`
_IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {operation: {} for operation in OPERATIONS}


def register(operation: str, name: str, function: Callable) -> None:
    """Let `implementation=name` of an operation run `function`, which takes the arguments of the operation's api.

    A function for which a caller may set `interpret` takes that last. It raises `Unavailable` for arguments that it does not
    take. Raises `ValueError` for an operation that there is none of, and for the name "auto".
    """
    if operation not in _IMPLEMENTATIONS:
        raise ValueError(f"no operation {operation!r} to register for; use one of {', '.join(_IMPLEMENTATIONS)}")
    if name == "auto":
        raise ValueError(f"{operation}: 'auto' chooses among implementations and is no name for one")
    _IMPLEMENTATIONS[operation][name] = function


def implementations(operation: str) -> tuple[str, ...]:
    """Names that are registered for an operation."""
    return tuple(_IMPLEMENTATIONS[operation])


def registered() -> list[Callable]:
    """Every function that is registered, whichever operation and name it is for."""
    return [function for found in _IMPLEMENTATIONS.values() for function in found.values()]


def missing(operations: tuple[str, ...], name: str) -> list[str]:
    """Those of the operations that have no implementation of that name."""
    return [operation for operation in operations if name not in _IMPLEMENTATIONS[operation]]


def run(operation: str, implementation: str, arguments: tuple, interpret: Any = None) -> Any:
    """The operation's result by that implementation. `interpret` goes to the kernel.

    Raises `ValueError` for an unknown implementation, and `Unavailable` where a named one cannot run.
    """
    if implementation == "auto":
        if interpret is not None:
            raise ValueError(f"{operation}: interpret={interpret!r} goes with a named kernel, not with auto")
        return auto(operation, lambda name, *arguments: run(operation, name, arguments), arguments)
    found = _IMPLEMENTATIONS[operation]
    if implementation not in found:
        raise ValueError(f"{operation} has no implementation {implementation!r}; use auto or one of {', '.join(found)}")
    if interpret is not None:
        return found[implementation](*arguments, interpret)
    if implementation == "hopper":
        devices.require_hopper(operation)
    return found[implementation](*arguments)


def split_arrays(arguments: tuple) -> tuple[list, Callable]:
    """(the arrays among nested arguments, a function that puts others in their places)."""
    leaves, tree = jax.tree.flatten(arguments)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

    def fill(arrays: Any) -> tuple:
        given = dict(zip(at, arrays, strict=True))
        return tree.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in at], fill


@functools.cache
def _warn(reason: str) -> None:
    """Once in a process."""
    warnings.warn(reason, RuntimeWarning, stacklevel=2)


def auto(operation: str, call: Callable, arguments: tuple) -> Any:
    """call(name, *arguments) with the name that `auto` takes: among kernels, those that are registered for `operation`."""
    arrays, fill = split_arrays(arguments)

    def by(name: str) -> Callable:
        def branch(*arrays):
            filled = fill(arrays)
            try:
                return call(name, *filled)
            except NotBuilt as reason:
                _warn(str(reason))
                return call("xla", *filled)
            except Unavailable:
                return call("xla", *filled)

        return branch

    found = _IMPLEMENTATIONS[operation]
    kernels = {"tpu": by("tpu")} if "tpu" in found else {}
    if "hopper" in found and devices.is_hopper(devices.target()):
        kernels["cuda"] = by("hopper")
    if "cpu" in found and devices.target().platform == "cpu":  # for another target nothing is to be built
        kernels["cpu"] = by("cpu")
    return jax.lax.platform_dependent(*arrays, default=by("xla"), **kernels) if kernels else by("xla")(*arrays)
