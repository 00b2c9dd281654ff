"""The reader of safetensors files against the library's: it takes no file that the library refuses, and reads the same."""

import hashlib
import json
import random
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from dsv3_jax.errors import UserError
from dsv3_jax.interop.safetensors_file import DTYPES, MappedFile, read_header, write_safetensors

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(2.5, np.float32), "c": np.arange(5, dtype=np.int64), "half": np.ones((2, 3), np.float16),
}  # fmt: skip


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x", metadata={"format": "pt"})
    entries = read_header(tmp_path / "x")
    mapped = MappedFile(tmp_path / "x", entries)
    assert set(entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        view = mapped.view(name)
        assert not view.flags.writeable
        np.testing.assert_array_equal(view, tensor)
        mapped.release(name)
        np.testing.assert_array_equal(view, tensor)  # its pages come back
        read, buffer = mapped.reader(name), memoryview(bytearray(7))
        found = b"".join(bytes(buffer[:n]) for n in iter(lambda r=read, b=buffer: r(b), 0))
        assert found == tensor.tobytes()


def test_the_library_reads_what_is_written(tmp_path):
    tensors = TENSORS | {"b16": np.ones((2, 2), ml_dtypes.bfloat16), "f8": np.ones((3,), ml_dtypes.float8_e4m3fn)}
    size, digest = write_safetensors(tmp_path / "x", {n: (t.dtype, t.shape) for n, t in tensors.items()}, tensors.__getitem__)
    content = (tmp_path / "x").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    with safe_open(tmp_path / "x", "np") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers wants it
        assert set(opened.keys()) == set(tensors)
        for name in TENSORS:
            np.testing.assert_array_equal(opened.get_tensor(name), TENSORS[name])
        assert opened.get_slice("f8").get_dtype() == "F8_E4M3"
    assert {n: DTYPES[e.dtype] for n, e in read_header(tmp_path / "x").items()} == {n: t.dtype for n, t in tensors.items()}


def raw(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "does not fit"),
        (b"\0" * 7, "does not fit"),
        (raw(ENTRY, length=2**63), "does not fit"),
        (raw("{" + "[" * 200_000), "not valid JSON"),
        (raw('{"w":' * 100_000), "nested too deeply"),
        (raw(b"\xff\xfe{}"), "JSON object"),
        (raw("[]"), "JSON object"),
        (raw('{"w":1}'), "tensor w: its header entry"),
        (raw('{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{}}'), "twice"),
        (raw('{"w":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8), "tensor w: dtype 'F33'"),
        (raw('{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', b"\0" * 8), "tensor w: shape"),
        (raw('{"w":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', b"\0" * 8), "tensor w: shape"),
        (raw('{"w":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', b"\0" * 4), "tensor w: shape"),
        (raw('{"w":{"dtype":"F32","shape":[' + "9" * 4000 + '],"data_offsets":[0,8]}}', b"\0" * 8), "tensor w: F32"),
        (raw('{"w":{"dtype":"F32","shape":[' + ",".join(["9" * 300] * 20_000) + '],"data_offsets":[0,8]}}', b"\0" * 8), "F32"),
        (raw('{"w":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', b"\0" * 8), "tensor w: data_offsets"),
        (raw(ENTRY, b"\0" * 7), "tensor w: the file ends"),
        (raw(ENTRY, b"\0" * 9), "1 bytes follow"),
        (raw('{"w":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', b"\0" * 12), "tensor w: its bytes begin"),
        (raw('{"__metadata__":{"a":1}}'), "__metadata__"),
    ],
    ids=range(20),
)  # fmt: skip
def test_malformed_files_are_refused_by_name(tmp_path, content, expected):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="x") as error:
        read_header(tmp_path / "x")
    assert expected in str(error.value)
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "x", "np")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b'{"' + b"a" * 50_000_001, "its header has 50,000,003 bytes; at most 50,000,000 are read"),
        (b"{" + b",".join(b'"%d":""' % i for i in range(1_100_000)) + b"}", "has more than 3,000,000 values"),
        (b'{"a":[' + b"{}," * 1_600_000 + b"1]}", "has more than 3,000,000 values"),
        (b'{"' + b"a" * 100_000 + b'":1}', "its header entry must hold dtype, shape and data_offsets"),
    ],
    ids=["long", "keys", "objects", "name"],
)
def test_headers_that_would_take_long_are_refused_in_a_short_line(tmp_path, header, expected):
    """Before they are parsed: a key costs up to a hundred times its bytes."""
    (tmp_path / "x").write_bytes(raw(header))
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        read_header(tmp_path / "x")
    assert tracemalloc.get_traced_memory()[1] < 60 * 2**20
    tracemalloc.stop()
    assert expected in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_a_file_cut_off_names_the_tensor_where_it_ends(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    entries, whole = read_header(tmp_path / "x"), (tmp_path / "x").read_bytes()
    for name, entry in entries.items():
        if entry.end > entry.begin:
            (tmp_path / "x").write_bytes(whole[: entry.end - 1])
            with pytest.raises(UserError, match=f"tensor {name}: the file ends"):
                read_header(tmp_path / "x")


NUMBERS = [
    "-1",
    "0",
    "1",
    "3",
    "8",
    "1e3",
    "2.5",
    "1e400",
    "18446744073709551615",
    "18446744073709551616",
    "true",
    "null",
    '"2"',
]


def mutated(rng: random.Random, header: dict, data: bytes) -> bytes:
    """One malformed (or harmlessly changed) file."""
    text = json.dumps(header)
    kind = rng.randrange(9)
    if kind == 0:  # bytes of the header
        damaged = bytearray(text.encode())
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return raw(bytes(damaged), data)
    if kind == 1:  # a piece taken out, or put in twice
        i, j = sorted(rng.sample(range(len(text)), 2))
        return raw(text[:i] + (text[i:j] * 2 if rng.random() < 0.5 else "") + text[j:], data)
    if kind == 2:  # the length
        return raw(text, data, rng.choice([0, 1, len(text) - 1, len(text) + 1, len(text) + len(data), 2**31, 2**40, 2**64 - 1]))
    if kind == 3:  # the file cut off, or longer
        whole = raw(text, data)
        return whole[: rng.randrange(len(whole))] if rng.random() < 0.8 else whole + bytes(rng.randint(1, 9))
    if kind == 4:  # a number
        numbers = [(i, c) for i, c in enumerate(text) if c.isdigit()]
        i, _ = rng.choice(numbers)
        return raw(text[:i] + rng.choice(NUMBERS) + text[i + 1 :], data)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = dict(header[name])
    if kind == 5:  # a field
        field = rng.choice(list(entry))
        values = ["F32", "F99", "", None, [], {}, [1, 2, 3], [[1]], {"a": 1}, 7, -3, 2**70, ["1", "2"], "\u0000"]
        entry[field] = rng.choice(values)
    elif kind == 6:  # offsets
        shift = rng.choice([-8, -4, -1, 1, 4, 8, 2**33, -(2**33)])
        entry["data_offsets"] = [n + shift * rng.randint(0, 1) for n in entry["data_offsets"]]
    elif kind == 7:
        entry.pop(rng.choice(list(entry)))
    else:  # shapes whose product is right, or is not
        entry["shape"] = rng.choice([[*entry["shape"], 1], [1] * 50 + entry["shape"], [2**32, 2**32], [2**20] * 9, [0], []])
    return raw(json.dumps(header | {name: entry}), data)


def test_fuzzed_headers_give_errors_that_the_library_gives_too(tmp_path):
    """2,400 files: no crash, no hang, nothing allocated beyond the file's size; nothing taken that the library refuses."""
    save_file(TENSORS, tmp_path / "x", metadata={"format": "pt"})
    whole = (tmp_path / "x").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    rng, refused, slowest = random.Random(5), 0, 0.0
    tracemalloc.start()
    for case in range(2400):
        content = mutated(rng, header, data)
        (tmp_path / "y").write_bytes(content)
        tracemalloc.reset_peak()
        before, began = tracemalloc.get_traced_memory()[0], time.monotonic()
        try:
            found = read_header(tmp_path / "y")
        except UserError:
            refused += 1
        else:
            theirs = load_file(tmp_path / "y")  # raises where the library refuses
            mapped = MappedFile(tmp_path / "y", found)
            assert set(found) == set(theirs), case
            for name in found:
                ours = mapped.view(name)
                assert (ours.shape, ours.dtype, ours.tobytes()) == (
                    theirs[name].shape, theirs[name].dtype, theirs[name].tobytes(),
                ), case  # fmt: skip
        slowest = max(slowest, time.monotonic() - began)
        assert tracemalloc.get_traced_memory()[1] - before < 2**20, case
    tracemalloc.stop()
    assert slowest < 5  # a hang, not a slow machine
    assert 1800 < refused < 2400  # some changes do no harm
