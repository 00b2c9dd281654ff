"""Compression profiles: which numbers each part of a model gets. A profile is data (profiles.yaml, targets.yaml)."""

import copy
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import pydantic

from dsv3_jax.checks import require, shortened
from dsv3_jax.compression.calibration import CalibrationConfig
from dsv3_jax.compression.held_out import MeasureConfig
from dsv3_jax.compression.prune import PruneConfig, kept_experts
from dsv3_jax.compression.targets import known_targets
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_tensors import examples
from dsv3_jax.yaml_reader import parse_yaml
from pallas_kernels.integer_weight import BITS, IntegerFormat

GATE_UP, DOWN = "ffn/w_gate_up_ED2M", "ffn/w_down_EMD"  # names of routed experts' weights end so
E4M3: Literal["e4m3"] = "e4m3"  # 8-bit floats with a scale for each 128 x 128 of them: see fp8.py
type Format = IntegerFormat | Literal["e4m3"] | None  # None: as it is

_STRICT = pydantic.ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Profile:
    """Formats, the method that finds the codes, and what it looks at."""

    __pydantic_config__ = _STRICT
    name: str
    about: str = ""
    linears: IntegerFormat | Literal["e4m3"] | None = None  # projections, dense layers, shared experts; null: as they are
    experts: IntegerFormat | Literal["e4m3"] | None = None  # routed experts; null: as they are
    method: Literal["gptq", "round"] = "gptq"  # round: each weight to the nearest number, without a look at inputs
    damping: float = 0.01  # added to the diagonal of the inputs' moments, in units of its mean
    prune: PruneConfig = field(default_factory=PruneConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        for part in ("linears", "experts"):
            if isinstance(format := getattr(self, part), IntegerFormat):
                require(format.bits in BITS, f"{part}.bits={format.bits}; use one of {', '.join(map(str, BITS))}")
                require(format.group >= 8, f"{part}.group={format.group} must be at least 8")
        require(0 < self.damping < 100, f"damping={self.damping} must be positive and below 100")
        for key in ("tokens", "batch"):
            require(getattr(self.calibration, key) > 0, f"calibration.{key}={getattr(self.calibration, key)} must be positive")
        require(self.measure.tokens >= 0, f"measure.tokens={self.measure.tokens} must be at least 0, which measures nothing")
        require(
            self.measure.path is None or self.measure.path != self.calibration.path,
            f"measure.path={self.measure.path} is what calibration reads; give text that it does not see",
        )

    def check_fits(self, config: ModelConfig) -> None:
        """Raise `UserError` for a group that does not divide a linear layer's inputs, and experts that cannot be dropped."""
        kept_experts(config, self.prune.fraction)
        floats = E4M3 in (self.linears, self.experts)
        require(
            not (floats and self.prune.fraction), f"prune.fraction={self.prune.fraction:g} goes with integers, not with e4m3"
        )
        for s in examples(config).values():
            format = self.integer_format_of(s.array) if s.is_fp8 else None
            if format is None or s.shape[1] % format.of(s.shape[1]).group == 0:
                continue
            part = "experts" if ".mlp.experts." in s.tensor else "linears"
            fitting = [g for g in (128, 64, 32, 16, 8) if s.shape[1] % g == 0]
            raise UserError(
                f"{part}.group={format.group} does not divide the {s.shape[1]} inputs of {s.tensor}; "
                f"use {' or '.join(map(str, fitting)) or 'a divisor'}"
            )

    def format_of(self, array: str) -> Format:
        """The format of a linear layer's weight by its name in the model."""
        return self.experts if is_routed(array) else self.linears

    def integer_format_of(self, array: str) -> IntegerFormat | None:
        """`format_of` where that is one of integers."""
        found = self.format_of(array)
        return found if isinstance(found, IntegerFormat) else None


def is_routed(array: str) -> bool:
    """Whether an array of the model holds weights of routed experts."""
    return array.endswith((GATE_UP, DOWN))


def known_profiles() -> dict[str, dict[str, Any]]:
    """The fields of each profile by its name: those of profiles.yaml, then a target's each."""
    file = resources.files("dsv3_jax.compression") / "profiles.yaml"
    named: dict[str, dict[str, Any]] = parse_yaml(file.read_text(), "profiles.yaml")  # type: ignore[assignment]
    return named | {t.name: {"about": t.about, **copy.deepcopy(t.profile)} for t in known_targets().values()}


def load_profile(name: str, overrides: Iterable[str] = ()) -> Profile:
    """A named profile with `key=value` overrides, such as experts.bits=2 or calibration.tokens=8192.

    Raises `UserError` for a name, key or value that is not valid.
    """
    known = known_profiles()
    if name not in known:
        raise UserError(f"profile {shortened(name)} is unknown; use one of {', '.join(known)}")
    raw: dict[str, Any] = {"name": name, **known[name]}
    for override in overrides:
        key, equals, value = override.partition("=")
        *sections, leaf = key.split(".")
        if not equals or not leaf or len(sections) > 1:
            raise UserError(f"override {shortened(override)} is not key=value, e.g. experts.bits=2")
        into = raw if not sections else raw.setdefault(sections[0], {})
        if not isinstance(into, dict):
            into = raw[sections[0]] = {}
        into[leaf] = value if key in ("calibration.path", "measure.path") else parse_yaml(value, override)
    try:
        return pydantic.TypeAdapter(Profile).validate_json(json.dumps(raw))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        valid = ", ".join(f.name for f in dataclasses.fields(Profile) if f.name not in ("name", "about"))
        raise UserError(f"profile {name}: {key}={shortened(first['input'])}: {first['msg']}; keys are {valid}") from None
