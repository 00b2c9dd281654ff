"""The environment with the compilers of accelerators that are not here."""

import fcntl
import os
import subprocess

from tests.conftest import ROOT


def set_up_aot_environment() -> None:
    with open(ROOT / "requirements-aot.lock") as file:  # test workers must not set it up at once
        fcntl.flock(file, fcntl.LOCK_EX)
        subprocess.run([ROOT / "scripts" / "tools" / "setup_aot.sh"], check=True, timeout=300)


def compilers_environ() -> dict[str, str]:
    """Without what conftest.py sets for programs that run here: these are compiled as users' are."""
    return {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}


def in_aot_environment(*arguments: str) -> subprocess.CompletedProcess:
    set_up_aot_environment()
    command = [str(ROOT / ".venv-aot" / "bin" / "python"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=compilers_environ(), capture_output=True, text=True, timeout=1500, check=False)
