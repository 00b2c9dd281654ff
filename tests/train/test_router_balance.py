"""The ablation of scripts/ablate_router.py, in little: bias balancing evens out held-out expert load, and off it does not."""

from pathlib import Path

import pytest

from dsv3_jax.config import load_config
from dsv3_jax.train.evaluate import evaluate
from dsv3_jax.train.loop import train
from dsv3_jax.train.step import make_eval_step

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def held_out_load(overrides, root) -> float:
    config = load_config(TINY, overrides)
    result = train(config, root)
    data = config.data
    store = result.corpus.validation
    params, bias = result.state.params, result.state.router_bias
    return evaluate(make_eval_step(config), params, bias, store, data.seq_len, data.batch_size).max_load


@pytest.mark.slow
def test_bias_balancing_evens_out_the_load(micro_overrides, tmp_path):
    options = [*micro_overrides, "train.steps=200", "data.batch_size=16", "train.eval_every=1000"]
    on = held_out_load([*options, "name=on"], tmp_path)
    off = held_out_load([*options, "name=off", "train.bias_update_speed=0", "train.sequence_balance_alpha=0"], tmp_path)
    assert on < 1.6
    assert off > 1.3 * on
