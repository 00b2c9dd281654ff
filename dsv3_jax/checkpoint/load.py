"""Loading a trained model from a run or a checkpoint, with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer

from dsv3_jax.checkpoint.manager import load_weights, read_metadata, resolve, verify
from dsv3_jax.config import Config, config_from_dict
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.train.state import abstract_model


@dataclass(frozen=True)
class Loaded:
    model: Transformer
    config: Config
    checkpoint: Path

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer.json, which stands two levels above a checkpoint."""
        for parent in self.checkpoint.parents[:2]:
            if (parent / "tokenizer.json").is_file():
                return load_tokenizer(parent / "tokenizer.json", self.config.model.vocab_size)
        raise UserError(f"no tokenizer.json above {self.checkpoint}; a checkpoint needs its run's one")


def load_with_config(run_or_checkpoint: str | Path) -> Loaded:
    """Raises `UserError` if there is no whole, undamaged checkpoint of this project at the path."""
    checkpoint = resolve(run_or_checkpoint)
    verify(checkpoint)
    config = config_from_dict(read_metadata(checkpoint)["config"], str(checkpoint))
    graph, params, router_bias = abstract_model(config)
    return Loaded(nnx.merge(graph, *load_weights(checkpoint, params, router_bias)), config, checkpoint)


def load(run_or_checkpoint: str | Path) -> Transformer:
    """The model of a run (its latest checkpoint) or of one checkpoint."""
    return load_with_config(run_or_checkpoint).model
