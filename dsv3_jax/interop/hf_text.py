"""The files of an export that are about text: tokenizer, special tokens, chat template, settings of generation, licence."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.companions import CONFIG, GENERATION, TOKEN_IDS, TOKENIZER, TOKENIZER_CONFIG, Companions, fields, json_file
from dsv3_jax.data.special_tokens import SpecialTokens, special_tokens, with_begin_added
from dsv3_jax.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class TextFiles:
    """What an export has besides weights: a tokenizer.json, if there is one, and the files that came with the model.

    Those that came are written as they came. `trained`: documents were framed here, and other programs have to begin texts as
    these begin.
    """

    tokenizer: Path | None = None
    companions: Companions = field(default_factory=dict)
    trained: bool = False

    def write(self, directory: Path, config: ModelConfig) -> dict[str, Any]:
        """Write them; returns the fields of config.json that say which tokens are special.

        Raises `UserError` for a tokenizer that cannot be read or is larger than the model's vocabulary.
        """
        for name, content in self.companions.items():
            if name != CONFIG:
                (directory / name).parent.mkdir(exist_ok=True)
                (directory / name).write_bytes(content)
        ids = {} if self.tokenizer is None else self._write_tokenizer(self.tokenizer, directory, config.vocab_size)
        if GENERATION not in self.companions:
            known = ids | {key: value for key, value in fields(self.companions, CONFIG).items() if key in TOKEN_IDS}
            _write_json(directory / GENERATION, known)
        return ids

    def _write_tokenizer(self, tokenizer: Path, directory: Path, vocab_size: int) -> dict[str, Any]:
        loaded = load_tokenizer(tokenizer, vocab_size)
        special = special_tokens(loaded, self.companions)
        if self.trained:
            (directory / TOKENIZER).write_text(with_begin_added(loaded, special.begin).to_str(), encoding="utf-8")
        else:
            shutil.copyfile(tokenizer, directory / TOKENIZER)
        begin, end = (None if i is None else loaded.id_to_token(i) for i in (special.begin, next(iter(special.ends), None)))
        settings = fields(self.companions, TOKENIZER_CONFIG)
        if not settings:
            named = {key: token for key, token in (("bos_token", begin), ("eos_token", end)) if token is not None}
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
            _write_json(directory / TOKENIZER_CONFIG, settings)
        elif self.trained and (changed := _about_begin(settings, begin)):
            _write_json(directory / TOKENIZER_CONFIG, settings | changed)
        return _ids(special)


def _about_begin(settings: dict[str, Any], begin: str | None) -> dict[str, Any]:
    """What tokenizer_config.json has to say otherwise for texts to begin with `begin` alone.

    Of add_bos_token or add_eos_token transformers makes a post-processor, which it takes instead of tokenizer.json's.
    """
    if "add_bos_token" not in settings and "add_eos_token" not in settings:
        return {}
    wanted = {"add_bos_token": begin is not None, "add_eos_token": False}
    changed = {key: value for key, value in wanted.items() if settings.get(key, False) != value}
    its = settings.get("bos_token")
    its = its.get("content") if isinstance(its, dict) else its
    return changed if begin in (None, its) else changed | {"bos_token": begin}


def _ids(special: SpecialTokens) -> dict[str, Any]:
    """As config.json has them: one end token as a number, several as a list."""
    ends = {} if not special.ends else {"eos_token_id": special.ends[0] if len(special.ends) == 1 else list(special.ends)}
    return ({} if special.begin is None else {"bos_token_id": special.begin}) | ends


def _write_json(path: Path, its: dict[str, Any]) -> None:
    path.write_bytes(json_file(its))
