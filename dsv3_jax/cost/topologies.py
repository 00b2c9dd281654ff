"""Meshes that can be compiled for without being there: their names, their devices as JAX describes them, their links.

TPU names give the slice's torus (`v5p:8x8x8`), NVIDIA's hosts x GPUs (`h100:128x8`); in front, how many TPU slices
(`2*v5p:8x8x8`). Importing this loads no JAX; `devices` needs the compilers (`ENVIRONMENT` set before JAX is loaded).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.precision.platforms import HARDWARE, platform_of

GIB = 2**30
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # compiling needs no cuDNN
    "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip

_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048  core_count: {cores}  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {l2_cache}  clock_rate_ghz: {clock_ghz}  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_optin}  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
device_description_str: "{name}"
"""


def gpu_target(kind: str) -> str:
    """XLA's GpuTargetConfigProto for a kind of GPU, as text."""
    return _GPU_CONFIG.format(**HARDWARE[kind]["xla_gpu"])


@dataclass(frozen=True)
class Topology:
    """Devices of one kind and how they are connected. `kind` is an entry of hardware.yaml; `shape` a torus of chips, or
    (hosts, GPUs of a host)."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def is_tpu(self) -> bool:
        return "ici" in self.facts["links"]

    @property
    def facts(self) -> dict[str, Any]:
        """The entry of hardware.yaml."""
        return HARDWARE[self.kind]

    @property
    def size(self) -> int:
        """Devices, as JAX counts them."""
        cores = self.facts["links"]["ici"]["cores"] if self.is_tpu else 1
        return math.prod(self.shape) * self.slices * cores

    @property
    def platform(self) -> str:
        """The name in precision/platforms.py of what these devices run as."""
        return self.facts.get("platform", self.kind)

    @property
    def room(self) -> float:
        """Bytes of memory that a program may use on a device."""
        return self.facts["memory_gib"] * GIB

    def __str__(self) -> str:
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{slices}{self.kind}:{'x'.join(map(str, self.shape))}"


def mesh_label(sizes: Mapping[str, int]) -> str:
    """The axes of more than one device: fsdp 8 x expert 64."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def parse_topology(name: str) -> Topology:
    """The topology of a name such as v5p:8x8x8, 2*v5p:8x8x8 or h100:128x8. Raises `UserError` for any other."""
    found = re.fullmatch(r"(?:(\d{1,6})\*)?(\w+):(\d{1,6}(?:x\d{1,6}){1,3})", name)
    kinds = ", ".join(HARDWARE)
    if not found or found[2] not in HARDWARE:
        raise UserError(
            f"topology={name[:80]}: use KIND:SHAPE such as v5p:8x8x8 or h100:128x8, with one of {kinds}; see dsv3 plan --list"
        )
    topology = Topology(found[2], tuple(int(n) for n in found[3].split("x")), int(found[1] or 1))
    wanted = topology.facts["links"]["ici"]["dimensions"] if topology.is_tpu else 2
    what = f"a torus of {wanted} dimensions" if topology.is_tpu else "HOSTSxGPUS"
    if len(topology.shape) != wanted or min(*topology.shape, topology.slices) < 1:
        raise UserError(f"topology={name}: {topology.kind} takes {what}, such as {topology.facts['topologies'][-1]}")
    if not topology.is_tpu and topology.slices > 1:
        raise UserError(f"topology={name}: GPUs have hosts and no slices; use {topology.kind}:HOSTSx{topology.shape[1]}")
    return topology


def topology_of(devices: Sequence[Any]) -> Topology | None:
    """The topology of a run's devices; None if their links are unknown, or they fill no torus and no hosts completely."""
    kind = platform_of(devices[0]).name
    if kind not in HARDWARE:
        return None
    slices = {getattr(d, "slice_index", None) or 0 for d in devices}
    if devices[0].platform == "tpu":
        coordinates = zip(*(d.coords for d in devices), strict=True)
        found = Topology(kind, tuple(max(c) - min(c) + 1 for c in coordinates), len(slices))
    else:  # JAX numbers NVLink domains as slices, where it knows them
        hosts = len(slices) if len(slices) > 1 else len({d.process_index for d in devices})
        found = Topology(kind, (hosts, len(devices) // hosts))
    return found if found.size == len(devices) else None


def devices(topology: Topology) -> list[Any]:
    """JAX's descriptions of the devices, for compiling a mesh of them. Raises `UserError` for a shape that does not exist."""
    from jax.experimental import topologies

    shape = "x".join(map(str, topology.shape))
    try:
        if topology.is_tpu:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{topology.kind}:{shape}", num_slices=topology.slices
            )
        else:
            described = topologies.get_topology_desc(
                platform="cuda", topology_name=str(topology), target_config=gpu_target(topology.kind), topology=f"1x{shape}"
            )
    except Exception as error:  # XLA raises several kinds
        raise UserError(f"topology={topology}: its compiler says: {str(error)[:300]}") from None
    return list(described.devices)
