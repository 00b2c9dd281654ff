"""The commands in README and docs exist and their overrides are valid; links lead somewhere; generated pages are current."""

import re
import shlex

import pytest

import dsv3_jax as dsv3
from dsv3_jax.cli import _VERBS
from dsv3_jax.config import load_config
from dsv3_jax.cost.topologies import parse_topology
from dsv3_jax.elastic.options import parse_workers
from tests.conftest import ROOT, load_script

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
COMMANDS = sorted({
    line.strip()
    for text in TEXTS.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
})  # fmt: skip
# an import's config.yaml has what any has
STAND_IN = "configs/tiny.yaml"


def check_dsv3(verb: str, words: list[str]) -> None:
    assert verb in _VERBS
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    config = words[0] if words and words[0].startswith("configs/") else STAND_IN
    if verb == "launch":
        inner = next(i for i, word in enumerate(words) if word in _VERBS)
        check_dsv3(words[inner], words[inner + 1 :])
    elif verb in ("train", "resume", "describe", "import"):
        load_config(ROOT / config, overrides)
    elif verb == "plan" and words[0].startswith("configs/"):
        load_config(ROOT / config, overrides)
        if "--workers" in words:
            parse_workers(words[words.index("--workers") + 1])
        else:
            assert [parse_topology(word) for word in words if re.fullmatch(r"[\w*]+:[\dx]+", word)]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line):
    command = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z][A-Z_]+=\S*", word)]
    if not command:
        return  # only variables, or a comment
    program = command[0].removeprefix(".venv/bin/").removeprefix(".venv-aot/bin/")
    if program == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "dsv3":
        check_dsv3(command[1], command[2:])
    elif program == "sbatch":
        script = next(i for i, word in enumerate(command) if word.startswith("scripts/"))
        assert (ROOT / command[script]).is_file()
        check_dsv3(command[script + 1], command[script + 2 :])
    elif program.startswith("scripts/"):
        assert (ROOT / program).is_file()
    elif program != "pip":
        assert program == "python"
        assert (ROOT / command[1]).is_file()


@pytest.mark.parametrize("page", TEXTS)
def test_links_functions_and_files_exist(page):
    text = TEXTS[page]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target
    for name in re.findall(r"dsv3\.(\w+)\(", text):
        assert hasattr(dsv3, name), name
    for path in re.findall(r"`((?:dsv3_jax|pallas_kernels|scripts|tests|docs|configs|notebooks)/[\w/.]+)`", text):
        assert (ROOT / path).exists() or f"+++ b/{path}" in text, path  # docs/extending.md names files that its changes make


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_configuration_page_is_current():
    """python scripts/tools/document_config.py writes it."""
    assert load_script("tools/document_config").document() == TEXTS["docs/configuration.md"]


def test_every_environment_variable_of_ours_is_documented():
    sources = [p.read_text() for p in (ROOT / "dsv3_jax").rglob("*.py")]
    used = {name for text in sources for name in re.findall(r"\bDSV3_[A-Z_]+[A-Z]\b", text)}
    assert used - {"DSV3_PROCESS"} <= set(re.findall(r"`(DSV3_[A-Z_]+)`", TEXTS["docs/environment.md"]))
