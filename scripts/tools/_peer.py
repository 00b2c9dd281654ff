"""The environments of other programs, apart from the project's, and how to ask them for a measurement.

.venv-torch has the peer, transformers on torch. .venv-clients has what reads integer weights: gptqmodel, compressed-tensors
with the torch and transformers that gptqmodel wants, and llama.cpp, which is compiled.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-torch"
PACKAGES = ["torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0", "accelerate==1.15.0"]
CLIENTS = ROOT / ".venv-clients"
CLIENT_PACKAGES = [
    "gptqmodel==7.7.0", "torch==2.14.1", "transformers==5.24.0", "compressed-tensors==0.20.0", "llama-cpp-python==0.3.36",
]  # fmt: skip
# correct numbers are wanted of llama.cpp here, not speed; one compiler at a time leaves the machine usable
_BUILD = {
    "CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_LLAMAFILE=OFF -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1",
    "CMAKE_BUILD_PARALLEL_LEVEL": "1", "MAKEFLAGS": "-j1",
}  # fmt: skip


def _python_of(environment: Path, packages: list[str], settings: dict[str, str]) -> Path:
    """The interpreter of an environment with these packages, made if it is not there."""
    python, ready = environment / "bin" / "python", environment / "ready"
    with open(__file__) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several test workers may want it at once
        if not ready.exists() or ready.read_text() != " ".join(packages):
            base = shutil.which("python3.11") or shutil.which("python3") or sys.executable
            print(f"making {environment.name} with {', '.join(packages)} ...", file=sys.stderr)
            subprocess.run([base, "-m", "venv", "--clear", str(environment)], check=True)
            install = ["nice", "-n", "15", str(python), "-m", "pip", "install", "--quiet", *packages]
            subprocess.run(install, check=True, env=os.environ | settings)
            ready.write_text(" ".join(packages))
    return python


def peer_python() -> Path:
    """The interpreter of .venv-torch, made on first use. torch 2.13.0 has a CPU wheel for Python 3.11 where one is at hand."""
    return _python_of(ENVIRONMENT, PACKAGES, {})


def clients_python() -> Path:
    """The interpreter of .venv-clients, made on first use: 6 GB, and a compiler for C++ that is busy for some minutes."""
    return _python_of(CLIENTS, CLIENT_PACKAGES, _BUILD)


def huge_pages(on: bool) -> dict[str, str]:
    """The environment with or without glibc's huge pages, which `dsv3 train` turns on for itself."""
    environment = dict(os.environ)
    environment.pop("GLIBC_TUNABLES", None)
    return environment | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if on else {})


def ask(python: Path | str, script: str, request: dict, on: bool) -> dict:
    """Run a measurement, scripts/SCRIPT, in a process of its own and return its last line, one JSON object."""
    command = [str(python), str(ROOT / "scripts" / script), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=huge_pages(on), check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def hf_fields(model) -> dict:
    """A ModelConfig as DeepseekV3Config's fields, without MTP, which the peer does not train."""
    import dataclasses

    fields = dataclasses.asdict(model)
    fields["num_key_value_heads"] = model.num_attention_heads
    fields["num_nextn_predict_layers"] = 0
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": model.rope_parameters.rope_theta}
    return fields


if __name__ == "__main__":
    clients_python() if sys.argv[1:] == ["clients"] else peer_python()
