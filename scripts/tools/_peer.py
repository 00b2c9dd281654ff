"""The peer's environment (torch and transformers, apart from the project's) and how to ask it for a measurement."""

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


def peer_python() -> Path:
    """The interpreter of .venv-torch, made on first use. torch 2.13.0 has a CPU wheel for Python 3.11 where one is at hand."""
    python, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "ready"
    with open(__file__) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several test workers may want it at once
        if not ready.exists() or ready.read_text() != " ".join(PACKAGES):
            base = shutil.which("python3.11") or shutil.which("python3") or sys.executable
            print(f"making {ENVIRONMENT.name} with {', '.join(PACKAGES)} ...", file=sys.stderr)
            subprocess.run([base, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
            ready.write_text(" ".join(PACKAGES))
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
    peer_python()
