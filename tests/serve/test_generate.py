"""Generation: the cached path against the uncached model, sampling, ends, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import dsv3_jax as dsv3
from dsv3_jax.data.special_tokens import SpecialTokens
from dsv3_jax.errors import UserError
from dsv3_jax.serve.cache import empty_cache, extend, unstack
from tests.conftest import FIXTURES


@pytest.fixture(scope="module")
def model():
    return dsv3.load_hf(FIXTURES / "v3_tiny")


def test_cached_hidden_states_equal_uncached(model):
    """Token by token and in uneven pieces, past where the cache was padded."""
    ids = np.load(FIXTURES / "v3_tiny" / "reference.npz")["input_ids_0"]
    expected, _ = jax.jit(model.hidden)(jnp.asarray(ids), jnp.zeros(ids.shape, jnp.int32))
    cache = empty_cache(model.config, model.layout, ids.shape[0], 80, jnp.dtype("float32"))
    start = 0
    run = jax.jit(lambda cache, ids, start: extend(model, unstack(model, ids.size), cache, ids, start))
    for size in (5, 1, 1, 17, 1, 20):
        hidden, cache = run(cache, jnp.asarray(ids[:, start : start + size]), jnp.int32(start))
        np.testing.assert_allclose(hidden, expected[:, start : start + size], atol=1e-4)
        start += size


def test_prompts_longer_than_a_prefill_chunk(model):
    prompt = np.random.default_rng(0).integers(0, 256, (2, 131))
    out = np.asarray(dsv3.generate(model, prompt, 5))
    logits = np.asarray(model(out))
    np.testing.assert_array_equal(out[:, 131:], logits[:, 130:-1].argmax(-1))


def test_sampling_depends_on_the_seed_and_top_p(model):
    def draw(**options):
        return np.asarray(dsv3.generate(model, [[1, 2, 3]], 20, **options))

    assert (draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1)).all()
    assert (draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)).any()
    np.testing.assert_array_equal(draw(temperature=1.0, top_p=1e-6), draw())


def test_a_batchs_rows_are_those_of_the_following_seeds(model):
    together = np.asarray(dsv3.generate(model, [[1, 2, 3]] * 3, 12, temperature=1.0, seed=2**32 - 2))
    for row, seed in zip(together, (2**32 - 2, 2**32 - 1, 0), strict=True):
        np.testing.assert_array_equal(row, np.asarray(dsv3.generate(model, [[1, 2, 3]], 12, temperature=1.0, seed=seed))[0])
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_sampling_frequencies_follow_the_model(model):
    out = np.asarray(dsv3.generate(model, np.full((4000, 1), 7), 1, temperature=1.0))[:, 1]
    logits = np.asarray(model(np.array([[7]])))[0, 0]
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    observed = np.bincount(out, minlength=256) / 4000
    assert np.abs(observed - expected).max() < 4 * np.sqrt(expected.max() / 4000)


def test_rows_repeat_the_end_token(model):
    free = np.asarray(dsv3.generate(model, [[5, 6], [9, 1]], 12))
    eos = int(free[0, 4])
    out = np.asarray(dsv3.generate(model, [[5, 6], [9, 1]], 12, eos_id=eos))
    first = int(np.argmax(out[0, 2:] == eos)) + 2
    np.testing.assert_array_equal(out[0, :first], free[0, :first])
    assert (out[0, first:] == eos).all()


def test_any_of_several_end_tokens_ends_a_row(model):
    """Each row repeats the one that ended it, as it would by this one alone; the number of end tokens does not matter."""
    free = np.asarray(dsv3.generate(model, [[5, 6], [9, 1]], 12))
    ends = [int(free[0, 4]), int(free[1, 6])]
    out = np.asarray(dsv3.generate(model, [[5, 6], [9, 1]], 12, eos_id=[*ends, *range(256, 264)]))
    for row, found in zip(free, out, strict=True):
        first = next(i for i in range(2, 14) if row[i] in ends)
        np.testing.assert_array_equal(found[:first], row[:first])
        assert (found[first:] == row[first]).all()


def test_a_text_is_begun_once_and_ends_at_any_end(model, monkeypatch):
    """A prompt that has a begin token, as chat templates write it, gets no second one."""
    from dsv3_jax.serve import generate as module

    words = {"<bos>": 0, "<eos>": 1, "<end>": 2, "a": 3, "b": 4, "?": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<end>"])
    asked = []

    def generate(_, ids, n, eos_id, **options):
        asked.append((*ids, eos_id))
        return np.array([[*ids[0], 4, 2, 2][: len(ids[0]) + n]])

    monkeypatch.setattr(module, "generate", generate)
    for prompt in ("a b", "<bos> a b", "<bos>a b"):
        text = module.continue_text(model, tokenizer, SpecialTokens(0, (1, 2)), prompt, 3, 0.0, 1.0, 0)
        assert text == "a b b"
    assert asked == [([0, 3, 4], (1, 2))] * 3
    module.continue_text(model, tokenizer, SpecialTokens(None, ()), "a <end> b", 3, 0.0, 1.0, 0)
    assert asked[-1] == ([3, 2, 4], ())
    with pytest.raises(UserError, match=r"--prompt='a \\udcff' holds bytes that are no UTF-8"):  # as the shell passes them
        module.continue_text(model, tokenizer, SpecialTokens(None, ()), "a \udcff", 3, 0.0, 1.0, 0)
    tokenizer.model = models.WordLevel(words, unk_token="<none>")
    with pytest.raises(UserError, match=r"--prompt='c' cannot be encoded: "):  # there is no token for it
        module.continue_text(model, tokenizer, SpecialTokens(0, (1,)), "c", 3, 0.0, 1.0, 0)


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ([[]], {}, "prompt_ids"),
        ([1, 2], {}, "prompt_ids"),
        ([[1, 2], [3]], {}, "rows of 1, 2 tokens; all prompts of a call must have the same length"),
        ([[1], 2], {}, "rows of 0, 1 tokens"),
        ([[999]], {}, "outside"),
        ([[1]], {"max_new_tokens": 0}, "use 1 to 255"),
        ([[1]], {"max_new_tokens": 256}, "use 1 to 255"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], {"seed": -1}, "seed=-1 is out of range; use 0 to 4294967295"),
        ([[1]], {"seed": 2**32}, "seed=4294967296 is out of range"),
    ],
)
def test_impossible_requests_are_refused(model, prompt, options, expected):
    with pytest.raises(UserError, match=expected):
        dsv3.generate(model, prompt, **options)
