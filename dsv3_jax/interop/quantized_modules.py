"""Which modules of a model have which integer format, as the regular expressions that clients' configurations want."""

import re
from collections.abc import Mapping

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_tensors import sources
from pallas_kernels.integer_weight import IntegerFormat

type Formats = Mapping[str, IntegerFormat]  # by the names of tensors; those that are left out are dense

_LAYER = re.compile(r"(?<=^model\.layers\.)\d+")


def described(format: IntegerFormat) -> str:
    """For messages."""
    return f"{format.bits} bits in groups of {format.group}{'' if format.symmetric else ', asymmetric'}"


def group_size(format: IntegerFormat, inputs: int) -> int:
    """As clients have it: -1 for a group that is all of an output's inputs."""
    return -1 if format.group == inputs and format.group not in (32, 64, 128) else format.group


def _kind(module: str) -> str:
    """A pattern of the modules that do the same in other layers and experts; {layer} stands for the layer."""
    kind = re.escape(_LAYER.sub("@", module)).replace("@", "{layer}")
    return re.sub(r"(?<=experts\\\.)\d+", lambda _: r"\d+", kind)


def patterns(config: ModelConfig, formats: Formats) -> dict[tuple[int, int, bool] | None, list[str]]:
    """Regular expressions that together match the names of all matrices' modules, by (bits, group size, symmetric).

    None: the modules that stay dense. Where all layers agree on a kind of module, its pattern is for any layer.
    """
    layers: dict[str, dict[tuple[int, int, bool] | None, dict[str, None]]] = {}
    for s in sources(config):
        if len(s.shape) != 2 or "embed_tokens" in s.tensor:
            continue
        module = s.tensor.removesuffix(".weight")
        format = formats.get(s.tensor)
        scheme = None if format is None else (format.bits, group_size(format, s.shape[1]), format.symmetric)
        number = _LAYER.search(module)
        layers.setdefault(_kind(module), {}).setdefault(scheme, {})[number.group() if number else ""] = None
    # a head that repeats the embedding is a module too
    found: dict[tuple[int, int, bool] | None, list[str]] = {None: ["lm_head"]} if config.tie_word_embeddings else {}
    for kind, schemes in layers.items():
        for scheme, numbers in schemes.items():
            layer = r"\d+" if len(schemes) == 1 else f"(?:{'|'.join(numbers)})"
            found.setdefault(scheme, []).append(kind.replace("{layer}", layer))
    return found


def check_compressed(formats: Formats, format: str) -> None:
    """Raise `UserError` if nothing is in an integer format."""
    if not formats:
        raise UserError(f"format {format} holds integers, and this model has none; compress it first: dsv3 compress RUN OUT")


def check_heads(config: ModelConfig, formats: Formats, client: str) -> None:
    """Raise `UserError` if what clients have in 16 bits alone is in integers: embedding, head, router, MTP's own projection."""
    for s in sources(config):
        if s.tensor in formats and not s.is_fp8:
            raise UserError(f"{s.tensor} has {described(formats[s.tensor])}; {client} has this tensor in 16 or 32 bits only")
