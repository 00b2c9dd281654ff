"""Pipeline tables: nothing before its input, nothing twice in one place, and the occupancy that theory gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.parallel.pipeline import cut_layers
from dsv3_jax.parallel.schedule import IDLE, make_schedule

schedules = st.builds(
    make_schedule, st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 6), st.integers(1, 4), st.integers(1, 17)
)


def ticks(s, table, chunk_table):
    """{(microbatch, chunk, stage): tick}"""
    found = {}
    for t, stage in zip(*np.nonzero(table != IDLE), strict=True):
        key = (int(table[t, stage]), int(chunk_table[t, stage]), int(stage))
        assert key not in found
        found[key] = int(t)
    return found


@given(s=schedules)
def test_every_piece_runs_once_and_one_tick_after_its_input(s):
    forward, backward = ticks(s, s.forward, s.forward_chunk), ticks(s, s.backward, s.backward_chunk)
    everything = {(m, c, p) for m in range(s.microbatches) for c in range(s.chunks) for p in range(s.stages)}
    assert set(forward) == set(backward) == everything
    for m, c, p in everything:
        before = (m, c, p - 1) if p else (m, c - 1, s.stages - 1)
        if before in everything:
            assert forward[m, c, p] == forward[before] + 1
            assert backward[before] == backward[m, c, p] + 1
        assert backward[m, c, p] >= forward[m, c, p]  # within a tick, forward comes first


@given(s=schedules)
def test_a_kept_input_is_not_overwritten(s):
    for p in range(s.stages):
        holder = {}
        for t in range(s.ticks):
            if s.forward[t, p] != IDLE:
                slot = int(s.forward_slot[t, p])
                assert 0 <= slot < s.slots
                assert slot not in holder
                holder[slot] = (s.forward[t, p], s.forward_chunk[t, p])
            if s.backward[t, p] != IDLE:
                assert holder.pop(int(s.backward_slot[t, p])) == (s.backward[t, p], s.backward_chunk[t, p])
        assert not holder


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(8, 1, 32), (8, 2, 32), (4, 4, 16), (2, 1, 2), (1, 1, 3)])
def test_occupancy(name, stages, chunks, microbatches):
    """v M / (v M + p - 1): arXiv 2104.04473, section 2.2, for microbatches that fill whole groups."""
    work = chunks * microbatches
    assert make_schedule(name, stages, chunks, microbatches).occupancy == pytest.approx(work / (work + stages - 1))


def test_1f1b_keeps_a_bounded_number_of_inputs():
    assert {make_schedule("1f1b", 4, 1, m).slots for m in (8, 32, 128)} == {7}
    assert {make_schedule("1f1b", 4, 2, m).slots for m in (8, 32, 128)} == {11}
    assert [make_schedule("gpipe", 4, 1, m).slots for m in (8, 32)] == [8, 32]


def test_a_small_table_by_hand():
    assert str(make_schedule("1f1b", 2, 1, 2)).split() == (
        ["stage", "0:", "F0.0", "F1.0", "B0.0", "B1.0", "stage", "1:", "-", "F0.0+B0.0", "F1.0+B1.0", "-"]
    )


@given(layers=st.integers(1, 70), stages=st.integers(1, 8), chunks=st.integers(1, 4))
def test_every_layer_has_one_place_and_order_is_kept(layers, stages, chunks):
    if layers < stages * chunks:
        return
    pieces = cut_layers(layers, stages, chunks)
    order = [
        int(layer)
        for chunk in range(chunks)
        for stage in range(stages)
        for layer, live in zip(pieces.layer[stage, chunk], pieces.live[stage, chunk], strict=True)
        if live
    ]
    assert order == list(range(layers))
    flat = pieces.layer.reshape(stages, -1)
    np.testing.assert_array_equal(flat[pieces.position], np.arange(layers))
