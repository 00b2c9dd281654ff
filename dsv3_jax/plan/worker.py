"""The process that compiles: reads a request (JSON) from stdin, writes program.txt.gz and facts.json into a directory.

A process of its own, because compilers abort, need much memory, and need environment variables set before JAX is loaded.
"""

import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3_jax.config import Config, ParallelConfig, config_from_dict
from dsv3_jax.cost.memory import bytes_by_part
from dsv3_jax.cost.topologies import devices, parse_topology
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.layout import make_layout
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.rules import check
from dsv3_jax.state.train_state import abstract_state
from dsv3_jax.training.resolve import abstract_batch, resolve_on
from dsv3_jax.training.step import make_train_step
from dsv3_jax.training.teacher import open_teacher


def _location(device: Any) -> list[Any]:
    """[slice, host, coordinates of its chip]: which links connect it to others follows from these."""
    is_tpu = device.platform == "tpu"
    return [getattr(device, "slice_index", None) or 0, device.process_index, list(device.coords) if is_tpu else [device.id]]


def compile_step(config: Config, topology: str, options: dict[str, Any], say) -> tuple[str, dict[str, Any]]:
    """(the compiled training step's HLO text, the facts that `compile.read` expects)."""
    say("describing")
    mesh = mesh_of(config.parallel, topology)
    check(config, dict(mesh.shape))
    layout = make_layout(config.parallel, mesh)
    resolved = resolve_on(config, layout, parse_topology(topology))
    config = resolved.config
    state = abstract_state(config, layout)
    say("tracing")
    began = time.perf_counter()
    teacher = open_teacher(config, layout)
    weights = () if teacher is None else teacher.weights
    lowered = make_train_step(config, layout, teacher=teacher).lower(state, abstract_batch(config, layout), *weights)
    traced = time.perf_counter() - began
    say("compiling")
    compiled = lowered.compile(compiler_options=options or None)
    seconds = time.perf_counter() - began
    say("reading")
    return compiled.as_text() or "", {
        "precision": config.precision.recipe,
        "exchange": next(iter(resolved.notes), ""),
        "seconds": {"tracing": traced, "compiling": seconds - traced},
        "state": bytes_by_part(state),
    } | facts_of(topology, mesh, compiled)


def mesh_of(config: ParallelConfig, topology: str) -> Mesh:
    """The mesh over all of a topology's devices. Raises `UserError` if some are left."""
    found = devices(parse_topology(topology))
    mesh = make_mesh(config, found)
    if mesh.size < len(found):
        raise UserError(
            f"parallel: the mesh has {mesh.size} of {topology}'s {len(found)} devices; set an axis to -1 to fill up"
        )
    return mesh


def facts_of(topology: str, mesh: Mesh, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Those of any step that `compile.read` expects."""
    memory = compiled.memory_analysis()
    return {
        "topology": topology,
        "mesh": dict(mesh.shape),
        "locations": [_location(d) for d in mesh.devices.flat],  # in the order of partitions
        "memory": {
            name: getattr(memory, f"{name}_size_in_bytes")
            for name in ("argument", "output", "temp", "alias", "generated_code")
        } | {"peak": getattr(memory, "peak_memory_in_bytes", 0)},
        "versions": {"jax": jax.__version__},
    }  # fmt: skip


def answer(compile_it: Callable[[dict[str, Any], Callable[[str], None]], tuple[str, dict[str, Any]]]) -> None:
    """Answer the request on stdin with `compile_it`(request, say): a program's text, and the facts."""
    request = json.loads(sys.stdin.read())
    out = Path(request["out"])
    try:
        text, facts = compile_it(request, lambda phase: print(phase, flush=True))
    except UserError as error:
        (out / "error.txt").write_text(str(error))
        raise SystemExit(2) from None
    with gzip.open(out / "program.txt.gz", "wt", compresslevel=3) as file:
        file.write(text)
    (out / "facts.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    answer(lambda r, say: compile_step(config_from_dict(r["config"]), r["topology"], r["options"], say))
