"""What is served: a model with the files of its texts, from any kind of checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from dsv3_jax.checkpoint.load import load_with_config
from dsv3_jax.data.companions import read_companions
from dsv3_jax.data.special_tokens import SpecialTokens, special_tokens
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.http_api.chat_template import ChatTemplate, chat_template
from dsv3_jax.http_api.service import Service, ServingEngine
from dsv3_jax.interop.hf_load import load_hf
from dsv3_jax.model.transformer import Transformer


@dataclass(frozen=True)
class Served:
    """A model, and how it reads and writes text."""

    model: Transformer
    tokenizer: Tokenizer
    special: SpecialTokens
    template: ChatTemplate | None
    name: str

    def service(self, engine: ServingEngine) -> Service:
        return Service(engine, self.tokenizer, self.special, self.template, self.name)


def load_served(path: Path) -> Served:
    """Load a run, a checkpoint (a compressed one with its integers), or the directory of a Hugging Face checkpoint.

    Its name is the directory's, or the run's. Raises `UserError` for what is none of them or is damaged.
    """
    path = path.resolve()
    if (path / "config.json").is_file() and not (path / "config.yaml").is_file():
        file, companions = path / "tokenizer.json", read_companions(path)
        if not file.is_file():
            raise UserError(f"{path} has no tokenizer.json, which turns text into tokens")
        model = load_hf(path)
    else:
        found = load_with_config(path, keep_integers=True)
        file, companions, model = found.need_tokenizer_file(), found.companions(), found.model
    tokenizer = load_tokenizer(file, model.config.vocab_size)
    name = path.parents[1].name if path.parent.name == "checkpoints" else path.name
    return Served(model, tokenizer, special_tokens(tokenizer, companions), chat_template(companions), name)
