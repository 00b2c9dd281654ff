"""Attention over pages against attention over one long cache."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.serve.attend import PAGE, LayerPages, over_cache, over_pages, table_width

B, L, H, C, R, POSITIONS = 3, 2, 2, 8, 4, 700
SCALE = 0.7


def test_pages_in_any_order_are_the_cache_that_they_hold():
    """Sequences of one token, of one block of pages and of three. 1e-5: the sums' order differs."""
    random = np.random.default_rng(0)
    width = table_width(POSITIONS)
    page_BP = 1 + random.permutation(B * width).reshape(B, width)
    pages = LayerPages(*(jnp.asarray(random.normal(size=(B * width + 1, PAGE, n)), jnp.float32) for n in (C, R)))
    q_latent_BLHC, q_rope_BLHR = (jnp.asarray(random.normal(size=(B, L, H, n)) * 3, jnp.float32) for n in (C, R))
    position_BL = jnp.array([[0, 1], [250, 251], [POSITIONS - 2, POSITIONS - 1]])
    found = jax.jit(over_pages, static_argnums=5)(q_latent_BLHC, q_rope_BLHR, pages, page_BP, position_BL, SCALE)
    cache = [jnp.asarray(np.asarray(a)[page_BP].reshape(B, width * PAGE, -1)) for a in pages]
    visible_BLS = jnp.arange(width * PAGE) <= position_BL[..., None]
    expected = over_cache(q_latent_BLHC, q_rope_BLHR, *cache, visible_BLS, SCALE)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # a row's bits are its own, however far the loop goes for others
    alone = jax.jit(over_pages, static_argnums=5)
    short = alone(q_latent_BLHC, q_rope_BLHR, pages, page_BP, jnp.minimum(position_BL, position_BL[0]), SCALE)
    np.testing.assert_array_equal(short[0], found[0])


def test_latents_are_averaged_by_the_softmax_of_scores():
    """Two latents of one number, worked out by hand."""
    q_latent, q_rope = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    c_kv, k_rope = jnp.array([[[0.0], [2.0]]]), jnp.zeros((1, 2, 1))
    out = over_cache(q_latent, q_rope, c_kv, k_rope, jnp.ones((1, 1, 2), bool), 0.5)
    np.testing.assert_allclose(out.item(), 2 * np.e / (1 + np.e), rtol=1e-6)
