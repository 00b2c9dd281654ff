"""Configuration: presets, overrides, and one clear line for everything wrong."""

from pathlib import Path

import pytest

from dsv3_jax.config import Config, config_from_dict, config_to_dict, config_to_yaml, load_config
from dsv3_jax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_load_and_survive_a_round_trip(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config
    assert config.name == path.stem


def test_small_has_the_benchmark_dimensions():
    m = load_config(CONFIGS / "small.yaml").model
    assert (m.hidden_size, m.num_hidden_layers, m.first_k_dense_replace, m.intermediate_size) == (384, 6, 1, 1024)
    assert (m.moe_intermediate_size, m.n_routed_experts, m.num_experts_per_tok) == (256, 16, 4)
    assert (m.n_group, m.topk_group, m.n_shared_experts, m.num_attention_heads) == (4, 2, 1, 6)
    assert (m.q_lora_rank, m.kv_lora_rank, m.qk_nope_head_dim, m.qk_rope_head_dim) == (192, 128, 64, 32)
    assert (m.v_head_dim, m.vocab_size) == (64, 8192)


@pytest.mark.parametrize("name", ["v3_16b", "v3_671b"])
def test_released_training_settings_are_on(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert (config.model.n_group, config.model.topk_group, config.model.num_nextn_predict_layers) == (8, 4, 1)
    assert (config.train.bias_update_speed, config.train.sequence_balance_alpha) == (0.001, 1e-4)
    assert (config.train.mtp_loss_weight, config.train.mtp_loss_weight_final) == (0.3, 0.1)


def test_overrides_parse_as_yaml():
    config = load_config(CONFIGS / "tiny.yaml", ["optim.lr=1e-3", "model.q_lora_rank=null", "data.path=a*.txt"])
    assert config.optim.lr == 1e-3
    assert config.model.q_lora_rank is None
    assert config.data.path == "a*.txt"


BAD = [
    ("model.hiden_size=3", "unknown key model.hiden_size; did you mean model.hidden_size?"),
    ("hidden_size=3", "did you mean model.hidden_size?"),
    ("train.batch_size=3", "did you mean data.batch_size?"),
    ("trian.steps=3", "unknown key trian"),
    ("train.steps=four", "train.steps='four'"),
    ("train.steps=1.5", "train.steps=1.5"),
    ("optim.lr=true", "optim.lr=True"),
    ("optim.lr=.nan", "optim.lr=nan must be positive"),
    ("model=3", "model=3"),
    ("model.hidden_size.x=3", "model.hidden_size"),
    ("train.steps", "not key=value"),
    ("model.n_group=5", "does not divide model.n_routed_experts=16; use one of [1, 2, 4, 8, 16]"),
    ("model.n_group=16", "use at most 8 groups"),
    ("model.topk_group=9", "use 1 to 4"),
    ("model.num_experts_per_tok=9", "use 1 to 8"),
    ("model.qk_rope_head_dim=7", "must be even"),
    ("data.seq_len=4097", "exceeds model.max_position_embeddings"),
    ("train.grad_accum_steps=3", "does not divide data.batch_size=8; use one of [1, 2, 4, 8]"),
    ("data.batch_size=0", "must be positive"),
    ("data.validation_fraction=1", "between 0 and 1"),
    ("optim.decay_start=3", "before the end of the warm-up"),
    ("parallel.fsdp=0", "parallel.fsdp=0"),
    ("parallel.pipe_chunks=0", "parallel.pipe_chunks=0"),
    ("parallel.expert_ranks_per_node=0", "parallel.expert_ranks_per_node=0"),
    ("precision.recipe=fp4", "precision.recipe='fp4'"),
    ("precision.first_steps=-1", "precision.first_steps=-1"),
    ("name=../x", "name='../x'"),
    ("model.rope_parameters.factor=0.5", "must be at least 1"),
]


@pytest.mark.parametrize(("override", "expected"), BAD, ids=[o for o, _ in BAD])
def test_bad_values_are_refused_by_name(override, expected):
    with pytest.raises(UserError) as error:
        load_config(CONFIGS / "tiny.yaml", [override])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "train: {steps: 1, steps: 2}\n"])
def test_bad_yaml_is_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")


def test_configuration_stays_small():
    def leaves(tree):
        return sum(leaves(v) if isinstance(v, dict) else 1 for v in tree.values())

    assert leaves(config_to_dict(Config())) < 100
