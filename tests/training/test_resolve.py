"""From a configuration as written to what runs on the devices of the test, eight of a CPU."""

from dsv3_jax.config import Config, load_config
from dsv3_jax.training.resolve import abstract_batch, resolve_for_devices
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


def test_an_elastic_run_takes_all_devices():
    found = resolve_for_devices(config_of("parallel.fsdp=4"), elastic=True)
    assert found.layout.size == 8
    assert found.asked.parallel.fsdp == 4
    assert found.config.parallel.data * found.config.parallel.fsdp == 8


def test_a_batch_has_the_tokens_that_targets_need():
    found = resolve_for_devices(config_of("model.num_nextn_predict_layers=2"))
    batch = abstract_batch(found.config, found.layout)
    assert batch.tokens.shape == batch.segments.shape == (8, 64 + 1 + 2)
