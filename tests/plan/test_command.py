"""`dsv3 plan` as a user calls it. What compiles for TPU and H100 needs their compilers (.venv-aot), and is slow."""

import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dsv3_jax.cli import main
from dsv3_jax.config import load_config
from dsv3_jax.cost.topologies import parse_topology
from dsv3_jax.plan import compile as compiling
from dsv3_jax.plan.command import list_topologies
from dsv3_jax.plan.compile import Limits, compile_step
from dsv3_jax.plan.imbalance import read_imbalance
from dsv3_jax.precision.platforms import HARDWARE, platforms
from tests.aot import compilers_environ, set_up_aot_environment
from tests.commands import dsv3_process
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny.yaml"
MAXTEXT_TEMPORARIES_GIB = 47.1  # its preset for 671B on the same 512 chips: half of that is the bar
GIB = 2**30
# small, of sizes that the kernels take
SMALL = [
    "model.hidden_size=256", "model.num_hidden_layers=3", "model.intermediate_size=512", "model.moe_intermediate_size=256",
    "model.q_lora_rank=128", "model.kv_lora_rank=128", "model.qk_nope_head_dim=128", "model.qk_rope_head_dim=64",
    "model.v_head_dim=128", "precision.recipe=bf16", "remat.policy=full", "data.seq_len=512", "data.batch_size=16",
]  # fmt: skip


@pytest.fixture
def failed(capsys):
    """The one line that a command with these arguments prints, with exit code 2."""

    def of(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *arguments])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (ended.value.code, len(lines)) == (2, 1), lines
        return lines[0]

    return of


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "one of v5e, v5p"),
        ("v5p", "use KIND:SHAPE"),
        ("v5p:8x8", "v5p takes a torus of 3 dimensions"),
        ("h100:4x4x8", "h100 takes HOSTSxGPUS"),
        ("2*h100:4x8", "GPUs have hosts and no slices"),
        ("v5p:0x1x1", "v5p takes a torus"),
    ],
)
def test_topologies_that_are_none(name, message, failed):
    assert message in failed(str(TINY), "--topology", name)


def test_bad_input_is_said_before_anything_is_compiled(failed):
    assert "needs CONFIG and --topology" in failed()
    assert "--imbalance=0.5" in failed(str(TINY), "--topology", "v5p:2x2x1", "--imbalance", "0.5")
    assert "use NAME=VALUE" in failed(str(TINY), "--topology", "v5p:2x2x1", "--xla", "fast")
    assert "unknown key model.hidden" in failed(str(TINY), "model.hidden=3", "--topology", "v5p:2x2x1")


def test_imbalance_of_a_router(tmp_path):
    """The fullest of 2 devices has 6 of 8 tokens in one layer and 4 of 8 in the other, and of 4 devices 4 and 2."""
    rows = [{"step": 1, "load": [[4, 2, 1, 1], [2, 2, 2, 2]]}, {"step": 2, "load": [[1, 1, 2, 4], [2, 2, 2, 2]]}]
    (tmp_path / "routing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given in (tmp_path, tmp_path / "routing.jsonl"):
        found = read_imbalance(str(given))
        assert [found.among(ranks, 4) for ranks in (1, 2, 4)] == [1.0, 1.25, 1.5]
    with pytest.raises(compiling.UserError, match=r"recorded 4 experts, and model.n_routed_experts=8"):
        found.among(2, 8)
    assert read_imbalance("1.25").among(4, 8) == 1.25


@pytest.mark.parametrize("text", [None, "", "{}", '{"load": []}', '{"load": [[0, 0]]}', '{"load": [[1], [2, 3]]}', "7"])
def test_what_is_no_record_of_routing(tmp_path, text):
    if text is not None:
        (tmp_path / "routing.jsonl").write_text(text)
    with pytest.raises(compiling.UserError, match="use a number of 1 or more, or a run"):
        read_imbalance(str(tmp_path))


def test_list_names_every_kind(capsys):
    main(["plan", "--list"])
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in HARDWARE)


def test_facts_have_sources_and_platforms_take_theirs_from_them():
    for kind, facts in HARDWARE.items():
        assert len(facts["sources"]) > 40, kind
        assert facts["topologies"], kind
    for platform in platforms():
        if platform.name in HARDWARE:
            assert platform.tera_ops == HARDWARE[platform.name]["tera_ops"]
    assert all(parse_topology(name).size > 0 for facts in HARDWARE.values() for name in facts["topologies"])
    assert parse_topology("tpu7x:4x4x8").size == 256  # two cores a chip
    assert parse_topology("2*v5p:8x8x8").size == 1024
    assert parse_topology("h100:128x8").size == 1024


_GROWS = 'import time; x = b"1" * (300 << 20); time.sleep(60)'


def stub(tmp_path, monkeypatch, body: str):
    """Stands in for a Python with compilers."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("DSV3_PLAN_PYTHON", str(program))
    return load_config(TINY, [f"data.cache_dir={tmp_path / 'cache'}"])


@pytest.mark.parametrize(
    ("body", "limits", "message"),
    [
        ("cat > /dev/null; kill -ABRT $$", Limits(), "was ended by signal 6"),
        ("cat > /dev/null; echo 'x'; echo 'RESOURCE_EXHAUSTED: out of 3 things' >&2; exit 1", Limits(), "out of 3 things"),
        ("cat > /dev/null; echo compiling; sleep 60", Limits(seconds=0.6), r"longer than 0\.6 s"),
        ("cat > /dev/null; echo nothing done", Limits(), "failed: it wrote nothing"),
        (f"cat > /dev/null; exec {sys.executable} -c '{_GROWS}'", Limits(memory_gb=0.1), r"more than 0\.1 GB"),
    ],
)
def test_compilers_that_fail(tmp_path, monkeypatch, body, limits, message):
    """Said in one error, and nothing is left in the cache."""
    config = stub(tmp_path, monkeypatch, body)
    with pytest.raises(compiling.UserError, match=message):
        compile_step(config, "v5p:2x2x1", limits=limits)
    assert not list((tmp_path / "cache" / "plans").iterdir())


def test_no_compilers(monkeypatch):
    monkeypatch.setenv("DSV3_PLAN_PYTHON", "/nowhere/python")
    with pytest.raises(compiling.UserError, match="DSV3_PLAN_PYTHON=/nowhere/python"):
        compiling.compilers()


def plan(tmp_path, topologies: list[str], *overrides: str, config=TINY, options: tuple[str, ...] = ()) -> list[dict]:
    set_up_aot_environment()
    out = tmp_path / "plan"
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    arguments = [str(config), "--topology", *topologies, *options, "--out", str(out), *overrides, cache]
    done = dsv3_process("plan", *arguments, cwd=ROOT, env=compilers_environ())
    assert done.returncode == 0, done.stderr[-3000:]
    page = (out / "plan.html").read_text()
    assert page.count("<svg") >= 2
    assert not re.search(r"(src|href)=.http", page)  # nothing is fetched
    return json.loads((out / "plan.json").read_text())["plans"]


def bytes_of(p: dict, kind: str, axes: list[str]) -> float:
    return sum(row["bytes"] for row in p["communication"] if (row["kind"], row["axes"]) == (kind, axes))


@pytest.mark.slow(minutes=2)
def test_a_small_model_on_v5p_and_h100(tmp_path):
    """FLOPs by hand, memory without ZeRO-3, and what the experts' exchange sends."""
    tpu, gpu = plan(tmp_path, ["v5p:2x2x1", "h100:1x4"], *SMALL, "parallel.fsdp=2", "parallel.expert=2")
    assert (tpu["devices"], gpu["devices"]) == (4, 4)
    # tokens to experts, by hand: rows of 256 numbers in bfloat16, half of them to the other one of 2 ranks; in a layer there
    # and back, and backward rows and dy there, dx back. With them go experts' numbers and weights, and weights' gradients back,
    # 4 times with those done again; on TPU these are padded to 128 numbers in float32, which is as much as a row.
    layers, sent = 3, 16 * 512 // 4 * 4 * 256 * 2 / 2  # two layers of the main model and the MTP module's
    assert bytes_of(tpu, "ragged-all-to-all", ["expert"]) == (5 + 4) * sent * layers
    assert 5 * sent * layers < bytes_of(gpu, "ragged-all-to-all", ["expert"]) < 6 * sent * layers
    # what a program takes beside the state is the batch: tokens and segments of 4 sequences, with the targets of two depths
    assert gpu["memory"]["batch"] == 2 * 16 // 4 * (512 + 2) * 4
    # more than useful: padding of rows to blocks, attention's diagonal and its scores, again once on TPU, in three kernels on
    # Hopper
    for p, most in ((tpu, 1.1), (gpu, 1.5)):
        assert p["fits"]
        assert p["useful_flops"] * 0.95 < sum(p["flops"].values()) - p["recomputed"] < most * p["useful_flops"]
        assert not [note for note in p["notes"] if "unknown length" in note or "missing" in note]
        assert p["step"]["seconds"] >= p["step"]["work"] > 0
    (replicas,) = plan(tmp_path, ["v5p:2x2x1"], *SMALL, "parallel.data=2", "parallel.expert=2")
    sharded = tpu["memory"]["parameters"]
    # norms are whole everywhere; of the rest a device has two times as much
    assert replicas["memory"]["parameters"] == pytest.approx(2 * sharded, rel=0.02)
    assert replicas["memory"]["moments"] - tpu["memory"]["moments"] == pytest.approx(2 * sharded, rel=0.02)
    assert bytes_of(replicas, "all-reduce", ["data"]) == pytest.approx(replicas["memory"]["parameters"], rel=0.05)


@pytest.mark.slow(minutes=2)
def test_search_compiles_the_best_and_explains(tmp_path):
    options = ("--search", "--compile-best", "2", "--imbalance", "1.5")
    smaller = ["model.num_hidden_layers=2", "model.num_nextn_predict_layers=0"]
    found = plan(tmp_path, ["v5p:2x2x1"], *SMALL, *smaller, options=options)
    assert len(found) == 2
    assert found[0]["mesh"] != found[1]["mesh"]
    assert found[0]["step"]["seconds"] <= found[1]["step"]["seconds"]
    assert found[0]["assumed"]["imbalance"] == 1.5


@pytest.mark.slow(minutes=5)
def test_671b_fits_512_v5p(tmp_path):
    (p,) = plan(
        tmp_path, ["v5p:8x8x8"], "data.batch_size=512", "train.grad_accum_steps=1", config=ROOT / "configs/v3_671b.yaml"
    )  # fmt: skip
    assert p["devices"] == 512
    assert p["fits"]
    memory = p["memory"]
    temporaries = sum(memory[name] for name in ("gradients", "activations kept", "other temporaries"))
    assert temporaries <= MAXTEXT_TEMPORARIES_GIB / 2 * GIB
    # 671B weights in float32 with two bfloat16 moments and the MTP module, in 512 parts: nothing large is held twice
    assert memory["parameters"] + memory["moments"] <= 1.05 * 683e9 * 8 / 512
    assert bytes_of(p, "ragged-all-to-all", ["expert"]) > 0
    executed = sum(p["flops"].values())
    # attention's backward kernel has the scores once more, which no name tells
    assert executed - p["recomputed"] == pytest.approx(p["useful_flops"], rel=0.05)
    assert not [note for note in p["notes"] if "unknown length" in note or "missing" in note]


def test_a_damaged_compiled_program_is_made_again(tmp_path, monkeypatch):
    """What stands in the cache may be cut off: it is read, removed, and compiled once more."""
    built = []

    def run(worker, request, limits, say):
        built.append(request)
        (Path(request["out"]) / "facts.json").write_text(json.dumps({"n": len(built)}))

    def read(directory):
        facts = json.loads((directory / "facts.json").read_text())
        return facts["n"]

    monkeypatch.setattr(compiling, "_run", run)
    monkeypatch.setattr(compiling, "read", read)
    monkeypatch.setattr(compiling, "compilers", lambda: "python")
    config = load_config(TINY, [f"data.cache_dir={tmp_path}"])
    assert compile_step(config, "v5p:2x2x1") == compile_step(config, "v5p:2x2x1") == 1
    (facts,) = tmp_path.glob("plans/*/facts.json")
    facts.write_text('{"n":')
    assert compile_step(config, "v5p:2x2x1") == 2
    assert compile_step(config, "v5p:2x2x1") == len(built) == 2


@pytest.mark.parametrize("price", ["nan", "inf", "-1"])
def test_prices_that_are_none(price, failed):
    assert "must be a price of 0 or more" in failed(str(TINY), "--topology", "v5p:2x2x1", "--price", price)


@pytest.mark.parametrize("value", ["[" * 5000, "*a", "!!int x", "9" * 400])
def test_hostile_compiler_options_are_one_line(value, failed, monkeypatch):
    monkeypatch.setattr(compiling, "compilers", lambda: "python")
    assert "is not valid YAML" in failed(str(TINY), "--topology", "v5p:2x2x1", "--xla", f"a={value}")


def test_the_list_fits_80_columns(capsys):
    list_topologies(Console(width=80))
    out = capsys.readouterr().out
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    assert {row[5].strip().rstrip(",") for row in rows} >= {
        "ici 90",
        "network 6.25",
        "nvlink 450",
    }  # no figure without its link
    assert "tpu7x:2x2x1 tpu7x:4x4x4" in out
    assert "…" not in out
