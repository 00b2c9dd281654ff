"""Meshes that can be compiled for without being there: their names, their devices as JAX describes them, their links.

TPU names give the slice's torus (`v5p:8x8x8`), NVIDIA's hosts x GPUs (`h100:128x8`); in front, how many TPU slices
(`2*v5p:8x8x8`). Importing this loads no JAX; `devices` needs the compilers (`ENVIRONMENT` set before JAX is loaded).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.precision.platforms import HARDWARE

GIB = 2**30
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # compiling needs no cuDNN
    "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip

EXAMPLES = {
    "v5e": ("v5e:4x4", "v5e:8x8", "v5e:16x16"),
    "v5p": ("v5p:2x2x1", "v5p:4x4x4", "v5p:8x8x8", "v5p:8x16x16", "2*v5p:8x8x8"),
    "v6e": ("v6e:4x4", "v6e:8x8", "v6e:16x16"),
    "tpu7x": ("tpu7x:2x2x1", "tpu7x:4x4x4", "tpu7x:4x4x8", "tpu7x:4x8x8", "tpu7x:8x8x8"),
    "a100": ("a100:1x8", "a100:64x8"),
    "h100": ("h100:1x8", "h100:64x8", "h100:128x8"),
    "h800": ("h800:1x8", "h800:256x8"),
    "b200": ("b200:1x8", "b200:32x8"),
}

# XLA's description of a GPU: compute capability, cores, memory and its speed in bytes, cache, shared memory, GHz, name.
_GPUS = {
    "a100": (8, 108, 85_899_345_920, 2_039_000_000_000, 41_943_040, 167_936, 166_912, 1.41, "NVIDIA A100-SXM4-80GB"),
    "h100": (9, 132, 84_978_434_048, 3_352_320_000_000, 52_428_800, 233_472, 232_448, 1.98, "NVIDIA H100 80GB HBM3"),
    "b200": (10, 148, 192_000_000_000, 7_700_000_000_000, 132_120_576, 233_472, 232_448, 1.97, "NVIDIA B200"),
}
_GPUS["h800"] = _GPUS["h100"]  # the same chip with other links
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048  core_count: {cores}  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {l2}  clock_rate_ghz: {ghz}  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
device_description_str: "{name}"
"""


def gpu_target(kind: str) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    major, cores, memory, bandwidth, l2, shared, optin, ghz, name = _GPUS[kind]
    return _GPU_CONFIG.format(
        major=major, cores=cores, memory=memory, bandwidth=bandwidth, l2=l2, shared=shared, optin=optin, ghz=ghz, name=name
    )


@dataclass(frozen=True)
class Topology:
    """`shape`: a torus of chips, or (hosts, GPUs)."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def is_tpu(self) -> bool:
        return self.kind not in _GPUS

    @property
    def size(self) -> int:
        """Devices, as JAX counts them."""
        cores = HARDWARE[self.kind]["links"]["ici"]["cores"] if self.is_tpu else 1
        return math.prod(self.shape) * self.slices * cores

    @property
    def room(self) -> float:
        """Bytes of memory that a program may use on a device."""
        return HARDWARE[self.kind]["memory_gib"] * GIB

    def __str__(self) -> str:
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{slices}{self.kind}:{'x'.join(map(str, self.shape))}"


def mesh_label(sizes: Mapping[str, int]) -> str:
    """The axes of more than one device: fsdp 8 x expert 64."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def name_of_platform(topology: Topology) -> str:
    """In precision/platforms.py."""
    return "h100" if topology.kind == "h800" else topology.kind


def parse_topology(name: str) -> Topology:
    """Raises `UserError` for a name that is none."""
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)+)", name)
    kinds = ", ".join(EXAMPLES)
    if not found or found[2] not in EXAMPLES:
        raise UserError(
            f"topology={name}: use KIND:SHAPE such as v5p:8x8x8 or h100:128x8, with one of {kinds}; see dsv3 plan --list"
        )
    topology = Topology(found[2], tuple(int(n) for n in found[3].split("x")), int(found[1] or 1))
    wanted = HARDWARE[topology.kind]["links"]["ici"]["dimensions"] if topology.is_tpu else 2
    what = f"a torus of {wanted} dimensions" if topology.is_tpu else "HOSTSxGPUS"
    if len(topology.shape) != wanted or min(*topology.shape, topology.slices) < 1:
        raise UserError(f"topology={name}: {topology.kind} takes {what}, such as {EXAMPLES[topology.kind][-1]}")
    if not topology.is_tpu and topology.slices > 1:
        raise UserError(f"topology={name}: GPUs have hosts and no slices; use {topology.kind}:HOSTSx{topology.shape[1]}")
    return topology


def devices(topology: Topology) -> list[Any]:
    """As JAX describes them; a mesh of them can be compiled for. Raises `UserError` for a shape that there is none of."""
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
    except Exception as error:  # of XLA's several kinds
        raise UserError(f"topology={topology}: its compiler says: {str(error)[:300]}") from None
    return list(described.devices)
