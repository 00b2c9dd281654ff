"""The README's commands exist, and their overrides are valid."""

import re
import shlex

import pytest

import dsv3_jax as dsv3
from dsv3_jax.cli import _VERBS
from dsv3_jax.config import load_config
from dsv3_jax.cost.topologies import parse_topology
from dsv3_jax.elastic.command import parse_workers
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands(command):
    command = [word for i, word in enumerate(command) if i or not re.fullmatch(r"[A-Z_]+=\S+", word)]  # an environment's
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif command[0] == "dsv3":
        assert command[1] in _VERBS
        if command[1] == "launch":
            command = command[command.index("train") - 1 :]
        if command[1] in ("train", "describe"):
            # an import's config.yaml has what any has
            config = command[2] if command[2].startswith("configs/") else "configs/tiny.yaml"
            load_config(ROOT / config, [word for word in command[3:] if "=" in word])
        elif command[1] == "plan" and command[2].startswith("configs/"):
            load_config(ROOT / command[2], [word for word in command[3:] if "=" in word])
            if "--workers" in command:
                parse_workers(command[command.index("--workers") + 1])
            else:
                assert [parse_topology(word) for word in command if ":" in word]
        elif command[1] == "import":
            load_config(ROOT / "configs/tiny.yaml", [word for word in command[2:] if "=" in word])
    elif command[0] == "sbatch":
        script = next(i for i, word in enumerate(command) if word.startswith("scripts/"))
        assert (ROOT / command[script]).is_file()
        assert command[script + 1] == "train"
        load_config(ROOT / command[script + 2], command[script + 3 :])
    elif command[0].startswith("scripts/"):
        assert (ROOT / command[0]).is_file()
    else:
        assert command[0] == "python"
        assert (ROOT / command[1]).is_file()


def test_named_functions_and_pictures_exist():
    for name in re.findall(r"dsv3\.(\w+)\(", README):
        assert hasattr(dsv3, name)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file()
