"""Run a GGUF file as an ARM device would: llama.cpp, cross-compiled for aarch64 and executed under qemu.

Only correctness: the greedy text must be that of llama.cpp on this machine; printed too is how much was rearranged for the ARM
instructions. Emulated speed means nothing; `dsv3 compress --plan --profile arm-dotprod` predicts what memory allows.

Needs g++-aarch64-linux-gnu, qemu-user, cmake and ninja. The source is that of llama-cpp-python, as pip downloads it. It is
compiled once, which takes long, and kept in --build.

Example: python scripts/studies/arm_decode.py exported/tiny.gguf --prompt "def main("
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = "llama-cpp-python==0.3.36"
_TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64", "cmake", "ninja")
_COMMON = [
    "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DBUILD_SHARED_LIBS=OFF",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
    "-DGGML_OPENMP=OFF", "-DGGML_LLAMAFILE=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_EXAMPLES=ON",
]  # fmt: skip
_CROSS = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"] + [
    f"-DCMAKE_{language}_COMPILER=aarch64-linux-gnu-{compiler}" for language, compiler in (("C", "gcc"), ("CXX", "g++"))
]


def fail(why: str) -> None:
    raise SystemExit(f"arm_decode: {why}")


def source(build: Path, given: Path | None) -> Path:
    """llama.cpp's source in a llama-cpp-python package: the one given, or what pip downloads."""
    if given is None:
        command = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "--dest", str(build), _PACKAGE]
        if subprocess.run(command, check=False).returncode:
            fail(f"pip cannot download {_PACKAGE}; give --source, its .tar.gz")
        given = next(build.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(given) as archive:
        archive.extractall(build, filter="data")
    return next(build.glob("llama_cpp_python-*/vendor/llama.cpp"))


def compiled(build: Path, name: str, options: list[str], given: Path | None) -> Path:
    """llama.cpp's example program for greedy text."""
    program = build / name / "bin" / "llama-simple"
    if not program.exists():
        found = next(build.glob("llama_cpp_python-*/vendor/llama.cpp"), None) or source(build, given)
        configure = ["cmake", "-G", "Ninja", "-S", str(found), "-B", str(build / name), *_COMMON, *options]
        for command in (configure, ["nice", "-n", "19", "ninja", "-C", str(build / name), "llama-simple"]):
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
                fail(f"{command[0]} failed in {build / name}; see above")
    return program


def greedy(command: list[str], model: Path, prompt: str, tokens: int) -> tuple[str, str]:
    """The text that the program continues a prompt with, and its log."""
    done = subprocess.run([*command, "-m", str(model), "-n", str(tokens), prompt], capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{command[0]} ended with {done.returncode}: {' '.join(done.stderr.split()[-30:])}")
    return done.stdout, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .gguf file, of dsv3 export --format gguf")
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--target", default="arm-dotprod", choices=("arm-dotprod", "arm-i8mm"), help="which instructions")
    parser.add_argument("--source", type=Path, help="llama-cpp-python's source package; downloaded if not given")
    parser.add_argument("--build", type=Path, default=ROOT / ".arm-build", help="where it is compiled, and kept")
    given = parser.parse_args()
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        fail(f"needs {', '.join(missing)} (Debian: g++-aarch64-linux-gnu qemu-user cmake ninja-build)")
    if not given.model.is_file():
        fail(f"{given.model} is no file; make one with dsv3 export CHECKPOINT OUT --format gguf")
    march = yaml.safe_load((ROOT / "dsv3_jax/compression/targets.yaml").read_text())[given.target]["march"]
    given.build.mkdir(parents=True, exist_ok=True)
    arm_options = [*_CROSS, "-DGGML_NATIVE=OFF", f"-DGGML_CPU_ARM_ARCH={march}"]
    arm = compiled(given.build, given.target, arm_options, given.source)
    here = compiled(given.build, os.uname().machine, [], given.source)
    theirs, log = greedy(["qemu-aarch64", "-cpu", "max", str(arm)], given.model, given.prompt, given.tokens)
    ours, _ = greedy([str(here)], given.model, given.prompt, given.tokens)
    rearranged = next((line.strip() for line in log.splitlines() if "CPU_REPACK" in line), "no weights were rearranged")
    print(f"{given.target} ({march}) under qemu: {theirs.strip()!r}\n{rearranged}")
    print(f"{os.uname().machine}: {ours.strip()!r}")
    print("speed under qemu says nothing about ARM: that is a prediction, of dsv3 compress --plan --profile", given.target)
    if theirs != ours:
        fail("the texts differ")
    print("the texts are equal")


if __name__ == "__main__":
    main()
