"""Edge devices as compression profiles: what their programs multiply fast, and their memory. Data (targets.yaml)."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dsv3_jax.yaml_reader import parse_yaml


@dataclass(frozen=True)
class Target:
    """A kind of device; the fields are explained at the head of targets.yaml."""

    name: str
    about: str
    profile: Mapping[str, Any]
    why: Mapping[str, str]
    memory: Mapping[str, float]
    sources: str
    leaves: str = ""
    march: str = ""

    @property
    def device(self) -> tuple[str, float]:
        """The device that plans take, and its memory's GB/s."""
        return next(iter(self.memory.items()))


@functools.cache
def known_targets() -> dict[str, Target]:
    """What targets.yaml has, by name."""
    file = resources.files("dsv3_jax.compression") / "targets.yaml"
    entries: Any = parse_yaml(file.read_text(), "targets.yaml")
    return {name: Target(name, **entry) for name, entry in entries.items()}
