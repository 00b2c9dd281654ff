"""Cases of `pack_codes` and `mean_of_codes`: every number of bits, both kinds of levels, blocks that fill no program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gradient_codes import reference
from pallas_kernels.gradient_codes.api import mean_of_codes, pack_codes
from pallas_kernels.gradient_codes.reference import BLOCK, Levels
from pallas_kernels.measure import EXACT, Case, Suite, Tolerance

# positive levels that are nearest, in mean square, to a normal number (Max, 1960)
_GAUSSIAN = {
    1: (0.7979,), 2: (0.4528, 1.5104), 4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}  # fmt: skip
LEVELS = {
    f"{bits} bits gaussian": Levels((*(-level for level in reversed(positive)), *positive), of_rms=True)
    for bits, positive in _GAUSSIAN.items()
} | {f"{bits} bits uniform": Levels(tuple(np.linspace(-1, 1, 2**bits).tolist()), of_rms=False) for bits in (1, 2, 4, 8)}

_FLIPPED = "a number midway between two levels may become either"


def _numbers(rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, error feedback, units; of magnitudes from 1e-6 to 1e6, with a block of zeros and one that is not finite."""
    keys = jax.random.split(jax.random.key(rows), 4)
    size = 10.0 ** jax.random.uniform(keys[3], (rows, 1), minval=-6, maxval=6)
    x, error = (size * jax.random.normal(key, (rows, BLOCK)) for key in keys[:2])
    x, error = x.at[0].set(0).at[-1, 3].set(jnp.nan), error.at[0].set(0)
    return x, error, jnp.exp(jax.random.normal(keys[2], x.shape))


def _pack(implementation, interpret, x, error, unit, levels):
    """The last block is not finite. `sum` is what is sent and kept over what was wanted, in units of each block's largest."""
    codes, scales, residual = pack_codes(x, error, unit, levels, implementation, interpret)
    finite = slice(0, -1)
    sent = reference.mean(codes[None, finite], scales[None, finite], levels) * unit[finite]
    wanted = (x + error)[finite]
    largest = jnp.maximum(jnp.abs(wanted).max(1, keepdims=True), reference.TINY) * unit.max()
    return {
        "codes": codes[finite], "scales": scales, "sum": (sent + residual[finite]) / largest, "zeros": residual[0],
        "not finite": residual[-1],
    }  # fmt: skip


def _pack_expected(x, error, unit, levels):
    run = jax.jit(lambda x, error, unit: _pack("reference", None, x, error, unit, levels))
    found = jax.device_get(run(x, error, unit))
    wanted = (x + error)[:-1]
    largest = jnp.maximum(jnp.abs(wanted).max(1, keepdims=True), reference.TINY) * unit.max()
    return found | {
        "sum": np.asarray(wanted / largest, np.float64),
        "zeros": np.zeros(BLOCK),
        "not finite": np.full(BLOCK, np.nan),
    }


def _mean_arguments(replicas: int, rows: int, levels: Levels) -> tuple:
    random = np.random.default_rng(rows)
    codes = random.integers(0, 256, (replicas, rows, BLOCK // 8 * levels.bits), np.uint8)
    return jnp.asarray(codes), jnp.asarray(random.standard_normal((replicas, rows)), jnp.float32), levels


def _mean(implementation, interpret, codes, scales, levels):
    return {"mean": mean_of_codes(codes, scales, levels, implementation, interpret)}


PACK = Suite(
    {
        f"{name}, {rows} blocks": Case(
            functools.partial(lambda rows, levels: (*_numbers(rows), levels), rows, levels),
            {
                "codes": Tolerance(_FLIPPED, differing=1e-3),
                "scales": Tolerance("sums and roots in float32", relative=1e-6),
                "sum": Tolerance("nothing is lost but float32's rounding", absolute=1e-6),
                "zeros": EXACT,
                "not finite": EXACT,
            },
        )
        for name, levels in LEVELS.items()
        for rows in (65, 130)
    },
    _pack,
    _pack_expected,
)
MEAN = Suite(
    {
        f"{name}, {replicas} replicas, {rows} blocks": Case(
            functools.partial(_mean_arguments, replicas, rows, levels),
            {"mean": Tolerance("sums in another order", relative=1e-5, absolute=1e-6)},
        )
        for name, levels in LEVELS.items()
        for replicas, rows in ((1, 130), (3, 65))
    },
    _mean,
)
