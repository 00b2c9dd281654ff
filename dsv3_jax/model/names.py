"""Names of a tree's arrays: the keys on the way to each, joined by slashes, such as moe_blocks/attention/w_o_HUD."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx


def leaves_by_name(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """{name: leaf}, in the tree's own order."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def variables_by_name(state: nnx.State) -> dict[str, nnx.Variable]:
    """A model's variables, with their metadata; a name ends at the variable."""
    return leaves_by_name(state, lambda x: isinstance(x, nnx.Variable))


def tree_from_names(template: Any, leaves: Mapping[str, Any]) -> Any:
    """The inverse of `leaves_by_name`: a tree with the structure of `template`."""
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in leaves_by_name(template)])
