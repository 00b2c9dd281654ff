"""Compile a configuration's training step for a TPU or GPU mesh that is not here; print its memory and collectives.

Topologies: v5p:8x8x8, tpu7x:4x4x8, v6e:16x16 and so on, or h100:128x8 (hosts x GPUs); scripts/setup_aot.sh makes .venv-aot with
their compilers. Nothing is allocated or run. Example:

  .venv-aot/bin/python scripts/aot_compile.py configs/v3_671b.yaml v5p:8x8x8 data.batch_size=512 train.grad_accum_steps=1 \\
      parallel.fsdp=8 parallel.expert=64
"""

import argparse
import collections
import json
import os
import re
import time

os.environ.update({
    "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # compiling needs no cuDNN
})  # fmt: skip

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dsv3_jax.config import load_config
from dsv3_jax.parallel.layout import batch_sharding, layout_for
from dsv3_jax.precision.platforms import platform_of, resolve
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import make_train_step

GIB = 2**30
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices_of(topology: str) -> list:
    kind, shape = topology.split(":")
    if kind == "h100":
        return topologies.get_topology_desc(
            platform="cuda", topology_name=topology, target_config=H100, topology=f"1x{shape}"
        ).devices
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def collectives(hlo: str) -> dict[str, int]:
    """How many instructions of each kind the program has; those in a loop's body count once."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    found = re.findall(rf"= \S+(?: \S+)*? ({kinds})(?:-start)?\(", hlo)
    return dict(collections.Counter(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("topology")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--dump", help="write the compiled HLO to this file")
    args = parser.parse_args()
    devices = devices_of(args.topology)
    config = resolve(load_config(args.config, args.overrides), devices[0])
    layout = layout_for(config, devices)
    state = abstract_state(config, layout)
    shape = (config.data.batch_size, config.data.seq_len + 1 + config.model.num_nextn_predict_layers)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(layout))
    began = time.perf_counter()
    lowered = make_train_step(config, layout).lower(state, {"tokens": tokens, "segments": tokens})
    traced = time.perf_counter() - began
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    hlo = compiled.as_text()
    if args.dump:
        with open(args.dump, "w") as file:
            file.write(hlo)
    arguments, temporaries = memory.argument_size_in_bytes / GIB, memory.temp_size_in_bytes / GIB
    room = platform_of(devices[0]).memory_gib
    print(f"{args.topology}: {len(devices)} devices, {seconds:.0f} s ({traced:.0f} of them tracing)")
    total = arguments + temporaries
    print(f"  state {arguments:.2f} GiB + temporaries {temporaries:.2f} GiB = {total:.2f} of {room} GiB a device")
    print(json.dumps({
        "topology": args.topology, "devices": len(devices), "mesh": config.parallel.__dict__, "compile_s": seconds,
        "argument_gib": arguments, "temp_gib": temporaries, "output_gib": memory.output_size_in_bytes / GIB,
        "alias_gib": memory.alias_size_in_bytes / GIB, "fits": total < room, "collectives": collectives(hlo),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
