"""What comes with a model beside its weights: tokenizer files, chat template, settings of generation, licence, config.json.

An imported checkpoint and a run keep these files in a directory of their own, as they came, so that an export has them again;
tokenizer.json, which this project reads itself, stands beside that directory. config.json is there for its tokens' ids and for
the fields that an architecture does not need.
"""

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.files import expand_home, parse_json, read_regular, write_atomically

type Companions = Mapping[str, bytes]  # contents by file name, with the folder's where it is in one

DIRECTORY = "huggingface"
_MORE_TEMPLATES = "additional_chat_templates"  # the one folder of a checkpoint that transformers reads text from
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
# how text becomes tokens and what is generated, by patterns of lower-case names
_TEXT = (
    GENERATION, "tokenizer*", "tokenization*", "tool_declaration*", "tiktoken*", "*.tiktoken", "sentencepiece*", "spiece*",
    "tekken*", "special_tokens*", "added_tokens*", "vocab.*", "merges.*", "chat_template*",
    f"{_MORE_TEMPLATES}/*.jinja",
)  # fmt: skip
_RIGHTS = ("license*", "licence*", "copying*", "notice*", "*notices*", "use_policy*")
_NEVER = (TOKENIZER, "*.safetensors", "*.bin", "*.pt", "*.pth", "*.pkl")  # kept elsewhere, or no text
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MOST_BYTES, _MOST_IN_ALL = 64 * 2**20, 256 * 2**20  # of a file, and of all: they are held in memory


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _is_companion(name: str) -> bool:
    return name == CONFIG or (_matches(name, _TEXT + _RIGHTS) and not _matches(name, _NEVER))


def _allowed(directory: Path) -> list[Path]:
    """Where links in a checkpoint's directory may lead: into it, and from the hub's cache into its blobs."""
    real = directory.resolve()
    return [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]


def read_companion(directory: Path, name: str) -> bytes:
    """The content of a file that goes with weights or a tokenizer.

    It is written again wherever they go, so that it must not lead to what is private: raises `UserError` for a link that leaves
    the directory (or the hub's cache that it is in), as well as for what is no regular file, too large, or named .json and no
    JSON.
    """
    path = directory / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not any(real.is_relative_to(root) for root in _allowed(directory)):
        raise UserError(f"{path} links to {real}, outside of the checkpoint; put the file itself there, or remove the link")
    content = read_regular(real, _MOST_BYTES)
    if name.endswith(".json"):
        parse_json(content, path)
    return content


def _files_in(directory: Path, folder: str = "") -> list[str]:
    """Names of all but the folders in a folder of a directory, with the folder's before them; none if it is not there."""
    path = directory / folder
    return sorted(folder + file.name for file in path.iterdir() if not file.is_dir()) if path.is_dir() else []


def read_companions(directory: Path) -> Companions:
    """The companions in the directory of a Hugging Face checkpoint, of an imported one, or of a run.

    Raises `UserError` as `read_companion`.
    """
    ours = (directory / DIRECTORY).is_dir() and (directory / "config.yaml").is_file()  # or it is anybody's folder of that name
    where = directory / DIRECTORY if ours else directory
    found: dict[str, bytes] = {}
    for name in filter(_is_companion, [*_files_in(where), *_files_in(where, f"{_MORE_TEMPLATES}/")]):
        found[name] = read_companion(where, name)
        if sum(map(len, found.values())) > _MOST_IN_ALL:
            raise UserError(f"{where}: the files beside the weights, up to {name}, have more than {_MOST_IN_ALL:,} bytes")
    return found


def beside(tokenizer: str) -> Companions:
    """The companions of a tokenizer.json. Raises `UserError` as `read_companion`."""
    return read_companions(expand_home(tokenizer).parent)


def write_companions(directory: Path, companions: Companions) -> None:
    """Put them into a checkpoint's or run's directory, where `read_companions` finds them. Raises `OSError`."""
    for name, content in companions.items():
        path = directory / DIRECTORY / name
        path.parent.mkdir(exist_ok=True, parents=True)
        write_atomically(path, content)


def fields(companions: Companions, name: str) -> dict[str, Any]:
    """The fields of one of the JSON files; none if it is not there, or holds something else."""
    parsed = parse_json(companions[name], name) if name in companions else None
    return parsed if isinstance(parsed, dict) else {}


def with_fields(companions: Companions, name: str, its: Mapping[str, Any]) -> Companions:
    """The companions with a JSON file of these fields, if there are any."""
    return {**companions, name: json_file(its)} if its else companions


def json_file(its: Mapping[str, Any]) -> bytes:
    """The content of a JSON file, in UTF-8; halves of surrogate pairs are escaped, as they were."""
    return (json.dumps(its, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def about_text(companions: Companions) -> Companions:
    """Those that come with a tokenizer, whatever model uses it; of config.json the tokens' ids."""
    ids = {key: value for key, value in fields(companions, CONFIG).items() if key in TOKEN_IDS}
    return with_fields({name: content for name, content in companions.items() if _matches(name, _TEXT)}, CONFIG, ids)


def about_weights(companions: Companions) -> Companions:
    """Those that weights keep when they get another tokenizer: the licence, and config.json without tokens' ids."""
    rest = {key: value for key, value in fields(companions, CONFIG).items() if key not in TOKEN_IDS}
    return with_fields({name: content for name, content in companions.items() if _matches(name, _RIGHTS)}, CONFIG, rest)


def merged(first: Companions, then: Companions) -> Companions:
    """Both; `then` decides where both have a file, or a field of config.json."""
    return with_fields({**first, **then}, CONFIG, fields(first, CONFIG) | fields(then, CONFIG))
