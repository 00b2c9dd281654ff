"""Write docs/configuration.md: every configuration key, from the dataclasses' fields, docstrings and comments in config.py.

Example: python scripts/tools/document_config.py
"""

import argparse
import ast
import dataclasses
import re
import typing
from pathlib import Path

from dsv3_jax import config as config_module
from dsv3_jax.config import Config

_ROOT = Path(__file__).resolve().parents[2]
_OUT = _ROOT / "docs" / "configuration.md"
_HEAD = """# Configuration

<!-- Written by scripts/tools/document_config.py from the comments in dsv3_jax/config.py: change those, and run it again. -->

One tree of sections, read from a YAML preset; `key=value` on the command line overrides it (values are YAML: `1e-3`, `null`,
`true`). `null` means "not set". Unknown keys are refused with the nearest valid name, and impossible combinations before
anything is compiled or written. A run keeps the resolved tree in `runs/NAME/config.yaml`, every checkpoint in its metadata.

When a run goes on, `parallel.*` (but `parallel.compress*`), `remat.*`, `checkpoint.*`, `train.steps`, `train.eval_*`,
`train.grad_accum_steps`, `train.stuck_after_s`, `train.slow_after_s` and `data.cache_dir` may change; everything else belongs
to the run's identity.
"""


def _comments(lines: list[str], field: ast.AnnAssign) -> str:
    """The comment lines right above a field, then the one on its line."""
    above = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("# "))
    beside = re.search(r"\s#\s(.*)$", lines[(field.end_lineno or field.lineno) - 1])
    return re.sub(r"\bNone\b", "null", " ".join([*above, *([beside[1]] if beside else [])]))


def _row(key: str, field: ast.AnnAssign, lines: list[str]) -> str:
    def source(node: ast.expr | None) -> str:
        return "" if node is None else ast.unparse(node).replace("None", "null").replace("|", "\\|").replace("'", "")

    recipes = ", ".join(typing.get_args(config_module.RecipeName))
    values = re.sub(r"Literal\[(.*?)\]", r"\1", source(field.annotation)).replace("RecipeName", recipes)
    default = source(field.value).replace("False", "false").replace("True", "true")
    return f"| `{key}` | {values} | {default} | {_comments(lines, field).replace('|', '\\|')} |"


def _section(cls: type, prefix: str, classes: dict[str, ast.ClassDef], lines: list[str]) -> list[str]:
    """The section's text and table, then those of the sections inside it."""
    node = classes[cls.__name__]
    nested = {f.name: f.type for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type)}
    fields = {n.target.id: n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    rows = [
        _row(prefix + name, fields[name], lines) for name in (f.name for f in dataclasses.fields(cls)) if name not in nested
    ]
    title = f"\n## {prefix.rstrip('.') or 'Top level'}\n"
    text = [title, *filter(None, [ast.get_docstring(node)])]
    if rows:
        text += ["", "| key | values | default | |", "|---|---|---|---|", *rows]
    for name, inner in nested.items():
        assert isinstance(inner, type)
        text += _section(inner, f"{prefix}{name}.", classes, lines)
    return text


def document() -> str:
    """docs/configuration.md as it should be."""
    source = Path(config_module.__file__).read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    return _HEAD + "\n".join(_section(Config, "", classes, source.splitlines())) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    _OUT.write_text(document())
    print(f"wrote {_OUT.relative_to(_ROOT)}")


if __name__ == "__main__":
    main()
