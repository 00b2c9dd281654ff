"""The table of platforms: what `auto` takes where, and a plug-in that brings a platform and operations of its own."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import pallas_kernels
import pallas_kernels.quantize.reference
import pallas_kernels.scaled_matmul.reference
import pallas_kernels.swiglu_quantize.reference
from dsv3_jax.config import load_config
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.precision import platforms
from dsv3_jax.precision.platforms import Platform, platform_of, resolve
from dsv3_jax.precision.recipes import RECIPES, recipe_of, run_by
from dsv3_jax.runs.metrics import read_rows
from dsv3_jax.state.train_state import abstract_state, new_state
from dsv3_jax.training.loop import train
from dsv3_jax.training.step import make_train_step
from pallas_kernels import devices, quantize, scaled_matmul, swiglu_quantize
from pallas_kernels.grouped_swiglu.reference import grouped_swiglu as experts_by_definition
from tests.conftest import ROOT
from tests.parallel.cases import WITHOUT_MTP, batch_of, config_of

# (what JAX calls the device, with the strings of real compilers' and data sheets' devices) -> platform, what auto takes there
DEVICES = [
    ("cpu", "cpu", "cpu", "bf16"),
    ("tpu", "TPU v5 lite", "v5e", "int8"),
    ("tpu", "TPU v5", "v5p", "int8"),
    ("tpu", "TPU v6 lite", "v6e", "int8"),
    ("tpu", "TPU7x", "tpu7x", "deepseek"),
    ("gpu", "NVIDIA A100-SXM4-80GB", "a100", "bf16"),
    ("gpu", "NVIDIA H100 80GB HBM3", "h100", "deepseek"),
    ("gpu", "NVIDIA H200", "h100", "deepseek"),
    ("cuda", "NVIDIA B200", "b200", "bf16"),
    ("npu", "Ascend 910B", "Ascend 910B", "bf16"),
    ("gpu", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090", "bf16"),
]


@pytest.fixture
def registry(monkeypatch):
    """Nothing that a test registers stays."""
    monkeypatch.setattr(platforms, "_registered", [])


@pytest.mark.parametrize(("pjrt", "kind", "name", "recipe"), DEVICES)
def test_every_device_finds_its_platform_and_recipe(pjrt, kind, name, recipe):
    found = platform_of(SimpleNamespace(platform=pjrt, device_kind=kind))
    assert found.name == name
    assert found.auto[0] == recipe
    assert found.auto[1]
    config = resolve(config_of(["precision.recipe=auto"]), SimpleNamespace(platform=pjrt, device_kind=kind))
    assert config.precision.recipe == recipe
    # what has kernels of this package's own runs them; all else runs as plain JAX rather than fail when it is compiled
    assert (found.implementation == "auto") == (name in ("cpu", "v5e", "v5p", "v6e", "tpu7x", "h100"))
    assert found.core == ("tpu" if pjrt == "tpu" else "hopper" if name == "h100" else "xla")
    assert devices.is_hopper(SimpleNamespace(platform=pjrt, device_kind=kind)) == (found.core == "hopper")
    assert run_by(RECIPES["bf16"], "auto", found.core).core == found.core
    assert run_by(RECIPES["float32"], "auto", found.core).core == "xla"  # tensor cores take 16 bits


def test_rates_are_those_of_jax_own_table():
    """What TPUs can multiply, per device."""
    tpu_info = pytest.importorskip("jax._src.tpu_info")
    for pjrt, kind, name, _ in DEVICES:
        if pjrt == "tpu":
            info = tpu_info.get_tpu_info_for_chip(tpu_info.chip_version_from_device_kind(kind), 1)
            ours = platform_of(SimpleNamespace(platform=pjrt, device_kind=kind))
            cores = 2 if name == "v5p" else 1  # JAX shows a v5p chip as one device, and its table counts cores
            theirs = {"bf16": info.bf16_ops_per_second, "int8": info.int8_ops_per_second, "e4m3": info.fp8_ops_per_second}
            for format, rate in theirs.items():
                assert ours.tera_ops.get(format, 0) == pytest.approx(cores * rate / 1e12, rel=0.01), (name, format)
            assert ours.memory_tb_s == pytest.approx(cores * info.mem_bw_bytes_per_second / 1e12, rel=0.01)


def test_other_options_stay_and_auto_alone_is_replaced():
    config = config_of(["precision.recipe=article", "precision.first_steps=3"])
    assert resolve(config, jax.devices()[0]) == config
    with pytest.raises(UserError, match="depends on the platform"):
        recipe_of(config_of(["precision.recipe=auto"]).precision)


def test_a_run_keeps_what_auto_was(micro_overrides, tmp_path):
    overrides = [*micro_overrides, "precision.recipe=auto", "name=auto", "train.steps=2", "train.eval_every=9"]
    config = load_config(ROOT / "configs" / "tiny.yaml", overrides)
    result = train(config, tmp_path)
    assert load_config(result.run.config_file).precision.recipe == "auto"  # as it was asked for
    assert result.config.precision.recipe == "bf16"
    train(replace(config, train=replace(config.train, steps=3)), tmp_path)  # the same command goes on
    assert len(read_rows(result.run.metrics_file)) == 3


def fakechip(calls: list[str]) -> Platform:
    """A platform whose native format is int8, on devices that say that they are CPUs."""

    def counted(operation: str, function):
        def run(*args):
            calls.append(operation)
            return function(*args)

        pallas_kernels.register(operation, "fakechip", run)

    counted("quantize", quantize.reference.quantize)
    counted("quantize_transposed", quantize.reference.quantize_transposed)
    counted("swiglu_quantize", swiglu_quantize.reference.swiglu_quantize)
    counted("swiglu_backward", swiglu_quantize.reference.swiglu_backward)
    counted("scaled_matmul", scaled_matmul.reference.scaled_matmul)
    counted("grouped_scaled_matmul", scaled_matmul.reference.grouped_scaled_matmul)
    counted("grouped_scaled_wgrad", scaled_matmul.reference.grouped_scaled_wgrad)
    formats = {"bf16": "native", "int8": "native", "e4m3": "refused", "e5m2": "refused", "float32": "native"}
    return Platform("fakechip", ("cpu",), "", formats, {"bf16": 100, "int8": 400}, implementation="fakechip")  # type: ignore[arg-type]


def test_a_plug_in_brings_its_formats_and_operations(registry):
    calls: list[str] = []
    platforms.register(fakechip(calls))
    small = "model.num_hidden_layers=2", "train.grad_accum_steps=1", WITHOUT_MTP
    config = resolve(config_of(["precision.recipe=auto", *small]), jax.devices()[0])
    assert config.precision.recipe == "int8"
    _, metrics = make_train_step(config)(new_state(config), batch_of(config, 0))
    assert np.isfinite(metrics.objective.loss)
    assert set(calls) == {
        "quantize", "quantize_transposed", "swiglu_quantize", "swiglu_backward", "scaled_matmul", "grouped_scaled_matmul",
        "grouped_scaled_wgrad",
    }  # fmt: skip


def test_a_plug_in_that_is_installed_is_found(tmp_path):
    """By its packaging entry point, in a process that was told nothing else."""
    (tmp_path / "fakechip.py").write_text(
        "import pallas_kernels\n"
        "from dsv3_jax.precision.platforms import Platform, register\n"
        "from pallas_kernels.registry import EIGHT_BIT\n"
        "def bring():\n"
        "    for operation in EIGHT_BIT:\n"
        "        pallas_kernels.register(operation, 'fakechip', print)\n"
        "    formats = {'bf16': 'native', 'int8': 'native', 'e4m3': 'refused'}\n"
        "    rates = {'bf16': 100, 'int8': 400}\n"
        "    register(Platform('fakechip', ('cpu',), '', formats, rates, implementation='fakechip'))\n"
    )
    info = tmp_path / "fakechip-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fakechip\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[dsv3_jax.platforms]\nfakechip = fakechip:bring\n")
    shown = subprocess.run(
        [str(Path(sys.executable).with_name("dsv3")), "platforms"], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "160"},
    ).stdout  # fmt: skip
    assert "taken as fakechip; precision.recipe=auto is int8 here" in shown
    for name in ("v5e", "v5p", "v6e", "tpu7x", "a100", "h100", "b200", "native", "emulated", "refused"):
        assert name in shown


@pytest.mark.parametrize(
    ("formats", "rates", "text"),
    [
        ({"fp4": "native"}, {}, r"formats\['fp4'\]='native'"),
        ({"int8": "quick"}, {}, "use one of float32"),
        ({"bf16": "native", "int8": "native"}, {"bf16": 1.0}, r"tera_ops\['int8'\]"),
        ({"bf16": "refused", "e4m3": "native"}, {"e4m3": 2.0}, r"tera_ops\['bf16'\]"),  # what 8 bits gain is over bf16
        ({"bf16": "native"}, {"bf16": 0.0}, r"tera_ops\['bf16'\]"),
    ],
)
def test_a_bad_plug_in_is_refused(registry, formats, rates, text):
    with pytest.raises(UserError, match=text):
        platforms.register(Platform("bad", ("cpu",), "", formats, rates))


@pytest.mark.parametrize(
    ("pjrt", "kind", "text"), [("cpux", "", "use a tuple of names"), (("cpu",), "(", "no regular expression")]
)
def test_a_plug_in_that_names_its_devices_wrongly_is_refused(registry, pjrt, kind, text):
    with pytest.raises(UserError, match=text):
        platforms.register(Platform("bad", pjrt, kind, {}, {}))


@pytest.mark.parametrize(
    ("field", "missing"),
    [
        ("implementation", "quantize, quantize_transposed, swiglu_quantize, swiglu_backward, scaled_matmul, "),
        ("core", "causal_attention, logit_statistics; register each with pallas_kernels.register"),
        ("grouped_swiglu", "grouped_swiglu; register"),
    ],
)
def test_a_platform_without_its_operations_is_refused(registry, field, missing):
    """In one line that names them, and nothing is registered."""
    with pytest.raises(UserError, match=f"platform emptychip: {field}='emptychip' has no {missing}") as error:
        platforms.register(Platform("emptychip", ("cpu",), "", {"bf16": "native"}, {"bf16": 1.0}, **{field: "emptychip"}))
    assert "\n" not in str(error.value)
    assert "emptychip" not in {platform.name for platform in platforms.platforms()}


@pytest.mark.parametrize("mesh", [[], ["parallel.expert=2", "parallel.fsdp=2"]])
def test_a_plug_in_brings_the_experts_in_16_bits(registry, mesh):
    """The step is traced, not run."""
    calls = []

    def counted(*arguments):
        calls.append(arguments[0].dtype)
        return experts_by_definition(*arguments)

    pallas_kernels.register("grouped_swiglu", "fakechip", counted)
    platforms.register(
        Platform("fakechip", ("cpu",), "", {"bf16": "native"}, {"bf16": 1.0}, implementation="xla", grouped_swiglu="fakechip")
    )
    config = config_of(["precision.recipe=bf16", "model.num_hidden_layers=2", *mesh])
    layout = layout_for(config)
    jax.make_jaxpr(make_train_step(config, layout))(abstract_state(config, layout), batch_of(config, 0))
    assert set(calls) == {np.dtype("bfloat16")}


def test_a_bad_operation_is_refused():
    with pytest.raises(ValueError, match="no operation 'convolve'"):
        pallas_kernels.register("convolve", "fakechip", print)
    with pytest.raises(ValueError, match="no implementation 'nobody'"):
        pallas_kernels.quantize.api.quantize(np.ones((2, 2), np.float32), 1, implementation="nobody")
