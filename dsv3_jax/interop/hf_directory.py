"""A downloaded directory: its JSON files, which may be a stranger's, and what to say of one that is no checkpoint."""

from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_BYTES = 64 * 2**20  # of a small file; the index and the tokenizer of the largest released models have 15 and 20 MB


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises `UserError` as `read_json`, and for anything else than an object."""
    found = read_json(path, _MOST_BYTES)
    if not isinstance(found, dict):
        raise UserError(f"cannot read {path}: it holds a JSON {type(found).__name__} and not an object")
    return found


def not_a_checkpoint(directory: Path, without: str) -> UserError:
    """The error for a directory that has `without`, such as "no config.json": what it is instead, and what to do."""

    def names(pattern: str) -> list[str]:
        return sorted(path.name for path in directory.glob(pattern))

    if not directory.exists():
        return UserError(f"{directory} does not exist; give a directory with config.json and safetensors")
    if not directory.is_dir():
        return UserError(f"{directory} is a file; give the directory with config.json and safetensors")
    if snapshots := [f"{directory}/snapshots/{name}" for name in names("snapshots/*")]:
        return UserError(f"{directory} is a model's folder in the hub's cache; give its snapshot: {snapshots[-1]}")
    if models := names("models--*"):
        return UserError(f"{directory} is the hub's cache; give a snapshot in it: {directory}/{models[0]}/snapshots/...")
    if adapters := names("adapter_config.json") + names("adapter_model.*"):
        return UserError(f"{directory} holds an adapter ({adapters[0]}); merge it into its base model, and import the result")
    if shards := names("model-*-of-*.safetensors"):
        return UserError(f"{directory} has {without}, and {len(shards)} files such as {shards[0]}: fetch what belongs to them")
    if others := [name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for name in names(kind)]:
        return UserError(
            f"{directory} has {without}, and weights as {others[0]}, which are not read: convert them to safetensors"
        )
    return UserError(f"{directory} has {without}")
