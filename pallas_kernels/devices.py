"""The device that a program is traced for, and the kernels of this package that it can run."""

import re
from typing import Any

import jax

from pallas_kernels.errors import Unavailable

_CUDA = ("gpu", "cuda")
# for a mesh's abstract device, which has a name and no compute capability
_HOPPER_NAMES = re.compile(r"\bG?H(20|100|200|800)\b")


def target() -> Any:
    """The device of the mesh in context (`shard_map`, `jax.set_mesh`), or else this process's default one."""
    if (device := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return device
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        return jax.devices(device)[0]
    return device


def is_hopper(device: Any) -> bool:
    """Whether it runs Mosaic GPU kernels with wgmma: an NVIDIA GPU of compute capability 9.x, no older and no newer one."""
    if device.platform not in _CUDA:
        return False
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        return bool(_HOPPER_NAMES.search(device.device_kind))
    return str(capability).split(".")[0] == "9"


def require_hopper(operation: str) -> None:
    """Raises `Unavailable` on a GPU that is known to be of another generation.

    Elsewhere it says nothing: a process without a GPU may be compiling for one that it has not named.
    """
    device = target()
    if device.platform in _CUDA and not is_hopper(device):
        raise Unavailable(
            f"{operation}: the hopper kernel needs an NVIDIA GPU of compute capability 9.x, not {device.device_kind}; use xla"
        )
