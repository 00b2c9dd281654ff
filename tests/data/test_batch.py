"""What a batch says of its inputs and targets, by hand."""

import numpy as np

from dsv3_jax.data.batch import Batch, stack

# two documents, then padding; with two MTP modules 3 of the 6 are inputs
BATCH = Batch(np.array([[10, 11, 12, 20, 21, 0]]), np.array([[0, 0, 0, 1, 1, -1]]))


def test_inputs_are_all_but_what_targets_need():
    tokens, segments = BATCH.inputs(2)
    assert tokens.tolist() == [[10, 11, 12]]
    assert segments.tolist() == [[0, 0, 0]]
    assert BATCH.inputs(0).tokens.tolist() == [[10, 11, 12, 20, 21]]
    assert BATCH.rows == 1


def test_targets_lie_ahead_in_the_same_document():
    """The last token of a document has no next one; padding is no target of padding."""
    tokens, counts = BATCH.targets(1, 0)
    assert tokens.tolist() == [[11, 12, 20, 21, 0]]
    assert counts.tolist() == [[True, True, False, True, False]]
    tokens, counts = BATCH.targets(3, 2)
    assert tokens.tolist() == BATCH.tokens_ahead(3, 2).tolist() == [[20, 21, 0]]
    assert counts.tolist() == [[False, False, False]]
    assert [float(n) for n in BATCH.target_counts(2)] == [2, 1, 0]
    padding = Batch(np.zeros((1, 4), int), np.full((1, 4), -1))
    assert [float(n) for n in padding.target_counts(0)] == [0]


def test_windows_are_stacked_to_rows():
    window = Batch(BATCH.tokens[0], BATCH.segments[0])
    assert stack([window, window]).tokens.tolist() == [BATCH.tokens[0].tolist()] * 2
