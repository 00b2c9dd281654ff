"""Configuration: presets, overrides, and one clear line for everything wrong."""

from pathlib import Path

import pytest
import yaml

from dsv3_jax import yaml_reader
from dsv3_jax.checks import choices, divisors
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
    ("optim.lr=.nan", "optim.lr=nan must be a finite number"),
    ("model=3", "model=3"),
    ("model.hidden_size.x=3", "model.hidden_size"),
    ("train.steps", "not key=value"),
    ("=3", "override '=3' is not key=value"),
    (".steps=3", "override '.steps=3' is not key=value, e.g. train.steps=100"),
    ("train.=3", "override 'train.=3' is not key=value, e.g. train.steps=100"),
    ('train={"": 3}', "tiny.yaml: key 'train.' lacks a name; write it out, e.g. train.steps"),
    ('train={" ": 3}', "unknown key 'train. '"),
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
    ("model.rope_parameters.rope_theta=.inf", "model.rope_parameters.rope_theta=inf must be a finite number"),
    ("optim.lr=.inf", "optim.lr=inf must be a finite number"),
    ("optim.weight_decay=1e400", "optim.weight_decay=inf must be a finite number"),
    ("optim.clip_norm=-.inf", "optim.clip_norm=-inf must be positive"),
    ("optim.lr=1e-4", "optim.lr_final=0.0003 exceeds optim.lr=0.0001"),
    ("train.seed=4294967296", "train.seed=4294967296 is out of range; use at most 4294967295"),
    ("train.seed=-1", "train.seed=-1 must not be negative"),
    ("parallel.compress=true", "parallel.compress=true: use 1, 2, 4 or 8 bits, auto, or 0"),
    ("model.num_hidden_layers=1000000000", "model.num_hidden_layers=1000000000 is out of range; use at most 16384"),
    ("model.n_routed_experts=1000000000", "model.n_routed_experts=1000000000 is out of range; use at most 65536"),
    ("model.num_nextn_predict_layers=1000", "use at most 16"),
    ("data.batch_size=1000000000000000000", "data.batch_size=1000000000000000000 is out of range; use at most 2147483647"),
    ("train.steps=" + "9" * 400, "number 99999999999999999999... is out of range"),
    ("train.steps=0x" + "f" * 9999, "is out of range"),
    ("train.steps=" + "x" * 50_000, "(50,002 characters): input should be a valid integer"),
    ("train." + "x" * 50_000 + "=1", "unknown key 'train.xxx"),
    (".".join("abcdefghijk") + "=1", "no section lies so deep"),
    ("train={steps: *a}", "alias *a is not supported"),
    ("train=" + "[" * 5000, "nested deeper than 16 levels"),
    ("train={2020-01-01: 1}", "key 2020-01-01 is not text"),
    ("train={!!binary aGVsbG8=: 1}", "values of type tag:yaml.org,2002:binary are not supported"),
    ("train.steps=!!set {a, b}", "values of type tag:yaml.org,2002:set are not supported"),
    ("train.steps=2020-99-99", "a value is not of its type (month must be in 1..12)"),
    ("train.steps=!!int x", "a value is not of its type"),
    ("train=[" + "1," * 100_000 + "]", "at most 65,536 are read"),
    ("train.steps=a\0b", "special characters are not allowed"),
    ("data.path=\udcff*.txt", "data.path='\\udcff*.txt' holds bytes or characters that are no UTF-8"),
    ('train={init_from: "\\ud800"}', "train.init_from='\\ud800' holds bytes or characters that are no UTF-8"),
    ("\udcff=1", "'\\udcff' holds bytes or characters that are no UTF-8"),
]


@pytest.mark.parametrize(("override", "expected"), BAD, ids=[o[:60] for o, _ in BAD])
def test_bad_values_are_refused_by_name(override, expected):
    with pytest.raises(UserError) as error:
        load_config(CONFIGS / "tiny.yaml", [override])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "override",
    ["optim.clip_norm=.inf", "checkpoint.every_minutes=.inf", "train.seed=4294967295", "optim.lr_final=1e-3", "name=2020-01-01",
     "parallel.compress=auto", "model.num_hidden_layers=16384", "train.steps=2147483647"],
)  # fmt: skip
def test_unusual_values_are_taken(override):
    load_config(CONFIGS / "tiny.yaml", ["optim.lr=1e-3", override])


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "train: {steps: 1, steps: 2}\n", "'': 1\n", "'': {a: 1}\n"])
def test_bad_yaml_is_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")


def test_what_never_ends_is_read_within_bounds():
    with pytest.raises(UserError, match="at most 65,536 are read"):
        load_config("/dev/zero")


def test_what_many_keys_cost_grows_with_their_number(tmp_path):
    """And not with its square, as when each was compared with all others: 6,000 took 1.3 s."""
    compared = []

    class Key(str):
        __slots__ = ()

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    keys = yaml.MappingNode(
        "tag:yaml.org,2002:map", [(yaml.ScalarNode("k", f"k{i}"), yaml.ScalarNode("v", "1")) for i in range(99)]
    )
    loader = yaml_reader._Loader("")
    loader.construct_object = lambda node, deep=False: Key(node.value)
    assert len(loader.construct_mapping(keys)) == 99
    assert len(compared) < 200


def test_a_dictionary_that_is_no_json_is_refused():
    own: dict = {}
    own["model"] = own
    for raw, said in ((own, "Circular"), ({("a", 1): 2}, "keys must be"), ({"train": {"steps": 10**5000}}, "4300 digits")):
        with pytest.raises(UserError, match=said):
            config_from_dict(raw)


def test_divisors():
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(10**18)[:4] == [1, 2, 4, 5]  # those up to 2^17 only, where trying all would take minutes
    assert choices(16) == "[1, 2, 4, 8, 16]"
    assert choices(720720).endswith("..., 720720]")
    assert len(choices(720720)) < 120


def test_configuration_stays_small():
    def leaves(tree):
        return sum(leaves(v) if isinstance(v, dict) else 1 for v in tree.values())

    assert leaves(config_to_dict(Config())) <= 101


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=007", "007"), ("name=7", "7"), ("name=1e5", "1e5"), ("name=true", "true"), ("name=2026-01-01", "2026-01-01"),
        ("data.path=*.txt", "*.txt"), ("data.path=[a].txt", "[a].txt"), ("data.path={a}", "{a}"), ("data.path='a, b'", "a, b"),
        ("data.text_field=1", "1"), ("data.tokenizer=null", None), ("train.init_from=12", "12"), ("train.steps=7", 7),
        ("optim.lr=1e-3", 1e-3), ("parallel.compress=auto", "auto"), ("parallel.compress=2", 2),
    ],
)  # fmt: skip
def test_text_is_taken_as_it_stands(override, expected):
    """Where a key takes text, YAML's numbers, dates, lists and aliases are text too."""
    found = config_to_dict(load_config(CONFIGS / "tiny.yaml", [override]))
    for part in override.partition("=")[0].split("."):
        found = found[part]
    assert found == expected
