"""SparseGPT against the optimal brain surgeon that it speeds up."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.compression.saliency import keep_two_of_four, magnitude
from dsv3_jax.compression.sparse import sparse_gpt

DAMPING = 0.01


def by_surgeon(w, h, block):
    """Input by input with the inverse of what is left of H (Hassibi and Stork 1993): no factorisation, in float64."""
    K = len(w)
    w, h = w.copy(), h + DAMPING * np.trace(h) / K * np.eye(K)
    for begin in range(0, K, block):
        inputs = range(begin, begin + block)
        inverse = {j: np.linalg.inv(h[j:, j:]) for j in inputs}
        score = np.stack([w[j] ** 2 / inverse[j][0, 0] for j in inputs])
        kept = np.argsort(np.argsort(-score, axis=0), axis=0) < block // 2
        for j in inputs:
            error = np.where(kept[j - begin], 0, w[j])
            w[j:] -= np.outer(inverse[j][:, 0] / inverse[j][0, 0], error)
            w[j] = np.where(kept[j - begin], w[j], 0)
    return w


@pytest.mark.parametrize("block", [4, 16])
def test_sparse_gpt_is_the_optimal_brain_surgeon(block):
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 32)) @ random.normal(size=(32, 32))
    w, h = random.normal(size=(32, 8)), x.T @ x
    expected = by_surgeon(w, h, block)
    found = np.asarray(sparse_gpt(jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32), block, DAMPING))
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())  # float32's factorisation
    assert ((found.reshape(-1, block, 8) != 0).sum(1) == block // 2).all()


def test_it_loses_less_than_a_mask_alone():
    random = np.random.default_rng(1)
    x = random.normal(size=(500, 32)) @ random.normal(size=(32, 32))
    w = jnp.asarray(random.normal(size=(32, 8)), jnp.float32)
    masked = jnp.where(keep_two_of_four(magnitude(w, jnp.ones(32))), w, 0)
    sparse = sparse_gpt(w, jnp.asarray(x.T @ x, jnp.float32), 4)
    ours, theirs = (np.square(x @ np.asarray(w - a)).sum() for a in (sparse, masked))
    assert ours < 0.8 * theirs
