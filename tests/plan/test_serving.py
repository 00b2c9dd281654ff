"""`dsv3 plan --serve`: weights in collectives are found, asynchronous slices count once, layers go on as a line."""

import json

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.cli import main
from dsv3_jax.cost.efficiency import ASSUMED
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.plan.hlo import parse
from dsv3_jax.plan.roofline import CostModel
from dsv3_jax.plan.serving import extended
from dsv3_jax.plan.serving_worker import lower_abstractly
from dsv3_jax.plan.weights import moved_weights
from dsv3_jax.serve.decoder import Decoder
from dsv3_jax.serve.programs import Shape
from tests.aot import compilers_environ, set_up_aot_environment
from tests.commands import dsv3_process
from tests.conftest import ROOT
from tests.parallel.cases import config_of

PROGRAM = """HloModule step, is_scheduled=true

%moved (p: bf16[4,8]) -> bf16[8,4] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %t = bf16[8,4]{1,0} transpose(%p), dimensions={1,0}
}

%body (c: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %c = (s32[], bf16[8,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %w = bf16[8,4]{1,0} get-tuple-element(%c), index=1
  %in_loop = bf16[8,4]{1,0} all-reduce(%w), replica_groups={{0,1}}
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%n, %w)
}

ENTRY %main (a: bf16[4,8], b: bf16[8,4], x: bf16[4,4]) -> bf16[8,4] {
  %a = bf16[4,8]{1,0} parameter(0), metadata={op_name="weights[0]"}
  %b = bf16[8,4]{1,0} parameter(1), metadata={op_name="weights[1]"}
  %x = bf16[4,4]{1,0} parameter(2), metadata={op_name="slots.token_NS"}
  %f = bf16[8,4]{1,0} fusion(%a), kind=kLoop, calls=%moved
  %gathered = bf16[16,4]{1,0} all-gather(%f), replica_groups={{0,1}}, dimensions={0}
  %y = bf16[8,4]{1,0} dot(%b, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %summed = bf16[8,4]{1,0} all-reduce(%y), replica_groups={{0,1}}
  %zero = s32[] constant(0)
  %t = (s32[], bf16[8,4]{1,0}) tuple(%zero, %b)
  %loop = (s32[], bf16[8,4]{1,0}) while(%t), condition=%moved, body=%body
  ROOT %out = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_weights_are_followed_to_collectives():
    """Through fusions and loops; what a product makes of a weight is none."""
    assert moved_weights(parse(PROGRAM)) == {"gathered": {"weights[0]"}, "in_loop": {"weights[1]"}}


def test_a_step_that_moves_a_weight_is_found(monkeypatch):
    """The engine's own step, compiled from shapes, with the head brought together before its product."""
    config = config_of(["parallel.expert=4", "parallel.tensor=2"])
    layout, logits = layout_for(config), Decoder.logits

    def gathered(self, hidden_TD):
        whole = jax.lax.with_sharding_constraint(self.head_DV[...], layout.sharding(P()))
        kept, self.head_DV[...] = self.head_DV[...], whole
        try:
            return logits(self, hidden_TD)
        finally:
            self.head_DV[...] = kept

    monkeypatch.setattr(Decoder, "logits", gathered)
    lowered, sizes = lower_abstractly(config, layout, Shape(True, 8, 1, False), 8, 64)
    found = moved_weights(parse(lowered.compile().as_text() or ""))
    assert len(set().union(*found.values())) == 1
    assert sizes["weights"] > sizes["mtp"] > 0


def test_an_asynchronous_slice_reads_what_it_copies():
    """22 MB of which one is brought into a TPU's VMEM: read once, written to no memory; a copy within memory is both."""
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: s8[22020096]) -> s8[1048576] {
  %a = s8[22020096]{0} parameter(0)
  %s = ((s8[22020096]{0}), s8[1048576]{0:S(1)}, u32[]) slice-start(%a), slice={[0:1048576]}
  %c = (s8[22020096]{0}, s8[22020096]{0}, u32[]) copy-start(%a)
  ROOT %d = s8[1048576]{0:S(1)} slice-done(%s)
}
"""
    program = parse(text)
    cost, main_ = CostModel(program, "v6e", ASSUMED, 1.0), program.computations["main"]
    assert [cost.copied(main_.instructions[name], main_) for name in ("s", "c")] == [1048576, 2 * 22020096]


def test_figures_go_on_by_layers():
    """3 dense and 58 MoE layers that take 7 and 100, beside 5 of no layer; a collective that one program lacks."""

    def figures(dense: int, moe: int):
        return {"s": 5 + 7 * dense + 100 * moe, "by": {"k": {"n": moe - 1}} if moe > 1 else {}}

    base, moe, dense = (figures(*layers) for layers in ((1, 1), (1, 2), (2, 1)))
    assert extended(3, 58, base, moe, dense) == {"s": 5 + 3 * 7 + 58 * 100, "by": {"k": {"n": 57}}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "63"], "--batch=63 is not as many on each of 4 devices"),
        (["--context", "1"], "--context=1 is out of range; use 2 to"),
        (["--drafts", "model.num_nextn_predict_layers=0"], "--drafts needs an MTP module"),
    ],
)
def test_what_cannot_be_served(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(ROOT / "configs" / "tiny.yaml"), "--serve", "--topology", "v5e:2x2", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_model_on_v5e_and_h100(tmp_path):
    """On TPUs experts' matrices are read in place: a copy of the first ones makes it twice the weights. None of them travels.

    On GPUs they are not read in place yet: plain JAX loops over blocks of tokens, and copies each block's expert.
    """
    set_up_aot_environment()
    small = [
        "model.hidden_size=512", "model.num_hidden_layers=2", "model.first_k_dense_replace=1", "model.intermediate_size=1024",
        "model.moe_intermediate_size=1024", "model.q_lora_rank=256", "model.kv_lora_rank=256", "model.n_routed_experts=32",
        "precision.recipe=bf16",
    ]  # fmt: skip
    out, cache = tmp_path / "plan", f"data.cache_dir={tmp_path / 'cache'}"
    arguments = [str(ROOT / "configs" / "tiny.yaml"), "--serve", "--topology", "v5e:2x2", "h100:1x4", "--batch", "8"]
    done = dsv3_process(
        "plan", *arguments, "--context", "512", "--out", str(out), *small, cache, cwd=ROOT, env=compilers_environ()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for p in json.loads((out / "plan.json").read_text())["plans"]:
        assert p["fits"]
        assert p["moved_weights"] == []
        most = 1.5 if p["topology"].startswith("v5e") else 3.5
        assert 0.8 < p["steps"]["decode"]["ratio"] < most, p["topology"]
        assert p["steps"]["decode"]["tokens/s"] > 0
