"""`dsv3 describe` and `dsv3 platforms`: sizes and FLOPs of a configuration, and formats of platforms, as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

from dsv3_jax.config import Config
from dsv3_jax.model.counts import cache_numbers_per_token, count_parameters, training_flops_per_token
from dsv3_jax.precision.platforms import FORMATS, Platform, platform_of, platforms
from dsv3_jax.progress import human


def _billions(parameters: int) -> str:
    """A count as papers write it: 671B, 36.6B, 3.34M."""
    return human(parameters).replace("G", "B")


_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}


def describe(config: Config, console: Console) -> None:
    """Print parameters by component, bytes by dtype, cache bytes per token and training FLOPs per token."""
    counts = count_parameters(config.model)
    depth = config.model.num_nextn_predict_layers
    table = Table("component", "parameters", "", title=f"{config.name}: parameters")
    for name, size in counts.main.items():
        table.add_row(name, f"{size:,}", f"{size / counts.total:.1%}")
    table.add_section()
    table.add_row("total", f"{counts.total:,}", _billions(counts.total))
    table.add_row("activated per token (without the embedding)", f"{counts.activated:,}", _billions(counts.activated))
    table.add_row(f"MTP modules ({depth}), without the shared embedding and head", f"{counts.mtp:,}", _billions(counts.mtp))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)

    stored = counts.total + counts.mtp
    table = Table("dtype", "weights", "latent cache per token", title="bytes (weights with MTP modules)")
    for dtype, size in _BYTES.items():
        table.add_row(dtype, human(stored * size, "B"), human(cache_numbers_per_token(config.model) * size, "B"))
    console.print(table)
    flops = training_flops_per_token(config.model, config.data.seq_len)
    step = human(flops * config.data.batch_size * config.data.seq_len, "FLOP")
    console.print(
        f"training: {human(flops, 'FLOP')} per token at sequence length {config.data.seq_len} "
        f"(forward and backward, MTP included, nothing recomputed), {step} per step"
    )


def _format(platform: Platform, format: str) -> str:
    support, peak = platform.formats.get(format, "refused"), platform.tera_ops.get(format)
    return f"{support}\n{peak:g}" if support == "native" and peak else support


def describe_platforms(device: Any, console: Console) -> None:
    """Print the formats of all platforms, which recipe `auto` takes on each and why, and what this machine's device is."""
    title = "matrix products by format; below a native one its dense peak, 10^12 operations a second a device"
    table = Table("platform", *FORMATS, "auto", title=title)
    for platform in platforms():
        table.add_row(platform.name, *(_format(platform, format) for format in FORMATS), platform.auto[0])
    console.print(table)
    for platform in platforms():
        recipe, why = platform.auto
        console.print(f"{platform.name}: {recipe}, {why}" + (f" ({platform.note})" if platform.note else ""), soft_wrap=True)
    here = platform_of(device)
    recipe, why = here.auto
    line = f"this machine: {device.device_kind}, taken as {here.name}; precision.recipe=auto is {recipe} here: {why}"
    console.print(line, soft_wrap=True)
