"""The cost of an instruction: FLOPs of its matrix products, bytes it moves, and the time of the slower of both (a roofline).

A matrix product has 2 FLOPs for each multiplication, counted from shapes; everything else counts as bound by memory.
Efficiencies are assumed, not fitted (see docs/plan.md).
"""

import functools
import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass, field

from dsv3_jax.cost.efficiency import Efficiency
from dsv3_jax.cost.estimate import PASSES_OF_FLOAT32
from dsv3_jax.parallel.experts import EXCHANGE, MORE_ROUNDS
from dsv3_jax.plan.hlo import Array, Computation, Instruction, Program
from dsv3_jax.precision.platforms import HARDWARE

# Instructions that only name a buffer, or cost nothing to issue.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "opt-barrier",
    "optimization-barrier", "iota", "add-dependency",
}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")
_FORMATS = {"bf16": "bf16", "f16": "bf16", "f8e4m3fn": "e4m3", "f8e5m2": "e5m2", "s8": "int8", "f32": "float32"}
_KERNEL_OPERANDS = ("bf16", "f16", "f8e4m3fn", "f8e5m2", "s8")  # formats that kernels multiply
_NO_PRODUCT = re.compile(
    r"swiglu_backward|swiglu_quantize|\bquantize|pack_codes|mean_of_codes"
)  # kernels of this package without a product
# Kernels of this package that have one, and state more than it (pallas_kernels/cost.py): shapes count.
_OWN_KERNEL = re.compile(r"\blogit_statistics\b|\bscaled_matmul\b|\bscaled_wgrad\b|mosaic_gpu")
_STATED_FLOPS = re.compile(r'"?cost_estimate"?:\s*\{[^}]*?"?flops"?:\s*"?(\d+)')
_EXCHANGED = re.compile(rf"\bffn\)*/.*/({EXCHANGE}|{MORE_ROUNDS})/")
_TPU_PASSES = {"highest": PASSES_OF_FLOAT32, "high": 3}  # bfloat16 products that make up one of float32 operands


@dataclass
class Work:
    """FLOPs by format of the operands, and bytes read from and written to the device's memory."""

    flops: Counter = field(default_factory=Counter)
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def _numbers(attributes: str, key: str) -> list[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", attributes)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _window(attributes: str, key: str, count: int, default: int) -> list[list[int]]:
    found = re.search(rf"\b{key}=([\d_x\-]+)", attributes)
    return [[int(n) for n in part.split("_")] for part in found[1].split("x")] if found else [[default]] * count


@functools.cache
def _valid(k: int, out: int, size: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """How many pairs (kernel position, output position) of one dimension meet an input and not padding."""
    last = (size - 1) * lhs_dilate
    count = 0
    for position in range(k):
        offset = position * rhs_dilate - low
        count += sum(1 for o in range(out) if 0 <= (at := o * stride + offset) <= last and at % lhs_dilate == 0)
    return count


def convolution_flops(i: Instruction, lhs: Array, rhs: Array) -> float:
    """FLOPs of a convolution, as TPU programs write products; batch axes are spatial, with windows of one position."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i.attributes
    inside = re.search(r"window=\{([^}]*)\}", i.attributes)
    window = inside[1] if inside else ""
    out = i.arrays[0]
    spatial = [c for c in labels[1] if c.isdigit()]
    sizes = _window(window, "size", len(spatial), 1)
    strides, pads = _window(window, "stride", len(spatial), 1), _window(window, "pad", len(spatial), 0)
    lhs_dilates, rhs_dilates = _window(window, "lhs_dilate", len(spatial), 1), _window(window, "rhs_dilate", len(spatial), 1)
    pairs = 1
    for n, label in enumerate(sorted(spatial, key=int)):
        pairs *= _valid(
            sizes[n][0], out.dims[labels[3].index(label)], lhs.dims[labels[1].index(label)], strides[n][0], pads[n][0],
            lhs_dilates[n][0], rhs_dilates[n][0],
        )  # fmt: skip
    # the kernel's input features are already those of one group
    features = rhs.dims[labels[2].index("i")] * out.dims[labels[3].index("f")]
    return 2.0 * pairs * features * out.dims[labels[3].index("b")]


def dot_flops(i: Instruction, lhs: Array) -> float:
    """FLOPs of a dot: 2 for each element of the result and each contracted one."""
    contracted = math.prod(lhs.dims[d] for d in _numbers(i.attributes, "lhs_contracting_dims"))
    return 2.0 * i.arrays[0].size * contracted


def _attention_flops(i: Instruction, arrays: list[Array]) -> float | None:
    """FLOPs of an attention kernel. Half of all pairs of positions are visible; each costs a key's size and a value's size."""
    wide = [a for a in arrays if len(a.dims) >= 3 and a.dtype in ("bf16", "f16", "f32") and a.dims[-1] >= 64]
    if len(wide) < 3:
        return None
    q, _, v = wide[:3]
    score, value = q.dims[-1], v.dims[-1]
    pair = score + value
    if "splash_mha_dkv" in i.name + i.op_name:  # the scores again, dP, and all three gradients
        pair = 3 * score + 2 * value
    elif len(wide) > 3:  # Hopper's: a kernel for each gradient, dq and dk with dP, dv without
        pair = 2 * score + value if i.arrays[0].dims[-1] == score and score != value else score + value
    return 2.0 * pair * q.size / score * max(q.dims[-3:-1]) / 2


def _matrix_flops(i: Instruction, arrays: list[Array]) -> float | None:
    """FLOPs of a product with result [.., m, n], found as two operands that have m and n and share k; None if there are none.

    Experts' matrices may be stacked, so that an operand has a multiple of n. Without two matrices there is no product: 0.
    """
    matrices = [a for a in arrays if len(a.dims) in (2, 3) and a.size > 1e4 and a.dtype in _KERNEL_OPERANDS]
    if len(matrices) < 2:
        return 0.0
    results = [a.dims[-2:] for a in i.arrays if len(a.dims) >= 2]
    for stacked in (False, True):
        for (m, n), (x, y) in itertools.product(results, itertools.permutations(matrices, 2)):
            left, right = list(x.dims[-2:]), list(y.dims[-2:])
            of_n = next((d for d in right if d == n or (stacked and d % n == 0)), None)
            if m in left and of_n:
                left.remove(m)
                right.remove(of_n)
                if left == right:
                    return 2.0 * m * n * left[0]
    return None


def kernel_flops(i: Instruction, operands: list[Instruction], ragged_fill: float) -> float | None:
    """FLOPs of a kernel's products (a custom call): from its shapes, or as others state them; None if neither gives them.

    `ragged_fill`: the share of the rows of buffers for experts that hold tokens.
    """
    name = i.name + " " + i.op_name
    arrays = [o.arrays[0] for o in operands if o.arrays]
    if "splash_mha" in name or "causal_attention" in name:
        return _attention_flops(i, arrays)
    if _NO_PRODUCT.search(name):
        return 0.0
    stated = None if _OWN_KERNEL.search(name + i.attributes) else _STATED_FLOPS.search(i.attributes)
    flops = float(stated[1]) if stated else _matrix_flops(i, arrays)
    return flops if flops is None else flops * (ragged_fill if _EXCHANGED.search(i.op_name) else 1.0)


class CostModel:
    """Costs of a program's instructions on one kind of device.

    Args:
        kind: An entry of hardware.yaml.
        ragged_fill: The share of the rows of buffers for experts that hold tokens.

    `uncounted` collects the kernels whose FLOPs are unknown.
    """

    def __init__(self, program: Program, kind: str, efficiency: Efficiency, ragged_fill: float):
        facts = HARDWARE[kind]
        self._program, self._is_tpu, self._fill = program, "ici" in facts["links"], ragged_fill
        self._peaks = {f: t * 1e12 * efficiency.matmul for f, t in facts["tera_ops"].items()}
        self.memory = facts["memory_tb_s"] * 1e12 * efficiency.memory
        self._overhead = 0.5e-6 if self._is_tpu else 2e-6  # seconds to issue an instruction, such as a kernel's launch
        self.uncounted: set[str] = set()

    def seconds(self, work: Work) -> float:
        """Seconds: the longer of its products and its bytes, and issuing it."""
        return max(self.bounds(work)) + (self._overhead if work.bytes or work.flops else 0.0)

    def bounds(self, work: Work) -> tuple[float, float]:
        """(seconds of its products, seconds of its bytes)."""
        return sum(flops / self._rate(f) for f, flops in work.flops.items()), work.bytes / self.memory

    def _rate(self, format: str) -> float:
        name, _, passes = format.partition("/")
        if name not in self._peaks:  # multiplied in bfloat16
            name = "bf16"
        return self._peaks[name] / int(passes or 1)

    def work(self, i: Instruction, inside: Computation) -> Work:
        """The work of one scheduled instruction of computation `inside`; timeline.py handles loops, calls and conditionals."""
        if i.opcode in FREE or (i.opcode == "custom-call" and any(f'"{name}"' in i.attributes for name in _FREE_CALLS)):
            return Work()
        operands = [inside.instructions[name] for name in i.operands if name in inside.instructions]
        called = i.called("calls")
        if i.opcode == "fusion" and called:
            fused = self._program.computations[called]
            return Work(self._products(fused), self._fusion_bytes(i, operands, fused))
        return Work(self._product(i, operands), self._plain_bytes(i, operands))

    def _products(self, computation: Computation) -> Counter:
        total: Counter = Counter()
        for i in computation:
            called = i.called("calls")
            if i.opcode == "fusion" and called:
                total += self._products(self._program.computations[called])
            else:
                total += self._product(i, [computation.instructions[n] for n in i.operands if n in computation.instructions])
        return total

    def _product(self, i: Instruction, operands: list[Instruction]) -> Counter:
        if i.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
            if i.op_name == "ragged-dot-metadata":  # offsets of groups
                return Counter()
            if not target or target[1] not in ("tpu_custom_call", "mosaic_gpu_v2", "__cublas$gemm", "__cublas$lt$matmul"):
                return Counter()
            flops = kernel_flops(i, operands, self._fill)
            if flops is None:
                self.uncounted.add(i.op_name or i.name)
                return Counter()
            types = {a.dtype for o in operands for a in o.arrays if a.size > 1e4}
            eight = next((_FORMATS[t] for t in ("f8e4m3fn", "f8e5m2", "s8") if t in types), "bf16")
            return Counter({eight: flops})
        if i.opcode not in ("dot", "convolution"):
            return Counter()
        lhs, rhs = operands[0].arrays[0], operands[1].arrays[0]
        flops = dot_flops(i, lhs) if i.opcode == "dot" else convolution_flops(i, lhs, rhs)
        format = _FORMATS.get(lhs.dtype, "float32")
        if format == "float32" and self._is_tpu:
            precision = re.search(r"operand_precision=\{(\w+)", i.attributes)
            format = f"bf16/{_TPU_PASSES.get(precision[1] if precision else '', 1)}"
        return Counter({format: flops})

    def copied(self, i: Instruction, inside: Computation) -> float:
        """Bytes that an asynchronous copy or slice reads from the device's memory and writes into it."""
        operands = [inside.instructions[name] for name in i.operands if name in inside.instructions]
        sources = tuple(a for o in operands for a in o.arrays)
        first = len(sources) if i.opcode == "slice-start" else 0  # its operands come before its results, and a context after
        results = i.arrays[first : first + len(sources)]
        size = sum(a.bytes for a in results)
        places = [any(a.space == 0 for a in arrays) for arrays in (sources, results)]
        return float(size * (sum(places) if self._is_tpu else 2))

    def _in_memory(self, arrays: tuple[Array, ...]) -> float:
        """Bytes of those arrays that are in the device's memory, not in a TPU's VMEM."""
        return float(sum(a.bytes for a in arrays if not (self._is_tpu and a.space)))

    def _plain_bytes(self, i: Instruction, operands: list[Instruction]) -> float:
        out = self._in_memory(i.arrays)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * out
        if i.opcode in ("dynamic-update-slice", "scatter"):  # in place
            return 2 * sum(self._in_memory(o.arrays) for o in operands[1:])
        return out + sum(self._in_memory(o.arrays) for o in operands)

    def _fusion_bytes(self, i: Instruction, operands: list[Instruction], fused: Computation) -> float:
        """Parameters that are only sliced count as their slices; a root that updates a part in place counts as that part."""
        total = 0.0
        users: dict[str, list[Instruction]] = {}
        for inner in fused:
            for name in inner.operands:
                users.setdefault(name, []).append(inner)

        def through(name: str) -> list[Instruction]:
            """The instructions that read it, through bitcasts and the like."""
            found = []
            for user in users.get(name, []):
                found += through(user.name) if user.opcode in ("bitcast", "copy", "reshape", "convert", "transpose") else [user]
            return found

        updated = self._updates(fused)
        for number, operand in enumerate(operands):
            read = self._in_memory(operand.arrays)
            parameter = fused.parameter(number).name
            readers = through(parameter)
            if readers and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in readers):
                read = min(read, float(sum(u.bytes for u in readers)))
            elif any(u.opcode == "dynamic-update-slice" for u in readers) and updated is not None:
                read = 0.0  # what it replaces is not read
            total += read
        return total + (updated if updated is not None else self._in_memory(i.arrays))

    def _updates(self, fused: Computation) -> float | None:
        """Bytes written by a fusion whose results are updates in place; None for other fusions."""
        root = fused.root
        results = [fused.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
        written, in_place = 0.0, False
        for result in results:
            while result.opcode in ("bitcast", "copy", "reshape") and result.operands:
                result = fused.instructions[result.operands[0]]
            if result.opcode == "dynamic-update-slice":
                written, in_place = written + fused.instructions[result.operands[1]].bytes, True
            else:
                written += self._in_memory(result.arrays)
        return written if in_place else None
