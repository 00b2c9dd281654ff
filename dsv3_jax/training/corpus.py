"""The corpus of a run: read by the run's own tokenizer, the same on every host, and the one that its checkpoints know."""

import functools
import hashlib
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.cluster.processes import broadcast_from_first, equals_first, first_nonempty, on_first
from dsv3_jax.config import Config, config_to_dict
from dsv3_jax.data.companions import Companions
from dsv3_jax.data.corpus import absolute_patterns
from dsv3_jax.data.identity import CorpusIdentity, identify
from dsv3_jax.data.store import Corpus, load_corpus
from dsv3_jax.data.tokenizer import tokenizer_hash
from dsv3_jax.errors import UserError
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.streams import say


@dataclass(frozen=True)
class RunCorpus:
    """A run's corpus, with what its checkpoints keep about it."""

    corpus: Corpus
    record: dict[str, Any]  # `CorpusIdentity.record`, and `tokenizer`, the sha256 of the run's tokenizer.json
    own_tokenizer: bool  # whether the run's directory had its tokenizer already
    changed: str  # what is not as it was at the last checkpoint, and was accepted by `data.allow_changed`; else ''


def load_run_corpus(
    config: Config, run: RunDirectory, earlier: dict[str, Any] | None, tokenizer: Path | None, companions: Companions,
    allow_changed: bool = False,
) -> RunCorpus:  # fmt: skip
    """Load a run's corpus on all processes, process 0 first: it may have to train a tokenizer and to tokenise.

    Args:
        config: The run's, with absolute paths.
        run: Its directory, whose tokenizer.json is read if there are checkpoints.
        earlier: The metadata of the last checkpoint, of which process 0's are taken; None at a fresh start.
        tokenizer: A tokenizer.json for a fresh start, instead of the one of `config.data`.
        companions: The files that go with the tokenizer.
        allow_changed: Accept a corpus that differs from that of the last checkpoint.

    Raises:
        UserError: As `load_corpus`; the corpus or the tokenizer is not that of the last checkpoint; hosts do not agree.
    """
    own = earlier is not None and bool(broadcast_from_first(run.tokenizer_file.is_file))
    if own:
        tokenizer = run.tokenizer_file
        on_first(lambda: _check_tokenizer(run, earlier or {}, _sha256(run.tokenizer_file.read_bytes())))
    identity = on_first(lambda: identify(config.data)) or identify(config.data)
    _agree("data.path: the corpus", identity.digest)
    changed = on_first(lambda: _check_unchanged(config, run, earlier, identity, allow_changed)) or ""
    data = config.data if tokenizer is None else replace(config.data, tokenizer=str(tokenizer))
    load = functools.partial(load_corpus, data, config.model.vocab_size, companions=companions)
    corpus = on_first(lambda: load(report=say)) or load()
    _agree("data.tokenizer: the tokenizer", tokenizer_hash(corpus.tokenizer) + repr(corpus.special))
    digest = _sha256(run.tokenizer_file.read_bytes() if own else corpus.tokenizer.to_str().encode())
    if not own:
        on_first(lambda: _check_tokenizer(run, earlier or {}, digest))
    return RunCorpus(corpus, identity.record() | {"tokenizer": digest}, own, changed)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_tokenizer(run: RunDirectory, earlier: dict[str, Any], digest: str) -> None:
    """Raise `UserError` if the checkpoints know another tokenizer; those of earlier versions know none."""
    known = (earlier.get("corpus") or {}).get("tokenizer", digest)
    if known != digest:
        found = "is not the one" if run.tokenizer_file.is_file() else "is gone, and one made now is not that"
        raise UserError(
            f"{run.tokenizer_file} {found} with which the run was trained (sha256 {known[:12]}...): put that one back"
        )


def _check_unchanged(
    config: Config, run: RunDirectory, earlier: dict[str, Any] | None, identity: CorpusIdentity, allow: bool
) -> str:  # fmt: skip
    """What differs from the corpus of the last checkpoint, if that is allowed; `UserError` if not."""
    if not earlier:
        return ""
    if earlier.get("corpus"):
        changed = identity.changes_since(earlier["corpus"])
    else:  # an earlier version's, which knows no more than the paths
        before = {key: path and absolute_patterns(path) for key, path in _paths(earlier["config"]["data"]).items()}
        now = _paths(config_to_dict(config.data))
        changed = "; ".join(f"data.{key} was {before[key]}, now {now[key]}" for key in now if now[key] != before[key])
    if changed and not allow:
        raise UserError(
            f"data.path: the corpus is not the one that {run.path} was trained on: {changed}; put it back, or go on with what "
            "is there by data.allow_changed=true"
        )
    return changed


def _paths(data: dict[str, Any]) -> dict[str, str | None]:
    return {key: data.get(key) for key in ("path", "validation_path")}


def _agree(what: str, digest: str) -> None:
    """Raise `UserError` on all processes if one has another digest than process 0."""
    mine = "" if equals_first(digest) else f"{what} of process {jax.process_index()} on {socket.gethostname()}"
    if other := first_nonempty(mine):
        raise UserError(f"{other} is not that of process 0: every host must have the same files")
