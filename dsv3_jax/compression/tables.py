"""`dsv3 compress --list` and `--plan`: what they print."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv3_jax.compression.plan import FACTORISATION, STEP_S, CompressionPlan, plan_compression
from dsv3_jax.compression.profile import known_profiles, load_profile
from dsv3_jax.compression.sizes import (
    Size,
    compressed_size,
    decode_rate,
    fp8_bytes,
    kv_b_plain,
    plain_bytes,
    profile_bytes,
    size_of,
)  # fmt: skip
from dsv3_jax.compression.targets import known_targets
from dsv3_jax.config import Config, load_config
from dsv3_jax.cost.efficiency import ASSUMED
from dsv3_jax.cost.topologies import GIB, parse_topology
from dsv3_jax.errors import UserError


def list_profiles(console: Console) -> None:
    """Print all profiles and what they are for; targets with their memory's bandwidth."""
    targets = known_targets()
    table = Table("profile", "what it does", title="profiles of dsv3 compress")
    for name, fields in known_profiles().items():
        if name not in targets:
            table.add_row(name, fields["about"])
    console.print(table)
    table = Table("profile", "for", "memory, GB/s", title="profiles for edge devices")
    for target in targets.values():
        table.add_row(target.name, target.about, "\n".join(f"{gb_s:g} {device}" for device, gb_s in target.memory.items()))
    console.print(table)
    for target in targets.values():
        if target.leaves:
            console.print(f"{target.name}: {' '.join(target.leaves.split())}", soft_wrap=True)


def config_of(config_or_run: Path) -> Config:
    """The configuration of a YAML file, a run or a checkpoint. Raises `UserError` if it is none of them."""
    if config_or_run.suffix in (".yaml", ".yml"):
        return load_config(config_or_run)
    from dsv3_jax.checkpoint.load import open_checkpoint

    return open_checkpoint(config_or_run).config


def show_plan(
    config_or_run: Path, profile: str, overrides: Iterable[str], topology: str, gb_s: float | None, console: Console
) -> None:
    """Print what compressing takes on a topology, and the sizes of the result beside those of all other profiles.

    Args:
        config_or_run: A configuration, or what has one; its weights are not read.
        profile: A profile's name.
        overrides: `key=value` for the profile.
        topology: As `dsv3 plan` names them.
        gb_s: Bandwidth, in 10^9 bytes a second, for decode rates; that of a target's first device if not given.

    Raises:
        UserError: One of the arguments is not valid, or the profile does not fit the model.
    """
    if gb_s is not None and not 0 < gb_s < math.inf:
        raise UserError(f"--bandwidth={gb_s:g} must be a positive number of GB/s")
    checked, where, target = load_profile(profile, overrides), parse_topology(topology), known_targets().get(profile)
    config = config_of(config_or_run)
    _show_work(config, profile, plan_compression(config, checked, where), console)
    if checked.prune.fraction:
        console.print("not counted: judging experts, their refit, and the original's run beside the compressed model")
    device, given = ("--bandwidth", gb_s) if gb_s is not None or target is None else target.device
    _show_sizes(config, checked, given, console)
    if given is not None:
        console.print(
            f"tokens/s: {given:g} GB/s ({device}) over what a token of one sequence reads: a prediction, an upper bound",
            soft_wrap=True,
        )
    console.print(
        "main model, without its MTP modules (their size beside it); read: weights that decoding a token reads, without the "
        "embedding's row; kv_b in 16 bits: as vLLM keeps it",
        soft_wrap=True,
    )


def _show_work(config: Config, profile: str, plan: CompressionPlan, console: Console) -> None:
    table = Table("on the first device", "GiB", title=f"{config.name}, profile {profile}, on {plan.topology}: memory")
    for what, size in plan.memory_first.items():
        table.add_row(what, f"{size / GIB:.3g}")
    total, room = sum(plan.memory_first.values()), plan.topology.room
    table.add_section()
    table.add_row("together", f"{total / GIB:.3g}")
    table.add_row("each other device", f"{plan.memory_others / GIB:.3g}")
    console.print(table)
    says = "fits" if plan.fits else "does not fit"
    console.print(f"{says}: {plan.topology.kind} has {room / GIB:.3g} GiB a device, the first needs {total / GIB:.3g}")
    table = Table("work", "FLOP", "seconds", title=f"work; routed experts on {plan.devices} devices, the rest on one")
    for what, seconds in plan.seconds.items():
        flops = plan.first.flops[what] + plan.spread.flops[what] if what in plan.first.flops else 0
        table.add_row(what, f"{flops:.2e}" if flops else "", f"{seconds:.3g}")
    table.add_section()
    table.add_row("together", "", _duration(sum(plan.seconds.values())))
    console.print(table)
    steps = plan.first.steps + plan.spread.steps
    console.print(
        f"calibration: {plan.tokens:,} tokens, {plan.tokens_per_expert:,.0f} an expert in the mean\n"
        f"assumed, not measured: {ASSUMED.matmul:.0%} of the float32 peak for products, {FACTORISATION:.0%} of that for "
        f"factorisations, {ASSUMED.memory:.0%} of the memory's; {steps:,} inputs are rounded one after the other, "
        f"{STEP_S * 1e6:g} us each. Reading and writing checkpoints comes on top.",
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 360 else f"{seconds:.3g}"


def _show_sizes(config: Config, checked: Any, gb_s: float | None, console: Console) -> None:
    model = config.model
    bf16, fp8 = size_of(model, plain_bytes), size_of(model, fp8_bytes)
    rows: dict[str, Size | str] = {
        "bf16": bf16,
        "fp8, as released": fp8,
        f"this: {checked.name}": compressed_size(model, checked),
        "  kv_b in 16 bits": size_of(model, kv_b_plain(profile_bytes(checked))),
    }
    if checked.prune.fraction:
        del rows["  kv_b in 16 bits"]
    for name in known_profiles():
        if name != checked.name:
            rows[name] = _size_or_reason(config, name)
    columns = ["profile", "GB", "bf16/", "MTP", "read", "bf16/", "fp8/", *(["tokens/s"] if gb_s else [])]
    table = Table(*columns, title="sizes, and what decoding a token reads, GB")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, size in rows.items():
        if isinstance(size, str):
            table.add_row(name, *["-"] * (len(columns) - 1))
            continue
        figures = _gb(size.main), f"{bf16.main / size.main:.2f}", _gb(size.mtp), _gb(size.read)
        rate = (f"{decode_rate(size, gb_s):.3g}",) if gb_s else ()
        table.add_row(name, *figures, f"{bf16.read / size.read:.2f}", f"{fp8.read / size.read:.2f}", *rate)
    console.print(table)
    for name, size in rows.items():
        if isinstance(size, str):
            console.print(f"{name}: {size}", soft_wrap=True)


def _gb(size: float) -> str:
    """10^9 bytes with three digits, or all before the point."""
    return f"{size / 1e9:,.0f}" if size >= 1e11 else f"{size / 1e9:.3g}"


def _size_or_reason(config: Config, name: str) -> Size | str:
    """The sizes by a profile, or why the model cannot have it."""
    profile = load_profile(name)
    try:
        profile.check_fits(config.model)
    except UserError as error:
        return str(error)
    return compressed_size(config.model, profile)
