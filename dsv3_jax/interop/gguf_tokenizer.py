"""A tokenizer and a chat template as keys of a GGUF file.

llama.cpp knows how texts are split before merging by name alone; the names here are those whose rules it has exactly.
"""

import json
from typing import Any

import gguf
from tokenizers import Tokenizer

from dsv3_jax.data.companions import TOKENIZER_CONFIG, Companions, fields
from dsv3_jax.data.special_tokens import special_tokens
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_text import TextFiles

_TEMPLATE = "chat_template.jinja"
_V3_SPLITS = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+")  # the first two of DeepSeek-V3's three


def _splits(described: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits texts. Raises `UserError` if there is none."""
    steps = described.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if len(steps) == 1 and steps[0].get("type") == "ByteLevel" and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return "gpt-2"
    regexes = tuple(step["pattern"].get("Regex") for step in steps if step.get("type") == "Split")
    if regexes[:2] == _V3_SPLITS and len(regexes) == 3:
        return "deepseek-v3"
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise UserError(f"tokenizer.json: its pre_tokenizer ({kinds}) is neither GPT-2's nor DeepSeek-V3's, which gguf can name")


def _chat_template(companions: Companions) -> Any:
    if _TEMPLATE in companions:
        return companions[_TEMPLATE].decode("utf-8", "replace")
    return fields(companions, TOKENIZER_CONFIG).get("chat_template")


def _adds_begin(tokenizer: Tokenizer, text: TextFiles, begin: int | None) -> bool:
    """Whether texts begin with the begin token, as they do in an export for transformers."""
    if begin is None or text.trained:
        return begin is not None
    stated = fields(text.companions, TOKENIZER_CONFIG).get("add_bos_token")
    return bool(stated) if stated is not None else tokenizer.encode("", add_special_tokens=True).ids[:1] == [begin]


def _add_tokens(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    added = tokenizer.get_added_tokens_decoder()
    tokens: list[str] = []
    types: list[gguf.TokenType] = []
    for i in range(vocab_size):
        token = tokenizer.id_to_token(i)
        tokens.append(f"[PAD{i}]" if token is None else token)
        if token is None:
            types.append(gguf.TokenType.UNUSED)
        elif i in added:
            types.append(gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_token_list(tokens)
    writer.add_token_types(types)


def add_tokenizer(writer: gguf.GGUFWriter, text: TextFiles, vocab_size: int) -> None:
    """The keys about text; without a tokenizer, that there is none.

    Raises `UserError` for a tokenizer that splits texts in a way that llama.cpp has no name for.
    """
    if text.tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    tokenizer = load_tokenizer(text.tokenizer, vocab_size)
    described = json.loads(tokenizer.to_str())
    if described["model"]["type"] != "BPE":
        raise UserError(f"tokenizer.json: a {described['model']['type']} model; gguf takes byte-level BPE")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splits(described))
    _add_tokens(writer, tokenizer, vocab_size)
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    special = special_tokens(tokenizer, text.companions)
    if special.begin is not None:
        writer.add_bos_token_id(special.begin)
    if special.ends:
        writer.add_eos_token_id(special.ends[0])
    if len(special.ends) > 1:
        writer.add_eot_token_id(special.ends[1])
    writer.add_add_bos_token(_adds_begin(tokenizer, text, special.begin))
    if template := _chat_template(text.companions):
        writer.add_chat_template(template)
