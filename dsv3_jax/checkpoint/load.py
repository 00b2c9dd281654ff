"""Loading a trained model from a run or a checkpoint, with its tokenizer."""

import functools
import hashlib
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from flax import nnx
from tokenizers import Tokenizer

from dsv3_jax.checkpoint.manifest import verify
from dsv3_jax.checkpoint.retention import newest
from dsv3_jax.checkpoint.storage import check_path, load_weights, read_metadata
from dsv3_jax.checks import require
from dsv3_jax.cluster.processes import on_first
from dsv3_jax.config import Config, ParallelConfig, config_from_dict
from dsv3_jax.data.companions import CONFIG, DIRECTORY, Companions, read_companions, with_fields
from dsv3_jax.data.special_tokens import SpecialTokens, special_tokens
from dsv3_jax.data.store import Corpus, TokenStore, load_corpus, read_documents
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.files import expand_home
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.state.train_state import abstract_state, serving_graph


@dataclass(frozen=True)
class Checkpoint:
    """The directory and the configuration of a complete, undamaged checkpoint."""

    path: Path
    config: Config

    def tokenizer_file(self) -> Path | None:
        """The path of tokenizer.json: an imported checkpoint's own, or that of the run, two levels above its checkpoint.

        Raises `UserError` if it is not the one that the checkpoint was trained with.
        """
        found = (parent / "tokenizer.json" for parent in (self.path, *self.path.parents[:2]))
        file = next((file for file in found if file.is_file()), None)
        known = (read_metadata(self.path).get("corpus") or {}).get("tokenizer")
        if file is not None and known and hashlib.sha256(file.read_bytes()).hexdigest() != known:
            raise UserError(f"{file} is not the tokenizer that {self.path} was trained with (sha256 {known[:12]}...)")
        return file

    def need_tokenizer_file(self) -> Path:
        """`tokenizer_file`. Raises `UserError` also if there is none."""
        file = self.tokenizer_file()
        if file is None:
            raise UserError(f"no tokenizer.json in {self.path} or above it; a checkpoint needs its run's one")
        return file

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises as `need_tokenizer_file`."""
        return load_tokenizer(self.need_tokenizer_file(), self.config.model.vocab_size)

    def companions(self) -> Companions:
        """The files that came with its model or tokenizer from Hugging Face: an imported checkpoint's own, or its run's."""
        of_run = self.path.parent.name == "checkpoints" and not (self.path / DIRECTORY).is_dir()
        found = read_companions(self.path.parents[1] if of_run else self.path)
        # an import of an earlier version has config.json in its metadata alone
        return found if CONFIG in found else with_fields(found, CONFIG, read_metadata(self.path).get("hf_config") or {})

    def special_tokens(self) -> SpecialTokens:
        """The tokens that begin and end a text. Raises `UserError` as `tokenizer`."""
        return special_tokens(self.tokenizer(), self.companions())

    def corpus(self) -> Corpus:
        """The documents of the configuration's own data, in both splits. Raises as `need_tokenizer_file` and `load_corpus`."""
        data = replace(self.config.data, tokenizer=str(self.need_tokenizer_file()))
        return load_corpus(data, self.config.model.vocab_size, companions=self.companions())

    def read_text(self, path: str) -> TokenStore:
        """All documents of what `data.path` may be. Raises as `tokenizer` and `read_documents`."""
        report = functools.partial(print, file=sys.stderr, flush=True)
        return read_documents(replace(self.config.data, path=path), self.tokenizer(), report, self.special_tokens())


@dataclass(frozen=True)
class LoadedModel(Checkpoint):
    """A checkpoint with its model."""

    model: Transformer


@dataclass(frozen=True)
class LoadedWeights(Checkpoint):
    """Weights on a mesh, for `training.step.make_eval_step`."""

    layout: Layout
    params: nnx.State
    router_bias: nnx.State


def resolve(run_or_checkpoint: str | Path) -> Path:
    """The checkpoint's directory that a run (its latest), a directory `checkpoints` or a checkpoint names.

    Raises `UserError` if there is none.
    """
    path = expand_home(run_or_checkpoint).absolute()  # Orbax takes no other
    check_path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run (runs/NAME) or a checkpoint (runs/NAME/checkpoints/STEP)")
    for directory in (path / "checkpoints", path):
        if latest := newest(directory):
            return latest[1]
    if (path / "checkpoints").is_dir() or path.name == "checkpoints":
        raise UserError(f"{path} holds no complete checkpoint yet")
    require(
        not (path / "config.json").is_file(),
        f"{path} has a config.json, as Hugging Face's checkpoints do: make it one of dsv3_jax's with "
        f"`dsv3 import {path} CKPT_DIR`",
    )
    verify(path)
    return path


def open_checkpoint(run_or_checkpoint: str | Path) -> Checkpoint:
    """A run's latest checkpoint, or the one at the path, verified.

    Raises `UserError` if there is none that is complete and undamaged.
    """
    path = resolve(run_or_checkpoint)
    on_first(lambda: verify(path))
    return Checkpoint(path, config_from_dict(read_metadata(path)["config"], str(path)))


def load_for_evaluation(run_or_checkpoint: str | Path, keep_integers: bool = False) -> LoadedWeights:
    """The weights on the run's mesh, or on one device where there are too few for that mesh. Raises as `open_checkpoint`.

    With `keep_integers` those of a compressed checkpoint stay integers on one device; otherwise they are what these stand for.
    """
    found = open_checkpoint(run_or_checkpoint)
    config = found.config
    needed = math.prod(abs(getattr(config.parallel, axis)) for axis in AXES)
    if needed > len(jax.devices()) and jax.process_count() == 1:
        config = replace(config, parallel=ParallelConfig())
    layout = layout_for(config)
    state = abstract_state(config, layout)
    weights = load_weights(found.path, state.params, state.router_bias, keep_integers and layout.size == 1)
    return LoadedWeights(found.path, config, layout, *weights)


def load_with_config(run_or_checkpoint: str | Path, keep_integers: bool = False) -> LoadedModel:
    """The model with its configuration; devices, integers and errors as with `load_for_evaluation`."""
    loaded = load_for_evaluation(run_or_checkpoint, keep_integers)
    model = nnx.merge(serving_graph(loaded.config, loaded.layout), loaded.params, loaded.router_bias)
    return LoadedModel(loaded.path, loaded.config, model)


def load(run_or_checkpoint: str | Path, *, keep_integers: bool = False) -> Transformer:
    """Load the model of a run or checkpoint, on the run's mesh if there are the devices for it, and on one device otherwise.

    Args:
        run_or_checkpoint: A run (its latest checkpoint), a checkpoint, an imported or a compressed checkpoint.
        keep_integers: On one device, compressed weights stay integers: they take as much memory as on disk, and `generate`
            reads so much less for a token. Otherwise they are the float32 numbers that these stand for.

    Returns:
        A flax.nnx module that maps tokens, i32[B, L], to logits, f32[B, L, V]. Parameters are float32; activations and products
        are in 16 or 32 bits, as `precision.recipe` has them outside its 8-bit products.

    Raises:
        UserError: There is no complete, undamaged checkpoint.
    """
    return load_with_config(run_or_checkpoint, keep_integers).model
