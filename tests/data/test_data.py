"""Data: splits, exact packing, exact restoring, formats, and bad files by name and line."""

import dataclasses
import fcntl
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import DataConfig
from dsv3_jax.data.batches import PackedWindows, batch_windows, train_batches
from dsv3_jax.data.cache import cached
from dsv3_jax.data.corpus import documents, is_validation, stdlib_files
from dsv3_jax.data.store import TokenStore, load_corpus, read_documents
from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.errors import UserError


def store_of(lengths: list[int]) -> TokenStore:
    """Documents whose tokens tell where they are: document d holds d*1000, d*1000+1, ..."""
    tokens = np.concatenate([np.arange(n) + 1000 * d for d, n in enumerate(lengths)]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenStore(tokens, offsets, [f"doc{d}" for d in range(len(lengths))], np.asarray(lengths))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 50), min_size=1, max_size=12), seq_len=st.integers(1, 40))
def test_every_token_is_a_target_exactly_once(lengths, seq_len):
    source = PackedWindows(store_of(lengths), seq_len, ahead=1, seed=0, shuffle=False)
    targets = []
    for i in range(len(source)):
        window = source[i]
        same = (window.segments[:-1] == window.segments[1:]) & (window.segments[1:] >= 0)
        targets += window.tokens[1:][same].tolist()
    # all but each document's first token, which frames it
    assert targets == [1000 * d + i for d, n in enumerate(lengths) for i in range(1, n)]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 50), min_size=2, max_size=12), seq_len=st.integers(1, 20), seed=st.integers(0, 9))
def test_an_epoch_shows_every_window_of_shuffled_documents_once(lengths, seq_len, seed):
    if sum(lengths) < seq_len + 2:
        return
    source = PackedWindows(store_of(lengths), seq_len, ahead=2, seed=seed, shuffle=True)
    inputs = [t for i in range(source.windows_per_epoch) for t in source[i].tokens[:seq_len].tolist()]
    assert len(set(inputs)) == len(inputs) == source.windows_per_epoch * seq_len
    for i in range(2 * source.windows_per_epoch):  # into the second epoch
        window = source[i]
        # within a segment, tokens of one document follow each other
        inside = window.segments[1:] == window.segments[:-1]
        assert (np.diff(window.tokens)[inside] == 1).all()
        assert {f"doc{t // 1000}" for t in window.tokens} == set(source.document_ids(i))


def test_epochs_and_seeds_differ():
    def first_epochs(seed):
        source = PackedWindows(store_of([30] * 20), 10, 1, seed, shuffle=True)
        n = source.windows_per_epoch
        return [[source[e * n + i].tokens.tolist() for i in range(n)] for e in range(2)]

    a, b = first_epochs(0), first_epochs(1)
    assert a[0] != a[1]
    assert a[0] != b[0]
    assert a == first_epochs(0)


def test_documents_and_windows_are_shuffled_anew_in_every_epoch():
    """Each by itself: either alone would leave neighbours together."""
    source, other = (PackedWindows(store_of([30] * 20), 10, 1, seed, shuffle=True) for seed in (0, 1))
    n = source.windows_per_epoch
    orders = [s._make_epoch(epoch).order.tolist() for s, epoch in ((source, 0), (source, 1), (other, 0))]
    windows = [[s._locate(epoch * n + i)[1] for i in range(n)] for s, epoch in ((source, 0), (source, 1), (other, 0))]
    for shuffled, count in ((orders, 20), (windows, n)):
        assert all(sorted(one) == list(range(count)) for one in shuffled)
        assert len({tuple(one) for one in [*shuffled, range(count)]}) == 4
    assert [source._locate(n)[0], source._locate(n - 1)[0]] == [1, 0]


def test_iterator_state_restores_exactly():
    source = PackedWindows(store_of([40] * 20), 16, 2, 0, shuffle=True)
    one = train_batches(source, 4, range(4))
    for _ in range(7):
        next(one)
    state = json.loads(json.dumps(one.get_state()))
    other = train_batches(source, 4, range(4))
    other.set_state(state)
    for step in range(7, 12):
        a, b = next(one), next(other)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        expected = [source[w].tokens for w in batch_windows(4, step)]
        np.testing.assert_array_equal(a.tokens, expected)


def test_processes_share_the_global_batch():
    """Each reads its own rows, whichever they are; the position that a checkpoint keeps is the same for all."""
    source = PackedWindows(store_of([40] * 20), 16, 1, 0, shuffle=True)
    whole, shares = train_batches(source, 4, range(4)), ([1, 3], [0, 2], [2])
    parts = [train_batches(source, 4, rows) for rows in shares]
    for _ in range(5):
        batch = next(whole).tokens
        for rows, part in zip(shares, parts, strict=True):
            np.testing.assert_array_equal(next(part).tokens, batch[rows])
    assert all(part.get_state() == whole.get_state() for part in parts)


def test_split_is_by_content():
    texts = [f"text {i}" for i in range(4000)]
    share = np.mean([is_validation(t, 0.05) for t in texts])
    assert 0.03 < share < 0.07
    # a document on the validation side stays there when the fraction grows
    assert all(is_validation(t, 0.2) for t in texts if is_validation(t, 0.05))


def test_default_corpus_is_the_standard_library():
    files = stdlib_files()
    assert any(p.name == "argparse.py" for p in files)
    assert not any("site-packages" in p.parts or "test" in p.parts for p in files)


def test_formats(tmp_path):
    (tmp_path / "a.txt").write_text("plain text")
    (tmp_path / "b.jsonl").write_text('{"body": "first"}\n\n{"body": "second \\u2028 line"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["third", "fourth"]}), tmp_path / "c.parquet")
    config = DataConfig(path=f"{tmp_path}/*", text_field="body")
    found = {d.id.removeprefix(f"{tmp_path}/"): d.text for d in documents(config)}
    assert found == {
        "a.txt": "plain text", "b.jsonl:1": "first", "b.jsonl:3": "second \u2028 line", "c.parquet:1": "third",
        "c.parquet:2": "fourth",
    }  # fmt: skip


BAD_FILES = [
    ("a.txt", b"good\nbad \xff byte", "a.txt, line 2: not UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "a.jsonl, line 2: no string field"),
    ("a.jsonl", b'{"text": "x"}\n\nnonsense\n', "a.jsonl, line 3: not JSON"),
    ("a.jsonl", b'{"body": "x"}\n', "found body"),
    ("a.parquet", b"nonsense", "a.parquet"),
    ("a.csv", b"x", "unknown type '.csv'"),
    ("a.txt", b"  \n", "holds no text"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES)
def test_bad_files_are_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    config = DataConfig(path=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError) as error:
        load_corpus(config, 300)
    assert expected in str(error.value)
    assert not list((tmp_path / "cache").glob("tokens*"))


def test_a_parquet_without_the_column_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column"):
        list(documents(DataConfig(path=str(tmp_path / "a.parquet"))))


def test_corpus_is_cached_and_framed(corpus_dir, tmp_path):
    config = DataConfig(path=f"{corpus_dir}/*.txt", cache_dir=str(tmp_path / "cache"))
    said = []
    corpus = load_corpus(config, 300, said.append)
    assert len(said) == 2
    again = load_corpus(config, 300, said.append)
    assert len(said) == 3  # nothing tokenised
    np.testing.assert_array_equal(corpus.train.tokens, again.train.tokens)
    bos, eos = (corpus.tokenizer.token_to_id(name) for name in ("<|begin_of_text|>", "<|end_of_text|>"))
    for store in (corpus.train, corpus.validation):
        assert (store.tokens[store.offsets[:-1]] == bos).all()
        assert (store.tokens[store.offsets[1:] - 1] == eos).all()
    assert len(corpus.train) + len(corpus.validation) == 200
    everything = read_documents(dataclasses.replace(config, path=f"{corpus_dir}/00*.txt"), corpus.tokenizer)
    assert len(everything) == 10


def test_what_killed_processes_were_making_is_removed(tmp_path):
    """But not what another process is making just now."""
    for name in ("killed", "running", "new"):
        (tmp_path / f".tokens-{name}").mkdir()
        (tmp_path / f".tokens-{name}" / "lock").touch()
        if name != "new":
            os.utime(tmp_path / f".tokens-{name}" / "lock", (1, 1))
    with open(tmp_path / ".tokens-running" / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        entry = cached(tmp_path, "tokens-x", lambda directory: (directory / "made").touch())
    assert [p.name for p in entry.iterdir()] == ["made"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tokens-new", ".tokens-running", "tokens-x"]


def test_documents_are_measured_in_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("naïve: 5 €", encoding="utf-8")
    found = read_documents(DataConfig(path=f"{tmp_path}/a.txt"), train_tokenizer(["some text"], 260))
    assert found.text_bytes.tolist() == [13]  # ten characters, of which one has two bytes and one three


def test_too_little_text_for_a_sequence_or_a_split(tmp_path):
    (tmp_path / "a.txt").write_text("short text")
    with pytest.raises(UserError, match="document out of 1"):
        load_corpus(DataConfig(path=f"{tmp_path}/a.txt", cache_dir=str(tmp_path / "c")), 300)
    with pytest.raises(UserError, match=r"data\.seq_len=64"):
        PackedWindows(store_of([20, 20]), 64, 1, 0, shuffle=True)


@settings(max_examples=20, deadline=None)
@given(text=st.text(max_size=60))
def test_byte_level_tokenizer_is_exact(text):
    tokenizer = train_tokenizer(["some text to learn merges from, some more text"], 300)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    tokenizer = train_tokenizer(["some text"], 260)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"model\.vocab_size=100 is smaller"):
        load_tokenizer(tmp_path / "tokenizer.json", 100)
    size = tokenizer.get_vocab_size()
    with pytest.raises(UserError, match=f"has {size} tokens"):
        load_tokenizer(tmp_path / "tokenizer.json", size - 1)
    load_tokenizer(tmp_path / "tokenizer.json", size)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json"):
        load_tokenizer(tmp_path / "bad.json", 300)
    with pytest.raises(UserError, match="at least 258"):
        train_tokenizer(["x"], 200)
