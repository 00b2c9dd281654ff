"""One suite of cases for every implementation of an operation: this package's tests, a plug-in's, and bench_device run it.

    pallas_kernels.register("quantize", "mychip", my_quantize)
    pallas_kernels.testing.check("quantize", "mychip")

The cases of an operation are in its folder's `cases`: sizes that fill tiles and sizes that do not, every format, empty groups,
numbers that are not finite. They are small, so that kernels can be interpreted.
"""

from collections.abc import Collection
from typing import Any

import jax

from pallas_kernels import registry
from pallas_kernels.causal_attention.cases import ATTENTION
from pallas_kernels.errors import Unavailable
from pallas_kernels.gradient_codes.cases import MEAN, PACK
from pallas_kernels.grouped_swiglu.cases import GROUPED_SWIGLU
from pallas_kernels.integer_linear.cases import EXPERTS, LINEAR
from pallas_kernels.linear_cross_entropy.cases import LOGIT_STATISTICS
from pallas_kernels.measure import Suite, compare
from pallas_kernels.quantize.cases import QUANTIZE, TRANSPOSED
from pallas_kernels.scaled_matmul.cases import GROUPED, PRODUCT, WGRAD
from pallas_kernels.swiglu_quantize.cases import BACKWARD, FORWARD

SUITES: dict[str, Suite] = {
    "quantize": QUANTIZE, "quantize_transposed": TRANSPOSED, "swiglu_quantize": FORWARD, "swiglu_backward": BACKWARD,
    "scaled_matmul": PRODUCT, "grouped_scaled_matmul": GROUPED, "grouped_scaled_wgrad": WGRAD, "causal_attention": ATTENTION,
    "logit_statistics": LOGIT_STATISTICS, "grouped_swiglu": GROUPED_SWIGLU, "pack_codes": PACK, "mean_of_codes": MEAN,
    "integer_linear": LINEAR, "integer_experts": EXPERTS,
}  # fmt: skip


def check(operation: str, implementation: str, interpret: Any = None, only: Collection[str] = ()) -> list[str]:
    """Hold an implementation to the operation's definition, in all cases or those named in `only`.

    `interpret` goes to the kernel. Returns the names of the cases that the implementation refused by `Unavailable`. Raises
    `AssertionError` with the case, the result and its worst number where one is beyond its tolerance, and where an
    implementation refuses every case; `ValueError` for a name that there is none of.
    """
    suite = SUITES[operation]
    if unknown := set(only) - set(suite.cases):
        raise ValueError(f"{operation} has no case {', '.join(sorted(unknown))}; use some of {', '.join(suite.cases)}")
    cases = {name: case for name, case in suite.cases.items() if not only or name in only}
    refused = []
    for name, case in cases.items():
        arguments = case.arguments()
        try:
            found = _results(suite, implementation, interpret, arguments)
        except Unavailable:
            refused.append(name)
            continue
        expected = suite.expected(*arguments) if suite.expected else _results(suite, "reference", None, arguments)
        compare(f"{operation} by {implementation}, case {name!r}", found, expected, case.tolerances)
    assert len(refused) < len(cases), f"{operation} by {implementation}: it takes none of the cases {', '.join(cases)}"
    return refused


def _results(suite: Suite, implementation: str, interpret: Any, arguments: tuple) -> dict[str, Any]:
    arrays, fill = registry.split_arrays(arguments)
    return jax.device_get(jax.jit(lambda *arrays: suite.results(implementation, interpret, *fill(arrays)))(*arrays))
