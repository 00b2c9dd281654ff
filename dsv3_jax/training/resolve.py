"""From the configuration as the user wrote it to what runs on the devices that there are."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.cost.compression import resolve_compression
from dsv3_jax.cost.feasible import fit_to_devices
from dsv3_jax.cost.topologies import Topology, topology_of
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.parallel.mesh import axis_sizes
from dsv3_jax.precision import platforms
from dsv3_jax.precision.recipes import RECIPES, Recipe
from dsv3_jax.state.programs import ProgramStore, compiled_dir
from dsv3_jax.state.train_state import abstract_state, init_program
from dsv3_jax.training.pipelined import schedule_of
from dsv3_jax.training.step import ScheduledSteps, training_recipe
from dsv3_jax.training.teacher import open_teacher


@dataclass(frozen=True)
class Resolved:
    """A configuration whose every choice has been made for a set of devices. Everything after it takes this."""

    asked: Config  # as the user wrote it
    config: Config  # without `auto`
    layout: Layout
    recipe: Recipe  # of the steps after `precision.first_steps`, run by the kernels that the devices have
    notes: tuple[str, ...]  # lines that a person should know at the start


def resolve_on(config: Config, layout: Layout, topology: Topology | None) -> Resolved:
    """Decide what `auto` means on a layout's devices; `topology` is that of their links, None if it is not known.

    The note says why gradients cross `data` as they do. There is none if `parallel.compress` asks for nothing.
    """
    chosen = platforms.resolve(config, layout.device)
    chosen, why = resolve_compression(chosen, topology, axis_sizes(chosen.parallel, layout.size))
    return Resolved(config, chosen, layout, training_recipe(chosen, layout), (why,) if why else ())


def resolve_for_devices(config: Config, elastic: bool = False, began_with: str = "") -> Resolved:
    """Resolve a configuration for the devices of this run.

    Args:
        config: As the user wrote it.
        elastic: Take all devices, on the mesh that comes nearest to the configuration's.
        began_with: The recipe that `precision.recipe=auto` meant when the run began, which it keeps; '' for a fresh start.

    Raises:
        UserError: The mesh does not fit the devices or the model.
    """
    placed = fit_to_devices(config, jax.device_count()) if elastic else config
    layout = layout_for(placed)
    found = resolve_on(_with_recipe(placed, began_with), layout, topology_of(layout.devices))
    notes = [
        *_about_mesh(found.config, layout),
        *_about_recipe(config, found),
        *about_formats(found.config, layout.device),
        *found.notes,
    ]
    return replace(found, asked=config, notes=tuple(notes))


def _with_recipe(config: Config, began_with: str) -> Config:
    if config.precision.recipe != "auto" or not began_with:
        return config
    return replace(config, precision=replace(config.precision, recipe=began_with))  # type: ignore[arg-type]


def _about_recipe(asked: Config, found: Resolved) -> list[str]:
    taken, here = found.config.precision.recipe, platforms.resolve(asked, found.layout.device).precision.recipe
    return [] if taken == here else [f"precision.recipe=auto: {taken}, as the run began; a new run would take {here} here"]


def about_formats(config: Config, device: Any) -> list[str]:
    """Lines about the recipes of a run whose 8-bit products a device has no arithmetic or no kernel for."""
    platform, precision = platforms.platform_of(device), config.precision
    auto, lines = platform.auto[0], []
    for name in dict.fromkeys([precision.first_recipe] * bool(precision.first_steps) + [precision.recipe]):
        recipe = RECIPES[name]
        gemms = [g for g in (recipe.attention, recipe.ffn, recipe.experts) if g]
        formats = dict.fromkeys(format for g in gemms for format in (g.forward, g.dgrad, g.wgrad))
        if slow := [f"{format} is {platform.state_of(format)}" for format in formats if not platform.gain(format)]:
            lines.append(
                f"precision.recipe={name}: on {platform.name} {', '.join(slow)}: the numbers of 8 bits, not their speed; "
                f"precision.recipe=auto takes {auto} here"
            )
    return lines


def _about_mesh(config: Config, layout: Layout) -> list[str]:
    unused = len(jax.devices()) - layout.size
    lines = []
    if layout.size > 1:
        axes = " x ".join(f"{axis} {size}" for axis, size in layout.axis_sizes.items())
        lines.append(f"{layout.size} devices in {jax.process_count()} process(es): {axes}")
    if layout.stages > 1:
        schedule = schedule_of(config, layout.stages)
        lines.append(
            f"pipeline {schedule.name}: {schedule.stages} stages, {schedule.chunks} chunk(s) each, "
            f"{schedule.microbatches} microbatches (train.grad_accum_steps): occupancy {schedule.occupancy:.1%}"
        )
    if unused:
        lines.append(f"{unused} of {len(jax.devices())} devices are not used; parallel.fsdp=-1 would use them all")
    return lines


def tokens_ahead(config: Config) -> int:
    """How many tokens beyond a window its targets need: one for the next token and one for each MTP depth."""
    return 1 + config.model.num_nextn_predict_layers


def abstract_batch(config: Config, layout: Layout) -> Batch:
    """Shapes, dtypes and sharding of a training batch; allocates nothing."""
    shape = config.data.batch_size, config.data.seq_len + tokens_ahead(config)
    rows = jax.ShapeDtypeStruct(shape, np.int32, sharding=layout.batch_sharding)
    return Batch(rows, rows)


def program_store(resolved: Resolved) -> ProgramStore:
    """The programs on disk of this configuration and these devices."""
    layout = resolved.layout
    return ProgramStore(compiled_dir(), resolved.config, layout.axis_sizes, layout.devices)


def compile_only(config: Config, elastic: bool) -> None:
    """Compile a run's steps for the devices that there are, and keep them for a run on as many. Raises `UserError`."""
    resolved = resolve_for_devices(config, elastic)
    config, layout, programs = resolved.config, resolved.layout, program_store(resolved)
    programs("init", init_program(config, layout))
    teacher, state = open_teacher(config, layout), abstract_state(config, layout)
    steps = ScheduledSteps(config, layout, programs, teacher)
    for step in steps.first_of_kinds():
        steps.program(step, state, abstract_batch(config, layout))
