"""Cases of `quantize` and `quantize_transposed`. Values and scales equal the definition's bit for bit."""

import functools

import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.measure import EXACT, Case, Suite, normal
from pallas_kernels.quantize import reference
from pallas_kernels.scaled import DTYPES, Format

# full tiles, edges on both sides, less than one tile, wide; and whether scales are powers of two
SHAPES = {(256, 512): False, (100, 130): True, (3, 40): False, (129, 896): True}
_BOTH = {"values": EXACT, "scales": EXACT}


def _results(operation, implementation, interpret, *arguments):
    found = registry.run(operation, implementation, arguments, interpret)
    return {"values": found.values, "scales": found.scales}


def _quantize_cases() -> dict[str, Case]:
    def arguments(shape, rows, format, power_of_two):
        return normal(2, *shape, dtype=jnp.bfloat16), rows, format, power_of_two

    return {
        f"{format} {rows}x128 {shape[0]}x{shape[1]}": Case(
            functools.partial(arguments, shape, rows, format, power_of_two), _BOTH
        )
        for format in DTYPES
        for rows in (1, 128)
        for shape, power_of_two in SHAPES.items()
    }


def sources(shape: tuple[int, int], format: Format) -> dict:
    """Matrices to quantise transposed: numbers of 16 and 32 bits, and tiles along the other axis, of e4m3 too."""
    x = normal(2, *shape, dtype=jnp.bfloat16)
    return {
        "bfloat16": x,
        "float32": x.astype(jnp.float32) / 3,
        "tiles": reference.quantize(x, 1, format, False),
        "e4m3 tiles": reference.quantize(x, 1, "e4m3", True),
    }


def _transposed_cases() -> dict[str, Case]:
    def arguments(shape, source, format, power_of_two):
        return sources(shape, format)[source], format, power_of_two

    return {
        f"{format} from {source} {shape[0]}x{shape[1]}": Case(
            functools.partial(arguments, shape, source, format, power_of_two), _BOTH
        )
        for format in DTYPES
        for source in ("bfloat16", "float32", "tiles", "e4m3 tiles")
        for shape, power_of_two in SHAPES.items()
    }


QUANTIZE = Suite(_quantize_cases(), functools.partial(_results, "quantize"))
TRANSPOSED = Suite(_transposed_cases(), functools.partial(_results, "quantize_transposed"))
