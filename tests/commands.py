"""The `dsv3` command for tests: in this process, which saves the seconds that a new one takes to import everything."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from dsv3_jax.cli import main


def dsv3(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run the command line here. Devices are this process's, and settings that a verb makes in JAX stay."""
    out, err = io.StringIO(), io.StringIO()
    tunables = mock.patch.dict(os.environ, {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "")})  # or `train` starts anew
    with contextlib.chdir(cwd), tunables, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(args))
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return subprocess.CompletedProcess(["dsv3", *args], code, out.getvalue(), err.getvalue())


def dsv3_process(*args: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """The installed command, in a process of its own."""
    command = [str(Path(sys.executable).with_name("dsv3")), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
