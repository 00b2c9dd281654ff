"""The ablation of scripts/studies/ablate_router.py at a quarter of its tokens: the bias evens out held-out expert load."""

from pathlib import Path

import pytest

from dsv3_jax.config import load_config
from dsv3_jax.training.evaluate import evaluate_store
from dsv3_jax.training.loop import train
from dsv3_jax.training.step import make_eval_step

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def held_out_load(overrides, root) -> float:
    """Busiest expert's share over the mean, worst layer, on held-out source text after 100 steps."""
    options = ["train.steps=100", "train.eval_every=1000", "data.seq_len=128", "model.num_nextn_predict_layers=0"]
    config = load_config(TINY, [*options, f"data.cache_dir={root}/cache", *overrides])
    result = train(config, root)
    params, bias = result.state.params, result.state.router_bias
    return evaluate_store(make_eval_step(config), params, bias, result.corpus.validation, 128, 8, limit=30).max_load


@pytest.mark.slow(minutes=3)
def test_bias_balancing_evens_out_the_load(tmp_path):
    on = held_out_load(["name=balanced"], tmp_path)
    assert on <= 2.0  # 1.44 with the script's four times as many tokens; the corpus differs with the Python version
    unbalanced = ["train.bias_update_speed=0", "train.sequence_balance_alpha=0"]
    assert held_out_load(["name=unbalanced", *unbalanced], tmp_path) > 2.5
