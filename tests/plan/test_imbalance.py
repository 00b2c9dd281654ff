"""Uneven loads by hand, from a number and from a run's routing."""

import json

import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.plan.imbalance import read_imbalance


def test_each_layer_waits_for_its_fullest_device(tmp_path):
    """Four experts on two devices: 7 of 10 tokens, and 6 of 12, fall on the fuller one; 1.4 and 1 in the mean."""
    rows = [{"step": 1, "load": [[4, 3, 2, 1], [1, 5, 3, 3]]}]
    (tmp_path / "routing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_imbalance(str(tmp_path))
    assert found.among(2, 4) == pytest.approx(1.2)
    assert found.among(4, 4) == pytest.approx((4 / 2.5 + 5 / 3) / 2)
    assert found.among(1, 4) == 1
    with pytest.raises(UserError, match="recorded 4 experts"):
        found.among(2, 8)
    assert read_imbalance("1.5").among(2, 8) == 1.5
    with pytest.raises(UserError, match="use 1 or more"):
        read_imbalance("0.9")


def test_damaged_lines_of_a_routing_record_are_left_out(tmp_path):
    record = tmp_path / "routing.jsonl"
    record.write_bytes(b'\xff\n{"step": 1, "load": [[4, 3, 2, 1]]}\n{"load": [[1, 1, 1, 1]]}\n[]\n')
    found = read_imbalance(str(record))
    assert found.among(2, 4) == pytest.approx(1.4)
    assert found.skipped == 3
    for load in (
        "3",
        "[1, 2]",
        "[[1], [1, 2]]",
        "[[0, 0]]",
        "[[-1, 2]]",
        "[[1e999, 1]]",
        '[["a", 1]]',
        f"[[{10**400}, 1]]",
        "[[[1]]]",
    ):
        record.write_text('{"step": 1, "load": ' + load + "}\n")
        with pytest.raises(UserError, match="use a number of 1 or more, or a run that has recorded"):
            read_imbalance(str(record))
