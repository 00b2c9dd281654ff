"""A short run of scripts/tools/fuzz.py: damaged inputs over every reader. And that it notices what a reader must not do."""

import os
import signal
import time

import pytest

from tests.conftest import ROOT, load_script

READERS = [
    "config", "overrides", "config.json", "index", "safetensors", "tokenizer.json", "generation_config.json", "metrics",
    "events", "manifest", "plan", "trace", "routing", "roll call",
]  # fmt: skip


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts" / "tools")
        yield load_script("tools/fuzz")


def test_every_reader_is_tried(fuzz):
    assert list(fuzz.READERS) == READERS


@pytest.mark.parametrize("reader", READERS)
def test_damaged_inputs_are_read_or_refused(fuzz, reader, tmp_path):
    """The sound input is read; fifteen damaged ones raise nothing but `UserError`."""
    outcomes = []
    for seed in range(15):
        directory = tmp_path / str(seed)
        directory.mkdir()
        outcomes.append(fuzz.run_case(reader, seed, directory))
    assert set(outcomes) <= {"read", "refused"}


@pytest.mark.parametrize("reader", READERS)
def test_the_sound_input_is_read(fuzz, reader, tmp_path, monkeypatch):
    sound = b"optim.lr=1e-3" if reader == "overrides" else fuzz.sample(reader)
    monkeypatch.setattr(fuzz, "make_input", lambda name, seed: sound)
    assert fuzz.run_case(reader, 1, tmp_path) == "read"


def test_seeds_decide_the_inputs(fuzz):
    for reader in READERS:
        first, again = ([fuzz.make_input(reader, seed) for seed in range(20)] for _ in range(2))
        assert first == again
        assert len(set(first)) > 10


def test_tracebacks_hangs_and_deaths_are_failures(fuzz, monkeypatch, capsys):
    """Each of them is counted once, with its seed, and the inputs after it are read."""

    def read(file, rare):
        match int(file.read_bytes()):
            case 1:
                raise ValueError("no")
            case 2:
                time.sleep(60)
            case 3:
                os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(fuzz, "_SECONDS", 1.0)
    monkeypatch.setattr(fuzz, "MOST_BYTES", 2**40)  # this process has compiled programs
    monkeypatch.setattr(fuzz, "make_input", lambda name, seed: str(seed).encode())
    monkeypatch.setitem(fuzz.READERS, "index", fuzz.Reader("json", lambda: b"", read))
    assert fuzz.main(["--only", "index", "--count", "6"]) == 1
    said = capsys.readouterr().out
    assert "index: 3 read, 0 refused, 3 failed" in said
    assert "ValueError: no (test_fuzz.py:" in said
    assert "Hang: longer than 1 s" in said
    assert "ended by SIGKILL" in said
    assert all(f'--only "index" --seed {seed}' in said for seed in (1, 2, 3))
