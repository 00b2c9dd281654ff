"""The C++ kernel, built when it is first used, for the processor that it runs on, and kept in the user's cache.

A library is named by what it was made from: sources, XLA's headers, the compiler and what it knows of the processor. So a home
directory that several kinds of machines share has one for each, and an update of any of these makes another.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

from pallas_kernels.errors import NotBuilt

_SOURCES = tuple(Path(__file__).parent / name for name in ("ffi.cc", "product.h"))
_OPTIONS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w")
_NATIVE = ("-march=native",)


def compiler() -> str:
    """The path of a C++ compiler: what $CXX names, g++ or clang++. Raises `NotBuilt` where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise NotBuilt(
        f"integer_linear: the cpu kernel needs a C++ compiler, and there is no {' or '.join(names)} on PATH; use xla"
    )


def _said(command: list[str]) -> str:
    """What a command prints. Raises `NotBuilt` with its first line that names an error where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = done.stderr.splitlines()
        line = next((line for line in lines if "error" in line), lines[0] if lines else f"exit status {done.returncode}")
        raise NotBuilt(f"integer_linear: {command[0]} cannot build the cpu kernel: {line.strip()[:200]}; use xla")
    return done.stdout


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "pallas_kernels"


def _built(flags: tuple[str, ...]) -> tuple[Path, str]:
    """(the library, its key), compiled if the cache has none."""
    cxx = compiler()
    of_processor = _said([cxx, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    parts = [cxx, _said([cxx, "--version"]), of_processor, *_OPTIONS, jax.__version__]
    key = hashlib.sha256("\0".join([*parts, *(path.read_text() for path in _SOURCES)]).encode()).hexdigest()[:16]
    try:
        library = _cache() / f"integer_linear-{key}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                made = Path(scratch) / library.name
                _said([cxx, *_OPTIONS, *flags, "-I", jax.ffi.include_dir(), str(_SOURCES[0]), "-o", str(made)])
                made.replace(library)  # whole or not at all, whoever else builds it
    except (OSError, RuntimeError) as error:  # no home directory is a RuntimeError
        raise NotBuilt(f"integer_linear: the cpu kernel cannot be kept in the cache ({error}); use xla") from None
    return library, key


@functools.cache
def _target(name: str, flags: tuple[str, ...]) -> str | NotBuilt:
    try:
        path, key = _built(flags)
        library = ctypes.CDLL(str(path))
    except NotBuilt as error:
        return error
    except OSError as error:
        return NotBuilt(f"integer_linear: the cpu kernel cannot be loaded ({error}); use xla")
    target = f"integer_{name}_{key}"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return target


def target(name: str, flags: tuple[str, ...] | None = None) -> str:
    """The custom call of handler `name` in ffi.cc, by the library for these compiler flags, or for this processor.

    Raises `NotBuilt` where it cannot be had; it is tried once in a process.
    """
    found = _target(name, _NATIVE if flags is None else flags)
    if isinstance(found, NotBuilt):
        raise found
    return found
