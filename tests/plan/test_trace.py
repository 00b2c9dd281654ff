"""Overlap read from traces: of TPU and GPU ones that are written here by hand, and of one recorded here by two processes."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.cli import main
from dsv3_jax.cluster.processes import free_port
from dsv3_jax.errors import UserError
from dsv3_jax.plan.trace import common, kind_of_event, length, overlaps, union
from tests.cluster.test_processes import start
from tests.commands import dsv3

Event = tuple[str, int, int]  # name, begin and end in microseconds


def trace(path, planes: dict[str, dict[str, list[Event]]]):
    """An .xplane.pb with these events."""
    text = ""
    for p, (plane, lines) in enumerate(planes.items()):
        names = sorted({name for events in lines.values() for name, _, _ in events})
        text += f'planes {{ id: {p} name: "{plane}" '
        for n, (line, events) in enumerate(lines.items()):
            text += f'lines {{ id: {n} name: "{line}" timestamp_ns: 1000 '
            for name, begin, end in events:
                number, ps = names.index(name) + 1, 10**6
                text += f"events {{ metadata_id: {number} offset_ps: {begin * ps} duration_ps: {(end - begin) * ps} }} "
            text += "} "
        for number, name in enumerate(names, 1):
            text += f'event_metadata {{ key: {number} value {{ id: {number} name: "{name}" }} }} '
        text += "} "
    path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    return path


def test_a_tpu_pairs_begins_and_ends(tmp_path):
    """40 us of an asynchronous gather, 30 of them behind work; 20 of a synchronous sum behind nothing; a loop around all."""
    events = [
        ("while.1", 0, 100),
        ("%all-gather-start.3 = (bf16[8], bf16[64]) all-gather-start(bf16[8] %x)", 0, 1),
        ("fusion.4", 1, 31), ("all-gather-done.3", 31, 40), ("all-reduce.7", 40, 60), ("fusion.5", 60, 100),
    ]  # fmt: skip
    (o,) = overlaps(trace(tmp_path / "a.xplane.pb", {"/device:TPU:0": {"XLA Ops": events, "Steps": [("1", 0, 100)]}}))
    assert o.device == "/device:TPU:0"
    np.testing.assert_allclose([o.communication, o.hidden, o.work], [60e-6, 30e-6, 70e-6], rtol=1e-6)
    np.testing.assert_allclose(o.by_kind["all-gather"], [40e-6, 30e-6], rtol=1e-6)
    assert o.share == pytest.approx(0.5)


def test_a_later_begin_lowers_the_figure(tmp_path):
    """The same work and the same gather, which waits for the work's result."""
    events = [("fusion.4", 0, 30), ("all-gather-start.3", 30, 31), ("all-gather-done.3", 31, 70)]
    (o,) = overlaps(trace(tmp_path / "a.xplane.pb", {"/device:TPU:0": {"XLA Ops": events}}))
    assert o.share == 0


def test_a_gpu_has_streams_and_its_library_s_names(tmp_path):
    lines = {
        "Stream #1(Compute)": [("gemm_fusion_dot_1", 0, 50), ("loop_add_fusion", 60, 80)],
        "Stream #2(Collective)": [("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", 30, 70)],
    }
    (o,) = overlaps(trace(tmp_path / "a.xplane.pb", {"/device:GPU:0": lines, "/host:metadata": {}}))
    np.testing.assert_allclose([o.communication, o.hidden, o.work], [40e-6, 30e-6, 70e-6], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("all_gather.3", "all-gather"), ("ragged-all-to-all-done.1", "ragged-all-to-all"), ("fusion.2", None),
        ("collective-permute-start", "collective-permute"), ("psum_scatter.1", "reduce-scatter"), ("psum", "all-reduce"),
        ("%pmax.4 = (s32[]{:T(128)}, s32[]) all-reduce(s32[] %x), to_apply=%m", "all-reduce"),
        ("%all-gather_fusion = f32[] add(", None),
         ("reduce-scatter.9", "reduce-scatter"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16", "reduce-scatter"), ("all-to-all.1", "all-to-all"),
    ],
)  # fmt: skip
def test_names(name, kind):
    assert kind_of_event(name) == kind


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda t: (float(t[0]), float(t[0] + t[1]))), max_size=8)


@given(a=spans, b=spans)
def test_sums_of_intervals_against_counting_ticks(a, b):
    ticks = [{t for begin, end in s for t in range(int(begin), int(end))} for s in (a, b)]
    assert length(union(a)) == len(ticks[0])
    assert common(union(a), union(b)) == len(ticks[0] & ticks[1])


def test_two_processes_on_cpu(tmp_path, capsys):
    """Recorded here: eight devices, whose collectives block on CPU, so that nothing is hidden; beside a plan's figure."""
    port, program = free_port(), ["tests/plan/two_processes.py", str(tmp_path / "trace")]
    running = [start(program, process, 2, port) for process in (0, 1)]
    outputs = [process.communicate(timeout=240) for process in running]
    assert [p.returncode for p in running] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    found = overlaps(tmp_path / "trace")
    assert len(found) == 8
    for o in found:
        assert set(o.by_kind) == {"all-gather", "all-reduce"}
        assert o.communication > 0
        assert o.work > 0
        assert o.hidden <= 0.3 * o.communication
    (tmp_path / "plan.json").write_text(json.dumps({"plans": [{"topology": "v5p:2x2x2", "step": {"hidden": 0.125}}]}))
    main(["overlap", str(tmp_path / "trace"), "--plan", str(tmp_path / "plan.json")])
    shown = capsys.readouterr().out
    assert "all devices:" in shown
    assert "planned for v5p:2x2x2: 12.5%" in shown


def test_what_is_no_trace(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.xplane\.pb"):
        overlaps(tmp_path)
    (tmp_path / "x.xplane.pb").write_bytes(b"nothing of the kind" * 9)
    with pytest.raises(UserError, match=r"is no trace|has no instructions"):
        overlaps(tmp_path)
    with pytest.raises(UserError, match="has no instructions"):
        overlaps(trace(tmp_path / "x.xplane.pb", {"/host:CPU": {"python": [("f", 0, 1)]}}))


@pytest.mark.parametrize(
    "plan",
    ["[]", "{", '{"plans": [3]}', '{"plans": [{"topology": "x", "step": []}]}', '{"plans": [{"step": {}}]}', "[" * 99_999,
     '{"plans": {"a": 1}}', '{"plans": null}', "\0", '{"plans": [{"topology": "x", "step": null}]}',
     '{"plans": [{"topology": "x", "step": {"hidden": "a"}}]}'],
)  # fmt: skip
def test_a_damaged_plan_is_one_line(tmp_path, plan):
    sound = trace(tmp_path / "a.xplane.pb", {"/device:TPU:0": {"XLA Ops": [("fusion.4", 0, 30)]}})
    (tmp_path / "plan.json").write_text(plan)
    done = dsv3("overlap", str(sound), "--plan", str(tmp_path / "plan.json"), cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "plan.json") in done.stderr
    assert done.stdout == ""


def test_names_are_printed_as_they_are(tmp_path):
    sound = trace(tmp_path / "a.xplane.pb", {"/device:TPU:0 [/x]": {"XLA Ops": [("fusion.4", 0, 30)]}})
    (tmp_path / "plan.json").write_text(
        '{"plans": [{"topology": "[/x] [bold]y", "step": {"hidden": 0.5}}, {"topology": 3, "step": {}}]}'
    )
    done = dsv3("overlap", str(sound), "--plan", str(tmp_path / "plan.json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "/device:TPU:0 [/x]" in done.stdout
    assert "planned for [/x] [bold]y: 50.0%" in done.stdout
    assert "planned for 3: no communication" in done.stdout


def test_a_trace_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "x.xplane.pb").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*x\.xplane\.pb: it is a directory"):
        overlaps(tmp_path)
