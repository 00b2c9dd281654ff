"""What each platform can multiply, how fast, and which recipe pays there.

A plug-in for another platform (a PJRT backend of its own) registers its operations with `pallas_kernels.register`, and then a
`Platform` here that names them: those in 8 bits as `implementation`, `causal_attention` and `logit_statistics` as `core`,
`grouped_swiglu` as `grouped_swiglu`. It calls `register` itself, or is found by the packaging entry point `dsv3_jax.platforms`,
whose object is called without arguments before the first look-up:

    [project.entry-points."dsv3_jax.platforms"]
    ascend = "my_package:register_ascend"
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import yaml

from dsv3_jax.config import Config
from dsv3_jax.errors import UserError

Support = Literal["native", "emulated", "refused"]
FORMATS = ("float32", "bf16", "e4m3", "e5m2", "int8")
_WORTH = 1.5  # times bf16's rate: quantisation, scales and promotion cost part of what 8 bits gain


@dataclass(frozen=True)
class Platform:
    """One kind of device, as JAX counts devices."""

    name: str
    pjrt: tuple[str, ...]  # what `device.platform` may say
    kind: str  # a regular expression found in `device.device_kind`
    formats: dict[str, Support]  # of matrix products, as this package would run them
    tera_ops: dict[str, float]  # dense peak, 10^12 operations a second, of formats that are native
    memory_gib: float = 0.0
    memory_tb_s: float = 0.0
    # implementations by name (pallas_kernels/registry.py): a plug-in's own, or of this package "auto", or "xla", plain JAX
    implementation: str = "auto"  # of products in 8 bits
    core: str = "xla"  # of attention and the head's cross-entropy, in 16 bits
    grouped_swiglu: str = "auto"  # of the routed experts in 16 bits
    note: str = ""

    def gain(self, format: str) -> float:
        """Times bf16's peak; 0 for what is not native or has no kernel."""
        if self.formats.get(format) != "native" or self.implementation == "xla":
            return 0.0
        return self.tera_ops[format] / self.tera_ops["bf16"]

    @property
    def auto(self) -> tuple[str, str]:
        """The recipe that `precision.recipe=auto` takes here, and why."""
        for format, recipe in (("e4m3", "deepseek"), ("int8", "int8")):
            if self.gain(format) >= _WORTH:
                slower = "" if format == "e4m3" else f"; e4m3 is {self.state_of('e4m3')}"
                return recipe, f"{format} at {self.gain(format):.1f} times bf16's peak{slower}"
        states = ", ".join(f"{format} is {self.state_of(format)}" for format in ("e4m3", "int8"))
        return "bf16", f"8 bits would not pay: {states}"

    def state_of(self, format: str) -> str:
        """How products in a format are computed here, in words."""
        support = self.formats.get(format, "refused")
        if support == "native" and self.implementation == "xla":
            return "native, without a kernel here"
        return f"native at {self.gain(format):.1f} times bf16's peak" if support == "native" else support


HARDWARE: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "hardware.yaml").read_text())


def _formats(native: Iterable[str]) -> dict[str, Support]:
    """The others are emulated: values are rounded to the format and multiplied in a wider one."""
    return {format: "native" if format in native else "emulated" for format in FORMATS}


_CPU = Platform("cpu", ("cpu",), "", _formats(["float32"]), {}, note="numerics only, never a speed claim")


def _from_hardware(name: str) -> Platform:
    facts = HARDWARE[name]
    pjrt = ("tpu",) if "ici" in facts["links"] else ("gpu", "cuda")
    optional = {key: facts[key] for key in ("implementation", "core", "note") if key in facts}
    return Platform(
        name, pjrt, facts["device_kind"], _formats(facts["tera_ops"]), facts["tera_ops"], facts["memory_gib"],
        facts["memory_tb_s"], **optional,
    )  # fmt: skip


_registered: list[Platform] = []
_looked_for_plug_ins = False


def register(platform: Platform) -> None:
    """Add a platform, or replace the one of its name; it goes before those that are built in when devices are looked up.

    Raises `UserError` for a format or a support that there is none of, a native one without its rate, and implementations whose
    operations nobody registered.
    """
    for format, support in platform.formats.items():
        if format not in FORMATS or support not in ("native", "emulated", "refused"):
            raise UserError(
                f"platform {platform.name}: formats[{format!r}]={support!r}; use one of {', '.join(FORMATS)} with native, "
                f"emulated or refused"
            )
    if not isinstance(platform.pjrt, tuple):
        raise UserError(f"platform {platform.name}: pjrt={platform.pjrt!r}; use a tuple of names, such as ('tpu',)")
    try:
        re.compile(platform.kind)
    except re.error as error:
        raise UserError(f"platform {platform.name}: kind={platform.kind!r} is no regular expression: {error}") from None
    needed = {"bf16"} if any(platform.formats.get(f) == "native" for f in FORMATS if f != "float32") else set()
    native = [f for f in ("bf16", "e4m3", "int8") if platform.formats.get(f) == "native" or f in needed]
    missing = [f for f in native if platform.tera_ops.get(f, 0) <= 0]
    if missing:
        raise UserError(f"platform {platform.name}: tera_ops[{missing[0]!r}] must say its peak, in 10^12 a second")
    _require_operations(platform)
    _registered[:] = [platform, *(p for p in _registered if p.name != platform.name)]


def _require_operations(platform: Platform) -> None:
    from pallas_kernels import registry  # loads JAX, which describing platforms does without

    operations = {"implementation": registry.EIGHT_BIT, "core": registry.CORE, "grouped_swiglu": registry.EXPERTS}
    for field, needed in operations.items():
        name = getattr(platform, field)
        if name != "auto" and (missing := registry.missing(needed, name)):
            raise UserError(
                f"platform {platform.name}: {field}={name!r} has no {', '.join(missing)}; register each with "
                f"pallas_kernels.register(operation, {name!r}, function) before the platform, or use 'auto' or 'xla'"
            )


def platforms() -> list[Platform]:
    """All known ones, plug-ins first."""
    global _looked_for_plug_ins
    if not _looked_for_plug_ins:
        _looked_for_plug_ins = True
        for plug_in in entry_points(group="dsv3_jax.platforms"):
            plug_in.load()()
    built_in = [_CPU, *(_from_hardware(name) for name, facts in HARDWARE.items() if "device_kind" in facts)]
    names = {p.name for p in _registered}
    return [*_registered, *(p for p in built_in if p.name not in names)]


def platform_of(device: Any) -> Platform:
    """The platform of a JAX device. An unknown one gets plain JAX for every format, and bf16."""
    for platform in platforms():
        if device.platform in platform.pjrt and re.search(platform.kind, device.device_kind):
            return platform
    note = "unknown: 8 bits run as plain JAX; see dsv3_jax/precision/platforms.py to register it"
    return Platform(device.device_kind, (device.platform,), "", _formats(["bf16"]), {}, implementation="xla", note=note)


def resolve(config: Config, device: Any) -> Config:
    """The configuration with `precision.recipe=auto` replaced by what it means on this device."""
    if config.precision.recipe != "auto":
        return config
    recipe, _ = platform_of(device).auto
    return replace(config, precision=replace(config.precision, recipe=recipe))
