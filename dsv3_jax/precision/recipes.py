"""Which products run in which format: a recipe is data.

Embedding, head, cross-entropy, router, norms, the attention core and the MTP projection take the activations' dtype (the router
float32) in every recipe; master weights and their gradients' sums are float32. Op classes: `attention`, MLA's projections;
`ffn`, dense layers and shared experts; `experts`, the routed ones.
"""

from dataclasses import dataclass, replace

from dsv3_jax.config import PrecisionConfig
from dsv3_jax.errors import UserError
from pallas_kernels.scaled import Gemms


@dataclass(frozen=True)
class Recipe:
    """`dtype` is that of activations and of every product without formats of its own, `moments` that of Adam's stored moments.

    An op class with formats of its own keeps its inputs for the backward pass in its `forward` format.
    """

    dtype: str
    moments: str = "float32"
    attention: Gemms | None = None
    ffn: Gemms | None = None
    experts: Gemms | None = None
    controlled: bool = False  # every layer's products can go back to `dtype` (see controller.py)
    # implementations (pallas_kernels/registry.py), set by `run_by`: of attention and the head's cross-entropy, and of routed
    # experts that have no formats of their own
    core: str = "xla"
    grouped_swiglu: str = "auto"


_E4M3 = Gemms()
_INT8 = Gemms("int8", "int8", "int8")
_PER_TENSOR = Gemms(per_tensor=True)

RECIPES = {
    "float32": Recipe("float32"),
    "bf16": Recipe("bfloat16"),
    # arXiv 2412.19437, section 3.3: e4m3 in all three products, which scales for 128 numbers allow; moments in bfloat16
    "deepseek": Recipe("bfloat16", "bfloat16", attention=_E4M3, ffn=_E4M3, experts=_E4M3),
    "article": Recipe("bfloat16", ffn=_E4M3, experts=_E4M3),  # attention stays in 16 bits
    "int8": Recipe("bfloat16", attention=_INT8, ffn=_INT8, experts=_INT8),
    "fp8_per_tensor": Recipe("bfloat16", attention=_PER_TENSOR, ffn=_PER_TENSOR, experts=_PER_TENSOR),  # the control
}


def recipe_of(config: PrecisionConfig) -> Recipe:
    """The recipe of training after the `first_steps`. Raises `UserError` for `auto`, which the start of a run resolves."""
    if config.recipe not in RECIPES:
        raise UserError(f"precision.recipe={config.recipe} depends on the platform: see precision.platforms.resolve")
    return replace(RECIPES[config.recipe], controlled=config.controller)


def run_by(recipe: Recipe, implementation: str, core: str, grouped_swiglu: str = "auto") -> Recipe:
    """The recipe with its products in 8 bits, its core in 16, and its experts in 16 or 32 run by these implementations."""

    def by(gemms: Gemms | None) -> Gemms | None:
        return gemms and replace(gemms, implementation=implementation)

    core = core if recipe.dtype == "bfloat16" else "xla"
    formats = {name: by(getattr(recipe, name)) for name in ("attention", "ffn", "experts")}
    return replace(recipe, **formats, core=core, grouped_swiglu=grouped_swiglu)


def unquantised(recipe: Recipe) -> Recipe:
    """The recipe of evaluation and decoding: the same weights, in 16 or 32 bits."""
    return Recipe(recipe.dtype, core=recipe.core, grouped_swiglu=recipe.grouped_swiglu)
