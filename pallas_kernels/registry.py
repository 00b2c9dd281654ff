"""Implementations of operations by name: those of this package, and those that a plug-in adds for its own platform."""

from collections.abc import Callable
from typing import Any

_OPERATIONS = (
    "quantize", "quantize_transposed", "swiglu_quantize", "swiglu_backward",
    "scaled_matmul", "grouped_scaled_matmul", "grouped_scaled_wgrad", "causal_attention",
    "logit_statistics", "pack_codes", "mean_of_codes",
)  # fmt: skip
# operation -> name -> function with the arguments of the operation's api, without `implementation`
_IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {operation: {} for operation in _OPERATIONS}


def register(operation: str, name: str, function: Callable) -> None:
    """Let `implementation=name`, and a recipe's `Gemms.implementation`, run `function`.

    Raises `ValueError` for an operation that has no such choice.
    """
    if operation not in _IMPLEMENTATIONS:
        raise ValueError(f"no operation {operation!r} to register for; use one of {', '.join(_IMPLEMENTATIONS)}")
    _IMPLEMENTATIONS[operation][name] = function


def run(operation: str, name: str, arguments: tuple, interpret: Any) -> Any:
    """What `register`ed under that name. Raises `ValueError` if nothing is."""
    found = _IMPLEMENTATIONS[operation]
    if name not in found:
        raise ValueError(f"{operation} has no implementation {name!r}; use auto or one of {', '.join(found)}")
    return found[name](*arguments) if interpret is None else found[name](*arguments, interpret)
