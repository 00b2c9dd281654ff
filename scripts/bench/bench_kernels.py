"""What 8 bits save in an MoE layer of the released model's size, compiled for accelerators that are not here; a table and JSON.

One device's experts and the shared expert, forward and backward, `deepseek` against bf16, on tpu7x and h100:

* bytes accessed: operands and results of every instruction of the compiled program, each fusion and kernel once, of a gather
  only the rows (XLA's own count follows what a kernel states). Both lay tokens out as rows of experts and add them up again;
  bf16 is at its best: all experts have equally many tokens, so that their products are one batched product;
* bytes kept for the backward pass: the residuals of the differentiated layer, without weights; of bf16 as the model runs it,
  which recomputes SwiGLU too, and as autodiff has it;
* the products' roofline time, FLOPs over the peak of precision/platforms.py (a bound, no measurement);
* SwiGLU with quantisation: bytes of one fused kernel against the operation, then `quantize`;
* the head's logits up to their gradient: bytes with the kernel that sums them up, and of XLA alone;
* which instruction multiplies: H100's from SASS (QGMMA.E4M3), a TPU's from the Mosaic kernel's dot.

Nothing is run. Example: .venv-aot/bin/python scripts/bench/bench_kernels.py tpu7x h100
"""

import argparse
import functools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from tools import compile_kernels  # isort: skip  (first: it sets the environment in which kernels are dumped)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.cost.topologies import devices, parse_topology
from dsv3_jax.model.layers import linear, swiglu
from dsv3_jax.precision.platforms import platform_of
from pallas_kernels import registry
from pallas_kernels.grouped_swiglu.api import grouped_swiglu
from pallas_kernels.grouped_swiglu.rows import rows_of_slots, sum_choices
from pallas_kernels.quantize.api import quantize
from pallas_kernels.scaled import TILE, Gemms, bits
from pallas_kernels.scaled_linear.api import scaled_linear, scaled_swiglu_linear
from pallas_kernels.swiglu_quantize.api import swiglu_quantize

TOKENS, HIDDEN, FFN, CHOICES, EXPERTS = 4096, 7168, 2048, 8, 8  # of a device; its tokens go to all its experts
CHUNK, VOCABULARY = 2048, 129280  # tokens of a chunk of the head's
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
# instructions that move nothing: names, views, and the ends of what began before
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id", "replica-id"}


def shape_bytes(text: str) -> int:
    """Bytes of all arrays in an HLO type, such as (bf16[8,128]{1,0}, f32[4])."""
    found = re.findall(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]", text)
    return sum(BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in found)


def bytes_accessed(hlo: str) -> int:
    """Operands and results of the instructions of the entry computation."""
    entry = hlo[hlo.index("\nENTRY ") :]
    size, total = {}, 0
    for line in entry.splitlines()[1:]:
        match = re.match(r"\s*(?:ROOT )?(%?[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line)
        if not match:
            continue
        name, result, operation, rest = match.groups()
        assert operation not in ("while", "conditional"), f"{name}: a loop's body would count once"
        size[name.lstrip("%")] = shape_bytes(result)
        if operation in _FREE or operation.endswith(("-start", "-update")):
            continue
        if operation.endswith("-done") or "gather" in name:  # a copy, or as many rows read as written
            total += 2 * size[name.lstrip("%")]
            continue
        operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
        total += sum(size.get(o, 0) for o in operands) + size[name.lstrip("%")]
    return total


def to_all_experts() -> jax.Array:
    return jnp.broadcast_to(jnp.arange(CHOICES), (TOKENS, CHOICES))


@jax.custom_vjp
def dispatch(x_TD, rows):
    """Tokens at the rows of their experts. Autodiff would make scatters of these two, where gathers do."""
    return x_TD.at[rows.token_R].get(mode="fill", fill_value=0)


@jax.custom_vjp
def combine(y_RD, rows):
    return sum_choices(y_RD, rows)


dispatch.defvjp(lambda x_TD, rows: (dispatch(x_TD, rows), rows), lambda rows, dx_RD: (sum_choices(dx_RD, rows), None))
combine.defvjp(
    lambda y_RD, rows: (combine(y_RD, rows), rows),
    lambda rows, dy_TD: (dy_TD.at[rows.token_R].get(mode="fill", fill_value=0), None),
)


def bf16_layer(x, w_gate_up, w_down, shared_gate_up, shared_down, weight):
    """Rows as in 8 bits; experts have equally many, so that their products are one batched product, and the shared expert."""

    def swiglu_of(gate_up):
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return jax.nn.silu(gate) * up

    rows, live = rows_of_slots(to_all_experts(), EXPERTS, (TILE,)), EXPERTS * TOKENS  # no row is padding but those after
    rows = rows._replace(token_R=rows.token_R[:live], slot_R=rows.slot_R[:live])
    x_ETD = dispatch(x, rows).reshape(EXPERTS, TOKENS, HIDDEN)
    weight_ET = weight.reshape(-1)[rows.slot_R].reshape(EXPERTS, TOKENS, 1)
    h_ETM = (swiglu_of(jnp.einsum("etd,edx->etx", x_ETD, w_gate_up)) * weight_ET).astype(x.dtype)
    y_RD = jnp.einsum("etm,emd->etd", h_ETM, w_down).reshape(live, HIDDEN)
    return combine(y_RD, rows) + swiglu_of(x @ shared_gate_up) @ shared_down


def own_bf16_layer(x, w_gate_up, w_down, shared_gate_up, shared_down, weight):
    """As the model runs it on GPUs."""
    E, D, X = w_gate_up.shape
    routed = grouped_swiglu(x, w_gate_up.reshape(E, D, 2, X // 2), w_down, to_all_experts(), weight, implementation="xla")

    @jax.checkpoint
    def down(gate_up, w):
        return linear(swiglu(gate_up.reshape(TOKENS, 2, -1)), w)

    return routed + down(linear(x, shared_gate_up), shared_down)


def eight_bit_layer(x, w_gate_up, w_down, shared_gate_up, shared_down, weight):
    gemms, (E, D, X) = Gemms(), w_gate_up.shape
    routed = grouped_swiglu(x, w_gate_up.reshape(E, D, 2, X // 2), w_down, to_all_experts(), weight, gemms)
    return routed + scaled_swiglu_linear(scaled_linear(x, shared_gate_up, gemms), shared_down, gemms)


def layer_arguments() -> tuple:
    bf16 = jnp.bfloat16
    shapes = [
        (TOKENS, HIDDEN), (EXPERTS, HIDDEN, 2 * FFN), (EXPERTS, FFN, HIDDEN), (HIDDEN, 2 * FFN), (FFN, HIDDEN),
    ]  # fmt: skip
    return (*(jax.ShapeDtypeStruct(s, bf16) for s in shapes), jax.ShapeDtypeStruct((TOKENS, CHOICES), jnp.float32))


def kept_bytes(layer) -> int:
    """Residuals of the layer, but for the weights themselves."""
    arguments = layer_arguments()
    residuals = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(layer, *a)[1], *arguments))
    weights = {(a.shape, a.dtype) for a in arguments[1:5]}
    sizes = [
        (a.shape, a.dtype, a.size * a.dtype.itemsize)
        for a in residuals
        if (a.shape, a.dtype) not in weights and a.dtype != jnp.int32
    ]
    # the routed experts and the shared one each quantise x; XLA merges the two, and the compiled program holds one
    x8 = [
        (a.shape, a.dtype, a.size * a.dtype.itemsize)
        for a in jax.tree.leaves(jax.eval_shape(lambda x: bits(quantize(x, 1)), arguments[0]))
    ]
    return sum(size for _, _, size in sizes) - sum(a[2] * (sizes.count(a) - 1) for a in x8 if a in sizes)


def compiled(device, f, arguments) -> Any:
    """For one device; inside `shard_map`, where kernels compile for a GPU that is not here."""
    mesh = Mesh(np.array([device]), ("x",))
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P())) for a in arguments]
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)).lower(*arguments).compile()


def of_layer(device, layer) -> dict[str, Any]:
    def step(*arguments):
        y, vjp = jax.vjp(layer, *arguments)
        return vjp(y)

    program = compiled(device, step, layer_arguments())
    return {"accessed": bytes_accessed(program.as_text()), "temporaries": program.memory_analysis().temp_size_in_bytes}


def roofline_ms(device) -> dict[str, float]:
    """The layer's products, forward and backward, at the peak of bf16 and of e4m3."""
    flops = 3 * 2 * TOKENS * 3 * HIDDEN * FFN * (CHOICES + 1)
    peak = platform_of(device).tera_ops
    return {name: flops / (peak[name] * 1e12) * 1e3 for name in ("bf16", "e4m3") if name in peak}


def fusion(device) -> dict[str, int]:
    """Bytes of SwiGLU with quantisation: one kernel, and the operation followed by `quantize`'s kernel."""
    implementation = "tpu" if device.platform == "tpu" else "hopper"
    gate_up = jax.ShapeDtypeStruct((TOKENS * CHOICES, 2 * FFN), jnp.bfloat16)

    def apart(x):
        gate, up = jnp.split(x.astype(jnp.float32), 2, axis=1)
        h = (jax.nn.silu(gate) * up).astype(jnp.bfloat16)
        return quantize(h, 1, implementation=implementation), quantize(x, 1, implementation=implementation)

    def fused(x):
        return swiglu_quantize(x, implementation=implementation)

    found = {"fused": fused, "apart": apart}
    return {name: bytes_accessed(compiled(device, f, (gate_up,)).as_text()) for name, f in found.items()}


def cross_entropy(device) -> dict[str, int]:
    """Bytes of a chunk's logits, log-sum-exps and gradient by the logits: by XLA alone, and with the kernel."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((CHUNK, HIDDEN), (HIDDEN, VOCABULARY)))
    arguments = x, w, jax.ShapeDtypeStruct((CHUNK,), jnp.int32)

    def gradient(implementation: str, x, w, target):
        found = registry.run("logit_statistics", implementation, (x, w, target, True), None)
        lse = found.top_T + jnp.log(found.total_T)
        onehot = target[:, None] == jnp.arange(VOCABULARY)
        return lse - found.at_target_T, (jnp.exp(found.logits_TV - lse[:, None]) - onehot).astype(x.dtype)

    by = {"fused": "tpu" if device.platform == "tpu" else "hopper", "apart": "xla"}
    return {
        name: bytes_accessed(compiled(device, functools.partial(gradient, implementation), arguments).as_text())
        for name, implementation in by.items()
    }


def instruction(target: str, device) -> str:
    """What multiplies in the grouped product."""
    name, (f, arguments) = next(
        (n, c) for n, c in compile_kernels.cases().items() if n.startswith("grouped scaled_matmul e4m3")
    )
    if target == "h100":
        found = compile_kernels.compile_one(target, device, f, arguments)
        return f"{', '.join(found['tensor_core'])}; {found['registers']} registers, {found['spilled_bytes']} bytes spilled"
    text = str(jax.make_jaxpr(lambda *a: f(*a, implementation="tpu"))(*arguments))
    dots = set(re.findall(r":(\w+)\[[\d,]+\] = dot_general\[", text))
    operands = set(re.findall(r"MemRef<vmem>\{(f8\w+|float8\w+)\[", text)) or set(re.findall(r"(float8_\w+|f8\w+)\[", text))
    return f"{name.split()[1]}: Mosaic dot of {', '.join(sorted(operands))} into {', '.join(sorted(dots))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help="tpu7x, h100; both if none")
    args = parser.parse_args()
    if unknown := set(args.targets) - {"tpu7x", "h100"}:
        parser.error(f"unknown target {', '.join(sorted(unknown))}; valid: tpu7x, h100")
    layers = {"bf16": own_bf16_layer, "bf16 by autodiff": bf16_layer, "deepseek": eight_bit_layer}
    kept = {name: kept_bytes(layer) for name, layer in layers.items()}
    print(f"MoE layer, {TOKENS} tokens x {CHOICES} experts of {HIDDEN} x {FFN}, and the shared one; forward and backward")
    for name in ("bf16", "bf16 by autodiff"):
        a, b = kept[name], kept["deepseek"]
        print(f"kept for the backward pass, {name}: {a / 1e6:.0f} -> {b / 1e6:.0f} MB ({b / a - 1:+.0%})")
    results: dict[str, Any] = {"kept": kept}
    for target in args.targets or ("tpu7x", "h100"):
        device = devices(parse_topology(compile_kernels.TARGETS[target]))[0]
        found: dict[str, Any] = {"bf16": of_layer(device, bf16_layer), "deepseek": of_layer(device, eight_bit_layer)}
        for what in ("accessed", "temporaries"):
            a, b = found["bf16"][what], found["deepseek"][what]
            print(f"{target}: {what}: {a / 1e9:.2f} -> {b / 1e9:.2f} GB ({b / a - 1:+.0%})", flush=True)
        found["roofline_ms"] = roofline_ms(device)
        print(f"{target}: products' roofline: " + ", ".join(f"{k} {v:.2f} ms" for k, v in found["roofline_ms"].items()))
        found["swiglu"] = fusion(device)
        a, b = found["swiglu"]["apart"], found["swiglu"]["fused"]
        print(f"{target}: swiglu + quantise: {a / 1e6:.0f} -> {b / 1e6:.0f} MB fused ({b / a - 1:+.0%})", flush=True)
        found["cross_entropy"] = cross_entropy(device)
        a, b = found["cross_entropy"]["apart"], found["cross_entropy"]["fused"]
        print(f"{target}: logits to their gradient: {a / 1e6:.0f} -> {b / 1e6:.0f} MB ({b / a - 1:+.0%})", flush=True)
        found["instruction"] = instruction(target, device)
        results[target] = found
        print(f"{target}: {found['instruction']}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
