"""Which documents are held out: by hash, from files of their own, or the end of a corpus of few documents."""

import dataclasses
import json

import numpy as np
import pytest

from dsv3_jax.config import Config, DataConfig
from dsv3_jax.data.split import held_out_documents, split_documents
from dsv3_jax.data.store import load_corpus
from dsv3_jax.errors import UserError
from dsv3_jax.training.finish import first_documents, held_out_text


def sides(config: DataConfig) -> tuple[list[str], list[str]]:
    found = [(held_out, document.text) for held_out, document in split_documents(config)]
    assert [d.text for d in held_out_documents(config)] == [text for held_out, text in found if held_out]
    return [text for held_out, text in found if not held_out], [text for held_out, text in found if held_out]


@pytest.fixture
def lines():
    return "".join(f"line {i:04d} of the sea\n" for i in range(1000))  # 21 characters each


@pytest.mark.parametrize("fraction", [0.05, 0.95])
def test_the_end_of_a_single_text_is_held_out(tmp_path, lines, fraction):
    (tmp_path / "a.txt").write_text(lines)
    config = DataConfig(path=f"{tmp_path}/a.txt", validation_fraction=fraction, cache_dir=f"{tmp_path}/cache")
    (train,), (held_out,) = sides(config)
    assert train + held_out == lines
    assert held_out.startswith("line ")
    assert len(held_out) == pytest.approx(fraction * 21_000, abs=21)
    said = []
    corpus = load_corpus(config, 300, said.append)
    assert (
        f"data.path: too few different documents (1 of 1) to hold out one of them: it is the last {fraction:.1%} of the text"
    ) in said
    for store, text in ((corpus.train, train), (corpus.validation, held_out)):
        bos, eos = corpus.special.begin, corpus.special.ends[0]
        assert [store.tokens[0], store.tokens[-1]] == [bos, eos]
        assert corpus.tokenizer.decode(store.tokens.tolist()) == text
        assert store.text_bytes.tolist() == [len(text)]
    assert list(corpus.train.ids) == [f"{tmp_path}/a.txt"]
    assert list(corpus.validation.ids) == [f"{tmp_path}/a.txt, from character {len(train)}"]


def test_the_end_of_a_long_text_is_held_out_in_parts(tmp_path, lines):
    """So that a part of it can be evaluated; neither side is ever in memory, and nothing is lost between pieces."""
    (tmp_path / "a.txt").write_text(lines * 100)
    (train,), held_out = sides(DataConfig(path=f"{tmp_path}/a.txt", validation_fraction=0.25))
    assert train + "".join(held_out) == lines * 100
    assert len("".join(held_out)) == pytest.approx(525_000, abs=21)
    assert [len(text) > 2**15 for text in held_out[:-1]] == [True] * (len(held_out) - 1)
    assert 5 <= len(held_out) <= 9


def test_of_a_few_documents_the_last_is_cut(tmp_path, lines):
    with open(tmp_path / "a.jsonl", "w") as file:
        for name in ("one", "two", "three"):
            file.write(json.dumps({"text": f"{name}\n{lines}"}) + "\n")
    config = DataConfig(path=f"{tmp_path}/a.jsonl", validation_fraction=0.001)
    train, held_out = sides(config)
    assert [text[:5] for text in train] == ["one\nl", "two\nl", "three"]
    assert train[2] + held_out[0] == f"three\n{lines}"
    assert len(held_out) == 1
    train, held_out = sides(dataclasses.replace(config, validation_fraction=0.0011, path=f"{tmp_path}/a.jsonl"))
    assert "".join(held_out).count("\n") >= 3


def test_whole_documents_at_the_end(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 1000)
    config = DataConfig(path=f"{tmp_path}/*.txt", validation_fraction=0.5)
    if len({held_out for held_out, _ in split_documents(config)}) == 2:
        config = dataclasses.replace(config, validation_fraction=1e-9)
    train, held_out = sides(config)
    assert "".join(train + held_out) == "".join(f"{number}" * 1000 for number in range(4))
    assert len("".join(held_out)) >= 16


def test_documents_of_one_text_are_counted_once(tmp_path):
    """They are all on one side: 56 documents, of which 50 are the same, were called too few."""
    texts = ["the same text, fifty times"] * 50 + [f"another text, number {i}" for i in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    said = []
    list(split_documents(DataConfig(path=f"{tmp_path}/a.jsonl", validation_fraction=1e-9), said.append))
    assert said == ["data.path: too few different documents (7 of 56) to hold out one of them: it is the last 0.0% of the text"]


def test_a_line_without_spaces_is_cut_anywhere(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    assert sides(DataConfig(path=f"{tmp_path}/a.txt")) == (["x" * 950], ["x" * 50])
    (tmp_path / "a.txt").write_text("words of text " * 100)
    (train,), (held_out,) = sides(DataConfig(path=f"{tmp_path}/a.txt"))
    assert train.endswith(" ")
    assert held_out[0].isalpha()


@pytest.mark.parametrize("own", [False, True])
def test_the_text_that_a_report_compresses_is_the_evaluated_one(tmp_path, lines, own):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(lines.replace("sea", f"sea, {name}"))
    config = DataConfig(path=f"{tmp_path}/a.txt", cache_dir=f"{tmp_path}/cache")
    if own:
        config = dataclasses.replace(config, validation_path=f"{tmp_path}/b.txt")
    corpus = load_corpus(config, 300)
    store = first_documents(corpus.validation, 2**20)
    text = held_out_text(Config(data=config), len(store))
    assert len(text) == store.text_bytes.sum() > 1000
    assert text.decode() == corpus.tokenizer.decode(store.tokens.tolist())


def test_hashes_decide_where_they_can(corpus_dir):
    config = DataConfig(path=f"{corpus_dir}/*.txt")
    train, held_out = sides(config)
    assert (len(train), len(held_out)) == (191, 9)


def test_held_out_files_of_their_own(tmp_path, corpus_dir):
    (tmp_path / "own.jsonl").write_text('{"text": "held out one"}\n{"text": "held out two"}\n')
    config = DataConfig(path=f"{corpus_dir}/*.txt", validation_path=f"{tmp_path}/own.jsonl", cache_dir=f"{tmp_path}/cache")
    train, held_out = sides(config)
    assert len(train) == 200
    assert held_out == ["held out one", "held out two"]
    corpus = load_corpus(config, 300)
    assert (len(corpus.train), len(corpus.validation)) == (200, 2)
    before = np.array(corpus.validation.tokens)
    (tmp_path / "own.jsonl").write_text('{"text": "held out three"}\n')
    corpus = load_corpus(config, 300)  # the cache knows that they changed
    assert len(corpus.validation) == 1
    assert before.tolist() != corpus.validation.tokens.tolist()


def test_held_out_files_that_are_trained_on_are_said(tmp_path, corpus_dir):
    """By whatever name: what is measured on them is no held-out loss."""
    (tmp_path / "link.txt").symlink_to(sorted(corpus_dir.glob("*.txt"))[0])
    for held_out, both in ((f"{tmp_path}/link.txt", ["1 of its files"]), (f"{tmp_path}/own.txt", [])):
        (tmp_path / "own.txt").write_text("the sea")
        said = []
        list(split_documents(DataConfig(path=f"{corpus_dir}/*.txt", validation_path=held_out), said.append))
        assert [line.partition(": ")[2].partition(" are in")[0] for line in said] == both


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, r"^data\.validation_path='.*none\.txt' matches no file"),
        (b"\xff", r"^data\.validation_path: .*none\.txt, line 1: not UTF-8"),
        (b" ", r"^data\.validation_path: .*none\.txt holds no text"),
    ],
)
def test_bad_held_out_files_are_named_as_such(tmp_path, corpus_dir, content, expected):
    if content is not None:
        (tmp_path / "none.txt").write_bytes(content)
    config = DataConfig(path=f"{corpus_dir}/*.txt", validation_path=f"{tmp_path}/none.txt", cache_dir=f"{tmp_path}/cache")
    with pytest.raises(UserError, match=expected):
        load_corpus(config, 300)
    assert not list((tmp_path / "cache").glob("tokens*"))
