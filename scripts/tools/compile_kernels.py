"""Compile the low-precision kernels for accelerators that are not here; print what each target's compiler said.

A target is v5p, v6e, tpu7x (libtpu) or h100 (CUDA's compilers): scripts/tools/setup_aot.sh makes .venv-aot with all of them.
For 4-bit weights, whose products plain JAX does on H100, the bytes that a token moves beside those of codes and scales.
For H100 also registers and spilled bytes, and the tensor cores' instruction; for codes of gradients, which only memory bounds,
the bytes moved by the kernel and by XLA's program for the same in plain JAX. Nothing is run: these are no speed figures.
Example: .venv-aot/bin/python scripts/tools/compile_kernels.py v5p tpu7x h100
"""

import argparse
import contextlib
import functools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from dsv3_jax.cost.topologies import ENVIRONMENT, devices, parse_topology
from dsv3_jax.plan.hlo import parse

os.environ.update(ENVIRONMENT | {
    "MOSAIC_GPU_DUMP_TO": tempfile.mkdtemp(), "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_SASS": "1",
    "PATH": ":".join([os.environ["PATH"], *map(str, Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/bin"))]),
})  # fmt: skip

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.checkpoint.integers import IntegerArray
from dsv3_jax.exchange.codec import Codec
from pallas_kernels.causal_attention.api import causal_attention
from pallas_kernels.cost import nbytes
from pallas_kernels.gradient_codes.api import mean_of_codes, pack_codes
from pallas_kernels.integer_linear.api import integer_experts, integer_linear
from pallas_kernels.integer_weight import IntegerFormat, IntegerWeight
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.quantize.api import quantize, quantize_transposed
from pallas_kernels.scaled import DTYPES, TILE, Format, Scaled, tiles
from pallas_kernels.scaled_matmul.api import grouped_scaled_matmul, grouped_scaled_wgrad, scaled_matmul
from pallas_kernels.swiglu_quantize.api import swiglu_backward, swiglu_quantize

TARGETS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1", "h100": "h100:1x1"}
TOKENS, EXPERTS = 4096, 4  # of a device
WIDEST_FFN = 8192  # that a TPU's SwiGLU kernel takes
CODE_BLOCKS, REPLICAS = 7168 * 8, 8  # of an expert's gate: 14.7 million numbers
HIDDEN, FFN, KV_A, VOCABULARY = 7168, 2048, 576, 129280  # the released model's; KV_A is no multiple of 128
DENSE_FFN, CHOICES, SERVED_EXPERTS = 18432, 8, 64  # the last: of one device


def _matrix(rows: int, columns: int, format: Format, group: int) -> Scaled:
    scales = jax.ShapeDtypeStruct((tiles(columns), -(-rows // group)), jnp.float32)
    return Scaled(jax.ShapeDtypeStruct((rows, columns), DTYPES[format]), scales)  # type: ignore[arg-type]


def cases() -> dict:
    """name -> (function of the implementation, arguments)."""
    found = {}
    x = jax.ShapeDtypeStruct((TOKENS, HIDDEN), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((HIDDEN, KV_A), jnp.bfloat16)
    for format in DTYPES:
        found[f"quantize {format} tiles 1x128"] = functools.partial(quantize, rows=1, format=format), (x,)
        found[f"quantize {format} blocks 128x128"] = functools.partial(quantize, rows=128, format=format), (w,)
        found[f"quantize_transposed {format}"] = functools.partial(quantize_transposed, format=format), (x,)
        kept = _matrix(TOKENS, HIDDEN, format, 1)
        found[f"quantize_transposed {format} again"] = functools.partial(quantize_transposed, format=format), (kept,)
    row, bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), jnp.bfloat16
    rows, gate_up = row((TOKENS,)), jax.ShapeDtypeStruct((TOKENS, 2 * FFN), bf16)
    for format in DTYPES:
        found[f"swiglu_quantize {format}"] = functools.partial(swiglu_quantize, format=format), (gate_up,)
        kept, dh = _matrix(TOKENS, 2 * FFN, format, 1), jax.ShapeDtypeStruct((TOKENS, FFN), bf16)
        found[f"swiglu_backward {format}"] = swiglu_backward, (kept, dh, rows)
    widest = jax.ShapeDtypeStruct((TOKENS, 2 * WIDEST_FFN), bf16)
    found["swiglu_quantize e4m3 widest"] = swiglu_quantize, (widest,)
    kept, dh = _matrix(TOKENS, 2 * WIDEST_FFN, "e4m3", 1), jax.ShapeDtypeStruct((TOKENS, WIDEST_FFN), bf16)
    found["swiglu_backward e4m3 widest"] = swiglu_backward, (kept, dh, rows)
    for format in DTYPES:
        for name, N, K, rows in (("forward", FFN, HIDDEN, 128), ("forward", KV_A, HIDDEN, 128), ("wgrad", HIDDEN, TOKENS, 1)):
            M = TOKENS if name == "forward" else FFN
            operands = _matrix(M, K, format, 1), _matrix(N, K, format, rows)
            f = functools.partial(scaled_matmul, dtype=jnp.dtype("bfloat16" if name == "forward" else "float32"))
            found[f"scaled_matmul {format} {name} {M}x{K}x{N}"] = (f, operands)
        f = functools.partial(grouped_scaled_matmul, N=2 * FFN, dtype=jnp.dtype("bfloat16"))
        operands = _matrix(TOKENS, HIDDEN, format, 1), _matrix(EXPERTS * 2 * FFN, HIDDEN, format, 128)
        blocks = jax.ShapeDtypeStruct((TOKENS // TILE,), jnp.int32)
        found[f"grouped scaled_matmul {format} {EXPERTS} experts"] = (f, (*operands, blocks))
        f = functools.partial(grouped_scaled_wgrad, groups=EXPERTS)
        operands = _matrix(HIDDEN, TOKENS, format, 1), _matrix(2 * FFN, TOKENS, format, 1)
        found[f"grouped scaled_wgrad {format} {EXPERTS} experts"] = (f, (*operands, blocks))
    numbers = (row((CODE_BLOCKS, 256)),) * 3
    for bits in (1, 2, 4, 8):
        table = Codec(bits).table
        found[f"pack_codes {bits} bits"] = functools.partial(pack_codes, levels=table), numbers
        codes = (
            jax.ShapeDtypeStruct((REPLICAS, CODE_BLOCKS // REPLICAS, 32 * bits), jnp.uint8),
            row((REPLICAS, CODE_BLOCKS // REPLICAS)),
        )
        found[f"mean_of_codes {bits} bits"] = functools.partial(mean_of_codes, levels=table), codes
    return found


def _attention(q, k, v, segment, implementation: str):
    """Forward and gradients."""

    def total(q, k, v):
        return causal_attention(q, k, v, segment, 0.1, implementation).astype(jnp.float32).sum()

    return jax.value_and_grad(total, (0, 1, 2))(q, k, v)


def _cross_entropy(x, w, target, weight, implementation: str):
    """With its gradients, as training takes it."""
    loss = functools.partial(linear_cross_entropy, implementation=implementation)
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w, target, weight)


def _cross_entropy_arguments() -> tuple:
    """An eighth of the released model's vocabulary."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((TOKENS, HIDDEN), (HIDDEN, VOCABULARY // 8)))
    return x, w, jax.ShapeDtypeStruct((TOKENS,), jnp.int32), jax.ShapeDtypeStruct((TOKENS,), jnp.float32)


def _attention_arguments() -> tuple:
    """Two heads of the released model: keys of 128 + 64 numbers, values of 128."""
    q, v = (jax.ShapeDtypeStruct((1, TOKENS, 2, size), jnp.bfloat16) for size in (192, 128))
    return q, q, v, jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)


def _too_large(x, implementation: str):
    """A block larger than a TPU's VMEM: what a compiler must refuse, or the other answers mean nothing."""
    assert implementation == "tpu"

    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    return pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def _resources() -> dict:
    """Figures of the kernels that were compiled since the last call, from what Mosaic GPU dumped."""
    dumped = list(Path(os.environ["MOSAIC_GPU_DUMP_TO"]).iterdir())
    text = {
        suffix: "".join(p.read_text(errors="replace") for p in dumped if p.suffix == suffix)
        for suffix in (".ptxas", ".sass_ctrl")
    }
    for path in dumped:
        path.unlink()
    if not text[".ptxas"]:
        return {}
    return {
        "registers": max(map(int, re.findall(r"[Uu]sed (\d+) registers", text[".ptxas"]))),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", text[".ptxas"]))),
        "tensor_core": sorted(set(re.findall(r"\b[A-Z]+GMMA\S*", text[".sass_ctrl"]))),
    }


def _memory_bytes(hlo: str, apart: int | None = None) -> int:
    """Read from and written to the device's memory by a program without loops: the operands and results of what it runs.

    Arrays whose first axis is `apart` are left out.
    """
    program = parse(hlo)
    entry = program.computations[program.entry]
    free = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-done")
    runs = [i for i in entry if i.opcode not in free]
    # of an asynchronous copy the first array is what it makes, and the second what it reads
    results = [a for i in runs for a in (i.arrays[:1] if i.opcode == "copy-start" else i.arrays)]
    arrays = [*results, *(a for i in runs for name in i.operands for a in entry.instructions[name].arrays)]
    return sum(a.bytes for a in arrays if a.space == 0 and a.dims[:1] != (apart,))


def compile_one(target: str, device, f, arguments, against_plain: bool = False) -> dict:
    """{"compiled": True, ...}, or {"compiled": False, "reason": the compiler's first line}.

    `against_plain` adds the bytes of memory that the kernel moves, and those that XLA's program for its definition does.
    """
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Explicit,))
    gpu = target == "h100"
    place = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    arguments = jax.tree.map(lambda a: place(a.shape, a.dtype), arguments)

    def compiled(implementation: str):
        with jax.set_mesh(mesh) if gpu else contextlib.nullcontext():
            return jax.jit(functools.partial(f, implementation=implementation)).lower(*arguments).compile()

    _resources()  # of what somebody compiled before
    try:
        kernel = compiled("hopper" if gpu else "tpu")
    except Exception as error:  # whatever a compiler raises is the answer
        return {"compiled": False, "reason": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}
    found = {"compiled": True} | (_resources() if gpu else {})
    if against_plain:
        moved, plain = (_memory_bytes(p.as_text() or "") for p in (kernel, compiled("reference")))
        found |= {"bytes": moved, "plain_bytes": plain, "ratio": round(plain / moved, 1)}
    return found


def _integer(lead: tuple[int, ...], inputs: int, outputs: int) -> IntegerWeight:
    """Shapes of a weight in 4 bits with groups of 128, and its outputs side by side, as decoding has it."""
    return IntegerArray(IntegerFormat(4, 128), 1, 1).weight((*lead, inputs, outputs))


def _bytes(w: IntegerWeight) -> int:
    return nbytes(w.codes, w.scale)


def integer_cases() -> dict:
    """name -> (function of the implementation, arguments, bytes of codes and scales that it reads, how many a token passes).

    They are all that a token reads of the released model but for embedding, head, norms, routers and the absorbed kv_b.
    """
    found = {}
    for name, K, N, layers in (
        ("q_a", HIDDEN, 1536, 61), ("q_b", 1536, 24576, 61), ("kv_a", HIDDEN, KV_A, 61), ("o", 16384, HIDDEN, 61),
        ("gate_up", HIDDEN, 2 * DENSE_FFN, 3), ("down", DENSE_FFN, HIDDEN, 3),
        ("shared gate_up", HIDDEN, 2 * FFN, 58), ("shared down", FFN, HIDDEN, 58),
    ):  # fmt: skip
        w, row = _integer((), K, N), jax.ShapeDtypeStruct((1, K), jnp.bfloat16)
        found[f"integer_linear {name} {K}x{N}"] = integer_linear, (row, w), _bytes(w), layers
    x = jax.ShapeDtypeStruct((1, HIDDEN), jnp.bfloat16)
    weights = _integer((SERVED_EXPERTS,), HIDDEN, 2 * FFN), _integer((SERVED_EXPERTS,), FFN, HIDDEN)
    choice, weight = (jax.ShapeDtypeStruct((1, CHOICES), dtype) for dtype in (jnp.int32, jnp.float32))
    read = sum(map(_bytes, weights)) * CHOICES // SERVED_EXPERTS
    found[f"integer_experts {CHOICES} of {SERVED_EXPERTS}"] = integer_experts, (x, *weights, choice, weight), read, 58
    return found


def compile_integer(target: str, device, f, arguments, read: int) -> dict:
    """As `compile_one`, with the bytes that the program moves, and these over `read`, those that it has to.

    Operands that are all experts count as those that are chosen, which the program reads in place.
    """
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Explicit,))
    place = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    arguments = jax.tree.map(lambda a: place(a.shape, a.dtype), arguments)
    with jax.set_mesh(mesh) if target == "h100" else contextlib.nullcontext():
        run = functools.partial(f, implementation="xla" if target == "h100" else "tpu")
        try:
            hlo = jax.jit(run).lower(*arguments).compile().as_text() or ""
        except Exception as error:  # whatever a compiler raises is the answer
            return {"compiled": False, "reason": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}
    stacks = [w for w in arguments if isinstance(w, IntegerWeight) and w.ndim == 3]
    moved = _memory_bytes(hlo, SERVED_EXPERTS) + (read if stacks else 0)
    return {"compiled": True, "bytes": moved, "bytes_over_formula": round(moved / read, 3)}


def token_bytes(target: str, device) -> dict:
    """Results by name of every integer product, and of the whole `token`."""
    found, moved, needed = {}, 0, 0
    for name, (f, arguments, read, layers) in integer_cases().items():
        found[name] = compile_integer(target, device, f, arguments, read)
        moved, needed = moved + layers * found[name].get("bytes", 0), needed + layers * read
    compiled = all(case["compiled"] for case in found.values())
    return found | {"integer token": {"compiled": compiled, "bytes": moved, "bytes_over_formula": round(moved / needed, 3)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=[], metavar="target", help=f"of {', '.join(TARGETS)}; all if none")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; valid: {', '.join(TARGETS)}")
    results = {}
    for target in args.targets or TARGETS:
        device = devices(parse_topology(TARGETS[target]))[0]
        tried = cases() | {
            "causal_attention, forward and backward": (_attention, _attention_arguments()),
            "linear_cross_entropy with gradients": (_cross_entropy, _cross_entropy_arguments()),
            "linear_cross_entropy without": (linear_cross_entropy, _cross_entropy_arguments()),
        }
        if target != "h100":
            tried["block larger than VMEM"] = (_too_large, (jax.ShapeDtypeStruct((TOKENS, HIDDEN), jnp.float32),))
        else:  # XLA's program moves the same bytes
            tried = {name: case for name, case in tried.items() if not name.startswith("mean_of_codes")}
        for name, found in token_bytes(target, device).items():
            results[f"{target}: {name}"] = found
            print(f"{target:6s} {name:42s} {' '.join(f'{k}={v}' for k, v in found.items())}", flush=True)
        for name, (f, arguments) in tried.items():
            found = results[f"{target}: {name}"] = compile_one(target, device, f, arguments, "_codes" in name)
            print(f"{target:6s} {name:42s} {' '.join(f'{k}={v}' for k, v in found.items())}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
