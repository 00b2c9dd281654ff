"""Compiled peak memory of the training step: remat policies against depth, and ZeRO-3 against replicas.

Compiles for this machine's CPU (8 virtual devices for the second table) and reads XLA's memory_analysis(); nothing is run.
Temporaries are what a policy decides over: activations kept, and working space. Prints two tables and one JSON line.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config, load_config
from dsv3_jax.data.batch import Batch
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.state.train_state import abstract_state
from dsv3_jax.training.step import gradients, make_train_step

MB = 2**20
SMALL = Path(__file__).parents[2] / "configs" / "small.yaml"
POLICIES = ("none", "selective", "full", "sqrt")
# Narrow layers and many tokens (one sequence of 4096), so that activations outweigh what does not grow with them.
DEEP = [
    "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=96", "model.moe_intermediate_size=16",
    "model.n_routed_experts=4", "model.num_experts_per_tok=2", "model.n_group=1", "model.topk_group=1",
    "model.num_attention_heads=2", "model.q_lora_rank=32", "model.kv_lora_rank=16", "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=8", "model.v_head_dim=16", "data.seq_len=4096", "data.batch_size=1",
]  # fmt: skip
# small.yaml at the widths of the 16B preset, an eighth of its layers and experts.
WIDE = [
    "model.hidden_size=2048", "model.intermediate_size=10944", "model.moe_intermediate_size=1408",
    "model.num_attention_heads=16", "model.q_lora_rank=1536", "model.kv_lora_rank=512", "model.qk_nope_head_dim=128",
    "model.qk_rope_head_dim=64", "model.v_head_dim=128", "data.batch_size=8", "data.seq_len=1024",
]  # fmt: skip


def shapes(config: Config, layout):
    tokens = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len + 1), jnp.int32, sharding=layout.batch_sharding)
    return abstract_state(config, layout), Batch(tokens, tokens)


def temporaries(layers: int, policy: str) -> int:
    """Bytes of temporaries of the gradients alone: without the optimiser's."""
    config = load_config(SMALL, [*DEEP, f"model.num_hidden_layers={layers}", f"remat.policy={policy}"])
    layout = layout_for(config)
    state, batch = shapes(config, layout)
    compiled = jax.jit(lambda s, b: gradients(config, layout, s, b)).lower(state, batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def peak(overrides: list[str]) -> int:
    """Bytes a device needs for a whole step: state and temporaries."""
    config = load_config(SMALL, [*WIDE, *overrides])
    layout = layout_for(config)
    memory = make_train_step(config, layout).lower(*shapes(config, layout)).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64, 256])
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    table = {policy: [temporaries(n, policy) / MB for n in args.layers] for policy in POLICIES}
    print("temporaries, MB, by layers:" + "".join(f"{n:>10d}" for n in args.layers))
    for policy, row in table.items():
        print(f"  {policy:25s}" + "".join(f"{mb:10.1f}" for mb in row))

    print("\nsmall.yaml widened to hidden 2048 (the 16B preset's widths), 8 devices, peak of a device:")
    cases = {
        "replicated, none": ["parallel.data=8", "remat.policy=none"],
        "replicated, selective": ["parallel.data=8", "remat.policy=selective"],
        "ZeRO-3, none": ["parallel.fsdp=8", "remat.policy=none"],
        "ZeRO-3, selective": ["parallel.fsdp=8", "remat.policy=selective"],
    }
    peaks = {name: peak(overrides) / MB for name, overrides in cases.items()}
    first = peaks["replicated, none"]
    for name, mb in peaks.items():
        print(f"  {name:25s}{mb:10.0f} MB  {mb / first - 1:+.1%}")
    print(json.dumps({"layers": args.layers, "temporaries_mb": table, "peak_mb": peaks}))


if __name__ == "__main__":
    main()
