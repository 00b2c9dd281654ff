"""The process that compiles an engine's step (see `worker.py`): of shapes only, there are no weights."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import Config, config_from_dict
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.layout import make_layout
from dsv3_jax.plan.worker import answer, facts_of, mesh_of
from dsv3_jax.precision.recipes import recipe_of, unquantised
from dsv3_jax.serve.attend import PAGE, table_width
from dsv3_jax.serve.decoder import abstractly_apart
from dsv3_jax.serve.programs import Shape, empty_slots, flattened, lower
from dsv3_jax.serve.step import BEYOND


def lower_abstractly(
    config: Config, layout: Any, shape: Shape, slots: int, context: int
) -> tuple[jax.stages.Lowered, dict[str, int]]:
    """(the step that an engine on `layout` would compile, bytes on a device of its weights, the MTP module's and its cache)."""
    recipe = unquantised(recipe_of(config.precision))
    model = nnx.eval_shape(lambda: Transformer(config.model, recipe=recipe, layout=layout.serving, rngs=nnx.Rngs(0)))
    graph, state = abstractly_apart(model)
    weights, decoder = flattened(graph, state)
    where = layout.serving.decoding
    devices = where.shards("cache_batch")
    pages = devices * (-(-slots * context // (PAGE * devices)) + 1)
    cache = jax.eval_shape(lambda weights: decoder(weights).empty_pages(pages), weights)
    running, settings = jax.eval_shape(lambda: empty_slots(slots, context + BEYOND, config.model.vocab_size))
    rows = jax.ShapeDtypeStruct((shape.sequences, 3 + table_width(context)), jnp.int32)
    sizes = {
        "weights": sum(map(_bytes, weights)),
        "mtp": sum(map(_bytes, jax.tree.leaves(state["mtp"]))) if "mtp" in state else 0,
        "cache": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)) // devices,
    }
    return lower(where, decoder, shape, weights, cache, running, settings, rows), sizes


def _bytes(w: jax.ShapeDtypeStruct) -> int:
    return jax.ShapeDtypeStruct(w.sharding.shard_shape(w.shape), w.dtype).size * w.dtype.itemsize


def compile_serving(request: dict[str, Any], say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    config, topology = config_from_dict(request["config"]), request["topology"]
    say("describing")
    mesh = mesh_of(config.parallel, topology)
    say("tracing")
    began = time.perf_counter()
    layout = make_layout(config.parallel, mesh)
    lowered, sizes = lower_abstractly(config, layout, Shape(**request["shape"]), request["slots"], request["context"])
    traced = time.perf_counter() - began
    say("compiling")
    compiled = lowered.compile(compiler_options=request["options"] or None)
    seconds = time.perf_counter() - began
    say("reading")
    return compiled.as_text() or "", {
        "precision": config.precision.recipe,
        "exchange": "",
        "seconds": {"tracing": traced, "compiling": seconds - traced},
        "state": sizes,
    } | facts_of(topology, mesh, compiled)


if __name__ == "__main__":
    answer(compile_serving)
