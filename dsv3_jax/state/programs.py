"""Compiled steps, kept on disk, so that a run that starts again neither traces nor compiles.

JAX's own cache does neither: it still traces, and of several CPU processes only the first finds what it has compiled. A program
is kept under everything that it follows from: this package's source and that of plug-ins, JAX and what else traces it, the
platform, the machine, the configuration, the mesh, the process. The files are the user's own (loading one runs code, as with
JAX's cache), so they are never in a run's directory, which may come from elsewhere.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import pickle
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import optax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.backend import get_backend
from jax.stages import Compiled

from dsv3_jax.config import Config, config_to_dict
from dsv3_jax.files import user_cache, write_atomically
from dsv3_jax.precision.platforms import platform_of
from pallas_kernels import registry

_IRRELEVANT = ("name", "checkpoint")  # keys of the configuration that no program depends on
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")


def compiled_dir() -> Path:
    """DSV3_COMPILED_DIR, which hosts had best share, or a directory in the user's cache."""
    return Path(os.environ.get("DSV3_COMPILED_DIR") or user_cache() / "compiled")


_TRACING = (jax, jaxlib, flax, optax)  # packages whose versions decide what a step's program is
_OURS = ("dsv3_jax", "pallas_kernels")


@functools.cache
def _digest_of(sources: tuple[Path, ...]) -> str:
    """The digest of these files and of the Python files under these folders."""
    files = [file for path in sources for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _source() -> str:
    """The digest of the source of this package and the kernels."""
    root = Path(__file__).parents[2]
    return _digest_of(tuple(root / package for package in _OURS))


def _plug_ins() -> list[str]:
    """The digests of the packages that registered kernels of their own."""
    modules = {inspect.unwrap(getattr(function, "func", function)).__module__ for function in registry.registered()}
    digests = []
    for module in sorted(modules):
        package = sys.modules.get(module.partition(".")[0])
        file = getattr(sys.modules.get(module), "__file__", None)
        if module.partition(".")[0] not in _OURS and package is not None and file is not None:
            # a package in folders, or a single file
            digests.append(_digest_of(tuple(Path(folder) for folder in getattr(package, "__path__", [file]))))
    return digests


def _machine() -> str:
    """What programs are compiled for: a kind of accelerator, or a CPU's instruction set."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


type Programs = Callable[..., Compiled]  # (name, jitted function, *its arguments, which may be abstract) -> its program


def compiled_now(_name: str, jitted: Any, *args: Any) -> Compiled:
    """`Programs` without a store: compiles, and keeps nothing."""
    return jitted.lower(*args).compile()


@contextlib.contextmanager
def without_jax_cache() -> Iterator[None]:
    """Compile without JAX's cache: what it gives for a CPU loses functions when it is serialised again."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX asks once whether it is enabled
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


@dataclass(frozen=True)
class ProgramStore:
    """`Programs` of one configuration and mesh, kept in a directory."""

    directory: Path
    config: Config
    mesh: dict[str, int]
    devices: tuple[Any, ...]

    def _file(self, name: str) -> Path:
        config = {k: v for k, v in config_to_dict(self.config).items() if k not in _IRRELEVANT}
        config["train"] = {k: v for k, v in config["train"].items() if k != "steps"}
        backend = get_backend().platform_version
        facts = [
            name, config, self.mesh, _source(), _plug_ins(), [package.__version__ for package in _TRACING], backend,
            repr(platform_of(self.devices[0])), _machine(), [os.environ.get(f) for f in _FLAGS],
            jax.process_index(), jax.process_count(), [d.id for d in self.devices],
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        return self.directory / f"{digest.hexdigest()}.program"

    def __call__(self, name: str, jitted: Any, *args: Any) -> Compiled:
        """The program of `jitted` for arguments like these: from the directory, or compiled now and kept there."""
        file = self._file(name)
        try:
            return serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()), execution_devices=self.devices)
        except FileNotFoundError:
            pass
        except Exception:  # cut off, or of a compiler that says its version but is another one: made anew
            with contextlib.suppress(OSError):  # a directory that may only be read
                file.unlink(missing_ok=True)
        with without_jax_cache():
            compiled = compiled_now(name, jitted, *args)
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(file, pickle.dumps(serialize_executable.serialize(compiled)))
        except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError):  # no room, or a backend that can't
            pass
        return compiled
