"""The words of a load's report, worked out by hand."""

import pytest

from dsv3_jax.bench.figures import (
    Limits,
    Outcome,
    busy,
    decode_fill,
    goodput,
    percentiles,
    report,
    row_utilisation,
    slot_occupancy,
)

# Two steps of 4 slots. In the first, 3 sequences decode in a bucket of 4 beside a piece of 5 tokens in 8, and one waits; in the
# second, 2 decode in a bucket of 2 and nobody waits. They take 0.2 s of 0.5 s. Of 4 drafts, 3 were right.
COUNTS = {
    "rows_live": 3 + 5 + 2, "rows_computed": 4 + 8 + 2, "decode_rows_live": 3 + 2, "decode_rows_computed": 4 + 2,
    "slots_live_while_waiting": 4, "slots_while_waiting": 4, "busy_s": 0.2, "drafts": 4, "drafts_accepted": 3,
}  # fmt: skip
# arrives at 1.0: first token after 0.5 s, gaps of 0.1 and 0.3 s, five tokens
SLOW = Outcome(1.0, 7, ((1.5, 1), (1.6, 2), (1.9, 2)))
QUICK = Outcome(0.0, 3, ((0.1, 1), (0.2, 1)))
SINGLE = Outcome(2.0, 3, ((2.2, 1),))  # one token: no gap
FAILED = Outcome(0.5, 3, error="status 503")


def test_rows_and_slots():
    assert row_utilisation(COUNTS) == pytest.approx(10 / 14)
    assert decode_fill(COUNTS) == pytest.approx(5 / 6)
    assert slot_occupancy(COUNTS) == 1.0
    assert slot_occupancy(COUNTS | {"slots_while_waiting": 8}) == 0.5
    assert slot_occupancy(COUNTS | {"slots_while_waiting": 0}) is None
    assert busy(COUNTS, 0.5) == pytest.approx(0.4)


def test_times_of_a_request():
    assert SLOW.first_token_s == pytest.approx(0.5)
    assert SLOW.gaps_s == pytest.approx([0.1, 0.3])
    assert SLOW.tokens == 5
    assert SINGLE.gaps_s == []


def test_percentiles_are_between_neighbours():
    assert percentiles([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx({"p50": 3.0, "p90": 4.6, "p99": 4.96})
    assert percentiles([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0}


def test_goodput_counts_who_met_both_limits():
    every = [SLOW, QUICK, SINGLE, FAILED]
    assert goodput(every, Limits(1.0, 1.0), 2.0) == 3 / 2
    assert goodput(every, Limits(0.4, 1.0), 2.0) == 2 / 2  # not the slow one's first token
    assert goodput(every, Limits(1.0, 0.2), 2.0) == 2 / 2  # nor its gaps, whose p99 is 0.298
    assert goodput(every, Limits(1.0, 0.2981), 2.0) == 3 / 2
    assert goodput(every, Limits(0.15, 0.01), 2.0) == 0


def test_a_report_has_it_all():
    figures = report([SLOW, QUICK, FAILED], COUNTS, Limits(0.4, 1.0), wall_s=2.0)
    assert figures == {
        "requests": 3, "failed": 1, "wall_s": 2.0, "tokens_per_s": 7 / 2, "requests_per_s": 1.0, "goodput_per_s": 0.5,
        "first_token_s": pytest.approx({"p50": 0.3, "p90": 0.46, "p99": 0.496}),
        "gap_s": pytest.approx({"p50": 0.1, "p90": 0.26, "p99": 0.296}),
        "row_utilisation": pytest.approx(10 / 14), "decode_fill": pytest.approx(5 / 6), "slot_occupancy_while_waiting": 1.0,
        "busy": 0.1, "drafts_accepted": 0.75,
    }  # fmt: skip


def test_a_report_of_a_server_that_tells_nothing_or_fails():
    assert "row_utilisation" not in report([QUICK], None, Limits(1, 1), 1.0)
    figures = report([FAILED], None, Limits(1, 1), 1.0)
    assert (figures["failed"], figures["tokens_per_s"]) == (1, 0)
    assert "first_token_s" not in figures
