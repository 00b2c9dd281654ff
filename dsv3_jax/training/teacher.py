"""The model that a run learns from by distillation: `distill.teacher`."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx

from dsv3_jax.checkpoint.load import Checkpoint, open_checkpoint
from dsv3_jax.checkpoint.manifest import content_digest
from dsv3_jax.checkpoint.storage import load_weights
from dsv3_jax.config import Config
from dsv3_jax.errors import UserError
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.precision.recipes import Recipe
from dsv3_jax.state.train_state import abstract_model, abstract_state


@dataclass(frozen=True)
class Teacher:
    """A model whose predictions are learned from, in 16 or 32 bits whatever its student's products are in."""

    config: Config  # the run's, with the teacher's architecture
    weights: tuple[nnx.State, nnx.State]  # parameters and router biases, as the run's mesh stores its own; may be abstract
    identity: dict[str, str]  # what checkpoints of the run keep of it: `path`, and `sha256` of its files

    def model(self, layout: Layout, recipe: Recipe, params: nnx.State, router_bias: nnx.State) -> Transformer:
        """The model with these weights, which may be traced."""
        return nnx.merge(abstract_model(self.config, recipe, layout).graph, params, router_bias)


def open_teacher(config: Config, layout: Layout, earlier: dict[str, Any] | None = None) -> Teacher | None:
    """The verified teacher of `distill.teacher` with abstract weights; None if it names none.

    `earlier` is the metadata of the run's last checkpoint, None at a fresh start. Raises `UserError` if the teacher does not
    fit the model or the mesh, or is not the one that the run began with.
    """
    known = None if earlier is None else earlier.get("teacher")
    if config.distill.teacher is None:
        if known:
            raise UserError(f"distill.teacher=null, and the run learned from {known['path']} until its last checkpoint")
        return None
    found = open_checkpoint(config.distill.teacher)
    _check_fits(config, found)
    identity = {"path": str(found.path), "sha256": content_digest(found.path)}
    if earlier is not None and (known or {}).get("sha256") != identity["sha256"]:
        before = f"from {known['path']}, which had other content" if known else "from none"
        raise UserError(f"distill.teacher={config.distill.teacher}: until its last checkpoint the run learned {before}")
    taught = replace(config, model=found.config.model)
    layout_for(taught, layout.devices)  # raises where the mesh's axes do not divide its sizes
    template = abstract_state(taught, layout)
    return Teacher(taught, (template.params, template.router_bias), identity)


def with_weights(teacher: Teacher) -> Teacher:
    """The teacher with its weights on the devices, from abstract ones."""
    return replace(teacher, weights=load_weights(Path(teacher.identity["path"]), *teacher.weights))


def _check_fits(config: Config, found: Checkpoint) -> None:
    for name in ("vocab_size", "num_nextn_predict_layers"):
        ours, theirs = getattr(config.model, name), getattr(found.config.model, name)
        if ours != theirs:
            raise UserError(f"model.{name}={ours}, and distill.teacher={config.distill.teacher} has {theirs}")


def check_tokenizer(teacher: Teacher, tokenizer: str) -> None:
    """Raise `UserError` if the teacher is known to have another tokenizer than the run's, whose sha256 is given."""
    found = Checkpoint(Path(teacher.identity["path"]), teacher.config).tokenizer_file()
    if found is not None and hashlib.sha256(found.read_bytes()).hexdigest() != tokenizer:
        raise UserError(
            f"distill.teacher={teacher.config.distill.teacher} has another tokenizer than this run; begin with "
            f"train.init_from, or set data.tokenizer={found}"
        )
