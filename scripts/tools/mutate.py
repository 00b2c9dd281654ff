"""Change one line of the code at a time, and run the tests that should notice: what they let through is printed.

`mutations.yaml` beside this file lists the changes: a file, a text that stands in it exactly once, what replaces it, and the
tests that should fail then. Each is made in a copy of the checkout, never in the checkout itself. Exit code 1 if any survives
or cannot be made.

    python scripts/tools/mutate.py                       # all of them: seconds each
    python scripts/tools/mutate.py --only schedule clip  # those whose name contains one of these
    python scripts/tools/mutate.py --list
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# What tests import and mutations do not change: imported here once, and forked for each.
import flax.nnx  # noqa: F401
import hypothesis  # noqa: F401
import jax  # noqa: F401
import optax  # noqa: F401
import orbax.checkpoint.experimental.v1  # noqa: F401
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutations.yaml")
_PASSED, _FAILED = 0, 1  # pytest's exit codes; others say that it could not run the tests
sys.dont_write_bytecode = True  # a change of the same size within a second would be read from the old bytecode


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: list[str]  # pytest's names

    def apply(self, root: Path) -> str:
        """Change the file below `root`; returns what it held before. Raises ValueError unless `old` stands there once."""
        path = root / self.file
        text = path.read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} holds {self.old!r} {count} times, not once")
        path.write_text(text.replace(self.old, self.new))
        return text


def read_mutations(file: Path) -> list[Mutation]:
    """Raises ValueError for a name that stands twice, and for a mutation that changes nothing or names no tests."""
    found = [Mutation(name, **fields) for name, fields in yaml.safe_load(file.read_text()).items()]
    for mutation in found:
        if mutation.old == mutation.new or not mutation.tests:
            raise ValueError(f"{mutation.name}: changes nothing, or names no tests")
    return found


def copy_checkout(target: Path) -> None:
    """Every file that git knows or would add, as it is now; compiled programs are shared."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".pytest_cache").symlink_to(ROOT / ".pytest_cache")


def _tests(copy: Path, tests: list[str], output: Path) -> None:
    """In a process of its own: pytest in the copy."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = sys.path[0] = str(copy)
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))


def run_tests(copy: Path, tests: list[str], timeout_s: float) -> int | None:
    """pytest's exit code, or None beyond the time."""
    output = copy / "output.txt"
    child = multiprocessing.get_context("fork").Process(target=_tests, args=(copy, tests, output))
    child.start()
    child.join(timeout_s)
    if child.exitcode is None:
        child.kill()
        child.join()
        return None
    if child.exitcode not in (_PASSED, _FAILED):
        print(output.read_text()[-2000:], file=sys.stderr)
    return child.exitcode


def try_one(mutation: Mutation, copy: Path, timeout_s: float) -> str:
    """killed, survived, or broken: its text is not there, or pytest could not run. A test that no longer ends has noticed."""
    try:
        before = mutation.apply(copy)
    except ValueError as error:
        print(error, file=sys.stderr)
        return "broken"
    try:
        code = run_tests(copy, mutation.tests, timeout_s)
    finally:
        (copy / mutation.file).write_text(before)
    return {_PASSED: "survived", _FAILED: "killed", None: "killed"}.get(code, "broken")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts of the names of the mutations to try")
    parser.add_argument("--list", action="store_true", help="print the mutations and end")
    parser.add_argument("--mutations", type=Path, default=LIST, help="another list")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="for the tests of one mutation")
    parser.add_argument("--unchanged", action="store_true", help="first see that all these tests pass as the code is")
    args = parser.parse_args()
    chosen = [m for m in read_mutations(args.mutations) if not args.only or any(part in m.name for part in args.only)]
    if args.list:
        for m in chosen:
            print(f"{m.name}: {m.file}: {m.old.strip()!r} -> {m.new.strip()!r}; {' '.join(m.tests)}")
        return
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        copy = Path(scratch)
        copy_checkout(copy)
        if args.unchanged and run_tests(copy, sorted({t for m in chosen for t in m.tests}), 10 * args.timeout_s) != _PASSED:
            raise SystemExit("the tests fail without any mutation")
        outcomes: dict[str, list[str]] = {"killed": [], "survived": [], "broken": []}
        for m in chosen:
            began = time.monotonic()
            outcome = try_one(m, copy, args.timeout_s)
            outcomes[outcome].append(m.name)
            print(f"{outcome:8s} {time.monotonic() - began:5.0f} s  {m.name}", flush=True)
    print(json.dumps({what: names if what != "killed" else len(names) for what, names in outcomes.items()}))
    raise SystemExit(1 if outcomes["survived"] or outcomes["broken"] else 0)


if __name__ == "__main__":
    main()
