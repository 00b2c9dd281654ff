"""The C++ kernel for every kind of processor, by its own program, and what is said where it cannot be built."""

import platform
import shutil
import subprocess
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import integer_linear, registry
from pallas_kernels.errors import NotBuilt
from pallas_kernels.integer_linear import build
from pallas_kernels.integer_linear.cases import W4, random_weight
from pallas_kernels.measure import normal
from tests.conftest import ROOT

_X86 = {"scalar": [], "avx2": ["-mavx2", "-mfma", "-mf16c"], "native": ["-march=native"]}


def product_agrees(compiler: list[str], run: list[str], tmp_path) -> None:
    """integer_linear.cc compares with sums in double, to 1e-5 of the largest result."""
    program = tmp_path / "program"
    sources = ["-I", str(ROOT / "pallas_kernels" / "integer_linear"), str(ROOT / "tests" / "kernels" / "integer_linear.cc")]
    subprocess.run([*compiler, "-O2", "-std=c++17", *sources, "-o", str(program)], check=True)
    done = subprocess.run([*run, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("processor", _X86)
def test_the_kernel_on_x86(processor, tmp_path):
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("no x86 processor, or no g++")
    product_agrees(["g++", *_X86[processor]], [], tmp_path)


def test_the_kernel_on_arm(tmp_path):
    """Emulated, where a cross-compiler and qemu-user are installed."""
    if not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"):
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64")
    product_agrees(["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64"], tmp_path)


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (build._target, registry._warn):
        cached.cache_clear()
    yield monkeypatch
    for cached in (build._target, registry._warn):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("cxx", "reason"), [("no-such-compiler", "there is no no-such-compiler on PATH"), ("false", "cannot build the cpu kernel")]
)
def test_without_a_compiler_who_names_the_kernel_is_told_and_auto_warns_once(cxx, reason, nothing_built):
    nothing_built.setenv("CXX", cxx)
    x, w = normal(0, 1, 128), random_weight(0, W4, (), (128,), (24,))
    with pytest.raises(NotBuilt, match=f"integer_linear: .*{reason}.*; use xla"):
        integer_linear(x, w, "cpu")
    with pytest.warns(RuntimeWarning, match=reason):
        found = integer_linear(x, w)
    np.testing.assert_allclose(found, integer_linear(x, w, "reference"), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integer_linear(jnp.ones((1, 128)), w)
