"""Corpora as people have them: damaged text, packed files, names, folders, nulls and sizes."""

import gzip
import itertools
import json
import os
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import absolute_patterns, data_files, documents, fingerprint
from dsv3_jax.data.document import Document, _cut
from dsv3_jax.data.special_tokens import BOS, EOS
from dsv3_jax.data.store import read_documents
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError

BOM = b"\xef\xbb\xbf"


def texts(path, **fields) -> list[str]:
    return [document.text for document in documents(DataConfig(path=str(path), **fields))]


def table(values, name="text", type=None) -> pyarrow.Table:
    return pyarrow.table({name: pyarrow.array(values, type)})


def test_halves_of_surrogate_pairs_become_replacement_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "bad \ud83d sea \udc00"}' + "\n" + r'{"text": "good \ud83d\ude00"}')
    assert texts(tmp_path / "a.jsonl") == ["bad \ufffd sea \ufffd", "good \U0001f600"]
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xed\xa0\xbd"}')  # one in the bytes is no UTF-8
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: not UTF-8 \(byte 0xed\)"):
        texts(tmp_path / "b.jsonl")


def test_byte_order_marks_are_stripped_and_utf_16_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + "sea \ufeff.".encode())
    assert texts(tmp_path / "a.txt") == ["sea \ufeff."]  # inside a text it is a character
    line = b'{"text": "x"}\n'
    (tmp_path / "a.jsonl").write_bytes(BOM + line + line + BOM + line)  # two files, joined
    assert texts(tmp_path / "a.jsonl") == ["x"] * 3
    for name, encoding in (("b.txt", "UTF-16"), ("b.jsonl", "UTF-16"), ("c.txt", "UTF-32")):
        (tmp_path / name).write_bytes('{"text": "x"}'.encode(encoding))
        with pytest.raises(UserError, match=rf"{name}, line 1: {encoding}, not UTF-8; convert it"):
            texts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"), [("empty.txt", b""), ("mark.txt", BOM), ("blank.jsonl", b"\n \n"), ("mark.jsonl", BOM)]
)
def test_files_without_text_have_no_documents(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == []


def test_home_folders_and_names_that_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "we[ird].txt",
        "a,b.txt",
        "c, d,e.txt",
        "plain.txt",
        "sub/x.txt",
        "sub/deep/y.TXT",
        "sub/.hidden/z.txt",
        "sub/no.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "sub/pipe.txt").symlink_to("/dev/null")
    (tmp_path / "sub/loop").symlink_to(tmp_path / "sub")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    assert texts("~/we[ird].txt") == ["we[ird].txt"]
    assert texts(f"{tmp_path}/a,b.txt") == ["a,b.txt"]
    assert texts(f"{tmp_path}/c, d,e.txt, ~/pl*.txt,{tmp_path}/a,b.txt") == ["c, d,e.txt", "plain.txt", "a,b.txt"]
    assert texts("~/sub") == texts(f"{tmp_path}/linked/") == ["sub/deep/y.TXT", "sub/x.txt"]
    assert texts(f"{tmp_path}/p[kl]ain.txt,~/plain.txt") == ["plain.txt"] * 2  # globs as before
    fingerprint(DataConfig(path="~/sub"))


def test_globs_in_folders_with_brackets_and_commas(tmp_path, monkeypatch):
    folder = tmp_path / "a,b [x], c"
    (folder / "d").mkdir(parents=True)
    for name in ("1.txt", "2.txt", "d/3.txt"):
        (folder / name).write_text(name)
    (tmp_path / "4.txt").write_text("4.txt")
    assert texts(f"{folder}/*.txt, {tmp_path}/4.txt,{folder}/d/*.txt") == ["1.txt", "2.txt", "4.txt", "d/3.txt"]
    monkeypatch.chdir(folder)
    for path, expected in (("**/*.txt", ["1.txt", "2.txt", "d/3.txt"]), ("[12].txt,d", ["1.txt", "2.txt", "d/3.txt"])):
        assert texts(path) == texts(absolute_patterns(path)) == expected
    with pytest.raises(UserError, match=r"a,b \[x\], c/none\.txt' matches no file"):
        texts(folder / "none.txt")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("none*.txt", "data.path='none*.txt' matches no file"),
        ("~nobody-of-that-name/x.txt", "matches no file"),
        ("empty", "data.path='empty': the folder holds no file to read; these are: .txt, .jsonl, .parquet"),
        ("em*", "matches no file; it matches folders: name one of them, such as empty"),
        ("a.txt,,a.txt", "data.path='' matches no file"),
        ("x.csv", "unknown type '.csv'; use one of .txt"),
        ("x.gz", "unknown type '.gz'"),
        ("x.tar.gz", "unknown type '.tar'"),
        ("a\0.txt", "matches no file"),
    ],
)
def test_what_names_no_file_is_refused(tmp_path, monkeypatch, path, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "x.csv", "x.gz", "x.tar.gz"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError) as error:
        data_files(DataConfig(path=path))
    assert expected in str(error.value)


def test_a_file_whose_name_is_no_utf_8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text('{"text": "x"}')
    config = DataConfig(path=str(tmp_path))
    assert len(fingerprint(config)) == 16
    assert read_documents(config, train_tokenizer(["x"], 258)).ids[0] == f"{tmp_path}/caf\udce9.jsonl:1"


def packed(content: bytes, ending: str) -> bytes:
    """Two members, as appending to a packed file makes them."""
    half = len(content) // 2
    pack = gzip.compress if ending == ".gz" else lambda part: pyarrow.compress(part, codec="zstd", asbytes=True)
    return pack(content[:half]) + pack(content[half:])


def test_zeros_after_a_packed_file_are_no_text(tmp_path):
    """As for gzip(1): tapes and block devices fill up their last block. Anything else there is damage."""
    packed = gzip.compress(b"first") + gzip.compress(b" second")
    (tmp_path / "a.txt.gz").write_bytes(packed + bytes(2**20 + 3))
    assert texts(tmp_path / "a.txt.gz") == ["first second"]
    for name, damaged in (("b", packed + b"more"), ("c", packed[:-3]), ("d", packed[:12] + b"\xff" * 9 + packed[21:])):
        (tmp_path / f"{name}.txt.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"data\.path: cannot read .*{name}\.txt\.gz: \w"):
            texts(tmp_path / f"{name}.txt.gz")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_packed_files(tmp_path, ending):
    pyarrow.parquet.write_table(table(["third", "fourth"]), tmp_path / "c.parquet")
    contents = {
        "a.txt": BOM + b"first",
        "b.jsonl": b'{"text": "second"}\n',
        "c.parquet": (tmp_path / "c.parquet").read_bytes(),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}{ending}").write_bytes(packed(content, ending))
    found = [(d.id.removeprefix(f"{tmp_path}/"), d.text) for d in documents(DataConfig(path=f"{tmp_path}/*{ending}"))]
    names = [f"a.txt{ending}", f"b.jsonl{ending}:1", f"c.parquet{ending}:1", f"c.parquet{ending}:2"]
    assert found == list(zip(names, ["first", "second", "third", "fourth"], strict=True))
    for name, content in contents.items():
        whole = packed(content, ending)
        for bad in (whole[:-9], b"nonsense"):
            (tmp_path / f"{name}{ending}").write_bytes(bad)
            with pytest.raises(UserError, match=rf"^data\.path: cannot read .*{name}{ending}: "):
                texts(tmp_path / f"{name}{ending}")


def test_a_packed_line_without_end_stops_at_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_jax.data.readers._MOST_LINE", 2**20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' + b" " * 2**24, 1))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.jsonl\.gz, line 2 has more than 1,048,576 bytes"):
        texts(tmp_path / "a.jsonl.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


NESTED = [
    ('{"a": {"b": "in"}}', "in"),
    ('{"a.b": "literal", "a": {"b": "in"}}', "literal"),
    ('{"a": {"b": null}}', None),
    ('{"a": null}', None),
]


@pytest.mark.parametrize(("line", "expected"), NESTED)
def test_nested_fields(tmp_path, line, expected):
    (tmp_path / "a.jsonl").write_text(line)
    record = json.loads(line)
    types = {"a": pyarrow.struct([("b", pyarrow.string()), ("c", pyarrow.int64())]), "a.b": pyarrow.string()}
    columns = {name: pyarrow.array([value], types[name]) for name, value in record.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert texts(tmp_path / name, text_field="a.b") == ([] if expected is None else [expected])


def test_deeper_and_dotted_names(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1, "m.n": {"o": {"p.q": "deep"}}}')
    assert texts(tmp_path / "a.jsonl", text_field="m.n.o.p.q") == ["deep"]


def test_rows_without_text_are_skipped_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "x"}\n{"text": null}\nnull\n')
    pyarrow.parquet.write_table(table([None, "y", None], type=pyarrow.large_string()), tmp_path / "b.parquet")
    said = []
    config = DataConfig(path=str(tmp_path))
    found = read_documents(config, train_tokenizer(["x"], 258), said.append)
    assert list(found.ids) == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.parquet:2"]
    first = f"{tmp_path}/a.jsonl:1"
    assert said == [f"data.path: rows skipped, whose data.text_field='text' is null: 5, first {first}"]
    (tmp_path / "a.jsonl").write_text('{"body": null}\n')  # a field that is not there is another mistake
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: no string field data\.text_field='text'; found body"):
        texts(tmp_path / "a.jsonl")


BAD_RECORDS = [
    ("[" * 100_000, "nested too deeply"),
    ('{"text": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
    ('{"text": ["x"]}', "it holds list"),
    ('{"text": {"b": "x"}}', "it holds dict"),
    ("3", "found int"),
    ("{}", "found no field"),
    ('{"a\\nb": 1}', r"found 'a\nb'"),
    (json.dumps(dict.fromkeys(map(str, range(1000)))), "18, 19, ..."),
]


@pytest.mark.parametrize(("line", "expected"), BAD_RECORDS)
def test_bad_records_are_one_short_line(tmp_path, line, expected):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
    with pytest.raises(UserError) as error:
        texts(tmp_path / "a.jsonl")
    message = str(error.value)
    assert "a.jsonl, line 2: " in message
    assert expected in message
    assert "\n" not in message
    assert len(message) < 400


def test_bad_columns(tmp_path):
    not_utf8 = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(np.array([0, 1, 2], np.int32)), pyarrow.py_buffer(b"x\xff")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": not_utf8}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: column 'text' is not UTF-8"):
        texts(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table([b"x"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1: column 'text' holds bytes"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column data\.text_field='text\.b'; found text"):
        texts(tmp_path / "a.parquet", text_field="text.b")


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match="matches no file"):
        data_files(DataConfig(path=f"{tmp_path}/a.txt"))


def test_large_files_are_streamed(tmp_path, monkeypatch):
    """Peak memory while documents are read and looked at piece by piece, far below the files' 3 MB."""
    monkeypatch.setattr("dsv3_jax.data.readers._BLOCK", 2**14)
    monkeypatch.setattr("dsv3_jax.data.document._AT_ONCE", 2**12)
    monkeypatch.setattr("dsv3_jax.data.document._PIECE", 2**12)
    lines = [f"the quick brown fox jumps over the lazy dog naïvely, and number {number} is next\n" for number in range(20_000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    characters = sum(map(len, lines))
    del lines
    tracemalloc.start()
    seen = sum(len(piece) for document in documents(DataConfig(path=str(tmp_path))) for piece in document.pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 2 * characters > 3_000_000
    assert peak < 2**18


def test_a_bad_byte_far_into_a_large_file_is_named_by_its_line(tmp_path):
    content = ("é" * 99 + "\n").encode() * 12_000  # 2.4 MB, characters of two bytes lie across the parts that are read
    (tmp_path / "a.txt").write_bytes(b"x" + content)
    assert texts(tmp_path / "a.txt") == ["x" + content.decode()]
    (tmp_path / "a.txt").write_bytes(content + b"bad \xff")
    with pytest.raises(UserError, match=r"a\.txt, line 12001: not UTF-8 \(byte 0xff\)"):
        texts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(content + "€".encode()[:2])  # cut off inside a character
    with pytest.raises(UserError, match=r"a\.txt, line 12001: not UTF-8 \(byte 0xe2\)"):
        texts(tmp_path / "a.txt")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["ab", "b1", "a.", "é", "中", "\n", "", "\U0001f600", "\r\n\n"]), min_size=60, max_size=200))
def test_pieces_change_no_token(words):
    """A byte-level tokenizer cuts before a word's space, as pieces are: their tokens, end to end, are those of the text."""
    text = " ".join(words)
    pieces = list(_cut(iter([text[:70], text[70:]]), 120, 100))
    assert "".join(pieces) == text
    assert all(len(piece) <= 100 for piece in pieces[:-1])
    assume(all(before[-1].isalnum() and after[0].isspace() for before, after in itertools.pairwise(pieces)))
    tokenizer = train_tokenizer(["ab ab1 a. \n\n  bé b\r\n"], 280)
    assert [i for piece in pieces for i in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


def test_a_text_without_spaces_is_cut_all_the_same():
    pieces = list(Document("x", "a" * (2**19 + 5)).pieces())
    assert list(map(len, pieces)) == [2**16] * 5 + [2**16 * 3 + 5]
    assert list(Document("x", "short text").pieces()) == ["short text"]


def test_a_long_document_has_the_tokens_of_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_jax.data.document._AT_ONCE", 2**13)
    monkeypatch.setattr("dsv3_jax.data.document._PIECE", 2**12)
    monkeypatch.setattr("dsv3_jax.data.store._ENCODE_BATCH", 2**14)
    text = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(2_000))
    assert len(text) > 10 * 2**12
    (tmp_path / "a.txt").write_text(text)
    tokenizer = train_tokenizer([text[:10_000]], 400)
    store = read_documents(DataConfig(path=f"{tmp_path}/a.txt"), tokenizer)
    bos, eos = map(tokenizer.token_to_id, (BOS, EOS))
    assert store.tokens.tolist() == [bos, *tokenizer.encode(text).ids, eos]
    assert store.text_bytes.tolist() == [len(text)]
    assert list(store.ids) == [f"{tmp_path}/a.txt"]


def test_control_tokens_in_a_corpus(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"one {EOS} two"}) + "\n" + json.dumps({"text": "three"}))
    tokenizer = train_tokenizer(["one two three"], 280)
    eos = tokenizer.token_to_id(EOS)
    ends = {}
    for asked in (False, True):
        store = read_documents(DataConfig(path=f"{tmp_path}/a.jsonl", special_tokens=asked), tokenizer)
        ends[asked] = np.flatnonzero(store.tokens == eos).tolist()
        assert ends[asked][-1] == store.offsets[2] - 1
    assert len(ends[False]) == 2  # each document's own
    assert len(ends[True]) == 3


def test_globs_through_folders_that_links_lead_back_to(tmp_path, monkeypatch):
    """Two links to their own folder: followed as they come, they are 2^40 paths. Each folder is entered once, in order."""
    (tmp_path / "d/sub/.hidden").mkdir(parents=True)
    for name in ("d/a.txt", "d/sub/b.txt", "d/sub/.hidden/c.txt", "d/sub/c.jsonl", "d/.e.txt"):
        (tmp_path / name).write_text("the sea")
    for name in ("d/one", "d/two", "d/sub/up"):
        (tmp_path / name).symlink_to(tmp_path / "d")
    (tmp_path / "d/alias").symlink_to(tmp_path / "d/sub")  # comes before d/sub
    monkeypatch.chdir(tmp_path)

    def files(path: str) -> list[str]:
        return list(map(str, data_files(DataConfig(path=path))))

    assert files("d/**/*.txt") == files("d/**/**/*.txt") == ["d/a.txt", "d/alias/b.txt"]
    assert files("**/*.txt") == ["d/a.txt", "d/alias/b.txt"]
    assert files(f"{tmp_path}/**/[a-b].txt") == [f"{tmp_path}/d/a.txt", f"{tmp_path}/d/alias/b.txt"]
    assert files("d/s*/**/*.txt") == ["d/sub/b.txt", "d/sub/up/a.txt"]
    (tmp_path / "d/alias/c.jsonl").unlink()
    assert files("d/**") == ["d/a.txt", "d/alias/b.txt"]
    assert files("d") == ["d/a.txt", "d/alias/b.txt"]


def test_names_with_spaces_around_them(tmp_path, monkeypatch):
    for name in (" a.txt", "b.txt", "c d.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    for path in (" a.txt", "b.txt , c d.txt", " a.txt, b.txt"):
        names = [document.text for document in documents(DataConfig(path=path))]
        assert ",".join(names) == path.replace(" ,", ",").replace(", ", ",")
        assert [d.text for d in documents(DataConfig(path=absolute_patterns(path)))] == names
