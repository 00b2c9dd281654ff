"""From a configuration as written to what runs on the devices of the test, eight of a CPU."""

import re
from types import SimpleNamespace

import jax
import pytest

from dsv3_jax.config import Config, load_config
from dsv3_jax.training.resolve import about_formats, abstract_batch, resolve_for_devices
from tests.conftest import ROOT


def config_of(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "tiny.yaml", ["data.batch_size=8", "data.seq_len=64", *overrides])


def test_what_was_asked_for_is_kept_beside_what_it_means_here():
    asked = config_of("precision.recipe=auto", "parallel.fsdp=-1", "parallel.expert=2", "parallel.compress=auto")
    found = resolve_for_devices(asked)
    assert found.asked == asked
    assert (found.config.precision.recipe, found.recipe.dtype) == ("bf16", "bfloat16")
    assert found.config.parallel.compress == 0
    assert found.layout.axis_sizes == {"fsdp": 4, "expert": 2}
    assert found.notes == (
        "8 devices in 1 process(es): fsdp 4 x expert 2",
        "parallel.compress=auto: off, data has one replica",
    )


def test_devices_that_are_not_used_are_noted():
    assert resolve_for_devices(config_of()).notes == ("7 of 8 devices are not used; parallel.fsdp=-1 would use them all",)


def test_a_pipeline_is_noted_with_its_occupancy():
    overrides = ("model.num_hidden_layers=5", "parallel.pipe=2", "parallel.fsdp=4", "train.grad_accum_steps=2")
    first, second = resolve_for_devices(config_of(*overrides)).notes
    assert first == "8 devices in 1 process(es): pipe 2 x fsdp 4"
    assert second.startswith("pipeline 1f1b: 2 stages, 1 chunk(s) each, 2 microbatches (train.grad_accum_steps): occupancy ")


@pytest.mark.parametrize(
    ("recipe", "kind", "said"),
    [
        ("deepseek", "cpu", "on cpu e4m3 is emulated: .*auto takes bf16 here"),
        ("int8", "NVIDIA H100 80GB HBM3", "on h100 int8 is emulated: .*auto takes deepseek here"),
        ("int8", "NVIDIA A100-SXM4-80GB", "on a100 int8 is native, without a kernel here: .*auto takes bf16 here"),
        ("article", "NVIDIA B200", "on b200 e4m3 is native, without a kernel here: .*auto takes bf16 here"),
        ("fp8_per_tensor", "TPU v5p", "on v5p e4m3 is emulated: .*auto takes int8 here"),
        ("deepseek", "NVIDIA H100 80GB HBM3", None),
        ("bf16", "cpu", None),
    ],
)
def test_formats_that_a_device_only_imitates_are_noted(recipe, kind, said):
    platform = "tpu" if "TPU" in kind else "gpu" if "NVIDIA" in kind else "cpu"
    found = about_formats(config_of(f"precision.recipe={recipe}"), SimpleNamespace(platform=platform, device_kind=kind))
    if said is None:
        assert found == []
    else:
        (line,) = found
        assert re.search(rf"^precision.recipe={recipe}: {said}", line)


def test_a_run_begins_with_what_its_formats_are_here():
    """Also those of the first steps."""
    (line,) = resolve_for_devices(config_of("precision.recipe=deepseek", "parallel.fsdp=8")).notes[1:]
    assert line.startswith("precision.recipe=deepseek: on cpu e4m3 is emulated")
    first = ("precision.first_recipe=deepseek", "precision.first_steps=5", "precision.recipe=bf16")
    assert about_formats(config_of(*first), jax.devices()[0]) == [line]


def test_an_elastic_run_takes_all_devices():
    found = resolve_for_devices(config_of("parallel.fsdp=4"), elastic=True)
    assert found.layout.size == 8
    assert found.asked.parallel.fsdp == 4
    assert found.config.parallel.data * found.config.parallel.fsdp == 8


def test_a_batch_has_the_tokens_that_targets_need():
    found = resolve_for_devices(config_of("model.num_nextn_predict_layers=2"))
    batch = abstract_batch(found.config, found.layout)
    assert batch.tokens.shape == batch.segments.shape == (8, 64 + 1 + 2)
